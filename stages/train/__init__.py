"""Stage two: Qwen2.5-VL + layer-wise DiT on cached geometry tokens."""
