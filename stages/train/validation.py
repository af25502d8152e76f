"""The policy on given rows, in eval mode: flow-matching loss and open-loop action error, always with the same draws."""

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker
from geomcache.stages.train.draws import draw
from geomcache.stages.train.policy import PolicyNet


class Validation(Schema):
    """Means over real (not padded) actions of some rows."""

    loss: float
    loss_per_action_dim: tuple[float, ...]
    open_loop_error: float  # mean |sampled - demonstrated| in normalised units, over chunk steps and dimensions
    mean_action_error: float  # the same for always predicting the training rows' mean action
    rows: int


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most ``count`` of ``rows``, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]


@torch.no_grad()
def measure(
    policy: PolicyNet, maker: BatchMaker, rows: NDArray[np.int64], config: TrainConfig, accelerator: Accelerator
) -> Validation:
    """Loss and open-loop error of ``policy`` on ``rows``; ranks share the work and get the same answer.

    Draws and starting noise are keyed on the row, so two measurements differ by the weights alone.
    """
    ranks = accelerator.num_processes
    if len(rows) >= ranks:  # equally many on each rank: sharded weights are gathered by all of them together
        rows = rows[: len(rows) // ranks * ranks]
    mine = rows[accelerator.process_index :: ranks] if len(rows) >= ranks else rows
    mean_A = torch.from_numpy(maker.mean_action()).to(accelerator.device)
    action_dims = len(mean_A)
    sums = torch.zeros(action_dims + 3, dtype=torch.float64, device=accelerator.device)
    was_training = policy.training
    policy.eval()
    for start in range(0, len(mine), config.batch_size):
        part = mine[start : start + config.batch_size]
        batch = maker.batch(part).to(accelerator.device)
        assert batch.actions_BTA is not None
        assert batch.action_mask_BT is not None
        keys = [("validation", row) for row in part.tolist()]
        draws = draw(keys, config.policy.repeated_diffusion_steps, policy.chunk_shape)
        with policy.autocast(config.mixed_precision):
            output = policy(batch, noise_BRTA=draws.noise_BRTA, time_BR=draws.time_BR)
            sampled = policy.sample(batch, noise_BTA=draws.noise_BRTA[:, 0])
        mask_BT = batch.action_mask_BT
        sums[:action_dims] += output.per_dim_A.double() * output.valid_actions
        sums[-3] += (sampled - batch.actions_BTA).abs()[mask_BT].sum()
        sums[-2] += (mean_A - batch.actions_BTA).abs()[mask_BT].sum()
        sums[-1] += output.valid_actions
    policy.train(was_training)
    if ranks > 1:
        torch.distributed.all_reduce(sums)
    real = float(sums[-1])
    per_dim = (sums[:action_dims] / real).tolist()
    return Validation(
        loss=sum(per_dim) / action_dims,
        loss_per_action_dim=tuple(per_dim),
        open_loop_error=float(sums[-3]) / real / action_dims,
        mean_action_error=float(sums[-2]) / real / action_dims,
        rows=len(rows),
    )
