"""What was found out about how a data set stores one camera's images, by whatever means.

Each way of looking (orientation_by_replay.py, pipeline/orientation_track.py) gives an error for every orientation it
tried; the smallest wins, and counts only if the next one is clearly worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from geomcache.cache_schemas.contract import ImageOrientation
from geomcache.cache_schemas.errors import ContractMismatch, InputError

LEAST_RATIO = 1.5  # the runner-up's error over the best one's, from which on a finding is decided


@dataclass(frozen=True)
class OrientationFinding:
    """The orientation that explains one camera's images best."""

    camera: str
    best: ImageOrientation
    error: float  # lower is better; its unit depends on the way of looking
    runner_up: ImageOrientation
    runner_up_error: float
    decided: bool  # False: the two are too close to tell

    @property
    def ratio(self) -> float:
        """How many times worse the runner-up is; the confidence."""
        if self.error > 0.0:
            return self.runner_up_error / self.error
        return float("inf") if self.runner_up_error > 0.0 else 1.0

    def __str__(self) -> str:
        verdict = "" if self.decided else " (undecided)"
        return f"{self.camera}: {self.best} {self.error:.3g}, next {self.runner_up} {self.runner_up_error:.3g}{verdict}"


def decide(
    errors: Mapping[ImageOrientation, float], camera: str, *, largest_error: float = math.inf
) -> OrientationFinding:
    """Choose the orientation with the smallest error (at least two were tried); beyond ``largest_error`` none is."""
    assert len(errors) > 1, "nothing to compare with"
    (best, error), (runner_up, runner_up_error), *_ = sorted(errors.items(), key=lambda item: item[1])
    decided = error <= largest_error and 0.0 < runner_up_error >= LEAST_RATIO * error
    return OrientationFinding(camera, best, error, runner_up, runner_up_error, decided)


def agreed_orientation(findings: Sequence[OrientationFinding], *, where: str) -> ImageOrientation:
    """The orientation that every camera of the data set ``where`` has.

    Raises:
        InputError: a camera is undecided.
        ContractMismatch: cameras differ; an image-only multi-view model would see no consistent scene.
    """
    said = "; ".join(str(finding) for finding in findings)
    undecided = [finding.camera for finding in findings if not finding.decided]
    if undecided:
        raise InputError(
            f"{where}: the image orientation of {', '.join(undecided)} cannot be told",
            expected=f"the right orientation's error at least {LEAST_RATIO:g} times smaller than any other's",
            found=said,
            fix="look at a picture and say it: --set source.image_orientation=bottom_up",
        )
    if len({finding.best for finding in findings}) > 1:
        raise ContractMismatch(
            f"{where}: the cameras' images are stored in different orientations",
            expected="one orientation for all views",
            found=said,
            fix="pack the cameras that agree, e.g. --set source.cameras='[agentview]', or convert the data set again",
        )
    return findings[0].best
