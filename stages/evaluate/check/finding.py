"""What a check found, and how the one fault is chosen that explains a difference."""

from collections.abc import Mapping
from typing import Literal

from geomcache.cache_schemas.base import Schema

Check = Literal["actions", "frames", "states", "policy inputs", "tokens", "open loop"]
CHECKS: tuple[Check, ...] = ("actions", "frames", "states", "policy inputs", "tokens", "open loop")

TURNED, MIRRORED, FLIPPED = "180° turn", "horizontal mirror", "vertical flip"
BGR, SWAPPED_CAMERAS, RESIZE, EXPOSURE = "BGR", "swapped cameras", "resize method", "exposure"
GRIPPER_SIGN, GRIPPER_RANGE = "gripper sign", "gripper range"
ABSOLUTE, SHIFTED = "absolute for delta actions", "chunk shifted by one"
CONTROL_RATE, SETTLING = "wrong control rate", "missing settling steps"
OTHER_STATISTICS = "statistics of another data set"
QUATERNION, ANTIPODAL = "quaternion for axis-angle", "antipodal axis-angle"
STATE_OMITTED, STATE_ORDER = "state omitted", "state order"
OTHER_WEIGHTS, OTHER_TAP = "other encoder weights", "other tap"
CAMERA_ORDER, OTHER_CODEC = "other camera order", "other codec"
OTHER_INSTRUCTION, UNEXPLAINED = "other instruction", "unexplained difference"
RAW_WEIGHTS = "raw weights for averaged ones"

_PACK_IMAGES = "pack again with the right --set source.image_orientation (geomcache pack check SOURCE finds it)"
_PACK_STATES = (
    "convert the states to end-effector position (3), axis-angle of the xyzw quaternion (3), finger positions (2), "
    "pack and train again"
)
_EXTRACT = "geomcache extract into a new folder, and train on that cache"
_STATISTICS = "train again, or take a checkpoint whose card.json geomcache train wrote on this data"
_PICTURE_FAULTS = (TURNED, MIRRORED, FLIPPED, BGR, SWAPPED_CAMERAS)
FIXES: dict[str, str] = {
    TURNED: _PACK_IMAGES,
    MIRRORED: _PACK_IMAGES + "; the community's rot180 is a mirror image of the truth",
    FLIPPED: _PACK_IMAGES,
    BGR: "convert the data set's images to RGB (OpenCV reads BGR), pack and train again",
    SWAPPED_CAMERAS: "name each camera's pictures: --set 'source.cameras=[agentview, robot0_eye_in_hand]' in order "
    "(HDF5), or --set source.cameras.agentview=KEY, one for each camera (LeRobot); pack and train again",
    RESIZE: "record or render the data at the size it is used at (geomcache demos --replay SOURCE), pack again",
    EXPOSURE: "undo the change of brightness or contrast in the data set, pack and train again",
    GRIPPER_SIGN: "the simulator opens on -1 and closes on +1: --set source.gripper_sign=... (LeRobot), or convert",
    GRIPPER_RANGE: "map 0..1 to -1 (open) .. +1 (close) in the data set, pack and train again",
    ABSOLUTE: "convert the actions to deltas (1 = 0.05 m, 0.5 rad), pack and train again",
    SHIFTED: "row t is the observation BEFORE action t; if the actions fit one row later, pack and train again with "
    "--set source.observation=before_action, one row earlier: after_action",
    CONTROL_RATE: "use data of 20 actions a second, one row for every control step of the simulator",
    SETTLING: "data and evaluation must begin after the same number of settling steps (eval: --set settle_steps=N)",
    OTHER_STATISTICS: _STATISTICS,
    QUATERNION: _PACK_STATES,
    ANTIPODAL: _PACK_STATES + "; the sign of the simulator's quaternion is kept as it is",
    STATE_OMITTED: _PACK_STATES,
    STATE_ORDER: _PACK_STATES,
    OTHER_WEIGHTS: _EXTRACT + ", or point --set encoder_config.weights at the weights of the cache",
    OTHER_TAP: _EXTRACT,
    CAMERA_ORDER: _EXTRACT,
    OTHER_CODEC: _EXTRACT,
    OTHER_INSTRUCTION: "give the task's name in words, as LIBERO's benchmark does; pack and train again",
    RAW_WEIGHTS: "the training log's figure is of the weights that do not act (policy.safetensors): report it",
    UNEXPLAINED: "look at the numbers and at the pictures of --out; pack show, cache show and cache diff help",
}

# What is compared with the simulator itself: a fault of the data and one of our own code look alike there.
_OF_EITHER_SIDE = ("actions", "frames", "states")
_REPORT = "; if the data are right, the live code differs: report it"
_BETTER_THAN_PLAIN = 0.25  # an explanation leaves at most this share of the difference ...
_BETTER_THAN_NEXT = 0.5  # ... and at most this share of what the next best leaves


class Finding(Schema):
    """One comparison."""

    check: Check
    passed: bool | None  # None: not possible
    compared: str  # what with what
    expected: str = ""
    found: str = ""
    fault: str | None = None  # of FIXES, or "<mode> statistics read as <mode>"
    fix: str = ""


def passed(check: Check, compared: str, found: str, expected: str = "") -> Finding:
    """The comparison holds; ``found`` says how closely."""
    return Finding(check=check, passed=True, compared=compared, expected=expected, found=found)


def failed(
    check: Check, compared: str, expected: str, found: str, fault: str | None, fix: str | None = None
) -> Finding:
    """It does not, and ``fault`` is why; None: nothing explains it. ``fix``: another than the fault's own."""
    fault = fault or UNEXPLAINED
    fix = fix or fix_of(check, fault)
    return Finding(check=check, passed=False, compared=compared, expected=expected, found=found, fault=fault, fix=fix)


def fix_of(check: Check, fault: str) -> str:
    """What mends a fault that a check found; pictures stored in other ways have names of their own."""
    own = _PACK_IMAGES if fault.startswith("stored ") else _STATISTICS
    if check == "tokens" and (fault in _PICTURE_FAULTS or fault.startswith("stored ")):
        return _EXTRACT + "; if the pictures of the pack are wrong too, pack first"
    return FIXES.get(fault, own) + (_REPORT if check in _OF_EITHER_SIDE and fault != UNEXPLAINED else "")


def impossible(check: Check, compared: str, why: str, fix: str) -> Finding:
    """It could not be compared; ``fix`` says what would make it possible."""
    return Finding(check=check, passed=None, compared=compared, found=why, fix=fix)


def explanation(errors: Mapping[str, float], plain: float) -> str | None:
    """The fault that explains a difference: clearly better than no fault and than every other one.

    Args:
        errors: fault -> the difference that is left when it is assumed, in the unit of ``plain``.
        plain: the difference as it is.
    """
    if not errors or plain <= 0.0:
        return None
    (best, error), *others = sorted(errors.items(), key=lambda item: item[1])
    next_best = min([plain, *(value for _, value in others)])
    return best if error <= _BETTER_THAN_PLAIN * plain and error <= _BETTER_THAN_NEXT * next_best else None


def statistics_read_as(trained: str, read: str) -> str:
    """Name of the fault that statistics of one mode are used as if they were of another."""
    return f"{trained} statistics read as {read}"
