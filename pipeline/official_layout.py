"""Names of the official LIBERO HDF5 layout that its reader and our recorder share; needs no simulator."""

import re
from typing import Literal, get_args

# The files drop the simulator's prefix from the wrist camera's name.
_FILE_CAMERA_NAMES = {"robot0_eye_in_hand": "eye_in_hand"}


def file_camera_name(camera: str) -> str:
    """The simulator's camera name -> the prefix of its fields in a file."""
    return _FILE_CAMERA_NAMES.get(camera, camera)


def simulator_camera_name(prefix: str) -> str:
    """The prefix of a camera's fields in a file -> the simulator's name."""
    return {short: name for name, short in _FILE_CAMERA_NAMES.items()}.get(prefix, prefix)


def instruction_of(task: str) -> str:
    """LIBERO's rule: the task's name with spaces; names of libero_10 and libero_90 lose ``KITCHEN_SCENE3_``."""
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ")


SUFFIXES = (".hdf5", ".h5")  # of files in the official layout
SuiteName = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "unknown"]


def suite_named_in(text: str) -> str:
    """The suite that a folder's or data set's name mentions; "unknown" if it mentions none."""
    return next(
        (suite for suite in get_args(SuiteName)[:-1] if re.search(rf"{suite}(?![0-9a-z])", text.lower())), "unknown"
    )
