"""Rows of (pack, cache) pairs -> policy batches. The order of rows is a pure function of (seed, step).

The join is by row number and is checked before the first step: a cache belongs to exactly one pack digest.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import CacheStale, ConfigError, InputError
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.packer import Packer

_STATISTICS_ROWS = 2048  # rows from which token statistics are made, evenly spread


def rows_of_step(seed: int, step: int, batch_size: int, rows: int) -> NDArray[np.int64]:
    """The rows of global optimiser step ``step``: epoch after epoch, each a permutation keyed on (seed, epoch).

    Depends on nothing else, so a resumed run, any number of ranks and any number of workers see the same order.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // rows
    orders = {int(e): np.random.default_rng([seed, int(e)]).permutation(rows) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p % rows] for e, p in zip(epochs, positions, strict=True)], dtype=np.int64)


class TrainingData:
    """All pairs as one run of rows."""

    def __init__(self, config: TrainConfig) -> None:
        if not config.data:
            raise ConfigError(
                "there is nothing to train on",
                expected="at least one data pair",
                fix="--set data=[{pack: P}]",
            )
        self.packs = [PackReader(pair.pack) for pair in config.data]
        wants_tokens = config.policy.compressor != "none"
        self.caches = [
            CachedTokens(pair.cache) if wants_tokens and pair.cache is not None else None for pair in config.data
        ]
        self._check_join(config, wants_tokens)
        self.horizon = config.policy.dit.horizon
        self._starts = np.cumsum([0, *(len(pack) for pack in self.packs)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def contract(self) -> Contract:
        """Conventions of every pair."""
        return self.packs[0].info.contract

    @property
    def recipe(self) -> TokenRecipe | None:
        """How the tokens were made; None without geometry."""
        return self.caches[0].recipe if self.caches[0] is not None else None

    def states(self) -> NDArray[np.float32]:
        """Every row's state [N, 8]."""
        return np.concatenate([pack.states_NS for pack in self.packs])

    def actions(self) -> NDArray[np.float32]:
        """Every row's action [N, 7]."""
        return np.concatenate([pack.actions_NA for pack in self.packs])

    def locate(self, row: int) -> tuple[int, int]:
        """Row of the run -> (pair, row of the pack)."""
        pair = int(np.searchsorted(self._starts, row, side="right")) - 1
        return pair, int(row - self._starts[pair])

    def action_chunk(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The T actions from ``row`` on, and which of them lie inside the episode (the rest repeat the last)."""
        pair, local = self.locate(row)
        pack = self.packs[pair]
        episode = pack.episodes[int(pack.episode_of_row[local])]
        wanted = np.arange(local, local + self.horizon)
        end = episode.first_row + episode.rows
        return pack.actions_NA[np.minimum(wanted, end - 1)], wanted < end

    def tokens(self, rows: NDArray[np.int64]) -> torch.Tensor | None:
        """Cached tokens of ``rows``: float32 [B, V, G, D]."""
        if self.caches[0] is None:
            return None
        pieces = []
        for row in rows:
            pair, local = self.locate(int(row))
            cache = self.caches[pair]
            assert cache is not None
            pieces.append(cache.tokens([local]))
        return torch.cat(pieces)

    def token_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Per-channel mean and standard deviation [D] over an even sample of rows."""
        if self.caches[0] is None:
            return None
        dim = self.caches[0].spec.dim
        total, square, count = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64), 0
        for row in np.unique(np.linspace(0, len(self) - 1, min(len(self), _STATISTICS_ROWS)).astype(np.int64)):
            tokens = self.tokens(np.array([row]))
            assert tokens is not None
            values = tokens.double().flatten(0, 2)
            values = values[torch.isfinite(values).all(dim=-1)]
            total, square, count = total + values.sum(0), square + (values**2).sum(0), count + len(values)
        if count == 0:
            raise InputError("the cache holds no finite token", fix="geomcache cache verify CACHE")
        mean = total / count
        std = (square / count - mean**2).clamp(min=0).sqrt()
        return mean.float().numpy(), std.float().numpy()

    def _check_join(self, config: TrainConfig, wants_tokens: bool) -> None:
        first_pack, first_cache = self.packs[0], self.caches[0]
        for pair, pack, cache in zip(config.data, self.packs, self.caches, strict=True):
            first_pack.info.contract.require_same(
                pack.info.contract,
                mine=str(config.data[0].pack),
                theirs=str(pair.pack),
                fix="train on packs of one kind",
            )
            if not wants_tokens:
                continue
            if cache is None:
                raise ConfigError(
                    f"geom_compression_type {config.policy.geom_compression_type!r} reads a token cache",
                    expected=f"a cache for the pack {pair.pack}",
                    found="none",
                    fix=f"geomcache extract --pack {pair.pack} --encoder NAME --out CACHE, then --cache CACHE",
                )
            if cache.recipe.fingerprint.pack != pack.info.digest:
                raise CacheStale(
                    f"the cache {pair.cache} was made from another pack",
                    expected=f"pack digest {pack.info.digest[:16]} ({pair.pack})",
                    found=f"pack digest {cache.recipe.fingerprint.pack[:16]}",
                    fix=f"geomcache extract --pack {pair.pack} --encoder {cache.spec.encoder} --out NEW_CACHE",
                )
            assert first_cache is not None
            differences = first_cache.spec.describe_difference(cache.spec)
            mine = cache.recipe.fingerprint.model_copy(update={"pack": first_cache.recipe.fingerprint.pack})
            if differences := differences + first_cache.recipe.fingerprint.describe_difference(mine):
                raise CacheStale(
                    f"the caches {config.data[0].cache} and {pair.cache} hold different tokens",
                    expected="one encoder with the same settings and weights for the whole run",
                    found="; ".join(differences),
                    fix=f"geomcache extract --pack {pair.pack} with the encoder of {config.data[0].cache}",
                )


class BatchMaker:
    """Rows -> PolicyBatch; as a map-style data set its index is the optimiser step (so workers keep the order)."""

    def __init__(
        self, data: TrainingData, packer: Packer, normaliser: Normaliser, config: TrainConfig, rank: int = 0
    ) -> None:
        self._data, self._packer, self._normaliser, self._config, self._rank = (
            data,
            packer,
            normaliser,
            config,
            rank,
        )

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a whole optimiser step, all ranks and accumulation parts."""
        config = self._config
        per_step = config.batch_size * config.processes * config.gradient_accumulation_steps
        return rows_of_step(config.seed, step, per_step, len(self._data))

    def normalise_actions(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Environment units -> the policy's units, [..., 7]."""
        return self._normaliser.action.normalise(actions)

    def __getitem__(self, micro_step: int) -> PolicyBatch:
        config = self._config
        step, part = divmod(micro_step, config.gradient_accumulation_steps)
        rows = self.rows(step)
        start = (part * config.processes + self._rank) * config.batch_size
        return self.batch(rows[start : start + config.batch_size])

    def batch(self, rows: NDArray[np.int64]) -> PolicyBatch:
        """One batch of the given rows, with actions."""
        places = [self._data.locate(int(row)) for row in rows]
        packs = self._data.packs
        images = np.concatenate([packs[pair].images([local]) for pair, local in places])
        instructions = [packs[pair].instruction(local) for pair, local in places]
        states = np.stack([packs[pair].states_NS[local] for pair, local in places])
        chunks = [self._data.action_chunk(int(row)) for row in rows]
        return PolicyBatch(
            **self._packer(images, instructions),
            proprio_BP=torch.from_numpy(self._normaliser.state.normalise(states)),
            tokens_BVGD=self._data.tokens(rows),
            actions_BTA=torch.from_numpy(self._normaliser.action.normalise(np.stack([a for a, _ in chunks]))),
            action_mask_BT=torch.from_numpy(np.stack([mask for _, mask in chunks])),
        )
