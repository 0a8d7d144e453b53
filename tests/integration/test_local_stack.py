"""The local stack: starts what is missing, says where it is, and always stops it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local import ApacheKafka, ApacheKafkaCluster, EmbeddedKafka, LocalStack, LocalStackError, RedisServer
from deploy.local.kafka_probe import ask_cluster
from deploy.local.server import PortTakenError

pytestmark = pytest.mark.integration

_UP = "import typer; from stream_app.commands.local import up; typer.run(up)"


def embedded(directory: Path) -> LocalStack:
    return LocalStack(directory, kafka="embedded", redis="local")


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@contextmanager
def client_of(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


def test_the_environment_names_the_servers_and_a_short_session_for_the_embedded_broker(tmp_path: Path) -> None:
    with embedded(tmp_path) as stack:
        assert stack.broker_kind == "embedded"
        assert stack.environment() == {
            "RERANK_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{stack.kafka.port}",
            "RERANK_REDIS__URL": f"redis://127.0.0.1:{stack.redis.port}/0",
            "RERANK_KAFKA__SESSION_TIMEOUT_MS": "3000",
            "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
        }


def test_servers_that_the_settings_point_at_are_used_and_are_not_ours(
    tmp_path: Path, local_stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "RERANK_KAFKA__BOOTSTRAP_SERVERS": local_stack.bootstrap_servers,
        "RERANK_REDIS__URL": local_stack.redis_url,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with LocalStack(tmp_path) as stack:
        assert stack.broker_kind == "given"
        assert stack.environment() == given
        with pytest.raises(LocalStackError, match="RERANK_KAFKA__BOOTSTRAP_SERVERS is set"):
            _ = stack.kafka
        with pytest.raises(LocalStackError, match="RERANK_REDIS__URL is set"):
            _ = stack.redis
    assert local_stack.kafka.is_running
    assert local_stack.redis.is_running


def test_an_exception_leaves_no_server_behind(tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError), embedded(tmp_path) as stack:  # noqa: PT012  what is under test is the exit
        pids = [stack.kafka.pid, stack.redis.pid]
        _ = 1 / 0
    assert [psutil.pid_exists(pid) for pid in pids] == [False, False]


def test_a_redis_that_cannot_start_takes_the_broker_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "redis-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no luck\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    before = children()
    with pytest.raises(LocalStackError, match=r"(?s)ended with exit code 7.*no luck"), embedded(tmp_path):
        pass
    assert children() == before


def test_paused_servers_are_stopped_like_others(tmp_path: Path) -> None:
    with embedded(tmp_path) as stack:
        pids = [stack.kafka.pid, stack.redis.pid]
        stack.kafka.pause()
        stack.redis.pause()
    assert [psutil.pid_exists(pid) for pid in pids] == [False, False]


def test_a_paused_redis_answers_after_it_is_resumed(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        server.pause()
        impatient = redis.Redis.from_url(server.url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
        with impatient, pytest.raises(redis.TimeoutError):
            impatient.ping()
        server.resume()
        with client_of(server) as client:
            assert client.ping() is True


@pytest.mark.parametrize("kind", [EmbeddedKafka, RedisServer])
def test_a_server_on_a_taken_port_is_refused(tmp_path: Path, kind: type[EmbeddedKafka] | type[RedisServer]) -> None:
    with kind(tmp_path) as first:
        second = kind(tmp_path)
        second.ports = first.ports
        with pytest.raises(PortTakenError, match="taken by another process"):
            second.start()
        assert first.is_running


class UnluckyRedis(RedisServer):
    """Chooses a port that is taken, then one that is free."""

    taken_port: int | None = None

    def choose_ports(self) -> list[int]:
        taken, self.taken_port = self.taken_port, None
        return [taken] if taken else super().choose_ports()


def test_a_port_that_somebody_took_is_replaced_by_another(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as first:
        second = UnluckyRedis(tmp_path)
        second.taken_port = first.port
        with second:
            assert second.port != first.port
            with client_of(second) as client:
                assert client.info("server")["process_id"] == second.pid


def test_redis_restarts_on_its_port_with_its_data(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        before = (server.port, server.pid)
        with client_of(server) as client:
            client.set("user", "state")
        server.restart(keep_data=True)
        with client_of(server) as client:
            assert client.get("user") == "state"
        assert server.port == before[0]
        assert server.pid != before[1]


@pytest.mark.parametrize("appendonly", [False, True])
def test_redis_restarts_empty_when_told_to(tmp_path: Path, appendonly: bool) -> None:
    with RedisServer(tmp_path, appendonly=appendonly) as server:
        with client_of(server) as client:
            client.set("user", "state")
        server.restart(keep_data=False)
        with client_of(server) as client:
            assert client.dbsize() == 0


def test_a_killed_redis_comes_back_empty(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with client_of(server) as client:
            client.set("user", "state")
        server.restart(keep_data=True)
        server.kill()
        server.start()
        with client_of(server) as client:
            assert client.dbsize() == 0


def test_a_killed_redis_rolls_back_to_its_snapshot(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with client_of(server) as client:
            client.set("user", "old")
            server.snapshot()
            client.set("user", "new")
        server.kill()
        server.start()
        with client_of(server) as client:
            assert client.get("user") == "old"


def test_redis_keeps_no_data_by_itself_and_never_evicts(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, client_of(server) as client:
        wanted = ("save", "appendonly", "maxmemory-policy", "bind")
        assert {name: client.config_get(name)[name] for name in wanted} == {
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
        }


def start_up(directory: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start `rerank up` as a process of its own; return it and its servers."""
    free = {name: value for name, value in os.environ.items() if not name.startswith("RERANK_")}
    free.pop("KAFKA_HOME", None)
    process = subprocess.Popen(
        [sys.executable, "-c", _UP, "--directory", str(directory), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=free | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None
    with process.stdout:
        assert '"event":"ready"' in process.stdout.readline()
    return process, psutil.Process(process.pid).children()


def gone(servers: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(servers, timeout=10)
    for server in alive:
        with suppress(psutil.NoSuchProcess):
            server.kill()
    return not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_its_servers_and_exits_zero_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    process, servers = start_up(tmp_path)
    assert len(servers) == 2
    process.send_signal(number)
    assert process.wait(20) == 0
    assert gone(servers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a child's life to its parent's")
def test_a_killed_parent_leaves_no_server_behind(tmp_path: Path) -> None:
    process, servers = start_up(tmp_path)
    assert len(servers) == 2
    process.kill()
    process.wait()
    assert gone(servers)


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        starter = threading.Thread(target=server.restart)
        starter.start()
        starter.join()
        with client_of(server) as client:
            assert client.info("server")["process_id"] == server.pid


@pytest.mark.kafka
def test_apache_kafka_restarts_on_its_port_with_its_cluster(tmp_path: Path, kafka_home: Path | None) -> None:
    with ApacheKafka(tmp_path, kafka_home, heap_megabytes=256) as broker:
        before = ask_cluster(broker.port).cluster_id
        broker.restart()
        assert ask_cluster(broker.port).cluster_id == before


@pytest.mark.kafka
def test_a_cluster_loses_a_node_and_takes_it_back(tmp_path: Path, kafka_home: Path | None) -> None:
    with ApacheKafkaCluster(tmp_path, kafka_home) as cluster:
        pids = [cluster.node(number).pid for number in (1, 2, 3)]
        assert len(cluster.bootstrap_servers.split(",")) == 3
        assert ask_cluster(cluster.node(1).port).node_ids == {1, 2, 3}
        cluster.kill(2)
        assert not cluster.node(2).is_running
        cluster.start(2)
        assert ask_cluster(cluster.node(2).port).node_ids == {1, 2, 3}
        pids.append(cluster.node(2).pid)
    assert not any(psutil.pid_exists(pid) for pid in pids)
