"""What every encoder must hold, with its default Config; a new file under pipeline/encoders is tested by
being there.

The default Config of an encoder runs offline on a CPU in a few seconds.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.contract import CameraContract, Contract
from geomcache.cache_schemas.errors import ConfigError, ContractMismatch, UnknownName
from geomcache.pipeline import plugins
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import GeometryEncoder, TokenProvider
from geomcache.pipeline.tokens import (
    LiveTokens,
    build_codec,
    build_encoder,
    round_trip,
    token_recipe,
)

SIZE = 64
CONTRACT = Contract(
    image_orientation="upright",
    cameras=(
        CameraContract(name="agentview", height=SIZE, width=SIZE),
        CameraContract(name="wrist", height=SIZE, width=SIZE),
    ),
    has_depth=True,
)


def some_frames(rows: int, seed: int = 0) -> FrameBatch:
    rng = np.random.default_rng(seed)
    extrinsics = np.tile(np.eye(4), (rows, 2, 1, 1))
    extrinsics[..., :3, 3] = rng.normal(size=(rows, 2, 3))
    return FrameBatch(
        rng.integers(0, 256, (rows, 2, SIZE, SIZE, 3), dtype=np.uint8),
        rng.uniform(0.3, 2.0, (rows, 2, SIZE, SIZE)).astype(np.float32),
        np.tile(np.array([[77.0, 0, 32], [0, 77.0, 32], [0, 0, 1]]), (rows, 2, 1, 1)),
        extrinsics,
    )


def rows_of(*parts: FrameBatch) -> FrameBatch:
    """The rows of several batches, one after the other."""
    depths, intrinsics, extrinsics = [], [], []
    for part in parts:
        assert part.depth_BVHW is not None
        assert part.intrinsics_BV33 is not None
        assert part.extrinsics_BV44 is not None
        depths.append(part.depth_BVHW)
        intrinsics.append(part.intrinsics_BV33)
        extrinsics.append(part.extrinsics_BV44)
    return FrameBatch(
        np.concatenate([part.images_BVHWC for part in parts]),
        np.concatenate(depths),
        np.concatenate(intrinsics),
        np.concatenate(extrinsics),
    )


@pytest.fixture(scope="module", params=plugins.names("encoder"))
def name(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@pytest.fixture(scope="module")
def encoder(name: str) -> GeometryEncoder:
    return build_encoder(name, {}, CONTRACT, "cpu")


def test_spec_is_known_before_weights_and_matches_the_output(name: str, encoder: GeometryEncoder) -> None:
    unloaded = build_encoder(name, {}, CONTRACT, None)
    before = unloaded.spec
    assert isinstance(unloaded, GeometryEncoder)
    assert before.encoder == name
    assert before.cameras == CONTRACT.camera_names
    assert before.codec == unloaded.default_codec
    assert before.codec in plugins.names("codec")
    tokens = encoder.encode(some_frames(before.encoder_batch_size))
    assert encoder.spec == before
    assert tokens.shape == (before.encoder_batch_size, *before.row_shape)
    assert tokens.dtype == torch.float32
    assert tokens.isfinite().all()
    assert not tokens.requires_grad


def test_states_needs_licence_and_what_it_is(encoder: GeometryEncoder) -> None:
    assert encoder.needs <= {"images", "depth", "cameras"}
    assert encoder.needs
    assert encoder.license
    assert encoder.description


def test_two_builds_give_the_same_bits_whatever_the_global_generator(name: str, encoder: GeometryEncoder) -> None:
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    other = build_encoder(name, {}, CONTRACT, "cpu")
    assert torch.equal(torch.get_rng_state(), state), "building an encoder moved the global generator"
    frames = some_frames(encoder.spec.encoder_batch_size)
    assert torch.equal(other.encode(frames), encoder.encode(frames))
    assert other.weights_digest() == encoder.weights_digest()


def test_digest_is_the_same_before_and_after_loading(name: str, encoder: GeometryEncoder) -> None:
    assert build_encoder(name, {}, CONTRACT, None).weights_digest() == encoder.weights_digest()


def test_another_slot_and_other_neighbours_give_the_same_bits(encoder: GeometryEncoder) -> None:
    frames, strangers = some_frames(3), some_frames(encoder.spec.encoder_batch_size + 2, seed=1)
    expected = encode_padded(encoder, frames)
    alone = torch.cat([encode_padded(encoder, frames[i : i + 1]) for i in range(3)])
    behind = encode_padded(encoder, rows_of(strangers, frames))[-3:]
    before = encode_padded(encoder, rows_of(frames[1:3], strangers, frames[:1]))
    assert torch.equal(alone, expected)
    assert torch.equal(behind, expected)
    assert torch.equal(torch.cat([before[-1:], before[:2]]), expected)


def test_threads_may_call_it_at_once(encoder: GeometryEncoder) -> None:
    """As a worker beside a GPU does: while one call computes, others prepare their images and copy tokens back."""
    size = encoder.spec.encoder_batch_size
    batches = [some_frames(size, seed) for seed in range(6)]
    expected = [encode_padded(encoder, batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda batch: encode_padded(encoder, batch), batches * 3))
    assert all(torch.equal(tokens, expected[number % 6]) for number, tokens in enumerate(found))


def test_no_rows_give_no_tokens(encoder: GeometryEncoder) -> None:
    assert encode_padded(encoder, some_frames(0)).shape == (0, *encoder.spec.row_shape)


def test_frames_are_not_changed(encoder: GeometryEncoder) -> None:
    frames, same = some_frames(encoder.spec.encoder_batch_size), some_frames(encoder.spec.encoder_batch_size)
    encoder.encode(frames)
    assert np.array_equal(frames.images_BVHWC, same.images_BVHWC)
    assert np.array_equal(frames.depth_BVHW, same.depth_BVHW)  # type: ignore[arg-type]


def test_refuses_another_number_of_rows_or_views(encoder: GeometryEncoder) -> None:
    size = encoder.spec.encoder_batch_size
    with pytest.raises(AssertionError, match="rows for a batch"):
        encoder.encode(some_frames(size + 1))
    whole = some_frames(size)
    assert whole.depth_BVHW is not None
    assert whole.intrinsics_BV33 is not None
    assert whole.extrinsics_BV44 is not None
    with pytest.raises(AssertionError, match="1 views for an encoder of 2"):
        encoder.encode(
            FrameBatch(
                whole.images_BVHWC[:, :1],
                whole.depth_BVHW[:, :1],
                whole.intrinsics_BV33[:, :1],
                whole.extrinsics_BV44[:, :1],
            )
        )


def test_refuses_frames_of_another_size(encoder: GeometryEncoder) -> None:
    size = encoder.spec.encoder_batch_size
    with pytest.raises(ContractMismatch, match="32x32"):
        encoder.encode(FrameBatch(some_frames(size).images_BVHWC[:, :, :32, :32]))


@pytest.mark.parametrize("orientation", ["rot180", "bottom_up"])
def test_refuses_a_world_that_is_not_upright(name: str, orientation: str) -> None:
    turned = CONTRACT.model_copy(update={"image_orientation": orientation})
    with pytest.raises(ContractMismatch, match=orientation):
        build_encoder(name, {}, turned, None)


def test_unknown_settings_are_refused_with_a_suggestion(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        build_encoder(name, {"batchsize": 2}, CONTRACT, None)


def test_live_tokens_make_the_codecs_round_trip(encoder: GeometryEncoder) -> None:
    spec = encoder.spec.model_copy(update={"codec": "bf16"})
    codec = build_codec(spec)
    live = LiveTokens(encoder, spec)
    frames = some_frames(3)
    assert isinstance(live, TokenProvider)
    assert live.spec == spec
    assert torch.equal(live.tokens(frames), round_trip(codec, encode_padded(encoder, frames)))
    assert torch.equal(live.tokens(frames[1:2]), live.tokens(frames)[1:2])


def test_recipe_builds_the_same_encoder_again(encoder: GeometryEncoder) -> None:
    recipe = token_recipe(encoder, CONTRACT, "pack")
    again = build_encoder(recipe.encoder.name, recipe.encoder.config, recipe.contract, None)
    assert again.spec == encoder.spec == recipe.spec
    assert token_recipe(again, CONTRACT, "pack") == recipe
    assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe


def test_fingerprint_follows_what_tokens_depend_on(encoder: GeometryEncoder, name: str) -> None:
    recipe = token_recipe(encoder, CONTRACT, "pack")
    swapped = CONTRACT.model_copy(update={"cameras": CONTRACT.cameras[::-1]})
    bigger = build_encoder(name, {"batch_size": encoder.spec.encoder_batch_size + 1}, CONTRACT, None)
    others = [
        token_recipe(encoder, CONTRACT, "another pack"),
        token_recipe(encoder, CONTRACT, "pack", codec="bf16" if recipe.spec.codec != "bf16" else "fp32"),
        token_recipe(build_encoder(name, {}, swapped, None), swapped, "pack"),
        token_recipe(bigger, CONTRACT, "pack"),
        token_recipe(encoder, CONTRACT, "pack", codec="fp32", pooled_to=2),
        token_recipe(encoder, CONTRACT, "pack", codec="fp32", pooled_to=3),
        token_recipe(encoder, CONTRACT, "pack", codec="fp32", pooled_to=2, source_codec="bf16"),
    ]
    ids = {other.fingerprint.cache_id for other in [recipe, *others]}
    assert len(ids) == 8


def test_unknown_encoder_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="did you mean 'oracle_pointmap'"):
        build_encoder("oracle_point_map", {}, CONTRACT, None)
