"""The demo from its first line to its last."""

import asyncio
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import orjson

from deploy.demo.arms import ARMS, scripts_of
from deploy.demo.client import Client
from deploy.demo.errors import DemoError
from deploy.demo.figure import draw, require_matplotlib
from deploy.demo.measure import Ledger, offline_quality, offline_ranks, streamed_quality
from deploy.demo.prepare import MODEL, Dataset, find_log, load, train_artefact
from deploy.demo.progress import Display
from deploy.demo.report import Measured, as_json, verdict, write_lists
from deploy.demo.traffic import Counts, Traffic
from deploy.demo.versions import versions
from deploy.demo.worker import WorkerProcess
from deploy.local import LocalStack, LocalStackError
from deploy.local.server import LocalServer
from schemas.topics import topic_name
from stream_app.settings import load_settings
from stream_app.topic_admin import create_topics

PARTITIONS = 4
EMBEDDED_FETCH_WAIT_MS = 5  # the embedded broker answers a fetch only when its wait is over
REDIS_BUDGET_MS = 10_000  # a busy laptop must rank every list, however long its Redis waits for a core


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller chooses; `most_lists` None: the whole test part."""

    data: str
    seed: int
    most_lists: int | None
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the stream runs: an environment for the worker, addresses for us."""

    bootstrap_servers: str
    topic_prefix: str
    environment: Mapping[str, str]
    versions: Mapping[str, str | None]

    def environment_for(self, artefact: Path) -> dict[str, str]:
        """Return the environment of a worker that serves the artefact."""
        return {**self.environment, "RERANK_ARTEFACT": str(artefact.absolute())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured; `complaint` says why it cannot be trusted, None when it can."""

    measured: Measured
    complaint: str | None
    files: list[Path]


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Start with no phase."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        start_s = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start_s


def run(options: Options, display: Display) -> Result:
    """Run the demo and write its files. Whatever happens, everything that it started is stopped.

    Raises:
        DemoError, LocalStackError: what is missing or failed, and what to do.
    """
    require_matplotlib()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {options.out}: {error.strerror}; nothing was started; name a directory") from error
    watch = Stopwatch()
    with watch.phase("data"):
        path = find_log(options.data, options.seed, options.out, display.say)
        dataset = load(options.data, path, options.seed, options.most_lists)
    display.say(_about(dataset))
    artefact = options.out / "demo-artefact"
    ledger = Ledger([dataset.log.item_ids[one.candidate_items[one.true_position]] for one in dataset.lists])
    with tempfile.TemporaryDirectory(prefix="rerank-demo-") as folder, ExitStack() as running:
        with watch.phase("servers"):
            stack = running.enter_context(LocalStack(Path(folder)))
            place = place_of(stack)
        display.say(_where(place))
        with watch.phase("training"), display.task(f"training {MODEL}") as advance:
            manifest = train_artefact(
                dataset, options.seed, artefact, lambda done, total, loss: advance(done, total, f"loss {loss:.3f}")
            )
        display.say(f"trained {MODEL} version {manifest.version} in {watch.seconds['training']:.0f} s: {artefact}")
        with watch.phase("worker"):
            worker = running.enter_context(WorkerProcess(Path(folder), place.environment_for(artefact)))
        display.say(f"worker is ready after {watch.seconds['worker']:.1f} s; replaying the test part through Kafka")
        with watch.phase("stream"):
            counts = _stream(
                dataset, ledger, place, partial(_check, worker, stack), options.out / "demo-slates.jsonl", display
            )
    with watch.phase("offline"):
        offline = offline_ranks(artefact, dataset.log, dataset.m, dataset.lists)
    users = np.array([one.user_index for one in dataset.lists])
    measured = Measured(
        dataset=dataset,
        seed=options.seed,
        ledger=ledger,
        counts=counts,
        streamed=streamed_quality(ledger, users, options.seed),
        offline=offline_quality(offline, ledger, users, options.seed),
        versions=place.versions,
        topics={name: topic_name(place.topic_prefix, name) for name in ("interactions", "candidates", "reranked")},
        model_version=manifest.version,
        seconds=watch.seconds,
    )
    return Result(measured=measured, complaint=verdict(measured), files=_write(measured, options.out))


def place_of(stack: LocalStack) -> Place:
    """Create the topics of the demo and return where they are.

    Servers that somebody else owns get topics and Redis keys of our own: a demo must not answer anybody's lists.
    """
    settings = load_settings()
    mark = f"demo-{uuid.uuid4().hex[:8]}-"
    prefix = settings.topic_prefix + (mark if stack.broker_kind == "given" else "")
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": stack.bootstrap_servers})
    asyncio.run(create_topics(settings.model_copy(update={"kafka": kafka, "topic_prefix": prefix}), PARTITIONS))
    environment = {
        **stack.environment(),
        "RERANK_TOPIC_PREFIX": prefix,
        "RERANK_GROUP_ID": f"{mark}worker",
        "RERANK_REDIS__KEY_PREFIX": f"{mark}rerank",
        "RERANK_REDIS__BUDGET_MS": str(REDIS_BUDGET_MS),
    }
    if stack.broker_kind == "embedded":
        environment["RERANK_KAFKA__FETCH_MAX_WAIT_MS"] = str(EMBEDDED_FETCH_WAIT_MS)
    return Place(
        bootstrap_servers=stack.bootstrap_servers,
        topic_prefix=prefix,
        environment=environment,
        versions=versions(stack),
    )


def _stream(
    dataset: Dataset, ledger: Ledger, place: Place, check: Callable[[], None], slates_path: Path, display: Display
) -> Counts:
    scripts = scripts_of(dataset.log, dataset.m, dataset.lists)
    client = Client(place.bootstrap_servers, place.topic_prefix)
    with slates_path.open("wb") as slates, display.task("replay") as advance:

        def on_slate(value: bytes) -> None:
            slates.write(value + b"\n")
            advance(ledger.slates, len(ARMS) * len(dataset.lists), _so_far(ledger))

        traffic = Traffic(client, dataset.log, dataset.lists, ledger, on_slate)
        return asyncio.run(traffic.play([scripts[arm] for arm in ARMS], check))


def _check(worker: WorkerProcess, stack: LocalStack) -> None:
    """Raise DemoError when a process that the replay needs is gone: waiting for answers would take minutes."""
    worker.check()
    for server in _own_servers(stack):
        if not server.is_running:
            raise DemoError(
                f"{server.name}: ended with exit code {server.child.popen.returncode}, the replay cannot go on; "
                f"its last words:\n{server.child.log_tail()}"
            )


def _own_servers(stack: LocalStack) -> Iterator[LocalServer]:
    with suppress(LocalStackError):  # given from outside
        yield stack.kafka
    with suppress(LocalStackError):
        yield stack.redis


def _write(measured: Measured, out: Path) -> list[Path]:
    """Write the files and return them, those written during the run included."""
    json_path, png_path, lists_path = out / "demo.json", out / "demo.png", out / "demo-lists.jsonl"
    json_path.write_bytes(orjson.dumps(as_json(measured), option=orjson.OPT_INDENT_2) + b"\n")
    draw(measured, png_path)
    write_lists(measured.dataset, lists_path)
    return [json_path, png_path, out / "demo-slates.jsonl", lists_path, out / "demo-artefact"]


def _so_far(ledger: Ledger) -> str:
    return "NDCG@10 so far: " + ", ".join(f"{arm} {value:.3f}" for arm, value in ledger.ndcg10_so_far().items())


def _about(dataset: Dataset) -> str:
    log = dataset.log
    return (
        f"{dataset.title}: {len(log):,} interactions of {len(log.user_ids):,} users with {len(log.item_ids):,} items; "
        f"first {dataset.m:,} for training, {len(dataset.lists):,} of {dataset.all_lists:,} test lists to replay"
    )


def _where(place: Place) -> str:
    shown = place.versions
    prefix = f", topics {place.topic_prefix}* (they stay)" if place.topic_prefix else ""
    return (
        f"{shown['broker']} Kafka broker {shown['broker_version'] or ''} on {place.bootstrap_servers}{prefix}, "
        f"Redis {shown['redis']}"
    )
