import numpy as np
import pytest

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.train.normalise import NormalisationMode, Normaliser

STATES = np.array([[0.0, 5.0, 1.0], [4.0, 5.0, 3.0]])
ACTIONS = np.array([[0.0, -1.0, -1.0], [2.0, -1.0, 1.0], [4.0, -1.0, 1.0]])


def test_min_max_by_hand() -> None:
    fitted = Normaliser.fit(STATES, ACTIONS, "min_max")
    assert fitted.state.normalise(STATES).tolist() == [[-1, 0, -1], [1, 0, 1]]  # the constant is shifted to 0
    assert fitted.action.normalise(ACTIONS).tolist() == [[-1, 0, -1], [0, 0, 1], [1, 0, 1]]
    assert fitted.action.denormalise(np.array([0.5, 0.0, 0.25])).tolist() == [3, -1, 0.25]


def test_mean_std_by_hand() -> None:
    fitted = Normaliser.fit(STATES, ACTIONS, "mean_std")
    assert fitted.state.offset == (2, 5, 2)
    assert fitted.state.scale == (2, 1, 1)
    assert fitted.state.normalise(STATES).tolist() == [[-1, 0, -1], [1, 0, 1]]


def test_q99_by_hand() -> None:
    values = np.repeat(np.arange(101.0)[:, None], 2, axis=1)  # quantiles 1 and 99
    fitted = Normaliser.fit(values, values, "q99")
    assert fitted.state.normalise(np.array([[1.0, 99.0], [50.0, 100.0]])) == pytest.approx(
        np.array([[-1, 1], [0, 50 / 49]])
    )
    assert fitted.action.offset[1] == 0  # the gripper


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "q99"])
def test_round_trip_through_json(mode: NormalisationMode) -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(3, 2, (50, 8)), rng.uniform(-1, 1, (50, 7))
    fitted = Normaliser.fit(states, actions, mode)
    loaded = Normaliser.parse(fitted.model_dump_json(), "here", InputError)
    assert loaded == fitted
    restored = loaded.action.denormalise(fitted.action.normalise(actions))
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, actions, atol=1e-6)
    np.testing.assert_array_equal(fitted.action.normalise(actions)[:, -1], actions[:, -1].astype(np.float32))
    chunk = fitted.action.normalise(actions.reshape(5, 10, 7))
    np.testing.assert_array_equal(chunk.reshape(50, 7), fitted.action.normalise(actions))


@pytest.mark.parametrize("bad", [np.zeros((0, 7)), np.full((2, 7), np.nan), np.zeros(7)])
def test_bad_statistics_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="actions"):
        Normaliser.fit(STATES, bad)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(InputError, match="3 dimensions"):
        Normaliser.fit(STATES, ACTIONS).state.normalise(np.zeros(1))
