"""The policy's open-loop error, measured again on the rows and from the noise of the training log's figure."""

from geomcache.stages.evaluate.check.finding import (
    RAW_WEIGHTS,
    Finding,
    explanation,
    failed,
    impossible,
    passed,
    statistics_read_as,
)
from geomcache.stages.evaluate.check.opened import MODES, OpenedRun
from geomcache.stages.train.checkpoint import load_policy
from geomcache.stages.train.data import BatchMaker
from geomcache.stages.train.metrics import METRICS_NAME, read_metrics
from geomcache.stages.train.policy import PolicyNet
from geomcache.stages.train.ranks import make_accelerator
from geomcache.stages.train.run import RESULT_NAME, read_result
from geomcache.stages.train.validation import measure, spread

_TOLERANCE = 0.01  # relative: another device, another number of threads
_EXACT = 0.001


def check_open_loop(run: OpenedRun, device: str) -> Finding:
    """Against result.json (training rows), or metrics.jsonl's validation at the checkpoint's step (held-out rows)."""
    name, card = run.policy.checkpoint.name, run.policy.card
    result = read_result(run.run)
    if result is not None and result.checkpoint == name:
        logged, source = result.open_loop_error, RESULT_NAME
        rows = spread(run.data.training_rows, run.config.open_loop_rows)
    else:
        validated = _validated(run, card.step)
        if validated is None:
            return impossible(
                "open loop",
                f"open-loop error of {name} with the training log",
                f"neither {RESULT_NAME} nor a validation in {METRICS_NAME} is of this checkpoint",
                "check the checkpoint that a finished run ended with",
            )
        logged, source = validated, METRICS_NAME
        rows = spread(run.data.validation_rows, run.config.validation_rows)
    if len(rows) >= run.config.processes:  # as ranks shared them
        rows = rows[: len(rows) // run.config.processes * run.config.processes]
    alone = {"processes": 1, "strategy": "ddp", "device": device.split(":")[0], "trackers": ()}
    config = run.config.model_copy(update=alone)
    accelerator = make_accelerator(config)

    def error(policy: PolicyNet, maker: BatchMaker) -> float:
        return measure(policy, maker, rows, config, accelerator).open_loop_error

    compared = f"open-loop error of {name} on {len(rows)} rows with {source}"
    found = error(run.policy.net, run.maker)
    if abs(found - logged) <= _TOLERANCE * logged:
        return passed("open loop", compared, f"{found:.4f}", f"{logged:.4f}")
    left = {}
    for mode in MODES:
        if mode != run.config.normalisation:
            maker = BatchMaker(run.data, run.policy.packer, run.fitted(mode), run.config)
            left[statistics_read_as(run.config.normalisation, mode)] = abs(error(run.policy.net, maker) - logged)
    raw = load_policy(run.policy.checkpoint, card, averaged=False).to(next(run.policy.net.parameters()).device).eval()
    left[RAW_WEIGHTS] = abs(error(raw, run.maker) - logged)
    exact = {fault: value for fault, value in left.items() if value <= _EXACT * logged}
    fault = explanation(exact, abs(found - logged))
    return failed("open loop", compared, f"{logged:.4f}", f"{found:.4f}", fault)


def _validated(run: OpenedRun, step: int) -> float | None:
    path = run.run / METRICS_NAME
    if not path.exists():
        return None
    found = [line["validation"] for line in read_metrics(path) if "validation" in line and line["step"] == step - 1]
    return float(found[-1]["open_loop_error"]) if found else None
