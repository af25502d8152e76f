"""The data card of an exported policy: README.md, for people."""

from geomcache.pipeline.sim import spread
from geomcache.pipeline.store.card import names_non_commercial
from geomcache.stages.train.checkpoint import CheckpointCard
from geomcache.stages.train.export_record import ExportRecord, Measured, TrainedOn


def data_card(record: ExportRecord, card: CheckpointCard, size: int) -> str:
    """A page a person can read.

    Args:
        record: of the export.
        card: of the export.
        size: of its weights, in bytes.
    """
    dit, cameras = card.policy.dit, card.contract.cameras
    seen = (
        "no images"
        if card.policy.backbone.config.get("images") == "none"
        else "images of " + ", ".join(f"{camera.name} ({camera.height} x {camera.width})" for camera in cameras)
    )
    geometry = f", geometry tokens of {card.recipe.encoder.name}" if card.recipe else ""
    averaged = "averaged over training (EMA)" if record.averaged else "of the last step"
    rounded = "parameters rounded to bfloat16" if record.dtype == "bf16" else "as they were trained"
    return f"""# {record.name}: a policy for LIBERO, trained with geomcache {card.geomcache_version}

| | |
|---|---|
| network | {card.policy.backbone.name} (base_vlm `{card.policy.backbone.config["base_vlm"]}`), compressor \
{card.policy.compressor}, a DiT of {dit.blocks} blocks of width {dit.width}; {record.parameters:,} parameters |
| is given | {seen}{geometry}; the arm's state (8 numbers); an instruction |
| gives | chunks of {dit.horizon} actions at {card.contract.control_rate_hz} Hz |
| weights | {averaged}, {rounded}: {size / 1e6:.1f} MB |
| trained | {card.step:,} optimiser steps of {record.samples_per_step} samples, seed {record.seed}\
{f"; unfinished: {record.unfinished}" if record.unfinished else ""} |

It acts, and cannot be trained further: the optimiser's state is not here. `card.json` says what the weights mean;
`export.json` holds the figures of this page.

## Run it

```bash
geomcache eval --checkpoint FOLDER --episodes 2    # FOLDER: this one, or `{record.name}` where geomcache ships it
geomcache serve FOLDER
```

The suites and tasks are those it was trained on, unless you name others.

## Trained on

{"".join(f"- {_pack(pack)}{chr(10)}" for pack in record.trained_on)}
{_tasks(record)}
## Measured at

{_measured(record)}
## Whose weights

{_origins(card)}
"""


def _pack(pack: TrainedOn) -> str:
    who = (
        "recorded by geomcache's scripted expert, which knows where everything is: one style, short. "
        "These are NOT LIBERO's demonstrations"
        if pack.scripted
        else "demonstrations as that data set holds them"
    )
    text = f"{pack.episodes} episode{'s' * (pack.episodes != 1)}, {pack.rows:,} rows ({pack.control_steps:,} control "
    text += f"steps) of {', '.join(f'`{one}`' for one in pack.sources)}: {who}. Pack `{pack.pack[:16]}`"
    if any(pack.noise):
        text += f". Disturbed: white noise of {', '.join(f'{one:g}' for one in pack.noise if one)} on executed motion"
    if pack.perturbed_steps:
        text += f"{',' if any(pack.noise) else '. Disturbed:'} pushes in {pack.perturbed_steps:,} control steps"
    if any(pack.noise) or pack.perturbed_steps:
        text += "; labels are the expert's clean answers"
    return text + "."


def _tasks(record: ExportRecord) -> str:
    lines = [f"| {suite} | {name.replace('_', ' ')} |" for suite, names in record.tasks.items() for name in names]
    return "\n".join(["| suite | task |", "|---|---|", *lines, ""])


def _measured(record: ExportRecord) -> str:
    if not record.measured:
        return "Nothing yet: `geomcache export RUN --evaluation FOLDER` puts figures here.\n"
    lines = [
        "| suite | tasks | initial states | seeds | under | success | 95 % interval (Wilson) | weights |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(one, record) for one in record.measured),
        "",
        "Closed loop in the simulator, success by LIBERO's own predicate. One training run: another seed can differ.",
    ]
    suites = sorted({one.suite for one in record.measured})
    if drawn := [suite for suite in suites if suite in spread.BASES]:
        lines.append(f"Placements of {', '.join(drawn)} are drawn at random; no demonstration began at one of these.")
    if shipped := [suite for suite in suites if suite not in spread.BASES]:
        lines.append(
            f"On the shipped initial states of {', '.join(shipped)} objects hardly move: a policy that sees nothing "
            "can succeed there too (`geomcache eval RUN --control blind`)."
        )
    return "\n".join([*lines, ""])


def _line(one: Measured, record: ExportRecord) -> str:
    before = one.weights == record.weights_of
    cells = [
        one.suite,
        ", ".join(map(str, one.tasks)),
        f"{one.init_states[0]} to {one.init_states[1]}",
        ", ".join(map(str, one.seeds)),
        ", ".join([f"{one.execute_steps} actions a query", *one.changes]),
        f"{one.successes}/{one.episodes}",
        f"[{one.low:.2f}, {one.high:.2f}]",
        "as trained, before they were rounded" if before and record.dtype == "bf16" else "these",
    ]
    return f"| {' | '.join(cells)} |"


def _origins(card: CheckpointCard) -> str:
    base = card.policy.backbone.config["base_vlm"]
    vlm = (
        "The VLM was trained from random weights: nobody else's are in it."
        if base == "tiny"
        else f"The VLM was trained from `{base}`, whose licence reaches it."
    )
    if card.recipe is None:
        return f"{vlm} It needs no geometry encoder."
    weights, license_text = card.recipe.fingerprint.weights, card.recipe.encoder.license
    encoder = (
        f"Its geometry tokens are made live by the encoder **{card.recipe.encoder.name}**; licence of that encoder's "
        f"weights: {license_text}."
    )
    if weights != "none":
        encoder += (
            f" They are not in this folder, and must be those with digest `{weights[:16]}`; where they are not found, "
            "`--set encoder_config.weights=FOLDER` says where they lie."
        )
    if names_non_commercial(license_text):
        encoder += (
            "\n\n**NON-COMMERCIAL**: the licence of these weights forbids commercial use. It may reach policies "
            "trained on their tokens."
        )
    return f"{vlm} {encoder}"
