"""A minute of `rerank chaos`, half of one on Apache Kafka: faults at random, and then everything must hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

from deploy.local.stack import KafkaChoice

SEED = "7"
MINUTES = {"embedded": "1", "apache": "0.5"}
TIMEOUT_S = 280


def test_a_minute_of_chaos_loses_and_doubles_nothing(
    test_broker: KafkaChoice, kafka_home: Path | None, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "stream_app", "chaos", "--seed", SEED, "--json"]
    done = subprocess.run(
        [*command, "--broker", test_broker, "--minutes", MINUTES[test_broker], "--out", str(tmp_path)],
        env={**os.environ, "KAFKA_HOME": str(kafka_home or "")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout, done.stderr
    ledger = json.loads(done.stdout)
    assert [check for check in ledger["checks"] if check["problems"]] == [], done.stderr
    assert (done.returncode, ledger["holds"]) == (0, True)
    assert len(ledger["faults"]) >= 2
