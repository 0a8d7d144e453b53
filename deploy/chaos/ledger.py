"""The account of a run, and how it is told: a table on a terminal, lines in a pipe, JSON for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.chaos.checks import SHOWN, Check

Row = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that was done: when (seconds into the run and step), what, and what came in its way."""

    at_s: float
    step: int
    name: str
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What a run did and found."""

    seed: int
    broker: str
    workers: int
    took_s: float
    faults: list[Struck]
    counts: dict[str, int]
    worker_starts: int
    ended_by_themselves: list[str]
    quiet_after_s: float | None
    checks: list[Check]
    left_out: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Return titles with their rows."""
        quiet = "never" if self.quiet_after_s is None else f"{self.quiet_after_s:.1f} s after the last fault healed"
        run = [
            ("seed, broker, workers", f"{self.seed}, {self.broker}, {self.workers}"),
            ("length", f"{self.took_s:.0f} s"),
            ("faults", str(len(self.faults))),
            ("of them, server not up again in time", str(sum(bool(one.trouble) for one in self.faults))),
            ("quiet", quiet),
            ("worker processes started", str(self.worker_starts)),
            ("workers that ended by themselves", str(len(self.ended_by_themselves))),
        ]
        faults = [(name, str(count)) for name, count in sorted(Counter(one.name for one in self.faults).items())]
        counts = [(name, f"{count:,}") for name, count in self.counts.items()]
        checks = [(check.name, _verdict(check)) for check in self.checks]
        return [("run", run), ("faults", faults), ("records", counts), ("checks", checks)]

    def markdown(self) -> str:
        """Return the sections as tables, for docs/faults.md."""
        tables = [
            f"| {title} | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
            for title, rows in self.sections()
        ]
        return "\n".join(tables) + "\nNot tried: " + "; ".join(self.left_out) + ".\n"

    def differences(self) -> list[str]:
        """Return what does not hold, a few examples of each."""
        lines = []
        for check in self.checks:
            lines += [f"{check.name}: {problem}" for problem in check.problems[:SHOWN]]
            if len(check.problems) > SHOWN:
                lines.append(f"{check.name}: and {len(check.problems) - SHOWN} more")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON can say it."""
        return {
            "seed": self.seed,
            "broker": self.broker,
            "workers": self.workers,
            "took_s": round(self.took_s, 1),
            "holds": self.holds,
            "quiet_after_s": self.quiet_after_s,
            "faults": [
                {"at_s": round(one.at_s, 1), "step": one.step, "name": one.name, "trouble": one.trouble}
                for one in self.faults
            ],
            "counts": self.counts,
            "worker_starts": self.worker_starts,
            "ended_by_themselves": self.ended_by_themselves,
            "checks": [{"name": check.name, "cases": check.cases, "problems": check.problems} for check in self.checks],
            "left_out": list(self.left_out),
        }


def _verdict(check: Check) -> str:
    return f"holds ({check.cases:,})" if check.holds else f"FAILS: {len(check.problems):,} of {check.cases:,}"
