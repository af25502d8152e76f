import numpy as np
import pytest
import torch
from PIL import Image

from geomcache.pipeline.image_path import IMAGENET_MEAN, IMAGENET_STD, prepare

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pictures(rows: int = 2, views: int = 2, height: int = 48, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, views, height, width, 3), dtype=np.uint8)


def triangle_filter(source: int, target: int) -> np.ndarray:
    """Resize of one axis as a matrix [target, source]: triangles of half-width max(1, scale)."""
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source)[None] + 0.5 - centre[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def test_hand_computed_normalisation_without_resize() -> None:
    images = np.zeros((1, 1, 2, 2, 3), dtype=np.uint8)
    images[0, 0, 0, 1] = (255, 51, 102)  # 1.0, 0.2, 0.4
    out = prepare(images, (2, 2), mean=(0.5, 0.2, 0.0), std=(0.5, 0.25, 2.0))
    assert out.shape == (1, 1, 3, 2, 2)
    torch.testing.assert_close(out[0, 0, :, 0, 1], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(out[0, 0, :, 1, 0], torch.tensor([-1.0, -0.8, 0.0]))


def test_hand_computed_halving() -> None:
    """4 -> 2 pixels: centre 1.0, half-width 2, distances 0.5, 0.5, 1.5 -> weights 3/7, 3/7, 1/7."""
    row = np.array([0, 70, 140, 210], dtype=np.uint8)
    images = np.broadcast_to(row[None, None, None, :, None], (1, 1, 4, 4, 3)).copy()
    out = prepare(images, (4, 2), **PLAIN)[0, 0, 0, 0] * 255
    expected = (3 * 0 + 3 * 70 + 1 * 140) / 7
    torch.testing.assert_close(out, torch.tensor([expected, 210 - expected]))


@pytest.mark.parametrize("size", [(28, 28), (48, 20), (70, 84), (14, 42)])
def test_equals_an_independent_resize(size: tuple[int, int]) -> None:
    images = pictures()
    vertical, horizontal = triangle_filter(48, size[0]), triangle_filter(40, size[1])
    expected = np.einsum("hi,bvijc,wj->bvchw", vertical, images / 255.0, horizontal)
    expected = (expected - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    np.testing.assert_allclose(prepare(images, size).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [(28, 28), (70, 84)])
def test_agrees_with_pil_bilinear(size: tuple[int, int]) -> None:
    """PIL rounds to uint8 after each axis: at most about one grey level apart."""
    images = pictures(1, 1)
    pil = np.asarray(Image.fromarray(images[0, 0]).resize(size[::-1], Image.Resampling.BILINEAR))
    mine = prepare(images, size, **PLAIN)[0, 0].permute(1, 2, 0).numpy() * 255
    assert np.abs(mine - pil).max() <= 1.01


def test_orientation_is_kept() -> None:
    images = np.zeros((1, 1, 32, 32, 3), dtype=np.uint8)
    images[0, 0, :8, :8] = 255  # the upper left corner is bright
    out = prepare(images, (14, 14), **PLAIN)[0, 0, 0]
    assert out[0, 0] > 0.9
    assert out[0, -1] == out[-1, 0] == out[-1, -1] == 0


@pytest.mark.parametrize("size", [(28, 28), (48, 40), (70, 84)])
def test_a_frame_does_not_depend_on_its_neighbours(size: tuple[int, int]) -> None:
    images = pictures(5)
    together = prepare(images, size)
    alone = torch.cat([prepare(images[i : i + 1], size) for i in range(5)])
    assert torch.equal(together, alone)
    assert torch.equal(prepare(images[::-1], size), together.flip(0))


def test_memory_layout_does_not_matter_and_input_is_untouched() -> None:
    images = pictures()
    expected = prepare(images, (28, 28))
    bottom_up = np.ascontiguousarray(images[:, :, ::-1])
    bottom_up.flags.writeable = False
    assert torch.equal(prepare(bottom_up[:, :, ::-1], (28, 28)), expected)
    same = prepare(images, (48, 40))
    same.zero_()
    assert np.array_equal(images, pictures())


def test_refuses_float_images() -> None:
    with pytest.raises(AssertionError, match="float32"):
        prepare(pictures().astype(np.float32), (28, 28))  # type: ignore[arg-type]
