"""The tables and the page of ``geomcache proof``."""

from geomcache.stages.evaluate.report.proof import CellOutcome, ProofResults
from geomcache.stages.evaluate.report.table import Table, markdown, number
from geomcache.stages.evaluate.results import Success


def arms_table(results: ProofResults) -> Table:
    """A line an arm: size, cost of its training, open-loop errors."""
    columns = ["arm", "geometry", "parameters", "steps", "CPU s", "open loop", "held out", "mean action"]
    lines = [
        [
            arm.name,
            arm.geometry,
            f"{arm.parameters:,}",
            f"{arm.steps:,}",
            number(arm.cpu_seconds, 0),
            number(arm.open_loop_error, 3),
            number(arm.held_out_error, 3),
            number(arm.mean_action_error, 3),
        ]
        for arm in results.arms
    ]
    return Table("training" if _single(results) else "training, means over the seeds", columns, lines)


def success_table(results: ProofResults) -> Table:
    """Success in closed loop: a line an arm, a column a cell, with 95 % intervals."""
    cells = list(dict.fromkeys(cell for arm in results.arms for cell in arm.cells))
    lines = [[arm.name, *(_told(arm.cells.get(cell)) for cell in cells)] for arm in results.arms]
    title = "success in closed loop, " + (
        "one training each" if _single(results) else "training seeds counted together"
    )
    return Table(title, ["arm", *cells], lines)


def seeds_table(results: ProofResults) -> Table | None:
    """Successes by training seed; None where there is one seed."""
    if _single(results):
        return None
    seeds = sorted({seed for arm in results.arms for seed in arm.seeds})
    lines = [
        [arm.name, cell, *(_plain(found.by_seed.get(seed)) for seed in seeds)]
        for arm in results.arms
        for cell, found in arm.cells.items()
    ]
    return Table("by training seed", ["arm", "cell", *(f"seed {seed}" for seed in seeds)], lines)


def comparisons_table(results: ProofResults) -> Table | None:
    """The comparisons named beforehand; None where there are none."""
    columns = ["B against A", "pairs", "only A", "only B", "B less A, pp", "p", "p (Holm)", "by training seed, pp"]
    lines = []
    for each in results.comparisons:
        seeds = ", ".join(f"{100 * value:+.0f}" for value in each.by_seed.values())
        if each.over_seeds is not None:
            mean, low, high = (
                100 * value for value in (each.over_seeds.mean, each.over_seeds.low, each.over_seeds.high)
            )
            seeds += f"; mean {mean:+.1f} [{low:+.0f}, {high:+.0f}]"
        lines.append(
            [
                f"{each.b} against {each.a}",
                *map(str, (each.pairs.count, each.pairs.only_a, each.pairs.only_b)),
                f"{100 * each.difference:+.1f} [{100 * each.low:+.0f}, {100 * each.high:+.0f}]",
                f"{each.p:.2g}",
                f"{each.p_holm:.2g}",
                seeds,
            ]
        )
    return Table("comparisons named beforehand", columns, lines) if lines else None


def costs_table(results: ProofResults) -> Table:
    """Wall and CPU seconds of every part."""
    lines = [
        [name, f"{cost.wall_seconds:.0f}", f"{cost.cpu_seconds:.0f}" if "/" in name else "-"]
        for name, cost in results.costs.items()
    ]
    return Table("what each part took", ["part", "wall s", "CPU s of its process"], lines)


def main_tables(results: ProofResults) -> tuple[Table | None, ...]:
    """All but the costs, in order."""
    return success_table(results), arms_table(results), seeds_table(results), comparisons_table(results)


def results_page(results: ProofResults, command: str) -> str:
    """results.md."""
    parts = [
        f"# Results of `{command}`\n",
        f"geomcache {results.geomcache_version} on {results.machine}; "
        + ", ".join(f"{package} {version}" for package, version in results.packages.items() if package != "geomcache")
        + ".\n",
        *(f"Evaluated: {line}.\n" for line in results.evaluated),
    ]
    if results.gate:
        parts += ["## Gate\n", "\n".join(f"- {line.sentence}" for line in results.gate) + "\n"]
    *tables, compared = main_tables(results)
    for table in (*tables, compared, costs_table(results)):
        if table is not None:
            parts += [f"## {table.title[0].upper()}{table.title[1:]}\n", markdown(table)]
        if table is not None and table is compared:
            parts.append("\n".join(f"- {each.sentence}" for each in results.comparisons) + "\n")
    if results.missing:
        parts.append(
            "Not compared, a side was not evaluated: "
            + ", ".join(f"{b} against {a}" for a, b in results.missing)
            + ".\n"
        )
    return "\n".join(parts)


def _single(results: ProofResults) -> bool:
    return all(len(arm.seeds) == 1 for arm in results.arms)


def _told(found: CellOutcome | None) -> str:
    """With what was done of what the policy was told instead."""
    return _shown(found) + (f"; as told {_shown(found.told)}" if found is not None and found.told is not None else "")


def _plain(found: Success | None) -> str:
    return "-" if found is None else f"{found.successes}/{found.episodes}"


def _shown(found: Success | None) -> str:
    return "-" if found is None else f"{_plain(found)} [{found.low:.2f}, {found.high:.2f}]"
