"""A server that speaks Redis's protocol: it asks a real Redis, or answers what a test tells it to. One event loop."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Self

import hiredis

from deploy.local.ports import LOOPBACK

Command = Sequence[bytes]
_CHUNK_BYTES = 65_536
_NOT_YET = object()


class RespStub:
    """Stands in front of a Redis. Change `answer`, `cut_after_bytes` and `loses` at any time; `heal` undoes them."""

    def __init__(self, target_port: int) -> None:
        """Ask the Redis on that port; nothing listens yet."""
        self.answer: Callable[[Command], bytes | None] = ask_redis
        self.cut_after_bytes: int | None = None
        self.loses: Callable[[Command], bool] = lambda _: False  # the reply of these commands: Redis has obeyed
        self.connections = 0
        self.port = 0
        self._target_port = target_port
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The value of RERANK_REDIS__URL."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def heal(self) -> None:
        """Answer what Redis answers."""
        self.answer, self.cut_after_bytes, self.loses = ask_redis, None, lambda _: False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        behind_reader, behind_writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._serve(reader, writer, behind_reader, behind_writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            behind_writer.transport.abort()

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        behind_reader: asyncio.StreamReader,
        behind_writer: asyncio.StreamWriter,
    ) -> None:
        commands = hiredis.Reader(notEnoughData=_NOT_YET)
        while chunk := await reader.read(_CHUNK_BYTES):
            commands.feed(chunk)
            while (command := commands.gets()) is not _NOT_YET:
                reply = self.answer(command)
                if reply is None:
                    behind_writer.write(packed(command))
                    reply = await _one_reply(behind_reader)
                if self.loses(command):
                    return
                if self.cut_after_bytes is not None and not is_greeting(command):
                    writer.write(reply[: self.cut_after_bytes])
                    await writer.drain()
                    return
                writer.write(reply)
                await writer.drain()


async def _one_reply(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes of one reply; one command is out at a time, so nothing follows it."""
    replies, data = hiredis.Reader(notEnoughData=_NOT_YET), b""
    while replies.gets() is _NOT_YET:
        chunk = await reader.read(_CHUNK_BYTES)
        if not chunk:
            raise ConnectionResetError("Redis closed the connection")
        replies.feed(chunk)
        data += chunk
    return data


def packed(command: Command) -> bytes:
    """Return a command as a client sends it."""
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in command)


def ask_redis(command: Command) -> None:
    """Answer nothing: Redis does."""


def is_greeting(command: Command) -> bool:
    """Tell whether a command is what a client says when it connects."""
    return bytes(command[0]).upper() in (b"HELLO", b"CLIENT", b"SELECT", b"AUTH", b"PING")


def saying(line: str) -> Callable[[Command], bytes | None]:
    """Return an `answer`: an error of this text to everything but a greeting."""
    return lambda command: None if is_greeting(command) else f"-{line}\r\n".encode()


# What a Redis says when it cannot serve, word for word: 6.2 wraps what a script runs into, 7 does not.
TROUBLES = {
    "loading": "LOADING Redis is loading the dataset in memory",
    "masterdown": "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "tryagain": "TRYAGAIN Multiple keys request during rehashing of slot",
    "clusterdown": "CLUSTERDOWN The cluster is down",
    "busy": "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "noreplicas": "NOREPLICAS Not enough good replicas to write.",
    "misconf": "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "oom": "OOM command not allowed when used memory > 'maxmemory'.",
    "oom in a script": "ERR Error running script (call to f_0): @user_script:39: @user_script: 39: "
    "-OOM command not allowed when used memory > 'maxmemory'.",
    "readonly": "READONLY You can't write against a read only replica.",
    "readonly in a script": "ERR Error running script (call to f_0): @user_script:39: @user_script: 39: "
    "-READONLY You can't write against a read only replica.",
    "noauth": "NOAUTH Authentication required.",
    "wrongpass": "WRONGPASS invalid username-password pair or user is disabled.",
    "noperm": "NOPERM this user has no permissions to run the 'mget' command",
    "moved": "MOVED 3999 127.0.0.1:1",
    "ask": "ASK 3999 127.0.0.1:1",
    "crossslot": "CROSSSLOT Keys in request don't hash to the same slot",
    "clients": "ERR max number of clients reached",
    "unheard of": "TOMORROW come back",
}
