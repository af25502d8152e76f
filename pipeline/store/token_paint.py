"""Tokens -> colours: which channels of a tap mean what, and how each is painted, the same over a whole picture or film.

A tap is drawn as one panel for each thing it holds (``_PANELS``); a tap of which nothing is known, or of another width
than is known, as RGB of its first three principal components. Tokens that are not finite are grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline.store.statistics import even_rows

GREY = 0.6
_BASIS_TOKENS = 1024  # as many, evenly chosen, tell the main directions; more would only take longer
_RANGE = (0.02, 0.98)  # quantiles between which colours are spread; a few far values would leave the rest one colour


@dataclass(frozen=True)
class Panel:
    """One picture of a tap's tokens, from some of their channels."""

    name: str
    channels: slice
    # scalar: a colour map over the values found; share: the same over 0 to 1; direction: a vector of any length, its
    # x, y, z from -1 to 1 as red, green, blue; position: x, y, z as red, green, blue over the values found; pca: see
    # PrincipalColours.
    way: Literal["scalar", "share", "direction", "position", "pca"]
    unit: str = ""


# Widths and panels of the parts of a tap, whose name joins them by ".". Channels count from the part's first.
_PANELS: dict[str, tuple[int, tuple[Panel, ...]]] = {
    "xyz": (3, (Panel("height", slice(2, 3), "scalar", "m"),)),  # oracle_pointmap, and its other parts below
    "normals": (3, (Panel("normals", slice(0, 3), "direction"),)),
    "visibility": (1, (Panel("visibility", slice(0, 1), "share"),)),
    "confidence": (1, (Panel("confidence", slice(0, 1), "share"),)),
    "ray": (  # depth_anything3
        7,
        (
            Panel("ray direction", slice(0, 3), "direction"),
            Panel("ray origin", slice(3, 6), "position"),
            Panel("ray confidence", slice(6, 7), "scalar"),
        ),
    ),
    "depth": (  # depth_anything3
        2,
        (
            Panel("depth", slice(0, 1), "scalar", "encoder's unit"),
            Panel("depth confidence", slice(1, 2), "scalar"),
        ),
    ),
}


def panels_of(tap: str, dim: int) -> tuple[Panel, ...]:
    """What to draw of tokens, in the order of their channels."""
    panels, start = [], 0
    for part in tap.split("."):
        width, drawn = _PANELS.get(part, (dim + 1, ()))
        for panel in drawn:
            shifted = slice(start + panel.channels.start, start + panel.channels.stop)
            panels.append(Panel(panel.name, shifted, panel.way, panel.unit))
        start += width
    return tuple(panels) if start == dim else (Panel("PCA", slice(0, dim), "pca"),)


def holds_points(tap: str, dim: int) -> bool:
    """Whether channels 0 to 2 are metres in the robot base frame."""
    return panels_of(tap, dim)[0].name == "height"


@dataclass(frozen=True)
class PrincipalColours:
    """Tokens -> RGB: the first three principal components, each spread over its 2 % to 98 % quantiles."""

    mean_D: NDArray[np.float64]
    directions_D3: NDArray[np.float64]
    low_3: NDArray[np.float64]
    high_3: NDArray[np.float64]

    @classmethod
    def of(cls, tokens: NDArray[np.float32]) -> "PrincipalColours":
        """Made from all finite tokens [..., D] that will be drawn with it; fewer than three directions leave black."""
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        flat = flat[np.isfinite(flat).all(axis=-1)]
        if len(flat) == 0:
            flat = np.zeros((1, tokens.shape[-1]))
        mean = flat.mean(axis=0)
        chosen = flat[even_rows(len(flat), _BASIS_TOKENS)] - mean
        _, _, directions = np.linalg.svd(chosen, full_matrices=False)
        basis = np.zeros((tokens.shape[-1], 3))
        basis[:, : min(3, len(directions))] = directions[:3].T
        low, high = np.quantile((flat - mean) @ basis, _RANGE, axis=0)
        return cls(mean, basis, low, high)

    def __call__(self, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        """[..., D] -> [..., 3] in 0 to 1; grey where a token is not finite."""
        finite = np.isfinite(tokens).all(axis=-1, keepdims=True)
        scores = (np.where(finite, tokens, 0.0) - self.mean_D) @ self.directions_D3
        colours = np.clip((scores - self.low_3) / np.maximum(self.high_3 - self.low_3, 1e-12), 0.0, 1.0)
        return np.where(finite, colours, GREY)


class PanelPaint:
    """One panel's colours, told from all tokens that will be drawn (or an even sample of them)."""

    def __init__(self, panel: Panel, tokens: NDArray[np.float32]) -> None:
        """``tokens``: [..., D], all channels."""
        self.panel = panel
        values = tokens[..., panel.channels]
        self._pca = PrincipalColours.of(values) if panel.way == "pca" else None
        flat = values.reshape(-1, values.shape[-1])
        flat = flat[np.isfinite(flat).all(axis=-1)].astype(np.float64)
        known = len(flat) > 0 and panel.way in ("scalar", "position")
        self._low, self._high = np.quantile(flat, _RANGE, axis=0) if known else np.array([[0.0], [1.0]])

    def __call__(self, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        """[..., D] -> [..., 3] in 0 to 1; grey where a channel of the panel is not finite."""
        values = tokens[..., self.panel.channels]
        if self._pca is not None:
            return self._pca(values)
        finite = np.isfinite(values).all(axis=-1, keepdims=True)
        values = np.where(finite, values, 0.0).astype(np.float64)
        if self.panel.way == "direction":
            length = np.sqrt((values**2).sum(axis=-1, keepdims=True))
            colours = (values / np.maximum(length, 1e-12) + 1.0) / 2.0
        else:
            colours = np.clip((values - self._low) / np.maximum(self._high - self._low, 1e-12), 0.0, 1.0)
        if values.shape[-1] == 1:
            colours = np.asarray(_colour_map(self.panel)(colours[..., 0]))[..., :3]
        return np.where(finite, colours, GREY)

    @property
    def label(self) -> str:
        """Name, and the range of values between the two ends of the colours."""
        if self.panel.way not in ("scalar", "share"):
            return self.panel.name
        low, high = float(self._low[0]), float(self._high[0])
        digits = min(6, max(0, 2 - math.floor(math.log10(max(high - low, 1e-12)))))  # three of the span
        return f"{self.panel.name} {low:z.{digits}f} to {high:z.{digits}f} {self.panel.unit}".rstrip()

    @property
    def scale(self) -> Any:
        """For a colour bar; None where colours are no scale."""
        if self.panel.way not in ("scalar", "share"):
            return None
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        return ScalarMappable(Normalize(float(self._low[0]), float(self._high[0])), _colour_map(self.panel))


def paints_of(spec: TokenSpec, tokens: NDArray[np.float32]) -> Sequence[PanelPaint]:
    """A painter for each panel of the spec's tap."""
    return [PanelPaint(panel, tokens) for panel in panels_of(spec.tap, spec.dim)]


def _colour_map(panel: Panel) -> Any:
    from matplotlib import colormaps

    return colormaps["magma" if panel.way == "share" or panel.name.endswith("confidence") else "viridis"]
