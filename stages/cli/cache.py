"""``geomcache cache``: ls, info, verify, derive; the rest is in ``cache_look``, ``cache_bench`` and ``cache_probe``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomcache.stages.cli import cache_bench, cache_look, cache_probe
from geomcache.stages.cli.common import (
    EXIT_FINDING,
    JsonOption,
    UnlockOption,
    progress_bar,
    say,
    show,
    show_table,
    show_values,
)

if TYPE_CHECKING:
    from geomcache.pipeline.store.verify import VerifyResult

app = typer.Typer(help="Token caches: look at them, check every byte, make smaller ones.", no_args_is_help=True)


@app.command("ls")
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder to search.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """All caches under a folder."""
    from geomcache.cache_schemas.errors import GeomcacheError, InputError
    from geomcache.cache_schemas.manifest import MANIFEST_NAME
    from geomcache.pipeline.store.overview import overview

    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder", expected="a folder that holds caches", found="something else or nothing"
        )
    found = []
    for path in sorted(folder.rglob(MANIFEST_NAME)):
        try:
            entry = overview(str(path.parent)).model_dump(mode="json")
        except (GeomcacheError, OSError) as problem:
            say(f"left out: {problem.what if isinstance(problem, GeomcacheError) else problem}")
            continue
        found.append({**entry, "cache": str(path.parent.relative_to(folder))} if not as_json else entry)
    if as_json:
        show_values({"caches": found}, as_json)
        return
    columns = ["cache", "encoder", "tap", "codec", "row_shape", "rows", "complete", "bytes", "license"]
    show_table(f"caches under {folder}", columns, [[_cell(name, entry[name]) for name in columns] for entry in found])


@app.command("info")
def info(
    cache: Annotated[str, typer.Argument(help="Folder or URL of the cache.")],
    as_json: JsonOption = False,
) -> None:
    """What a cache is: progress, statistics, what it can train, spec, contract, fingerprint."""
    from geomcache.pipeline.store.overview import extraction_record, overview
    from geomcache.pipeline.store.reader import open_manifest
    from geomcache.stages.train.building import compressors_for

    extraction = extraction_record(cache)
    recipe = open_manifest(cache).recipe
    details = {"spec": recipe.spec, "contract": recipe.contract, "fingerprint": recipe.fingerprint}
    values: dict[str, Any] = {
        **overview(cache).model_dump(mode="json"),
        "can_train": compressors_for(recipe.spec),
        "geom_dit_tokens": "any" if recipe.spec.pooled_to is None else str(recipe.spec.pooled_to),
        **{name: value.model_dump(mode="json") for name, value in details.items()},
        "encoder_config": recipe.encoder.config,
        "extraction": None if extraction is None else extraction.model_dump(mode="json"),
    }
    statistics = recipe.spec.channel_statistics
    if statistics is not None and not as_json:
        values["spec"]["channel_statistics"] = f"{len(statistics.mean)} channels, from {statistics.rows} rows"
    show_values(values, as_json)


@app.command("verify")
def verify(
    cache: Annotated[str, typer.Argument(help="Folder of the cache; not a URL: check the copy it was made from.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards; extract then redoes just those.")
    ] = False,
    pack: Annotated[Path | None, typer.Option(help="Also compare with this pack: is every row of it covered?")] = None,
    unlock: UnlockOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a cache: structure, checksums, digests. Exit 1 when something is missing or damaged."""
    from geomcache.cache_schemas.errors import InputError
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.objects import is_remote
    from geomcache.pipeline.store.verify import verify_cache

    if is_remote(cache):
        raise InputError(
            "verify reads a folder",
            expected="a path",
            found=cache,
            fix="verify before copying it there; every read of a row from a URL is checked",
        )

    covered = None
    if pack is not None:
        with PackReader(pack) as reader:
            covered = reader.info.digest, len(reader)
    with progress_bar("verifying shards") as progress:
        result = verify_cache(Path(cache), repair=repair, progress=progress, pack=covered, unlock=unlock)
    show_values(
        {
            "shards": result.shards,
            "committed": result.committed,
            "rows": f"{result.rows_committed}/{result.rows}",
            "bytes": result.bytes,
            "damaged": {str(shard): problem for shard, problem in result.damaged.items()},
            "damaged_rows": {
                str(shard): rows if as_json or len(rows) < 4 else f"{len(rows)} rows, {rows[0]} to {rows[-1]}"
                for shard, rows in result.bad_rows.items()
            },
            "damaged_metadata": list(result.metadata),
            "non_finite_values": result.non_finite_values,
            "rows_with_non_finite": result.rows_with_non_finite,
            "pack": result.pack,
            "complete": result.complete,
            "repaired": result.repaired,
        },
        as_json,
    )
    if result.repaired and not result.damaged and result.committed == result.shards:
        say("the Zarr metadata was written again; nothing else was wrong")
    elif not result.complete:
        say(_advice(result, cache, repair))
        raise typer.Exit(EXIT_FINDING)


@app.command("derive")
def derive(
    cache: Annotated[str, typer.Argument(help="Folder or URL of the full cache.")],
    out: Annotated[Path, typer.Option(help="Folder of the new cache.")],
    pool: Annotated[
        int | None, typer.Option(min=1, help="Keep the means of this many groups of a row's tokens (K).")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="bf16, fp32, int8 or lossless; pooled tokens: fp32.")] = None,
    statistics_from: Annotated[
        str | None, typer.Option(help="Cache whose channel statistics to use, to train on both together.")
    ] = None,
    unlock: UnlockOption = False,
    as_json: JsonOption = False,
) -> None:
    """A smaller cache from a full one, without the encoder.

    Compressors pool and per_layer give the same from K = geom_dit_tokens pooled tokens as from all of them: a mean
    commutes with their linear layers. Of 2 x 256 tokens, --pool 16 keeps 1/32. Live tokens repeat the same steps.
    """
    from geomcache.configs.load import load_config
    from geomcache.stages.extract.derive import DeriveConfig
    from geomcache.stages.extract.derive import derive as run

    options = {"cache": cache, "out": out, "pool": pool, "codec": codec, "statistics_from": statistics_from}
    settings = load_config(DeriveConfig, None, [], options)
    with progress_bar("deriving shards") as progress:
        result = run(settings, progress, unlock=unlock)
    show(result, as_json)


app.command("stats")(cache_look.stats)
app.command("show")(cache_look.show)
app.command("diff")(cache_look.diff)
app.command("probe")(cache_probe.probe)
app.command("bench")(cache_bench.bench)


def _advice(result: "VerifyResult", cache: str, repair: bool) -> str:
    if result.pack not in ("matches", "not compared"):
        return f"this cache was not made from that pack: {result.pack}"
    first = f"first `geomcache cache verify {cache} --repair`, then " if not repair else ""
    if result.metadata and not result.damaged and result.committed == result.shards:
        return f"`geomcache cache verify {cache} --repair` writes the Zarr metadata again"
    again = "run the same `geomcache extract` (or `cache derive`) again to make the missing shards"
    return f"{first if result.damaged or result.metadata else ''}{again}"


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
