"""Does a cache carry information? A linear probe from its tokens to the surface behind them, on held-out episodes.

Asked is: how well does a token x at place c of view v tell the point y behind it (XYZ in metres in the robot base
frame; ``oracle_pointmap``'s token at the same place), beyond what the place alone tells? The probe is

    y = m_vc + W_v (x - n_vc),    m_vc, n_vc: means of y and x at that place over the training episodes

that is, ridge regression with one free constant per place (Frisch, Waugh and Lovell: the same as subtracting the
means first). Measured against predicting m_vc, which is what a token that only knows its place can do:

    R^2 = 1 - sum |y - probe|^2 / sum |y - m_vc|^2    over tokens of held-out episodes

Episodes are dealt into at most 5 folds; each fold is predicted from the others, so no frame is judged by a probe that
saw its episode. The penalty is a fixed share of each channel's own variance (``RIDGE``), so nothing is tuned on what is
measured, and channels of any scale count alike. Linear probes: Alain and Bengio 2016 (arXiv 1610.01644); of what
visual models know of 3D: El Banani et al. 2024 (arXiv 2404.08636).

Non-obvious:
- R^2 > 0 does not say that the weights are good. Random networks are features too: probe the same encoder with random
  weights beside it. And compare only like with like: in a model that looks across places and views every token can
  tell the robot's pose, also with random weights.
- Where the hand is would be a poor target: group means of random features tell it with R^2 0.98 and more, as the scene
  stands still and only the robot moves.
- Episodes must resemble each other. With few of them, all different, R^2 is small and folds are far apart.
- Everything comes from sums over tokens, place and fold, so tokens are read once and memory does not grow with rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError
from geomcache.pipeline.encoding import encode_padded, one_thread
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.channel_stats import block_rows
from geomcache.pipeline.store.reader import CachedTokens, require_pack_of
from geomcache.pipeline.store.statistics import even_rows
from geomcache.pipeline.tokens import build_encoder

RIDGE = 0.01  # of a channel's variance
MOST_FOLDS = 5
MOST_PLACES = 256  # of a view, evenly spread: neighbours show the same surface
DEFAULT_ROWS = 512
STILL_MM = 0.1  # what moves less does not move
_ROUNDING = 1e-12  # of a channel's mean square: what float32 makes of a value that stays the same
_ROWS_AT_ONCE = 16  # frames are decoded beside the tokens
_XYZ = 3


class ViewProbe(Schema):
    """One view; errors are root mean squares of the distance in millimetres, over held-out episodes."""

    view: str  # camera name
    tokens: int  # judged
    mean_mm: float  # of predicting one mean point for all
    place_mm: float  # of predicting each place's own mean: the baseline
    probe_mm: float
    r2: float | None  # over the baseline: 0 tells nothing beyond the place, 1 everything; None: nothing moves


class ProbeResult(Schema):
    """What ``probe`` found."""

    cache_id: str
    what: str  # encoder, tap, grid and weights in words
    rows: int  # of the sample
    episodes: int
    folds: int
    grid: tuple[int, int]  # of the tokens
    places: int  # of each view that were looked at
    views: tuple[ViewProbe, ...]
    r2: float  # all views together, by their summed squares
    fold_r2: tuple[float | None, ...]  # the same of each fold of held-out episodes: how sure it is


@dataclass
class _Sums:
    """Of the values [x, y] of one view, N = D + 3 numbers, less ``shift_N``; F folds, P places."""

    shift_N: torch.Tensor  # near the mean: products of values far from 0 would drown in rounding
    count_FP: torch.Tensor
    sum_FPN: torch.Tensor
    product_FNN: torch.Tensor

    @classmethod
    def zero(cls, shift_N: torch.Tensor, folds: int, places: int) -> "_Sums":
        """No token yet."""
        shapes = ((folds, places), (folds, places, len(shift_N)), (folds, len(shift_N), len(shift_N)))
        return cls(shift_N, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, fold: int, values_BPN: torch.Tensor, there_BP: torch.Tensor) -> None:
        """Tokens of one fold, float32; those that are not there may hold anything."""
        values_BPN = torch.where(there_BP[..., None], values_BPN - self.shift_N, 0.0)
        self.count_FP[fold] += there_BP.sum(dim=0)
        self.sum_FPN[fold] += values_BPN.sum(dim=0)
        values_KN = values_BPN.flatten(0, 1)
        self.product_FNN[fold] += values_KN.T @ values_KN


def probe(
    cache: CachedTokens,
    pack: PackReader,
    *,
    rows: int = DEFAULT_ROWS,
    progress: Callable[[int, int], None],
) -> ProbeResult:
    """Measure what tokens tell of the surface behind them; see the module.

    Args:
        cache: complete, of full tokens.
        pack: the one it was made from, with depth.
        rows: at most so many, evenly spread over the pack.
        progress: told rows done and rows in all.

    Raises:
        CacheStale: the cache is of another pack.
        InputError: pooled tokens, which have no places; a pack without depth; fewer than 2 episodes among the rows;
            no finite token of a view to learn from.
        CacheDamaged, PackDamaged: what is read is not what was written.
    """
    _require_usable(cache, pack)
    spec = cache.spec
    sample = even_rows(len(pack), rows)
    episodes, episode_of_row = np.unique(pack.episode_of_row[sample], return_inverse=True)
    if len(episodes) < 2:
        raise InputError(
            "the probe is judged on episodes that it did not learn from",
            expected="rows of at least 2 episodes",
            found=f"{len(episodes)} among {len(sample)} sampled rows of {pack.path}",
            fix="probe a pack of more episodes, or more --rows",
        )
    folds = min(MOST_FOLDS, len(episodes))
    places = even_rows(spec.tokens_per_view, MOST_PLACES)
    with one_thread():  # the same figures on every run
        sums = _gather(cache, pack, sample, episode_of_row % folds, folds, places, progress)
        errors_VF3 = torch.stack([_held_out_errors(view, name) for view, name in zip(sums, spec.cameras, strict=True)])
    tokens_VF = torch.stack([view.count_FP.sum(dim=1) for view in sums])
    r2 = _r2(errors_VF3.sum(dim=(0, 1)), tokens_VF.sum())
    if r2 is None:
        raise InputError(
            "the surfaces never move, so there is nothing that tokens could tell beyond their place",
            expected="frames in which something moves",
            found=f"{len(sample)} rows whose points stay within {STILL_MM} mm",
            fix="probe a pack of demonstrations",
        )
    weights = cache.recipe.fingerprint.weights
    return ProbeResult(
        cache_id=cache.recipe.fingerprint.cache_id,
        what=f"{spec.encoder} {spec.tap}, {spec.grid[0]} x {spec.grid[1]} x {spec.dim}, codec {spec.codec}, "
        f"weights {weights[:8]} ({cache.recipe.encoder.license})",
        rows=len(sample),
        episodes=len(episodes),
        folds=folds,
        grid=spec.grid,
        places=len(places),
        views=tuple(
            _view_probe(name, of_view_F3.sum(dim=0), tokens_F.sum())
            for name, of_view_F3, tokens_F in zip(spec.cameras, errors_VF3, tokens_VF, strict=True)
        ),
        r2=r2,
        fold_r2=tuple(_r2(errors_VF3[:, fold].sum(dim=0), tokens_VF[:, fold].sum()) for fold in range(folds)),
    )


def _require_usable(cache: CachedTokens, pack: PackReader) -> None:
    require_pack_of(cache, pack)
    if cache.spec.pooled_to is not None:
        raise InputError(
            f"the probe needs tokens that have a place; {cache.location} holds means of groups",
            expected="a cache of full tokens",
            found=f"pooled to {cache.spec.pooled_to}",
            fix="probe the cache it was derived from, or extract without --pool",
        )
    if not pack.info.contract.has_depth:
        raise InputError(
            f"the probe asks for the surface behind tokens, and {pack.path} has no depth",
            expected="a pack with depth and camera matrices",
            found="images only",
            fix="official HDF5: `geomcache demos --replay SOURCE --out DIR` adds them; then pack and extract again",
        )


def _gather(
    cache: CachedTokens,
    pack: PackReader,
    sample: NDArray[np.int64],
    fold_of_row: NDArray[np.int64],
    folds: int,
    places: NDArray[np.int64],
    progress: Callable[[int, int], None],
) -> list[_Sums]:
    """Read the sampled rows once; the sums of every view."""
    spec = cache.spec
    points = build_encoder("oracle_pointmap", {"grid": spec.grid, "batch_size": 1}, pack.info.contract)
    sums: list[_Sums] = []
    step = min(_ROWS_AT_ONCE, block_rows(spec.row_shape))
    for start in range(0, len(sample), step):
        numbers = sample[start : start + step].tolist()
        x_BVPD = cache.tokens(numbers)[:, :, places]
        y_BVP3 = encode_padded(points, pack.frames(numbers))[:, :, places]
        values_BVPN, there_BVP = torch.cat([x_BVPD, y_BVP3], dim=-1), x_BVPD.isfinite().all(dim=-1)
        fold_B = torch.from_numpy(fold_of_row[start : start + step])
        for view in range(spec.views):
            if start == 0:
                some_KN = values_BVPN[:, view][there_BVP[:, view]]
                sums.append(_Sums.zero(some_KN.sum(dim=0) / max(1, len(some_KN)), folds, len(places)))
            for fold in fold_B.unique().tolist():
                sums[view].add(fold, values_BVPN[fold_B == fold, view], there_BVP[fold_B == fold, view])
        progress(min(start + step, len(sample)), len(sample))
    return sums


def _held_out_errors(sums: _Sums, view: str) -> torch.Tensor:
    """Summed squared errors [F, 3] of each fold, in square metres: one mean point, each place's mean, the probe."""
    x, y = slice(None, -_XYZ), slice(-_XYZ, None)
    count_P, sum_PN, product_NN = (each.sum(dim=0) for each in (sums.count_FP, sums.sum_FPN, sums.product_FNN))
    raw_D = (product_NN.diagonal() + count_P.sum() * sums.shift_N.square())[x]
    errors = []
    for held_P, held_PN, held_NN in zip(sums.count_FP, sums.sum_FPN, sums.product_FNN, strict=True):
        n_P, s_PN = count_P - held_P, sum_PN - held_PN  # of the episodes to learn from
        if n_P.sum() == 0:
            raise InputError(
                f"view {view} has no finite token to learn from",
                expected="finite tokens in at least two folds of episodes",
                found=f"{int(count_P.sum())} finite tokens, all in one fold",
                fix="geomcache cache stats CACHE says which rows are not finite",
            )
        mean_N = s_PN.sum(dim=0) / n_P.sum()
        # A place that was never seen is given the mean of all.
        mean_PN = torch.where(n_P[:, None] > 0, s_PN / n_P.clamp(min=1)[:, None], mean_N)
        known_NN = product_NN - held_NN - (n_P[:, None] * mean_PN).T @ mean_PN
        # A channel that never changes has no variance to take a share of.
        penalty_D = RIDGE * known_NN.diagonal()[x].clamp(min=0) + _ROUNDING * raw_D + 1e-30
        weights_D3 = torch.linalg.solve(known_NN[x, x] + penalty_D.diag(), known_NN[x, y])
        # What is left of held-out values when the places' means are taken away, in products.
        crossed_NN = held_PN.T @ mean_PN
        held_NN_left = held_NN - crossed_NN - crossed_NN.T + (held_P[:, None] * mean_PN).T @ mean_PN
        of_place = held_NN_left[y, y].trace()
        told = (weights_D3 * (2 * held_NN_left[x, y] - held_NN_left[x, x] @ weights_D3)).sum()
        spread = held_NN.diagonal() - 2 * mean_N * held_PN.sum(dim=0) + held_P.sum() * mean_N.square()
        errors.append(torch.stack([spread[y].sum(), of_place, of_place - told]))
    return torch.stack(errors)


def _view_probe(view: str, errors_3: torch.Tensor, tokens: torch.Tensor) -> ViewProbe:
    mean_mm, place_mm, probe_mm = (1000 * (errors_3 / tokens).clamp(min=0).sqrt()).tolist()
    return ViewProbe(
        view=view,
        tokens=int(tokens),
        mean_mm=mean_mm,
        place_mm=place_mm,
        probe_mm=probe_mm,
        r2=_r2(errors_3, tokens),
    )


def _r2(errors_3: torch.Tensor, tokens: torch.Tensor) -> float | None:
    """Over the baseline; None where that is right anyway."""
    _, of_place, of_probe = errors_3.tolist()
    return None if of_place <= float(tokens) * (STILL_MM / 1000) ** 2 else 1.0 - of_probe / of_place
