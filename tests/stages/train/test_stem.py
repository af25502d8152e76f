"""The convolutional stem, and the blind policy: what the action head gets to see of the images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from geomcache.stages.train.backbones._stem import Stem, StemConfig, _soft_positions
from geomcache.stages.train.backbones.qwen2_5_vl import Backbone, Config
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.policy import PolicyNet

STEM = {"channels": 8, "keypoints": 4}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TEXTS = ["turn on the stove", "close the microwave door"]


@pytest.fixture
def make_backbone(small_vlm: dict[str, Any]) -> Callable[..., Backbone]:
    def make(**options: Any) -> Backbone:
        return Backbone(Config.model_validate(small_vlm | options), layer_indices=(1, 3)).eval()

    return make


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, 2, 56, 56, 3), dtype=np.uint8)


def pack(backbone: Backbone, seen: np.ndarray) -> PolicyBatch:
    return PolicyBatch(**backbone.packer(seen, TEXTS[: len(seen)]), proprio_BP=torch.zeros(len(seen), 8))


def test_the_stem_sees_the_image_itself(make_backbone: Callable[..., Backbone]) -> None:
    stem = Stem(StemConfig.model_validate(STEM), image_size=56, width=16)
    seen = images()
    expected = (seen.reshape(4, 56, 56, 3) / 255.0 - CLIP_MEAN) / CLIP_STD
    found = stem._images(pack(make_backbone(), seen).pixel_values)
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_soft_positions_point_at_the_peak() -> None:
    heatmaps = torch.full((1, 2, 5, 5), -50.0)
    heatmaps[0, 0, 1, 4] = 50.0  # row 1, column 4
    heatmaps[0, 1, 2, 2] = 50.0
    points = _soft_positions(heatmaps, torch.linspace(-1, 1, 5))
    torch.testing.assert_close(points, torch.tensor([[[1.0, -0.5], [0.0, 0.0]]]))


def test_each_cell_reaches_its_own_token(make_backbone: Callable[..., Backbone]) -> None:
    """A change inside one 28-pixel cell moves that cell's token most: tokens come in the tower's order."""
    stem = Stem(StemConfig(channels=8, keypoints=0), image_size=84, width=16).eval()
    packer = make_backbone(image_size=84).packer
    seen = np.full((1, 1, 84, 84, 3), 90, dtype=np.uint8)
    changed = seen.copy()
    changed[0, 0, 36:48, 64:76] = 200  # inside row 1, column 2
    before, after = (stem(packer(one, TEXTS[:1])["pixel_values"]) for one in (seen, changed))
    assert int((after - before).norm(dim=1).argmax()) == 1 * 3 + 2


def test_the_stem_adds_to_the_towers_tokens(make_backbone: Callable[..., Backbone]) -> None:
    plain, stemmed = make_backbone(), make_backbone(stem=STEM)
    batch = pack(plain, images())
    assert not torch.equal(plain(batch)[0][1], stemmed(batch)[0][1])
    assert stemmed.stem is not None
    for parameter in stemmed.stem.parameters():
        parameter.data.zero_()
    for with_zeros, without in zip(stemmed(batch)[0], plain(batch)[0], strict=True):
        torch.testing.assert_close(with_zeros, without)


def test_every_weight_of_the_stem_learns_even_beside_a_frozen_vlm(
    make_policy: Callable[..., PolicyNet], make_batch: Callable[..., PolicyBatch], draw: Callable[[int], Any]
) -> None:
    policy = make_policy("none", backbone={"stem": STEM, "freeze": "all"})
    policy.loss(make_batch(policy), draw(0)).loss.backward()
    gradients = {n: p.grad for n, p in policy.backbone.named_parameters() if p.requires_grad}
    assert gradients
    assert all(".stem." in f".{name}" for name in gradients)
    assert all(
        grad is not None and grad.abs().sum() > 0 for name, grad in gradients.items() if "heatmaps.bias" not in name
    )


def test_a_blind_policy_acts_the_same_whatever_it_is_shown(
    make_policy: Callable[..., PolicyNet], make_batch: Callable[..., PolicyBatch], draw: Callable[[int], Any]
) -> None:
    blind = make_policy("none", backbone={"images": "none"}).eval()
    batch = make_batch(blind)
    assert batch.pixel_values.shape[0] == 0
    assert batch.mm_token_type_ids_BS.sum() == 0
    other = make_batch(blind, seed=1, proprio_BP=batch.proprio_BP, tokens_BVGD=batch.tokens_BVGD)
    assert torch.equal(blind.sample(batch, draw(0)), blind.sample(other, draw(0)))
    moved = replace(batch, proprio_BP=batch.proprio_BP + 1)
    assert not torch.equal(blind.sample(batch, draw(0)), blind.sample(moved, draw(0)))


def test_a_blind_policy_has_no_stem() -> None:
    with pytest.raises(ValidationError, match="nothing to look at"):
        Config.model_validate({"images": "none", "stem": STEM})
