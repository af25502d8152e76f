"""docs/extract_table.md: what each encoder takes for the four suites of LIBERO, by `geomcache extract --dry-run`.

    python benchmarks/extract_table.py --pack PACK [--out docs/extract_table.md] [--tflops 150]

Every line is that command once, for an assumed device; hours on a core of this machine are the sum of the milliseconds
it says. Weights are random (the same
work); MapAnything is left out where its package is not installed. The giant needs 8 GB of memory.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROWS = 273_465  # time steps of libero_spatial, object, goal and 10
GPU_CPUS = 8  # beside each assumed device

TEXT = """# How long stage one takes

Made by `python benchmarks/extract_table.py`, which calls `geomcache extract --dry-run --rows {rows}` for each line: all
four suites of LIBERO, two 256-pixel views a row. Bytes follow from the shapes; operations are counted while the real
classes run.

- **Measured here**: one CPU core, float32, random weights (the same work), one row a batch.
- **Assumed, not measured**: GPUs that sustain {tflops:g} TFLOP/s in bfloat16, each with {cpus} CPU threads as fast as
  one of these and a disk as fast as this one to itself; the last column says what a shared disk must take from each. No
  GPU was at hand. Where operations are few, decoding the pictures or the disk take the hours; the disk's speed is
  measured for each line by 64 MB and varies (so small, with fewer bytes than base, may come out slower).

"""


def da3(model: str, **settings: Any) -> tuple[str, dict[str, Any]]:
    return "depth_anything3", {"model": model, "weights": "random", "process_size": [252, 252], **settings}


LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "Depth-Anything-3 small, features, 252 px": da3("da3-small"),
    "Depth-Anything-3 base, features, 252 px": da3("da3-base"),
    "Depth-Anything-3 base, features, 224 px": da3("da3-base", process_size=[224, 224]),
    "Depth-Anything-3 base, ray 14 x 14, 252 px": da3("da3-base", tap="ray", geom_target_hw=[14, 14]),
    "Depth-Anything-3 large, features, 252 px": da3("da3-large-1.1"),
    "Depth-Anything-3 giant, features, 252 px": da3("da3-giant-1.1"),
    "MapAnything v1, 224 px": ("map_anything", {"model": "v1", "weights": "random"}),
    "MapAnything v1.1, 224 px": ("map_anything", {"model": "v1.1", "weights": "random"}),
    "XFeat, 256 px": ("xfeat", {}),
    "oracle_pointmap, 18 x 18": ("oracle_pointmap", {"grid": [18, 18]}),
}


def dry_run(pack: Path, encoder: str, config: dict[str, Any], *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "geomcache.stages.cli.app", "extract", "--dry-run", "--json"]
    command += ["--pack", str(pack), "--out", "estimate-only", "--encoder", encoder, "--rows", str(ROWS), *more]
    for name, value in {"batch_size": 1, **config}.items():
        command += ["--set", f"encoder_config.{name}={json.dumps(value)}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def hours(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def table(pack: Path, tflops: float) -> str:
    lines = []
    for name, (encoder, config) in LINES.items():
        if encoder == "map_anything" and importlib.util.find_spec("mapanything") is None:
            continue
        found = dry_run(pack, encoder, config, "--assume-tflops", str(tflops), "--set", f"cpus_per_worker={GPU_CPUS}")
        here_ms = sum(found[f"{stage}_ms"] for stage in ("decode", "encode", "store", "write"))
        cells = [name, f"{found['gflop_per_row'] / 2:.3g}", "x".join(map(str, found["row_shape"])), found["codec"]]
        cells += [f"{found['stored_bytes'] / ROWS / 1000:,.0f}", f"{found['stored_bytes'] / 1e9:,.0f}"]
        cells += [f"{found['encode_ms']:,.0f}", hours(here_ms * ROWS / 3.6e6)]
        cells += [hours(found["hours"][count]) for count in ("1", "8", "64")]
        cells += [f"{found['rows_per_second'] * found['stored_bytes'] / ROWS / 1e6:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="of 256-pixel frames of two cameras, with depth")
    parser.add_argument("--out", type=Path, default=Path("docs/extract_table.md"))
    parser.add_argument("--tflops", type=float, default=150.0)
    arguments = parser.parse_args()
    body = table(arguments.pack, arguments.tflops)
    heads = ["encoder", "GFLOP a view", "tokens of a row", "codec", "kB a row", "GB in all", "ms a row here"]
    heads += ["hours, 1 core here", "hours, 1 GPU", "8 GPUs", "64 GPUs", "MB/s that 1 GPU writes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", body]
    arguments.out.write_text(TEXT.format(rows=ROWS, tflops=arguments.tflops, cpus=GPU_CPUS) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
