"""libero_object_choice: LIBERO's own scenes and sentences, where nothing but the instruction says what is wanted.

The suite has the ten tasks of libero_object. Each of its ten scenes holds six of the ten objects that they ask for, and
each object is in six scenes. A layout is a scene with its six objects dealt out to its six places at random. It
belongs to six tasks, one for each object in it: the same picture under six instructions. So whoever brings one object
without reading is right once in six, whatever it sees. Layouts are listed as in spread.py, by scene instead of by task.

Non-obvious:
- Initial state i of a task is layout i // 6 of the (i % 6)-th scene that holds its object. So the first 6 m states of
  all ten tasks are whole layouts, each with all of its instructions.
- A simulation is built from one BDDL file. Here that is the scene's own with the goal, the objects of interest and the
  language of the task's own file put in, so LIBERO's parser and predicate are used as they are.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SUITE = "libero_object_choice"
STATES_OF_A_LAYOUT = 6  # tasks that a layout belongs to, and scenes that hold an object
_OF_THE_TASK = (":language", ":obj_of_interest", ":goal")  # sections that say what is wanted


def scene_and_layout(target: str, scenes: Sequence[Sequence[str]], i: int) -> tuple[int, int]:
    """(scene, number of its layout) of initial state ``i`` of the task that asks for ``target``.

    Args:
        target: the simulator's name of an object.
        scenes: the objects of each scene.
        i: number of the state.
    """
    holding = [number for number, objects in enumerate(scenes) if target in objects]
    assert len(holding) == STATES_OF_A_LAYOUT, f"{target} is in scenes {holding}"
    return holding[i % STATES_OF_A_LAYOUT], i // STATES_OF_A_LAYOUT


def target_of(bddl: str) -> str:
    """The object that a task of libero_object asks for; ``bddl`` is the text of its file."""
    return section(bddl, ":obj_of_interest").split()[1]


def objects_of(bddl: str) -> tuple[str, ...]:
    """The objects of a task's scene, the basket too, in the order of the flat state."""
    return tuple(section(bddl, ":objects").strip("()").split()[1::3])


def with_task_of(scene: str, task: str) -> str:
    """BDDL text of ``scene``'s objects and places with what ``task`` wants; both are texts of BDDL files."""
    for name in _OF_THE_TASK:
        scene = scene.replace(section(scene, name), section(task, name))
    return scene


def section(bddl: str, name: str) -> str:
    """``(NAME ...)`` of a BDDL text, up to its own closing parenthesis."""
    start = bddl.index(f"({name}")
    depth = 0
    for place in range(start, len(bddl)):
        depth += {"(": 1, ")": -1}.get(bddl[place], 0)
        if depth == 0:
            return bddl[start : place + 1]
    raise AssertionError(f"{name} does not end")


@contextmanager
def bddl_file(own: Path, text: str | None) -> Iterator[Path]:
    """A file that holds ``text`` for as long as the block lasts; the task's ``own`` one for None."""
    if text is None:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
        path = Path(folder) / own.name
        path.write_text(text, encoding="utf-8")
        yield path
