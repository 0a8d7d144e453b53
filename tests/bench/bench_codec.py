"""Microseconds per record to decode and to encode, beside what they may cost.

Run: python -m tests.bench.bench_codec
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
import timeit
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import orjson

from schemas.codec import DecodeError, decode_candidate_list, decode_interaction, encode, encode_slate
from schemas.limits import DEFAULT_LIMITS
from schemas.records import Slate
from tests.builders import candidate_list, interaction, slate

SEED = 7
RUNS = 15
RUN_S = 0.05


def main() -> None:
    """Print one line a case: median and fastest of the runs, and the target where there is one."""
    sys.stdout.write(
        f"python {platform.python_version()}, msgspec {msgspec.__version__}, orjson {orjson.__version__}, "
        f"{platform.machine()}, seed {SEED}, {RUNS} runs\n{'':32}{'median us':>10}{'min us':>10}{'target':>8}\n"
    )
    for name, (work, target_us) in cases(np.random.default_rng(SEED)).items():
        median_us, fastest_us = measure(work)
        sys.stdout.write(f"{name:32}{median_us:10.2f}{fastest_us:10.2f}{target_us or '':>8}\n")


def cases(generator: np.random.Generator) -> dict[str, tuple[Callable[[], object], float | None]]:
    """Return the work of each case and what it may cost in microseconds."""
    click = encode(interaction())
    foreign_click = encode(interaction(item_id="товар-1"))
    hundred = encode(candidate_list(item_ids=[f"item-{index}" for index in range(100)]))
    foreign_hundred = encode(candidate_list(item_ids=[f"товар-{index}" for index in range(100)]))
    return {
        "decode interaction": (partial(decode_interaction, b"u-1", click, DEFAULT_LIMITS), 2.5),
        "decode interaction, not ASCII": (partial(decode_interaction, b"u-1", foreign_click, DEFAULT_LIMITS), None),
        "  msgspec alone, untyped": (partial(msgspec.json.decode, click), None),
        "decode list of 100": (partial(decode_candidate_list, b"u-1", hundred, DEFAULT_LIMITS), 20.0),
        "decode list of 100, not ASCII": (
            partial(decode_candidate_list, b"u-1", foreign_hundred, DEFAULT_LIMITS),
            None,
        ),
        "  orjson alone, untyped": (partial(orjson.loads, hundred), None),
        "refuse 500 kB of nesting": (partial(refuse, b'{"a":' * 100_000), 10_000.0),
        "encode interaction": (partial(encode, interaction()), None),
        "encode slate of 10": (partial(encode_slate, ranked(10, generator)), 8.0),
        "encode slate of 100": (partial(encode_slate, ranked(100, generator)), 25.0),
    }


def ranked(count: int, generator: np.random.Generator) -> Slate:
    """Return a slate of `count` items as the pipeline makes it: float32 arrays, no explanations."""
    return slate(
        item_ids=[f"item-{index}" for index in range(count)],
        scores=generator.standard_normal(count, dtype=np.float32),  # (K,)
        retrieval_positions=generator.permutation(count).tolist(),
        propensities=np.ones(count, dtype=np.float32),  # (K,)
        explanations=None,
    )


def refuse(value: bytes) -> None:
    """Decode a bad interaction."""
    with contextlib.suppress(DecodeError):
        decode_interaction(b"u-1", value, DEFAULT_LIMITS)


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Return the median and the fastest of the runs, microseconds per call."""
    timer = timeit.Timer(work)
    calls = max(1, int(RUN_S / timer.timeit(number=10) * 10))
    times_us = [seconds / calls * 1e6 for seconds in timer.repeat(repeat=RUNS, number=calls)]
    return statistics.median(times_us), min(times_us)


if __name__ == "__main__":
    main()
