"""Whole-store check: manifest, metadata, commit records, every byte of every shard; coverage of the pack; repair."""

import contextlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from geomcache.cache_schemas.errors import CacheStale, GeomcacheError
from geomcache.cache_schemas.fingerprint import digest_file
from geomcache.cache_schemas.layout import commit_path
from geomcache.cache_schemas.manifest import Manifest, ShardCommit
from geomcache.pipeline.files import write_atomic
from geomcache.pipeline.store.commits import read_commits, wrong_metadata, zarr_metadata
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.lock import write_lock
from geomcache.pipeline.store.reader import open_manifest
from geomcache.pipeline.store.rows import StoredRows, load_index
from geomcache.pipeline.store.writer import inside


@dataclass(frozen=True)
class VerifyResult:
    """What was found."""

    shards: int
    committed: int  # damaged ones included
    rows: int
    rows_committed: int  # in shards that are whole
    bytes: int
    damaged: dict[int, str]  # shard -> its problem
    metadata: tuple[str, ...]  # zarr.json files that are missing or do not say what the manifest says
    non_finite_values: int  # that the encoder made, by the commit records
    rows_with_non_finite: int
    pack: str  # "matches", "not compared", or what differs
    repaired: bool = False
    bad_rows: dict[int, list[int]] = field(default_factory=dict)  # shard -> rows of the cache that fail their checksum

    @property
    def complete(self) -> bool:
        """Every shard is there and whole."""
        whole = self.committed == self.shards and not self.damaged and not self.metadata
        return whole and self.pack in ("matches", "not compared")


def verify_cache(
    path: Path,
    *,
    repair: bool,
    progress: Callable[[int, int], None],
    pack: tuple[str, int] | None = None,
    unlock: bool = False,
) -> VerifyResult:
    """Check every byte of the cache; with ``repair`` drop damaged shards so that extract redoes just those.

    Args:
        path: the cache's folder.
        repair: remove the records of damaged shards and write lost metadata again.
        progress: called with (shards done, shards).
        pack: digest and rows of the pack that the cache should cover.
        unlock: with ``repair``, take over the write lock that a dead run on another machine left.

    Raises:
        CacheMissing, CacheDamaged, SchemaTooNew: the manifest cannot be read.
        CacheStale: with ``repair``: the manifest belongs to another cache than all records.
        CacheLocked: a writer is at work (only with ``repair``).
    """
    manifest = open_manifest(path)  # first: a mistyped path must not get a lock file
    lock = write_lock(path, "geomcache cache verify --repair", unlock=unlock) if repair else contextlib.nullcontext()
    with lock:
        return _verify(path, manifest, repair, progress, pack)


def _verify(
    path: Path,
    manifest: Manifest,
    repair: bool,
    progress: Callable[[int, int], None],
    pack: tuple[str, int] | None,
) -> VerifyResult:
    files = LocalFiles(path)
    damaged: dict[int, str] = {}
    foreign: list[int] = []

    def take(shard: int, problem: GeomcacheError) -> None:
        damaged[shard] = problem.what
        if isinstance(problem, CacheStale):
            foreign.append(shard)

    commits = read_commits(files, manifest, on_error=take)
    wrong = wrong_metadata(files, manifest)
    bad_rows: dict[int, list[int]] = {}
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:  # hashing leaves the interpreter free
        checks = pool.map(lambda commit: _check(files, manifest, commit), commits.values())
        for done, (commit, (problem, failing)) in enumerate(zip(commits.values(), checks, strict=True), 1):
            if problem is not None:
                damaged[commit.shard] = problem
                bad_rows[commit.shard] = failing
            progress(done, len(commits))
    files.close()
    if repair:
        if foreign and len(foreign) == len(commits) + len(damaged):
            raise CacheStale(
                f"no commit record of {path} belongs to its manifest",
                expected=f"records of cache {manifest.recipe.fingerprint.cache_id}",
                found="records of another cache: it is the manifest that is wrong, or everything",
                fix="restore manifest.json; nothing was removed",
            )
        for name in wrong:
            write_atomic(inside(path, name), zarr_metadata(manifest)[name])
        for shard in damaged:
            _remove(inside(path, commit_path(shard)))
    whole = [commit for shard, commit in commits.items() if shard not in damaged]
    return VerifyResult(
        shards=manifest.shards,
        committed=len(commits.keys() | damaged.keys()),
        rows=manifest.rows,
        rows_committed=sum(commit.rows for commit in whole),
        bytes=sum(sum(commit.sizes.values()) for commit in whole),
        damaged=dict(sorted(damaged.items())),
        metadata=tuple(wrong),
        non_finite_values=sum(commit.statistics.non_finite for commit in whole),
        rows_with_non_finite=sum(commit.invalid_rows for commit in whole),
        pack=_coverage(manifest, pack),
        repaired=repair and bool(damaged or wrong),
        bad_rows={shard: rows for shard, rows in bad_rows.items() if rows},
    )


def _check(files: LocalFiles, manifest: Manifest, commit: ShardCommit) -> tuple[str | None, list[int]]:
    """What is wrong with a shard, and which rows of the cache cannot be read.

    The digest covers every byte, gaps too; the rows are read as any reader reads them.
    """
    problem, failing = None, []
    try:
        for name, array in manifest.arrays.items():
            index = load_index(files, manifest, commit, name, array)
            if digest_file(files.folder / index.path) != commit.digests[name]:
                problem = f"{files.folder / index.path}: its digest is not the committed one"
    except (GeomcacheError, OSError) as found:  # an unreadable sector must not end the check of the others
        return _words(found), []
    reader = StoredRows(files, manifest, {commit.shard: commit}, "every", 1)
    for row in range(commit.first_row, commit.first_row + commit.rows):
        try:
            reader.read([row])
        except (GeomcacheError, OSError) as found:
            problem = problem or _words(found)
            failing.append(row)
    return problem, failing


def _words(problem: GeomcacheError | OSError) -> str:
    return problem.what if isinstance(problem, GeomcacheError) else str(problem)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _coverage(manifest: Manifest, pack: tuple[str, int] | None) -> str:
    if pack is None:
        return "not compared"
    digest, rows = pack
    if digest != manifest.recipe.fingerprint.pack:
        return f"another pack: {digest[:16]}, the cache was made from {manifest.recipe.fingerprint.pack[:16]}"
    return "matches" if rows == manifest.rows else f"{rows} rows in the pack, {manifest.rows} in the cache"
