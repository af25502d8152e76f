import torch

from geomcache.pipeline import plugins
from geomcache.stages.train.building import seeded


def pool(views: int, tokens: int, dim: int, context: int, k: int) -> torch.nn.Module:
    with seeded(0):
        return plugins.load("compressor", "pool")(
            plugins.config_class("compressor", "pool")(),
            views=views,
            tokens_per_view=tokens,
            dim=dim,
            context_dim=context,
            num_blocks=2,
            num_tokens=k,
        )


def test_parameters_follow_the_formula() -> None:
    """D * C + C, at the plan's size."""
    with torch.device("meta"):
        assert sum(p.numel() for p in pool(2, 256, 1024, 2048, 16).parameters()) == 2_099_200
        assert sum(p.numel() for p in pool(2, 256, 1536, 2048, 16).parameters()) == 3_147_776
    none = plugins.load("compressor", "none")
    built = none(
        plugins.config_class("compressor", "none")(),
        views=0,
        tokens_per_view=0,
        dim=0,
        context_dim=8,
        num_blocks=1,
        num_tokens=16,
    )
    assert list(built.parameters()) == []


def test_pool_by_hand() -> None:
    """Seven tokens in three groups: 0-1, 2-3, 4-6; equal to projecting first and averaging afterwards."""
    compressor = pool(1, 7, 1, 2, 3)
    tokens_BVGD = torch.tensor([1.0, 3.0, 10.0, 20.0, 1.0, 2.0, 6.0]).view(1, 1, 7, 1)
    mask_BVG = torch.ones(1, 1, 7, dtype=torch.bool)
    mask_BVG[0, 0, 3] = False  # leaves 10 alone in its group
    found = compressor(tokens_BVGD, mask_BVG, torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    expected_KC = compressor.projection(torch.tensor([[2.0], [10.0], [3.0]]))
    torch.testing.assert_close(found.geom_LBKC[0, 0], expected_KC)
    projected_GC = compressor.projection(tokens_BVGD[0, 0])
    torch.testing.assert_close(found.geom_LBKC[1, 0, 2], projected_GC[4:].mean(dim=0))


def test_a_group_whose_tokens_are_all_masked_is_masked() -> None:
    compressor = pool(1, 6, 1, 2, 3)
    mask_BVG = torch.tensor([True, True, False, False, False, True]).view(1, 1, 6)
    found = compressor(torch.ones(1, 1, 6, 1), mask_BVG, torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    assert found.mask_BK.tolist() == [[True, False, True]]


def test_shared_tokens_are_not_copied_per_block() -> None:
    found = pool(1, 6, 1, 2, 3)(
        torch.ones(1, 1, 6, 1),
        torch.ones(1, 1, 6, dtype=torch.bool),
        torch.zeros(1, 1, 2),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert found.geom_LBKC.stride(0) == 0
