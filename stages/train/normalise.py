"""State and action normalisation: one object, fitted once, saved with the checkpoint."""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError

NormalisationMode = Literal["mean_std", "min_max", "q99"]
GripperRule = Literal["binarise", "leave"]
CONSTANT_SPREAD = 1e-6  # a dimension that varies less than this (m, rad or action units) counts as constant


class AffineStatistics(Schema):
    """normalised = (value - offset) / scale, per dimension; scale is never 0."""

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """[..., n] -> float32 [..., n]."""
        self._check(values)
        return ((np.asarray(values, np.float64) - self.offset) / self.scale).astype(np.float32)

    def denormalise(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The inverse, [..., n] -> float32 [..., n]."""
        self._check(values)
        return (np.asarray(values, np.float64) * self.scale + self.offset).astype(np.float32)

    def _check(self, values: NDArray[Any]) -> None:
        if values.shape[-1:] != (len(self.offset),):
            raise InputError(
                "values do not fit the normalisation statistics",
                expected=f"{len(self.offset)} dimensions",
                found=f"shape {values.shape}",
                fix="use the statistics that were fitted on this data",
            )


class Normaliser(Schema):
    """Statistics of the states and actions of the training rows.

    ``mean_std``: zero mean, unit standard deviation. ``min_max``: [min, max] -> [-1, 1]. ``q99``: the 1 %
    and 99 % quantiles -> [-1, 1]; nothing is clipped, so the inverse is exact. Constant dimensions are only
    shifted to 0. The gripper, the last action dimension, has no statistics: ``binarise`` makes it -1 (not above 0)
    or 1 both ways, ``leave`` passes it on as it is.
    """

    mode: NormalisationMode
    gripper: GripperRule = "binarise"
    state: AffineStatistics
    action: AffineStatistics

    @classmethod
    def fit(
        cls,
        states_NP: NDArray[Any],
        actions_NA: NDArray[Any],
        mode: NormalisationMode = "min_max",
        gripper: GripperRule = "binarise",
    ) -> Self:
        """Statistics of N rows; states and actions may differ in N.

        Raises:
            InputError: no rows, not two-dimensional, or a value that is not finite.
        """
        action = _fit(actions_NA, mode, "actions")
        offset, scale = (*action.offset[:-1], 0.0), (*action.scale[:-1], 1.0)
        return cls(
            mode=mode,
            gripper=gripper,
            state=_fit(states_NP, mode, "states"),
            action=AffineStatistics(offset=offset, scale=scale),
        )

    def normalise_actions(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """Environment units -> the policy's, [..., 7]."""
        return self._grip(self.action.normalise(actions))

    def denormalise_actions(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """What the policy samples -> what the environment takes, [..., 7]."""
        return self._grip(self.action.denormalise(actions))

    def _grip(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.gripper == "binarise":
            actions[..., -1] = np.where(actions[..., -1] > 0, 1.0, -1.0)
        return actions


def _fit(values: NDArray[Any], mode: NormalisationMode, what: str) -> AffineStatistics:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or len(rows) == 0 or not np.isfinite(rows).all():
        raise InputError(
            f"normalisation statistics cannot be made from these {what}",
            expected="finite values of shape [rows, dimensions], at least one row",
            found=f"shape {rows.shape}, {int(np.size(rows) - np.isfinite(rows).sum())} values not finite",
            fix="build the pack again from whole files",
        )
    if mode == "mean_std":
        offset, scale = rows.mean(axis=0), rows.std(axis=0)
    else:
        low, high = np.quantile(rows, (0.0, 1.0) if mode == "min_max" else (0.01, 0.99), axis=0)
        offset, scale = (low + high) / 2, (high - low) / 2
    scale = np.where(scale < CONSTANT_SPREAD, 1.0, scale)
    return AffineStatistics(offset=tuple(offset.tolist()), scale=tuple(scale.tolist()))
