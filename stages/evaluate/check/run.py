"""``geomcache check``: a run's moments made twice, once as training sees them and once as the closed loop does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from geomcache.cache_schemas.base import Schema
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.files import require_own_folder, write_atomic
from geomcache.pipeline.sources._libero_files import find_files
from geomcache.stages.evaluate.check.actions import check_decoding, check_replay
from geomcache.stages.evaluate.check.finding import Check, Finding, impossible
from geomcache.stages.evaluate.check.frames import check_frames
from geomcache.stages.evaluate.check.inputs import check_answer, check_inputs
from geomcache.stages.evaluate.check.open_loop import check_open_loop
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode, open_run
from geomcache.stages.evaluate.check.scene import NoScene, Scenes
from geomcache.stages.evaluate.check.states import check_states
from geomcache.stages.evaluate.check.tokens import check_tokens
from geomcache.stages.evaluate.check.unrestored import check_unrestored
from geomcache.stages.evaluate.pictures import png

REPORT_NAME = "check.json"
Progress = Callable[[int, int, str], None]  # (done, in all, of what)
_ROWS = 6  # of an episode, whose pictures and tokens are compared
_DIFFERENCE_GAIN = 4  # of the picture's third column


class CheckConfig(Schema):
    """What --set changes."""

    encoder_config: dict[str, object] = Field(default_factory=dict)  # e.g. where the same weights lie on this machine


class CheckReport(Schema):
    """check.json."""

    run: str
    checkpoint: str
    looked_at: str  # how many episodes of how many packs
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> list[str]:
        """Every fault that was named, once."""
        return list(dict.fromkeys(one.fault for one in self.findings if one.fault))

    @property
    def not_possible(self) -> list[str]:
        """What could not be compared, each once."""
        return list(dict.fromkeys(one.compared for one in self.findings if one.passed is None))

    @property
    def verdict(self) -> str:
        """One line, which does not call agreement what was not compared."""
        left = f"; not possible: {'; '.join(self.not_possible)}" if self.not_possible else ""
        if not self.sound:
            return f"found: {', '.join(self.faults)}{left}"
        if all(one.passed is None for one in self.findings):
            return f"nothing could be compared{left}"
        return f"what could be compared agrees{left}" if left else "the two sides agree"

    @property
    def sound(self) -> bool:
        """Whether everything that could be compared agrees."""
        return all(one.passed is not False for one in self.findings)


def check_run(
    path: Path,
    *,
    episodes: int = 1,
    demos: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    encoder_changes: dict[str, object] | None = None,
    progress: Progress,
) -> CheckReport:
    """Compare both sides of a run.

    Args:
        path: run folder, or one checkpoint of it.
        episodes: to replay, spread over the run's data; of every pack at least one.
        demos: folder of the HDF5 demonstrations that the packs were made of, where packs do not hold the scene.
        out: folder for check.json and, where pictures differ, frames_<episode>.png.
        device: of the policy and its encoder.
        encoder_changes: encoder settings that may differ, such as the folder of the weights.
        progress: is told.

    Raises:
        GeomcacheError: no checkpoint, data that is not there or another, weights that cannot be found, no simulator.
    """
    if demos is not None:
        find_files(demos)
    if out is not None:
        require_own_folder(out, lambda folder: (folder / REPORT_NAME).exists(), "a check")
    device = resolve_device(device)
    run = open_run(path, device, encoder_changes)
    chosen = run.episodes(episodes)
    scenes = Scenes(run, demos)
    findings: list[Finding] = []
    try:
        for number, episode in enumerate(chosen):
            told = f"episode {number + 1} of {len(chosen)}: "
            for text, more in _check_episode(run, scenes, episode, device, out):
                progress(number, len(chosen) + 1, told + text)
                findings += more
        progress(len(chosen), len(chosen) + 1, "open-loop error")
        findings.append(check_open_loop(run, device))
    finally:
        scenes.close()
    report = CheckReport(
        run=str(run.run),
        checkpoint=run.policy.checkpoint.name,
        looked_at=f"{len(chosen)} of {len(run.every_episode)} episodes, "
        f"{len({id(one.pack) for one in chosen})} of {len(run.data.packs)} packs",
        findings=tuple(findings),
    )
    if out is not None:
        write_atomic(out / REPORT_NAME, report.model_dump_json(indent=2))
    return report


def _check_episode(
    run: OpenedRun, scenes: Scenes, episode: StoredEpisode, device: str, out: Path | None
) -> Iterator[tuple[str, list[Finding]]]:
    """(what was done, what it found), one part after the other."""
    steps = sample_steps(len(episode))
    decoding, decoded_TA = check_decoding(run, episode)
    yield "actions decoded", [decoding]
    scene = scenes.of(episode)
    replayed = None
    if isinstance(scene, NoScene):
        checks: tuple[Check, ...] = ("actions", "frames", "states")
        yield (
            "no scene",
            [impossible(c, f"{c} of {episode.where} in the simulator", scene.why, scene.fix) for c in checks],
        )
        yield "packed rows", check_unrestored(episode)
    else:
        rate = run.policy.card.contract.control_rate_hz
        acted, replayed = check_replay(scene, decoded_TA, bool(decoding.passed), steps, rate)
        yield "replayed", [acted]
        pictured, stored, live = check_frames(replayed, scene)
        if out is not None and not pictured.passed:
            write_atomic(out / f"frames_{episode.record.episode}.png", png(beside(stored[0], live[0])))
        stated = check_states(replayed, episode.states_TS)
        yield "frames and states", [pictured, stated]
        if acted.passed and pictured.passed and stated.passed:
            yield "inputs", [check_inputs(run, episode, steps, replayed, device)]
    given = [check_inputs(run, episode, steps, None, device)]
    yield "stored inputs", given[:1]
    if run.policy.card.recipe is not None:
        given.append(check_tokens(run, episode, steps, device))
        yield "tokens", given[1:]
    if all(one.passed for one in given):
        yield "sampled chunks", [check_answer(run, episode, steps, device)]
    else:
        why = "the network is not given the same: see policy inputs and tokens"
        yield "sampled chunks", [impossible("open loop", "sampled chunks", why, "mend what is named there first")]


def sample_steps(rows: int) -> list[int]:
    """Steps of an episode that are looked at: evenly spread, and the neighbours of the middle one."""
    spread = np.linspace(0, rows - 1, min(rows, _ROWS)).astype(int)
    return sorted({*spread.tolist(), rows // 2, min(rows // 2 + 1, rows - 1)})


def beside(stored_VHWC: NDArray[np.uint8], live_VHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stored | live | their difference, a line for each view: [V * H, 3 * W, 3]."""
    difference = np.abs(stored_VHWC.astype(np.int16) - live_VHWC) * _DIFFERENCE_GAIN
    columns = [stored_VHWC, live_VHWC, np.clip(difference, 0, 255).astype(np.uint8)]
    return np.concatenate([np.concatenate(views, axis=1) for views in zip(*columns, strict=True)])
