"""LIBERO data sets in LeRobot's format (v2.0, v2.1, v3.0), pictures in parquet or MP4; LeRobot itself is not needed.

Non-obvious:
- Observations stand beside the action they were BEFORE (the data come from the "no-noops" RLDS): row t is row t.
- Pictures are the raw buffer turned by 180 degrees, a mirror image; they are turned upright here and nowhere else.
- The gripper is stored as -1 open / +1 close, or as 0 close / 1 open, and no card says which: the values do.
- ``fps`` of the card is 10, 20 or 30 for the same 20 Hz robot; it only tells where a video's frames lie.
- ``state`` of 8: dims 3-5 are axis-angle (cards say roll, pitch, yaw), dims 6-7 both fingers (cards say pad, gripper).
- ``next.done`` marks the end of an episode, not its success.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, CameraContract, Contract, ImageOrientation
from geomcache.cache_schemas.errors import InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_files, digest_json
from geomcache.pipeline.camera_geometry import axis_angle
from geomcache.pipeline.frames import EpisodeHead, EpisodeRows, FrameBatch
from geomcache.pipeline.official_layout import SuiteName, simulator_camera_name, suite_named_in
from geomcache.pipeline.orientation import to_upright
from geomcache.pipeline.sources import _lerobot_layout as layout
from geomcache.pipeline.sources import _lerobot_video as video
from geomcache.pipeline.sources._hub import location_of
from geomcache.pipeline.sources._lerobot_layout import EpisodeFiles, damaged
from geomcache.pipeline.sources._lerobot_rows import DataFiles, EpisodeTable

_VERSION = 1  # raised whenever the same files give other rows
_LARGEST_ACTION = 1.0 + 1e-6
_LARGEST_FINGER = 0.1  # m; a finger of the Panda moves 0.04
_QUATERNION_TOLERANCE = 1e-2

# The V axis, and what features showing these cameras are called after "observation.images.".
_CAMERAS = {
    "agentview": ("image", "agentview", "agentview_image", "agentview_rgb"),
    "robot0_eye_in_hand": ("image2", "wrist_image", "eye_in_hand", "eye_in_hand_rgb", "robot0_eye_in_hand_image"),
}
_STATE_KEYS = ("observation.state", "state")
_ACTION_KEYS = ("action", "actions")
_SUCCESS = {"next.success": "next.success in any row", "next.reward": "next.reward above 0 in any row"}

GripperSign = Literal["minus_open_plus_close", "minus_close_plus_open", "zero_close_one_open", "zero_open_one_close"]
# Stored gripper value -> the simulator's, -1 opens and +1 closes: (factor, offset)
_GRIPPER: dict[GripperSign, tuple[float, float]] = {
    "minus_open_plus_close": (1.0, 0.0),
    "minus_close_plus_open": (-1.0, 0.0),
    "zero_close_one_open": (-2.0, 1.0),
    "zero_open_one_close": (2.0, -1.0),
}
StateLayout = Literal["eef_pos3+eef_axisangle3+gripper_qpos2", "gripper_qpos2+eef_pos3+eef_quat4"]
_STATE_LAYOUTS: dict[int, StateLayout] = {
    8: "eef_pos3+eef_axisangle3+gripper_qpos2",
    9: "gripper_qpos2+eef_pos3+eef_quat4",  # robot_states of the official files, quaternion x y z w
}


class Config(Schema):
    """Where the data set is and what it follows; None: found in its features and values."""

    path: Path  # the folder that holds meta/, data/ and perhaps videos/
    cameras: dict[str, str] | None = None  # simulator camera -> feature; these are the views
    image_orientation: ImageOrientation = "rot180"
    state_key: str | None = None
    action_key: str | None = None
    state_layout: StateLayout | None = None
    gripper_sign: GripperSign | None = None
    suite: SuiteName | None = None  # None: named in the data set's name, else "unknown"

    @field_validator("cameras")
    @classmethod
    def _simulator_names(cls, cameras: dict[str, str] | None) -> dict[str, str] | None:
        for camera in cameras or {}:
            if simulator_camera_name(camera) != camera:
                raise ValueError(f"{camera} is a file's short name; say {simulator_camera_name(camera)}")
        if cameras is not None and (not cameras or len(set(cameras.values())) != len(cameras)):
            raise ValueError("at least one camera, no feature twice")
        return cameras


class Source:
    """Episodes of one LeRobot data set, in the order of their numbers."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._info = layout.read_info(config.path)
        self._cameras = self._find_cameras()
        self._state_key = self._find_key("state_key", config.state_key, _STATE_KEYS)
        self._action_key = self._find_key("action_key", config.action_key, _ACTION_KEYS)
        self._state_width, self._state_layout = self._find_state_layout()
        self._success_key = next((key for key in _SUCCESS if key in self._info.features), None)
        self._sizes = {key: self._size(key) for key in self._cameras.values()}
        self._tasks = layout.read_tasks(config.path, self._info)
        self._episodes = layout.read_episodes(config.path, self._info, self._keys("video"))
        if not self._episodes:
            raise InputError(f"{config.path} holds no episodes", expected="total_episodes above 0", found="0")
        self._numbers = list(self._episodes)
        success = () if self._success_key is None else (self._success_key,)
        self._data = DataFiles(config.path, (self._state_key, self._action_key, *success))

    @cached_property
    def contract(self) -> Contract:
        """Of the rows handed out; the gripper is in the simulator's sign."""
        cameras = []
        for camera, key in self._cameras.items():
            blank = to_upright(np.zeros((*self._sizes[key], 0)), self.config.image_orientation, row_axis=0)
            cameras.append(CameraContract(name=camera, height=blank.shape[0], width=blank.shape[1]))
        return Contract(image_orientation="upright", cameras=tuple(cameras), has_depth=False)

    @property
    def location(self) -> str:
        """The data set's name on the hub, or its folder's name."""
        return location_of(self.config.path)

    @property
    def details(self) -> Mapping[str, str]:
        """What the data set is, as data cards say it."""
        return {
            "format": f"LeRobot {self._info.codebase_version}",
            "images": self._image_format(),
            "image_orientation": self.config.image_orientation,
            **{f"camera {camera}": key for camera, key in self._cameras.items()},
            "state": f"{self._state_key}: {self._state_layout}",
            "gripper_sign": self._gripper_sign,
            "success": "not stated" if self._success_key is None else _SUCCESS[self._success_key],
            "card_fps": f"{self._info.fps:g}",
        }

    @cached_property
    def revision(self) -> str:
        """Digest over every file that is read and over how they are read; a missing file counts as missing."""
        root = self.config.path
        files = set(layout.meta_files(root, self._info))
        for entry in self._episodes.values():
            if isinstance(entry, EpisodeFiles):
                files |= {entry.data, *(span.path for span in entry.videos.values())}
        if self._keys("image"):  # pictures that stand beside the parquet files
            files |= {path for suffix in ("png", "jpg", "jpeg") for path in root.rglob(f"*.{suffix}")}
        there = sorted(path for path in files if path.is_file())
        named = {path.relative_to(root).as_posix(): "none" for path in files} | {
            path.relative_to(root).as_posix(): digest for path, digest in zip(there, digest_files(there), strict=True)
        }
        how = [
            list(self._cameras.items()),
            self.config.image_orientation,
            [self._state_key, self._state_layout],
            [self._action_key, self._gripper_sign],
            self._suite,
        ]
        return digest_json([_VERSION, sorted(named.items()), how])

    @property
    def episode_count(self) -> int:
        """Every episode that ``meta`` names, damaged and missing ones included."""
        return len(self._numbers)

    def where(self, episode: int) -> str:
        """File and episode as a person finds them."""
        number = self._numbers[episode]
        entry = self._episodes[number]
        if isinstance(entry, SourceDamaged):
            return f"episode {number}"
        return f"{entry.data.relative_to(self.config.path).as_posix()}: episode {number}"

    def head(self, episode: int) -> EpisodeHead:
        """Everything of one episode but its pictures, checked.

        Raises:
            SourceDamaged: a file is missing or cannot be read, rows are missing, numbers cannot be.
            InputError: the declared gripper sign is not that of the data set.
        """
        rows = self._rows(episode)
        instruction = self._instruction(rows)
        actions_TA = self._actions(rows)
        self._states(rows)  # only checked
        files = rows.files
        for key, span in files.videos.items():
            if not span.path.is_file():
                raise damaged(span.path, files.number, key, expected="an MP4 file", found="no such file")
            if span.to_s is not None and (span.to_s - span.from_s) * self._info.fps < len(rows) - 0.5:
                found = (
                    f"{(span.to_s - span.from_s) * self._info.fps:.2f} frames, from {span.from_s:g} to {span.to_s:g} s"
                )
                raise damaged(span.path, files.number, key, expected=f"{len(rows)} frames", found=found)
        return EpisodeHead(
            where=self.where(episode),
            suite=self._suite,
            task=instruction.replace(" ", "_"),
            number=files.number,
            instruction=instruction,
            actions_TA=actions_TA,
            succeeded=None if self._success_key is None else bool((rows.scalars(self._success_key) > 0).any()),
        )

    def read(self, episode: int, start: int, stop: int) -> EpisodeRows:
        """Rows ``start`` to ``stop`` - 1 of one episode; only these pictures are decoded.

        Raises:
            SourceDamaged: a picture or a row cannot be read, or is of another size than ``info.json`` says.
        """
        rows = self._rows(episode)
        assert 0 <= start <= stop <= len(rows)
        in_parquet = {key: self._sizes[key] for key in self._keys("image")}
        stored = self._data.images(rows, in_parquet, start, stop)
        for key, span in rows.files.videos.items():
            stored[key] = video.decode(
                span, rows.files.number, key, fps=self._info.fps, size=self._sizes[key], start=start, stop=stop
            )
        views = [to_upright(stored[key], self.config.image_orientation, row_axis=1) for key in self._cameras.values()]
        return EpisodeRows(FrameBatch(np.stack(views, axis=1)), self._states(rows)[start:stop])

    @property
    def _suite(self) -> str:
        return self.config.suite or suite_named_in(self.location)

    @cached_property
    def _gripper_sign(self) -> GripperSign:
        """How the data set stores the gripper, from its values: any negative one decides, files are read until then."""
        paths = {entry.data: None for entry in self._episodes.values() if isinstance(entry, EpisodeFiles)}
        lowest, readable = 1.0, False
        for path in paths:
            found = self._data.lowest(path, self._action_key, ACTION_DIM - 1, ACTION_DIM)
            lowest, readable = min(lowest, 1.0 if found is None else found), readable or found is not None
            if lowest < 0.0:
                break
        declared = self.config.gripper_sign
        if not readable:  # then every head says what is wrong with its file, and no sign matters
            return declared or "minus_open_plus_close"
        if lowest == 1.0 and declared is not None:  # every value is 1, which all conventions have
            return declared
        # The range tells minus from zero; which end opens is the community's unless it is declared.
        sign: GripperSign = "minus_open_plus_close" if lowest < 0.0 else "zero_close_one_open"
        if lowest == 1.0 or (declared is not None and declared.split("_")[0] != sign.split("_")[0]):
            raise InputError(
                f"{self.location}: the gripper in {self._action_key} is not {declared or 'told by its values'}",
                expected="values from 0 to 1" if (declared or "").startswith("zero") else "negative values",
                found=f"a value of {lowest:g}" if lowest < 0.0 else f"no value below {lowest:g}",
                fix=f"--set source.gripper_sign={sign}" + (" (or minus_open_plus_close)" if lowest == 1.0 else ""),
            )
        return declared or sign

    def _rows(self, episode: int) -> EpisodeTable:
        entry = self._episodes[self._numbers[episode]]
        if isinstance(entry, SourceDamaged):
            raise entry
        return self._data.episode(entry, self._keys("image"))

    def _instruction(self, rows: EpisodeTable) -> str:
        tasks = np.unique(rows.scalars("task_index"))
        if len(tasks) != 1 or int(tasks[0]) not in self._tasks:
            found = ", ".join(str(task) for task in tasks[:4])
            expected = "one task for the whole episode, named in meta/tasks"
            raise damaged(rows.files.data, rows.files.number, "task_index", expected=expected, found=found)
        return self._tasks[int(tasks[0])]

    def _actions(self, rows: EpisodeTable) -> NDArray[np.float32]:
        """[T, 7] in the simulator's convention."""
        stored_TA = rows.vectors(self._action_key, ACTION_DIM)
        wrong = np.argwhere(np.abs(stored_TA) > _LARGEST_ACTION)
        if len(wrong):
            row, dim = wrong[0]
            found = f"{stored_TA[row, dim]:g} at row {row}, number {dim}"
            raise damaged(rows.files.data, rows.files.number, self._action_key, expected="-1 to 1", found=found)
        actions_TA = stored_TA.astype(np.float32)
        factor, offset = _GRIPPER[self._gripper_sign]
        actions_TA[:, -1] = factor * actions_TA[:, -1] + offset
        return actions_TA

    def _states(self, rows: EpisodeTable) -> NDArray[np.float32]:
        """[T, 8] in the contract's layout."""
        stored_TS = rows.vectors(self._state_key, self._state_width)
        quaternions = self._state_layout == "gripper_qpos2+eef_pos3+eef_quat4"
        fingers = stored_TS[:, :2] if quaternions else stored_TS[:, 6:]
        expected, found = "", ""
        if np.abs(fingers).max() > _LARGEST_FINGER:
            expected, found = f"finger positions within {_LARGEST_FINGER} m", f"{np.abs(fingers).max():g}"
        elif quaternions and np.abs(np.linalg.norm(stored_TS[:, 5:], axis=1) - 1.0).max() > _QUATERNION_TOLERANCE:
            expected, found = "unit quaternions", f"{stored_TS[0, 5:].tolist()} in row 0"
        if expected:
            field = f"{self._state_key} as {self._state_layout}"
            raise damaged(rows.files.data, rows.files.number, field, expected=expected, found=found)
        if quaternions:
            turns = np.stack([axis_angle(quaternion) for quaternion in stored_TS[:, 5:].astype(np.float64)])
            stored_TS = np.concatenate([stored_TS[:, 2:5], turns, fingers], axis=1)
        return stored_TS.astype(np.float32)

    def _keys(self, dtype: str) -> tuple[str, ...]:
        """Features of the views that are stored as ``dtype``."""
        return tuple(key for key in self._cameras.values() if self._info.features[key].dtype == dtype)

    def _image_format(self) -> str:
        """How the pictures are stored, from the first episode that can be opened."""
        for index in range(self.episode_count):
            try:
                rows = self._rows(index)
                spans = rows.files.videos
                found = [
                    video.describe(spans[key], rows.files.number, key)
                    if key in spans
                    else self._data.describe(rows, key)
                    for key in self._cameras.values()
                ]
            except SourceDamaged:
                continue  # told by episode when it is read
            return "; ".join(dict.fromkeys(found))
        return "no episode can be read"

    def _find_cameras(self) -> dict[str, str]:
        """Simulator camera -> feature key, in the order of the V axis."""
        there = {key: feature for key, feature in self._info.features.items() if feature.is_camera}
        if self.config.cameras is not None:
            order = [*_CAMERAS, *sorted(set(self.config.cameras) - set(_CAMERAS))]
            cameras = {camera: self.config.cameras[camera] for camera in order if camera in self.config.cameras}
            missing = next((key for key in cameras.values() if key not in there), None)
            if missing is None:
                return cameras
            raise self._no_cameras(f"there is no image feature {missing}", list(there))
        named = {
            camera: [key for key in there if key.removeprefix("observation.images.") in names]
            for camera, names in _CAMERAS.items()
        }
        unclear = next((camera for camera, keys in named.items() if len(keys) != 1), None)
        if unclear is not None:
            raise self._no_cameras(f"which image feature shows {unclear} is not clear", list(there))
        return {camera: keys[0] for camera, keys in named.items()}

    def _no_cameras(self, what: str, there: list[str]) -> InputError:
        # No guess: a copied line with both cameras swapped would go unnoticed.
        return InputError(
            f"{self.location}: {what}",
            expected="a feature for each camera",
            found=", ".join(there) or "no image features",
            fix=" ".join(f"--set source.cameras.{camera}=KEY" for camera in _CAMERAS)
            + "  (KEY: one of these; one camera alone is one view)",
        )

    def _find_key(self, setting: str, declared: str | None, known: tuple[str, ...]) -> str:
        for key in known if declared is None else (declared,):
            if key in self._info.features:
                return key
        raise InputError(
            f"{self.location}: there is no feature {declared or ' or '.join(known)}",
            expected="the name of a feature",
            found=", ".join(key for key, feature in self._info.features.items() if not feature.is_camera),
            fix=f"--set source.{setting}=KEY",
        )

    def _find_state_layout(self) -> tuple[int, StateLayout]:
        shapes = {key: self._info.features[key].shape for key in (self._action_key, self._state_key)}
        if shapes[self._action_key] != (ACTION_DIM,):
            raise self._wrong_shape(self._action_key, f"{ACTION_DIM} numbers: pose deltas and gripper")
        found = _STATE_LAYOUTS.get(shapes[self._state_key][0]) if len(shapes[self._state_key]) == 1 else None
        if found is None or self.config.state_layout not in (None, found):
            known = " or ".join(f"{width}: {name}" for width, name in _STATE_LAYOUTS.items())
            raise self._wrong_shape(self._state_key, self.config.state_layout or known)
        return shapes[self._state_key][0], found

    def _wrong_shape(self, key: str, expected: str) -> InputError:
        setting = "action_key" if key == self._action_key else "state_key"
        return InputError(
            f"{self.location}: feature {key} is of another shape",
            expected=expected,
            found=f"shape {list(self._info.features[key].shape)}",
            fix=f"name another feature: --set source.{setting}=KEY",
        )

    def _size(self, key: str) -> tuple[int, int]:
        feature = self._info.features[key]
        if feature.size is None or feature.is_depth:
            kind = "a depth map" if feature.is_depth else f"shape {list(feature.shape)}"
            raise InputError(
                f"{self.location}: feature {key} is no colour camera",
                expected="shape [height, width, 3]",
                found=kind,
                fix="name another feature: --set source.cameras.agentview=KEY",
            )
        return feature.size
