"""The optimisation loop: accelerate, randomness keyed on (seed, step, rank), metrics, checkpoints, exact resume."""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from geomcache.cache_schemas.errors import InputError, TrainingFailed
from geomcache.pipeline.devices import resolve_device
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.checkpoint import (
    CheckpointCard,
    checkpoints_of,
    load_optimizer,
    load_weights,
    read_card,
    save_checkpoint,
)
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker
from geomcache.stages.train.optim import make_optimizer, set_learning_rates
from geomcache.stages.train.policy import PolicyNet
from geomcache.stages.train.token_feed import TokenFeed

METRICS_NAME = "metrics.jsonl"
Progress = Callable[[int, int, str], None]  # (steps done, steps in all, text)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Built here and not at import; refuses to run with another number of ranks than asked for."""
    accelerator = Accelerator(
        cpu=resolve_device(config.device) == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    if accelerator.num_processes != config.processes:
        raise InputError(
            "training was launched with another number of processes than configured",
            expected=f"{config.processes} (processes)",
            found=f"{accelerator.num_processes} running",
            fix=f"torchrun --nproc_per_node {config.processes} -m geomcache.stages.train.run CONFIG.yaml",
        )
    return accelerator


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """CPU generator that depends on (seed, step, rank) alone, so a resumed run draws what the first would have."""
    key = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def fit(
    config: TrainConfig,
    policy: PolicyNet,
    maker: BatchMaker,
    card: CheckpointCard,
    accelerator: Accelerator,
    progress: Progress,
) -> PolicyNet:
    """Train ``policy`` from its newest checkpoint (or from the start) to ``config.steps``.

    Bit for bit on CPU, a run that was stopped and continued ends like one that was not.

    Raises:
        TrainingFailed: the loss is not finite; the batch's rows are named.
    """
    optimizer = make_optimizer(policy, config)
    start = _resume(config, policy, optimizer)
    if start >= config.steps:
        return policy.to(accelerator.device)
    model, optimizer = accelerator.prepare(policy, optimizer)
    parts = config.gradient_accumulation_steps
    loader: DataLoader[PolicyBatch] = DataLoader(
        maker,  # type: ignore[arg-type]  # a map-style data set by protocol
        sampler=range(start * parts, config.steps * parts),
        batch_size=None,
        num_workers=config.data_workers,
        persistent_workers=config.data_workers > 0,
    )
    batches = iter(loader)  # forks its workers: before any thread of ours is started
    model.train()
    with (
        _Metrics(config, accelerator, start) as metrics,
        _tokens(maker, range(start * parts, config.steps * parts), accelerator.device) as tokens,
    ):
        for step in range(start, config.steps):
            generator = step_generator(config.seed, step, accelerator.process_index)
            torch.manual_seed(generator.initial_seed())  # dropout, where there is any
            set_learning_rates(optimizer, step, config)
            loss, per_dim, waited = 0.0, 0.0, 0.0
            for _ in range(parts):
                asked = time.perf_counter()
                batch: PolicyBatch = next(batches).to(accelerator.device)
                batch = replace(batch, tokens_BVGD=next(tokens))
                waited += time.perf_counter() - asked
                with accelerator.accumulate(model):
                    output = model(batch, generator)
                    accelerator.backward(output.loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                loss = loss + output.loss.detach() / parts
                per_dim = per_dim + output.per_dim_A / parts
            value = float(loss)
            if not math.isfinite(value) or not math.isfinite(float(norm)):
                raise TrainingFailed(
                    f"the loss is {value} and the gradient norm {float(norm)} at step {step}",
                    expected="finite numbers",
                    found=f"rows {maker.rows(step).tolist()[:32]}",
                    fix="lower learning_rate, or look at the demonstrations of these rows",
                )
            metrics.add(step, value, per_dim, float(norm), waited, optimizer)
            progress(step + 1, config.steps, f"loss {value:.4f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                metrics.flush()
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    done = card.model_copy(update={"step": step + 1})
                    save_checkpoint(config.out, done, policy, optimizer, keep_last=config.keep_last)
                accelerator.wait_for_everyone()
    return policy


@contextmanager
def _tokens(maker: BatchMaker, micro_steps: range, device: torch.device) -> Iterator[Iterator[torch.Tensor | None]]:
    """Each micro-step's tokens, read ahead; None for ever in a run without geometry."""
    if maker.data.recipe is None:
        yield itertools.repeat(None)
        return
    rows = (maker.micro_rows(micro_step) for micro_step in micro_steps)
    with TokenFeed(maker.data, rows, maker.batch_size, device) as feed:
        yield feed


def _resume(config: TrainConfig, policy: PolicyNet, optimizer: torch.optim.Optimizer) -> int:
    found = checkpoints_of(config.out)
    if not found:
        return 0
    load_weights(policy, found[-1])
    load_optimizer(optimizer, found[-1])
    return read_card(found[-1]).step


class _Metrics:
    """Appends to metrics.jsonl; a resumed run first drops the lines that its checkpoint does not know."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, start: int) -> None:
        self._config, self._main = config, accelerator.is_main_process
        self._path = Path(config.out) / METRICS_NAME
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._file: TextIO | None = None
        if self._main:
            kept = [line for line in read_metrics(self._path) if line["step"] < start]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __enter__(self) -> "_Metrics":
        if self._main:
            self._file = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(
        self,
        step: int,
        loss: float,
        per_dim: Any,
        norm: float,
        waited: float,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._waited, self._steps = self._waited + waited, self._steps + 1
        last = step + 1 == self._config.steps
        if self._file is None or not (step % self._config.log_every == 0 or last):
            return
        line = {
            "step": step,
            "loss": loss,
            "loss_per_action_dim": [round(float(value), 6) for value in per_dim],
            "gradient_norm": norm,
            "learning_rates": [group["lr"] for group in optimizer.param_groups],
            "data_wait_share": round(self._waited / max(time.perf_counter() - self._started, 1e-9), 4),
            "seconds_per_step": round((time.perf_counter() - self._started) / self._steps, 4),
        }
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines
