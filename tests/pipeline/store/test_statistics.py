"""The numbers in a commit record, against numpy in float64."""

import numpy as np
import pytest
import torch

from geomcache.cache_schemas.errors import InputError
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline.store.statistics import TokenSums, channel_statistics, even_rows, shard_statistics
from geomcache.pipeline.tokens import as_tensors, build_codec
from tests.contracts.test_codecs import SPEC, tokens


@pytest.mark.parametrize("codec_name", ["bf16", "fp32", "int8", "lossless"])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (300.0, 0.5), (0.0, 3e30)])
def test_every_number_against_numpy(codec_name: str, offset: float, spread: float) -> None:
    given = tokens(9) * spread + offset
    given[4, 1, 3, 2] = float("nan")
    given[7] = float("nan")
    flat = given.flatten(0, 2).double()
    finite = flat[flat.isfinite().all(dim=-1)]
    statistics = ChannelStatistics(mean=tuple(finite.mean(0).tolist()), std=tuple(finite.std(0).tolist()), rows=1)
    codec = build_codec(SPEC.model_copy(update={"codec": codec_name, "channel_statistics": statistics}))
    stored = codec.encode(given)
    found = shard_statistics(codec, given, stored)

    read = codec.decode(as_tensors(stored)).double().numpy().reshape(-1, given.shape[-1])
    there = np.isfinite(read).all(axis=1)
    true, kept = given.double().numpy().reshape(read.shape)[there], read[there]
    assert found.non_finite == int((~np.isfinite(read)).sum()) == 1 + 24 * 16
    assert found.valid_rows == np.packbits([1, 1, 1, 1, 0, 1, 1, 0, 1]).tobytes().hex()
    assert (found.min, found.max) == (kept.min(), kept.max())
    assert found.mean == pytest.approx(kept.mean(), rel=1e-4, abs=1e-4 * kept.std())
    assert found.std == pytest.approx(kept.std(), rel=1e-4)
    assert found.mean_norm == pytest.approx(np.linalg.norm(kept, axis=1).mean(), rel=1e-5)
    assert found.codec_max_error == pytest.approx(np.abs(kept - true).max(), rel=1e-4)
    relative = ((kept - true) ** 2).mean(axis=0) / true.var(axis=0)
    assert found.codec_rms_error == pytest.approx(np.sqrt(relative.mean()), rel=1e-3)


def test_blocks_of_a_shard_add_up_to_the_whole() -> None:
    """Of unequal length and far apart, one without a finite token: as if they had come at once."""
    given = tokens(11)
    given[:4] += 50
    given[4] = float("nan")
    given[9, 0, 2] = float("inf")
    codec = build_codec(SPEC)
    blocks = [given[:1], given[1:4], given[4:5], given[5:]]
    found = TokenSums.total([TokenSums.of(codec, block, codec.encode(block)) for block in blocks]).statistics()
    whole = shard_statistics(codec, given, codec.encode(given))
    assert found.model_dump(exclude={"valid_rows"}) == pytest.approx(whole.model_dump(exclude={"valid_rows"}), rel=1e-5)
    assert found.valid_rows == whole.valid_rows
    read = codec.decode(as_tensors(codec.encode(given))).double()
    there = read[read.isfinite().all(dim=-1)].numpy()
    assert found.std == pytest.approx(there.std(), rel=1e-4)


def test_a_codec_that_destroys_what_varies_cannot_hide_behind_a_large_mean() -> None:
    """1000 +- 0.01 in bfloat16, whose steps are 4 there: everything is lost."""
    given = 1000 + 0.01 * torch.randn(4, *SPEC.row_shape, generator=torch.Generator().manual_seed(0))
    codec = build_codec(SPEC)
    error = shard_statistics(codec, given, codec.encode(given)).codec_rms_error
    assert error == pytest.approx(1.0, rel=0.05)


def test_a_shard_without_a_finite_token_says_so() -> None:
    given = torch.full((2, *SPEC.row_shape), float("nan"))
    found = shard_statistics(build_codec(SPEC), given, build_codec(SPEC).encode(given))
    assert (found.min, found.max, found.valid_rows, found.non_finite) == (None, None, "00", given.numel())


def test_channel_statistics_leave_out_tokens_that_are_not_finite() -> None:
    values = tokens(6)
    values[2, 0, 0, 5] = float("inf")
    flat = values.flatten(0, 2)
    finite = flat[flat.isfinite().all(dim=-1)].double()
    found = channel_statistics(values)
    np.testing.assert_allclose(found.mean, finite.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, finite.std(0, correction=0), rtol=1e-6)
    with pytest.raises(InputError, match="no finite token"):
        channel_statistics(torch.full((1, 2, 2, 3), float("nan")))


@pytest.mark.parametrize(("rows", "most"), [(1, 5), (5, 5), (100, 7), (10**6, 2048)])
def test_even_rows_have_both_ends_and_even_gaps(rows: int, most: int) -> None:
    found = even_rows(rows, most)
    assert (found[0], found[-1], len(found)) == (0, rows - 1, min(rows, most))
    assert len(found) < 3 or np.ptp(np.diff(found)) <= 1
