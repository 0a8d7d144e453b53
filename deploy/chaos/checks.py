"""What must hold when everything is healed and quiet. Pure: from what lies on the topics and in Redis to problems."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson

from deploy.chaos.artefact import Formula
from deploy.chaos.load import BAD, GOOD, Place
from deploy.chaos.oracle import Expected, fold
from deploy.chaos.outside import Logged, Seen
from schemas.records import Slate
from stream_app.state import RowError, unpack_row

SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One invariant: what it says, how many cases it looked at, and those where it does not hold."""

    name: str
    cases: int
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def input_counts(seen: Seen) -> dict[str, int]:
    """Return how many records the inputs hold and what became of them: the ledger's rows."""
    interactions, lists = seen.inputs["interactions"].values(), seen.inputs["candidates"].values()
    letters = {(letter.topic, letter.place) for letter in seen.dead_letters.values()}
    twice = {request_id for place, request_id in shed_unread(seen).items() if ("candidates", place) in letters}
    outcomes = Counter(slates[0].outcome for request_id, slates in by_request(seen).items() if request_id not in twice)
    requests = {request_id for record in lists if record.mark == GOOD for request_id in [_request_id(record)]}
    return {
        "interactions in the log": len(interactions),
        "interactions applied": sum(record.mark != BAD for record in interactions),
        "interactions dead-lettered": sum(topic == "interactions" for topic, _ in letters),
        "candidate lists in the log": len(lists),
        "requests": len(requests) + sum(record.mark == BAD for record in lists),
        "requests ranked": outcomes["ranked"],
        "requests fallen back": outcomes["fallback"],
        "requests shed": outcomes["shed"],
        "requests dead-lettered": sum(topic == "candidates" for topic, _ in letters),
        "slates sent again": len(seen.slates) - len(by_request(seen)),
        "dead letters sent again": len(seen.dead_letters) - len(letters),
    }


def check_conservation(counts: Mapping[str, int]) -> Check:
    """What went in came out: interactions as state or dead letter, requests as one of four outcomes."""
    applied = counts["interactions applied"] + counts["interactions dead-lettered"]
    answered = sum(counts[f"requests {outcome}"] for outcome in ("ranked", "fallen back", "shed", "dead-lettered"))
    interactions, requests = counts["interactions in the log"], counts["requests"]
    sums = {"interactions": (interactions, applied), "requests": (requests, answered)}
    problems = [f"{came_out} {name} of {went_in}" for name, (went_in, came_out) in sums.items() if went_in != came_out]
    return Check(name="in equals out", cases=interactions + requests, problems=problems)


def by_request(seen: Seen) -> dict[str, list[Slate]]:
    """Return the slates of each request, in the order of the topic."""
    slates: dict[str, list[Slate]] = defaultdict(list)
    for place in sorted(seen.slates):
        slates[seen.slates[place].request_id].append(seen.slates[place])
    return slates


def shed_unread(seen: Seen) -> dict[Place, str]:
    """Return the bad lists that were shed, with request ids: late in a backlog only a list's head is looked at."""
    answers = by_request(seen)
    found = {}
    for place, record in seen.inputs["candidates"].items():
        request_id = _request_id_of_bad(record) if record.mark == BAD else ""
        if request_id in answers and all(slate.outcome == "shed" for slate in answers[request_id]):
            found[place] = request_id
    return found


def _request_id_of_bad(record: Logged) -> str:
    try:
        return str(orjson.loads(record.value or b"")["request_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def check_dead_letters(seen: Seen) -> Check:
    """Every bad record is a dead letter with its own bytes, or a list shed unread, and nothing else is."""
    letters = {(letter.topic, letter.place): letter for letter in seen.dead_letters.values()}
    bad = {(name, place): r for name, log in seen.inputs.items() for place, r in log.items() if r.mark == BAD}
    unread = {("candidates", place) for place in shed_unread(seen)}
    problems = [f"{name} {place}: bad, and no dead letter" for name, place in bad.keys() - letters.keys() - unread]
    problems += [f"{at[0]} {at[1]}: good, and a dead letter {letters[at].code}" for at in letters.keys() - bad.keys()]
    problems += [
        f"{at[0]} {at[1]}: its dead letter holds other bytes"
        for at in letters.keys() & bad.keys()
        if (letters[at].key, letters[at].value) != (bad[at].key, bad[at].value)
    ]
    return Check(name="bad records are dead letters, and nothing else is", cases=len(bad), problems=problems)


def check_outcomes(seen: Seen) -> Check:
    """Every good list has an outcome, and all outcomes of a request are one request's."""
    slates = by_request(seen)
    requests = {
        _request_id(r): orjson.loads(r.value or b"") for r in seen.inputs["candidates"].values() if r.mark == GOOD
    }
    problems = [f"{request_id}: no outcome" for request_id in requests.keys() - slates.keys()]
    unread = set(shed_unread(seen).values())
    problems += [f"{request_id}: an answer to no request" for request_id in slates.keys() - requests.keys() - unread]
    for request_id in slates.keys() & requests.keys():
        problems += [
            f"{request_id}: {problem}"
            for slate in slates[request_id]
            for problem in _misfits(slate, requests[request_id])
        ]
    return Check(name="every request has an outcome, all outcomes are its own", cases=len(requests), problems=problems)


def _misfits(slate: Slate, request: Mapping[str, object]) -> Iterable[str]:
    item_ids = request["item_ids"]
    if not isinstance(item_ids, list):
        raise TypeError("item_ids of a good request is a list")
    wanted = 0 if slate.outcome == "shed" else len(item_ids)
    k = request.get("k")
    if isinstance(k, int):
        wanted = min(wanted, k)
    if slate.user_id != request["user_id"]:
        yield f"answered for {slate.user_id}"
    if len(slate.item_ids) != wanted or [item_ids[at] for at in slate.retrieval_positions] != list(slate.item_ids):
        yield f"{slate.outcome} with {len(slate.item_ids)} items of {wanted}, or in other places"
    if len(set(slate.item_ids)) != len(slate.item_ids):
        yield "an item twice"
    if slate.outcome == "fallback" and list(slate.retrieval_positions) != sorted(slate.retrieval_positions):
        yield "a fallback in another order than retrieval's"


def check_freshness(seen: Seen) -> Check:
    """Every ranked slate saw its user as he was after one of his interactions, and not before the `after` of its list.

    So no slate was made from half a batch, from another order, or from an interaction applied twice.
    """
    events = _trajectories(seen.inputs["interactions"])
    requests = {
        _request_id(r): orjson.loads(r.value or b"") for r in seen.inputs["candidates"].values() if r.mark == GOOD
    }
    problems, cases = [], 0
    for slate in seen.slates.values():
        if slate.outcome != "ranked":
            continue
        cases += 1
        at = (slate.user_id, slate.state.partition, slate.state.offset)
        known = events.get(at) if slate.state.offset >= 0 else 0
        if known != slate.state.events:
            problems.append(f"{slate.request_id}: {slate.state.events} events at {at}, the log has {known}")
        after = requests.get(slate.request_id, {}).get("after")
        if after and slate.state.offset < after["offset"]:
            problems.append(f"{slate.request_id}: state at {at}, asked for after {after['offset']}")
    return Check(name="every ranked slate saw a true state of its user", cases=cases, problems=problems)


def slates_of(seen: Seen, version: str) -> int:
    """Return how many slates name a version of the model."""
    return sum(slate.model.version == version for slate in seen.slates.values())


def check_models(seen: Seen, versions: Collection[str]) -> Check:
    """Every slate names a model that may serve, whatever the artefact path led to meanwhile."""
    problems = [
        f"{slate.request_id}: of the model {slate.model.name}:{slate.model.version}"
        for slate in seen.slates.values()
        if slate.model.version not in versions
    ]
    return Check(name="every slate is of a model that may serve", cases=len(seen.slates), problems=problems)


def _trajectories(log: Mapping[Place, Logged]) -> dict[tuple[str, int, int], int]:
    events: Counter[str] = Counter()
    known = {}
    for (partition, offset), record in sorted(log.items()):
        if record.mark == BAD:
            continue
        user = (record.key or b"").decode()
        events[user] = events[user] + 1 if record.mark == GOOD else 0
        known[user, partition, offset] = events[user]
    return known


def expected_states(seen: Seen, formula: Formula) -> dict[str, Expected]:
    """Return what one pass over the log of interactions leaves of every user."""
    log = [
        (*place, record.key, record.value)
        for place, record in sorted(seen.inputs["interactions"].items())
        if record.mark != BAD
    ]
    return fold(log, formula.moves, formula.rows, formula.kinds)


def check_states(seen: Seen, stored: Mapping[str, bytes], formula: Formula) -> Check:
    """The state of every user is what one pass over the log gives, bit for bit; nobody else has one."""
    expected = expected_states(seen, formula)
    problems = [f"{user}: no row" for user in expected.keys() - stored.keys()]
    problems += [f"{user}: a row of nobody" for user in stored.keys() - expected.keys()]
    for user in sorted(expected.keys() & stored.keys()):
        problems += [f"{user}: {problem}" for problem in _differences(expected[user], stored[user], formula)]
    return Check(name="every state equals the oracle's, bit for bit", cases=len(expected), problems=problems)


def _differences(expected: Expected, data: bytes, formula: Formula) -> Iterable[str]:
    try:
        row = unpack_row(data, state_size=formula.state_size, space=formula.space)
    except RowError as error:
        yield str(error)
        return
    pairs: Sequence[tuple[str, object, object]] = (
        ("events", row.events, expected.events),
        ("position", (row.fence.partition, row.fence.offset), expected.position),
        ("last event time", row.last_event_time_ms, expected.last_event_time_ms),
        ("items", row.history(), expected.items),
        ("vector", row.vector, expected.vector.astype(np.float32).tobytes()),
    )
    for name, found, wanted in pairs:
        if found != wanted:
            yield f"{name} {found!r}, the oracle has {wanted!r}"[:400]


def check_log(seen: Seen, acknowledged: Mapping[str, set[Place]]) -> Check:
    """What the broker acknowledged to the load lies in the log, or nothing that was checked means anything."""
    problems = [
        f"{name} {place}: acknowledged, and not in the log"
        for name, places in acknowledged.items()
        for place in places - seen.inputs[name].keys()
    ]
    return Check(
        name="the broker kept what it acknowledged", cases=sum(map(len, acknowledged.values())), problems=problems
    )


def _request_id(record: Logged) -> str:
    return str(orjson.loads(record.value or b"")["request_id"])
