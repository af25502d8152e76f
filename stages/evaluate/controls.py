"""Controls: what would a policy score that lacks what the success is owed to?

``blind``: the run trained again without images and without geometry (it is left with the robot's state and the
instruction), on the same data, with the same steps, seed and head; it plays the same episodes. Where it succeeds too,
success is no evidence of perception.
"""

from pathlib import Path

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError, UnknownName
from geomcache.pipeline.config_errors import parse_config
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.corruption import Corruption
from geomcache.stages.evaluate.live_policy import is_shown_images
from geomcache.stages.evaluate.report.comparison import Comparison
from geomcache.stages.evaluate.report.table import compare_folders
from geomcache.stages.evaluate.results import Success, read_results
from geomcache.stages.train.checkpoint import latest_checkpoint, read_card
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.run import read_config, read_result, require_packs, run_of

BLIND = "blind"
CONTROLS = (BLIND,)
_FOLDER = "controls"


class ControlResult(Schema):
    """What the control says about a run."""

    control: str
    blind: Success
    run: Success
    comparison: Comparison  # the run against the control
    meaning: str  # one sentence


def require_control(name: str) -> None:
    """``UnknownName`` for a control that there is not."""
    if name not in CONTROLS:
        raise UnknownName(
            f"there is no control {name!r}",
            expected=f"one of {', '.join(CONTROLS)}",
            found=repr(name),
            fix=f"--control {BLIND}",
        )


def blind_training(run: Path) -> TrainConfig:
    """Settings that train the blind control of ``run``, in ``RUN/controls/blind``.

    Args:
        run: a finished run's folder, or its last checkpoint.

    Raises:
        InputError: the run sees nothing itself, is unfinished, or its pack is not where it says; or the control that
            stands there was trained otherwise.
    """
    checkpoint = latest_checkpoint(run)
    card = read_card(checkpoint)
    folder, config = run_of(checkpoint.absolute())
    if card.recipe is None and not is_shown_images(card):
        raise InputError(
            f"{folder} sees nothing itself",
            expected="a policy that is shown images or geometry",
            found="images: none, and no geometry",
            fix="leave --control out",
        )
    if card.step != config.steps:
        raise InputError(
            f"{checkpoint} is not the end of its training, and its control would be trained longer",
            expected=f"a checkpoint of step {config.steps}",
            found=f"step {card.step}",
            fix=f"finish the run first: geomcache train --config {folder}/config.yaml",
        )
    wanted = _without_sight(config, folder / _FOLDER / BLIND)
    if is_trained(wanted):
        if read_card(latest_checkpoint(wanted.out)).packs != card.packs:
            raise InputError(
                f"the run and its blind control in {wanted.out} are of different data",
                expected="the packs that the run was trained on",
                found="others: the run was trained again since",
                fix=f"delete {wanted.out}; it is trained again",
            )
    else:
        require_packs(folder, config, card.packs)
    return wanted


def is_trained(wanted: TrainConfig) -> bool:
    """Whether the control stands, finished.

    Raises:
        InputError: what stands there was trained with other settings.
    """
    if read_result(wanted.out) is None:
        return False
    if differences := read_config(wanted.out).identity().describe_difference(wanted.identity()):
        raise InputError(
            f"the control in {wanted.out} is not that of the run beside it",
            expected="the run's own settings, less images and geometry",
            found="; ".join(differences),
            fix=f"delete {wanted.out}; it is trained again",
        )
    return True


def control_evaluation(config: EvalConfig, control: Path) -> EvalConfig:
    """Of the control: the same episodes, in ``OUT/controls/blind``; without rulers of what it is not given.

    Args:
        config: of the run's evaluation.
        control: the control's run folder.
    """
    return config.model_copy(
        update={
            "run": control,
            "out": config.out / _FOLDER / BLIND,
            "encoder": None,
            "encoder_config": {},
            "without_geometry": False,
            "corruption": Corruption(shuffle_instructions=config.corruption.shuffle_instructions),
        }
    )


def judge(config: EvalConfig) -> ControlResult:
    """Compare the finished evaluations of a run and its control.

    Args:
        config: of the run's evaluation.

    Raises:
        InputError: one of them cannot be read.
    """
    control = config.out / _FOLDER / BLIND
    (comparison,) = compare_folders([control, config.out]).comparisons
    blind, run = read_results(control).overall, read_results(config.out).overall
    meaning = explain(blind, comparison)
    return ControlResult(control=BLIND, blind=blind, run=run, comparison=comparison, meaning=meaning)


def explain(blind: Success, comparison: Comparison) -> str:
    """What the control's success means for the run's, in one sentence."""
    share = f"a policy that sees nothing succeeds in {blind.successes} of {blind.episodes}"
    change = f"{100 * comparison.difference:+.0f} pp"
    if comparison.verdict == "not resolved":
        if blind.rate >= 0.5:
            return f"{share}: on these states success says little about perception"
        return f"{share}, and these pairs do not tell the run from it: its success is no evidence of perception yet"
    if comparison.difference < 0:
        return f"{share}, more than the run: on these states what the policy is shown does harm"
    if blind.rate >= 0.5:
        return f"{share}: of the run's success on these states only the difference ({change}) can be owed to perception"
    return f"{share}: on these states success takes perception ({change} for the policy that sees)"


def _without_sight(config: TrainConfig, out: Path) -> TrainConfig:
    policy = config.policy
    options = {name: value for name, value in policy.backbone.config.items() if name != "stem"}  # it is of images
    blind = policy.model_copy(
        update={
            "backbone": policy.backbone.model_copy(update={"config": {**options, "images": "none"}}),
            "geom_inject_to_dit": False,
            "geom_compression_type": "none",
            "geom_compression": {},
        }
    )
    changed = config.model_copy(update={"out": out, "policy": blind, "mapanything_model_path": None})
    return parse_config(TrainConfig, changed.model_dump(mode="json"), f"the blind control of {config.out}")
