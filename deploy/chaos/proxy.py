"""A TCP proxy on loopback that can be told to be slow, silent, broken or cut. One event loop, no threads."""

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from deploy.local.ports import LOOPBACK

_CHUNK_BYTES = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What a proxy does to every connection that lives or begins while it lasts.

    `latency_ms`: each chunk of either direction comes so much later. `silent`: nothing passes, connections stay open.
    `drop_replies`: questions pass, answers vanish. `cut_after_bytes`: a connection is reset in the middle of an answer,
    after so many bytes of answers. `refuse`: connections are reset as soon as they are made.
    """

    latency_ms: float = 0.0
    silent: bool = False
    drop_replies: bool = False
    cut_after_bytes: int | None = None
    refuse: bool = False


NO_TROUBLE = Trouble()


class Proxy:
    """Forwards `port` to `target`. Caller: one event loop, which alone calls every method."""

    def __init__(self, name: str) -> None:
        """Name it for reports; nothing listens yet."""
        self.name = name
        self.port = 0
        self.target_port = 0
        self._server: asyncio.Server | None = None
        self._trouble = NO_TROUBLE
        self._passes = asyncio.Event()
        self._passes.set()
        self._connections: set[_Connection] = set()

    @property
    def address(self) -> str:
        """The `host:port` that clients use."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen on a free port; set `target_port` before the first client comes."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more and reset what is open."""
        if self._server is not None:
            self._server.close()
        self._passes.set()
        self.reset()
        await asyncio.gather(*(connection.ended.wait() for connection in list(self._connections)))

    def make(self, trouble: Trouble) -> None:
        """Treat every connection like this from now on."""
        self._trouble = trouble
        if trouble.silent:
            self._passes.clear()
        else:
            self._passes.set()
        if trouble.refuse:
            self.reset()

    def heal(self) -> None:
        """Make no more trouble; connections that lost bytes are reset, for they can never make sense again."""
        spoilt = self._trouble.drop_replies
        self.make(NO_TROUBLE)
        for connection in list(self._connections):
            if spoilt or connection.half_closed:
                connection.reset()

    def reset(self) -> None:
        """Reset every open connection (RST), as a firewall that lost its table does."""
        for connection in list(self._connections):
            connection.reset()

    def half_close(self) -> None:
        """End the answers of every open connection (FIN to the client); its questions still pass."""
        for connection in list(self._connections):
            connection.half_close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            if not self._trouble.refuse:
                await connection.run()
        finally:
            connection.reset()
            self._connections.discard(connection)
            connection.ended.set()

    async def admit(self) -> Trouble:
        """Return the trouble to be made, once something may pass at all."""
        while True:
            await self._passes.wait()
            trouble = self._trouble
            if trouble.latency_ms:
                await asyncio.sleep(trouble.latency_ms / 1000.0)
            if self._passes.is_set():
                return trouble


class _Connection:
    """Two pumps. Ends when both directions have ended or one fails."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.half_closed = False
        self.ended = asyncio.Event()
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._answered_bytes = 0
        self._writers = [writer]
        self._pumps: asyncio.Future[tuple[None, None]] | None = None

    async def run(self) -> None:
        with suppress(OSError, asyncio.CancelledError):
            await self._proxy.admit()
            answers, questions = await asyncio.open_connection(LOOPBACK, self._proxy.target_port, limit=_CHUNK_BYTES)
            self._writers.append(questions)
            self._pumps = asyncio.gather(self._ask(questions), self._answer(answers))
            await self._pumps

    async def _ask(self, writer: asyncio.StreamWriter) -> None:
        while chunk := await self._reader.read(_CHUNK_BYTES):
            await self._proxy.admit()
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            trouble = await self._proxy.admit()
            if self.half_closed or trouble.drop_replies:
                continue
            if trouble.cut_after_bytes is not None:
                chunk = chunk[: max(0, trouble.cut_after_bytes - self._answered_bytes)]
            self._writer.write(chunk)
            await self._writer.drain()
            self._answered_bytes += len(chunk)
            if trouble.cut_after_bytes is not None and self._answered_bytes >= trouble.cut_after_bytes:
                raise ConnectionResetError("cut in the middle of an answer")
        if not self.half_closed:
            self._writer.write_eof()

    def half_close(self) -> None:
        if not self.half_closed and self._writer.can_write_eof():
            self.half_closed = True
            with suppress(OSError):
                self._writer.write_eof()

    def reset(self) -> None:
        for writer in self._writers:
            _reset(writer)
        if self._pumps is not None:
            self._pumps.cancel()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, discarding what was not sent."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and not writer.transport.is_closing():
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
