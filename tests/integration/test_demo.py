"""`rerank demo` from the outside: a process, its files, and what it leaves behind."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.local.stack import KafkaChoice

pytestmark = pytest.mark.integration

ARMS = {"live": "live", "live_strict": "strict", "frozen": "frozen"}
PATIENCE_S = 120.0


def write_log(path: Path, users: int = 30, items: int = 60, interactions: int = 1_500) -> Path:
    """Write clicks of users who like every third item; several fall into one second, users come late, too."""
    rng = random.Random(7)  # noqa: S311  a log, not a secret
    with path.open("w") as file:
        for number in range(interactions):
            user = rng.randrange(1 + users * number // interactions)
            item = (user % 3) + 3 * rng.randrange(items // 3)
            row = {
                "event_id": f"e-{number}",
                "user_id": f"u-{user}",
                "item_id": f"i-{item}",
                "kind": rng.choice(["click", "view", "skip"]),
                "event_time_ms": 1_700_000_000_000 + 1_000 * (number // 10),
            }
            file.write(json.dumps(row) + "\n")
    return path


def environment(broker: KafkaChoice, kafka_home: Path | None, **more: str) -> dict[str, str]:
    """Return our environment without settings, so that the demo starts servers of its own."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RERANK_", "KAFKA_HOME"))}
    home = {"KAFKA_HOME": str(kafka_home)} if broker == "apache" and kafka_home else {}
    return ours | home | more


def demo(*arguments: str | Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stream_app", "demo", *map(str, arguments)]
    return subprocess.Popen(
        command, env=dict(env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ndcg10(slates: Mapping[str, dict[str, Any]], lists: list[dict[str, Any]], arm: str, *, retrieval: bool) -> float:
    """Compute NDCG@10 as a stranger would: from the slates and the lists that lie beside the result."""
    gains = []
    for one in lists:
        slate = slates[one["request_ids"][arm]]
        rank = slate["item_ids"].index(one["wanted_item_id"])
        place = slate["retrieval_positions"][rank] if retrieval else rank
        gains.append(1.0 / math.log2(place + 2) if place < 10 else 0.0)
    return sum(gains) / len(gains)


def test_the_printed_numbers_are_those_of_the_slates_and_of_the_offline_evaluator(
    tmp_path: Path, test_broker: KafkaChoice, kafka_home: Path | None
) -> None:
    log, out = write_log(tmp_path / "log.jsonl"), tmp_path / "out"
    process = demo(
        "--data", log, "--lists", "80", "--seed", "5", "--json", "--out", out, env=environment(test_broker, kafka_home)
    )
    printed, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    result = json.loads(printed)
    assert result == json.loads((out / "demo.json").read_text())
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (result["lists"], result["slates"], result["seed"]) == (80, 240, 5)
    assert result["outcomes"] == {arm: {"ranked": 80} for arm in ("live", "strict", "frozen")}
    assert abs(result["ndcg10"]["live"] - result["ndcg10"]["offline_live"]) <= 1e-6
    slates = {slate["request_id"]: slate for slate in lines_of(out / "demo-slates.jsonl")}
    lists = lines_of(out / "demo-lists.jsonl")
    recomputed = {policy: ndcg10(slates, lists, arm, retrieval=False) for policy, arm in ARMS.items()}
    recomputed["retrieval"] = ndcg10(slates, lists, "live", retrieval=True)
    assert {policy: result["ndcg10"][policy] for policy in recomputed} == pytest.approx(recomputed, abs=1e-12)


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("Kafka broker", signal.SIGINT, 130),  # while it trains
        ("worker is ready", signal.SIGINT, 130),  # while it replays
        ("worker is ready", signal.SIGTERM, 143),
    ],
)
def test_a_signal_leaves_no_process_behind(
    phase: str, number: signal.Signals, code: int, tmp_path: Path, test_broker: KafkaChoice, kafka_home: Path | None
) -> None:
    log = write_log(tmp_path / "log.jsonl", interactions=4_000)
    process = demo("--data", log, "--all", "--out", tmp_path / "out", env=environment(test_broker, kafka_home))
    assert process.stderr is not None
    while phase not in (line := process.stderr.readline()):
        assert line, f"ended before {phase!r}"
    time.sleep(0.3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, told.splitlines()[-1]) == (
        code,
        "stopped; nothing that the demo started is left running",
    )
    assert len(children) >= 2
    assert [child for child in children if child.is_running()] == []


def test_offline_without_cached_ratings_it_names_the_way_on(tmp_path: Path) -> None:
    env = environment("embedded", None, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    env.pop("PIP_FIND_LINKS", None)
    process = demo("--out", tmp_path / "out", env=env)
    printed, told = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, printed) == (2, "")
    assert "`--data synthetic`" in told.splitlines()[-1]
    assert "Traceback" not in told


def test_a_place_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, why in (("file", "File exists"), ("file/below", "Not a directory")):
        process = demo("--data", "synthetic", "--out", tmp_path / out, env=dict(os.environ))
        _, told = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert f"--out {tmp_path / out}: {why}; nothing was started; name a directory" in told
        assert "Traceback" not in told
