import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from geomcache.cache_schemas.errors import ConfigError, InputError
from geomcache.stages.train import tiny_vlm
from geomcache.stages.train.packer import Packer

RNG = np.random.default_rng(0)
TEXTS = ["close the microwave door", "pick up the zebra; 12 naïve 斑马, and place it in the basket"]


@pytest.fixture
def make_packer() -> Callable[..., Packer]:
    def make(image_size: int = 56, **options: object) -> Packer:
        return Packer(tiny_vlm.build_tokenizer(), tiny_vlm.build_image_processor(), image_size=image_size, **options)

    return make


def images(batch: int, side: int = 56) -> np.ndarray:
    return RNG.integers(0, 256, (batch, 2, side, side, 3), dtype=np.uint8)


def test_text_layout(make_packer: Callable[..., Packer]) -> None:
    packer = make_packer()
    packed = packer(images(2), TEXTS)
    assert packer.tokens_per_image == 4
    picture = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    for row, text in enumerate(TEXTS):
        real = packed["attention_mask_BS"][row].bool()
        ids = packed["input_ids_BS"][row]
        expected = f"<|im_start|>user\n{picture}{picture}{text}<|im_end|>\n"
        assert packer.tokenizer.decode(ids[real]) == expected  # nothing is lost, whatever the script
        assert set(packer.tokenizer.convert_ids_to_tokens(ids[~real])) <= {"<|endoftext|>"}
        assert real.tolist() == sorted(real.tolist())  # padding is on the left
        kinds = packed["mm_token_type_ids_BS"][row]
        assert kinds.sum() == 8
        assert packer.tokenizer.decode(ids[kinds == 1]) == "<|image_pad|>" * 8


def test_pixels_equal_the_plain_image_processor(make_packer: Callable[..., Packer]) -> None:
    batch = images(2)
    packed = make_packer()(batch, TEXTS)
    plain = Qwen2VLImageProcessorPil()([Image.fromarray(image) for image in batch.reshape(-1, 56, 56, 3)])
    np.testing.assert_array_equal(packed["pixel_values"], np.asarray(plain["pixel_values"]))
    assert packed["image_grid_thw"].tolist() == [[1, 4, 4]] * 4


def test_other_sizes_are_resized_as_pil_does(make_packer: Callable[..., Packer]) -> None:
    batch = images(1, side=80)
    packed = make_packer()(batch, TEXTS[:1])
    small = [Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC) for image in batch[0]]
    plain = Qwen2VLImageProcessorPil()(small)
    np.testing.assert_array_equal(packed["pixel_values"], np.asarray(plain["pixel_values"]))


def test_fixed_length_makes_rows_independent(make_packer: Callable[..., Packer]) -> None:
    packer, batch = make_packer(prompt_length=80), images(2)
    both, alone = packer(batch, TEXTS), packer(batch[:1], TEXTS[:1])
    for name in ("input_ids_BS", "attention_mask_BS", "mm_token_type_ids_BS"):
        assert both[name].shape == (2, 80)
        assert torch.equal(both[name][:1], alone[name])


def test_save_and_load_give_equal_tensors(make_packer: Callable[..., Packer], tmp_path: Path) -> None:
    packer, batch = make_packer(), images(2)
    packer.save(tmp_path)
    loaded = Packer.load(tmp_path, image_size=56)
    copied = pickle.loads(pickle.dumps(packer))  # data workers get a copy
    for other in (loaded, copied):
        found, expected = other(batch, TEXTS), packer(batch, TEXTS)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert isinstance(loaded.tokenizer, Qwen2Tokenizer)


def test_tokenizer_is_the_same_every_time() -> None:
    first, second = tiny_vlm.build_tokenizer(), tiny_vlm.build_tokenizer()
    assert first.get_vocab() == second.get_vocab()
    assert 400 < len(first) < 600  # 256 bytes, 14 special tokens, merges
    assert first("pick up the red bowl")["input_ids"] == second("pick up the red bowl")["input_ids"]
    assert len(first("pick up the red bowl")["input_ids"]) == 5


def test_bad_input_is_named(make_packer: Callable[..., Packer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 28"):
        make_packer(image_size=60)
    with pytest.raises(InputError, match="too long"):
        make_packer(max_prompt_tokens=12)(images(1), TEXTS[:1])
    with pytest.raises(InputError, match="too long"):
        make_packer(prompt_length=12)(images(1), TEXTS[:1])
    with pytest.raises(InputError, match="image token"):
        make_packer()(images(1), ["put <|image_pad|> there"])
    with pytest.raises(InputError, match="cannot be packed"):
        make_packer()(images(2), TEXTS[:1])
    with pytest.raises(InputError, match="cannot be packed"):
        make_packer()(images(1).astype(np.float32), TEXTS[:1])
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Packer.load(tmp_path, image_size=56)
