"""One recorded episode, its pack, caches and runs; and how faults are planted in copies of them.

A planted fault goes through the project's own writers: digests, checksums and seals of the copies hold, and every
declared value stays what it was. Only the numbers are wrong.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from numpy.typing import NDArray

from geomcache.cache_schemas.layout import shard_rows
from geomcache.pipeline.frames import EpisodeHead, EpisodeRows
from geomcache.pipeline.open_source import SourceRequest
from geomcache.pipeline.pack import build, shard_writer
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.sim.recorder import Config as DemosConfig
from geomcache.pipeline.sim.recorder import record
from geomcache.pipeline.store.card import data_card
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.pipeline.store.statistics import shard_statistics
from geomcache.pipeline.store.writer import commit_shard, create_or_open
from geomcache.stages.evaluate.check import run as check_run_module
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode, open_run
from geomcache.stages.evaluate.check.run import sample_steps
from geomcache.stages.evaluate.check.scene import NoScene, Replayed, Scene, Scenes, replay
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.run import run as train
from tests.conftest import build_pack_at, extract_without_ray, nothing

SIDE = 56  # pixels
Change = Callable[[NDArray[Any]], NDArray[Any]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demos/, pack/, caches/depth_anything3/ and the runs none/ and pool/, two steps old."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("check")
    config = DemosConfig(suite="libero_object", tasks=(0,), episodes=1, height=SIDE, width=SIDE)
    assert record(config, folder / "demos").succeeded == 1
    pack = build_pack_at(folder / "demos", folder / "pack", rows_per_shard=64)
    cache = extract_without_ray(pack, "depth_anything3", folder / "caches" / "depth_anything3")
    for name in ("none", "pool"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(
            TrainConfig.model_validate(
                {
                    "out": folder / name,
                    "data": [{"pack": pack, "cache": cache}],
                    "policy": {
                        "geom_compression_type": name,
                        "geom_dit_tokens": 4,
                        "dit": {"width": 32, "blocks": 2, "heads": 2},
                        "backbone": {"config": {"image_size": 28}},
                    },
                    "steps": 2,
                    "batch_size": 4,
                    "open_loop_rows": 8,
                    "device": "cpu",
                    "trackers": (),
                }
            ),
            nothing,
        )
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps its state for the life of a process; each test is like a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def intact(folder: Path) -> OpenedRun:
    """The run without geometry."""
    return open_run(folder / "none", "cpu")


@pytest.fixture(scope="session")
def scenes(intact: OpenedRun) -> Iterator[Scenes]:
    """One simulator for all tests."""
    found = Scenes(intact)
    yield found
    found.close()


class KeptScenes(Scenes):
    """Leaves the simulator that all tests share open."""

    def close(self) -> None:
        """Not here."""


@pytest.fixture
def one_simulator(scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_run` takes the tests' simulator."""
    monkeypatch.setattr(check_run_module, "Scenes", partial(KeptScenes, _open=scenes._open))


@pytest.fixture(scope="session")
def replayed(intact: OpenedRun, scenes: Scenes) -> Replayed:
    """The recorded episode, executed again once for every fault in stored data."""
    episode = the_episode(intact)
    return replay(scene_of(scenes, episode), episode.actions_TA, sample_steps(len(episode)))


def the_episode(run: OpenedRun) -> StoredEpisode:
    (episode,) = run.episodes(1)
    return episode


def scene_of(scenes: Scenes, episode: StoredEpisode) -> Scene:
    """The shared simulator, for an episode of a copied pack."""
    found = scenes.of(episode)
    assert not isinstance(found, NoScene)
    return replace(found, episode=episode)


@dataclass(frozen=True)
class _ChangedSource:
    """An episode of a pack as a data set that holds something else; what it says of itself is the original's."""

    pack: PackReader
    images: Change
    states: Change
    actions: Change
    every: int
    rows: int | None

    @property
    def contract(self) -> Any:
        return self.pack.info.contract

    location, revision, episode_count = "demos", "0" * 64, 1

    @property
    def details(self) -> dict[str, str]:
        return self.pack.info.request.sources[0].details

    def where(self, episode: int) -> str:
        return f"episode {episode}"

    def head(self, episode: int) -> EpisodeHead:
        record = self.pack.episodes[episode]
        return EpisodeHead(
            where="demos",
            suite=record.suite,
            task=record.task,
            number=record.number,
            instruction=record.instruction,
            actions_TA=self.actions(self.pack.actions_NA)[: self.rows : self.every].astype(np.float32),
            metadata=json.loads(record.metadata),
        )

    def read(self, _: int, start: int, stop: int) -> EpisodeRows:
        rows = np.arange(len(self.pack))[: self.rows : self.every][start:stop]
        frames = self.pack.frames(rows.tolist())
        images = np.ascontiguousarray(self.images(frames.images_BVHWC))
        return EpisodeRows(
            replace(frames, images_BVHWC=images), self.states(self.pack.states_NS)[rows].astype(np.float32)
        )


def _same(values: NDArray[Any]) -> NDArray[Any]:
    return values


@pytest.fixture
def plant(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenedRun]:
    """``plant(images=, states=, actions=, every=, rows=)``: the run without geometry as if trained on such a pack."""

    def planted(
        images: Change = _same,
        states: Change = _same,
        actions: Change = _same,
        every: int = 1,
        rows: int | None = None,
    ) -> OpenedRun:
        source = _ChangedSource(PackReader(folder / "pack"), images, states, actions, every, rows)
        with monkeypatch.context() as patch:
            for module in (build, shard_writer):
                patch.setattr(module, "open_source", lambda _: source)
            request = SourceRequest(path=str(folder / "demos"), kind="libero_hdf5", settings={})
            build.build_pack(
                [request],
                tmp_path / "pack",
                rows_per_shard=64,
                no_ops=None,
                skip_damaged=False,
                workers=1,
                progress=nothing,
            )
        return run_on(folder / "none", tmp_path / "run", pack=tmp_path / "pack")

    return planted


def run_on(base: Path, out: Path, *, pack: Path | None = None, cache: Path | None = None) -> OpenedRun:
    """A copy of the run ``base`` as if trained on another pack or cache."""
    shutil.copytree(base, out)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    pair = settings["data"][0]
    pair |= {"pack": str(pack or pair["pack"]), "cache": str(cache or pair["cache"])}
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    if pack is not None:
        (card,) = (out / "checkpoints").glob("*/card.json")
        with PackReader(pack) as reader:
            fitted = Normaliser.fit(reader.states_NS, reader.actions_NA)
            edit_card(card, packs=[reader.info.digest], normaliser=fitted.model_dump(mode="json"))
    return open_run(out, "cpu")


def edit_card(card: Path, **values: Any) -> None:
    """Change fields of a checkpoint's card; its digests are of the other files."""
    card.write_text(json.dumps(json.loads(card.read_text()) | values))


def write_cache(source: Path, out: Path, change: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> Path:
    """A copy of a cache whose tokens are ``change(tokens, rows)``, by the project's own writer."""
    with CachedTokens(source) as cache:
        create_or_open(out, cache.manifest, data_card(cache.manifest))
        for shard in range(cache.manifest.shards):
            rows = list(shard_rows(shard, cache.manifest.rows, cache.manifest.rows_per_shard))
            given = change(cache.tokens(rows), rows)
            arrays = cache.codec.encode(given)
            statistics = shard_statistics(cache.codec, given, arrays)
            commit_shard(out, cache.manifest, shard, arrays, statistics=statistics, seconds={})
    return out
