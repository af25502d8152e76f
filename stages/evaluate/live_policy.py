"""A checkpoint made ready to act: policy, live tokens, normalisation. Built from the checkpoint's card alone.

Whatever could differ between the cache and the live path is compared by name before the first episode.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import CacheStale, ContractMismatch
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.pipeline.tokens import LiveTokens, build_encoder, token_recipe
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.checkpoint import latest_checkpoint, load_policy, read_card


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
        mine = self.card.contract if self.needs_depth else self.card.contract.model_copy(update={"has_depth": False})
        theirs = contract if self.needs_depth else contract.model_copy(update={"has_depth": False})
        mine.require_same(
            theirs,
            mine="the checkpoint",
            theirs="the simulator",
            fix="leave out --cameras, --image-orientation and sizes: they come from the checkpoint",
        )

    def act(self, observations: Sequence[Observation], noise_seeds: Sequence[int]) -> NDArray[np.float32]:
        """Action chunks [B, T, 7] in environment units; ``noise_seeds`` key each sample's flow noise by itself."""
        frames = FrameBatch.join([seen.frame for seen in observations])
        states = np.stack([seen.state_S for seen in observations])
        batch = PolicyBatch(
            **self._net.backbone.packer(frames.images_BVHWC, [seen.instruction for seen in observations]),
            proprio_BP=torch.from_numpy(self.card.normaliser.state.normalise(states)),
            **self._tokens(frames),
        ).to(self._device)
        noise = torch.stack([self._net.draw_noise(seed) for seed in noise_seeds])
        with self._net.autocast(self.card.mixed_precision):
            normalised = self._net.sample(batch, noise_BTA=noise).cpu().numpy()
        return np.clip(self.card.normaliser.denormalise_actions(normalised), -1.0, 1.0)

    def _tokens(self, frames: FrameBatch) -> dict[str, torch.Tensor]:
        """Fields of the batch: live tokens; masked ones without geometry; none for a policy that takes none."""
        if self._live is not None:
            return {"tokens_BVGD": self._live.tokens(frames)}
        if self.card.recipe is None:
            return {}
        shape = len(frames), *self.card.recipe.spec.row_shape
        return {"tokens_BVGD": torch.zeros(shape), "token_mask_BVG": torch.zeros(shape[:3], dtype=torch.bool)}


def noise_seed(seed: int, episode: str, query: int) -> int:
    """A seed for one query's flow noise, keyed on (seed, episode, query)."""
    key = hashlib.sha256(f"{seed}/{episode}/{query}".encode()).digest()
    return int.from_bytes(key[:8], "little") >> 1


def require_belief(what: str, believed: object, found: object) -> None:
    """Raise when the user states something about the checkpoint that is not so."""
    if believed is not None and believed != found:
        raise ContractMismatch(
            f"the checkpoint was trained with another {what}",
            expected=f"{found} (the checkpoint's)",
            found=f"{believed} (asked for)",
            fix=f"leave {what} out, or train a policy with it",
        )
