"""One real episode that is pushed and observed at few steps while it is solved: exact, marked, read back as rows."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from geomcache.pipeline.sim import recorder
from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.pipeline.sim.perturbation import Perturbation
from geomcache.pipeline.sim.recorder import Config, record
from geomcache.pipeline.sim.replay import read_demo
from geomcache.pipeline.sources import libero_hdf5

pytestmark = pytest.mark.sim

EVERY, SEED, INIT = 50, 5, 1


def test_a_thinned_pushed_recording(env: LiberoEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "LiberoEnv", lambda *_, **__: env)  # the session's: 128 x 128
    monkeypatch.setattr(env, "close", lambda: None)
    config = Config(
        tasks=(0,), episodes=1, first_init_state=INIT, seed=SEED, perturb=Perturbation(), observe_every=EVERY
    )
    (path,) = record(config, tmp_path).files
    with h5py.File(path) as file:
        data, demo = file["data"], file["data/demo_0"]
        assert (data.attrs["suite"], data.attrs["observe_every"]) == ("libero_object", EVERY)
        assert (demo.attrs["observe_every"], demo.attrs["init_state_index"]) == (EVERY, INIT)
        labels, executed, states = (demo[name][:] for name in ("actions", "actions_executed", "states"))
        pushed = demo["perturbed"][:].astype(bool)
        images, ee_states = demo["obs/agentview_rgb"][:], demo["obs/ee_states"][:]
    steps = len(labels)
    assert len(images) == len(ee_states) == -(-steps // EVERY)
    assert (len(executed), len(states), len(pushed)) == (steps,) * 3
    np.testing.assert_array_equal(np.abs(executed - labels).max(axis=1) > 0, pushed)  # no noise: pushes alone
    assert pushed[1:4].all()
    assert not pushed[0]

    env.reset(SEED, INIT, settle_steps=9)
    for j, action in enumerate(executed[: EVERY + 1]):
        np.testing.assert_array_equal(env.flat_state(), states[j])
        env.step(action)
        if j % EVERY == 0:
            np.testing.assert_array_equal(env.observe().frame.images_BVHWC[0, 0], images[j // EVERY][::-1])
            np.testing.assert_array_equal(env.proprioception().ee_pos_3, ee_states[j // EVERY, :3])

    assert read_demo(path, "demo_0").observe_every == EVERY
    head = libero_hdf5.Source(libero_hdf5.Config(path=path)).head(0)
    assert (head.suite, head.steps_per_row, len(head)) == ("libero_object", EVERY, -(-(steps - 1) // EVERY))
    assert head.metadata["perturb"] == Perturbation().model_dump_json()
    assert head.perturbed_T is not None
    np.testing.assert_array_equal(head.perturbed_T, pushed[1:])
