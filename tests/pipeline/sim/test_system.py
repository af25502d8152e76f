"""The check that runs before the simulator is imported."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache_schemas.errors import InputError, MissingDependency
from geomcache.pipeline.sim import system


def test_names_the_apt_line_when_egl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(system, "_require_packages", lambda: None)

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(system.ctypes, "CDLL", no_library)
    with pytest.raises(MissingDependency) as problem:
        system.require_simulator()
    assert "apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri" in str(problem.value)
    assert "libEGL.so.1" in str(problem.value)


def test_a_dispatcher_without_a_driver_is_missing_egl_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(system, "_require_packages", lambda: None)
    monkeypatch.setattr(system, "_loads", lambda name: name not in system._VENDOR_LIBRARIES)
    with pytest.raises(MissingDependency, match="libEGL_mesa"):
        system.require_simulator()


def test_names_the_pip_line_when_libero_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without_libero(name: str, package: str | None = None) -> Any:
        return None if name == "libero" else real(name, package)

    monkeypatch.setattr(system.importlib.util, "find_spec", without_libero)
    with pytest.raises(MissingDependency, match=r"pip install 'geomcache\[sim\]'"):
        system._require_packages()


def test_a_libero_that_would_prompt_is_refused_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="hang"):
        system._refuse_prompt("answer = input('Do you want to specify a custom path?')")
    (tmp_path / "config.yaml").write_text("assets: x\n")
    system._refuse_prompt("answer = input('Do you want to specify a custom path?')")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_egl_is_chosen_but_a_choice_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_require_packages", lambda: None)
    monkeypatch.setattr(system, "_loads", lambda _: True)
    monkeypatch.setenv("MUJOCO_GL", "placeholder")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "placeholder")
    monkeypatch.delenv("PYOPENGL_PLATFORM")
    system.require_simulator()
    assert (system.os.environ["MUJOCO_GL"], system.os.environ["PYOPENGL_PLATFORM"]) == ("egl", "egl")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delenv("PYOPENGL_PLATFORM")
    system.require_simulator()
    assert (system.os.environ["MUJOCO_GL"], system.os.environ["PYOPENGL_PLATFORM"]) == ("osmesa", "osmesa")
    for wrong in ("glfw", "foo", ""):
        monkeypatch.setenv("MUJOCO_GL", wrong)
        with pytest.raises(InputError, match=f"MUJOCO_GL={wrong}\n"):
            system.require_simulator()


def test_importing_the_room_does_not_import_the_simulator() -> None:
    import subprocess

    code = (
        "import sys; from geomcache.pipeline.sim import recorder, expert, libero_env, suites, system; "
        "sys.exit(any(name in sys.modules for name in ('mujoco', 'robosuite', 'libero', 'h5py')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
