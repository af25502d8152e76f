"""What a pack will hold, known before a frame is decoded: which rows of which episodes, in which shard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from geomcache.cache_schemas.errors import ContractMismatch, InputError, SourceDamaged
from geomcache.cache_schemas.fingerprint import digest_bytes, digest_json
from geomcache.cache_schemas.layout import shard_count, shard_rows
from geomcache.cache_schemas.pack_info import EpisodeLeftOut, PackRequest
from geomcache.pipeline.frames import EpisodeHead
from geomcache.pipeline.interfaces import FrameSource
from geomcache.pipeline.no_ops import rows_kept

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
    steps: range  # steps of the packed episode

    @property
    def source_rows(self) -> NDArray[np.int64]:
        """The same rows as the source numbers them."""
        return self.planned.kept[self.steps.start : self.steps.stop]


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
    def _first_rows(self) -> NDArray[np.int64]:
        return np.array([episode.first_row for episode in self.episodes], dtype=np.int64)

    @cached_property
    def _request_digest(self) -> str:
        return digest_json(self.request.model_dump(mode="json"))

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
            [piece.planned.source, piece.planned.episode, piece.number, piece.steps.start, piece.source_rows.tolist()]
            for piece in self.pieces(shard)
        ]
        return digest_json([self._request_digest, shard, rows])


def make_plan(
    request: PackRequest,
    sources: Sequence[FrameSource],
    undecodable: Mapping[tuple[int, int], str],
    progress: Progress,
) -> PackPlan:
    """Look at every episode but its pictures.

    Args:
        request: of the pack.
        sources: in the request's order.
        undecodable: (source, episode) -> what was found, of those that turned out to be damaged while they were read.
        progress: told how many episodes were looked at.

    Raises:
        SourceDamaged: an episode is damaged or there twice, and the request does not say to skip it.
        InputError: nothing is left to pack.
    """
    building = _Building(request)
    total = sum(source.episode_count for source in sources)
    for number, source in enumerate(sources):
        for episode in range(source.episode_count):
            progress(building.seen, total, "episodes looked at")
            building.seen += 1
            if (number, episode) in undecodable:
                building.leave_out(number, episode, undecodable[number, episode], source.head(episode).where)
            else:
                building.add(number, source, episode)
    if not building.rows:
        raise InputError(
            "the sources hold no rows",
            expected="at least one episode of two steps",
            found="; ".join(f"{one.where}: {one.why}" for one in building.left_out[:3]) or "none",
            fix="give another SOURCE, or a weaker filter",
        )
    return PackPlan(request, tuple(building.episodes), tuple(building.left_out), building.no_op_rows)


class _Building:
    """A plan while episodes are added to it."""

    def __init__(self, request: PackRequest) -> None:
        self._request = request
        self._known: dict[str, str] = {}  # digest of an episode's actions -> where it is
        self.episodes: list[PlannedEpisode] = []
        self.left_out: list[EpisodeLeftOut] = []
        self.rows = self.no_op_rows = self.seen = 0

    def add(self, number: int, source: FrameSource, episode: int) -> None:
        try:
            head = source.head(episode)
            self._require_new(head, source)
        except SourceDamaged as problem:
            if not self._request.skip_damaged:
                raise
            self.leave_out(number, episode, problem.found, problem.what)
            return
        kept = np.arange(len(head))
        if self._request.no_ops is not None:
            if self._request.no_ops.success_only and not _succeeded(head):
                self.leave_out(number, episode, "it failed", head.where)
                return
            kept = rows_kept(head.actions_TA, self._request.no_ops.threshold)
            self.no_op_rows += len(head) - len(kept)
        if len(kept):
            self.episodes.append(PlannedEpisode(number, episode, head, self.rows, kept))
            self.rows += len(kept)

    def leave_out(self, number: int, episode: int, why: str, where: str) -> None:
        self.left_out.append(
            EpisodeLeftOut(source=number, episode=episode, where=_file_names(where), why=_file_names(why))
        )

    def _require_new(self, head: EpisodeHead, source: FrameSource) -> None:
        digest = digest_bytes(head.task.encode(), head.actions_TA.tobytes())
        if digest in self._known:
            raise SourceDamaged(
                f"{source.location}, {head.where}: the same demonstration is there twice",
                expected="every demonstration once",
                found=f"the actions of {self._known[digest]}",
                fix="leave one of them out, or go on without it: --on-error skip",
            )
        self._known[digest] = head.where


def _succeeded(head: EpisodeHead) -> bool:
    if head.succeeded is None:
        raise InputError(
            f"{head.where}: the data set does not say whether the episode succeeded",
            expected="rewards, dones or next.success, which the no-op filter's success_only reads",
            found="none of them",
            fix="--set no_ops.success_only=false (published no-noops sets hold successes only)",
        )
    return head.succeeded


def _file_names(text: str) -> str:
    """``text`` without the folders of this machine; a pack must not depend on where its sources lay."""
    return " ".join(word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in text.split(" "))


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
                fix="choose cameras of one size: --set source.cameras='[agentview]'",
            )
    for source in others:
        first.contract.require_same(
            source.contract,
            mine=first.location,
            theirs=source.location,
            fix="build one pack per convention (depth of one alone: --set source.depth=false)",
        )
