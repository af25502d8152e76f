"""Channel statistics of an encoder's tokens over a sample of a pack, for caches that must know them beforehand."""

from pathlib import Path

from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline.ray_workers import Pool, run_tasks
from geomcache.pipeline.store.statistics import channel_statistics, even_rows
from geomcache.stages.extract.frames_to_tokens import FramesToTokens, OnError
from geomcache.stages.extract.worker import open_encoder

SAMPLE_ROWS = 256


class _Sampler:
    """Encodes some rows; a worker as ``pipeline/ray_workers.py`` runs them."""

    def __init__(self, pack: Path, recipe: TokenRecipe, device: str, on_error: OnError) -> None:
        self._pack, self._recipe, self._device, self._on_error = pack, recipe, device, on_error

    def start(self) -> None:
        self._reader, self._encoder = open_encoder(self._pack, self._recipe, self._device)

    def run(self, rows: list[int]) -> ChannelStatistics:
        size = self._encoder.spec.encoder_batch_size
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        tokens = FramesToTokens(self._reader, self._encoder, self._on_error)
        return channel_statistics(row for part in parts for row in tokens.encode(tokens.decode(part)))

    def close(self) -> None:
        self._reader.close()
        del self._encoder


def sample_statistics(
    pack: Path, recipe: TokenRecipe, rows: int, device: str, ray_address: str | None, on_error: OnError
) -> ChannelStatistics:
    """Mean and standard deviation of every channel over at most 256 rows, in this process or on a cluster.

    Raises:
        GeomcacheError: the pack, the weights or the cluster cannot be used.
    """
    pool = Pool(
        count=1,
        what="the sampling worker",
        advice="give it more memory: a smaller encoder_config.batch_size",
        gpus_each=1.0 if device.startswith("cuda") else 0.0,
        address=ray_address,
    )
    sample = even_rows(rows, SAMPLE_ROWS).tolist()
    ((_, statistics),) = run_tasks(_Sampler, (pack, recipe, device, on_error), [sample], pool)
    return statistics
