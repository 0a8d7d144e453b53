"""The documentation says what the code does: settings, commands, codes, metrics, links, examples, names of tests."""

import os
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from prometheus_client import Counter
from pydantic import BaseModel, SecretStr

from schemas.dead_letter import DEAD_LETTER_HEADERS, TRUNCATED_HEADER
from schemas.records import CandidateList
from schemas.refusals import ErrorCode
from schemas.topics import DEAD_LETTERS, TOPICS
from stream_app import agents, pipeline, slate
from stream_app.__main__ import app
from stream_app.features import FEATURES, gather
from stream_app.scorer import load_artefact
from stream_app.settings import ENV_PREFIX, Settings
from stream_app.state import cold_row
from stream_app.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = "schemas|models|stream_app|deploy|tests"
CODE_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def page(name: str) -> str:
    """Return the text of a page, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return the part of a page under a heading, up to the next one of the same level or above."""
    level = heading.split(" ", 1)[0]
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(table: str) -> list[str]:
    """Return the code in the first cell of every row that starts with code."""
    return CODE_ROW.findall(table)


def settings_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each variable and its default as the table writes it; `-` where there is none."""
    for name, field in model.model_fields.items():
        default: Any = field.default
        if isinstance(default, BaseModel):
            yield from settings_of(type(default), f"{prefix}{name.upper()}__")
            continue
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        yield prefix + name.upper(), "-" if default in (None, "") else f"`{default}`"


def commands_of(command: Any, *words: str) -> Iterator[str]:
    """Yield every command below a click command as words; typer brings a click of its own, without public types."""
    for name, child in getattr(command, "commands", {}).items():
        yield " ".join((*words, name))
        yield from commands_of(child, *words, name)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(text: str) -> list[str]:
    """Return the fenced Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_settings_table_has_every_setting_with_its_default_and_a_unit() -> None:
    rows = [line for line in page("docs/operators.md").splitlines() if line.startswith(f"| `{ENV_PREFIX}")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(variable.strip("`"), default) for variable, default, *_ in cells] == list(
        settings_of(Settings, ENV_PREFIX)
    )
    assert [variable for variable, _, unit, _ in cells if not unit] == []


@pytest.mark.parametrize(("suffix", "unit"), [("_MS", "ms"), ("_S", "s"), ("_BYTES", "bytes"), ("_RECORDS", "records")])
def test_a_setting_whose_name_says_its_unit_has_that_unit(suffix: str, unit: str) -> None:
    rows = re.findall(rf"^\| `{ENV_PREFIX}\w+{suffix}` \| \S+ \| (\S+) \|", page("docs/operators.md"), re.MULTILINE)
    assert set(rows) == {unit}


def test_the_telemetry_table_has_every_metric_with_its_labels() -> None:
    telemetry = Telemetry()
    metrics = [value for value in vars(telemetry).values() if hasattr(value, "_labelnames")]
    expected = {
        metric._name + ("_total" if isinstance(metric, Counter) else ""): ", ".join(metric._labelnames)
        for metric in metrics
    }
    table = section(page("docs/operators.md"), "## Telemetry")
    assert dict(re.findall(r"^\| `(\w+)` \| ([\w, ]*?) *\|", table, re.MULTILINE)) == expected


def test_the_table_of_error_codes_has_every_code() -> None:
    table = section(page("docs/contract.md"), "### Error codes")
    assert set(first_cells(table)) == {*ErrorCode, agents.INTERNAL_ERROR, agents.OUTPUT_TOO_LARGE}


def test_the_table_of_topics_has_every_topic() -> None:
    table = section(page("docs/contract.md"), "## Topics")
    assert first_cells(table) == [spec.name for spec in (*TOPICS, *DEAD_LETTERS)]


def test_the_table_of_dead_letter_headers_has_every_header() -> None:
    text = section(page("docs/contract.md"), "## Dead letters").split("###", 1)[0]
    assert first_cells(text) == list(DEAD_LETTER_HEADERS)
    assert f"`{TRUNCATED_HEADER}`" in text


def test_the_table_of_reasons_has_every_reason() -> None:
    table = section(page("docs/feed-services.md"), "### Reasons")
    ours = (pipeline.STALE, pipeline.DEADLINE, pipeline.STORE_UNAVAILABLE, pipeline.MODEL_ERROR)
    theirs = (pipeline.MODEL_NONFINITE, slate.COLD_USER, slate.COLD_ITEMS, slate.DEGRADED, slate.NONFINITE_SCORE)
    assert set(first_cells(table)) == {*ours, *theirs}


def test_every_feature_is_named() -> None:
    text = page("docs/data-scientists.md")
    assert [name for name in FEATURES if f"`{name}`" not in text] == []


def test_the_table_of_commands_has_every_command() -> None:
    known = set(commands_of(typer.main.get_command(app)))
    leaves = {name for name in known if not any(other.startswith(f"{name} ") for other in known)}
    table = section(page("docs/operators.md"), "## Commands")
    assert {cell.removeprefix("rerank ") for cell in first_cells(table)} == leaves


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_named_exists(path: Path) -> None:
    known = set(commands_of(typer.main.get_command(app)))
    groups = {name.split(" ")[0] for name in known if " " in name}
    named = re.findall(r"(?:`|^    (?:\w+=\S+ )?)rerank ([a-z-]+)(?: ([a-z]+))?", path.read_text(), re.MULTILINE)
    words = {f"{first} {second}" if first in groups and second else first for first, second in named}
    assert words - known == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", page("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named - targets == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_internal_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_example_compiles(path: Path) -> None:
    for number, block in enumerate(python_blocks(path.read_text())):
        compile(block, f"{path.name}[{number}]", "exec")


def wrong_names(text: str, defined: set[str]) -> set[str]:
    """Return the tests, files and modules of the repository that a text names and that are not there."""
    wrong = set(re.findall(r"\b(?:test|bench)_\w+", text)) - defined
    wrong |= {name for name in re.findall(rf"\b(?:{PACKAGES})/[\w/]+\.py\b", text) if not (ROOT / name).exists()}
    modules = {name: ROOT / name.replace(".", "/") for name in re.findall(rf"-m ((?:{PACKAGES})(?:\.\w+)*)", text)}
    return wrong | {
        name for name, at in modules.items() if not at.with_suffix(".py").exists() and not (at / "__main__.py").exists()
    }


def test_the_table_of_floors_is_the_one_that_make_arch_checks() -> None:
    contracts = tomllib.loads(page("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["name"] == "the floors of the worker"]
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", section(page("DESIGN.md"), "## Floors"), re.MULTILINE)
    shown = [re.findall(r"`([\w.]+)`", row) for row in rows]
    assert shown == [[name.removeprefix("stream_app.") for name in layer.split(" | ")] for layer in layers]


def test_every_test_file_and_module_named_exists() -> None:
    sources = [source for package in PACKAGES.split("|") for source in (ROOT / package).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in (*sources, *PAGES, ROOT / "Makefile")}
    defined = set(re.findall(r"\bdef ((?:test|bench)_\w+)", "\n".join(texts.values()))) | {one.stem for one in sources}
    found = {str(path.relative_to(ROOT)): wrong_names(text, defined) for path, text in texts.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_is_not_there_is_found() -> None:
    stranger, path, module = "_".join(("test", "of", "nothing")), "/".join(("tests", "none.py")), "tests.none"
    assert wrong_names(f"`{stranger}` in {path}, run by python -m {module}", set()) == {stranger, path, module}


def test_the_model_example_is_an_artefact_that_loads_and_ranks(tmp_path: Path) -> None:
    (example,) = python_blocks(page("docs/data-scientists.md"))
    program = tmp_path / "my_model.py"
    program.write_text(example)
    directory = tmp_path / "decaying-mean" / "1"
    runpy.run_path(str(program), run_name="my_model")["write_artefact"](directory)
    artefact = load_artefact(directory)
    request = CandidateList(request_id="r-1", user_id="u-1", event_time_ms=0, item_ids=["i-1", "new", "i-3"])
    row = cold_row(artefact.manifest.dims.S)
    batch = gather([request], [row], arena=artefact.arena, history_size=0, feature_names=[])
    bias = np.load(directory / "items.npy")[:, -1]
    assert artefact.model.score(batch).tolist() == [[bias[1], 0.0, bias[3]]]


def test_no_page_names_a_path_of_a_machine() -> None:
    homes = (str(Path.home()), os.sep + "home" + os.sep, os.sep + "tmp" + os.sep)
    named = {path.name for path in PAGES for home in homes if len(home) > 1 and home in path.read_text()}
    assert named == set()
