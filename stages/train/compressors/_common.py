"""What every compressor with geometry checks when it is built."""

from geomcache.cache_schemas.errors import ConfigError


def count_tokens(views: int, tokens_per_view: int, num_tokens: int) -> int:
    """N = V * G; ``ConfigError`` when K tokens cannot be made of them."""
    total = views * tokens_per_view
    if not 1 <= num_tokens <= total:
        raise ConfigError(
            "geom_dit_tokens (K) does not fit the tokens of this encoder",
            expected=f"1 to {total} ({views} views x {tokens_per_view} tokens)",
            found=str(num_tokens),
            fix=f"set geom_dit_tokens to {min(max(num_tokens, 1), total)}, or use a finer grid",
        )
    return total
