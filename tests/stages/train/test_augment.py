import numpy as np
import pytest

from geomcache.stages.train.augment import Augmentation

KEY = {"seed": 3, "step": 5, "first": 0}


def images(batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (batch, 2, 12, 10, 3), dtype=np.uint8)


def test_without_settings_nothing_happens() -> None:
    seen = images()
    assert Augmentation().apply(seen, **KEY) is seen


def test_a_shift_cuts_a_window_out_of_the_padded_image() -> None:
    """Every view must be one of the (2 s + 1)^2 windows of the edge-padded image."""
    seen, s = images(), 2
    moved = Augmentation(shift=s).apply(seen, **KEY)
    padded = np.pad(seen, ((0, 0), (0, 0), (s, s), (s, s), (0, 0)), mode="edge")
    offsets = set()
    for sample in range(len(seen)):
        for view in range(2):
            found = [
                (y, x)
                for y in range(2 * s + 1)
                for x in range(2 * s + 1)
                if np.array_equal(padded[sample, view, y : y + 12, x : x + 10], moved[sample, view])
            ]
            assert len(found) == 1
            offsets.add(found[0])
    assert len(offsets) > 3  # views and samples are shifted differently


def test_brightness_is_one_factor_a_view() -> None:
    seen = images()
    changed = Augmentation(brightness=0.3).apply(seen, **KEY).astype(float)
    for sample in range(len(seen)):
        for view in range(2):
            dark = changed[sample, view] < 255
            factor = (changed[sample, view][dark].sum()) / seen[sample, view][dark].sum()
            assert 0.7 <= factor <= 1.3
            np.testing.assert_allclose(changed[sample, view][dark], factor * seen[sample, view][dark], atol=1.5)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    """So that ranks, accumulation parts and a continued run draw the same."""
    augmentation, seen = Augmentation(shift=3, brightness=0.2), images()
    whole = augmentation.apply(seen, **KEY)
    part = augmentation.apply(seen[2:], **KEY | {"first": 2})
    assert np.array_equal(whole[2:], part)
    assert not np.array_equal(whole, augmentation.apply(seen, **KEY | {"step": 6}))
    assert not np.array_equal(whole, augmentation.apply(seen, **KEY | {"seed": 4}))


@pytest.mark.parametrize("wrong", [{"shift": -1}, {"brightness": 1.0}])
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation.model_validate(wrong)
