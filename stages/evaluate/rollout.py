"""One episode in closed loop."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geomcache.pipeline.interfaces import Policy, SimEnv
from geomcache.stages.evaluate.live_policy import noise_seed


@dataclass
class Rollout:
    """What happened."""

    success: bool = False
    steps: int = 0  # control steps executed after settling
    queries: int = 0
    frames: list[NDArray[np.uint8]] = field(default_factory=list)  # [V, H, W, 3] at each query and at the end


def roll_out(
    env: SimEnv,
    policy: Policy,
    *,
    seed: int,
    init_state: int,
    settle_steps: int,
    execute_steps: int,
    horizon: int,
    on_step: Callable[[int], None],
) -> Rollout:
    """Run until success or ``horizon`` control steps; the cameras render only when the policy is asked."""
    env.reset(seed, init_state, settle_steps)
    rollout = Rollout()
    while rollout.steps < horizon and not rollout.success:
        observation = env.observe()
        rollout.frames.append(observation.frame.images_BVHWC[0])
        episode = f"{env.instruction}/{init_state}"
        chunk = policy.act([observation], [noise_seed(seed, episode, rollout.queries)])[0]
        rollout.queries += 1
        for action in chunk[: min(execute_steps, horizon - rollout.steps)]:
            rollout.success = env.step(action)
            rollout.steps += 1
            if rollout.success:
                break
        on_step(rollout.steps)
    rollout.frames.append(env.observe().frame.images_BVHWC[0])
    return rollout
