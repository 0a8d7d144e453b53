"""A Redis server of our own."""

import shutil
from pathlib import Path
from typing import ClassVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local.ports import LOOPBACK
from deploy.local.programs import find_redis_program
from deploy.local.server import LocalServer

_SNAPSHOT = "dump.rdb"
_APPEND_ONLY_PREFIX = "appendonly"


class RedisServer(LocalServer):
    """Redis on loopback: memory only unless `appendonly`, never evicts."""

    name = "redis"
    ready_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path, *, appendonly: bool = False) -> None:
        """Find the program and create the folder.

        Raises:
            LocalStackError: no Redis program on this machine.
        """
        self._program = find_redis_program()
        self._appendonly = appendonly
        super().__init__(directory)

    @property
    def url(self) -> str:
        """The value of `RERANK_REDIS__URL`."""
        return f"redis://{self.address}/0"

    def command(self) -> list[str]:
        """Return the command line."""
        options = {
            "--port": str(self.port),
            "--bind": LOOPBACK,
            "--dir": str(self.directory),
            "--save": "",
            "--appendonly": "yes" if self._appendonly else "no",
            "--maxmemory-policy": "noeviction",
            "--daemonize": "no",
        }
        return [self._program, *(word for pair in options.items() for word in pair)]

    def is_ready(self) -> bool:
        """Return whether it answers, has loaded its data, and is the process that we started."""
        try:
            with self._client() as client:
                server = client.info()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise ConnectionError(str(error)) from None
        return server["process_id"] == self.pid and not server["loading"]

    def snapshot(self) -> None:
        """Write the data to disk: the next start loads them, however old they are by then."""
        with self._client() as client:
            client.save()

    def restart(self, *, keep_data: bool = True) -> None:
        """Stop and start on the same port, with the data of this moment or with none."""
        if keep_data and self.is_running and not self._appendonly:
            self.snapshot()
        self.stop()
        if not keep_data:
            self._forget()
        self.start()
        if keep_data and not self._appendonly:
            (self.directory / _SNAPSHOT).unlink(missing_ok=True)  # else a later start would roll back to it

    def _forget(self) -> None:
        for path in self.directory.iterdir():
            if path.name == _SNAPSHOT or path.name.startswith(_APPEND_ONLY_PREFIX):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _client(self) -> "redis.Redis":
        return redis.Redis(
            host=LOOPBACK,
            port=self.port,
            socket_timeout=5,
            socket_connect_timeout=1,
            retry=Retry(NoBackoff(), 0),
        )
