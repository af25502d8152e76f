"""``geomcache cache``."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.stages.cli.common import EXIT_FINDING, JsonOption, progress_bar, say, show_table, show_values

app = typer.Typer(help="Token caches: look at them, check every byte.", no_args_is_help=True)


@app.command("ls")
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder to search.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """All caches under a folder."""
    from geomcache.cache_schemas.errors import GeomcacheError
    from geomcache.cache_schemas.manifest import MANIFEST_NAME

    found = []
    for path in sorted(folder.rglob(MANIFEST_NAME)):
        try:
            found.append(_summary(path.parent))
        except GeomcacheError as problem:
            say(f"left out: {problem.what}")
    if as_json:
        show_values({"caches": found}, as_json)
        return
    columns = ["cache", "encoder", "tap", "rows", "complete", "bytes", "license"]
    show_table(f"caches under {folder}", columns, [[str(entry[name]) for name in columns] for entry in found])


@app.command("info")
def info(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    as_json: JsonOption = False,
) -> None:
    """What a cache is: spec, contract, fingerprint, progress."""
    from geomcache.pipeline.store.reader import open_manifest

    recipe = open_manifest(cache).recipe
    details = {"spec": recipe.spec, "contract": recipe.contract, "fingerprint": recipe.fingerprint}
    shown = {name: value.model_dump(mode="json") for name, value in details.items()}
    show_values({**_summary(cache), **shown, "encoder_config": recipe.encoder.config}, as_json)


@app.command("verify")
def verify(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards; extract then redoes just those.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a cache: structure, checksums, digests. Exit 1 when something is missing or damaged."""
    from geomcache.pipeline.store.verify import verify_cache

    with progress_bar("verifying shards") as progress:
        result = verify_cache(cache, repair=repair, progress=progress)
    show_values(
        {
            "shards": result.shards,
            "committed": result.committed,
            "damaged": {str(shard): problem for shard, problem in result.damaged.items()},
            "damaged_metadata": list(result.metadata),
            "complete": result.complete,
            "repaired": result.repaired,
        },
        as_json,
    )
    if not result.complete:
        first = "first `geomcache cache verify --repair`, then " if result.damaged and not repair else ""
        say(f"{first}run the same `geomcache extract` again to make the missing shards")
        raise typer.Exit(EXIT_FINDING)


def _summary(path: Path) -> dict[str, object]:
    from geomcache.pipeline.store.reader import open_manifest
    from geomcache.pipeline.store.writer import read_commits

    manifest = open_manifest(path)
    commits = read_commits(path, manifest)
    spec = manifest.recipe.spec
    return {
        "cache": str(path),
        "id": manifest.recipe.fingerprint.cache_id,
        "encoder": spec.encoder,
        "tap": spec.tap,
        "rows": manifest.rows,
        "row_shape": list(spec.row_shape),
        "codec": spec.codec,
        "shards": f"{len(commits)}/{manifest.shards}",
        "complete": len(commits) == manifest.shards,
        "bytes": sum(sum(commit.sizes.values()) for commit in commits.values()),
        "license": manifest.recipe.encoder.license,
    }
