"""The policy server, spoken to by a client written here and by vla-eval's own: what the policy itself would say."""

import asyncio
import base64
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed, InvalidStatus

from geomcache.cache_schemas.errors import GeomcacheError, InputError
from geomcache.pipeline.frames import FrameBatch, Observation
from geomcache.stages.cli.app import app
from geomcache.stages.evaluate.live_policy import LivePolicy, noise_seed
from geomcache.stages.evaluate.serve.config import ServeConfig, load_served_policy
from geomcache.stages.evaluate.serve.server import PolicyServer
from geomcache.stages.train.config import TrainConfig
from geomcache.stages.train.run import run as train
from tests.conftest import SIDE, nothing
from tests.policy_client import TEXT, Client, Refused, Served, as_sent, seen

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def runs(pack_path: Path, caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One step of training: a policy without geometry, and one on each encoder's tokens."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name, cache in {"none": None, **caches}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {
            "out": folder / name,
            "data": [{"pack": pack_path, "cache": cache}],
            "policy": {
                "geom_compression_type": "pool" if cache else "none",
                "geom_dit_tokens": 4,
                "dit": {"width": 32, "blocks": 2, "heads": 2},
                "backbone": {"config": {"image_size": 28}},
            },
            "steps": 1,
            "batch_size": 2,
            "open_loop_rows": 4,
            "trackers": [],
            "device": "cpu",
        }
        train(TrainConfig.model_validate(settings), nothing)
    return {name: folder / name for name in ("none", *caches)}


@pytest.fixture(scope="module")
def policy(runs: dict[str, Path]) -> LivePolicy:
    return LivePolicy(runs["depth_anything3"], "cpu")


def test_an_episode_is_what_the_policy_itself_would_do(policy: LivePolicy) -> None:
    """Images turned upright, noise keyed as ``geomcache eval`` keys it, three actions executed per query."""
    with Served(policy) as served, Client(served) as client:
        client.send("hello", {"harness_version": "x", "protocol_version": 1, "benchmark": "b"})
        told = client.receive()
        assert told["observation_params"] == {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
        for episode in (5, 6):
            client.begin(episode)
            actions = np.stack([client.act(seen(step)[0]) for step in range(7)])
            for query, step in enumerate((0, 3, 6)):
                seed = noise_seed(7, f"libero_object/3/{episode}", query)
                expected_TA = policy.act([seen(step)[1]], [seed])[0]
                np.testing.assert_allclose(actions[step : step + 3], expected_TA[:3][: 7 - step], atol=1e-6)
            client.send("episode_end", {"metrics": {"success": False}, "steps": 7})
        health = served.health()
        assert (health["status"], health["encoder"], health["step"]) == ("ok", "depth_anything3", 1)
        assert (health["clients"], health["queries"]) == (1, 6)
        assert health["contract"]["cameras"][1]["name"] == "robot0_eye_in_hand"
    assert len(served.log) == 1
    assert "2 episodes, 14 observations, 6 queries" in served.log[0]
    assert served.log[0].endswith("left")


class Slow:
    """The policy, slow enough that clients wait for each other."""

    def __init__(self, policy: LivePolicy) -> None:
        self._policy, self.card, self.checkpoint = policy, policy.card, policy.checkpoint
        self.batches: list[int] = []

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> NDArray[np.float32]:
        time.sleep(0.1)
        self.batches.append(len(observations))
        return self._policy.act(observations, seeds)


def test_eight_clients_at_once_are_answered_together_and_as_each_alone(policy: LivePolicy) -> None:
    slow = Slow(policy)

    def play(served: Served, number: int) -> NDArray[np.float32]:
        with Client(served) as client:
            client.begin(number)
            return np.stack([client.act(seen(100 * number + step)[0]) for step in range(4)])

    with Served(slow, max_batch=5) as served:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda number: play(served, number), range(8)))
        assert max(slow.batches) == 5
        assert len(slow.batches) < 10  # 16 queries
        for number, actions in enumerate(together):
            np.testing.assert_allclose(actions, play(served, number), atol=1e-5)


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in seen(0)[0].items() if name != key}


RUBBISH: list[tuple[Any, str]] = [
    (b"\xc1", "not MessagePack"),
    (b"\x91" * 100_000, "not MessagePack"),
    ("hello", "a text message"),
    (("hello", {"protocol_version": 2}), "another version of the protocol"),
    (("action", {}), "is not sent messages of type action"),
    (("observation", {}), "no images"),
    (("observation", _without("states")), "lacks the robot's state"),
    (("observation", _without("task_description")), "lacks the instruction"),
    (("observation", seen(0)[0] | {"images": {"agentview": as_sent(np.zeros((SIDE, SIDE, 3), "u1"))}}), "image wrist"),
    (("observation", seen(0)[0] | {"states": as_sent(np.full(8, np.nan))}), "not finite"),
    (("observation", seen(0)[0] | {"states": as_sent(np.full(8, 1e300))}), "not finite"),
    (("observation", seen(0)[0] | {"states": as_sent(np.zeros(9))}), "another shape or type"),
    (("observation", seen(0)[0] | {"task_description": "see <|image_pad|>"}), "holds an image token"),
    (("observation", seen(0)[0] | {"task_description": "word " * 103}), "lacks the instruction"),
]


def test_who_sends_rubbish_is_told_why_and_closed_and_nobody_else_notices(policy: LivePolicy) -> None:
    with Served(policy, max_message_mb=0.5) as served, Client(served) as good:
        good.begin(0)
        for number, (rubbish, said) in enumerate(RUBBISH):
            with Client(served) as bad:
                bad.begin(0)
                if isinstance(rubbish, tuple):
                    bad.send(*rubbish)
                else:
                    bad.connection.send(rubbish)
                with pytest.raises(Refused) as refused:
                    bad.receive()
                assert said in str(refused.value)
                assert "Traceback" not in str(refused.value)
                with pytest.raises(ConnectionClosed) as closed:
                    bad.connection.recv(10)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1008
            assert np.isfinite(good.act(seen(number)[0])).all()
        with Client(served) as early, pytest.raises(Refused, match="before an episode"):
            early.act(seen(0)[0])
        with Client(served) as large:
            large.connection.send(bytes(600_000))
            with pytest.raises(ConnectionClosed) as closed:
                large.connection.recv(10)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
        assert np.isfinite(good.act(seen(99)[0])).all()
    assert len(served.log) == len(RUBBISH) + 3
    assert all("\n" not in line for line in served.log)


def test_one_bad_observation_in_a_batch_does_not_cost_the_others_their_answer(policy: LivePolicy) -> None:
    with Served(Slow(policy)) as served:

        def ask(number: int) -> NDArray[np.float32] | str:
            text = "see <|image_pad|>" if number == 2 else TEXT
            with Client(served) as client:
                client.begin(number)
                try:
                    return client.act(seen(number)[0] | {"task_description": text})
                except Refused as problem:
                    return str(problem)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(4)))
    assert "holds an image token" in str(answers[2])
    assert all(isinstance(answers[number], np.ndarray) for number in (0, 1, 3))


def test_a_failing_policy_is_told_to_the_log_not_to_the_client(policy: LivePolicy) -> None:
    class Failing(Slow):
        def act(self, *_: object) -> NDArray[np.float32]:
            raise RuntimeError("secret detail")

    with Served(Failing(policy)) as served, Client(served) as client:
        client.begin(0)
        with pytest.raises(Refused) as refused:
            client.act(seen(0)[0])
        assert str(refused.value).startswith("the policy failed")
        assert "secret" not in str(refused.value)
    assert "RuntimeError: secret detail" in served.log[0]


def test_a_client_that_leaves_in_mid_query_and_one_that_idles(policy: LivePolicy) -> None:
    with Served(Slow(policy), idle_seconds=1.0) as served:
        leaver, cut = Client(served), Client(served)
        for client in (leaver, cut):
            client.begin(0)
            client.send("observation", seen(0)[0])
        leaver.connection.close()
        cut.connection.socket.close()  # no closing handshake
        with Client(served) as good:
            good.begin(0)
            assert np.isfinite(good.act(seen(0)[0])).all()
            with pytest.raises(Refused, match="idle for 1 s"):
                good.receive()
        assert served.health()["clients"] == 0
    assert len(served.log) == 3


def test_limits_and_tokens_are_held_before_the_handshake(policy: LivePolicy) -> None:
    def basic(password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    with Served(policy, token=TOKEN, max_clients=2) as served:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        wrong = ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}, basic("x"), basic(""))
        for headers in (*wrong, {"Authorization": "Basic ?"}, {"Authorization": "Bearer "}):
            with pytest.raises(InvalidStatus) as refused:
                Client(served, additional_headers=headers)
            assert refused.value.response.status_code == 401
        with pytest.raises(urllib.error.HTTPError, match="401") as no_health:
            served.health()
        no_health.value.close()
        assert served.health(**bearer)["clients"] == 0
        with pytest.raises(InvalidStatus) as refused:
            Client(served, additional_headers=bearer, origin="http://127.0.0.1")
        assert refused.value.response.status_code == 403
        first = Client(served, additional_headers=bearer)
        with Client(served, additional_headers=basic(TOKEN)):
            with pytest.raises(InvalidStatus) as refused:
                Client(served, additional_headers=bearer)
            assert refused.value.response.status_code == 503
            first.connection.close()
            with Client(served, additional_headers=bearer) as third:
                third.send("hello", {"protocol_version": 1})
                assert third.receive()["model_server"] == "geomcache"


@pytest.mark.parametrize(
    ("run", "changes", "said"),
    [
        ("none", {"host": "0.0.0.0"}, "GEOMCACHE_TOKEN"),
        ("none", {"host": ""}, "GEOMCACHE_TOKEN"),
        ("none", {"host": "example.org"}, "GEOMCACHE_TOKEN"),
        ("none", {"token": "short"}, "at least 16"),
        ("none", {"execute_steps": 99}, "execute_steps"),
        ("none", {"without_geometry": True}, "no geometry to leave out"),
        ("nowhere", {}, "no checkpoint"),
        ("oracle_pointmap", {}, "oracle_pointmap cannot be served"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    runs: dict[str, Path], tmp_path: Path, run: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(GeomcacheError, match=said):
        load_served_policy(ServeConfig.model_validate({"run": runs.get(run, tmp_path), "device": "cpu", **changes}))


def test_an_encoder_that_needs_depth_is_served_with_its_geometry_masked(runs: dict[str, Path]) -> None:
    config = ServeConfig(run=runs["oracle_pointmap"], device="cpu", without_geometry=True)
    with Served(load_served_policy(config), without_geometry=True) as served, Client(served) as client:
        client.begin(0)
        assert np.isfinite(client.act(seen(0)[0])).all()
        assert served.health()["encoder"] is None


def test_the_command_ends_cleanly_when_it_is_told_to(runs: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shown = {}

    def end_it() -> None:
        for _ in range(200):
            time.sleep(0.05)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    shown.update(json.load(answer))
                break
            except urllib.error.URLError:
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_it)
    thread.start()
    words = ["serve", str(runs["none"]), "--port", str(port), "--json", "--set", "device=cpu"]
    result = CliRunner().invoke(app, words)
    thread.join()
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["url"] == f"ws://127.0.0.1:{port}"
    assert result.stderr.endswith("stopped\n")
    assert shown["encoder"] is None


def test_a_port_that_is_taken_is_named(policy: LivePolicy) -> None:
    config = ServeConfig(run=Path("unused"))
    with Served(policy) as served:
        server = PolicyServer(policy, config.model_copy(update={"port": served.port}), nothing)
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {served.port}"):
            asyncio.run(server.run(nothing, asyncio.Event()))


def test_the_real_client_is_content(policy: LivePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """vla-eval's own connection, codec and comparison of specs; its token travels in the address."""
    pytest.importorskip("vla_eval", reason="pip install --no-deps vla-eval==0.8.0")
    for name, value in (("EGL_PLATFORM", "device"), ("PYOPENGL_PLATFORM", "egl")):
        monkeypatch.setenv(name, value)  # importing its benchmark sets them for good
    from vla_eval.benchmarks.libero import LIBEROBenchmark
    from vla_eval.connection import Connection
    from vla_eval.specs import DimSpec, check_specs

    rng = np.random.default_rng(3)
    pixels = {name: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    sent = {"images": pixels, "states": np.zeros(8), "task_description": TEXT}

    async def play(port: int) -> list[NDArray[np.float32]]:
        async with Connection(f"ws://me:{TOKEN}@127.0.0.1:{port}") as client:
            benchmark = LIBEROBenchmark(**client.server_info["observation_params"])
            ours = [
                {name: DimSpec.from_dict(spec) for name, spec in client.server_info[kind].items()}
                for kind in ("action_spec", "observation_spec")
            ]
            theirs = benchmark.get_action_spec(), benchmark.get_observation_spec()
            assert check_specs(ours[0], theirs[0], ours[1], theirs[1]) == []
            await client.start_episode({"task": {"suite": "libero_object", "task_id": 3, "episode_idx": 0}})
            actions = [(await client.act(sent))["actions"] for _ in range(3)]
            await client.end_episode({"metrics": {"success": True}})
            with pytest.raises(RuntimeError, match="before an episode"):
                await client.act(sent)
            return actions

    with Served(policy, token=TOKEN) as served:
        actions = asyncio.run(play(served.port))
    images = np.stack([pixels[name][:, ::-1] for name in ("agentview", "wrist")])[None]
    mine = Observation(FrameBatch(images), np.zeros(8, np.float32), TEXT)
    expected_TA = policy.act([mine], [noise_seed(7, "libero_object/3/0", 0)])[0]
    np.testing.assert_allclose(np.stack(actions), expected_TA[:3], atol=1e-6)
