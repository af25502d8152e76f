"""Rows of a pack -> full tokens, one encoder batch at a time; a row that cannot be read or encoded is found by number.

A batch that fails is tried again row by row, so that one poison frame is told from its neighbours. What then happens
is the user's choice: the run stops and names it, or its tokens are NaN (which training leaves out) and it is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from geomcache.cache_schemas.errors import GeomcacheError, InputError, PackDamaged
from geomcache.pipeline.encoding import encode_padded
from geomcache.pipeline.frames import FrameBatch
from geomcache.pipeline.interfaces import GeometryEncoder
from geomcache.pipeline.pack.reader import PackReader

OnError = Literal["stop", "mask"]


@dataclass
class Block:
    """One batch of rows on its way."""

    rows: Sequence[int]
    parts: list[FrameBatch]  # frames of the rows that could be read: one batch, or one row each
    bad: dict[int, str] = field(default_factory=dict)  # row -> what is wrong with it


class FramesToTokens:
    """The two steps of making tokens; each may run in threads of its own.

    Args:
        pack: open.
        encoder: loaded.
        on_error: "stop" raises for the first bad row, "mask" makes its tokens NaN.
    """

    def __init__(self, pack: PackReader, encoder: GeometryEncoder, on_error: OnError) -> None:
        self._pack, self._encoder, self._on_error = pack, encoder, on_error

    def decode(self, rows: Sequence[int]) -> Block:
        """Read and decode the frames of a batch.

        Raises:
            PackDamaged: a row's bytes are not those that were packed ("stop").
        """
        try:
            return Block(rows, [self._pack.frames(rows)])
        except PackDamaged:
            block = Block(rows, [])
        for row in rows:
            try:
                block.parts.append(self._pack.frames([row]))
            except PackDamaged as problem:
                if self._on_error == "stop":
                    raise
                block.bad[row] = f"{problem.what}: expected {problem.expected}, found {problem.found}"
        return block

    def encode(self, block: Block) -> torch.Tensor:
        """Tokens [rows, V, G, D] float32 on the CPU; NaN for the rows in ``block.bad``, to which it may add.

        What is no ``GeomcacheError`` (a broken device, a fault of the program) is no frame's fault and stays as it is.

        Raises:
            InputError: the encoder refuses a row, or makes no finite token of it ("stop"); the row is named. Or there
                is too little memory for a batch.
        """
        try:
            if len(block.parts) == 1 and not block.bad:
                try:
                    tokens = encode_padded(self._encoder, block.parts[0])
                    if _has_tokens(tokens).all():
                        return tokens
                except GeomcacheError:
                    pass  # some row is refused
                block.parts = [block.parts[0][place : place + 1] for place in range(len(block.rows))]
            return self._one_by_one(block)
        except torch.OutOfMemoryError as problem:
            raise InputError(
                "there is too little memory for a batch",
                found=str(problem).splitlines()[0],
                fix="a smaller --set encoder_config.batch_size (which makes another cache), or another device",
            ) from problem

    def _one_by_one(self, block: Block) -> torch.Tensor:
        tokens = torch.full((len(block.rows), *self._encoder.spec.row_shape), float("nan"))
        parts = iter(block.parts)
        for place, row in enumerate(block.rows):
            if row in block.bad:
                continue
            try:
                tokens[place] = encode_padded(self._encoder, next(parts))[0]
                if _has_tokens(tokens[place : place + 1]).all():
                    continue
                said = "no token is finite"
            except GeomcacheError as problem:
                said = str(problem)
            if self._on_error == "stop":
                raise InputError(
                    f"encoder {self._encoder.spec.encoder} fails on {self._name(row)}, also by itself",
                    found=said.replace("\n", " "),
                    fix="--on-error mask records such rows as invalid, and training leaves them out",
                )
            tokens[place] = float("nan")
            block.bad[row] = said.splitlines()[0]
        return tokens

    def _name(self, row: int) -> str:
        episode = self._pack.episodes[int(self._pack.episode_of_row[row])]
        where = f"{episode.suite}, {episode.task}, episode {episode.number}, step {self._pack.step_of_row[row]}"
        return f"row {row} of {self._pack.path} ({where})"


def _has_tokens(tokens_BVGD: torch.Tensor) -> torch.Tensor:
    """Whether anything of a row is finite, [B]; an encoder in half precision may overflow."""
    return tokens_BVGD.isfinite().flatten(1).any(dim=1)
