"""The page of faults shows the matrix as it is, and how its tests ended."""

import re
from pathlib import Path

from tests.fault_rows import ROWS
from tests.fault_table import BEGIN, END, read_report, replaced, report_line, select, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
REPORT = """<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="4" time="12.3"
 timestamp="2026-01-02T03:04:05.6+00:00" hostname="h">
<testcase name="a[one]"/><testcase name="a[two]"><failure/></testcase>
<testcase name="b"/><testcase name="c"><skipped/></testcase>
</testsuite></testsuites>"""


def test_the_page_has_every_row_of_the_matrix() -> None:
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    shown = [line.rsplit(" | ", 1)[0] for line in text.splitlines() if re.match(r"\| \d", line)]
    assert shown == [line.rsplit(" | ", 1)[0] for line in table({}).splitlines()[2:]]


def test_every_row_has_a_test_or_says_why_not() -> None:
    assert [row.fault for row in ROWS if not row.tests and not row.untested] == []


def test_of_the_cases_of_a_test_the_worst_counts(tmp_path: Path) -> None:
    report = tmp_path / "embedded.xml"
    report.write_text(REPORT)
    assert read_report(report) == {"a": "failed", "b": "passed", "c": "skipped"}
    assert report_line(report) == "embedded, 2026-01-02 03:04: 4 cases, 1 failed, 1 skipped, 12 s"


def test_what_stands_around_the_table_stays() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"


def test_the_selection_names_every_test_of_the_matrix() -> None:
    assert set(select().split(" or ")) == {name for row in ROWS for name in row.tests}
