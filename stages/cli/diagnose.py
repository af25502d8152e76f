"""``geomcache diagnose``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomcache.stages.cli.common import JsonOption, say, show_table, show_values

if TYPE_CHECKING:
    from geomcache.stages.train.diagnose_run import RunDiagnosis
    from geomcache.stages.train.diagnosis import Spread

FEW_EPISODES = 5


def diagnose(
    run: Annotated[Path, typer.Argument(help="Run folder of geomcache train, or one of its checkpoints.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure, evenly spread over the held-out episodes.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder for diagnosis.json and diagnosis.png; default: the run's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Does this policy use its geometry? Causal tests, attention, gates, ranks, gradients; docs/diagnose.md.

    The honest number is the first: what the loss does when each sample gets another sample's geometry.
    """
    from geomcache.stages.train.diagnose_run import PICTURE_NAME, diagnose_run

    found = diagnose_run(run, rows, out)
    if not found.held_out:
        say("this run holds no episode out: these are rows it was trained on")
    if found.episodes < FEW_EPISODES:
        say(f"rows of {_episodes(found)} only: neighbours are alike, so the true spread is larger than the one shown")
    if as_json:
        show_values(found.model_dump(mode="json"), as_json)
        return
    _print(found)
    typer.echo(f"picture: {(out or Path(found.run)) / PICTURE_NAME}")
    typer.echo(found.verdict)


def _print(found: "RunDiagnosis") -> None:
    measured = found.measured
    kind = "held out" if found.held_out else "trained on"
    typer.echo(
        f"{found.run} {found.checkpoint}: {measured.samples} rows of {_episodes(found)}, {kind}; "
        f"{measured.draws} draws of noise each; +- is the standard error"
    )
    percent = 100 / measured.loss.mean if measured.loss.mean else 0.0
    show_table(
        f"loss {_spread(measured.loss)}; with changed geometry",
        ["geometry", "loss changes by", "in %", "actions change by", "tokens moved (std)"],
        [
            [
                name,
                _spread(effect.loss),
                _spread(effect.loss, percent),
                _spread(effect.actions),
                "" if effect.tokens_moved is None else f"{effect.tokens_moved:.3g}",
            ]
            for name, effect in measured.effects.items()
        ]
        + [["right, other noise", "", "", _spread(measured.noise_actions), ""]],
    )
    show_table(
        f"attention of action positions on {measured.geometry_tokens} geometry tokens beside "
        f"{measured.prompt_tokens:.4g} of the prompt; uniform {100 * measured.uniform_share:.3g} %",
        [
            "block",
            "VLM layer",
            *(f"step {step + 1}, %" for step in range(len(measured.blocks[0].mass))),
            "of uniform",
            "entropy",
            "eff. rank",
            "over samples",
            "varying",
        ],
        [
            [
                str(number),
                str(block.vlm_layer),
                *(f"{100 * mass:.3g}" for mass in block.mass),
                "" if not measured.uniform_share else f"{_mean(block.mass) / measured.uniform_share:.2f}",
                f"{_mean(block.entropy):.2f}",
                f"{block.rank:.1f}",
                "" if block.rank_over_samples is None else f"{block.rank_over_samples:.1f}",
                "" if block.varying_share is None else f"{block.varying_share:.2f}",
            ]
            for number, block in enumerate(measured.blocks, 1)
        ],
    )
    gradients = measured.gradients
    modules = {"compressor": gradients.compressor, "DiT": gradients.dit, "VLM": gradients.vlm}
    show_table(
        f"gradient of the loss of {gradients.samples} rows; by one standard deviation of a row's tokens: "
        f"{gradients.tokens:.3g}",
        ["module", "norm", "over that of the weights"],
        [
            [name, "not trained", ""]
            if gradient is None
            else [name, f"{gradient.norm:.3g}", f"{gradient.over_weights:.3g}"]
            for name, gradient in modules.items()
        ],
    )
    if measured.gates is not None:
        gates = measured.gates
        typer.echo(f"gates: mean {gates.mean:.3f}, below 0.1 {gates.below:.1%}, from 0.9 on {gates.above:.1%}")


def _episodes(found: "RunDiagnosis") -> str:
    return "one episode" if found.episodes == 1 else f"{found.episodes} episodes"


def _spread(spread: "Spread", factor: float = 1.0) -> str:
    error = "" if spread.error is None else f" +- {factor * spread.error:.2g}"
    return f"{factor * spread.mean:.3g}{error}"


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
