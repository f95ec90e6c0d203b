# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All that the numbers of a checkpoint say: every tensor is read once."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import stored
from ..checkpoint import TensorInfo
from ..findings import Finding, worst_first
from ..known import Known
from ..layout import MAX_EXPERTS
from ..weights import WEIGHT, Module, must_be_zero
from .faults import (
    NOT_POSITIVE,
    ZERO_CHANNELS,
    are_zero_channels,
    fault_findings,
    faults_of,
)
from .measure import Counter, ModuleStats, Progress, Scales, measure, nbytes
from .outliers import stand_out
from .reference import Reference, reference_findings

# What --deep looks for in every checkpoint, and beside a reference.
ASKED = (
    "NaN or infinity",
    "scales of zero or below",
    "zero points that kernels ignore and that are not 0",
    "channels with many weights at the end of the range",
    "norms far from their neighbours'",
)
ASKED_OF_REFERENCE = "weights far from the reference's"


@dataclass(frozen=True)
class DeepResult:
    """findings: worst first; modules: of every INT8 weight, in the files' order;
    tensors, bytes: how many were read of the checkpoint; asked: what was looked for, in
    words."""

    findings: tuple[Finding, ...]
    modules: tuple[ModuleStats, ...]
    tensors: int
    bytes: int
    asked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As in this class; of findings the ids, an object as in ModuleStats for each
        module."""
        return {
            "tensors": self.tensors,
            "bytes": self.bytes,
            "asked": list(self.asked),
            "found": [each.id for each in self.findings],
            "modules": [asdict(module) for module in self.modules],
        }


def _is_int8(module: Module) -> bool:
    """Whether a module holds INT8 weights that can be measured."""
    weight = module.get(WEIGHT)
    if weight is None or weight.dtype != "I8" or not math.prod(weight.shape):
        return False
    return len(weight.shape) == 2 or (
        len(weight.shape) == 3 and weight.shape[0] <= MAX_EXPERTS
    )


def deep_findings(
    known: Known,
    reference: Path | None = None,
    progress: Progress | None = None,
) -> DeepResult:
    """Read all tensors, of a checkpoint on this machine, and what they say.

    known: of the checkpoint; reference: folder of the float checkpoint to compare with;
    progress: called now and then. Needs memory for some MiB and the scales of one
    module, whatever the size of the tensors. Raises CheckpointError for a file that
    cannot be read and for a reference that is no float version of the same model.
    """
    tensors = known.export.tensors
    int8 = {each.name: each for each in known.int8}
    order = sorted(
        known.export.modules.items(),
        key=lambda item: min((each.file, each.start) for each in item[1].values()),
    )
    compared = Reference(reference) if reference else None
    pairs: list[tuple[str, Module, int, int, tuple[TensorInfo, int] | None]] = []
    missing = []
    for name, module in order:
        if not _is_int8(module):
            continue
        rows, columns = module[WEIGHT].shape[-2:]
        for part, index, count in stored.parts(name, module):
            found = None
            if compared and Scales.of(module, index, count, rows):
                found = compared.find(part, rows, columns)
                if found is None:
                    missing.append(part)
            pairs.append((part, module, index, count, found))
    stored_bytes = sum(map(nbytes, tensors.values()))
    total = stored_bytes + sum(
        nbytes(found[0]) // (found[0].shape[0] if len(found[0].shape) == 3 else 1)
        for *_, found in pairs
        if found
    )
    counter = Counter(total, progress)
    modules = [measure(*pair, counter) for pair in pairs]
    faults: dict[str, list[str]] = defaultdict(list)
    for name, module in order:
        for suffix, tensor in module.items():
            if suffix == WEIGHT and _is_int8(module):
                continue
            read = int8.get(name)
            is_ignored = read is not None and must_be_zero(
                suffix, read.is_experts, read.config
            )
            for each in faults_of(tensor, is_ignored, counter):
                if each == NOT_POSITIVE and are_zero_channels(module, tensor):
                    each = ZERO_CHANNELS
                faults[each].append(tensor.name)
    findings = [*fault_findings(faults), *stand_out(modules)]
    if compared:
        pairs_compared = {part for part, *_, found in pairs if found}
        both = [module for module in modules if module.name in pairs_compared]
        findings += reference_findings(both, missing)
    return DeepResult(
        tuple(worst_first(findings)),
        tuple(modules),
        len(tensors),
        stored_bytes,
        (*ASKED, ASKED_OF_REFERENCE) if compared else ASKED,
    )
