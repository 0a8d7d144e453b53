"""Fail unless the test reports in a folder cover every integration test file, with nothing skipped.

Usage: executed.py FOLDER. The folder holds the JUnit files of `make test`: embedded.xml, and apache.xml when there
was an Apache Kafka. Without apache.xml the tests that need it are named, not demanded.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

INTEGRATION = Path("tests/integration")


def main() -> int:
    """Print what was executed; return 1 if something was skipped or is missing."""
    reports = {path.stem: ElementTree.parse(path).findall(".//testcase") for path in Path(sys.argv[1]).glob("*.xml")}  # noqa: S314 - our own pytest wrote it
    problems = [] if "embedded" in reports else ["embedded.xml: no report, no test was executed"]
    executed_modules: set[str] = set()
    total = 0
    for name, cases in sorted(reports.items()):
        skipped = [case for case in cases if case.find("skipped") is not None]
        problems += [f"{name}: skipped {case.get('classname')}::{case.get('name')}" for case in skipped]
        executed = [case for case in cases if case.find("skipped") is None]
        executed_modules |= {case.get("classname", "") for case in executed}
        total += len(executed)
        on_servers = sum(case.get("classname", "").startswith("tests.integration") for case in executed)
        print(f"{name}: {len(executed)} tests executed, {on_servers} of tests/integration")
    missing = [path for path in sorted(INTEGRATION.glob("test_*.py")) if not _covered(path, executed_modules)]
    if "apache" in reports:
        problems += [f"{path}: none of its tests was executed" for path in missing]
    else:
        print("skipped: Apache Kafka; not executed for want of it:", ", ".join(map(str, missing)) or "no whole file")
    print("\n".join(problems))
    print(f"{total} passed, {len(problems)} failed")
    return 1 if problems else 0


def _covered(path: Path, modules: set[str]) -> bool:
    module = ".".join(path.with_suffix("").parts)
    return any(name == module or name.startswith(module + ".") for name in modules)


if __name__ == "__main__":
    raise SystemExit(main())
