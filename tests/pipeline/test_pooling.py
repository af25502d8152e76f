"""Groups of tokens and their means, against hand computation and numpy in float64."""

import math

import numpy as np
import pytest
import torch

from geomcache.pipeline.pooling import group_bounds, group_means, groups_matrix, pool_tokens

NAN = float("nan")


@pytest.mark.parametrize(("tokens", "groups"), [(512, 16), (196, 16), (7, 3), (5, 5), (9, 1), (2738, 16)])
def test_every_token_is_in_one_group_and_groups_are_even(tokens: int, groups: int) -> None:
    first_K, end_K = group_bounds(tokens, groups)
    assert first_K.tolist() == [math.floor(k * tokens / groups) for k in range(groups)]
    assert [*first_K.tolist()[1:], tokens] == end_K.tolist()
    sizes = set((end_K - first_K).tolist())
    assert sizes <= {tokens // groups, -(-tokens // groups)}
    members_KN = groups_matrix(tokens, groups)
    assert members_KN.dtype == torch.float32
    assert members_KN.shape == (groups, tokens)
    assert members_KN.sum(dim=0).eq(1).all()
    for k in range(groups):
        assert members_KN[k].nonzero().flatten().tolist() == list(range(int(first_K[k]), int(end_K[k])))


@pytest.mark.parametrize("groups", [0, 8])
def test_impossible_groups_are_our_own_mistake(groups: int) -> None:
    with pytest.raises(AssertionError, match=f"7 tokens cannot make {groups} groups"):
        group_bounds(7, groups)


def test_group_means_by_hand() -> None:
    """Seven tokens in groups 0-1, 2-3, 4-6; NaN at masked tokens, one group without any."""
    tokens_BND = torch.tensor([[1.0, 3.0, 10.0, NAN, 1.0, 2.0, 6.0], [NAN, 5.0, NAN, NAN, 1.0, 1.0, NAN]])[..., None]
    tokens_BND.requires_grad_()
    mean_BKD, mask_BK = group_means(tokens_BND, tokens_BND.detach().isfinite()[..., 0], groups_matrix(7, 3))
    assert mean_BKD[..., 0].tolist() == [[2.0, 10.0, 3.0], [5.0, 0.0, 1.0]]
    assert mask_BK.tolist() == [[True, True, True], [True, False, True]]
    mean_BKD.sum().backward()
    assert tokens_BND.grad is not None
    third = pytest.approx(1 / 3)
    assert tokens_BND.grad[..., 0].tolist() == [[0.5, 0.5, 1, 0, third, third, third], [0, 1, 0, 0, 0.5, 0.5, 0]]


def bits(values: torch.Tensor) -> torch.Tensor:
    """So that NaN equals NaN, and 0 is not -0."""
    return values.view(torch.int32)


def test_pooled_tokens_by_hand() -> None:
    """A token with one value that is not finite is missing as a whole; a group without a token is NaN."""
    tokens_BVGD = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[NAN, 9.0], [5.0, -math.inf]]]])
    pooled = pool_tokens(tokens_BVGD, 2)
    assert pooled.shape == (1, 1, 2, 2)
    assert pooled[0, 0, 0].tolist() == [2.0, 3.0]
    assert pooled[0, 0, 1].isnan().all()
    assert pool_tokens(tokens_BVGD, 1)[0, 0].tolist() == [[2.0, 3.0]]
    assert pool_tokens(tokens_BVGD, 4)[0, 0, :2].equal(tokens_BVGD[0, 0])
    assert tokens_BVGD[0, 1, 0, 1] == 9.0  # the caller's tokens are left alone


def random_tokens(batch: int, views: int, per_view: int, dim: int) -> torch.Tensor:
    """Normal tokens of very different channel scales, a tenth of them missing."""
    generator = torch.Generator().manual_seed(0)
    tokens_BVGD = torch.randn(batch, views, per_view, dim, generator=generator) * torch.logspace(-2, 3, dim)
    missing_BVG = torch.rand(batch, views, per_view, generator=generator) < 0.1
    return tokens_BVGD.masked_fill(missing_BVG[..., None], NAN)


@pytest.mark.parametrize(("views", "per_view", "groups"), [(2, 256, 16), (2, 98, 16), (3, 37, 5), (2, 49, 1)])
def test_pooled_tokens_are_the_means(views: int, per_view: int, groups: int) -> None:
    tokens_BVGD = random_tokens(3, views, per_view, 8)
    flat_BND = tokens_BVGD.flatten(1, 2).double().numpy()
    total = views * per_view
    pooled = pool_tokens(tokens_BVGD, groups)
    for k in range(groups):
        expected_BD = np.nanmean(flat_BND[:, k * total // groups : (k + 1) * total // groups], axis=1)
        scale_D = np.nanstd(flat_BND, axis=(0, 1))
        assert np.abs((pooled[:, 0, k].double().numpy() - expected_BD) / scale_D).max() < 2e-7


@pytest.mark.parametrize(
    ("views", "per_view", "dim", "groups"),
    # the last is where a matrix product, and with two threads Tensor.sum, give other bits
    [(2, 256, 64, 16), (2, 98, 5, 16), (2, 50, 9, 3), (1, 40_000, 1, 1)],
)
def test_a_row_is_the_same_bits_in_any_batch_and_with_any_threads(
    views: int, per_view: int, dim: int, groups: int
) -> None:
    tokens_BVGD = random_tokens(5, views, per_view, dim)
    whole = pool_tokens(tokens_BVGD, groups)
    by_row = torch.cat([pool_tokens(row[None].clone(), groups) for row in tokens_BVGD])
    assert bits(whole).equal(bits(by_row))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bits(pool_tokens(tokens_BVGD, groups)).equal(bits(whole))
        by_row = torch.cat([pool_tokens(row[None], groups) for row in tokens_BVGD])
        assert bits(by_row).equal(bits(whole))
    finally:
        torch.set_num_threads(threads)


def test_pooling_twice_changes_nothing() -> None:
    """K pooled tokens in K groups are themselves: a pooled cache's row may go through the same code again."""
    pooled = pool_tokens(random_tokens(2, 2, 20, 3), 8)
    assert bits(pool_tokens(pooled, 8)).equal(bits(pooled))
    mask_BN = pooled[:, 0].isfinite().all(dim=-1)
    mean_BKD, mask_BK = group_means(pooled[:, 0], mask_BN, groups_matrix(8, 8))
    assert mask_BK.equal(mask_BN)
    assert mean_BKD.equal(pooled[:, 0].nan_to_num())
