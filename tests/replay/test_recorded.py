"""A committed log gives the slates that were committed with it.

The digest is exact on every machine: its model adds in numpy, on numbers that float32 holds exactly. What the real
model answers goes through torch's kernels, which may round otherwise on another CPU, so its scores are compared to
1e-5 and everything else exactly.
"""

import hashlib
from contextlib import closing
from pathlib import Path

from schemas.codec import decode_slate, encode_slate, slate_digest_bytes
from schemas.limits import DEFAULT_LIMITS
from schemas.records import Slate, SlateTiming
from stream_app.pipeline import Answer, ListRequest
from stream_app.recorded_log import read_log
from stream_app.replay import Replay, replay_of
from stream_app.scorer import load_artefact
from stream_app.slate_digest import SlateDigest
from stream_app.store import RowCodec
from stream_app.telemetry import Telemetry
from tests.builders import candidate_list, slate
from tests.fakes import SPACE, STATE_SIZE, CountingBatch, record_of, serving
from tests.tiny_artefact import write_tiny_artefact

RECORDED = Path(__file__).parent / "recorded"
LOG = RECORDED / "log.jsonl"
OTHER_TIMING = SlateTiming(queue=9.0, state=9.0, score=9.0, total=9.0)
EXPECTED_SLATES = 32
EXPECTED_SHA256 = "ebbec92ec4364745da500cc2307249d909cb65c209bcdf200cd881e4b0b38e89"


async def test_a_recorded_log_gives_its_recorded_digest() -> None:
    codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
    with closing(SlateDigest()) as digest:
        replay = Replay(serving(), codec, digest.put, limits=DEFAULT_LIMITS, future_tolerance_ms=300_000)
        await replay.feed(read_log(LOG))
        await replay.finish()
    assert (digest.slates, digest.hexdigest()) == (EXPECTED_SLATES, EXPECTED_SHA256)


async def test_a_recorded_log_gives_its_recorded_slates(tmp_path: Path) -> None:
    slates: dict[int, Slate] = {}

    def keep(number: int, answer: Answer) -> None:
        slates[number] = decode_slate(answer.value)

    artefact = load_artefact(write_tiny_artefact(tmp_path / "tiny"))
    replay = replay_of(artefact, keep, limits=DEFAULT_LIMITS, future_tolerance_ms=300_000)
    await replay.feed(read_log(LOG))
    await replay.finish()
    recorded = [decode_slate(line) for line in (RECORDED / "slates.jsonl").read_bytes().splitlines()]
    assert [without_scores(slates[number]) for number in range(len(slates))] == list(map(without_scores, recorded))
    for number, expected in enumerate(recorded):
        differences = zip(scores_of(slates[number]), scores_of(expected), strict=True)
        assert all(abs(got - want) <= 1e-5 for got, want in differences)


def scores_of(slate: Slate) -> list[float]:
    why = slate.explanations or []
    return [*slate.scores, *(number for one in why for number in (one.score, one.cold_score, one.personal))]


def without_scores(slate: Slate) -> tuple[object, ...]:
    """Return what is exact everywhere: all but scores, times, and the version, which hashes the model file."""
    moved = None if slate.explanations is None else [(one.item_id, one.moved) for one in slate.explanations]
    return (
        slate.request_id,
        slate.user_id,
        slate.event_time_ms,
        slate.outcome,
        slate.reasons,
        slate.item_ids,
        slate.retrieval_positions,
        slate.propensities,
        slate.model.name,
        slate.state,
        moved,
    )


def test_the_digest_is_of_the_slates_without_timing_in_the_order_of_their_numbers() -> None:
    with closing(SlateDigest()) as digest:
        for number in (2, 0, 3, 1):
            digest.put(number, answer_of(number))
    lines = b"".join(digest_bytes(number) + b"\n" for number in range(4))
    assert (digest.slates, digest.hexdigest()) == (4, hashlib.sha256(lines).hexdigest())


def answer_of(number: int) -> Answer:
    made = slate(request_id=f"r-{number}")
    record = record_of(candidate_list())
    return Answer(ListRequest(record, candidate_list(), 0.0, CountingBatch()), made, encode_slate(made))


def digest_bytes(number: int) -> bytes:
    return slate_digest_bytes(encode_slate(slate(request_id=f"r-{number}", timing_ms=OTHER_TIMING)))
