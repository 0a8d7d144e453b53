"""The proxy does to connections what its troubles say, and nothing when it makes none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from deploy.chaos.proxy import Proxy, Trouble

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echo() -> AsyncIterator[Proxy]:
    """Yield a proxy in front of a server that answers every chunk with itself."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                writer.write(chunk)
                await writer.drain()
        writer.transport.abort() if reader.exception() else writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    proxy = Proxy("echo")
    proxy.target_port = server.sockets[0].getsockname()[1]
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
        server.close()


@asynccontextmanager
async def connect(proxy: Proxy) -> AsyncIterator[Streams]:
    """Yield a connection through the proxy."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(streams: Streams, question: bytes) -> bytes:
    streams[1].write(question)
    return await streams[0].readexactly(len(question))


async def silence(streams: Streams) -> bool:
    """Tell whether nothing comes for a moment."""
    try:
        await asyncio.wait_for(streams[0].read(1), 0.1)
    except TimeoutError:
        return True
    return False


async def test_without_trouble_bytes_pass_unchanged() -> None:
    big = bytes(range(256)) * 4_000
    async with echo() as proxy, connect(proxy) as streams:
        assert await ask(streams, big) == big


async def test_the_end_of_a_client_reaches_the_server_and_comes_back() -> None:
    async with echo() as proxy, connect(proxy) as (reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() == b"last words"


async def test_what_a_silent_proxy_holds_back_comes_after_healing() -> None:
    async with echo() as proxy, connect(proxy) as streams:
        assert await ask(streams, b"before") == b"before"
        proxy.make(Trouble(silent=True))
        streams[1].write(b"held")
        assert await silence(streams)
        proxy.heal()
        assert await streams[0].readexactly(4) == b"held"


async def test_a_reset_ends_open_connections_and_lets_new_ones_through() -> None:
    async with echo() as proxy, connect(proxy) as streams:
        await ask(streams, b"x")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await streams[0].readexactly(1)
        async with connect(proxy) as others:
            assert await ask(others, b"y") == b"y"


async def test_an_answer_is_cut_after_so_many_bytes() -> None:
    async with echo() as proxy:
        proxy.make(Trouble(cut_after_bytes=5))
        async with connect(proxy) as streams:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await ask(streams, b"0123456789")


async def test_dropped_replies_reset_the_connection_when_healed() -> None:
    async with echo() as proxy, connect(proxy) as streams:
        proxy.make(Trouble(drop_replies=True))
        streams[1].write(b"question")
        assert await silence(streams)
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            await streams[0].readexactly(1)


async def test_a_half_closed_connection_ends_for_its_reader_only() -> None:
    async with echo() as proxy, connect(proxy) as streams:
        await ask(streams, b"x")
        proxy.half_close()
        assert await streams[0].read() == b""
        streams[1].write(b"still taken")
        await streams[1].drain()
        assert proxy.connections == 1


async def test_a_refusing_proxy_resets_whoever_comes() -> None:
    async with echo() as proxy:
        proxy.make(Trouble(refuse=True))
        async with connect(proxy) as streams:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await streams[0].readexactly(1)
        proxy.heal()
        async with connect(proxy) as streams:
            assert await ask(streams, b"y") == b"y"
