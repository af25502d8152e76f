"""What a person wants to know of a cache at a glance, without reading its rows."""

from pathlib import Path

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import CacheDamaged
from geomcache.cache_schemas.manifest import EXTRACTION_NAME, ExtractionRecord, ShardCommit
from geomcache.pipeline.store.commits import read_commits, whole_shards
from geomcache.pipeline.store.local_files import LocalFiles
from geomcache.pipeline.store.lock import lock_owner
from geomcache.pipeline.store.reader import open_files, read_manifest


class CacheOverview(Schema):
    """One line of ``cache ls``, the head of ``cache info``."""

    cache: str
    id: str
    encoder: str
    tap: str
    codec: str
    row_shape: tuple[int, ...]
    rows: int
    rows_committed: int
    shards: str  # committed/all
    complete: bool
    bytes: int
    bytes_per_row: float | None
    license: str
    derived_from: str | None  # id of the full cache
    writer: str | None  # who holds, or left, the write lock
    # Over the committed shards, as a reader gets the tokens; None before the first.
    min: float | None
    max: float | None
    mean_norm: float | None
    non_finite: int  # values
    rows_not_finite: int  # with at least one such value; rows that were masked are among them
    codec_max_error: float | None
    codec_rms_error: float | None  # each channel divided by its std; of the worst shard


def overview(location: str) -> CacheOverview:
    """Look at a cache.

    Raises:
        CacheMissing, CacheDamaged, CacheStale, SchemaTooNew: by name.
    """
    files = open_files(location)
    manifest = read_manifest(files)
    committed = read_commits(files, manifest)
    if isinstance(files, LocalFiles):
        whole = whole_shards(files.folder, manifest, committed)
        committed = {shard: commit for shard, commit in committed.items() if shard in whole}
    commits = list(committed.values())
    statistics = [commit.statistics for commit in commits]
    rows, size = sum(commit.rows for commit in commits), sum(sum(commit.sizes.values()) for commit in commits)
    owner = lock_owner(Path(files.folder)) if isinstance(files, LocalFiles) else None
    spec = manifest.recipe.spec
    return CacheOverview(
        cache=location,
        id=manifest.recipe.fingerprint.cache_id,
        encoder=spec.encoder,
        tap=spec.tap,
        codec=spec.codec,
        row_shape=spec.row_shape,
        rows=manifest.rows,
        rows_committed=rows,
        shards=f"{len(commits)}/{manifest.shards}",
        complete=len(commits) == manifest.shards,
        bytes=size,
        bytes_per_row=size / rows if rows else None,
        license=manifest.recipe.encoder.license,
        derived_from=manifest.derived_from,
        writer=None if owner is None else str(owner),
        min=min((low for each in statistics if (low := each.min) is not None), default=None),
        max=max((high for each in statistics if (high := each.max) is not None), default=None),
        mean_norm=_mean(commits) if rows else None,
        non_finite=sum(each.non_finite for each in statistics),
        rows_not_finite=sum(commit.invalid_rows for commit in commits),
        codec_max_error=max((e for s in statistics if (e := s.codec_max_error) is not None), default=None),
        codec_rms_error=max((e for s in statistics if (e := s.codec_rms_error) is not None), default=None),
    )


def extraction_record(location: str) -> ExtractionRecord | None:
    """How the cache was made, if `geomcache extract` left its record; ``CacheDamaged`` when that cannot be read."""
    (data,) = open_files(location).read_many([EXTRACTION_NAME])
    if isinstance(data, CacheDamaged):
        raise data
    return None if data is None else ExtractionRecord.parse(data, f"{location}/{EXTRACTION_NAME}", CacheDamaged)


def _mean(commits: list[ShardCommit]) -> float:
    rows = [commit.rows - commit.invalid_rows for commit in commits]
    norms = (commit.statistics.mean_norm * count for commit, count in zip(commits, rows, strict=True))
    return sum(norms) / max(sum(rows), 1)
