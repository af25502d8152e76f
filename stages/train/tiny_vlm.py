"""The tiny VLM: Qwen2.5-VL's own classes, small, with a tokenizer trained here, without network."""

import json
from typing import Self

from pydantic import model_validator
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from geomcache.cache_schemas.base import Schema

# Qwen2.5's own special tokens, in its order
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What the tiny tokenizer has read. Any other text is still encoded without loss, in more (byte) tokens.
# Changing a sentence changes the ids of later tiny checkpoints; saved ones keep their own tokenizer.
SENTENCES = (
    "user\n",
    "assistant\n",
    "pick up the red bowl and place it in the basket",
    "pick up the black bowl on the stove and place it on the plate",
    "pick up the black bowl next to the plate and place it on the plate",
    "pick up the alphabet soup and place it in the basket",
    "pick up the cream cheese and place it in the basket",
    "pick up the salad dressing and place it in the basket",
    "pick up the tomato sauce and the ketchup and put both of them in the basket",
    "pick up the milk, the orange juice and the butter and place them in the tray",
    "pick up the book and place it in the back compartment of the caddy",
    "put the white mug on the left plate and the yellow mug on the right plate",
    "put the wine bottle on top of the cabinet",
    "put the chocolate pudding to the right of the plate",
    "put the frying pan on the front of the stove and turn it on",
    "put the moka pot between the cookie box and the ramekin",
    "open the top drawer of the cabinet and put the bowl inside",
    "open the middle drawer of the wooden cabinet",
    "close the bottom drawer of the cabinet",
    "close the microwave door",
    "turn on the stove",
    "turn off the stove",
    "push the plate to the front of the table center",
    "stack the left bowl on the right bowl and place them under the wine rack",
)


class TinySizes(Schema):
    """Sizes of the random small model; head width is ``hidden / heads`` and must be a multiple of 16."""

    hidden: int = 128  # C
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    vision_mlp: int = 128

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden % (16 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("hidden must be a multiple of 16 * heads, and heads of kv_heads")
        if self.vision_hidden % (4 * self.vision_heads):
            raise ValueError("vision_hidden must be a multiple of 4 * vision_heads")
        return self


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer trained on ``SENTENCES``; the same ids on every machine."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trained.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2048,  # more than the sentences need: every word of theirs becomes one token
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes: nothing is unknown
    )
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]  # BPE takes pairs
        extra_special_tokens=list(SPECIAL_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2.5-VL's preprocessing (14 px patches merged 2 x 2, CLIP mean and deviation), PIL backend."""
    return Qwen2VLImageProcessorPil()


def build_config(sizes: TinySizes, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The model's configuration, with the tokenizer's own ids in it."""
    special = {token: tokenizer.encode(token)[0] for token in SPECIAL_TOKENS}
    eighth = sizes.hidden // sizes.heads // 8  # the three rotary sections add up to half the head width
    rope = {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [eighth, eighth * 3 // 2, eighth * 4 - eighth - eighth * 3 // 2],
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.mlp,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_mlp,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )
