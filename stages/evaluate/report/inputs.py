"""Evaluations as a report takes them: opened by folder, named, and led back to the run that was evaluated."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.cache_schemas.errors import ConfigError, InputError, SchemaTooNew
from geomcache.cache_schemas.fingerprint import digest_json
from geomcache.pipeline.files import CONFIG_NAME
from geomcache.stages.evaluate.live_policy import is_shown_images
from geomcache.stages.evaluate.results import RESULTS_NAME, EpisodeKey, EpisodeResult, EvalResults, read_results
from geomcache.stages.train.checkpoint import (
    CheckpointCard,
    checkpoints_of,
    latest_checkpoint,
    read_card,
    weights_digest,
)
from geomcache.stages.train.run import read_config

_GENERAL_NAMES = ("eval", "evaluation", "results")  # of folders that say nothing about the policy


@dataclass(frozen=True)
class PolicyKind:
    """What was trained."""

    compressor: str  # "none" without geometry
    encoder: str | None
    training_seed: int | None  # None: the run's config.yaml cannot be read
    settings: str | None = None  # digest of that file's settings, less the seed and the folder
    sees_images: bool = True

    @property
    def arm(self) -> str:
        """Runs of one arm differ in the training seed alone."""
        if self.encoder is None:
            return self.compressor if self.sees_images else "blind"
        return f"{self.compressor} of {self.encoder}" + ("" if self.sees_images else " without images")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder."""

    name: str
    folder: Path
    results: EvalResults
    run: Path | None  # the run folder of its checkpoint, where that lies on this machine
    policy: PolicyKind | None  # None: no checkpoint with its weights was found

    @property
    def arm(self) -> str:
        """The policy's arm; masked geometry is one of its own, so are camera orbit and rulers, and the untraceable."""
        masked = ["masked"] if self.results.config.without_geometry and self.policy is not None else []
        policy = self.policy.arm if self.policy is not None else "?"
        return ", ".join([policy, *masked, *self.results.config.describe_changes()])

    def by_key(self) -> dict[EpisodeKey, EpisodeResult]:
        """Its episodes."""
        return {episode.key: episode for episode in self.results.episodes}


def is_evaluation(folder: Path) -> bool:
    """Whether ``folder`` holds the results of ``geomcache eval``."""
    return (folder / RESULTS_NAME).exists()


def open_evaluation(folder: Path, name: str | None = None) -> Evaluation:
    """Read an evaluation.

    Args:
        folder: with results.json.
        name: for people; None = the folder's, or its parent's where the folder is called "eval".

    Raises:
        InputError: no such folder, no results in it, or results that cannot be read.
        SchemaTooNew: a newer geomcache wrote them.
    """
    if not is_evaluation(folder):
        raise InputError(
            f"{folder} holds no evaluation",
            expected=f"{RESULTS_NAME}, as geomcache eval writes it",
            found=what_is_there(folder),
            fix=better_call(folder) or f"geomcache eval RUN --out {folder}",
        )
    results = read_results(folder)
    keys = [episode.key for episode in results.episodes]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(
            f"{folder / RESULTS_NAME} counts an episode twice",
            expected="each suite, task, initial state and seed once",
            found=f"{twice[0]} task {twice[1]}, initial state {twice[2]}, seed {twice[3]}",
            fix=f"geomcache eval ... --out {folder} writes it anew from the episodes that stand there",
        )
    run, card = _run_of(folder, results)
    kind = _kind(run, card) if run is not None and card is not None else None
    return Evaluation(name or _name(folder), folder, results, run, kind)


def open_evaluations(folders: Sequence[Path]) -> list[Evaluation]:
    """``open_evaluation`` of several, under names that tell them apart.

    Raises:
        InputError: what ``open_evaluation`` raises; or one folder is given twice.
    """
    real = [folder.resolve() for folder in folders]
    for place, folder in enumerate(real):
        if folder in real[:place]:
            raise InputError(
                f"{folders[place]} is given twice",
                expected="different evaluations",
                found=", ".join(map(str, folders)),
                fix="name each folder once",
            )
    names = [_name(folder) for folder in folders]
    if len(set(names)) < len(names):  # whole paths, less what all of them begin with
        shared = Path(os.path.commonpath(real))
        names = [str(folder.relative_to(shared)) for folder in real]
    return [open_evaluation(folder, name) for folder, name in zip(folders, names, strict=True)]


def what_is_there(folder: Path) -> str:
    """For an error about a folder that lacks what was looked for."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file"
    return ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "an empty folder"


def better_call(folder: Path) -> str:
    """The command that names the evaluations inside ``folder``; empty where there are none."""
    inside = [path.parent for pattern in ("*", "*/*") for path in sorted(folder.glob(f"{pattern}/{RESULTS_NAME}"))]
    return f"geomcache report {' '.join(map(str, inside[:5]))}" if inside else ""


def _name(folder: Path) -> str:
    path = folder.resolve()
    return path.parent.name if path.name in _GENERAL_NAMES and path.parent.name else path.name


def _run_of(folder: Path, results: EvalResults) -> tuple[Path | None, CheckpointCard | None]:
    """The run and checkpoint that were evaluated: where results.json says, else where they lie beside each other."""
    for path in (results.config.run, folder.parent, folder.parent.parent / "train" / folder.name):
        try:
            for checkpoint in [path] if (path / "card.json").exists() else reversed(checkpoints_of(path)):
                card = read_card(checkpoint)
                if weights_digest(card) == results.conditions.checkpoint_weights:
                    return latest_checkpoint(checkpoint).resolve().parent.parent, card
        except (OSError, InputError, SchemaTooNew):  # another user's folder, or damaged since: as if it were not there
            continue
    return None, None


def _kind(run: Path, card: CheckpointCard) -> PolicyKind:
    try:
        config = read_config(run) if (run / CONFIG_NAME).exists() else None
    except ConfigError:  # of another version of geomcache
        config = None
    encoder = card.recipe.encoder.name if card.recipe else None
    if config is None:
        return PolicyKind(card.policy.compressor, encoder, None, sees_images=is_shown_images(card))
    rest = config.model_dump(mode="json", exclude={"seed", "out"})
    rest["policy"].pop("seed")  # initial weights: training seeds, as geomcache proof sets them
    rest["policy"]["backbone"]["config"].pop("seed", None)
    return PolicyKind(card.policy.compressor, encoder, config.seed, digest_json(rest), is_shown_images(card))
