"""A run opened both ways: as training sees it (rows, batches) and as the closed loop sees it (live policy)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.files import CONFIG_NAME
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.pack.reader import EpisodeRecord, PackReader
from geomcache.stages.evaluate.live_policy import LivePolicy
from geomcache.stages.train.checkpoint import latest_checkpoint
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.normalise import NormalisationMode, Normaliser
from geomcache.stages.train.run import describe_data_difference, run_of

MODES: tuple[NormalisationMode, ...] = ("mean_std", "min_max", "q99")


@dataclass(frozen=True)
class StoredEpisode:
    """One packed episode; its row t is row ``first + t`` of the run."""

    pack: PackReader
    record: EpisodeRecord
    first: int  # row of the run

    def __len__(self) -> int:
        return self.record.rows

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.record.task} episode {self.record.number}"

    @property
    def states_TS(self) -> NDArray[np.float32]:
        """[T, 8] before each action."""
        return self.pack.states_NS[self.record.first_row :][: len(self)]

    @property
    def actions_TA(self) -> NDArray[np.float32]:
        """[T, 7] each row's (first)."""
        return self.pack.actions_NA[self.record.first_row :][: len(self)]

    @property
    def labels_TA(self) -> NDArray[np.float32]:
        """[T, 7] of every control step; more than rows where only every k-th step was observed."""
        return self.pack.labels(self.record.first_row + np.arange(len(self)))

    def frames(self, steps: Sequence[int]) -> FrameBatch:
        """Decoded frames of some steps."""
        return self.pack.frames([self.record.first_row + step for step in steps])

    def rows(self, steps: Sequence[int]) -> NDArray[np.int64]:
        """The same steps as rows of the run."""
        return self.first + np.asarray(steps, dtype=np.int64)

    def observations(self, steps: Sequence[int]) -> list[Observation]:
        """Stored rows in the form that the closed loop's observations have."""
        frames = self.frames(steps)
        return [
            Observation(frames[place : place + 1], self.states_TS[step], self.record.instruction)
            for place, step in enumerate(steps)
        ]


@dataclass(frozen=True)
class OpenedRun:
    """Both sides of one checkpoint."""

    run: Path
    config: TrainConfig
    data: TrainingData
    maker: BatchMaker  # normalises by statistics fitted anew on the training rows, as training does
    policy: LivePolicy  # has the checkpoint's
    encoder_changes: dict[str, object] = field(default_factory=dict)  # settings that differ here, such as a folder

    def fitted(self, mode: NormalisationMode) -> Normaliser:
        """Statistics of the run's training rows."""
        rows = self.data.training_rows
        return Normaliser.fit(self.data.states()[rows], self.data.labels(rows), mode, self.config.gripper)

    @property
    def every_episode(self) -> list[StoredEpisode]:
        """All that were packed, pack after pack."""
        starts = np.cumsum([0, *(len(pack) for pack in self.data.packs)])
        return [
            StoredEpisode(pack, record, int(start) + record.first_row)
            for pack, start in zip(self.data.packs, starts, strict=False)
            for record in pack.episodes
        ]

    def episodes(self, count: int) -> list[StoredEpisode]:
        """``count`` episodes, spread over all, and the first of every pack that has none of them."""
        every = self.every_episode
        chosen = {int(place) for place in np.linspace(0, len(every) - 1, min(count, len(every)))}
        for pack in self.data.packs:
            own = [place for place, episode in enumerate(every) if episode.pack is pack]
            if own and chosen.isdisjoint(own):
                chosen.add(own[0])
        return [every[place] for place in sorted(chosen)]


def open_run(path: Path, device: str, encoder_changes: dict[str, object] | None = None) -> OpenedRun:
    """Open a run folder (its newest checkpoint) or one checkpoint, and the data it was trained on.

    Raises:
        InputError: no checkpoint, no settings beside it, or other data where they lay.
        GeomcacheError: what opening packs, caches and weights raises.
    """
    checkpoint = latest_checkpoint(path).resolve()  # of ".", neither a name nor the run could be told
    run, config = run_of(checkpoint)
    for pair in config.data:
        for folder in (pair.pack, pair.cache):
            if folder is not None and "://" not in str(folder) and not Path(folder).exists():
                raise InputError(
                    f"{folder} is not there, which {run} was trained on",
                    expected=f"the packs and caches of {run / CONFIG_NAME}",
                    found="no such folder",
                    fix=f"did it move? write where it lies now into {run / CONFIG_NAME} under `data`",
                )
    data = TrainingData(config)
    policy = LivePolicy(checkpoint, device, encoder_changes)
    if differences := describe_data_difference(policy.card, data):
        raise InputError(
            f"the packs or caches of {run} are no longer those that it was trained on",
            expected="the same packs and caches, where config.yaml says",
            found="; ".join(differences),
            fix="put them back, or train on the new ones: geomcache train --out OTHER",
        )
    return with_data(run, config, data, policy, encoder_changes)


def with_data(
    run: Path,
    config: TrainConfig,
    data: TrainingData,
    policy: LivePolicy,
    encoder_changes: dict[str, object] | None = None,
) -> OpenedRun:
    """The parts put together; the statistics are fitted as ``stages/train/run.py`` does."""
    rows = data.training_rows
    fitted = Normaliser.fit(data.states()[rows], data.labels(rows), config.normalisation, config.gripper)
    maker = BatchMaker(data, policy.packer, fitted, config)
    return OpenedRun(run, config, data, maker, policy, encoder_changes or {})
