# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights that stand out."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from ..findings import Finding, finding
from ..layout import layer_index
from ..problems import EXPORT_AGAIN
from ..weights import expert_of
from .measure import SATURATED_SHARE, ModuleStats

# A norm stands out where it is so many times its neighbours', or that part of it.
# Neighbours are the nearest layers on either side, and a layer's other experts.
NORM_FACTOR = 4.0
NEIGHBOURS_A_SIDE, LEAST_NEIGHBOURS = 2, 3
_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


def _ratio(value: float, others: Sequence[float]) -> float | None:
    """value over the median of others, on a scale of ratios; None for too few."""
    if len(others) < LEAST_NEIGHBOURS:
        return None
    return math.exp(math.log(value) - median(map(math.log, others)))


def norm_outliers(modules: Sequence[ModuleStats]) -> dict[str, float]:
    """Name -> times its neighbours', of experts beside the other experts of their layer
    and of layers beside the nearest ones."""
    experts: dict[tuple[str, str], list[ModuleStats]] = defaultdict(list)
    layers: dict[str, dict[int, tuple[str, float]]] = defaultdict(dict)
    for module in modules:
        if not module.rms:  # nothing known, or nothing but zeros
            continue
        if expert := expert_of(module.name):
            experts[expert[0], module.name.rpartition(".")[2]].append(module)
        elif (index := layer_index(module.name)) is not None:
            kind = _LAYER.sub(".layers.*.", module.name)
            layers[kind][index] = module.name, module.rms
    found: dict[str, float] = {}

    def note(name: str, value: float, others: Sequence[float]) -> None:
        ratio = _ratio(value, others)
        if ratio and not 1 / NORM_FACTOR < ratio < NORM_FACTOR:
            found[name] = ratio

    for (prefix, last), group in experts.items():
        values = [module.rms or 0.0 for module in group]
        if len(values) > LEAST_NEIGHBOURS:
            # Of so many, one more does not move the median.
            for module, value in zip(group, values, strict=True):
                note(module.name, value, values)
        if (index := layer_index(prefix)) is not None:
            kind = f"{_LAYER.sub('.layers.*.', prefix)}.*.{last}"
            layers[kind][index] = f"{prefix}.*.{last}", median(values)
    for kind_layers in layers.values():
        order = sorted(kind_layers)
        for place, index in enumerate(order):
            name, value = kind_layers[index]
            before = order[max(0, place - NEIGHBOURS_A_SIDE) : place]
            after = order[place + 1 : place + 1 + NEIGHBOURS_A_SIDE]
            if len(before) + len(after) < LEAST_NEIGHBOURS:
                # At an end: as many as there are on the side that has them.
                before = order[max(0, place - LEAST_NEIGHBOURS) : place]
                after = order[place + 1 : place + 1 + LEAST_NEIGHBOURS]
            note(name, value, [kind_layers[each][1] for each in before + after])
    return found


def stand_out(modules: Sequence[ModuleStats]) -> Iterator[Finding]:
    saturated = [module.name for module in modules if module.saturated_rows]
    if saturated:
        rows = sum(module.saturated_rows for module in modules)
        yield finding(
            "saturated-weights",
            "warning",
            f"{rows} output channels with {SATURATED_SHARE:.0%} or more of their "
            "weights at the end of the INT8 range",
            "larger weights were cut off: the scale is too small for them, and the "
            "channel answers with too small numbers",
            f"compare with the float model (--reference); if it differs, "
            f"{EXPORT_AGAIN} with a scale from the largest weight",
            saturated,
        )
    if outliers := norm_outliers(modules):
        names = sorted(outliers, key=lambda name: -abs(math.log(outliers[name])))
        worst = outliers[names[0]]
        yield finding(
            "norm-outlier",
            "warning",
            f"weights whose norm is far from their neighbours': {names[0]} has "
            f"{worst:.3g} times theirs",
            f"{NORM_FACTOR:g} times or more either way is rare in a trained model; a "
            "scale in the wrong unit or of another layer looks so",
            "compare with the float model (--reference)",
            names,
        )
