"""CPU time of ``geomcache --help``, beside starting Python and importing typer alone; medians of interleaved runs.

    python benchmarks/cli.py [--json FILE] [--runs 9]

Keys: help_cpu_seconds, bare_typer_cpu_seconds, help_over_bare_typer. Exit 1 when --help takes 0.5 s CPU or more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT_SECONDS = 0.5


def cpu_seconds(command: list[str]) -> float:
    """User + system time of one run of a command."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    commands = {
        "help": [sys.executable, "-m", "geomcache.stages.cli.app", "--help"],
        "bare": [sys.executable, "-c", "import typer, rich.table"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs + 1):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    help_time, bare = (statistics.median(times[name][1:]) for name in ("help", "bare"))  # the first run warms up
    figures = {
        "help_cpu_seconds": round(help_time, 4),
        "bare_typer_cpu_seconds": round(bare, 4),
        "help_over_bare_typer": round(help_time / bare, 3),
    }
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))
    return int(help_time >= LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
