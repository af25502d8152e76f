"""The policy network: VLM + compressor + layer-wise DiT, its loss and its sampler, all normalised.

Precision: the VLM runs under the caller's autocast; the compressor and the DiT run in float32 (autocast is
switched off around them and their inputs are cast up). Randomness: noise and times are drawn on the CPU
from an explicit generator or handed in as tensors; nothing here touches the global generator (but dropout,
which is 0 by default).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import nn

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.contract import ACTION_DIM, STATE_DIM
from geomcache.cache_schemas.errors import ConfigError
from geomcache.cache_schemas.token_spec import TokenSpec
from geomcache.pipeline import plugins
from geomcache.stages.train import flow
from geomcache.stages.train.batch import GeomSizes, GeomTokens, PolicyBatch
from geomcache.stages.train.building import pair_layers, parse_options, require_fitting_tokens, seeded
from geomcache.stages.train.dit import Config as DiTConfig
from geomcache.stages.train.dit import Context, DiT


class BackboneChoice(Schema):
    """Which backbone plug-in, with its options."""

    name: str = "qwen2_5_vl"
    config: dict[str, Any] = Field(default_factory=dict)


class PolicyConfig(Schema):
    """The network; ``PolicyNet.config`` is this with every default and the layer pairing written out."""

    backbone: BackboneChoice = BackboneChoice()
    dit: DiTConfig = DiTConfig()
    vlm_layers: tuple[int, ...] | None = None  # one per cross-attending block, 1-based; None = spread evenly
    geom_inject_to_dit: bool = True  # False = no geometry, whatever the compressor
    geom_compression_type: str = "pool"  # a compressor plug-in; "none" = the QwenPI baseline
    geom_compression: dict[str, Any] = Field(default_factory=dict)  # the compressor's options
    geom_dit_tokens: int = Field(16, gt=0)  # K
    repeated_diffusion_steps: int = Field(4, gt=0)  # R, draws of (noise, time) per sample and training step
    num_inference_timesteps: int = Field(4, gt=0)  # Euler steps
    seed: int = 0  # of the compressor's and the head's random initial weights

    @property
    def compressor(self) -> str:
        """The compressor that is really built."""
        return self.geom_compression_type if self.geom_inject_to_dit else "none"

    @property
    def compressor_options(self) -> dict[str, Any]:
        """The options of ``compressor``; those of one that is switched off are not read."""
        return self.geom_compression if self.geom_inject_to_dit else {}


class LossOutput(NamedTuple):
    """The loss of one batch."""

    loss: torch.Tensor  # scalar with gradient: mean over real actions, draws and action dimensions
    per_dim_A: torch.Tensor  # [A] the same mean per action dimension, detached; its mean is the loss
    valid_actions: torch.Tensor  # int64 scalar: this loss's weight in a mean over batches


class PolicyNet(nn.Module):
    """VLM hidden states and compressed geometry tokens condition a flow-matching DiT.

    Args:
        config: see ``PolicyConfig``.
        token_spec: what the geometry tokens are; None only without geometry.
        token_mean_D: [D] mean of each token channel over the cache, and
        token_std_D: [D] its standard deviation. Tokens are standardised with them (metres or outlier channels
            would swamp the projection); both are saved in the state dict. None = 0 and 1 (to be loaded).
        backbone_folder: rebuild the backbone from what ``save_backbone`` wrote, with random weights.

    Raises:
        ConfigError: options do not fit each other, the token spec or the VLM.
        UnknownName: no backbone or compressor of that name.
        InputError: the VLM cannot be read.
    """

    token_mean_D: torch.Tensor
    token_std_D: torch.Tensor

    def __init__(
        self,
        config: PolicyConfig,
        token_spec: TokenSpec | None = None,
        token_mean_D: torch.Tensor | None = None,
        token_std_D: torch.Tensor | None = None,
        *,
        backbone_folder: Path | None = None,
    ) -> None:
        super().__init__()
        backbone_class = plugins.load("backbone", config.backbone.name)
        backbone_config = parse_options("backbone", config.backbone.name, config.backbone.config)
        compressor_config = parse_options("compressor", config.compressor, config.compressor_options)
        num_layers = backbone_class.count_layers(backbone_config, backbone_folder)
        vlm_layers = pair_layers(num_layers, config.dit.num_cross_blocks, config.vlm_layers)
        self.backbone = backbone_class(backbone_config, layer_indices=vlm_layers, folder=backbone_folder)
        context_dim = self.backbone.context_dim
        self.config = config.model_copy(
            update={
                "dit": config.dit.resolved(context_dim),
                "vlm_layers": vlm_layers,
                "backbone": BackboneChoice(name=config.backbone.name, config=backbone_config.model_dump(mode="json")),
                "geom_compression": compressor_config.model_dump(mode="json"),
            }
        )
        self.token_spec = token_spec if config.compressor != "none" else None
        if self.token_spec is None and config.compressor != "none":
            raise ConfigError(
                f"compressor {config.compressor!r} needs geometry tokens",
                expected="a token cache",
                found="none",
                fix="name a cache, or set geom_compression_type to none",
            )
        found = config.dit.state_dim, config.dit.action_dim
        if found != (STATE_DIM, ACTION_DIM):
            raise ConfigError(
                "the DiT's state_dim and action_dim are not the contract's",
                expected=f"{STATE_DIM} and {ACTION_DIM}",
                found=f"{found[0]} and {found[1]}",
                fix="leave dit.state_dim and dit.action_dim out",
            )
        compressor_class = plugins.load("compressor", config.compressor)
        if self.token_spec is not None:
            require_fitting_tokens(
                config.compressor,
                compressor_class.reads_pooled(compressor_config),
                self.token_spec,
                config.geom_dit_tokens,
            )
        views, tokens_per_view, dim = self.token_spec.row_shape if self.token_spec else (0, 0, 0)
        whole = self.token_spec is not None and self.token_spec.pooled_to is None
        grid = self.token_spec.grid if self.token_spec is not None and whole else (1, tokens_per_view)
        with seeded(config.seed):
            self.dit = DiT(config.dit, context_dim=context_dim)
        with seeded(config.seed):
            self.compressor = compressor_class(
                compressor_config,
                GeomSizes(
                    views=views,
                    grid=grid,
                    dim=dim,
                    context_dim=context_dim,
                    num_blocks=config.dit.num_cross_blocks,
                    num_tokens=config.geom_dit_tokens,
                ),
            )
        if self.token_spec is None:  # a run without geometry may still be given a cache's statistics
            token_mean_D, token_std_D = None, None
        self.register_buffer("token_mean_D", _statistic(token_mean_D, torch.zeros(dim), "token_mean_D"))
        std_D = _statistic(token_std_D, torch.ones(dim), "token_std_D")
        # a constant channel is only shifted
        self.register_buffer("token_std_D", torch.where(std_D > 0, std_D, 1.0))

    def autocast(self, mixed_precision: str) -> torch.autocast:
        """The VLM's precision, the same in training and when the policy acts; the head switches it off for itself."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=mixed_precision == "bf16")

    def enable_gradient_checkpointing(self) -> None:
        """Compute the VLM's layers and the DiT's blocks again in backward: less memory, the same numbers."""
        self.backbone.enable_gradient_checkpointing()
        self.dit.gradient_checkpointing = True

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(T, A)."""
        return self.config.dit.horizon, self.config.dit.action_dim

    def forward(
        self,
        batch: PolicyBatch,
        generator: torch.Generator | None = None,
        *,
        noise_BRTA: torch.Tensor | None = None,
        time_BR: torch.Tensor | None = None,
    ) -> LossOutput:
        """``loss``, under the name that wrappers (DDP, FSDP, DeepSpeed) call."""
        return self.loss(batch, generator, noise_BRTA=noise_BRTA, time_BR=time_BR)

    def loss(
        self,
        batch: PolicyBatch,
        generator: torch.Generator | None = None,
        *,
        noise_BRTA: torch.Tensor | None = None,
        time_BR: torch.Tensor | None = None,
    ) -> LossOutput:
        """Flow-matching loss: mean squared velocity error over real actions and R draws per sample.

        Args:
            batch: with actions.
            generator: CPU generator for whichever of the two draws is not given (times first, then noise).
            noise_BRTA: standard normal; R is taken from it when given.
            time_BR: times in [0, 1).
        """
        assert batch.actions_BTA is not None, "a batch without actions has no loss"
        B, T, A = batch.actions_BTA.shape
        R = self.config.repeated_diffusion_steps if noise_BRTA is None else noise_BRTA.shape[1]
        if time_BR is None:
            time_BR = flow.sample_time((B, R), _given(generator))
        if noise_BRTA is None:
            noise_BRTA = torch.randn((B, R, T, A), generator=_given(generator))
        error_BRTA, valid = self.velocity_error(batch, self.encode_context(batch), time_BR, noise_BRTA)
        per_dim_A = error_BRTA.sum(dim=(0, 1, 2)) / (valid * R).clamp(min=1)
        return LossOutput(per_dim_A.mean(), per_dim_A.detach(), valid)

    def velocity_error(
        self, batch: PolicyBatch, context: Context, time_BR: torch.Tensor, noise_BRTA: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the velocity [B, R, T, A], 0 past episodes' ends; how many actions are real."""
        assert batch.actions_BTA is not None
        device, mask_BT = batch.actions_BTA.device, batch.action_mask_BT
        if mask_BT is None:
            mask_BT = torch.ones(batch.actions_BTA.shape[:2], dtype=torch.bool, device=device)
        time_BR, noise_BRTA = time_BR.to(device), noise_BRTA.to(device)
        with torch.autocast(device.type, enabled=False):
            # the head's self-attention sees padded positions too: 0 there, whatever the loader padded with
            actions_B1TA = torch.where(mask_BT[..., None], batch.actions_BTA.float(), 0.0)[:, None]
            noisy_BRTA = flow.interpolate(noise_BRTA, actions_B1TA, time_BR)
            velocity_BRTA = self.dit(noisy_BRTA, time_BR, batch.proprio_BP.float(), context)
            error_BRTA = (velocity_BRTA - flow.velocity_target(noise_BRTA, actions_B1TA)).square()
            return torch.where(mask_BT[:, None, :, None], error_BRTA, 0.0), mask_BT.sum()

    @torch.no_grad()
    def sample(
        self,
        batch: PolicyBatch,
        generator: torch.Generator | None = None,
        *,
        noise_BTA: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised actions, float32 [B, T, A]; call ``eval()`` first.

        Args:
            batch: without or with actions (they are not looked at).
            generator: CPU generator for the starting noise; its draw covers the whole batch, so
            noise_BTA: is what a caller hands in to key each sample's noise by itself (see ``draw_noise``).
        """
        if noise_BTA is None:
            noise_BTA = torch.randn((len(batch), *self.chunk_shape), generator=_given(generator))
        return self.denoise(batch, self.encode_context(batch), noise_BTA)

    def denoise(self, batch: PolicyBatch, context: Context, noise_BTA: torch.Tensor) -> torch.Tensor:
        """Euler steps from ``noise_BTA`` to normalised actions, float32 [B, T, A]."""
        device, proprio_BP = batch.proprio_BP.device, batch.proprio_BP.float()
        with torch.autocast(device.type, enabled=False):
            actions_B1TA = flow.euler(
                lambda x_B1TA, t: self.dit(x_B1TA, t.expand(len(batch), 1), proprio_BP, context),
                noise_BTA.to(device, torch.float32)[:, None],
                self.config.num_inference_timesteps,
            )
        return actions_B1TA[:, 0]

    def draw_noise(self, seed: int) -> torch.Tensor:
        """The starting noise [T, A] of one query: a function of ``seed`` (a hash of episode and query)."""
        return torch.randn(self.chunk_shape, generator=torch.Generator().manual_seed(seed))

    def encode_context(self, batch: PolicyBatch) -> Context:
        """The VLM, the compressor, all keys and values: once per sample, for all draws and steps."""
        hidden_LBSC, mask_BS = self.backbone(batch)
        with torch.autocast(mask_BS.device.type, enabled=False):
            hidden_LBSC = [hidden_BSC.float() for hidden_BSC in hidden_LBSC]
            geom = self.compress(batch, hidden_LBSC[-1], mask_BS)
            return self.dit.encode_context(hidden_LBSC, mask_BS, geom)

    def compress(self, batch: PolicyBatch, context_BSC: torch.Tensor, mask_BS: torch.Tensor) -> GeomTokens:
        """Standardise the batch's geometry tokens and compress them."""
        tokens_BVGD, mask_BVG = None, None
        if self.token_spec is not None:
            tokens_BVGD = (self._tokens_of(batch).float() - self.token_mean_D) / self.token_std_D
            mask_BVG = torch.isfinite(tokens_BVGD).all(dim=-1)  # what is not finite is no token
            if batch.token_mask_BVG is not None:
                mask_BVG = mask_BVG & batch.token_mask_BVG
        geom: GeomTokens = self.compressor(tokens_BVGD, mask_BVG, context_BSC, mask_BS)
        return geom

    def save_backbone(self, folder: Path) -> None:
        """Write the VLM's config, tokenizer and image processor (no weights) for ``backbone_folder``."""
        self.backbone.save(folder)

    def _tokens_of(self, batch: PolicyBatch) -> torch.Tensor:
        assert self.token_spec is not None
        expected = (len(batch), *self.token_spec.row_shape)
        if batch.tokens_BVGD is None or tuple(batch.tokens_BVGD.shape) != expected:
            raise ConfigError(
                "the batch's geometry tokens are not those this policy was built for",
                expected=f"tokens [B, V, G, D] = {list(expected)} of {self.token_spec.encoder}",
                found="none" if batch.tokens_BVGD is None else str(list(batch.tokens_BVGD.shape)),
                fix="use the cache (or the live encoder) of the checkpoint's token spec",
            )
        return batch.tokens_BVGD


def mask_geometry(batch: PolicyBatch, masked_B: torch.Tensor) -> PolicyBatch:
    """The batch without the geometry of the samples that ``masked_B`` (bool [B]) names."""
    if batch.tokens_BVGD is None:
        return batch
    kept_B11 = ~masked_B.to(batch.tokens_BVGD.device)[:, None, None]
    mask_BVG = kept_B11.expand(batch.tokens_BVGD.shape[:3])
    return replace(batch, token_mask_BVG=mask_BVG if batch.token_mask_BVG is None else mask_BVG & batch.token_mask_BVG)


def _statistic(given_D: torch.Tensor | None, default_D: torch.Tensor, name: str) -> torch.Tensor:
    if given_D is None:
        return default_D
    value_D = torch.as_tensor(given_D, dtype=torch.float32).clone()
    if value_D.shape != default_D.shape or not torch.isfinite(value_D).all():
        raise ConfigError(
            f"{name} does not fit the tokens",
            expected=f"{len(default_D)} finite values",
            found=f"shape {list(value_D.shape)}, finite: {bool(torch.isfinite(value_D).all())}",
            fix="compute the statistics from the same cache",
        )
    return value_D


def _given(generator: torch.Generator | None) -> torch.Generator:
    assert generator is not None, "pass a CPU generator, or the draws themselves"
    return generator
