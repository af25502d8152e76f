"""Rows of (pack, cache) pairs -> policy batches. The order of rows is a pure function of (seed, step).

The join is by row number and is checked before the first step: a cache belongs to exactly one pack digest.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache_schemas.contract import Contract
from geomcache.cache_schemas.errors import CacheStale, ConfigError, GeomcacheError
from geomcache.cache_schemas.manifest import TokenRecipe
from geomcache.cache_schemas.token_spec import ChannelStatistics
from geomcache.pipeline.interfaces import TokenCodec
from geomcache.pipeline.pack.reader import PackReader
from geomcache.pipeline.store.reader import CachedTokens, require_pack_of
from geomcache.pipeline.store.statistics import STATISTICS_ROWS, channel_statistics, even_rows, rows_in_blocks
from geomcache.pipeline.tokens import as_tensors
from geomcache.stages.train.batch import PolicyBatch
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.held_out import held_out_episodes
from geomcache.stages.train.normalise import Normaliser
from geomcache.stages.train.packer import Packer
from geomcache.stages.train.row_order import Rows, rows_of_step, shard_starts


class TrainingData:
    """All pairs as one run of rows."""

    def __init__(self, config: TrainConfig) -> None:
        if not config.data:
            raise ConfigError(
                "there is nothing to train on",
                expected="at least one data pair",
                fix="--pack PACK --cache CACHE, or `data` in the config",
            )
        self.packs = [PackReader(pair.pack) for pair in config.data]
        wants_tokens = config.policy.compressor != "none"
        self.caches = [
            CachedTokens(pair.cache, check=config.check_tokens) if wants_tokens and pair.cache is not None else None
            for pair in config.data
        ]
        self._check_join(config, wants_tokens)
        self.horizon = config.policy.dit.horizon
        self._starts = np.cumsum([0, *(len(pack) for pack in self.packs)])
        starts = shard_starts([(len(pack), pack.info.request.rows_per_shard) for pack in self.packs])
        self.rows = Rows(starts, self._held_out(config.validation_share))
        self._counted_N = np.concatenate([pack.counted_N for pack in self.packs])

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

    @property
    def validation_rows(self) -> NDArray[np.int64]:
        """Rows of the held-out episodes; may be none."""
        return np.flatnonzero(self.rows.held_out_N)

    @property
    def training_rows(self) -> NDArray[np.int64]:
        """All others."""
        return np.flatnonzero(~self.rows.held_out_N)

    def count_actions(self, rows: NDArray[np.int64]) -> int:
        """Actions that count in the chunks of ``rows``: the sum of their masks."""
        return int(np.minimum(self._counted_N[rows], self.horizon).sum())

    def keys(self, rows: NDArray[np.int64]) -> list[dict[str, object]]:
        """Where rows come from, for people: the frame's key and its place in the pack."""
        found = []
        for row in rows.tolist():
            pair, local = self.locate(row)
            pack = self.packs[pair]
            episode = pack.episodes[int(pack.episode_of_row[local])]
            found.append(
                {
                    "pack": str(pack.path),
                    "row": local,
                    "suite": episode.suite,
                    "task": episode.task,
                    "episode": episode.number,
                    "step": int(pack.step_of_row[local]),
                }
            )
        return found

    def _held_out(self, share: float) -> NDArray[np.bool_]:
        episodes = [(pair, one) for pair, pack in enumerate(self.packs) for one in pack.episodes]
        mask_N = np.zeros(len(self), dtype=bool)
        for number in held_out_episodes([one.task for _, one in episodes], share):
            pair, one = episodes[number]
            first = int(self._starts[pair]) + one.first_row
            mask_N[first : first + one.rows] = True
        if mask_N.all():
            raise ConfigError(
                "no episode is left to train on",
                expected="a smaller validation_share",
                found=str(share),
                fix="--set validation_share=0",
            )
        return mask_N

    def instructions(self) -> list[str]:
        """Every instruction, once."""
        firsts = ((pack, one.first_row) for pack in self.packs for one in pack.episodes)
        return sorted({pack.instruction(row) for pack, row in firsts})

    def states(self) -> NDArray[np.float32]:
        """Every row's state [N, 8]."""
        return np.concatenate([pack.states_NS for pack in self.packs])

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S, 7] the actions of every control step that belongs to one of ``rows``; what statistics are made of."""
        pairs = np.searchsorted(self._starts, rows, side="right") - 1
        return np.concatenate([pack.labels(rows[pairs == i] - self._starts[i]) for i, pack in enumerate(self.packs)])

    def locate(self, row: int) -> tuple[int, int]:
        """Row of the run -> (pair, row of the pack)."""
        pair = int(np.searchsorted(self._starts, row, side="right")) - 1
        return pair, int(row - self._starts[pair])

    def action_chunk(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The actions [T, 7] of the T control steps from ``row``'s own on, and which of them count [T]."""
        pair, local = self.locate(row)
        return self.packs[pair].action_chunk(local, self.horizon)

    @property
    def codec(self) -> TokenCodec:
        """Of the caches; there must be some."""
        assert self.caches[0] is not None
        return self.caches[0].codec

    def token_buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        """Room for the stored tokens of ``rows`` rows."""
        assert self.caches[0] is not None
        return self.caches[0].buffers(rows)

    def read_tokens(self, rows: NDArray[np.int64], out: dict[str, NDArray[Any]]) -> torch.Tensor | None:
        """Fill ``out`` with the stored tokens of ``rows``, pair after pair.

        Returns:
            int64 [B]: ``out``'s rows in the order asked for are ``out[inverse]``; None when that is their order.
        """
        places = np.array([self.locate(int(row)) for row in rows])
        order, start = np.argsort(places[:, 0], kind="stable"), 0
        for pair in np.unique(places[:, 0]):
            local = places[order][places[order][:, 0] == pair, 1].tolist()
            cache = self.caches[int(pair)]
            assert cache is not None
            cache.read_into(local, {name: array[start : start + len(local)] for name, array in out.items()})
            start += len(local)
        return None if len(self.caches) == 1 else torch.from_numpy(np.argsort(order, kind="stable"))

    def tokens(self, rows: NDArray[np.int64]) -> torch.Tensor | None:
        """Cached tokens of ``rows``: float32 [B, *spec.row_shape]."""
        if self.caches[0] is None:
            return None
        out = self.token_buffers(len(rows))
        inverse = self.read_tokens(rows, out)
        tokens = self.codec.decode(as_tensors(out))
        return tokens if inverse is None else tokens[inverse]

    def token_statistics(self) -> ChannelStatistics | None:
        """Mean and standard deviation of every channel: the spec's own, or over an even sample of rows."""
        if self.caches[0] is None:
            return None
        if self.caches[0].spec.channel_statistics is not None:
            return self.caches[0].spec.channel_statistics
        rows = even_rows(len(self), STATISTICS_ROWS)
        return channel_statistics(rows_in_blocks(lambda block: self._some_tokens(np.array(block)), rows))

    def _some_tokens(self, rows: NDArray[np.int64]) -> torch.Tensor:
        tokens = self.tokens(rows)
        assert tokens is not None
        return tokens

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
            require_pack_of(cache, pack)
            assert first_cache is not None
            differences = first_cache.spec.describe_difference(cache.spec)
            mine = cache.recipe.fingerprint.model_copy(update={"pack": first_cache.recipe.fingerprint.pack})
            if differences := differences + first_cache.recipe.fingerprint.describe_difference(mine):
                raise CacheStale(
                    f"the caches {config.data[0].cache} and {pair.cache} hold different tokens",
                    expected="one encoder with the same settings and weights for the whole run",
                    found="; ".join(differences),
                    fix=f"geomcache extract --pack {pair.pack} with the encoder of {config.data[0].cache}"
                    + (
                        f" and --statistics-from {config.data[0].cache}"
                        if first_cache.spec.channel_statistics is not None
                        else ""
                    ),
                )
        digests = [pack.info.digest for pack in self.packs]
        for pair, digest in zip(config.data, digests, strict=True):
            if digests.count(digest) > 1:  # its held-out episodes would be trained on through the other pair
                raise ConfigError(
                    f"the pack {pair.pack} is given more than once",
                    expected="each pack in one pair",
                    found=", ".join(str(one.pack) for one, d in zip(config.data, digests, strict=True) if d == digest),
                    fix="remove the repeated pair from `data`",
                )


class BatchMaker:
    """Rows -> PolicyBatch; as a map-style data set its index is the part of an optimiser step."""

    def __init__(
        self, data: TrainingData, packer: Packer, normaliser: Normaliser, config: TrainConfig, rank: int = 0
    ) -> None:
        self.data, self.batch_size = data, config.batch_size
        self._packer, self._normaliser, self._config, self._rank = packer, normaliser, config, rank

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a whole optimiser step, all ranks and accumulation parts."""
        config = self._config
        per_step = config.batch_size * config.processes * config.gradient_accumulation_steps
        return rows_of_step(config.seed, step, per_step, self.data.rows, config.row_order)

    def mean_action(self) -> NDArray[np.float32]:
        """[7], of the training rows, in the policy's units: the prediction that any policy must beat."""
        return np.asarray(self._normaliser.normalise_actions(self.data.labels(self.data.training_rows)).mean(axis=0))

    def first_sample(self, micro_step: int) -> int:
        """Which of the optimiser step's samples is the first of this rank's part."""
        part = micro_step % self._config.gradient_accumulation_steps
        return (part * self._config.processes + self._rank) * self._config.batch_size

    def micro_rows(self, micro_step: int) -> NDArray[np.int64]:
        """Rows of this rank's part of an optimiser step."""
        start = self.first_sample(micro_step)
        return self.rows(micro_step // self._config.gradient_accumulation_steps)[start : start + self.batch_size]

    def loss_weight(self, micro_step: int) -> float:
        """Of this part's loss, so that the mean over ranks and parts is that over the step's counted actions."""
        parts = self._config.gradient_accumulation_steps * self._config.processes
        rows, start = self.rows(micro_step // self._config.gradient_accumulation_steps), self.first_sample(micro_step)
        whole = self.data.count_actions(rows)
        return self.data.count_actions(rows[start : start + self.batch_size]) * parts / whole

    def __getitem__(self, micro_step: int) -> PolicyBatch | GeomcacheError:
        """For a loader process; a named error is handed over, since raised there it comes wrapped in a traceback."""
        try:
            return self.batch(self.micro_rows(micro_step), with_tokens=False, augment_for=micro_step)
        except GeomcacheError as problem:
            return problem

    def batch(
        self, rows: NDArray[np.int64], *, with_tokens: bool = True, augment_for: int | None = None
    ) -> PolicyBatch:
        """One batch of the given rows, with actions; in the loop its tokens come from a ``TokenFeed``.

        Images are augmented with the draws of the micro-step ``augment_for``; None: as they are.
        """
        places = [self.data.locate(int(row)) for row in rows]
        packs = self.data.packs
        images = self._images(places)
        if augment_for is not None:
            step, first = augment_for // self._config.gradient_accumulation_steps, self.first_sample(augment_for)
            images = self._config.augment.apply(images, seed=self._config.seed, step=step, first=first)
        instructions = [packs[pair].instruction(local) for pair, local in places]
        states = np.stack([packs[pair].states_NS[local] for pair, local in places])
        chunks = [self.data.action_chunk(int(row)) for row in rows]
        return PolicyBatch(
            **self._packer(images, instructions),
            proprio_BP=torch.from_numpy(self._normaliser.state.normalise(states)),
            tokens_BVGD=self.data.tokens(rows) if with_tokens else None,
            actions_BTA=torch.from_numpy(self._normaliser.normalise_actions(np.stack([a for a, _ in chunks]))),
            action_mask_BT=torch.from_numpy(np.stack([mask for _, mask in chunks])),
        )

    def _images(self, places: list[tuple[int, int]]) -> NDArray[np.uint8]:
        """[B, V, H, W, 3]; for a blind policy nothing is decoded."""
        if not self._packer.shows_images:
            return np.zeros((len(places), len(self.data.contract.cameras), 1, 1, 3), dtype=np.uint8)
        return np.concatenate([self.data.packs[pair].images([local]) for pair, local in places])
