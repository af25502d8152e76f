"""What the network is given, field by field, and what it answers: training's way against the closed loop's."""

from dataclasses import fields

import numpy as np
import torch

from geomcache.stages.evaluate.check.finding import (
    OTHER_INSTRUCTION,
    OTHER_STATISTICS,
    Finding,
    explanation,
    failed,
    passed,
    statistics_read_as,
)
from geomcache.stages.evaluate.check.opened import MODES, OpenedRun, StoredEpisode
from geomcache.stages.evaluate.check.scene import Replayed
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.draws import draw

_CPU_TOLERANCE, _GPU_TOLERANCE = 1e-5, 0.02  # of a field's spread
_REPLAY_TOLERANCE = 0.2  # the same, for observations of a replay: hands 1 mm apart (up to 0.053 seen)
_ACTIONS = ("actions_BTA", "action_mask_BT")  # of training only


def check_inputs(
    run: OpenedRun, episode: StoredEpisode, steps: list[int], replayed: Replayed | None, device: str
) -> Finding:
    """``BatchMaker.batch`` of some rows against ``LivePolicy.prepare`` of the same moments, field by field.

    Args:
        run: both sides.
        episode: of the rows.
        steps: of the episode.
        replayed: observed at ``steps`` in the simulator, where pictures and states are known to be the same; None: the
            stored rows are taken as observations.
        device: of the live policy.
    """
    observations = [replayed.observed[step] for step in steps] if replayed else episode.observations(steps)
    trained, live = run.maker.batch(episode.rows(steps)), run.policy.prepare(observations).to("cpu")
    source = "rendered" if replayed else "stored"
    compared = f"every input of the network for {len(steps)} rows, with those of {source} observations"
    tolerance = _CPU_TOLERANCE if device == "cpu" else _GPU_TOLERANCE
    if replayed:
        tolerance = _REPLAY_TOLERANCE
    differences = batch_differences(trained, live)
    worst, error = max(differences.items(), key=lambda item: item[1])
    names = ", ".join(differences)
    found = f"largest relative difference {error:.2g} ({worst})"
    if error <= tolerance:
        return passed("policy inputs", f"{compared}: {names}", found, f"at most {tolerance:g}")
    fault = None
    if worst == "proprio_BP":
        fault = _explain_proprio(run, episode, steps, live)
    elif worst in ("input_ids_BS", "attention_mask_BS"):
        told = {seen.instruction for seen in observations}
        fault = OTHER_INSTRUCTION if told != {episode.record.instruction} else None
        found += f"; told {', '.join(sorted(told))!r}"
    return failed("policy inputs", compared, f"at most {tolerance:g}", found, fault)


def batch_differences(one: PolicyBatch, other: PolicyBatch) -> dict[str, float]:
    """Root mean square difference of each field over its spread in ``one``; infinite where shapes differ."""
    differences = {}
    for field in fields(PolicyBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in _ACTIONS or (a is None and b is None):
            continue
        if a is None or b is None or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            differences[field.name] = float("inf")
            continue
        apart = (a.double() - b.double()).nan_to_num().square().mean().sqrt()
        differences[field.name] = float(apart / a.double().nan_to_num().std().clamp(min=1e-6)) if float(apart) else 0.0
    return differences


def _explain_proprio(run: OpenedRun, episode: StoredEpisode, steps: list[int], live: PolicyBatch) -> str | None:
    states, found = episode.states_TS[steps], live.proprio_BP.numpy()
    trained, errors = run.config.normalisation, {}
    for mode in MODES:
        error = float(np.abs(run.fitted(mode).state.normalise(states) - found).mean())
        if mode == trained:
            plain = error
        else:
            errors[statistics_read_as(trained, mode)] = error
    return explanation(errors, plain) or OTHER_STATISTICS


def check_answer(run: OpenedRun, episode: StoredEpisode, steps: list[int], device: str) -> Finding:
    """The chunk that the live path samples for stored observations against training's, from the same noise."""
    keys = [("check", step) for step in steps]
    noise_BTA = draw(keys, 1, run.policy.net.chunk_shape).noise_BRTA[:, 0]
    trained = run.policy.sample(run.maker.batch(episode.rows(steps)).to(device), noise_BTA)
    live = run.policy.sample(run.policy.prepare(episode.observations(steps)), noise_BTA)
    error, tolerance = float(np.abs(trained - live).max()), _CPU_TOLERANCE if device == "cpu" else _GPU_TOLERANCE
    compared = f"sampled chunks of {len(steps)} stored rows, by training's inputs with by the live ones, from one noise"
    found, expected = f"largest difference {error:.2g} (normalised)", f"at most {tolerance:g}"
    if error <= tolerance:
        return passed("open loop", compared, found, expected)
    return failed("open loop", compared, expected, found, None)
