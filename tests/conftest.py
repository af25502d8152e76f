"""Shared, tiny, real inputs: an HDF5 file in the official layout written with plain h5py, its pack, its caches."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from geomcache.configs.schema import PackConfig
    from geomcache.pipeline.frames import EpisodeHead, EpisodeRows
    from geomcache.pipeline.interfaces import FrameSource

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray replaces pytest's handler of fatal signals by one whose report is lost: a crash would end the run without a word.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

CAMERAS = ("agentview", "eye_in_hand")  # as the official files call them
SIDE = 28  # pixels
LENGTHS = (9, 12, 7)  # recorded steps per demonstration; each gives one row less
TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two threads on shared cores are many times slower


def nothing(*_: Any) -> None:
    """A progress callback that shows nothing."""


def write_demo_file(path: Path, *, depth: bool = True, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """An official-layout file by independent code: images are smooth and differ per step, actions follow the state."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "Pick the alphabet soup"})
        data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/libero_object/{TASK}.bddl"
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo.attrs["seed"] = number
            obs = demo.create_group("obs")
            obs["ee_states"] = rng.normal(size=(length, 6))
            obs["gripper_states"] = rng.normal(size=(length, 2)) * 0.04
            for camera in CAMERAS:
                obs[f"{camera}_rgb"] = rng.integers(0, 256, (length, SIDE, SIDE, 3), dtype=np.uint8)
                if depth:
                    obs[f"{camera}_depth"] = rng.uniform(0.9, 1.0, (length, SIDE, SIDE, 1)).astype(np.float32)
                    k = np.array([[30.0, 0, SIDE / 2], [0, 30.0, SIDE / 2], [0, 0, 1]])
                    obs[f"{camera}_intrinsics"] = np.tile(k, (length, 1, 1))
                    obs[f"{camera}_extrinsics"] = np.tile(np.eye(4), (length, 1, 1))
            if depth:
                demo.attrs["depth_near"], demo.attrs["depth_far"] = 0.01, 50.0
                base = np.eye(4)
                base[:3, 3] = (-0.66, 0.0, 0.9)
                demo.attrs["robot_base_pose"] = base.ravel()
    return path


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One official-layout file with depth."""
    return write_demo_file(tmp_path_factory.mktemp("demos") / f"{TASK}_demo.hdf5")


def pack_config(*sources: Path, out: Path, **settings: Any) -> "PackConfig":
    """Settings of ``pack build`` as its command line gives them."""
    from geomcache.configs.schema import PackConfig

    return PackConfig.model_validate({"sources": sources, "out": out, "rows_per_shard": 8, **settings})


def whole(source: "FrameSource", episode: int) -> "tuple[EpisodeHead, EpisodeRows]":
    """Head and every row of one episode."""
    head = source.head(episode)
    return head, source.read(episode, 0, len(head))


def build_pack_at(source: Path, out: Path, rows_per_shard: int = 8) -> Path:
    """Pack ``source`` as the command does."""
    from geomcache.stages.cli.pack import build_from

    build_from(pack_config(source, out=out, rows_per_shard=rows_per_shard), nothing)
    return out


@pytest.fixture(scope="session")
def pack_path(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pack: 25 rows in 4 shards."""
    return build_pack_at(demo_file, tmp_path_factory.mktemp("packs") / "pack")


ENCODERS: dict[str, dict[str, Any]] = {
    "oracle_pointmap": {"grid": [4, 4], "batch_size": 3},
    "depth_anything3": {"model": "tiny", "process_size": [28, 28], "batch_size": 3},
}


def extract_without_ray(
    pack: Path,
    encoder: str,
    out: Path,
    *,
    codec: str | None = None,
    pool: int | None = None,
    statistics_from: str | None = None,
    **settings: Any,
) -> Path:
    """A complete cache, made by the same worker class in this process."""
    from geomcache.stages.extract.plan import ExtractConfig, begin, make_plan
    from geomcache.stages.extract.worker import ShardWorker

    config = ExtractConfig(
        pack=pack,
        out=out,
        encoder=encoder,
        encoder_config={**ENCODERS[encoder], **settings},
        codec=codec,
        pool=pool,
        statistics_from=statistics_from,
        device="cpu",
    )
    plan = begin(make_plan(config))
    worker = ShardWorker(pack, out, plan.manifest, plan.device)
    for shard in plan.remaining:
        worker.run(shard)
    worker.close()
    return out


@pytest.fixture(scope="session")
def caches(pack_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One complete cache per encoder."""
    folder = tmp_path_factory.mktemp("caches")
    torch.set_num_threads(1)
    return {name: extract_without_ray(pack_path, name, folder / name) for name in ENCODERS}
