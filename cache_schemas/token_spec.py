"""What one row of tokens is: enough to refuse every other row that only looks the same."""

from typing import Literal

from geomcache.cache_schemas.base import Schema


class TokenSpec(Schema):
    """Shape and meaning of the tokens an encoder makes from one time step.

    The view set and its order belong to the spec because the encoders are multi-view: one view's tokens
    depend on the others. So does the encoder's batch size: some kernels round differently at another batch
    size, and the live path pads to the same one.
    """

    encoder: str  # plug-in name, e.g. "depth_anything3"
    tap: str  # which tensor of the model, e.g. "features.last.global"
    cameras: tuple[str, ...]  # V views in order
    grid: tuple[int, int]  # token rows, token columns per view
    dim: int  # D
    image_size: tuple[int, int]  # H, W in pixels at which the encoder sees a view
    encoder_batch_size: int  # time steps per forward pass; the last batch is padded to it
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    codec: str = "bf16"  # how tokens are stored; live tokens make the same round trip

    @property
    def views(self) -> int:
        """V."""
        return len(self.cameras)

    @property
    def tokens_per_view(self) -> int:
        """G."""
        return self.grid[0] * self.grid[1]

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """(V, G, D)."""
        return self.views, self.tokens_per_view, self.dim
