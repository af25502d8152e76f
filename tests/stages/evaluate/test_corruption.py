"""Rulers: keyed draws, what exactly is changed and what never is, and where they are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.tokens import build_encoder
from geomcache.stages.evaluate.config import EvalConfig
from geomcache.stages.evaluate.corruption import (
    Corruption,
    Drawn,
    EpisodeKey,
    Given,
    draw,
    draw_orbit,
    encoder_frame,
    require_effect,
)
from geomcache.stages.evaluate.run import _episodes

CAMERAS = ("agentview", "robot0_eye_in_hand")
KEY: EpisodeKey = ("libero_object", 3, 4, 7)
TEXTS = ["pick the soup", "pick the milk", "pick the butter", "pick the milk"]


def drawn(corruption: Corruption, key: EpisodeKey = KEY, orbit: float = 0.0, states: int = 5) -> Drawn:
    return draw(key, orbit, corruption, cameras=CAMERAS, init_states=states, own="pick the milk", instructions=TEXTS)


def seen() -> Observation:
    random = np.random.default_rng(0)
    depth = random.uniform(0.5, 2.0, (1, 2, 28, 28)).astype(np.float32)
    images = random.integers(0, 256, (1, 2, 28, 28, 3), dtype=np.uint8)
    k = np.tile([[30.0, 0, 14], [0, 30.0, 14], [0, 0, 1]], (1, 2, 1, 1))
    return Observation(FrameBatch(images, depth, k, np.tile(np.eye(4), (1, 2, 1, 1))), np.zeros(8, np.float32), "own")


def given(corruption: Corruption, **parts: Any) -> Given:
    return Given(KEY, corruption, **{"drawn": drawn(corruption), **parts})


def test_orbits_fill_their_range_and_belong_to_the_episode() -> None:
    keys = [("libero_object", task, state, 7) for task in range(10) for state in range(50)]
    angles = np.array([draw_orbit(key, 10.0) for key in keys])
    assert np.abs(angles).max() <= 10.0
    counts, _ = np.histogram(angles, bins=5, range=(-10, 10))
    assert counts.min() > 70  # 100 expected, standard deviation 9
    assert len(set(angles)) == len(keys)
    assert [draw_orbit(key, 10.0) for key in reversed(keys)] == list(reversed(angles.tolist()))
    assert draw_orbit(keys[7], 20.0) == pytest.approx(2 * angles[7])  # a wider orbit: the same side, further
    assert draw_orbit(keys[7], 0.0) == 0.0
    assert draw_orbit((*keys[7][:3], 8), 10.0) != angles[7]


def test_every_episode_of_an_evaluation_is_drawn_by_its_own_key() -> None:
    config = EvalConfig(
        run=Path("r"), out=Path("o"), tasks=(0, 3), episodes=3, first_init_state=2, seeds=(7, 8), camera_orbit=10.0
    )
    found = _episodes(config, CAMERAS)
    assert sorted(found) == [("libero_object", task, state, seed) for task in (0, 3) for state in (2, 3, 4)
                             for seed in (7, 8)]  # fmt: skip
    for key, episode in found.items():
        assert (episode.suite, episode.task, episode.init_state, episode.seed) == key
        assert episode.drawn.camera_orbit == draw_orbit(key, 10.0)
    assert len({episode.drawn.camera_orbit for episode in found.values()}) == 12


def test_nobody_is_shuffled_onto_himself() -> None:
    corruption = Corruption(shuffle_geometry=True, shuffle_instructions=True)
    found = [drawn(corruption, ("libero_object", 3, state, seed)) for state in range(5) for seed in range(40)]
    others = {(number // 40, one.geometry_of) for number, one in enumerate(found)}
    assert others == {(mine, other) for mine in range(5) for other in range(5) if mine != other}
    assert {one.told for one in found} == {"pick the soup", "pick the butter"}  # two tasks share its own words
    with_orbit = drawn(corruption, orbit=10.0)
    assert with_orbit.geometry_of is not None
    assert with_orbit.geometry_orbit == draw_orbit(("libero_object", 3, with_orbit.geometry_of, 7), 10.0)
    assert drawn(Corruption()) == Drawn()


def test_no_other_to_take_is_refused() -> None:
    with pytest.raises(InputError, match="shuffle_geometry can change nothing"):
        drawn(Corruption(shuffle_geometry=True), ("libero_object", 3, 0, 7), states=1)
    with pytest.raises(InputError, match="another instruction"):
        draw(KEY, 0, Corruption(shuffle_instructions=True), cameras=(), init_states=5, own="x", instructions=["x", "x"])


def test_depth_is_scaled_by_one_factor_a_camera_and_only_for_the_encoder() -> None:
    """With a camera in the base frame's origin a point moves along its ray: every XYZ token is scaled alike."""
    corruption, observation = Corruption(depth_scale=0.05), seen()
    factors = drawn(corruption).depth_factors
    assert factors is not None
    assert factors[0] != factors[1]
    assert all(0.95 <= factor <= 1.05 for factor in factors)
    asked = given(corruption).observation(observation, 0)
    assert asked.frame is observation.frame
    assert encoder_frame(observation) is observation.frame
    contract = Contract(
        image_orientation="upright",
        cameras=tuple(CameraContract(name=name, height=28, width=28) for name in CAMERAS),
        has_depth=True,
    )
    encoder = build_encoder("oracle_pointmap", {"grid": [4, 4], "batch_size": 1}, contract)
    true, false = (encoder.encode(frame).numpy() for frame in (asked.frame, encoder_frame(asked)))
    np.testing.assert_allclose(false, true * np.array(factors)[:, None, None], rtol=1e-5)


def test_depth_noise_has_its_size_and_is_new_at_every_step() -> None:
    found = given(Corruption(depth_noise_m=0.01))
    observation = seen()
    first, again, later = (encoder_frame(found.observation(observation, step)).depth_BVHW for step in (0, 0, 8))
    np.testing.assert_array_equal(first, again)
    noise = first - observation.frame.depth_BVHW  # type: ignore[operator]
    assert abs(noise.mean()) < 0.001  # 1568 pixels: 4 standard errors
    assert noise.std() == pytest.approx(0.01, rel=0.1)
    assert abs(np.corrcoef(noise.ravel(), (later - observation.frame.depth_BVHW).ravel())[0, 1]) < 0.1  # type: ignore[operator]
    assert first.dtype == np.float32  # type: ignore[union-attr]
    loud = encoder_frame(given(Corruption(depth_noise_m=9.0)).observation(observation, 0)).depth_BVHW
    assert loud.min() > 0  # type: ignore[union-attr]


def test_only_the_turned_camera_is_told_wrong() -> None:
    observation, nominal = seen(), np.diag([1.0, -1.0, -1.0, 1.0])
    frame = encoder_frame(given(Corruption(nominal_extrinsics=True), nominal=(0, nominal)).observation(observation, 0))
    np.testing.assert_array_equal(frame.extrinsics_BV44[0], np.stack([nominal, np.eye(4)]))  # type: ignore[index]
    np.testing.assert_array_equal(observation.frame.extrinsics_BV44[0, 0], np.eye(4))  # type: ignore[index]
    assert frame.depth_BVHW is observation.frame.depth_BVHW


def test_shuffled_geometry_and_words_leave_images_and_state_alone() -> None:
    observation = seen()
    elsewhere = replace(observation.frame, images_BVHWC=255 - observation.frame.images_BVHWC)
    both = Corruption(shuffle_geometry=True, shuffle_instructions=True)
    asked = given(both, elsewhere=elsewhere).observation(observation, 16)
    assert encoder_frame(asked) is elsewhere
    assert asked.frame is observation.frame
    assert asked.state_S is observation.state_S
    assert asked.instruction in {"pick the soup", "pick the butter"}
    assert given(Corruption()).observation(observation, 0) is observation


@pytest.mark.parametrize(
    ("rulers", "orbit", "cameras", "needs", "said"),
    [
        ({}, 10.0, CAMERAS[1:], set(), "camera_orbit can change nothing"),
        ({"depth_scale": 0.1}, 0.0, CAMERAS, {"images"}, "an encoder that reads depth"),
        ({"depth_noise_m": 0.1}, 0.0, CAMERAS, set(), "no geometry tokens"),
        ({"shuffle_geometry": True}, 0.0, CAMERAS, set(), "no geometry tokens"),
        ({"nominal_extrinsics": True}, 10.0, CAMERAS, {"images", "depth"}, "an encoder that reads cameras"),
        ({"nominal_extrinsics": True}, 0.0, CAMERAS, {"depth", "cameras"}, "a turned camera"),
    ],
)
def test_a_ruler_that_could_change_nothing_is_refused(
    rulers: dict[str, Any], orbit: float, cameras: tuple[str, ...], needs: set[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        require_effect(Corruption(**rulers), orbit, cameras=cameras, turned=CAMERAS[0], needs=frozenset(needs))


def test_rulers_that_could_change_something_are_let_through() -> None:
    everything = Corruption(nominal_extrinsics=True, depth_scale=0.1, depth_noise_m=0.1, shuffle_instructions=True)
    require_effect(everything, 10.0, cameras=CAMERAS, turned=CAMERAS[0], needs=frozenset({"depth", "cameras"}))
    shuffled = Corruption(shuffle_geometry=True)
    require_effect(shuffled, 0.0, cameras=CAMERAS, turned=CAMERAS[0], needs=frozenset({"images"}))
    with pytest.raises(ValidationError, match="leave depth_scale out"):
        Corruption(shuffle_geometry=True, depth_scale=0.1)


def test_they_make_another_evaluation_and_are_named() -> None:
    plain = EvalConfig.model_validate({"run": "r", "out": "o"})
    changed = plain.model_copy(update={"camera_orbit": 10.0, "corruption": Corruption(depth_scale=0.05)})
    assert plain.describe_changes() == []
    assert changed.describe_changes() == ["camera orbit ±10°", "depth scaled by 1 ± 0.05"]
    assert plain.identity().describe_difference(changed.identity()) == [
        "camera_orbit: 0.0 != 10.0",
        "corruption.depth_scale: 0.0 != 0.05",
    ]
