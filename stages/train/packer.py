"""Images and instructions -> the VLM's input tensors, batched; for the data workers and evaluation alike.

Non-obvious:
- transformers' own ``Qwen2_5_VLProcessor`` needs torchvision (for its video processor), hence this one.
- Padding is on the LEFT, so the last token of every sample stands at the same place.
- One merged image token covers ``merge * patch`` = 28 pixels squared.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from geomcache.cache_schemas.errors import ConfigError, InputError

IMAGE_TYPE = 1  # of mm_token_type_ids; text is 0


class Packer:
    """Prompt: ``<|vision_start|>`` image ``<|vision_end|>`` per view, then the text, as one user turn.

    Args:
        tokenizer: Qwen2.5's, or the tiny one of the same kind.
        image_processor: the PIL one; its resizing is switched off.
        image_size: side in pixels to which every image is resized (PIL bicubic) unless it has that size.
        shows_images: False = prompts have no image tokens, whatever images are given: for a blind policy.
        prompt: the text after the images; ``{instruction}`` stands for the task's instruction.
        prompt_length: padded length S; None = the longest prompt of the batch. A fixed length makes a
            sample's tensors independent of its neighbours in the batch.
        max_prompt_tokens: longer prompts are refused (never cut).

    Raises:
        ConfigError: ``image_size`` is not a multiple of one merged token's side.
    """

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        image_size: int,
        shows_images: bool = True,
        prompt: str = "{instruction}",
        prompt_length: int | None = None,
        max_prompt_tokens: int = 512,
    ) -> None:
        side = image_processor.patch_size * image_processor.merge_size
        if image_size <= 0 or image_size % side:
            raise ConfigError(
                "image_size does not fit the VLM's patches",
                expected=f"a positive multiple of {side} pixels",
                found=str(image_size),
                fix=f"set image_size to {max(1, round(image_size / side)) * side}",
            )
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_size, self.prompt = image_size, prompt
        self.prompt_length, self.max_prompt_tokens = prompt_length, max_prompt_tokens
        self.shows_images = shows_images
        self.tokens_per_image = (image_size // side) ** 2 if shows_images else 0
        self._image_token: int = tokenizer.encode("<|image_pad|>")[0]
        self._ids: dict[tuple[str, int], list[int]] = {}  # few instructions: each is tokenised once

    def __call__(self, images_BVHWC: NDArray[np.uint8], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Pack B samples.

        Args:
            images_BVHWC: uint8 RGB, true upright, views in contract order.
            instructions: B texts.

        Returns:
            The first five fields of ``PolicyBatch``, by name.

        Raises:
            InputError: a prompt is too long or holds an image token, or the two arguments differ in B.
        """
        if images_BVHWC.ndim != 5 or images_BVHWC.dtype != np.uint8 or len(images_BVHWC) != len(instructions):
            raise InputError(
                "images and instructions cannot be packed",
                expected=f"uint8 images [{len(instructions)}, V, H, W, 3], one instruction a sample",
                found=f"{images_BVHWC.dtype} {list(images_BVHWC.shape)}, {len(instructions)} instructions",
                fix="pass one set of views for every instruction",
            )
        return self._pack_text(instructions, images_BVHWC.shape[1]) | self._pack_images(images_BVHWC)

    def require_fitting(self, instructions: Iterable[str], views: int) -> None:
        """``InputError`` for the first instruction that ``__call__`` would refuse, whenever its row would come."""
        for instruction in instructions:
            self._tokenise(instruction, views)

    def longest(self, instructions: Iterable[str], views: int) -> int:
        """Tokens of the longest prompt."""
        return max(len(self._tokenise(instruction, views)) for instruction in instructions)

    def _pack_images(self, images_BVHWC: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        if not self.shows_images:
            patch_numbers = 3 * self.image_processor.temporal_patch_size * self.image_processor.patch_size**2
            return {
                "pixel_values": torch.zeros(0, patch_numbers),
                "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
            }
        images = [self._resize(image) for image in images_BVHWC.reshape(-1, *images_BVHWC.shape[2:])]
        packed = self.image_processor(images, do_resize=False, return_tensors="pt")
        return {"pixel_values": packed["pixel_values"], "image_grid_thw": packed["image_grid_thw"]}

    def _resize(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if image_HWC.shape[:2] == size:
            return image_HWC
        return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))

    def _pack_text(self, instructions: Sequence[str], views: int) -> dict[str, torch.Tensor]:
        prompts = [self._tokenise(text, views) for text in instructions]
        length = self.prompt_length or max(len(ids) for ids in prompts)
        input_ids_BS = torch.full((len(prompts), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        attention_mask_BS = torch.zeros_like(input_ids_BS)
        for row, ids in enumerate(prompts):
            input_ids_BS[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask_BS[row, length - len(ids) :] = 1
        return {
            "input_ids_BS": input_ids_BS,
            "attention_mask_BS": attention_mask_BS,
            "mm_token_type_ids_BS": input_ids_BS.eq(self._image_token).long() * IMAGE_TYPE,
        }

    def _tokenise(self, instruction: str, views: int) -> list[int]:
        known = self._ids.get((instruction, views))
        if known is not None:
            return known
        image = "<|vision_start|>" + "<|image_pad|>" * self.tokens_per_image + "<|vision_end|>"
        image = image if self.shows_images else ""
        text = self.prompt.replace("{instruction}", instruction)
        ids: list[int] = self.tokenizer(f"<|im_start|>user\n{image * views}{text}<|im_end|>\n")["input_ids"]
        limit = min(self.max_prompt_tokens, self.prompt_length or self.max_prompt_tokens)
        if len(ids) > limit:
            raise InputError(
                f"the prompt for {instruction!r} is too long",
                expected=f"at most {limit} tokens ({views * self.tokens_per_image} of them are image tokens)",
                found=f"{len(ids)} tokens",
                fix="raise the backbone's max_prompt_tokens and prompt_length, or lower image_size",
            )
        if ids.count(self._image_token) != views * self.tokens_per_image:
            raise InputError(
                f"the instruction {instruction!r} holds an image token",
                expected="plain text",
                found="<|image_pad|>",
                fix="remove special tokens from the instruction",
            )
        self._ids[instruction, views] = ids
        return ids

    def save(self, folder: Path) -> None:
        """Write the tokenizer's and the image processor's files, as transformers names them."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> "Packer":
        """Read both from a folder or hub id; ``options`` as in the constructor.

        Raises:
            InputError: the files are not there (and cannot be fetched).
        """
        try:
            tokenizer = Qwen2Tokenizer.from_pretrained(source, padding_side="left")
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
        except OSError as problem:
            raise InputError(
                f"{source} has no tokenizer or image processor that can be read",
                expected="a folder or hub id with tokenizer.json and preprocessor_config.json",
                found=str(problem).splitlines()[0],
                fix="download the whole model repository, or go online once",
            ) from problem
        return cls(tokenizer, image_processor, **options)
