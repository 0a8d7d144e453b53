"""The doctor's look at the rows in Redis: are they of the artefact's state space?"""

from pathlib import Path
from typing import Any

from schemas.topics import topic_name
from stream_app.commands.findings import Finding, fail, ok, skip, warn
from stream_app.errors import RerankError
from stream_app.settings import Settings


async def examine_rows(settings: Settings) -> list[Finding]:
    """Compare the state space that Redis says its rows are of with that of the artefact."""
    if settings.artefact is None:
        return []
    try:
        ours, said = await _spaces(settings, settings.artefact)
    except RerankError as error:
        return [skip("rows", f"not compared with the artefact: {error}")]
    if said == "":
        return [ok("rows", f"nobody has said of which state space they are; a worker will say {ours}")]
    if said == ours:
        return [ok("rows", f"of the artefact's state space, {ours}")]
    message = f"of state space {said}, the artefact is of {ours}"
    if settings.redis.foreign_rows == "cold":
        return [warn("rows", f"{message}: every user starts cold", "rerank rebuild, or serve the artefact before")]
    return [
        fail("rows", f"{message}: no worker starts", "stop the workers and run rerank rebuild, or serve the other one")
    ]


async def _spaces(settings: Settings, artefact: Path) -> tuple[str, str]:
    """Return the state space of the artefact, and what Redis says of its rows."""
    from stream_app.cluster_store import store_of  # noqa: PLC0415  with the scorer: torch takes seconds to import
    from stream_app.connection import check_connection, connect, is_cluster  # noqa: PLC0415
    from stream_app.scorer import read_manifest, space_of  # noqa: PLC0415
    from stream_app.store import RowCodec, space_text  # noqa: PLC0415
    from stream_app.telemetry import Telemetry  # noqa: PLC0415

    manifest = read_manifest(artefact)
    client: Any = connect(settings.redis)
    try:
        await check_connection(client, settings.redis, prefix=settings.row_prefix())
        store = store_of(
            client,
            codec=RowCodec(state_size=manifest.dims.S, space=space_of(manifest), telemetry=Telemetry()),
            key_prefix=settings.row_prefix(),
            log=topic_name(settings.topic_prefix, "interactions"),
            scripts=settings.redis.scripts,
            cluster=is_cluster(client),
        )
        return space_text(space_of(manifest)), await store.row_space()
    finally:
        await client.aclose()
