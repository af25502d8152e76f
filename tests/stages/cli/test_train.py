"""``geomcache train`` under rubbish: each fault by name, exit 2, one message, nothing claimed in --out."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from accelerate.state import AcceleratorState

from geomcache.stages.cli import app
from geomcache.stages.cli import train as module
from geomcache.stages.train import metrics
from geomcache.stages.train.checkpoint import checkpoints_of, load_policy, read_card
from tests.conftest import TASK, build_pack_at, extract_without_ray, write_demo_file

SETTINGS = (
    *("policy.dit.width=32", "policy.dit.blocks=2", "policy.dit.heads=2", "policy.dit.future_tokens=2"),
    *("policy.repeated_diffusion_steps=1", "policy.backbone.config.image_size=28", "policy.geom_dit_tokens=4"),
    *("batch_size=2", "open_loop_rows=4", "save_every=2", "warmup_steps=1", "trackers=[]", "device=cpu"),
)


class Said(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The whole command, in this process: from its arguments to its exit code."""

    def run(*arguments: object, sets: tuple[str, ...] = ()) -> Said:
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = [part for text in sets for part in ("--set", text)]
        monkeypatch.setattr("sys.argv", ["geomcache", *map(str, arguments), *settings])
        with pytest.raises(SystemExit) as ending:
            app.main()
        return Said(int(ending.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def train(command: Command, pack_path: Path, caches: dict[str, Path], tmp_path: Path) -> Command:
    """``geomcache train`` for six steps on the tiny pack, into tmp_path/run."""

    def run(*more: object, sets: tuple[str, ...] = (), cache: Path | None = caches["oracle_pointmap"]) -> Said:
        data = ["--pack", pack_path, *(["--cache", cache] if cache else [])]
        base = ["train", *data, "--out", tmp_path / "run", "--steps", 6]
        return command(*base, *more, sets=(*SETTINGS, *sets))

    return run


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Call a function after every optimiser step, with the number of steps done."""

    def watch(each: Callable[[int], None]) -> None:
        @contextmanager
        def bar(*_: Any, **__: Any) -> Iterator[Callable[..., None]]:
            yield lambda done, *_: each(done)

        monkeypatch.setattr(module, "progress_bar", bar)

    return watch


def flip(path: Path, place: int = 20) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def refused(said: Said, *texts: str) -> None:
    assert said.code == 2, said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert [line[:6] for line in said.err.splitlines() if not line.startswith("  ")] == ["error:"]
    for text in texts:
        assert text in said.err


def misused(said: Said, text: str) -> None:
    """Options that contradict each other: typer's own way of saying so, in a box."""
    assert (said.code, said.out) == (2, "")
    assert text in " ".join(said.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("sets", "texts"),
    [
        (("stepz=3",), ("unknown key 'stepz'", "did you mean 'steps'")),
        (("policy.dit.widht=3",), ("did you mean 'width'",)),
        (("policy.geom_compression.heads=2",), ("compressor pool: unknown key 'heads'",)),
        (("policy.geom_dit_tokens=33",), ("1 to 32 (2 views x 16 tokens)",)),
        (("policy.dit.heads=5",), ("multiple of dit.heads",)),
        (("policy.vlm_layers=[9, 9]",), ("2 ascending layer numbers between 1 and 4",)),
        (("policy.backbone.config.base_vlm=/nowhere/vlm",), ("base_vlm '/nowhere/vlm' cannot be read",)),
        (("policy.backbone.config.image_size=30",), ("multiple of 28",)),
        (("policy.backbone.config.dtype=bfloat16",), ("mixed_precision=bf16",)),
        (("mapanything_model_path=some/weights",), ("was not made by MapAnything", "oracle_pointmap")),
        (("learning_rate.head=.nan",), ("'learning_rate.head' has a wrong value", "finite")),
        (("policy.backbone.config.max_prompt_tokens=5",), ("the prompt for", "at most 5 tokens")),
        (("validation_share=1",), ("'validation_share' has a wrong value", "less than 1")),
        (("trackers=[tensorbord]",), ("'trackers.0' has a wrong value", "'tensorboard'")),
        (("processes=0",), ("'processes' has a wrong value",)),
        (("steps",), ("--set steps cannot be read",)),
    ],
)
def test_a_wrong_setting(train: Command, tmp_path: Path, sets: tuple[str, ...], texts: tuple[str, ...]) -> None:
    refused(train(sets=sets), *texts)
    assert not (tmp_path / "run").exists()


def test_what_is_not_there(train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs, a tracker's package, a VLM in the folder, other ranks, a compressor, the pack of a cache."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refused(train(sets=("device=cuda",)), "device cuda cannot be used", "0 CUDA devices")
    monkeypatch.setattr(metrics, "get_available_trackers", lambda: ["tensorboard"])
    refused(train(sets=("trackers=[wandb]",)), "tracker wandb is not installed", "pip install wandb")
    refused(train(sets=(f"policy.backbone.config.base_vlm={tmp_path}",)), "no config.json in it")
    refused(train("--compressor", "pol"), "no compressor named 'pol'", "did you mean 'pool'")
    monkeypatch.setenv("RANK", "0")  # as if accelerate had launched it, but alone
    refused(train("--processes", 2), "2 (processes)", "1 running")
    assert not (tmp_path / "run").exists()


def test_a_cache_that_is_not_this_packs_or_not_whole(
    train: Command, command: Command, pack_path: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    refused(train(cache=None), "reads a token cache", "geomcache extract")
    refused(train(cache=tmp_path / "none"), "there is no token cache at")
    misused(command("train", "--cache", caches["oracle_pointmap"], "--out", tmp_path / "run"), "add --pack PACK")
    other = build_pack_at(write_demo_file(tmp_path / f"{TASK}_demo.hdf5", seed=8), tmp_path / "pack")
    foreign = extract_without_ray(other, "oracle_pointmap", tmp_path / "foreign")
    refused(train(cache=foreign), "was made from another pack")
    cache = tmp_path / "cache"
    shutil.copytree(caches["oracle_pointmap"], cache)
    flip(cache / "tokens/c/1/0/0/0")  # met when statistics are taken, before the first step
    refused(train(cache=cache), "row 8 of the cache", "fails its checksum", "--repair")
    (cache / "tokens/c/1/0/0/0").unlink()
    refused(train(cache=cache), "tokens/c/1/0/0/0 is missing", "--repair")
    (cache / "commits/000001.json").unlink()
    refused(train(cache=cache), "is not finished", "continues with the missing shards")
    pooled = extract_without_ray(pack_path, "oracle_pointmap", tmp_path / "pooled", pool=4)
    refused(train("--compressor", "qformer", cache=pooled), "'qformer' reads every token", "pooled to 4")
    refused(train(cache=pooled, sets=("policy.geom_dit_tokens=2",)), "--set policy.geom_dit_tokens=4")
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_something_elses(train: Command, pack_path: Path, tmp_path: Path) -> None:
    before = sorted(pack_path.rglob("*"))
    refused(train("--out", pack_path), "already holds something else")
    assert sorted(pack_path.rglob("*")) == before
    (tmp_path / "file").write_text("x")
    refused(train("--out", tmp_path / "file"), "is a file")
    refused(train("--out", tmp_path / "file" / "run"), "a file stands where a folder is needed")


def test_a_cache_that_no_arm_reads_is_said(train: Command, caches: dict[str, Path], tmp_path: Path) -> None:
    said = train("--compressor", "none", "--steps", 1, "--json")
    assert said.code == 0
    assert f"compressor none reads no geometry: {caches['oracle_pointmap']} is not used" in said.err
    assert json.loads(said.out)["steps"] == 1
    assert read_card(checkpoints_of(tmp_path / "run")[-1]).recipe is None


def test_a_finished_run_a_changed_one_and_a_newer_one(train: Command, tmp_path: Path) -> None:
    first = train("--json")
    result = json.loads(first.out)
    assert (first.code, result["steps"]) == (0, 6)
    assert first.err.splitlines() == ["validated on no episode: validation_share 0.05 of them is less than one"]
    again = train("--json")
    assert json.loads(again.out) == result
    assert "finished already" in again.err
    changes = ("policy.dit.width=64", "gripper=leave", "learning_rate.head=1e-5", "ema_decay=null", "seed=3")
    refused(
        train("--steps", 8, sets=(*changes, "save_every=3", "log_every=1")),
        *("policy.dit.width: 32 != 64", "gripper: 'binarise' != 'leave'", "learning_rate.head: 0.001 != 1e-05"),
        *("ema_decay: 0.999 != None", "seed: 0 != 3", "steps: 6 != 8"),
    )
    assert "save_every" not in train("--steps", 8, sets=("save_every=3",)).err
    card = checkpoints_of(tmp_path / "run")[-1] / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "schema_version": 99}))
    refused(train(), "card.json was written by a newer geomcache", "99")
    (tmp_path / "run" / "result.json").unlink()
    refused(train(), "card.json was written by a newer geomcache")


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.pt", "ema.safetensors"])
def test_a_damaged_checkpoint_and_the_one_before_it(train: Command, tmp_path: Path, name: str) -> None:
    whole = json.loads(train("--json").out)
    (tmp_path / "run" / "result.json").unlink()
    last = checkpoints_of(tmp_path / "run")[-1]
    flip(last / name, 300)
    refused(train(), f"{name} is damaged", f"delete {last}")
    shutil.rmtree(last)
    assert json.loads(train("--json").out) == whole


def test_damage_met_while_training_is_named_and_what_is_saved_stays(
    train: Command, caches: dict[str, Path], tmp_path: Path, watched: Callable[..., None]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(caches["oracle_pointmap"], cache)
    shards = [cache / f"tokens/c/{shard}/0/0/0" for shard in range(4)]

    def damage(done: int) -> None:
        if done == 2:
            for shard in shards:
                flip(shard)

    watched(damage)
    refused(train("--steps", 30, cache=cache), "fails its checksum", "--repair")
    saved = checkpoints_of(tmp_path / "run")
    assert saved
    assert not list((tmp_path / "run").rglob("*.partial"))
    load_policy(saved[-1], read_card(saved[-1]))
    for shard in shards:
        flip(shard)
    watched(lambda _: None)
    assert train("--steps", 30, cache=cache).code == 0


def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    train: Command, tmp_path: Path, watched: Callable[..., None]
) -> None:
    """The system refuses to let files grow, as a full disk would; in the end it is as if nothing had happened."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int) -> None:
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))

    watched(fill)
    try:
        refused(train(), "step_00000004 could not be written", "make room", "the same command")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run = tmp_path / "run"
    assert [path.name for path in checkpoints_of(run)] == ["step_00000002"]
    assert not list(run.rglob("*.partial"))
    watched(lambda _: None)
    assert train().code == 0
    assert train("--out", tmp_path / "undisturbed").code == 0
    ends = [checkpoints_of(out)[-1] / "policy.safetensors" for out in (run, tmp_path / "undisturbed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_ctrl_c_saves_and_a_second_one_does_not_wait(
    train: Command, tmp_path: Path, watched: Callable[..., None]
) -> None:
    watched(lambda done: os.kill(os.getpid(), signal.SIGINT) if done == 3 else None)
    once = train()
    assert (once.code, once.out) == (130, "")
    assert once.err.splitlines() == ["stopped by SIGINT after step 3; saved, the same command continues"]
    assert checkpoints_of(tmp_path / "run")[-1].name == "step_00000003"

    def impatient(done: int) -> None:
        for _ in range(2 if done == 5 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    watched(impatient)
    twice = train()
    assert twice.code == 130
    assert "the same command continues" in twice.err
    assert "Traceback" not in twice.err
    assert checkpoints_of(tmp_path / "run")[-1].name == "step_00000004"
    watched(lambda _: None)
    assert train().code == 0


def test_describe_under_rubbish(command: Command, tmp_path: Path) -> None:
    refused(command("train", "--describe", "--cache", tmp_path), "there is no token cache")
    refused(command("train", "--describe", sets=("policy.dit.widht=3",)), "did you mean 'width'")
    refused(command("train", "--describe", sets=("policy.geom_dit_tokens=3000",)), "1 to 512")
    refused(command("train", "--describe", "--config", "train/pol"), "no configuration train/pol", "train/pool")
    misused(command("train", "--describe", "--ablation", "none,pool"), "leave --compressor and --describe out")


def test_a_report_shows_what_was_held_out(train: Command, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "pool"
    assert train("--out", out, sets=("validation_share=0.34", "validate_every=2")).code == 0
    assert "validation" in (out / "metrics.jsonl").read_text()
    said = command("report", tmp_path / "runs", "--json")
    assert said.code == 0, said.err
    assert [policy["name"] for policy in json.loads(said.out)["policies"]] == ["pool"]
    assert "data:image/png;base64" in (tmp_path / "runs" / "report.html").read_text()
