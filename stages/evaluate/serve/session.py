"""One client of the policy server: what it is told, how its observations become ours, whose turn it is.

The client is the LIBERO benchmark of vla-eval (``vla_eval/benchmarks/libero`` in package ``vla-eval`` 0.8.0). It asks
at every control step and is given one action; the policy is asked when the last chunk is used up.

Non-obvious:
- Its images are the simulator's raw buffer turned by 180 degrees, which mirrors the world: "rot180" in a ``Contract``.
  They are turned true upright here and nowhere else.
- It sends the wrist image and the state only when the server's hello asks for them (``observation_params`` are handed
  to the benchmark's constructor; its own configuration wins, which a client does not tell).
- By default it turns a quaternion with negative w round before it makes an axis-angle of it. LIBERO's data, and so our
  ``state_layout``, do not: ``quat_no_antipodal`` asks for that. At the grasp pose (an angle of about pi) it matters.
- It makes 1 of every gripper command that is not negative, and -1 of the others; 1 closes.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import geomcache
from geomcache.cache_schemas.contract import ACTION_DIM, STATE_DIM, Contract, ImageOrientation
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.orientation import to_upright
from geomcache.stages.evaluate.live_policy import noise_seed
from geomcache.stages.evaluate.serve.protocol import PROTOCOL_VERSION, Message, pack, read_array, read_image

CLIENT_CAMERAS = {"agentview": "agentview", "robot0_eye_in_hand": "wrist"}  # ours -> the client's
CLIENT_ORIENTATION: ImageOrientation = "rot180"
_MOST_INSTRUCTION = 512  # characters; LIBERO's longest has 105

Ask = Callable[[Observation, int], Awaitable[NDArray[np.float32]]]  # (observation, noise seed) -> [T, 7]


def require_known_cameras(contract: Contract) -> None:
    """``InputError`` when a camera of the checkpoint is none that the client can send."""
    unknown = [name for name in contract.camera_names if name not in CLIENT_CAMERAS]
    if unknown:
        raise InputError(
            "the protocol does not carry every camera of this checkpoint",
            expected=f"cameras among {', '.join(CLIENT_CAMERAS)}",
            found=", ".join(unknown),
            fix="geomcache eval runs this policy",
        )


def hello_payload(contract: Contract) -> dict[str, Any]:
    """What the client is told: which observations to send, and what the actions mean."""
    image = {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}
    return {
        "harness_version": f"geomcache {geomcache.__version__}",
        "protocol_version": PROTOCOL_VERSION,
        "model_server": "geomcache",
        "capabilities": {},
        "observation_params": {
            "send_wrist_image": "robot0_eye_in_hand" in contract.camera_names,
            "send_state": True,
            "quat_no_antipodal": True,
        },
        "action_spec": {
            "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]},
            "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle", "range": [-1, 1]},
            "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1, 1]},
        },
        "observation_spec": {
            **{CLIENT_CAMERAS[name]: image for name in contract.camera_names},
            "state": {"name": "state", "dims": STATE_DIM, "format": "eef_pos3_axisangle3_gripper2"},
            "language": {"name": "language", "dims": 0, "format": "language"},
        },
    }


def read_observation(payload: dict[str, Any], contract: Contract) -> Observation:
    """The client's observation in our conventions: images upright and in the contract's order.

    Raises:
        InputError: something is missing, of another shape, or not finite.
    """
    images = payload.get("images")
    if not isinstance(images, dict):
        raise InputError("the observation has no images", expected="a map of pictures by camera", fix=_FIX)
    views = []
    for camera in contract.cameras:
        name = CLIENT_CAMERAS[camera.name]
        if name not in images:
            raise InputError(
                f"the observation lacks the image {name}",
                expected=", ".join(CLIENT_CAMERAS[each] for each in contract.camera_names),
                found=", ".join(sorted(map(repr, images))[:8]),
                fix=_FIX,
            )
        image_HWC = read_image(images[name], f"image {name}", camera.height, camera.width)
        views.append(to_upright(image_HWC, CLIENT_ORIENTATION, row_axis=0))
    if "states" not in payload:
        raise InputError(
            "the observation lacks the robot's state", expected=f"states: {contract.state_layout}", fix=_FIX
        )
    state = read_array(payload["states"], "states", (STATE_DIM,), ("<f4", "<f8"))
    with np.errstate(over="ignore"):  # to inf, which is refused
        state_S = state.astype(np.float32)
    if not np.isfinite(state_S).all():
        raise InputError("the robot's state is not finite", expected=contract.state_layout, found=str(state_S))
    instruction = payload.get("task_description")
    if not isinstance(instruction, str) or not 0 < len(instruction) <= _MOST_INSTRUCTION:
        raise InputError(
            "the observation lacks the instruction",
            expected=f"task_description: text of at most {_MOST_INSTRUCTION} characters",
            found=repr(instruction)[:120],
            fix=_FIX,
        )
    return Observation(FrameBatch(np.stack(views)[None]), state_S, instruction)


_FIX = "vla-eval: leave send_wrist_image, send_state and quat_no_antipodal out of the benchmark's params"


class Session:
    """Turns of one client.

    Args:
        contract: the checkpoint's.
        ask: asks the policy.
        execute_steps: actions of a chunk that are executed before the policy is asked again.
        seed: of the policy's noise.
    """

    def __init__(self, contract: Contract, ask: Ask, *, execute_steps: int, seed: int) -> None:
        self._contract, self._ask = contract, ask
        self._execute_steps, self._seed = execute_steps, seed
        self._episode: str | None = None  # key of the noise; None: none has begun
        self._query = 0  # of this episode
        self._actions: deque[NDArray[np.float32]] = deque()
        self.client = "unknown"  # as it calls itself
        self.episodes, self.observations, self.queries = 0, 0, 0

    async def answer(self, message: Message) -> bytes | None:
        """The reply to a message, if it has one.

        Raises:
            InputError: the message cannot be answered; the client is told why and closed.
        """
        match message.type:
            case "hello":
                return self._greet(message)
            case "episode_start":
                self._begin(message.payload)
            case "episode_end":
                self._episode = None
            case "observation":
                return pack("action", {"actions": await self._act(message.payload)}, message.seq)
            case "action" | "error":
                raise InputError(f"the server is not sent messages of type {message.type}")
        return None

    def _greet(self, message: Message) -> bytes:
        version = message.payload.get("protocol_version")
        if version != PROTOCOL_VERSION:
            raise InputError(
                "the client speaks another version of the protocol",
                expected=str(PROTOCOL_VERSION),
                found=repr(version)[:40],
                fix="pip install 'vla-eval>=0.8'",
            )
        self.client = repr(message.payload.get("harness_version"))[:40]
        return pack("hello", hello_payload(self._contract), message.seq)

    def _begin(self, payload: dict[str, Any]) -> None:
        """The noise is keyed as ``geomcache eval`` keys it, where the client says which episode it plays."""
        task = payload.get("task")
        if task is not None and not isinstance(task, dict):
            raise InputError(
                "episode_start cannot be read",
                expected="a map as task (with suite, task_id and episode_idx, or without)",
                found=type(task).__name__,
            )
        parts = [task.get(name) if isinstance(task, dict) else None for name in ("suite", "task_id", "episode_idx")]
        known = all(isinstance(part, str | int) for part in parts)
        self._episode = "/".join(map(str, parts)) if known else f"{self.episodes}"
        self._query = 0
        self._actions.clear()
        self.episodes += 1

    async def _act(self, payload: dict[str, Any]) -> NDArray[np.float32]:
        if self._episode is None:
            raise InputError(
                "an observation came before an episode",
                expected="episode_start first; after a lost connection the episode cannot go on",
                fix="run the episode again",
            )
        self.observations += 1
        if not self._actions:
            observation = await asyncio.to_thread(read_observation, payload, self._contract)
            chunk_TA = await self._ask(observation, noise_seed(self._seed, self._episode, self._query))
            self._query += 1
            self.queries += 1
            self._actions.extend(chunk_TA[: self._execute_steps])
        action_A = self._actions.popleft()
        assert action_A.shape == (ACTION_DIM,)
        return action_A
