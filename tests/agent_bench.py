"""An agent on a bench: the real one, with fakes for broker, store, clock and model."""

import asyncio
from dataclasses import dataclass, field

from schemas.codec import decode_slate
from schemas.limits import Limits
from schemas.records import Slate
from stream_app.agents import AgentContext, InteractionsAgent, ListsAgent
from stream_app.pipeline import Deadlines
from stream_app.ports import AppliedOffsets, InService, LogCheck, Serving, UserStore, any_log_is_ours
from stream_app.telemetry import Telemetry
from tests.fakes import FakeClock, FakeStream, RecordingPublisher, memory_store, serving

MAX_DEADLINE_MS = 600_000

TOPICS = {"interactions": "interactions.dlq", "candidates": "candidates.dlq"}


@dataclass(slots=True)
class Bench:
    """One agent with its fakes."""

    store: UserStore = field(default_factory=memory_store)
    serving: Serving = field(default_factory=serving)
    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    applied: AppliedOffsets = field(default_factory=AppliedOffsets)
    clock: FakeClock = field(default_factory=FakeClock)
    telemetry: Telemetry = field(default_factory=Telemetry)
    stream: FakeStream = field(default_factory=FakeStream)
    failures: list[Exception] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    max_output_bytes: int = 4 * 1_048_576
    is_log_ours: LogCheck = any_log_is_ours

    def context(self, *, in_service: InService | None = None) -> AgentContext:
        return AgentContext(
            in_service=in_service or InService(self.serving),
            store=self.store,
            publisher=self.publisher,
            applied=self.applied,
            clock=self.clock,
            telemetry=self.telemetry,
            limits=Limits(),
            epoch=1,
            future_tolerance_ms=0,
            deadlines=Deadlines(default_ms=1_000, most_ms=MAX_DEADLINE_MS),
            reranked_topic="reranked",
            dead_letter_topics=TOPICS,
            max_output_bytes=self.max_output_bytes,
            rewind=lambda partition, offset: self.rewinds.append((partition, offset)),
            fail=self.failures.append,
            is_log_ours=self.is_log_ours,
        )

    async def run(self, agent: InteractionsAgent | ListsAgent) -> None:
        """Feed what the stream holds to the end."""
        self.stream.end()
        async with asyncio.timeout(10):
            await agent.run(self.stream)  # type: ignore[arg-type]
            await agent.drained()

    async def interactions(self) -> None:
        await self.run(InteractionsAgent(self.context(), max_records=1_000))

    async def lists(self) -> None:
        await self.run(ListsAgent(self.context(), max_records=32))

    def slates(self) -> list[Slate]:
        return [decode_slate(sent.value or b"") for sent in self.publisher.sent if sent.topic == "reranked"]

    def codes(self) -> list[str]:
        """Return the codes of the dead letters, in the order they were sent."""
        headers = [dict(sent.headers) for sent in self.publisher.sent if sent.topic != "reranked"]
        return [(header["rerank.error.code"] or b"").decode() for header in headers]
