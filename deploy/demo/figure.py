"""The picture: what updating the user state is worth, and how soon a click counts."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from deploy.demo.errors import DemoError
from deploy.demo.measure import quantiles
from deploy.demo.report import Measured

_BARS = {
    "retrieval": ("retrieval order\n(popularity, 7 days)", "#b8bec9"),
    "frozen": ("user state\nfrozen at the split", "#8f98a8"),
    "live_strict": ("live, strict\n(same second hidden)", "#5b8fd6"),
    "live": ("live\n(every event)", "#1f5fb4"),
}
_CURVES = {
    "list_ms": ("candidate list → slate", "#1f5fb4"),
    "click_ms": ("click → first slate that reflects it", "#d9722e"),
}


def require_matplotlib() -> None:
    """Raise DemoError when no picture can be drawn, before anything is started."""
    if find_spec("matplotlib") is None:  # only the extra `train` brings it
        raise DemoError(
            "matplotlib is not installed: no picture could be drawn, nothing was started; "
            "pip install 'stream-rerank[train]'"
        )


def draw(measured: Measured, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second that no other command needs

    figure = Figure(figsize=(12.0, 5.0), dpi=130, layout="constrained")
    bars, latencies = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _draw_quality(bars, measured)
    _draw_latency(latencies, measured)
    dataset, versions = measured.dataset, measured.versions
    figure.suptitle(
        f"{dataset.title}: {len(dataset.lists):,} lists an arm, read from slates on Kafka "
        f"({versions['broker']} broker, {measured.counts.lists / measured.counts.replay_s:,.0f} lists/s)",
        fontsize=12,
    )
    figure.savefig(path)


def _draw_quality(axes: Any, measured: Measured) -> None:
    names = [name for name, _ in _BARS.values()]
    estimates = [measured.streamed[policy].metrics["ndcg10"] for policy in _BARS]
    values = np.nan_to_num([one.value for one in estimates])
    spread = np.nan_to_num([[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]])
    axes.bar(
        names,
        values,
        color=[color for _, color in _BARS.values()],
        width=0.62,
        yerr=spread,
        error_kw={"ecolor": "#333333", "elinewidth": 1.0, "capsize": 3.0},
    )
    top = float((values + spread[1]).max()) or 1.0
    for place, value in enumerate(values):
        axes.text(place, value / 2.0, f"{value:.3f}", ha="center", va="center", color="white", fontweight="bold")
    frozen = values[list(_BARS).index("frozen")]
    for policy in ("live_strict", "live"):
        place = list(_BARS).index(policy)
        if frozen:
            height = values[place] + spread[1][place] + 0.02 * top
            axes.text(place, height, f"{values[place] / frozen:.1f} times frozen", ha="center", va="bottom", fontsize=9)
    axes.set_ylim(0.0, 1.14 * top)
    axes.set_ylabel("NDCG@10 (95 % interval, users resampled)")
    axes.set_title("What updating the user state is worth", fontsize=11)
    _tidy(axes)


def _draw_latency(axes: Any, measured: Measured) -> None:
    highest_ms = 1.0
    for name, (label, color) in _CURVES.items():
        values_ms = np.sort(getattr(measured.ledger, name))
        if not len(values_ms):
            continue
        shown = quantiles(values_ms.tolist())
        share = np.arange(1, len(values_ms) + 1) / len(values_ms)
        axes.plot(
            values_ms,
            share,
            color=color,
            linewidth=2.0,
            label=f"{label}\np50 {shown['p50']:.0f}, p99 {shown['p99']:.0f} ms",
        )
        highest_ms = max(highest_ms, float(np.percentile(values_ms, 99.7)))
    axes.set_xlim(0.0, 1.05 * highest_ms)
    axes.set_ylim(0.0, 1.01)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 0.9, 1.0], ["0 %", "25 %", "50 %", "75 %", "90 %", "100 %"])
    axes.set_xlabel("milliseconds, through broker, worker and Redis")
    axes.set_ylabel("answered within")
    axes.set_title("How soon a click counts", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
