"""``geomcache diagnose``: a finished or running training, opened from its folder alone, measured on rows held out."""

from pathlib import Path

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.devices import resolve_device
from geomcache.pipeline.files import write_atomic
from geomcache.stages.train.checkpoint import CheckpointCard, latest_checkpoint, load_policy, read_card
from geomcache.stages.train.data import BatchMaker, TrainingData
from geomcache.stages.train.diagnose import measure
from geomcache.stages.train.diagnose_picture import diagnosis_picture
from geomcache.stages.train.diagnosis import Diagnosis
from geomcache.stages.train.run import describe_data_difference, run_of
from geomcache.stages.train.validation import spread

JSON_NAME, PICTURE_NAME = "diagnosis.json", "diagnosis.png"
ROWS = 32


class RunDiagnosis(Schema):
    """diagnosis.json."""

    run: str
    checkpoint: str
    step: int
    held_out: bool  # False: the run holds no episode out, so these are rows it was trained on
    rows: tuple[int, ...]  # of the run's data
    episodes: int  # that the rows are from
    verdict: str
    measured: Diagnosis


def diagnose_run(path: Path, rows: int = ROWS, out: Path | None = None) -> RunDiagnosis:
    """Measure a run's newest checkpoint, or one checkpoint; write diagnosis.json and diagnosis.png.

    Args:
        path: run folder, or a checkpoint inside one.
        rows: how many to measure, evenly spread over the held-out episodes.
        out: folder of the two files; None = the run's.

    Raises:
        InputError: no checkpoint, one without geometry, or packs or caches that are not those it was trained on.
        GeomcacheError: what opening packs, caches and weights raises.
    """
    checkpoint = latest_checkpoint(path).resolve()
    card = read_card(checkpoint)
    if card.recipe is None:
        raise InputError(
            f"{checkpoint} was trained without geometry, so there is no use of it to measure",
            expected="a run with another geom_compression_type than none",
            found=f"geom_compression_type {card.policy.compressor}",
            fix="geomcache diagnose RUN of a run with geometry; geomcache report FOLDER compares it with this one",
        )
    run, config = run_of(checkpoint)
    data = TrainingData(config)
    _require_data_of(card, data, run)
    held_out = len(data.validation_rows) > 0
    chosen = spread(data.validation_rows if held_out else data.training_rows, rows)
    policy = load_policy(checkpoint, card).to(resolve_device("auto"))
    maker = BatchMaker(data, policy.backbone.packer, card.normaliser, config)
    batch = maker.batch(chosen).to(next(policy.parameters()).device)
    with policy.autocast(card.mixed_precision):
        measured = measure(policy, batch)
    assert measured is not None, "a checkpoint with a recipe has geometry"
    places = [data.locate(int(row)) for row in chosen]
    found = RunDiagnosis(
        run=str(run),
        checkpoint=checkpoint.name,
        step=card.step,
        held_out=held_out,
        rows=tuple(chosen.tolist()),
        episodes=len({(pair, int(data.packs[pair].episode_of_row[row])) for pair, row in places}),
        verdict=measured.verdict(),
        measured=measured,
    )
    out = run if out is None else out
    write_atomic(out / JSON_NAME, found.model_dump_json(indent=2))
    title = f"{run.name}, {checkpoint.name}: {card.recipe.spec.encoder} through {measured.compressor}"
    kind = "held out" if held_out else "TRAINED ON"
    title += f"; {len(chosen)} rows of {found.episodes} episode{'s' * (found.episodes > 1)}, {kind}"
    write_atomic(out / PICTURE_NAME, diagnosis_picture(measured, title))
    return found


def _require_data_of(card: CheckpointCard, data: TrainingData, run: Path) -> None:
    if differences := describe_data_difference(card, data):
        raise InputError(
            f"the packs or caches of {run} are no longer those that it was trained on",
            expected="the same packs and caches, where config.yaml says",
            found="; ".join(differences),
            fix="put them back, or train on the new ones: geomcache train --out OTHER",
        )
