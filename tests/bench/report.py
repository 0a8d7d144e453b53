"""How benchmark numbers are shown: plain lines, and a picture with the raw points."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTENDERS = ("ours", "naive")


def print_throughput(result: Mapping[str, Any]) -> None:
    """Print medians, ratios and how far they can be trusted."""
    lines = [
        f"{result['broker']}, {result['cpu']}, {result['cores']} cores (load {result['load_before']} before), "
        f"commit {result['commit']}, seed {result['seed']}",
        f"{'one process each, records/s':<30}{'ours':>12}{'naive':>12}{'ratio':>8}{'needed':>8}{'CPU us/record':>22}",
    ]
    for load, found in result["summary"].items():
        rates, cpu = found["per_second"], found["cpu_us"]
        lines.append(
            f"{load:<30}{rates['ours']:>12,.0f}{rates['naive']:>12,.0f}{found['ratio']:>8.1f}"
            f"{found['required_ratio']:>8.0f}{cpu['ours']:>12.1f} vs {cpu['naive']:.0f}"
        )
    lines.append(f"same order of items in all {result['same_order_slates']:,} slates that both made")
    print("\n".join(lines))  # noqa: T201


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw a bar a contender for each load, with every run as a point; nothing where matplotlib is missing."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - the extra `train` brings it
    except ModuleNotFoundError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(result["summary"]), figsize=(8, 4))
    for axis, (load, found) in zip(axes, result["summary"].items(), strict=True):
        rates = [found["per_second"][name] for name in CONTENDERS]
        axis.bar(CONTENDERS, rates, color=("#3b6ea5", "#b0b0b0"))
        for place, name in enumerate(CONTENDERS):
            points = [one["per_second"] for one in result["runs"][load][name]]
            axis.plot([place] * len(points), points, "k.", markersize=6)
        axis.set_title(f"{load}/s, median and runs: {found['ratio']:.1f}x")
    figure.suptitle(
        f"one process, {result['broker']}, {result['cores']} cores shared with broker and Redis", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
