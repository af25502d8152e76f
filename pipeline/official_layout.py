"""Names of the official LIBERO HDF5 layout that its reader and our recorder share; needs no simulator."""

import re

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
