"""From the proof's settings to each part's: what it is made with, whether it stands, how long it may take."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.cli import chain

if TYPE_CHECKING:
    from geomcache.configs.schema import ProofConfig
    from geomcache.stages.evaluate.config import EvalConfig
    from geomcache.stages.evaluate.report.inputs import Evaluation
    from geomcache.stages.evaluate.report.proof import Cost, Trained
    from geomcache.stages.train.config import TrainConfig
    from geomcache.stages.train.run import TrainResult

ALL = "all"
Work = Mapping[str, Sequence[str]]  # arm -> cells in which it is evaluated

# For estimates: seconds on one free core of a server CPU of 2023, at the sizes of configs/tiny/proof.yaml.
_DEMO, _ROW, _EPISODE = 8.0, 0.005, 12.0
_STEP, _GEOMETRY_STEP, _BLIND_STEP = 0.3, 0.37, 0.18
_ROWS_PER_DEMO = 180.0  # control steps; fewer rows where not every step is observed


class Line(NamedTuple):
    """One part in the table of ``--dry-run``."""

    part: str
    state: str  # finished | begun | to do
    seconds: float  # still to go, estimated


def chosen(settings: "ProofConfig", text: str | None) -> Work:
    """The arms that ``--arms`` asks for, with all their cells; without it the core arms in the core cells.

    Raises:
        InputError: there is no such arm.
    """
    if text is None:
        core = [name for name, cell in settings.cells.items() if cell.core]
        return {arm: [cell for cell in cells_of(settings, arm) if cell in core] for arm in settings.core}
    names = tuple(settings.arms) if text == ALL else tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in settings.arms]:
        raise InputError(
            f"there is no arm {', '.join(unknown)}",
            expected=f"{ALL}, or some of {','.join(settings.arms)}",
            found=text,
            fix=f"--arms {','.join(settings.core)}",
        )
    return {arm: cells_of(settings, arm) for arm in names}


def cells_of(settings: "ProofConfig", arm: str) -> list[str]:
    """The cells in which an arm is evaluated."""
    return [name for name, cell in settings.cells.items() if cell.is_for(arm)]


def caches_of(settings: "ProofConfig", arms: Iterable[str]) -> list[str]:
    """The caches that arms read, in the order of the settings."""
    return [name for name in settings.extract if name in {settings.arms[arm].cache for arm in arms}]


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``change`` laid over ``base`` key by key; mappings are merged, anything else is replaced."""
    result = dict(base)
    for key, value in change.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result


def run_folder(settings: "ProofConfig", arm: str, seed: int) -> Path:
    """Of one training."""
    return settings.out / "train" / arm / f"seed_{seed}"


def train_config(settings: "ProofConfig", arm: str, seed: int) -> "TrainConfig":
    """Of one training; order of data, head and backbone all follow its seed."""
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.train.config import TrainConfig

    own = settings.arms[arm]
    cache = settings.out / "caches" / own.cache if own.cache else None
    filled = {
        "seed": seed,
        "policy": {"seed": seed, "backbone": {"config": {"seed": seed}}},
        "data": [{"pack": settings.out / "pack", "cache": cache}],
        "out": run_folder(settings, arm, seed),
    }
    return parse_config(TrainConfig, merged(merged(settings.train, own.settings), filled), f"arm {arm}")


def eval_config(settings: "ProofConfig", arm: str, seed: int, cell: str) -> "EvalConfig":
    """Of one training in one cell."""
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.evaluate.config import EvalConfig

    paths = {"run": run_folder(settings, arm, seed), "out": settings.out / "eval" / arm / f"seed_{seed}" / cell}
    filled = {**merged(settings.eval, settings.cells[cell].settings), **paths}
    return parse_config(EvalConfig, filled, f"cell {cell}")


def check(settings: "ProofConfig", work: Work) -> None:
    """Refuse a wrong setting of any part before the first one starts."""
    from geomcache.pipeline import plugins
    from geomcache.pipeline.config_errors import parse_config
    from geomcache.stages.evaluate.run import require_init_states

    chain.check(settings)
    for arm, cells in work.items():
        policy = train_config(settings, arm, settings.seeds[0]).policy
        parse_config(
            plugins.config_class("backbone", policy.backbone.name), policy.backbone.config, f"backbone of arm {arm}"
        )
        parse_config(
            plugins.config_class("compressor", policy.compressor), policy.compressor_options, f"compressor of arm {arm}"
        )
        if (settings.arms[arm].cache is None) != (policy.compressor == "none"):
            raise InputError(
                f"arm {arm} does not fit together",
                expected="a cache and a compressor, or neither",
                found=f"cache {settings.arms[arm].cache}, compressor {policy.compressor}",
                fix=f"set arms.{arm}.cache, or its policy.geom_compression_type",
            )
        for cell in cells:
            evaluation = eval_config(settings, arm, settings.seeds[0], cell)
            require_init_states(evaluation)
            if evaluation.execute_steps > policy.dit.horizon:
                raise InputError(
                    f"cell {cell}: execute_steps is longer than the action chunk of arm {arm}",
                    expected=f"at most {policy.dit.horizon}",
                    found=str(evaluation.execute_steps),
                    fix=f"--set eval.execute_steps={policy.dit.horizon}",
                )


def cost_path(settings: "ProofConfig", part: str) -> Path:
    """Where a part's cost is written down: beside the parts, whose folders are their own."""
    return settings.out / "costs" / f"{part.replace(' ', '_')}.json"


def costs(settings: "ProofConfig") -> dict[str, "Cost"]:
    """What was measured so far, in the order of the work."""
    parts = ["demos", "pack", *(f"extract {name}" for name in settings.extract)]
    for arm in settings.arms:
        for seed in settings.seeds:
            parts.append(train_part(arm, seed))
            parts += [eval_part(arm, seed, cell) for cell in cells_of(settings, arm)]
    return {part: cost for part in parts if (cost := chain.read_cost(cost_path(settings, part))) is not None}


def train_part(arm: str, seed: int) -> str:
    """Its title, and the name of its cost."""
    return f"train/{arm}/seed_{seed}"


def eval_part(arm: str, seed: int, cell: str) -> str:
    """Its title, and the name of its cost."""
    return f"eval/{arm}/seed_{seed}/{cell}"


def standing(settings: "ProofConfig") -> list["Trained"]:
    """Every finished training of these settings with its finished evaluations, in the order of the settings."""
    from geomcache.stages.evaluate.report.proof import Trained

    found = []
    for arm in settings.arms:
        for seed in settings.seeds:
            result = trained(settings, arm, seed)
            if result is None:
                continue
            evaluations = {
                cell: evaluation
                for cell in cells_of(settings, arm)
                if (evaluation := evaluated(settings, arm, seed, cell)) is not None
            }
            cost = chain.read_cost(cost_path(settings, train_part(arm, seed)))
            found.append(Trained(arm, settings.arms[arm].cache or "none", seed, result, cost, evaluations))
    return found


def trained(settings: "ProofConfig", arm: str, seed: int) -> "TrainResult | None":
    """A training's result, where it is finished and was made with these settings from the pack that lies here."""
    from geomcache.pipeline.pack.reader import PackReader
    from geomcache.pipeline.store.reader import CachedTokens
    from geomcache.stages.train.checkpoint import latest_checkpoint, read_card
    from geomcache.stages.train.run import read_config, read_result

    config = train_config(settings, arm, seed)
    result = read_result(config.out)
    if result is None or read_config(config.out).identity() != config.identity():
        return None
    card = read_card(latest_checkpoint(config.out))
    with PackReader(settings.out / "pack") as pack:
        same = card.packs == (pack.info.digest,)
    if (cache := settings.arms[arm].cache) is not None and same:
        if not _cache_stands(settings, cache):
            return None
        with CachedTokens(settings.out / "caches" / cache) as tokens:
            same = card.recipe is not None and not card.recipe.describe_difference(tokens.recipe)
    return result if same else None


def evaluated(settings: "ProofConfig", arm: str, seed: int, cell: str) -> "Evaluation | None":
    """An evaluation, where it is finished, is of these settings and of the weights that lie here."""
    from geomcache.stages.evaluate.report.inputs import is_evaluation, open_evaluation
    from geomcache.stages.train.checkpoint import latest_checkpoint, read_card, weights_digest

    config = eval_config(settings, arm, seed, cell)
    if not is_evaluation(config.out):
        return None
    found = open_evaluation(config.out, f"{arm}/{cell}, seed {seed}")
    results, episodes = found.results, ("suites", "tasks", "episodes", "first_init_state", "seeds")
    alike = results.config.identity() == config.identity() and all(
        getattr(results.config, name) == getattr(config, name) for name in episodes
    )
    weights = weights_digest(read_card(latest_checkpoint(config.run)))
    return found if results.finished and alike and results.conditions.checkpoint_weights == weights else None


def dry_run(settings: "ProofConfig", work: Work) -> list[Line]:
    """Every part that would be done or skipped, in the order of the work."""
    from geomcache.pipeline.sim import suites

    known = costs(settings)
    demos = chain.demos_config(settings)
    wanted = demos.episodes * (len(demos.tasks) or suites.task_count(demos.suite))
    rows = wanted * _ROWS_PER_DEMO / demos.observe_every
    out = settings.out
    lines = [
        _line("demos", out / "demos", _demos_stand(settings), _DEMO * wanted / demos.workers),
        _line("pack", out / "pack", _pack_stands(settings), _ROW * rows / 4),
    ]
    lines += [
        _line(f"extract {name}", out / "caches" / name, _cache_stands(settings, name), _ROW * rows)
        for name in caches_of(settings, work)
    ]
    for arm, cells in work.items():
        for seed in settings.seeds:
            config = train_config(settings, arm, seed)
            blind = config.policy.backbone.config.get("images") == "none"
            step = _GEOMETRY_STEP if settings.arms[arm].cache else _BLIND_STEP if blind else _STEP
            others = [known[part].wall_seconds for part in known if part.startswith(f"train/{arm}/")]
            seconds = max(others) if others else step * config.steps
            done = _pack_stands(settings) and trained(settings, arm, seed) is not None
            lines.append(_line(train_part(arm, seed), config.out, done, seconds))
            for cell in cells:
                here = eval_config(settings, arm, seed, cell)
                stands = done and evaluated(settings, arm, seed, cell) is not None
                lines.append(_line(eval_part(arm, seed, cell), here.out, stands, _EPISODE * _episodes(here)))
    return lines


def seconds_to_go(settings: "ProofConfig", lines: Sequence[Line]) -> float:
    """Of a whole dry run: what comes before training one after the other, then the arms side by side."""
    alone = sum(line.seconds for line in lines if "/" not in line.part)
    free = [0.0] * settings.processes
    for job in sorted(jobs_of(lines).values(), reverse=True):
        heapq.heappush(free, heapq.heappop(free) + job)
    return alone + max(free)


def jobs_of(lines: Sequence[Line]) -> dict[str, float]:
    """``ARM/seed_S`` -> seconds of its training and evaluations."""
    found: dict[str, float] = {}
    for line in lines:
        if "/" in line.part:
            job = "/".join(line.part.split("/")[1:3])
            found[job] = found.get(job, 0.0) + line.seconds
    return found


def _episodes(config: "EvalConfig") -> int:
    from geomcache.pipeline.sim import suites

    tasks = sum(len(config.tasks) if config.tasks else suites.task_count(suite) for suite in config.suites)
    return tasks * config.episodes * len(config.seeds)


def _line(part: str, folder: Path, done: bool, seconds: float) -> Line:
    state = "finished" if done else "begun" if folder.exists() else "to do"
    return Line(part, state, 0.0 if done else seconds)


def _demos_stand(settings: "ProofConfig") -> bool:
    from geomcache.pipeline.sim import suites
    from geomcache.pipeline.sim.demo_file import recorded_in

    config = chain.demos_config(settings)
    for index in config.tasks or range(suites.task_count(config.suite)):
        task = suites.task_info(config.suite, index)
        digest, attempts = recorded_in(settings.out / "demos" / f"{task.name}_demo.hdf5")
        if digest != config.digest(task) or len(attempts) != config.episodes:
            return False
    return True


def _pack_stands(settings: "ProofConfig") -> bool:
    from geomcache.cache_schemas.pack_info import PACK_NAME

    return (settings.out / "pack" / PACK_NAME).exists()


def _cache_stands(settings: "ProofConfig", name: str) -> bool:
    from geomcache.cache_schemas.errors import GeomcacheError
    from geomcache.pipeline.store.reader import CachedTokens

    try:
        CachedTokens(settings.out / "caches" / name).close()
    except GeomcacheError:  # not there, or unfinished: both are to do
        return False
    return True
