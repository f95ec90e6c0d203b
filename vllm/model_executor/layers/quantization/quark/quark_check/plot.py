# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A picture of how far the INT8 weights are from the float model's."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .checkpoint import misfit
from .deep.measure import ModuleStats

NUM_BINS = 40
# Told apart by the hatching as well as by the colour.
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "+++", "ooo")


def histogram(
    modules: Iterable[ModuleStats], bins: int = NUM_BINS
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges [bins + 1] of the relative errors, and of each kind of module, by the last
    part of its name, how many have an error in each bin, [bins].

    Bins are equally wide on a logarithmic axis; an error of 0 counts in the first.
    """
    errors: dict[str, list[float]] = defaultdict(list)
    for module in modules:
        if module.error is not None:
            errors[module.name.rpartition(".")[2]].append(module.error)
    positive = [error for found in errors.values() for error in found if error > 0]
    least, greatest = min(positive, default=1e-3), max(positive, default=1e-1)
    # A little beyond both, so that rounding puts none outside.
    edges = np.geomspace(least * 0.99, greatest * 1.01, bins + 1)
    counts = {
        kind: np.histogram(np.maximum(found, edges[0]), edges)[0]
        for kind, found in sorted(errors.items())
    }
    return edges, counts


def write_histogram(modules: Iterable[ModuleStats], file: Path, title: str) -> None:
    """Write the histogram of the relative errors as a PNG.

    Raises CheckpointError where matplotlib is not installed, no module was compared, or
    the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        remedy = "pip install matplotlib"
        raise misfit("--plot", "matplotlib", "none", remedy) from None
    edges, counts = histogram(modules)
    if not counts:
        remedy = "give the float model with --reference"
        raise misfit("--plot", "modules compared with a reference", "none", remedy)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    below = np.zeros(len(edges) - 1)
    for index, (kind, found) in enumerate(counts.items()):
        axes.bar(
            edges[:-1],
            found,
            np.diff(edges),
            below,
            align="edge",
            label=f"{kind} ({found.sum()})",
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            linewidth=0.3,
        )
        below += found
    axes.set_xscale("log")
    axes.set_xlabel("relative error, ||dequantized - reference|| / ||reference||")
    axes.set_ylabel("weights")
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        found_ = error.strerror or str(error)
        raise misfit(file, "a file to write to", found_, "name another") from None
