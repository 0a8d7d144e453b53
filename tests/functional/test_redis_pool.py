"""What we lean on in redis-py's pool of connections: no server needed."""

from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from stream_app.connection import connect
from stream_app.settings import RedisSettings


@dataclass(eq=False)
class Open:
    """A connection, as far as the pool looks at it."""

    is_connected: bool


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+sentinel://127.0.0.1:1/rows"])
@pytest.mark.parametrize("released", [[True, False], [False, True], [False, True, False]])
async def test_a_connection_that_is_open_is_used_before_one_that_would_have_to_be_opened(
    released: list[bool], url: str
) -> None:
    client = connect(RedisSettings(url=SecretStr(url)))
    pool: Any = client.connection_pool
    pool._available_connections = [Open(one) for one in released]
    taken = [pool.get_available_connection().is_connected for _ in released]
    assert taken == sorted(released, reverse=True)
