"""What the trainer's benchmarks share: caches of any size for a real pack, and runs of the trainer that are timed.

A run is the project's own ``Trainer.fit``; where its tokens come from is all that differs, and is put in the place of
``TokenFeed``, which is where the loop gets them from.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.fingerprint import Fingerprint
from geomcache.cache_schemas.layout import shard_rows
from geomcache.cache_schemas.manifest import EncoderRecord, Manifest, ShardStatistics, TokenRecipe
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.configs.load import read_yaml
from geomcache.pipeline.codecs.bf16 import bfloat16_bits
from geomcache.pipeline.config_errors import parse_config
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.writer import commit_shard, create_or_open
from geomcache.pipeline.tokens import build_codec
from geomcache.stages.train import loop
from geomcache.stages.train.checkpoint import CheckpointCard
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.metrics import read_metrics
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.ranks import make_accelerator
from geomcache.stages.train.run import build_policy
from geomcache.stages.train.token_feed import TokenFeed

GRID, DIM = (16, 16), 768  # a row of two views: 768 KiB in bfloat16
PER_SHARD = 256
Rows = NDArray[np.int64]
Make = Callable[[Rows], torch.Tensor]
CACHED: None = None  # the trainer's own TokenFeed


def fill_cache(folder: Path, pack: Path) -> None:
    """A cache of ``pack`` with made tokens [V, 256, 768], which do not compress; written by the project's writer."""
    with PackReader(pack) as reader:
        info = reader.info
    height, width = GRID
    spec = TokenSpec(
        encoder="synthetic", tap="none", cameras=tuple(camera.name for camera in info.contract.cameras), grid=GRID,
        dim=DIM, image_size=(14 * height, 14 * width), encoder_batch_size=1,
    )  # fmt: skip
    recipe = TokenRecipe(
        spec=spec,
        contract=info.contract,
        fingerprint=Fingerprint(encoder_config="0" * 64, weights="none", image_path="1", pack=info.digest),
        encoder=EncoderRecord(name="synthetic", config={}, license="none"),
    )
    manifest = Manifest(
        recipe=recipe, rows=info.rows, rows_per_shard=PER_SHARD, arrays=build_codec(spec).arrays(),
        geomcache_version="bench",
    )  # fmt: skip
    manifest = create_or_open(folder, manifest, "made by benchmarks/train.py\n")
    base = bfloat16_bits(torch.randn(32, *spec.row_shape, generator=torch.Generator().manual_seed(0)))
    statistics = ShardStatistics(
        min=-5, max=5, mean_norm=28, non_finite=0, mean=0, std=1, valid_rows="ff" * (PER_SHARD // 8)
    )
    for shard in range(manifest.shards):
        rows = shard_rows(shard, manifest.rows, PER_SHARD)
        made = np.stack([np.roll(base[row % 32].reshape(-1), row).reshape(spec.row_shape) for row in rows])
        commit_shard(folder, manifest, shard, {"tokens": made}, statistics=statistics, seconds={})


def config_of(pack: Path, cache: Path | None, **changes: Any) -> TrainConfig:
    """The preset for a laptop (tiny Qwen2.5-VL, DiT of 4 blocks), as a run that only trains."""
    plain = read_yaml("train/tiny")
    plain["policy"] = merged(plain["policy"], changes.pop("policy", {}))
    plain |= {"out": Path("unused"), "data": [{"pack": pack, "cache": cache}], "device": "cpu", "trackers": []}
    plain |= {"log_every": 1, "validation_share": 0, "diagnose_every": None, "validate_every": 10**6}
    plain["policy"].setdefault("geom_compression_type", "none" if cache is None else "pool")
    return parse_config(TrainConfig, plain | changes, "benchmarks/train.py")


def merged(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, ``theirs`` over ``mine``."""
    both = {name: merged(mine[name], theirs[name]) for name in mine.keys() & theirs.keys() if type(mine[name]) is dict}
    return mine | theirs | both


class Feed:
    """In the place of a ``TokenFeed``: tokens that ``make`` gives for each batch's rows when they are asked for."""

    def __init__(
        self, make: Make, _data: TrainingData, batches: Iterable[Rows], _size: int, device: torch.device
    ) -> None:
        self._make, self._batches, self._device = make, iter(batches), device

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        return self._make(next(self._batches)).to(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Timing:
    """Means over the timed steps of one run."""

    step_seconds: float
    wait_share: float  # of that time, waiting for a batch: its images, and its tokens decoded


class Run:
    """One configuration, ready to be trained with again and again from step 0 (weights go on where they are)."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.data = config, TrainingData(config)
        self.policy = build_policy(config, self.data)
        trained = self.data.training_rows
        self.normaliser = Normaliser.fit(
            self.data.states()[trained], self.data.labels(trained), config.normalisation, config.gripper
        )

    def train(
        self, steps: int, skip: int, make: Make | None = CACHED, after_step: Callable[[int], None] | None = None
    ) -> Timing:
        """``steps`` timed steps after ``skip`` that fill the loader's and the feed's queues."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config.model_copy(update={"out": Path(folder), "steps": skip + steps})
            config = config.model_copy(update={"save_every": skip + steps})
            card = CheckpointCard(
                step=0, policy=self.policy.config, contract=self.data.contract, recipe=self.data.recipe,
                normaliser=self.normaliser, packs=tuple(pack.info.digest for pack in self.data.packs),
                mixed_precision=config.mixed_precision, geomcache_version="bench",
            )  # fmt: skip
            maker = BatchMaker(self.data, self.policy.backbone.packer, self.normaliser, config)
            trainer = loop.Trainer(config, self.policy, maker, card, make_accelerator(config))
            feed = TokenFeed if make is CACHED else partial(Feed, make)
            with mock.patch.object(loop, "TokenFeed", feed):
                trainer.fit(lambda done, *_: after_step(done) if after_step else None)
            lines = read_metrics(config.out / "metrics.jsonl")
        times = [line["seconds_per_step"] * (line["step"] + 1) for line in lines]
        waits = [line["data_wait_share"] * time for line, time in zip(lines, times, strict=True)]
        seconds = times[-1] - times[skip - 1]
        return Timing(seconds / steps, (waits[-1] - waits[skip - 1]) / seconds)
