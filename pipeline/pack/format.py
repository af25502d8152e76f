"""Names and columns of a pack; writer and reader share them.

``shards/000000.tar``  WebDataset samples, key = row number, members ``<camera>.png`` (upright RGB),
                       ``<camera>.depth.npy`` (float32 metres), ``json`` (episode, step, instruction, action, state;
                       ``actions`` and ``perturbed`` where the index has them)
``rows.arrow``         one line per row: episode, step, state, action, camera matrices; members' offset, size, crc32c;
                       ``actions`` [k, 7] of packs whose rows are k > 1 control steps apart: of the row's own steps,
                       behind the episode's end the last one again; ``perturbed`` [k] of packs of pushed demonstrations
``episodes.arrow``     one line per episode: suite, task, instruction, first row, rows, metadata; ``steps`` for k > 1
``pack.json``          contract, sources, digests; written last
``README.md``          the data card
``.parts/``            while a pack is being built: each shard's part of rows.arrow
"""

from typing import Any

import pyarrow as pa

from geomcache.cache_schemas.contract import ACTION_DIM, STATE_DIM, Contract
from geomcache.cache_schemas.pack_info import PackSteps

PARTS_FOLDER = ".parts"


def part_name(shard: int) -> str:
    """Path of a shard's part of the index inside an unfinished pack."""
    return f"{PARTS_FOLDER}/{shard:06d}.arrow"


def shard_name(shard: int) -> str:
    """Path of a tar shard inside the pack."""
    return f"shards/{shard:06d}.tar"


def member_suffixes(contract: Contract) -> list[str]:
    """Member names of a sample behind its key, in stored order; images first, then depth."""
    images = [f"{name}.png" for name in contract.camera_names]
    depths = [f"{name}.depth.npy" for name in contract.camera_names] if contract.has_depth else []
    return [*images, *depths]


def row_schema(contract: Contract, steps: PackSteps | None) -> pa.Schema:
    """Columns of rows.arrow; lists are of fixed size so that each column is one flat buffer."""
    views, members = len(contract.cameras), len(member_suffixes(contract))
    fields: list[tuple[str, Any]] = [
        ("episode", pa.int32()),
        ("step", pa.int32()),
        ("state", pa.list_(pa.float32(), STATE_DIM)),
        ("action", pa.list_(pa.float32(), ACTION_DIM)),
        ("offset", pa.list_(pa.int64(), members)),
        ("size", pa.list_(pa.int64(), members)),
        ("crc32c", pa.list_(pa.uint32(), members)),
    ]
    if steps is not None and steps.per_row > 1:
        fields.append(("actions", pa.list_(pa.float32(), steps.per_row * ACTION_DIM)))
    if steps is not None and steps.perturbed is not None:
        fields.append(("perturbed", pa.list_(pa.uint8(), steps.per_row)))
    if contract.has_depth:
        fields += [
            ("intrinsics", pa.list_(pa.float64(), views * 9)),
            ("extrinsics", pa.list_(pa.float64(), views * 16)),
        ]
    return pa.schema(fields)


def episode_schema(steps: PackSteps | None) -> pa.Schema:
    """Columns of episodes.arrow."""
    fields: list[tuple[str, Any]] = [
        ("episode", pa.int32()),
        ("suite", pa.string()),
        ("task", pa.string()),
        ("number", pa.int32()),  # episode number within its task
        ("instruction", pa.string()),
        ("first_row", pa.int64()),
        ("rows", pa.int32()),
        ("metadata", pa.string()),  # JSON
    ]
    if steps is not None and steps.per_row > 1:
        fields.append(("steps", pa.int32()))  # control steps
    return pa.schema(fields)
