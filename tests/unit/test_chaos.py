"""The parts of a chaos run that need no servers: the plan, the load, and the checks that must not be fooled."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest

from deploy.chaos import checks
from deploy.chaos.artefact import Formula, Models, formula_of, write_tiny_artefact
from deploy.chaos.errors import ChaosError
from deploy.chaos.faults import TABLE, kinds_named
from deploy.chaos.ledger import Ledger
from deploy.chaos.load import BAD, FORGET, GOOD, Load
from deploy.chaos.oracle import Expected
from deploy.chaos.outside import Logged, Refused, Seen
from deploy.chaos.plan import BrokerChoice, Strike, plan
from deploy.chaos.skewed_worker import MovedClock, set_clock
from schemas.codec import DecodeError, decode_candidate_list, decode_interaction, decode_user_id
from schemas.limits import DEFAULT_LIMITS
from schemas.records import Slate, SlateState
from stream_app.errors import ArtefactError
from stream_app.state import Fence, UserRow, pack_row
from tests.builders import slate

NOW_MS = 1_700_000_000_000


def strikes(seed: int, broker: BrokerChoice = "apache", steps: int = 4_000) -> list[Strike]:
    return plan(kinds_named((), broker), seed=seed, steps=steps, workers=3, brokers=1)


def test_the_same_seed_strikes_the_same_way_at_the_same_steps() -> None:
    assert strikes(7) == strikes(7)
    assert strikes(7) != strikes(8)


@pytest.mark.parametrize("broker", ["embedded", "apache", "cluster"])
def test_every_fault_of_a_broker_comes_up_and_no_other(broker: BrokerChoice) -> None:
    struck = {strike.kind for strike in strikes(1, broker)}
    assert struck == {kind for kind in TABLE if broker in kind.brokers}


def test_only_the_faults_that_were_asked_for_strike() -> None:
    kinds = kinds_named(["worker: kill", "FLUSHDB"], "embedded")
    assert [kind.name for kind in kinds] == ["worker: kill -9", "worker: kill -9 at a fail-point", "redis: FLUSHDB"]
    assert {strike.kind for strike in plan(kinds, seed=1, steps=400, workers=3, brokers=1)} == set(kinds)


@pytest.mark.parametrize("text", ["meteorite", "broker: kill -9"])
def test_a_fault_that_there_is_not_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ChaosError, match=f"'{text}': no fault on embedded is called so.*worker: SIGTERM"):
        kinds_named(["worker", text], "embedded")


def test_no_target_is_struck_while_it_is_in_trouble() -> None:
    busy_until: dict[tuple[str, int], int] = {}
    for strike in strikes(3):
        place = (strike.kind.target, strike.index)
        assert strike.step >= busy_until.get(place, 0)
        busy_until[place] = strike.step + strike.steps


def test_no_fault_outlasts_the_load() -> None:
    assert max(strike.step + strike.steps for strike in strikes(5, steps=60)) <= 60


def test_every_record_of_the_load_is_what_its_mark_says() -> None:
    load, marks = Load(1, ["i-1", "i-2", "i-3"]), Counter[bytes]()
    for step in range(40):
        for record in load.step(NOW_MS, {"u-1": (2, 5)}, flood=step > 30):
            marks[record.mark] += 1
            try:
                if record.topic == "candidates":
                    decode_candidate_list(record.key, record.value, DEFAULT_LIMITS)
                elif record.value is None:
                    decode_user_id(record.key, DEFAULT_LIMITS)
                else:
                    decode_interaction(record.key, record.value, DEFAULT_LIMITS)
            except DecodeError:
                assert record.mark == BAD
            else:
                assert record.mark in (GOOD, FORGET)
    assert set(marks) == {GOOD, BAD, FORGET}


def test_a_moved_clock_is_as_far_ahead_as_its_file_says_and_true_again_after(tmp_path: Path) -> None:
    path = tmp_path / "clock"
    set_clock(path, ahead_s=0.0)
    clock = MovedClock(path)
    for ahead_s in (1.5, -2_592_000.0, 0.0):
        set_clock(path, ahead_s=ahead_s)
        before_ns, moved_ns, after_ns = time.time_ns(), clock.time_ns(), time.time_ns()
        assert before_ns <= moved_ns - ahead_s * 1_000_000_000 <= after_ns


@pytest.fixture(scope="module")
def formula(tmp_path_factory: pytest.TempPathFactory) -> Formula:
    """Return the formula of a tiny artefact."""
    return formula_of(write_tiny_artefact(Path(tmp_path_factory.mktemp("chaos")) / "artefact"))


def seen_of(*users: str) -> Seen:
    """Return a log of one click on i-1 by each user, in partition 0."""
    seen = Seen()
    for offset, user in enumerate(users):
        value = orjson.dumps(
            {"event_id": "e", "user_id": user, "item_id": "i-1", "kind": "click", "event_time_ms": NOW_MS + offset}
        )
        seen.inputs["interactions"][0, offset] = Logged(key=user.encode(), value=value, mark=GOOD)
    return seen


def row_of(expected: Expected, formula: Formula, **changes: object) -> bytes:
    """Return the row bytes of what the oracle expects, but for the changes."""
    fields: dict[str, object] = {
        "events": expected.events,
        "last_event_time_ms": expected.last_event_time_ms,
        "fence": Fence(1, *expected.position),
        "vector": expected.vector.tobytes(),
        "ring": "\n".join(expected.items).encode(),
    }
    return pack_row(UserRow(**(fields | changes)), formula.space)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"events": 2}, "events 2"),
        ({"vector": np.zeros(5, np.float32).tobytes()}, "vector"),
        ({"ring": b"i-2"}, "items ['i-2']"),
        ({"fence": Fence(1, 0, 7)}, "position (0, 7)"),
    ],
)
def test_a_state_that_differs_is_told(formula: Formula, changes: dict[str, object], told: str) -> None:
    seen = seen_of("u-1")
    (expected,) = checks.expected_states(seen, formula).values()
    assert checks.check_states(seen, {"u-1": row_of(expected, formula)}, formula).holds
    (problem,) = checks.check_states(seen, {"u-1": row_of(expected, formula, **changes)}, formula).problems
    assert told in problem


def test_a_state_too_few_and_one_too_many_are_told(formula: Formula) -> None:
    seen = seen_of("u-1")
    (expected,) = checks.expected_states(seen, formula).values()
    found = checks.check_states(seen, {"u-2": row_of(expected, formula)}, formula)
    assert found.problems == ["u-1: no row", "u-2: a row of nobody"]


def test_a_bad_record_without_dead_letter_and_a_good_one_with_are_told() -> None:
    seen = seen_of("u-1")
    seen.inputs["interactions"][0, 1] = Logged(key=b"u-1", value=b"{", mark=BAD)
    seen.dead_letters["interactions.dlq", (0, 0)] = Refused(
        topic="interactions", place=(0, 0), code="internal_error", key=b"u-1", value=b""
    )
    assert checks.check_dead_letters(seen).problems == [
        "interactions (0, 1): bad, and no dead letter",
        "interactions (0, 0): good, and a dead letter internal_error",
    ]


@pytest.mark.parametrize(("outcome", "holds"), [("shed", True), ("ranked", False), ("fallback", False)])
def test_a_bad_list_may_be_shed_unread_and_nothing_else(outcome: str, *, holds: bool) -> None:
    seen = Seen()
    value = orjson.dumps({"request_id": "r-1", "user_id": "u-1", "event_time_ms": NOW_MS, "item_ids": "no list"})
    seen.inputs["candidates"][0, 0] = Logged(key=b"u-1", value=value, mark=BAD)
    seen.slates[0, 0] = slate(outcome=outcome, item_ids=[], scores=[], retrieval_positions=[], propensities=[])
    assert (checks.check_dead_letters(seen).holds, checks.check_outcomes(seen).holds) == (holds, holds)
    assert checks.check_conservation(checks.input_counts(seen)).holds


def asked(seen: Seen, *answers: Slate) -> Seen:
    """Add one list for i-1 and i-2 to a log, and slates to the topic."""
    value = orjson.dumps({"request_id": "r-1", "user_id": "u-1", "event_time_ms": NOW_MS, "item_ids": ["i-1", "i-2"]})
    seen.inputs["candidates"][0, 0] = Logged(key=b"u-1", value=value, mark=GOOD)
    seen.slates.update({(0, offset): answer for offset, answer in enumerate(answers)})
    return seen


def test_a_request_without_outcome_is_told() -> None:
    assert checks.check_outcomes(asked(Seen())).problems == ["r-1: no outcome"]


def test_a_slate_that_lost_an_item_is_told() -> None:
    good, short = slate(), slate(item_ids=["i-2"], retrieval_positions=[1], scores=[1.0], propensities=[1.0])
    assert checks.check_outcomes(asked(Seen(), good)).holds
    (problem,) = checks.check_outcomes(asked(Seen(), good, short)).problems
    assert problem == "r-1: ranked with 1 items of 2, or in other places"


def test_a_slate_from_a_state_that_its_user_never_had_is_told() -> None:
    true = SlateState(events=1, partition=0, offset=0, age_ms=0)
    twice = SlateState(events=2, partition=0, offset=0, age_ms=0)
    assert checks.check_freshness(asked(seen_of("u-1"), slate(state=true))).holds
    assert not checks.check_freshness(asked(seen_of("u-1"), slate(state=twice))).holds


def test_a_slate_of_a_model_that_may_not_serve_is_told() -> None:
    seen = asked(Seen(), slate())
    assert checks.check_models(seen, {"3", "4"}).holds
    assert checks.check_models(seen, {"4"}).problems == ["r-1: of the model learned-ema:3"]


def test_the_models_of_a_run_share_their_rows_and_the_corrupt_one_is_refused(tmp_path: Path) -> None:
    given = write_tiny_artefact(tmp_path / "given", seed=3)
    for models in (Models(tmp_path / "tiny"), Models(tmp_path / "copies", given)):
        assert formula_of(models.first).space == formula_of(models.second).space
        assert models.version(models.first) != models.version(models.second)
        with pytest.raises(ArtefactError, match="sha256"):
            formula_of(models.corrupt)


def test_requests_that_do_not_add_up_are_told() -> None:
    counts = checks.input_counts(asked(seen_of("u-1"), slate()))
    assert checks.check_conservation(counts).holds
    (problem,) = checks.check_conservation(counts | {"requests ranked": 0}).problems
    assert problem == "0 requests of 1"


def test_one_check_that_fails_fails_the_run() -> None:
    fine, failed = checks.Check(name="a", cases=1), checks.Check(name="b", cases=1, problems=["p"])
    ledger = Ledger(
        seed=1,
        broker="embedded",
        workers=3,
        took_s=1.0,
        faults=[],
        counts={},
        worker_starts=3,
        ended_by_themselves=[],
        quiet_after_s=None,
        checks=[fine, failed],
        left_out=(),
    )
    assert not ledger.holds
    assert ledger.differences() == ["b: p"]
