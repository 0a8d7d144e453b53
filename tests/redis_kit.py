"""Redis as operators run it: with TLS and an ACL user, behind Sentinel, as a cluster. For tests, on loopback."""

import asyncio
import contextlib
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, cast

import redis

from deploy.local.ports import LOOPBACK, free_ports
from deploy.local.redis import RedisServer

USER, PASSWORD = "rerank", "canary-7f3a"
OPERATORS = Path(__file__).resolve().parents[1] / "docs" / "operators.md"
# The line with which an operator creates the user of a worker, and the commands in it.
(ACL_LINE,) = re.findall(r"^    (ACL SETUSER .*)$", OPERATORS.read_text(), re.MULTILINE)
COMMANDS = re.findall(r" \+(\S+)", ACL_LINE)


def permit(address: str, *, commands: Sequence[str] = COMMANDS, keys: str = "*") -> None:
    """Create the user of a worker, with these commands."""
    host, port = address.split(":")
    with redis.Redis(host=host, port=int(port)) as admin:
        rules = [
            "reset",
            "on",
            f">{PASSWORD}",
            f"~{keys}",
            "resetchannels",
            "-@all",
            *(f"+{name}" for name in commands),
        ]
        admin.execute_command("ACL", "SETUSER", USER, *rules)


class Certificates:
    """A certificate authority of our own, and a server certificate for the loopback address. Needs openssl."""

    def __init__(self, directory: Path) -> None:
        """Create both."""
        self.directory = directory
        self.ca = directory / "ca.pem"
        self._key("ca")
        self._openssl("req", "-x509", "-new", "-key", "ca.key", "-subj", "/CN=test", "-days", "2", "-out", "ca.pem")
        self.sign("server", valid=True)

    def sign(self, name: str, *, valid: bool) -> tuple[Path, Path]:
        """Return certificate and key of a server; `valid=False`: of one whose time is over."""
        self._key(name)
        self._openssl("req", "-new", "-key", f"{name}.key", "-subj", "/CN=localhost", "-out", f"{name}.csr")
        (self.directory / "index.txt").write_text("")
        (self.directory / "serial").write_text("01\n")
        (self.directory / "ca.cnf").write_text(_CA_CONFIG)
        period = ("20200101000000Z", "20200102000000Z" if not valid else "20490101000000Z")
        self._openssl(
            "ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key", "-in", f"{name}.csr",
            "-out", f"{name}.pem", "-startdate", period[0], "-enddate", period[1], "-notext",
        )  # fmt: skip
        return self.directory / f"{name}.pem", self.directory / f"{name}.key"

    def _key(self, name: str) -> None:
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self.directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


_CA_CONFIG = """
[ca]
default_ca = here
[here]
dir = .
database = index.txt
new_certs_dir = .
serial = serial
default_md = sha256
policy = anything
x509_extensions = names
unique_subject = no
[anything]
commonName = supplied
[names]
subjectAltName = IP:127.0.0.1, DNS:localhost
"""


class TlsTerminator:
    """TLS in front of a server that speaks none: the wheel's Redis is built without it. A thread of its own."""

    def __init__(self, server: RedisServer, certificate: Path, key: Path) -> None:
        """Listen on a free port once entered."""
        self._server = server
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self.port = free_ports(1)[0]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, LOOPBACK, self.port, ssl=self._context)

    async def _close(self) -> None:
        self._listener.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection(LOOPBACK, self._server.port)
        try:
            await asyncio.gather(_pump(reader, behind_writer), _pump(behind_reader, writer))
        finally:
            for one in (behind_writer, writer):
                one.close()
                with contextlib.suppress(OSError):
                    await one.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class RedisProcess(RedisServer):
    """A Redis with more words on its command line."""

    def __init__(self, directory: Path, words: Callable[[int], Sequence[str]]) -> None:
        """`words(port)` come last."""
        super().__init__(directory)
        self._words = words

    def command(self) -> list[str]:
        return [*super().command(), *self._words(self.port)]


class Sentinels:
    """A primary, a replica, and three sentinels that fail over after a second."""

    service = "rows"

    def __init__(self, directory: Path) -> None:
        """Start them; the replica is in step when this returns."""
        self.primary = RedisServer(directory)
        self.primary.start()
        address = (LOOPBACK, str(self.primary.port))
        self.replica = RedisProcess(directory, lambda _: ["--replicaof", *address, "--repl-diskless-sync-delay", "0"])
        self.replica.start()
        self.sentinels = [_Sentinel(directory, self.service, self.primary.port) for _ in range(3)]
        for sentinel in self.sentinels:
            sentinel.start()
        eventually(lambda: self._info(self.replica)["master_link_status"] == "up")
        eventually(lambda: all(sentinel.knows() == (1, 2) for sentinel in self.sentinels))

    @property
    def url(self) -> str:
        """The value of RERANK_REDIS__URL."""
        hosts = ",".join(sentinel.address for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.service}"

    def stop(self) -> None:
        for server in (*self.sentinels, self.replica, self.primary):
            server.stop()

    def fail_over(self) -> None:
        """Demote the primary and promote the replica, as an operator would."""
        with redis.Redis(host=LOOPBACK, port=self.sentinels[0].port) as connection:
            connection.execute_command("SENTINEL", "FAILOVER", self.service)

    def is_primary(self, server: RedisServer) -> bool:
        """Tell whether a server takes writes."""
        return self._info(server)["role"] == "master"

    @staticmethod
    def _info(server: RedisServer) -> dict[str, object]:
        with redis.Redis(host=LOOPBACK, port=server.port) as connection:
            return dict(connection.info("replication"))


class _Sentinel(RedisServer):
    def __init__(self, directory: Path, service: str, primary_port: int) -> None:
        super().__init__(directory)
        self._service, self._primary_port = service, primary_port

    def command(self) -> list[str]:
        path = self.directory / "sentinel.conf"
        if not path.exists():
            path.write_text(
                f"port {self.port}\nbind {LOOPBACK}\ndir {self.directory}\n"
                f"sentinel monitor {self._service} {LOOPBACK} {self._primary_port} 2\n"
                f"sentinel down-after-milliseconds {self._service} 1000\n"
                f"sentinel failover-timeout {self._service} 5000\n"
            )
        return [self._program, str(path), "--sentinel"]

    def is_ready(self) -> bool:
        try:
            with redis.Redis(host=LOOPBACK, port=self.port) as connection:
                return bool(connection.ping())
        except redis.ConnectionError as error:
            raise ConnectionError(str(error)) from None

    def knows(self) -> tuple[int, int]:
        """Return how many replicas and other sentinels it knows."""
        with redis.Redis(host=LOOPBACK, port=self.port) as connection:
            found = connection.execute_command("SENTINEL", "MASTER", self._service)
        pairs = found if isinstance(found, dict) else dict(zip(found[::2], found[1::2], strict=True))
        told = {str(key, "ascii") if isinstance(key, bytes) else key: value for key, value in pairs.items()}
        return int(told["num-slaves"]), int(told["num-other-sentinels"])


class Cluster:
    """Three masters, each with a third of the slots, and on demand a replica behind each."""

    def __init__(self, directory: Path, *, with_replicas: bool = False) -> None:
        """Start them; all slots are served, and replicas are in step, when this returns."""
        self.nodes = [ClusterServer(directory) for _ in range(3)]
        self.replicas = [ClusterServer(directory) for _ in self.nodes if with_replicas]
        for node in self._all():
            node.start()
        bounds = [0, 5461, 10923, 16384]
        for node, start, end in zip(self.nodes, bounds[:-1], bounds[1:], strict=True):
            node.call("CLUSTER", "ADDSLOTS", *range(start, end))
        for node in self._all():
            for other in self._all():
                if other is not node:
                    node.call("CLUSTER", "MEET", LOOPBACK, other.port)
        eventually(lambda: all(node.sees_cluster(len(self._all())) for node in self._all()))
        for node, replica in zip(self.nodes, self.replicas, strict=False):
            replica.call("CLUSTER", "REPLICATE", node.id)
        eventually(lambda: all(replica.is_in_step() for replica in self.replicas))

    @property
    def url(self) -> str:
        """The value of RERANK_REDIS__URL."""
        return "redis+cluster://" + ",".join(node.address for node in self.nodes)

    def stop(self) -> None:
        for node in self._all():
            node.stop()

    def _all(self) -> list["ClusterServer"]:
        return [*self.nodes, *self.replicas]

    def move_slot(self, slot: int, source: "ClusterServer", target: "ClusterServer", pause_s: float) -> None:
        """Move a slot key by key, as `redis-cli --cluster reshard` does; for `pause_s` its keys are on both nodes."""
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        paused = False
        while keys := cast("list[bytes]", source.call("CLUSTER", "GETKEYSINSLOT", slot, 1)):
            source.call("MIGRATE", LOOPBACK, target.port, "", 0, 5_000, "KEYS", *keys)
            if not paused:
                time.sleep(pause_s)
                paused = True
        for node in (target, source, *self.nodes):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", target.id)


class ClusterServer(RedisServer):
    """One node of a cluster."""

    def choose_ports(self) -> list[int]:
        # Redis 6 puts the cluster bus at the port + 10000, which must exist.
        return [next(port for port in (free_ports(1)[0] for _ in range(1_000)) if port < 55_000)]

    def command(self) -> list[str]:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0"]
        return [*super().command(), *options]

    @property
    def id(self) -> str:
        """Its name among the nodes."""
        return bytes(cast("bytes", self.call("CLUSTER", "MYID"))).decode()

    def call(self, *words: object) -> object:
        """Send one command, as an operator would."""
        with redis.Redis(host=LOOPBACK, port=self.port, socket_timeout=10) as connection:
            return connection.execute_command(*words)

    def is_primary(self) -> bool:
        """Tell whether it serves slots."""
        return self._replication()["role"] == "master"

    def is_in_step(self) -> bool:
        """Tell whether it is a replica that has all its primary had."""
        found = self._replication()
        return found["role"] == "slave" and found["master_link_status"] == "up"

    def _replication(self) -> dict[str, object]:
        with redis.Redis(host=LOOPBACK, port=self.port, socket_timeout=10) as connection:
            return dict(connection.info("replication"))

    def sees_cluster(self, nodes: int) -> bool:
        """Tell whether all slots are served, as far as this node knows `nodes` of them."""
        with redis.Redis(host=LOOPBACK, port=self.port) as connection:
            told = connection.execute_command("CLUSTER", "INFO")
        lines = (told if isinstance(told, bytes) else str(told).encode()).split()
        wanted = {b"cluster_state:ok", f"cluster_known_nodes:{nodes}".encode(), b"cluster_slots_ok:16384"}
        return wanted <= set(lines)


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until something holds."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, f"not in {timeout_s} s"
        time.sleep(0.05)
