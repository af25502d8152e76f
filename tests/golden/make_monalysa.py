"""Makes monalysa_ldlj.json: the log dimensionless jerk of some paths, as the package ``monalysa`` computes it.

    pip install monalysa==0.2.1 numpy scipy pandas         # in an environment of its own; it declares none of the three
    python tests/golden/make_monalysa.py

``monalysa`` is by the metric's first author. It takes velocities, so it is given first differences times the rate. The
measured path, kept in the file, is of the scripted expert: libero_object 0, seed 0, initial state 0, until success.
"""

import importlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "monalysa_ldlj.json"
HZ = 20.0


def minimum_jerk(steps: int) -> NDArray[np.float64]:
    """[steps + 1, 3] metres: 0.3 m along x, Flash and Hogan's polynomial."""
    s = np.linspace(0.0, 1.0, steps + 1)
    return np.outer(10 * s**3 - 15 * s**4 + 6 * s**5, [0.3, 0.0, 0.0])


def formula_paths() -> dict[str, NDArray[np.float64]]:
    """Name -> [T + 1, 3] metres at HZ."""
    smooth, t = minimum_jerk(120), np.arange(121) / HZ
    tremble = 0.001 * np.stack([np.sin(47.0 * t), np.cos(31.0 * t), np.sin(39.0 * t + 1.0)], axis=1)
    jumps = np.outer(np.arange(121) // 8 % 2, [0.0, 0.002, 0.0])
    circle = 0.1 * np.stack([np.cos(t), np.sin(t), np.zeros_like(t)], axis=1)
    return {
        "minimum_jerk": smooth,
        "minimum_jerk_short": minimum_jerk(5),
        "trembling": smooth + tremble,
        "jumps_every_8_steps": smooth + jumps,
        "circle": circle,
        "there_and_back": np.concatenate([smooth, smooth[::-1][1:]]),
    }


def paths() -> dict[str, NDArray[np.float64]]:
    """The paths of formulas and the measured one."""
    return {**formula_paths(), "measured": np.array(json.loads(GOLDEN.read_text())["measured_path"])}


def main() -> None:
    """Write the values anew."""
    smoothness = importlib.import_module("monalysa.quality.smoothness")
    stored = json.loads(GOLDEN.read_text())
    stored["versions"] = {name: metadata.version(name) for name in ("monalysa", "numpy")}
    stored["ldlj"] = {
        name: float(smoothness.log_dimensionless_jerk(np.diff(path, axis=0) * HZ, HZ)) for name, path in paths().items()
    }
    GOLDEN.write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
