# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Numbers that are certainly wrong, in the tensors beside the weights."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .. import stored
from ..checkpoint import TensorInfo
from ..findings import Finding, finding
from ..problems import EXPORT_AGAIN, KINDS
from ..weights import INPUT_SCALE, SCALE, WEIGHT, Module
from .measure import Counter, nbytes

NON_FINITE, NOT_POSITIVE = "non-finite", "scale-not-positive"
NOT_ZERO, ZERO_CHANNELS = "zero-point-not-zero", "zero-channels"


def faults_of(tensor: TensorInfo, is_ignored: bool, counter: Counter) -> set[str]:
    """Ids of the findings that a tensor shows; is_ignored: it is a zero point, and
    kernels ignore it."""
    is_float = tensor.dtype in stored.FLOATS
    is_scale = is_float and tensor.name.rpartition(".")[2] in (SCALE, INPUT_SCALE)
    is_zero_point = is_ignored and tensor.dtype in stored.NUMBERS
    if not is_float and not is_zero_point:
        counter.add(nbytes(tensor))
        return set()
    found = set()
    for _, _, first, count in stored.blocks(1, math.prod(tensor.shape)):
        if is_zero_point and stored.read(tensor, first, count).any():
            found.add(NOT_ZERO)
        if is_float and not stored.is_finite(tensor, first, count):
            found.add(NON_FINITE)
        if is_scale and (stored.read(tensor, first, count) <= 0).any():
            found.add(NOT_POSITIVE)
        counter.add(nbytes(tensor) * count // math.prod(tensor.shape))
    return found


def are_zero_channels(module: Module, scale: TensorInfo) -> bool:
    """Whether scales that are not above zero are finite, and belong to channels, or
    tensors, of zeros."""
    weight = module.get(WEIGHT)
    if scale.name.rpartition(".")[2] != SCALE or weight is None or weight.dtype != "I8":
        return False
    values = stored.read(scale, 0, math.prod(scale.shape))
    return bool(np.isfinite(values).all()) and stored.holds_zeros(
        weight.file, weight.start, weight.end, values <= 0
    )


def fault_findings(faults: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """faults: id -> names of the tensors that show it."""
    if names := faults.get(NON_FINITE):
        yield finding(
            NON_FINITE,
            "garbage",
            "tensors that hold NaN or infinity",
            "one such number makes every answer that meets it NaN; vLLM 0.20.2 loads "
            "it, this fork refuses it",
            f"download the shard again; if it is still so, {EXPORT_AGAIN}",
            names,
        )
    if names := faults.get(NOT_POSITIVE):
        yield finding(
            NOT_POSITIVE,
            "garbage",
            "scales of zero or below",
            "the channel answers zero, or with the wrong sign; a layer that saw no "
            "data has no scale; vLLM 0.20.2 loads it, this fork refuses it",
            f"{EXPORT_AGAIN}, with calibration data that reach every layer",
            names,
        )
    if names := faults.get(ZERO_CHANNELS):
        kind = KINDS[ZERO_CHANNELS]
        yield finding(kind.id, "note", kind.summary, kind.why, kind.remedy, names)
    if names := faults.get(NOT_ZERO):
        yield finding(
            NOT_ZERO,
            "garbage",
            "zero points other than zero, which INT8 kernels ignore",
            "every number of the layer is shifted; vLLM 0.20.2 drops them in silence, "
            "this fork refuses them",
            f"{EXPORT_AGAIN} with symmetric quantization",
            names,
        )
