"""Tokens: cached rows against live tokens of the same stored frames, and what else they may have been made by.

On a CPU both are equal bit for bit, so an explanation either leaves nothing or is none. What explains nothing and is
more than rounding, is other weights: no other weights are there to be tried.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch

from geomcache.cache_schemas.errors import GeomcacheError
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.cache_schemas.token_spec import ChannelStatistics, TokenSpec
from geomcache.pipeline import plugins
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import GeometryEncoder
from geomcache.pipeline.tokens import StoredForm, build_codec, build_encoder, round_trip
from geomcache.stages.evaluate.check.finding import (
    CAMERA_ORDER,
    OTHER_CODEC,
    OTHER_TAP,
    OTHER_WEIGHTS,
    Finding,
    explanation,
    failed,
    passed,
)
from geomcache.stages.evaluate.check.frames import picture_faults
from geomcache.stages.evaluate.check.opened import OpenedRun, StoredEpisode

GPU_TOLERANCE = 0.02  # relative: kernels of a GPU round differently from those that made the cache
_ROUNDING = 0.02  # relative; what codecs leave is below it, what other weights leave far above
_EXACT = 1e-6  # relative
_TAP_FIELDS = ("tap", "channels", "block", "use_intrinsics", "use_poses")  # of encoders' settings
_MOST_BLOCKS = 48
INT8 = "int8"
_LIVE_FIX = "the cache is as its encoder makes it; the weights or the code of the live path differ: report it"
_WITHIN_BOUND, _OF_ITS_SIZE = 0.98, 0.3  # share of values; root mean square over the bound


def check_tokens(run: OpenedRun, episode: StoredEpisode, steps: list[int], device: str) -> Finding:
    """Cached tokens of some rows against live ones of their frames; the policy must take some."""
    recipe = run.policy.card.recipe
    assert recipe is not None
    frames, cached = episode.frames(steps), run.data.tokens(episode.rows(steps))
    assert cached is not None
    live = run.policy.live_tokens(frames)
    compared = f"cached tokens of {len(steps)} rows with live ones ({recipe.encoder.name}, {recipe.spec.codec})"
    tolerance = 0.0 if device == "cpu" else GPU_TOLERANCE
    difference = _difference(cached, live)
    found = f"relative difference {difference:.3g}"
    expected = "equal bit for bit" if device == "cpu" else f"at most {tolerance:g}"
    if difference <= tolerance:
        return passed("tokens", compared, found, expected)
    settings = {**recipe.encoder.config, **run.encoder_changes}
    fresh = build_encoder(recipe.encoder.name, settings, recipe.contract, device)
    form, full = StoredForm(recipe.spec), encode_padded(fresh, frames)
    # The encoder built anew tells which of the two is not what it should be.
    cache_whole = _difference(cached, form.round_trip(full)) <= max(_EXACT, tolerance)
    target = live if cache_whole else cached
    errors = {
        CAMERA_ORDER: _least(target, _other_orders(recipe, fresh, frames, full)),
        OTHER_CODEC: _least(target, _other_codecs(recipe, full)),
        OTHER_TAP: _least(target, _other_taps(recipe, fresh, frames, device), max(_EXACT, tolerance)),
    }
    if "images" in fresh.needs:
        for name, change in picture_faults(frames.images_BVHWC.shape).items():
            changed = replace(frames, images_BVHWC=change(frames.images_BVHWC))
            errors[name] = _difference(target, form.round_trip(encode_padded(fresh, changed)))
    exact = {name: error for name, error in errors.items() if error <= max(_EXACT, tolerance)}
    fault = explanation(exact, difference)
    if fault is None and difference <= _ROUNDING:
        fault = OTHER_CODEC if _is_of_int8(run, recipe, target, full) else None
    elif fault is None and fresh.weights_digest() != "none":
        fault = OTHER_WEIGHTS
    correlation = float(torch.corrcoef(torch.stack([cached.flatten(), live.flatten()]).nan_to_num())[0, 1])
    wrong = "the live ones differ from an encoder built anew" if cache_whole else "the cached ones differ from it"
    fix = _LIVE_FIX if cache_whole else None
    return failed("tokens", compared, expected, f"{found}, correlation {correlation:.3f}; {wrong}", fault, fix)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square difference over the spread of ``one``; infinite where only one is a number."""
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    apart, spread = (one - other).nan_to_num().double(), one.nan_to_num().double().std()
    return float(apart.square().mean().sqrt() / spread.clamp(min=1e-12))


def _least(target: torch.Tensor, guesses: Iterable[torch.Tensor], exact: float = 0.0) -> float:
    """The smallest difference of ``target`` from any guess; no more of them are made after an exact one."""
    least = float("inf")
    for guess in guesses:
        least = min(least, _difference(target, guess))
        if least <= exact:
            break
    return least


def _other_orders(
    recipe: TokenRecipe, fresh: GeometryEncoder, frames: FrameBatch, full: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Views in another order for the encoder, in its tokens, or in both."""
    if recipe.spec.views < 2:
        return
    form = StoredForm(recipe.spec)
    for order in list(permutations(range(recipe.spec.views)))[1:]:
        turned = encode_padded(fresh, _views(frames, order))
        yield form.round_trip(turned)
        yield form.round_trip(full[:, order])
        yield form.round_trip(turned[:, np.argsort(order)])


def _views(frames: FrameBatch, order: tuple[int, ...]) -> FrameBatch:
    def taken(values: Any) -> Any:
        return None if values is None else values[:, list(order)]

    return FrameBatch(
        frames.images_BVHWC[:, list(order)],
        taken(frames.depth_BVHW),
        taken(frames.intrinsics_BV33),
        taken(frames.extrinsics_BV44),
    )


def _other_codecs(recipe: TokenRecipe, full: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tokens after the trip through a codec that is not the recipe's, and not or then through the recipe's."""
    form = StoredForm(recipe.spec)
    for name in plugins.names("codec"):
        if name != recipe.spec.codec and (name != INT8 or recipe.spec.channel_statistics is not None):
            spec = recipe.spec.full.model_copy(
                update={"codec": name, "channel_statistics": recipe.spec.channel_statistics}
            )
            tripped = round_trip(build_codec(spec), full)
            yield form.round_trip(tripped)
            if recipe.spec.pooled_to is None:
                yield tripped


def _is_of_int8(run: OpenedRun, recipe: TokenRecipe, target: torch.Tensor, full: torch.Tensor) -> bool:
    """Whether the difference is as int8's rounding is: within its bound, and of the bound's size.

    Its statistics are nearly those that the policy standardises tokens with.
    """
    if recipe.spec.codec == INT8 or recipe.spec.pooled_to is not None:
        return False
    mean_D, std_D = run.policy.net.token_mean_D.cpu(), run.policy.net.token_std_D.cpu()
    statistics = ChannelStatistics(mean=tuple(mean_D.tolist()), std=tuple(std_D.tolist()), rows=1)
    int8 = build_codec(recipe.spec.full.model_copy(update={"codec": INT8, "channel_statistics": statistics}))
    bound = int8.error_bound(full) + build_codec(recipe.spec).error_bound(full)
    share = (target - full).nan_to_num().abs() / bound.clamp(min=1e-12)
    # Even rounding lies at sqrt(1/3) of its bound.
    return bool((share <= 1.0).float().mean() > _WITHIN_BOUND and share.square().mean().sqrt() > _OF_ITS_SIZE)


def _other_taps(recipe: TokenRecipe, fresh: GeometryEncoder, frames: FrameBatch, device: str) -> Iterator[torch.Tensor]:
    """The same weights, tapped elsewhere, as far as the tokens have the same shape."""
    form, settings = StoredForm(recipe.spec), fresh.config.model_dump(mode="json")
    for field, info in type(fresh.config).model_fields.items():
        if field not in _TAP_FIELDS:
            continue
        for value in _choices(field, info.annotation):
            if value == settings[field]:
                continue
            try:
                other = build_encoder(recipe.encoder.name, {**settings, field: value}, recipe.contract, None)
                if _shape(other.spec) == _shape(fresh.spec):
                    other.load(device)
                    yield form.round_trip(encode_padded(other, frames))
            except GeomcacheError:  # the settings do not fit each other
                continue


def _choices(field: str, annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [False, True]
    return list(range(_MOST_BLOCKS)) if field == "block" else []


def _shape(spec: TokenSpec) -> tuple[int, int, int]:
    return spec.full.row_shape
