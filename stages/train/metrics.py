"""What a run tells while it trains: metrics.jsonl always, accelerate's trackers beside it.

A line has ``step`` and either ``loss`` (training), ``validation`` or ``diagnosis``. A resumed run first drops the lines
that its checkpoint does not know, so the file reads as if nothing had happened.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from geomcache.cache_schemas.errors import MissingDependency
from geomcache.pipeline.files import write_atomic
from geomcache.stages.train.config import TrainConfig

METRICS_NAME = "metrics.jsonl"
PROJECT = "geomcache"  # folder of tensorboard's events, project of wandb


def require_trackers(names: Sequence[str]) -> None:
    """``MissingDependency`` for a tracker whose package is not installed (accelerate would leave it out in silence)."""
    for name in names:
        if name not in [str(found) for found in get_available_trackers()]:
            raise MissingDependency(
                f"tracker {name} is not installed",
                fix=f"pip install {name}, or --set 'trackers=[]' (metrics.jsonl is always written)",
            )


class Metrics:
    """Writes on the main process; the others' calls do nothing.

    Args:
        config: of the run.
        accelerator: with the trackers.
        start: steps done before this session; older lines are kept.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, start: int) -> None:
        self._config, self._accelerator = config, accelerator
        self._path = Path(config.out) / METRICS_NAME
        self._start, self._waited, self._steps = start, 0.0, 0
        self._started, self._first = time.perf_counter(), 0.0
        self._file: TextIO | None = None

    def __enter__(self) -> "Metrics":
        if self._accelerator.is_main_process:
            kept = [line for line in read_metrics(self._path) if line["step"] < self._start]
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self._path.open("a")
        if self._config.trackers:
            options = {"tensorboard": {"purge_step": self._start}, "wandb": {"dir": str(self._config.out)}}
            self._accelerator.init_trackers(PROJECT, init_kwargs={n: options[n] for n in self._config.trackers})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._accelerator.trackers:  # end_training would end the ranks' group as well
            tracker.finish()

    def waited(self, seconds: float) -> None:
        """The step just done waited so long for data; the first of a session, which starts everything, is left out."""
        self._steps += 1
        if self._steps == 1:
            self._started, self._first = time.perf_counter(), time.perf_counter() - self._started
        else:
            self._waited += seconds

    @property
    def seconds_per_step(self) -> float:
        """Mean over this session without its first step, once there are more."""
        return (time.perf_counter() - self._started) / (self._steps - 1) if self._steps > 1 else self._first

    def training(self, step: int, loss: float, per_dim: list[float], norm: float, rates: dict[str, float]) -> None:
        """A line about one optimiser step."""
        self._write(
            step,
            {
                "loss": loss,
                "loss_per_action_dim": [round(value, 6) for value in per_dim],
                "gradient_norm": norm,
                "learning_rates": rates,
                "data_wait_share": round(self._waited / max(time.perf_counter() - self._started, 1e-9), 4),
                "seconds_per_step": round(self.seconds_per_step, 4),
            },
        )

    def other(self, step: int, name: str, values: dict[str, Any]) -> None:
        """A line ``{"step", name: values}``, about the weights after optimiser step ``step``."""
        self._write(step, {name: values})

    def flush(self) -> None:
        """What was written so far survives a kill."""
        if self._file is not None:
            self._file.flush()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(_flat(values), step=step)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by path, for trackers."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


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
