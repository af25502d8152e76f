"""A checkpoint made ready to act: policy, live tokens, normalisation. Built from the checkpoint's card alone.

Whatever could differ between the cache and the live path is compared by name before the first episode.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import CacheStale, InputError
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.interfaces import Need
from geomcache.pipeline.tokens import LiveTokens, build_encoder, token_recipe
from geomcache.stages.evaluate.corruption import encoder_frame
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.checkpoint import CheckpointCard, latest_checkpoint, load_policy, read_card
from geomcache.stages.train.packer import Packer
from geomcache.stages.train.policy import PolicyNet


def build_live_tokens(
    recipe: TokenRecipe, contract: Contract, device: str, changes: dict[str, object] | None = None
) -> LiveTokens:
    """The encoder and codec of ``recipe``, with weights loaded and proved to be the same.

    Args:
        recipe: from a checkpoint or a cache.
        contract: of the frames that will come; must be the recipe's.
        device: "cpu" or "cuda".
        changes: encoder settings that may differ, such as the folder of the weights.

    Raises:
        ContractMismatch: the frames follow other conventions.
        CacheStale: another encoder, other weights, another tap or another image path; each difference is named.
    """
    recipe.contract.require_same(
        contract,
        mine="the checkpoint's tokens",
        theirs="the frames given now",
        fix="use the cameras, sizes and orientation the cache was made with",
    )
    encoder = build_encoder(recipe.encoder.name, {**recipe.encoder.config, **(changes or {})}, contract, device)
    now = token_recipe(encoder, contract, recipe.fingerprint.pack, **recipe.spec.storage)
    differences = recipe.spec.describe_difference(now.spec) + recipe.fingerprint.describe_difference(now.fingerprint)
    if differences:
        raise CacheStale(
            "the live encoder is not the one the policy was trained on",
            expected=f"encoder {recipe.encoder.name} with the settings and weights of the cache",
            found="; ".join(differences),
            fix="give the same weights, for example --set encoder_config.weights=FOLDER",
        )
    return LiveTokens(encoder, recipe.spec)


class LivePolicy:
    """Policy of a checkpoint: observations in, environment actions out.

    Args:
        run: a run's folder or one checkpoint.
        device: "cpu" or "cuda".
        encoder_changes: encoder settings that may differ, such as the folder of the weights.
        averaged: act with the averaged weights where there are any.
        without_geometry: mask every geometry token; the encoder is not even built.
    """

    def __init__(
        self,
        run: Path,
        device: str,
        encoder_changes: dict[str, object] | None = None,
        *,
        averaged: bool = True,
        without_geometry: bool = False,
    ) -> None:
        self.checkpoint = latest_checkpoint(run)
        self.card = read_card(self.checkpoint)
        self._device = torch.device(device)
        self._net = load_policy(self.checkpoint, self.card, averaged=averaged).to(self._device).eval()
        recipe = self.card.recipe if not without_geometry else None
        self._live = build_live_tokens(recipe, self.card.contract, device, encoder_changes) if recipe else None
        self._clock = _Clock(self._device, self._net.backbone)

    @property
    def horizon(self) -> int:
        """T, actions per query."""
        return self.card.policy.dit.horizon

    @property
    def needs_depth(self) -> bool:
        """Whether the live encoder reads depth or camera matrices."""
        return self._live is not None and self._live.needs_depth

    def require_contract(self, contract: Contract) -> None:
        """Refuse an environment of other conventions than the training frames'.

        Raises:
            ContractMismatch: every differing field is named.
        """
        require_contract(self.card, contract, needs_depth=self.needs_depth)

    def act(self, observations: Sequence[Observation], noise_seeds: Sequence[int]) -> NDArray[np.float32]:
        """Action chunks [B, T, 7] in environment units; ``noise_seeds`` key each sample's flow noise by itself."""
        noise_BTA = torch.stack([self._net.draw_noise(seed) for seed in noise_seeds])
        return self.decode(self.sample(self.prepare(observations), noise_BTA))

    def prepare(self, observations: Sequence[Observation]) -> PolicyBatch:
        """What the network is given for these observations, on its device: the live twin of ``BatchMaker.batch``."""
        frames = FrameBatch.join([seen.frame for seen in observations])
        tokens = self._tokens(observations)
        with self._clock.part("vlm"):
            return PolicyBatch(
                **self.packer(frames.images_BVHWC, [seen.instruction for seen in observations]),
                proprio_BP=torch.from_numpy(self.normalise_states(np.stack([seen.state_S for seen in observations]))),
                **tokens,
            ).to(self._device)

    def sample(self, batch: PolicyBatch, noise_BTA: torch.Tensor) -> NDArray[np.float32]:
        """Normalised actions [B, T, A] of prepared inputs."""
        with self._clock.part("head"), self._net.autocast(self.card.mixed_precision):
            return np.asarray(self._net.sample(batch, noise_BTA=noise_BTA).cpu().numpy())

    def decode(self, normalised_BTA: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised actions -> what the environment executes, [..., 7]."""
        return np.clip(self.card.normaliser.denormalise_actions(normalised_BTA), -1.0, 1.0)

    def normalise_states(self, states_BS: NDArray[np.float32]) -> NDArray[np.float32]:
        """Robot states [B, 8] -> the network's units."""
        return self.card.normaliser.state.normalise(states_BS)

    def live_tokens(self, frames: FrameBatch) -> torch.Tensor:
        """Tokens [B, V, G, D] by the live encoder and codec; the policy must take some."""
        assert self._live is not None
        return self._live.tokens(frames)

    @property
    def net(self) -> PolicyNet:
        """The network, in eval mode."""
        return self._net

    @property
    def packer(self) -> Packer:
        """Images and instructions -> the VLM's inputs."""
        return cast(Packer, self._net.backbone.packer)

    def fix_prompt_length(self, instructions: Sequence[str]) -> None:
        """Pad every prompt to the length of the longest of these, as ``prompt_length`` of the backbone would."""
        packer = self.packer
        if packer.prompt_length is None:
            packer.prompt_length = packer.longest(instructions, len(self.card.contract.cameras))

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in ``encoder``, ``vlm`` and ``head`` since the last call."""
        return self._clock.take()

    def _tokens(self, observations: Sequence[Observation]) -> dict[str, torch.Tensor]:
        """Fields of the batch: live tokens; masked ones without geometry; none for a policy that takes none."""
        if self._live is not None:
            with self._clock.part("encoder"):
                return {"tokens_BVGD": self._live.tokens(FrameBatch.join([*map(encoder_frame, observations)]))}
        if self.card.recipe is None:
            return {}
        shape = len(observations), *self.card.recipe.spec.row_shape
        return {"tokens_BVGD": torch.zeros(shape), "token_mask_BVG": torch.zeros(shape[:3], dtype=torch.bool)}


class _Clock:
    """Seconds by part of a query. The VLM runs inside the head's part and is taken out of it by hooks."""

    def __init__(self, device: torch.device, backbone: torch.nn.Module) -> None:
        self._device, self._vlm_started = device, 0.0
        self._seconds = dict.fromkeys(("encoder", "vlm", "head"), 0.0)
        backbone.register_forward_pre_hook(self._enter_vlm)
        backbone.register_forward_hook(self._leave_vlm)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - started

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _enter_vlm(self, *_: object) -> None:
        self._vlm_started = self._now()

    def _leave_vlm(self, *_: object) -> None:
        seconds = self._now() - self._vlm_started
        self._seconds["vlm"] += seconds
        self._seconds["head"] -= seconds


def require_contract(card: CheckpointCard, contract: Contract, *, needs_depth: bool) -> None:
    """``ContractMismatch`` unless frames of ``contract`` are such as it was trained on; depth counts if read."""
    mine, theirs = (
        one if needs_depth else one.model_copy(update={"has_depth": False}) for one in (card.contract, contract)
    )
    mine.require_same(
        theirs,
        mine="the checkpoint",
        theirs="the simulator",
        fix="leave out --cameras, --image-orientation and sizes: they come from the checkpoint",
    )


def require_possible(card: CheckpointCard, *, execute_steps: int, without_geometry: bool) -> None:
    """``InputError`` for what this checkpoint cannot do."""
    if without_geometry and card.recipe is None:
        raise InputError(
            "this policy has no geometry to leave out",
            expected="a run of another compressor than none",
            found=card.policy.geom_compression_type,
            fix="leave out without_geometry",
        )
    if execute_steps > card.policy.dit.horizon:
        raise InputError(
            "execute_steps is longer than the policy's action chunk",
            expected=f"at most {card.policy.dit.horizon}",
            found=str(execute_steps),
            fix=f"--set execute_steps={card.policy.dit.horizon}",
        )


def encoder_needs(card: CheckpointCard, encoder_changes: dict[str, object] | None = None) -> frozenset[Need]:
    """What the checkpoint's encoder reads, nothing where there is none; its weights are not loaded."""
    if card.recipe is None:
        return frozenset()
    record = card.recipe.encoder
    return build_encoder(record.name, {**record.config, **(encoder_changes or {})}, card.contract, None).needs


def reads_depth(card: CheckpointCard, encoder_changes: dict[str, object] | None = None) -> bool:
    """Whether the checkpoint's encoder reads depth or camera matrices."""
    return bool(encoder_needs(card, encoder_changes) - {"images"})


def is_shown_images(card: CheckpointCard) -> bool:
    """False for a policy whose prompt has no images (the backbone's option ``images: none``)."""
    return card.policy.backbone.config.get("images") != "none"  # a card of before the option has no such key


def noise_seed(seed: int, episode: str, query: int) -> int:
    """A seed for one query's flow noise, keyed on (seed, episode, query)."""
    key = hashlib.sha256(f"{seed}/{episode}/{query}".encode()).digest()
    return int.from_bytes(key[:8], "little") >> 1
