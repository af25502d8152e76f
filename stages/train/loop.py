"""The optimisation loop: accelerate, keyed randomness, EMA, validation, checkpoints, exact resume."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader

from geomcache.cache_schemas.errors import GeomcacheError, TrainingFailed
from geomcache.pipeline.files import write_atomic
from geomcache.stages.train import validation
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.checkpoint import (
    CheckpointCard,
    checkpoints_of,
    load_optimizer,
    load_weights,
    read_averages,
    read_card,
    save_checkpoint,
)
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import BatchMaker
from geomcache.stages.train.diagnose import measure as measure_geometry
from geomcache.stages.train.draws import draw, seed_of
from geomcache.stages.train.ema import Ema
from geomcache.stages.train.metrics import Metrics
from geomcache.stages.train.optim import make_optimizer, set_learning_rates
from geomcache.stages.train.policy import PolicyNet, mask_geometry
from geomcache.stages.train.sharding import whole
from geomcache.stages.train.stopping import StopSignals, TrainingStopped, ignore_signals
from geomcache.stages.train.token_feed import TokenFeed

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, text)
DIAGNOSIS_ROWS = 16  # held-out rows for a look at whether geometry is used


class Trainer:
    """Trains ``policy`` from its newest checkpoint (or from the start) to ``config.steps``.

    Bit for bit on CPU, a run that was stopped and continued ends like one that was not.

    Args:
        config: of the run.
        policy: with its initial weights.
        maker: of this rank's batches.
        card: of the checkpoints, but for the step.
        accelerator: from ``make_accelerator``.
    """

    def __init__(
        self, config: TrainConfig, policy: PolicyNet, maker: BatchMaker, card: CheckpointCard, accelerator: Accelerator
    ) -> None:
        self.policy = policy
        self._config, self._maker, self._card, self._accelerator = config, maker, card, accelerator
        found = checkpoints_of(config.out)
        if found:
            load_weights(policy, found[-1])
        if config.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        self._model, self._optimizer = accelerator.prepare(policy, make_optimizer(policy, config))
        if isinstance(policy, FSDPModule):
            register_fsdp_forward_method(policy, "sample")  # gathers weights as forward does
        self._ema = Ema(policy, config.ema_decay) if config.ema_decay is not None else None
        self._start = 0
        if found:
            self._start = read_card(found[-1]).step
            load_optimizer(self._optimizer, policy, found[-1], accelerator.process_index)
            if self._ema is not None:
                self._ema.load(read_averages(found[-1]))

    @contextmanager
    def acting(self) -> Iterator[PolicyNet]:
        """The policy with the weights that act: the averaged ones where there are any."""
        with self._ema.in_place() if self._ema is not None else nullcontext():
            yield self.policy

    def fit(self, progress: Progress) -> None:
        """Train to the end.

        Raises:
            TrainingFailed: the loss is not finite; the batch's rows are named and saved.
            TrainingStopped: a signal asked for it, and everything is saved.
        """
        config, start, parts = self._config, self._start, self._config.gradient_accumulation_steps
        if start >= config.steps:
            return
        micro_steps = range(start * parts, config.steps * parts)
        loader: DataLoader[PolicyBatch | GeomcacheError] = DataLoader(
            self._maker,  # type: ignore[arg-type]  # a map-style data set by protocol
            sampler=micro_steps,
            batch_size=None,
            num_workers=config.data_workers,
            persistent_workers=config.data_workers > 0,
            worker_init_fn=ignore_signals,
        )
        # forks its workers: before any thread of ours is started
        batches: Iterator[PolicyBatch | GeomcacheError] = iter(loader)
        self._model.train()
        with (
            StopSignals() as signals,
            Metrics(config, self._accelerator, start) as metrics,
            _tokens(self._maker, micro_steps, self._accelerator.device) as tokens,
        ):
            joined = map(_with_tokens, batches, tokens)
            for step in range(start, config.steps):
                loss = self._step(step, joined, metrics)
                done = step + 1
                progress(done, config.steps, f"loss {loss:.4f}, {metrics.seconds_per_step:.2f} s/step")
                self._look(done, metrics)
                stop = signals.received(self._accelerator)
                if done % config.save_every == 0 or done == config.steps or stop:
                    metrics.flush()
                    self._save(done)
                if stop and done < config.steps:
                    raise TrainingStopped(stop, done)

    def _step(self, step: int, batches: Iterator[PolicyBatch], metrics: Metrics) -> float:
        """One optimiser step; its loss on this rank."""
        config, accelerator = self._config, self._accelerator
        parts = config.gradient_accumulation_steps
        torch.manual_seed(seed_of(config.seed, step, accelerator.process_index))  # dropout, where there is any
        set_learning_rates(self._optimizer, step, config)
        loss, per_dim, waited = torch.zeros((), device=accelerator.device), torch.zeros(()), 0.0
        for micro_step in range(step * parts, (step + 1) * parts):
            asked = time.perf_counter()
            batch = next(batches).to(accelerator.device)
            waited += time.perf_counter() - asked
            first = self._maker.first_sample(micro_step)
            draws = draw(
                ((config.seed, step, first + i) for i in range(len(batch))),
                config.policy.repeated_diffusion_steps,
                self.policy.chunk_shape,
            )
            if config.geom_dropout:
                batch = mask_geometry(batch, draws.chance_B < config.geom_dropout)
            weight = self._maker.loss_weight(micro_step)
            with accelerator.accumulate(self._model):
                output = self._model(batch, noise_BRTA=draws.noise_BRTA, time_BR=draws.time_BR)
                accelerator.backward(output.loss * weight)
                if accelerator.sync_gradients:
                    norm = whole(accelerator.clip_grad_norm_(self._model.parameters(), config.gradient_clip))
                self._optimizer.step()
                self._optimizer.zero_grad()
            loss = loss + output.loss.detach() * weight / parts
            per_dim = per_dim.to(loss.device) + output.per_dim_A * weight / parts
            del batch, output  # freeing them is no waiting for the next
        if self._ema is not None:
            self._ema.update(step + 1)
        metrics.waited(waited)
        if step % config.log_every == 0 or step + 1 == config.steps:
            loss, per_dim = accelerator.reduce((loss, per_dim), reduction="mean")
            rates = {group["name"]: group["lr"] for group in self._optimizer.param_groups}
            metrics.training(step, float(loss), per_dim.tolist(), float(norm), rates)
        if not math.isfinite(float(loss)) or not math.isfinite(float(norm)):
            self._fail(step, float(loss), float(norm))
        return float(loss)

    def _look(self, done: int, metrics: Metrics) -> None:
        """Validation and diagnosis, where they are due."""
        config, held_out = self._config, self._maker.data.validation_rows
        last = done == config.steps
        if len(held_out) and (done % config.validate_every == 0 or last):
            rows = validation.spread(held_out, config.validation_rows)
            with self.acting() as policy:
                found = validation.measure(policy, self._maker, rows, config, self._accelerator)
            metrics.other(done - 1, "validation", found.model_dump(mode="json"))
        if config.diagnose_every is not None and (done % config.diagnose_every == 0 or last):
            rows = validation.spread(held_out if len(held_out) else self._maker.data.training_rows, DIAGNOSIS_ROWS)
            with self.acting() as policy, policy.autocast(config.mixed_precision):
                diagnosis = measure_geometry(policy, self._maker.batch(rows).to(self._accelerator.device))
            if diagnosis is not None:
                metrics.other(done - 1, "diagnosis", diagnosis.flat())

    def _save(self, done: int) -> None:
        save_checkpoint(
            self._config.out,
            self._card.model_copy(update={"step": done}),
            self.policy,
            self._optimizer,
            self._ema,
            self._accelerator,
            keep_last=self._config.keep_last,
            keep_every=self._config.keep_every,
        )

    def _fail(self, step: int, loss: float, norm: float) -> None:
        path = self._config.out / f"failed_step_{step:08d}.json"
        if self._accelerator.is_main_process:
            rows = self._maker.data.keys(self._maker.rows(step))
            write_atomic(path, json.dumps({"step": step, "loss": str(loss), "rows": rows}, indent=1))
        raise TrainingFailed(
            f"the loss is {loss} and the gradient norm {norm} at step {step}",
            expected="finite numbers",
            found=f"the batch whose rows are listed in {path}",
            fix="look at the demonstrations of these rows, or lower learning_rate; "
            "the same command continues from the last checkpoint",
        )


def _with_tokens(batch: PolicyBatch | GeomcacheError, tokens: torch.Tensor | None) -> PolicyBatch:
    """The whole batch; raises what a loader process has met."""
    if isinstance(batch, GeomcacheError):
        raise batch
    return replace(batch, tokens_BVGD=tokens)


@contextmanager
def _tokens(maker: BatchMaker, micro_steps: range, device: torch.device) -> Iterator[Iterator[torch.Tensor | None]]:
    """Each micro-step's tokens, read ahead; None for ever in a run without geometry."""
    if maker.data.recipe is None:
        yield itertools.repeat(None)
        return
    rows = (maker.micro_rows(micro_step) for micro_step in micro_steps)
    with TokenFeed(maker.data, rows, maker.batch_size, device) as feed:
        yield feed
