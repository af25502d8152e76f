"""Group means of tokens: one rule for compressors that pool, and for caches that keep only the means.

N = V * G flat tokens in (view, row, column) order become K consecutive groups; group k holds the tokens
floor(k N / K) to floor((k + 1) N / K) - 1. Sizes differ by at most one; no token is dropped or counts twice.

Non-obvious:
- A mean followed by an affine layer equals the layer followed by the mean, so K means per row are all that
  such a compressor needs of a row (``reads_pooled``).
- ``group_means`` is a matrix product: fast and differentiable, but its rounding may depend on the batch. What
  is stored or compared bit for bit goes through ``pool_tokens``, whose sums are element by element in a fixed
  order: the same bits in any batch and with any number of threads.
"""

import torch


def group_bounds(tokens: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First token of each group, and one past its last: two int64 tensors [K]."""
    assert 1 <= groups <= tokens, f"{tokens} tokens cannot make {groups} groups"
    index_K = torch.arange(groups)
    return index_K * tokens // groups, (index_K + 1) * tokens // groups


def groups_matrix(tokens: int, groups: int) -> torch.Tensor:
    """Float32 [K, N]: 1 where group k holds token n, else 0."""
    first_K, end_K = group_bounds(tokens, groups)
    index_N = torch.arange(tokens)
    return ((index_N >= first_K[:, None]) & (index_N < end_K[:, None])).float()


def group_means(
    tokens_BND: torch.Tensor, mask_BN: torch.Tensor, groups_KN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each group's unmasked tokens, with gradient.

    Args:
        tokens_BND: float32; a masked token may hold anything, NaN too.
        mask_BN: bool, False = no token there.
        groups_KN: of ``groups_matrix``.

    Returns:
        [B, K, D], 0 where a group has no token left, and bool [B, K], False there.
    """
    # where, not multiplication: 0 * NaN is NaN
    tokens_BND = torch.where(mask_BN[..., None], tokens_BND, 0.0)
    count_BK = mask_BN.float() @ groups_KN.T
    mean_BKD = (groups_KN @ tokens_BND) / count_BK.clamp(min=1.0)[..., None]
    return mean_BKD, count_BK > 0


def pool_tokens(tokens_BVGD: torch.Tensor, groups: int) -> torch.Tensor:
    """K group means in place of V * G tokens, as a pooled cache keeps them.

    Args:
        tokens_BVGD: float32; a token with a value that is not finite counts as missing.
        groups: K.

    Returns:
        Float32 [B, 1, K, D]; NaN where a group has no token.
    """
    assert tokens_BVGD.dtype == torch.float32, f"tokens are {tokens_BVGD.dtype}, expected float32"
    tokens_BND = tokens_BVGD.flatten(1, 2)
    first_K, end_K = group_bounds(tokens_BND.shape[1], groups)
    means = [_mean(tokens_BND[:, first:end]) for first, end in zip(first_K.tolist(), end_K.tolist(), strict=True)]
    return torch.stack(means, dim=1)[:, None]


def _mean(tokens_BND: torch.Tensor) -> torch.Tensor:
    """[B, D] mean of the finite tokens; halves are folded onto each other, so N values meet log2(N) roundings."""
    there_BN = tokens_BND.isfinite().all(dim=-1)
    sums_BND = torch.where(there_BN[..., None], tokens_BND, 0.0)
    width = sums_BND.shape[1]
    while width > 1:
        half = (width + 1) // 2
        sums_BND[:, : width - half] += sums_BND[:, half:width]
        width = half
    return sums_BND[:, 0] / there_BN.sum(dim=1, keepdim=True)  # 0 / 0 = NaN: no token
