"""Ask a broker, in its own protocol, who it is: readiness without a client library's retries and logs."""

import socket
import struct
from dataclasses import dataclass
from io import BytesIO

from aiokafka.protocol.api import RequestHeader_v1
from aiokafka.protocol.metadata import MetadataRequest_v2, MetadataResponse_v2

from deploy.local.ports import LOOPBACK

_LARGEST_ANSWER_BYTES = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What one broker says about its cluster."""

    cluster_id: str | None
    node_ids: frozenset[int]
    controller_id: int


def ask_cluster(port: int, timeout_s: float = 2.0) -> ClusterView:
    """Send one Metadata request (version 2, no topics) to a broker on loopback.

    Raises:
        OSError: nobody answers, or not in the Kafka protocol, within the time.
    """
    request = MetadataRequest_v2([])
    body = RequestHeader_v1(request, correlation_id=1, client_id="local-stack").encode() + request.encode()
    with socket.create_connection((LOOPBACK, port), timeout=timeout_s) as connection:
        connection.settimeout(timeout_s)
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = _read_answer(connection)
    try:
        response = MetadataResponse_v2.decode(BytesIO(answer[4:])).to_object()  # 4 bytes of correlation id
    except (ValueError, struct.error) as error:
        raise ConnectionError(f"port {port}: answer is not Kafka's: {error}") from None
    return ClusterView(
        cluster_id=response["cluster_id"],
        node_ids=frozenset(broker["node_id"] for broker in response["brokers"]),
        controller_id=response["controller_id"],
    )


def _read_answer(connection: socket.socket) -> bytes:
    (size_bytes,) = struct.unpack(">i", _read_exactly(connection, 4))
    if not 4 <= size_bytes <= _LARGEST_ANSWER_BYTES:
        raise ConnectionError(f"answer of {size_bytes} bytes is not Kafka's")
    return _read_exactly(connection, size_bytes)


def _read_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    parts = b""
    while len(parts) < size_bytes:
        part = connection.recv(size_bytes - len(parts))
        if not part:
            raise ConnectionError("closed before the whole answer")
        parts += part
    return parts
