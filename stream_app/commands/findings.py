"""What `rerank doctor` finds, and how it is shown."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import orjson

Verdict = Literal["ok", "skip", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of the doctor. `remedy` says what to change; empty when there is nothing to change."""

    check: str
    verdict: Verdict
    message: str
    remedy: str = ""


def ok(check: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check=check, verdict="ok", message=message)


def skip(check: str, message: str) -> Finding:
    """Return a finding that could not be made, and why."""
    return Finding(check=check, verdict="skip", message=message)


def warn(check: str, message: str, remedy: str) -> Finding:
    """Return a finding that costs something and stops nothing."""
    return Finding(check=check, verdict="warn", message=message, remedy=remedy)


def fail(check: str, message: str, remedy: str) -> Finding:
    """Return a finding that keeps the worker from doing its work."""
    return Finding(check=check, verdict="fail", message=message, remedy=remedy)


def healthy(findings: Iterable[Finding]) -> bool:
    """Return whether nothing failed."""
    return all(finding.verdict != "fail" for finding in findings)


def as_json(findings: list[Finding]) -> str:
    """Return one JSON object: `healthy` and the findings in order."""
    return orjson.dumps({"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings]}).decode()


def as_text(findings: list[Finding]) -> str:
    """Return one line a finding, its remedy on a line of its own."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4}  {finding.check:<{width}}  {finding.message}")
        if finding.remedy:
            lines.append(f"{'':<{width + 6}}  -> {finding.remedy}")
    return "\n".join(lines)
