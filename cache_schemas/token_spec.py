"""What one row of tokens is: enough to refuse every other row that only looks the same."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from geomcache.cache_schemas.base import Schema


class ChannelStatistics(Schema):
    """Mean and standard deviation of every token channel, from a fixed sample of rows; frozen with the spec.

    Codec int8 standardises channels with them, and a policy that reads pooled tokens standardises as it would the full
    ones. They are float32 numbers.
    """

    mean: tuple[float, ...]  # [D]
    std: tuple[float, ...]  # [D]
    rows: int = Field(ge=1)  # of the sample

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.mean) != len(self.std) or min(self.std, default=0.0) < 0.0:
            raise ValueError("mean and std must be of one length, std not negative")
        return self


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
    pooled_to: int | None = Field(default=None, ge=1)  # K: a row keeps the means of K groups of its V * G tokens
    source_codec: str | None = (
        None  # the codec the full tokens had gone through before; None: straight from the encoder
    )
    channel_statistics: ChannelStatistics | None = None  # of the full tokens; for codec int8 and for pooled tokens

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pooled_to is not None and self.pooled_to > self.views * self.tokens_per_view:
            raise ValueError(f"pooled_to must be at most {self.views * self.tokens_per_view} (views x tokens per view)")
        if self.channel_statistics is not None and len(self.channel_statistics.mean) != self.dim:
            raise ValueError(f"channel_statistics must have {self.dim} channels")
        return self

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
        """(V, G, D) of a row of these tokens; (1, K, D) when they are pooled."""
        if self.pooled_to is not None:
            return 1, self.pooled_to, self.dim
        return self.views, self.tokens_per_view, self.dim

    @property
    def storage(self) -> dict[str, Any]:
        """The fields that say how tokens are kept, by name; the rest says what they are."""
        return {name: getattr(self, name) for name in ("codec", "pooled_to", "source_codec", "channel_statistics")}

    @property
    def full(self) -> Self:
        """The spec of the tokens before pooling and re-encoding: what a plain cache of them would say."""
        plain = {"pooled_to": None, "source_codec": None, "channel_statistics": None}
        return self.model_copy(update={"codec": self.source_codec or self.codec, **plain})
