"""What a pack will hold, known before a frame is decoded: which rows of which episodes, in which shard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import ContractMismatch, InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_bytes, digest_json
from geomcache.cache_schemas.layout import shard_count, shard_rows
from geomcache.cache_schemas.pack_info import EpisodeLeftOut, PackRequest, PackSteps
from geomcache.pipeline.frames import EpisodeHead
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.no_ops import rows_kept
from geomcache.pipeline.pack.format import row_schema

Progress = Callable[[int, int, str], None]  # (done, in all, of what)


@dataclass(frozen=True)
class PlannedEpisode:
    """One line of episodes.arrow and where its rows come from."""

    source: int  # number in the request
    episode: int  # number in the source
    head: EpisodeHead
    first_row: int  # in the pack
    kept: NDArray[np.int64]  # [rows] rows of the source's episode, in order

    def __len__(self) -> int:
        return len(self.kept)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one episode inside one shard."""

    number: int  # of the episode in the pack
    planned: PlannedEpisode
    rows: range  # of the packed episode

    @property
    def source_rows(self) -> NDArray[np.int64]:
        """The same rows as the source numbers them."""
        return self.planned.kept[self.rows.start : self.rows.stop]


@dataclass(frozen=True)
class PackPlan:
    """Every row of the pack, in order."""

    request: PackRequest
    episodes: tuple[PlannedEpisode, ...]
    left_out: tuple[EpisodeLeftOut, ...]
    no_op_rows: int

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.episodes[-1].first_row + len(self.episodes[-1]) if self.episodes else 0

    @property
    def shards(self) -> int:
        """Shards in all; the last may be short."""
        return shard_count(self.rows, self.request.rows_per_shard)

    @cached_property
    def steps(self) -> PackSteps | None:
        """Of all episodes; None where every row is a control step and no source speaks of pushes."""
        heads = [episode.head for episode in self.episodes]
        perturbed = [int(head.perturbed_T.sum()) for head in heads if head.perturbed_T is not None]
        if heads[0].steps_per_row == 1 and not perturbed:
            return None
        total = sum(len(head.actions_TA) for head in heads)
        return PackSteps(per_row=heads[0].steps_per_row, total=total, perturbed=sum(perturbed) if perturbed else None)

    @cached_property
    def row_schema(self) -> pa.Schema:
        """Columns of rows.arrow."""
        return row_schema(self.request.contract, self.steps)

    @cached_property
    def _first_rows(self) -> NDArray[np.int64]:
        return np.array([episode.first_row for episode in self.episodes], dtype=np.int64)

    @cached_property
    def _request_digest(self) -> str:
        return digest_json(self.request.model_dump(mode="json", exclude={"skip_damaged"}))

    def pieces(self, shard: int) -> Iterator[Piece]:
        """The rows of one shard, episode by episode."""
        rows = shard_rows(shard, self.rows, self.request.rows_per_shard)
        number = int(np.searchsorted(self._first_rows, rows.start, side="right")) - 1
        while number < len(self.episodes) and self.episodes[number].first_row < rows.stop:
            planned = self.episodes[number]
            first = max(rows.start, planned.first_row) - planned.first_row
            last = min(rows.stop - planned.first_row, len(planned))
            yield Piece(number, planned, range(first, last))
            number += 1

    def shard_digest(self, shard: int) -> str:
        """Of everything that decides the shard's bytes; a shard with the same digest need not be made again."""
        rows = [
            [piece.planned.source, piece.planned.episode, piece.number, piece.rows.start, piece.source_rows.tolist()]
            for piece in self.pieces(shard)
        ]
        return digest_json([self._request_digest, shard, rows, self.row_schema.names])


class Planner:
    """Looks at every episode but its pictures, once; plans again when pictures turn out to be damaged."""

    def __init__(self, request: PackRequest, sources: Sequence[FrameSource], folders: Sequence[str]) -> None:
        """``folders``: of this machine; cut out of what is said about episodes, as a pack must not depend on them."""
        self._request, self._sources = request, sources
        self._folders = sorted(folders, key=len, reverse=True)
        self._heads: dict[tuple[int, int], EpisodeHead | SourceDamaged] = {}

    def plan(self, undecodable: Mapping[tuple[int, int], str], progress: Progress) -> PackPlan:
        """The pack without the episodes in ``undecodable``: (source, episode) -> what was found.

        Raises:
            SourceDamaged: an episode is damaged or there twice, and the request does not say to skip it.
            InputError: nothing is left to pack, or not all rows are equally many control steps apart.
        """
        known: dict[str, str] = {}  # digest of an episode's actions -> where it is
        episodes: list[PlannedEpisode] = []
        left_out: list[EpisodeLeftOut] = []
        rows = no_op_rows = 0
        for number, episode in self._each(progress):
            if (number, episode) in undecodable:  # first: a whole copy of it elsewhere is no repetition
                left_out.append(self._left_out(number, episode, undecodable[number, episode]))
                continue
            head = self._head(number, episode, known)
            if isinstance(head, SourceDamaged):
                if not self._request.skip_damaged:
                    raise head
                left_out.append(self._left_out(number, episode, one_line(head)))
            elif self._is_failure(head):
                left_out.append(self._left_out(number, episode, "it failed"))
            else:
                kept = self._rows_kept(head)
                no_op_rows += len(head) - len(kept)
                if len(kept):
                    episodes.append(PlannedEpisode(number, episode, head, rows, kept))
                    rows += len(kept)
                else:
                    left_out.append(self._left_out(number, episode, "nothing but no-ops"))
        if not rows:
            raise InputError(
                "the sources hold no rows",
                expected="at least one episode of two steps",
                found="; ".join(f"{one.where}: {one.why}" for one in left_out[:3]) or "none",
                fix="give another SOURCE, or a weaker filter",
            )
        self._require_common_steps([episode.head for episode in episodes])
        return PackPlan(self._request, tuple(episodes), tuple(left_out), no_op_rows)

    def _each(self, progress: Progress) -> Iterator[tuple[int, int]]:
        total, seen = sum(source.episode_count for source in self._sources), 0
        for number, source in enumerate(self._sources):
            for episode in range(source.episode_count):
                if (number, episode) not in self._heads:
                    progress(seen, total, "episodes looked at")
                seen += 1
                yield number, episode

    def _head(self, number: int, episode: int, known: dict[str, str]) -> EpisodeHead | SourceDamaged:
        """The episode's head, or what is wrong with it; a demonstration that is there twice is wrong too."""
        if (number, episode) not in self._heads:
            try:
                self._heads[number, episode] = self._sources[number].head(episode)
            except SourceDamaged as problem:
                self._heads[number, episode] = problem
        head = self._heads[number, episode]
        if isinstance(head, SourceDamaged):
            return head
        digest = digest_bytes(head.task.encode(), head.actions_TA.tobytes())
        if digest in known:
            return SourceDamaged(
                f"{self._sources[number].location}, {head.where}: the same demonstration is there twice",
                expected="every demonstration once",
                found=f"the actions of {known[digest]}",
                fix="leave one of them out, or go on without it: --on-error skip",
            )
        known[digest] = head.where
        return head

    def _require_common_steps(self, heads: Sequence[EpisodeHead]) -> None:
        first = heads[0]
        for head in heads:
            if head.steps_per_row != first.steps_per_row:
                raise InputError(
                    "the rows of the demonstrations are not equally many control steps apart",
                    expected=f"{first.steps_per_row}, as in {first.where}",
                    found=f"{head.steps_per_row} in {head.where}",
                    fix="build a pack of each kind, and train on both: they may be pairs of one run",
                )
            if self._request.no_ops is not None and (head.steps_per_row > 1 or head.perturbed_T is not None):
                raise InputError(
                    f"the no-op filter cannot be used on {head.where}",
                    expected="every control step observed, and none of them pushed: a row that is left out would take "
                    "the actions or the push with it",
                    found=f"rows {head.steps_per_row} control steps apart"
                    + (", pushes" if head.perturbed_T is not None else ""),
                    fix="leave out --drop-no-ops (no_ops: null)",
                )

    def _is_failure(self, head: EpisodeHead) -> bool:
        return self._request.no_ops is not None and self._request.no_ops.success_only and not _succeeded(head)

    def _rows_kept(self, head: EpisodeHead) -> NDArray[np.int64]:
        if self._request.no_ops is None:
            return np.arange(len(head))
        return rows_kept(head.actions_TA, self._request.no_ops.threshold)

    def _left_out(self, number: int, episode: int, why: str) -> EpisodeLeftOut:
        for folder in self._folders:
            why = why.replace(f"{folder}/", "")
        return EpisodeLeftOut(source=number, episode=episode, where=self._sources[number].where(episode), why=why)


def one_line(problem: SourceDamaged) -> str:
    """What is wrong, where, and what was expected, in one line."""
    return f"{problem.what} (expected: {problem.expected}; found: {problem.found})"


def _succeeded(head: EpisodeHead) -> bool:
    if head.succeeded is None:
        raise InputError(
            f"{head.where}: the data set does not say whether the episode succeeded",
            expected="rewards, dones or next.success, which the no-op filter's success_only reads",
            found="none of them",
            fix="--set no_ops.success_only=false (published no-noops sets hold successes only)",
        )
    return head.succeeded


def require_common_contract(sources: Sequence[FrameSource]) -> None:
    """Raise ``ContractMismatch`` unless all sources follow the conventions of the first, with views of one size."""
    first, *others = sources
    for source in sources:
        sizes = [f"{camera.name} {camera.height} x {camera.width}" for camera in source.contract.cameras]
        if len({(camera.height, camera.width) for camera in source.contract.cameras}) > 1:
            raise ContractMismatch(
                f"the cameras of {source.location} have different sizes",
                expected="one size for all views",
                found=", ".join(sizes),
                fix="choose cameras of one size: --set source.cameras='[agentview]' "
                "(lerobot: --set source.cameras.agentview=KEY)",
            )
    for source in others:
        first.contract.require_same(
            source.contract,
            mine=first.location,
            theirs=source.location,
            fix="choose the same cameras for all, leave the depth of HDF5 out (settings.depth: false), or build two "
            "packs; each source's own settings stand in YAML, see docs/data.md",
        )
