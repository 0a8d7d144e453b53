"""Write the fault matrix into a page, each row with its tests and how they ended last.

python -m tests.fault_table select                       a `-k` expression that runs every test of the matrix
python -m tests.fault_table write PAGE REPORT.xml ...    pytest's reports; the name of a file is that of the broker
"""

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fault_rows import ROWS, Row

BEGIN, END = "<!-- begin: written by `make faults` -->", "<!-- end -->"
_WORST = ("passed", "skipped", "failed")  # of the cases of one test, the last in this order counts

Run = Mapping[str, str]  # test name -> how it ended


def select() -> str:
    """Return the expression for `pytest -k`."""
    return " or ".join(sorted({name for row in ROWS for name in row.tests}))


def read_report(path: Path) -> dict[str, str]:
    """Return how each test of a JUnit report of pytest ended, over all of its cases."""
    ended: dict[str, str] = defaultdict(lambda: _WORST[0])
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it
        kinds = {child.tag for child in case}
        how = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = case.attrib["name"].partition("[")[0]
        ended[name] = max(ended[name], how, key=_WORST.index)
    return dict(ended)


def report_line(path: Path) -> str:
    """Return when a run was and what came of it."""
    suite = next(ET.parse(path).iter("testsuite")).attrib  # noqa: S314 - pytest wrote it
    failed = int(suite["failures"]) + int(suite["errors"])
    return (
        f"{path.stem}, {suite['timestamp'][:16].replace('T', ' ')}: {suite['tests']} cases, {failed} failed, "
        f"{suite['skipped']} skipped, {float(suite['time']):.0f} s"
    )


def table(runs: Mapping[str, Run]) -> str:
    """Return the matrix as Markdown."""
    lines = ["| # | fault | what happens | tests | last run |", "|---|---|---|---|---|"]
    lines += [_line(number, row, runs) for number, row in enumerate(ROWS, start=1)]
    return "\n".join(lines)


def _line(number: int, row: Row, runs: Mapping[str, Run]) -> str:
    tests = [f"`{name}`" for name in row.tests]
    if row.untested:
        tests.append(f"not tested here: {row.untested}")
    ended = [f"{broker}: {_outcome(row.tests, run)}" for broker, run in runs.items()]
    last = ", ".join(one for one in ended if not one.endswith("-")) if row.tests else ""
    return f"| {number} | {row.fault} | {row.expected} | {', '.join(tests)} | {last or '-'} |"


def _outcome(names: Sequence[str], run: Run) -> str:
    known = [run[name] for name in names if name in run]
    return max(known, key=_WORST.index) if known else "-"


def replaced(page: str, text: str) -> str:
    """Return the page with `text` between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def main(arguments: Sequence[str]) -> None:
    """Do as the arguments say."""
    if arguments == ["select"]:
        sys.stdout.write(select() + "\n")
        return
    _, page, *reports = arguments
    paths = [Path(report) for report in reports]
    runs = {path.stem: read_report(path) for path in paths}
    text = "\n".join([*(f"- {report_line(path)}" for path in paths), "", table(runs)])
    Path(page).write_text(replaced(Path(page).read_text(), text))
    sys.exit(any("failed" in run.values() for run in runs.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
