"""A recording of live topics, replayed, gives the slates that the worker gave; and the commands that feed and watch."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalStack
from schemas.codec import encode, slate_digest_bytes
from schemas.records import After, CandidateList
from stream_app.recorded_log import read_log
from tests.builders import candidate_list, interaction
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Client, Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration

COMMAND_TIMEOUT_S = 60.0
IDLE_S = "2"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny artefact."""
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    """Return topics, a group and a key prefix of its own."""
    return site(local_stack, artefact, tmp_path)


async def rerank(where: Site, *arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=where.worker_environment(),
    )
    async with asyncio.timeout(COMMAND_TIMEOUT_S):
        stdout, stderr = await process.communicate(stdin)
    return process.returncode or 0, stdout.decode(), stderr.decode()


def command(*arguments: str | Path) -> Sequence[str]:
    return [sys.executable, "-m", "stream_app", *map(str, arguments)]


def by_request(slates: Sequence[bytes]) -> Mapping[str, Any]:
    """Return slates without timing_ms, parsed so that a difference can be read."""
    parsed = [json.loads(slate_digest_bytes(slate)) for slate in slates]
    assert len({slate["request_id"] for slate in parsed}) == len(parsed)
    return {slate["request_id"]: slate for slate in parsed}


def ask(user_id: str, request_id: str, after: After | None) -> CandidateList:
    return candidate_list(
        user_id=user_id,
        request_id=request_id,
        item_ids=[*item_ids()[:10], "i-cold"],
        after=after,
        deadline_ms=20_000,
        k=None,
        explain=True,
    )


async def live_a_life(outsider: Client, user_id: str) -> None:
    """Look, click, look again, as a user of a product does; be forgotten once; send rubbish once."""
    after = None
    for turn in range(8):
        await outsider.ask(ask(user_id, f"r-{user_id}-{turn}", after))
        if turn == 4:
            after = await outsider.send("interactions", user_id.encode(), None)
        else:
            after = await outsider.interact(
                interaction(user_id=user_id, event_id=f"e-{user_id}-{turn}", item_id=f"i-{turn + 1}", kind="rating")
            )
        await outsider.send("interactions", user_id.encode(), b"\xff{")


async def test_a_replayed_recording_gives_the_live_slates(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    users = [f"u-{n}" for n in range(6)]
    with WorkerProcess(where):
        async with client(where) as outsider:
            await asyncio.gather(*(live_a_life(outsider, user) for user in users))
            live = list(outsider.slate_bytes)
    log, slates = tmp_path / "log.jsonl", tmp_path / "slates.jsonl"
    code, stdout, _ = await rerank(where, "record", "--out", log, "--until-idle-s", IDLE_S)
    assert code == 0
    assert json.loads(stdout)["topics"] == {f"{where.prefix}interactions": 96, f"{where.prefix}candidates": 48}
    code, stdout, stderr = await rerank(where, "replay", log, "--out", slates, "--json")
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert (report["slates"], report["dead_letters"]) == (48, {"not_json": 48})
    assert by_request(slates.read_bytes().splitlines()) == by_request(live)
    code, again, _ = await rerank(where, "replay", log, "--micro-batch", "3", "--json")
    assert (code, json.loads(again)["sha256"]) == (0, report["sha256"])


async def test_what_is_produced_is_recorded_byte_for_byte(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    lines = [encode(interaction(user_id=f"u-{n % 5}", event_id=f"e-{n}")) for n in range(700)]
    file, log = tmp_path / "interactions.jsonl", tmp_path / "log.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    code, stdout, _ = await rerank(where, "produce", file, "--topic", "interactions", "--json")
    assert (code, json.loads(stdout)) == (0, {"sent": 700, "topic": f"{where.prefix}interactions"})
    code, stdout, _ = await rerank(where, "record", "--out", log, "--until-idle-s", IDLE_S)
    assert (code, json.loads(stdout)["records"]) == (0, 700)
    records = list(read_log(log))
    assert sorted(record.value or b"" for record in records) == sorted(lines)
    assert all(json.loads(record.value or b"")["user_id"].encode() == record.key for record in records)


async def test_a_file_with_a_bad_line_is_not_sent_at_all(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    file, log = tmp_path / "interactions.jsonl", tmp_path / "log.jsonl"
    file.write_bytes(encode(interaction()) + b"\n{}\n")
    code, _, stderr = await rerank(where, "produce", file, "--topic", "interactions")
    assert code == 2
    assert f"{file}:2: missing_field: " in stderr
    code, stdout, _ = await rerank(where, "record", "--out", log, "--until-idle-s", IDLE_S)
    assert (code, json.loads(stdout)["records"]) == (0, 0)


async def test_standard_input_is_sent_up_to_the_first_bad_line(where: Site) -> None:
    await where.create_topics()
    stdin = encode(interaction()) + b"\n\nnonsense\n" + encode(interaction()) + b"\n"
    code, stdout, stderr = await rerank(where, "produce", "-", "--topic", "interactions", "--json", stdin=stdin)
    assert (code, json.loads(stdout)["sent"]) == (2, 1)
    assert "-:3: not_json: " in stderr


async def test_tail_shows_the_records_of_one_user(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        for user_id in ("u-1", "u-2", "u-1"):
            await outsider.interact(interaction(user_id=user_id))
    code, stdout, _ = await rerank(
        where, "tail", "--topic", "interactions", "--user", "u-1", "--from", "earliest", "-n", "2", "--json"
    )
    assert code == 0
    assert [json.loads(line)["key"] for line in stdout.splitlines()] == ["u-1", "u-1"]


@pytest.mark.parametrize("arguments", [["tail"], ["record", "--out"]], ids=["tail", "record"])
async def test_an_interrupt_ends_with_0(where: Site, tmp_path: Path, arguments: list[str]) -> None:
    await where.create_topics()
    process = await asyncio.create_subprocess_exec(
        *command(*arguments, *([tmp_path / "log.jsonl"] if "--out" in arguments else [])),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=where.worker_environment(),
    )
    assert process.stderr is not None
    async with asyncio.timeout(COMMAND_TIMEOUT_S):
        assert b"Ctrl-C ends" in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


async def test_a_topic_that_is_not_there_is_named_and_not_made(where: Site) -> None:
    for arguments in (["tail"], ["record", "--out", "unused"], ["produce", "-", "--topic", "interactions"]):
        code, _, stderr = await rerank(where, *arguments, stdin=encode(interaction()))
        assert code == 2
        assert "rerank topics create --partitions N" in stderr
