# SPDX-License-Identifier: Apache-2.0
"""How benchmarks draw their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    style: str = ".-"
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """A part of a plot."""

    title: str
    lines: Sequence[Line]


def draw(
    panels: Sequence[Panel],
    path: Path,
    ylabel: str,
    log: bool = False,
    xlabel: str = "tokens",
) -> None:
    """Panels side by side, whose abscissas are powers of two; a line at 1, as what is
    not `log` are ratios."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = plt.subplots(
        *(1, len(panels)),
        figsize=(max(8, 4.2 * len(panels)), 4.7),
        squeeze=False,
        sharey=True,
    )
    labels = [line.label for panel in panels for line in panel.lines]
    # One that a panel lacks leaves its color unused there.
    colors = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(labels))}
    for axis, panel in zip(axes[0], panels, strict=True):
        for line in panel.lines:
            if line.points:
                xy = zip(*line.points, strict=True)
                color = line.color or colors[line.label]
                axis.plot(*xy, line.style, color=color, label=line.label)
        axis.set(title=panel.title, xlabel=xlabel)
        axis.set_xscale("log", base=2)
        if log:
            axis.set_yscale("log", base=2)
        else:
            axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(ylabel)
    # What one panel has, others may lack.
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles, loc="lower center", ncols=columns)
    rows = -(-len(handles) // 4)
    figure.tight_layout(rect=(0, 0.02 + 0.055 * rows, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
