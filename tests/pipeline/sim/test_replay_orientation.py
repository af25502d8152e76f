"""Deciding on an orientation from errors, and the errors of images; no simulator."""

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import ContractMismatch, InputError
from geomcache.pipeline.orientation import ORIENTATIONS
from geomcache.pipeline.sim.orientation_by_replay import ErrorSums
from geomcache.pipeline.sim.orientation_finding import OrientationFinding, agreed_orientation, decide


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth random picture without any symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=0).repeat(4, axis=1)


def errors_of(stored: NDArray[np.uint8], upright: NDArray[np.uint8]) -> dict[ImageOrientation, float]:
    sums = ErrorSums()
    sums.add(stored, np.flipud(upright))
    return sums.means()


def test_every_way_of_storing_is_told_from_the_seven_others() -> None:
    upright = picture(32, 32)
    stored = {
        "upright": upright,
        "bottom_up": np.flipud(upright),
        "rot180": np.fliplr(upright),
        "upside_down": np.rot90(upright, 2),
        "transposed": upright.swapaxes(0, 1),
        "rot90_left": np.rot90(upright),
        "rot90_right": np.rot90(upright, -1),
        "antitransposed": np.rot90(upright, 2).swapaxes(0, 1),
    }
    assert set(stored) == set(ORIENTATIONS)
    for orientation, image in stored.items():
        finding = decide(errors_of(image, upright), "agentview")
        assert (finding.best, finding.error, finding.decided) == (orientation, 0.0, True)
        assert finding.runner_up_error > 20.0


def test_errors_are_mean_grey_levels_over_all_frames() -> None:
    black, sums = np.zeros((8, 8, 3), dtype=np.uint8), ErrorSums()
    sums.add(black + np.uint8(250), black)  # a difference beyond int8
    sums.add(black, black)
    assert set(sums.means().values()) == {125.0}


def test_an_oblong_image_is_not_tried_with_quarter_turns() -> None:
    upright = picture(16, 32)
    errors = errors_of(np.flipud(upright), upright)
    assert set(errors) == {"upright", "bottom_up", "rot180", "upside_down"}
    assert decide(errors, "agentview").best == "bottom_up"


def test_images_of_another_size_are_compared_at_the_smaller_one() -> None:
    upright = picture(64, 64)
    small = upright[::2, ::2]  # exact, as the picture consists of blocks
    assert errors_of(np.fliplr(small), upright)["rot180"] == 0.0
    assert errors_of(np.fliplr(upright), small)["rot180"] == 0.0


@pytest.mark.parametrize(("best", "next_", "decided"), [(1.0, 1.49, False), (1.0, 1.5, True), (0.0, 0.0, False)])
def test_a_narrow_lead_is_no_decision(best: float, next_: float, decided: bool) -> None:
    finding = decide({"upright": 9.0, "rot180": next_, "bottom_up": best}, "agentview")
    assert (finding.runner_up_error, finding.decided) == (next_, decided)
    assert finding.ratio == pytest.approx(next_ / best if best else 1.0)


def found(camera: str, best: ImageOrientation, *, decided: bool = True) -> OrientationFinding:
    return OrientationFinding(camera, best, 1.0, "upside_down", 9.0, decided)


def test_all_cameras_must_agree_and_be_decided() -> None:
    one, same, other = found("agentview", "bottom_up"), found("wrist", "bottom_up"), found("wrist", "rot180")
    assert agreed_orientation([one, same], where="x") == "bottom_up"
    with pytest.raises(ContractMismatch, match=r"agentview: bottom_up .*wrist: rot180"):
        agreed_orientation([one, other], where="x")
    with pytest.raises(InputError, match="orientation of wrist cannot be told"):
        agreed_orientation([one, found("wrist", "bottom_up", decided=False)], where="x")
