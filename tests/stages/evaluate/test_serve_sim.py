"""vla-eval's own LIBERO benchmark in the real simulator: what reaches the policy is what LiberoEnv shows."""

import asyncio

import numpy as np
import pytest
import torch

from geomcache.pipeline.sim.libero_env import LiberoEnv
from geomcache.stages.evaluate.serve.protocol import unpack
from geomcache.stages.evaluate.serve.session import read_observation

pytestmark = [pytest.mark.sim, pytest.mark.slow]
SIDE = 64  # pixels


def test_the_same_moment_arrives_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, state (quaternions near the pi wrap) and instruction, through the real client's codec."""
    for name, value in (("EGL_PLATFORM", "device"), ("PYOPENGL_PLATFORM", "egl")):
        monkeypatch.setenv(name, value)  # importing the benchmark sets them for good
    benchmarks = pytest.importorskip(
        "vla_eval.benchmarks.libero.benchmark", reason="pip install --no-deps vla-eval==0.8.0"
    )
    from vla_eval.protocol.messages import Message, MessageType, pack_message

    monkeypatch.setattr(torch, "load", torch.load)  # the benchmark replaces it
    monkeypatch.setattr(benchmarks, "LIBERO_ENV_RESOLUTION", SIDE)
    theirs = benchmarks.LIBEROBenchmark("libero_object", send_wrist_image=True, send_state=True, quat_no_antipodal=True)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 7))
    actions[:, -1] = 1.0

    async def play() -> None:
        with LiberoEnv("libero_object", 0, height=SIDE, width=SIDE, depth=False) as env:
            env.reset(7, 1)
            await theirs.start_episode({**theirs.get_tasks()[0], "episode_idx": 1})
            for action in actions:
                sent = pack_message(Message(MessageType.OBSERVATION, await theirs.get_observation()))
                got, mine = read_observation(unpack(sent).payload, env.contract), env.observe()
                np.testing.assert_array_equal(got.frame.images_BVHWC, mine.frame.images_BVHWC)
                np.testing.assert_array_equal(got.state_S, mine.state_S)
                assert got.instruction == mine.instruction
                await theirs.apply_action({"actions": action})
                env.step(action)

    try:
        asyncio.run(play())
    finally:
        theirs.cleanup()
