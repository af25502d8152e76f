"""Sizes of the published Qwen2.5-VL models, for whoever needs the architecture and cannot reach the hub.

From each model's own config.json. Weights are always loaded beside the config.json they came with; this is only read
by ``Backbone.write_architecture``, which makes a model without weights.
"""

from typing import Any

# the vision tower is the same in both, but for the width of what it hands to the language model
_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_TEXT: dict[str, Any] = {
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, tied: bool) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }
    return {
        "text_config": _TEXT | text,
        "vision_config": _VISION | {"out_hidden_size": hidden},
        "tie_word_embeddings": tied,
    }


# hub id -> arguments of transformers' Qwen2_5_VLConfig
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _sizes(2048, 36, 16, 2, 11_008, 151_936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _sizes(3584, 28, 28, 4, 18_944, 152_064, tied=False),
}
