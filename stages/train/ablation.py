"""Arms that differ in the compressor alone: equal seeds, equal data order, equal schedule; and what came of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import ConfigError
from geomcache.pipeline import plugins
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.data import TrainingData
from geomcache.stages.train.describe import describe
from geomcache.stages.train.metrics import METRICS_NAME, read_metrics
from geomcache.stages.train.run import read_result, require_startable

ABLATION_NAME = "ablation.json"
_LAST_SHARE = 0.1  # of the lines about training, over which the final training loss is averaged


class Arm(Schema):
    """What one arm ended with."""

    name: str
    steps: int
    parameters: int  # of the whole policy
    loss: float  # mean of the last training lines
    open_loop_error: float  # on training rows, normalised units
    validation_loss: float | None  # on held-out episodes
    validation_open_loop_error: float | None
    mean_action_error: float  # of always predicting the mean action: what the errors are compared with
    seconds_per_step: float
    data_wait_share: float


class Ablation(Schema):
    """ablation.json."""

    arms: tuple[Arm, ...]


def arms(config: TrainConfig, names: Sequence[str]) -> dict[str, TrainConfig]:
    """One configuration for each compressor, in ``config.out/<name>``.

    Raises:
        ConfigError: no name, or one twice.
        UnknownName: there is no such compressor.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            "--ablation cannot be read",
            expected="compressors, each once, such as none,pool,qformer,per_layer,gated",
            found=",".join(names),
            fix="name each arm once",
        )
    found = {}
    for name in names:
        plugins.config_class("compressor", name)
        same = name == config.policy.geom_compression_type
        policy = config.policy.model_copy(
            update={
                "geom_compression_type": name,
                "geom_inject_to_dit": name != "none",
                "geom_compression": config.policy.geom_compression if same else {},
            }
        )
        update = {"out": config.out / name, "policy": policy}
        found[name] = config.model_copy(update=update | ({"mapanything_model_path": None} if name == "none" else {}))
    return found


def require_trainable(chosen: Mapping[str, TrainConfig]) -> None:
    """Raise what any of the arms would raise about its settings and data: before the first of them trains for days."""
    for arm in chosen.values():
        data = TrainingData(arm)
        require_startable(arm, data)
        describe(arm, data.recipe.spec if data.recipe else None)


def read_arms(out: Path, names: Sequence[str]) -> Ablation:
    """What the finished runs ``out/<name>`` ended with."""
    return Ablation(arms=tuple(_read_arm(out / name) for name in names))


def _read_arm(run: Path) -> Arm:
    result = read_result(run)
    assert result is not None, run
    lines = [line for line in read_metrics(run / METRICS_NAME) if "loss" in line]
    last = lines[-max(1, int(_LAST_SHARE * len(lines))) :]
    return Arm(
        name=run.name,
        steps=result.steps,
        parameters=result.parameters,
        loss=sum(line["loss"] for line in last) / len(last),
        open_loop_error=result.open_loop_error,
        validation_loss=result.validation.loss if result.validation else None,
        validation_open_loop_error=result.validation.open_loop_error if result.validation else None,
        mean_action_error=result.mean_action_error,
        seconds_per_step=lines[-1]["seconds_per_step"],
        data_wait_share=lines[-1]["data_wait_share"],
    )
