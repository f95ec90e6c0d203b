# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the numbers of a Quark INT8 checkpoint say: `vllm quark-check --deep`.

Reads every tensor once, a few MiB at a time. Looks for what is certainly wrong (NaN,
infinity, scales of zero or below, zero points that kernels ignore), for what is worth a
look (saturated rows, a norm far from its neighbours'), and compares the dequantized
weights with a float checkpoint's where one is given.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.model_executor.layers.quantization.quark.checkpoint import (
    DTYPE_BITS,
    TensorInfo,
    misfit,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.export import (
    INPUT_SCALE,
    SCALE,
    WEIGHT,
    Module,
    expert_of,
    must_be_zero,
)
from vllm.model_executor.layers.quantization.quark.layout import (
    MAX_EXPERTS,
    layer_index,
)
from vllm.model_executor.layers.quantization.quark.problems import (
    EXPORT_AGAIN,
    KINDS,
)
from vllm.model_executor.layers.quantization.quark.quark_check import stored
from vllm.model_executor.layers.quantization.quark.quark_check.findings import (
    Finding,
    finding,
    worst_first,
)
from vllm.model_executor.layers.quantization.quark.quark_check.known import Known

# A row is saturated where so large a share of its weights, and no fewer than so many,
# lie at the end of the range. A row scaled by its largest weight has one or two there.
SATURATED_SHARE, SATURATED_COUNT = 0.02, 8
# A norm stands out where it is so many times its neighbours', or that part of it.
# Neighbours are the nearest layers on either side, and a layer's other experts.
NORM_FACTOR = 4.0
NEIGHBOURS_A_SIDE, LEAST_NEIGHBOURS = 2, 3
# Relative errors against the float model. Rounding to INT8 gives about 0.01 with a
# scale a channel, and some 0.05 with one a tensor and outliers.
ERROR_WORTH_A_LOOK, ERROR_WRONG = 0.1, 0.5

_LAYER = re.compile(r"(^|\.)layers\.\d+\.")

# Called with the bytes read so far and those to be read in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ModuleStats:
    """One INT8 weight [rows, columns], under the name it has where every expert is on
    its own.

    scale_min, scale_max: of its weight scales, those that are finite; saturated: share
    of its weights that are -128, -127 or 127, and saturated_rows of them; rms: root
    mean square of the dequantized weights; error: their distance from the reference,
    ||dequantized - reference|| / ||reference|| (Frobenius). None where there is no
    such number.
    """

    name: str
    rows: int
    columns: int
    scale_min: float | None
    scale_max: float | None
    saturated: float
    saturated_rows: int
    rms: float | None
    error: float | None


@dataclass(frozen=True)
class DeepResult:
    """findings: worst first; modules: of every INT8 weight, in the files' order."""

    findings: tuple[Finding, ...]
    modules: tuple[ModuleStats, ...]

    def to_json(self) -> dict[str, Any]:
        """`modules`, an object for each as in ModuleStats."""
        return {"modules": [asdict(module) for module in self.modules]}


class _Counter:
    """Tells `progress` of what was read."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


class _Reference:
    """The weights of a float checkpoint, by the names they have expert by expert."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_checkpoint(folder)
        if not self.tensors:
            found = "no *.safetensors"
            remedy = "give the folder of the model that was quantized"
            raise misfit(folder, "a checkpoint in safetensors", found, remedy)

    def find(self, name: str, rows: int, columns: int) -> tuple[TensorInfo, int] | None:
        """(tensor, first row) of a weight [rows, columns]; None where there is none.

        Raises CheckpointError for one of another shape or of no floats.
        """
        shape: tuple[int, ...] = (rows, columns)
        tensor, first = self.tensors.get(f"{name}.weight"), 0
        if tensor is None and (expert := expert_of(name)):
            prefix, index = expert
            parent, last = prefix.rpartition(".")[0], name.rpartition(".")[2]
            tensor = self.tensors.get(f"{parent}.{last}.weight")
            if tensor is not None and len(tensor.shape) == 3:
                shape = (max(tensor.shape[0], index + 1), rows, columns)
                first = index * rows
        if tensor is None:
            return None
        if tensor.shape != shape or tensor.dtype not in stored.FLOATS:
            raise misfit(
                f"{tensor.name} in {tensor.file}",
                f"floats {list(shape)}, as the INT8 checkpoint has it",
                f"{tensor.dtype} {list(tensor.shape)}",
                "give the float model that was quantized",
            )
        return tensor, first


def _nbytes(tensor: TensorInfo) -> int:
    return tensor.end - tensor.start


def _is_int8(module: Module) -> bool:
    """Whether a module holds INT8 weights that can be measured."""
    weight = module.get(WEIGHT)
    if weight is None or weight.dtype != "I8" or not math.prod(weight.shape):
        return False
    return len(weight.shape) == 2 or (
        len(weight.shape) == 3 and weight.shape[0] <= MAX_EXPERTS
    )


class _Scales:
    """The scales of one weight [rows, columns] of a module that has `count`."""

    def __init__(self, tensor: TensorInfo, index: int, count: int) -> None:
        self.tensor = tensor
        self.each = math.prod(tensor.shape) // count
        self.first = index * self.each
        self.least, self.greatest = math.inf, -math.inf

    @classmethod
    def of(cls, module: Module, index: int, count: int, rows: int) -> "_Scales | None":
        """None where they are missing, or of no shape that belongs to the weight."""
        tensor = module.get(SCALE)
        if tensor is None or tensor.dtype not in stored.FLOATS:
            return None
        fits = math.prod(tensor.shape) in (count, count * rows)
        return cls(tensor, index, count) if fits else None

    def read(self, row: int, height: int) -> NDArray:
        """float64 [height], or [1] where one scale is for all rows."""
        if self.each == 1:
            row, height = 0, 1
        found = stored.read(self.tensor, self.first + row, height).astype(np.float64)
        finite = found[np.isfinite(found)]
        if finite.size:
            self.least = min(self.least, float(finite.min()))
            self.greatest = max(self.greatest, float(finite.max()))
        return found


class _Ends:
    """Counts weights at the end of the INT8 range, and the rows that have too many."""

    def __init__(self, columns: int) -> None:
        self.least = max(SATURATED_COUNT, SATURATED_SHARE * columns)
        self.total = self.rows = 0
        self.current: NDArray = np.zeros(0, np.int64)

    def add(self, values: NDArray, is_first_part: bool) -> None:
        """Blocks [rows, some columns] of int8, as `stored.blocks` orders them."""
        # 127, -128 and -127 are next to each other as unsigned numbers.
        at_end = values.view(np.uint8) - np.uint8(127) < 3
        counts = np.count_nonzero(at_end, axis=1)
        self.total += int(counts.sum())
        if is_first_part:
            self.end_rows()
            self.current = counts
        else:
            self.current = self.current + counts

    def end_rows(self) -> None:
        self.rows += int(np.count_nonzero(self.current >= self.least))


def _sum_of_squares(values: NDArray) -> float:
    return float(np.einsum("ij,ij->", values, values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _relative_error(difference: float, reference: float) -> float | None:
    """From sums of squares."""
    if reference == 0:
        return 0.0 if difference == 0 else None
    return _finite(math.sqrt(difference / reference))


def _measure(
    name: str,
    module: Module,
    index: int,
    count: int,
    reference: tuple[TensorInfo, int] | None,
    counter: _Counter,
) -> ModuleStats:
    """Read weight `index` of a module's `count`, and its reference."""
    weight = module[WEIGHT]
    rows, columns = weight.shape[-2:]
    scales, ends = _Scales.of(module, index, count, rows), _Ends(columns)
    squares = difference = reference_squares = 0.0

    def block(tensor: TensorInfo, first_row: int, width: int) -> NDArray:
        start = first_row * columns + column
        found = stored.read(tensor, start, height * width).reshape(height, width)
        counter.add(found.size * DTYPE_BITS[tensor.dtype] // 8)
        return found

    with np.errstate(all="ignore"):  # NaN and infinity have a finding of their own
        for row, height, column, width in stored.blocks(rows, columns):
            values = block(weight, index * rows + row, width)
            ends.add(values, column == 0)
            if scales is None:
                continue
            found, scale = values.astype(np.float64), scales.read(row, height)
            squares += float((np.einsum("ij,ij->i", found, found) * scale**2).sum())
            if reference:
                found *= scale[:, None]
                tensor, skipped = reference
                expected = block(tensor, skipped + row, width).astype(np.float64)
                reference_squares += _sum_of_squares(expected)
                expected -= found
                difference += _sum_of_squares(expected)
    ends.end_rows()
    is_known = scales is not None
    return ModuleStats(
        name=name,
        rows=rows,
        columns=columns,
        scale_min=_finite(scales.least) if scales else None,
        scale_max=_finite(scales.greatest) if scales else None,
        saturated=ends.total / (rows * columns),
        saturated_rows=ends.rows,
        rms=_finite(math.sqrt(squares / (rows * columns))) if is_known else None,
        error=(
            _relative_error(difference, reference_squares)
            if is_known and reference
            else None
        ),
    )


# --- tensors beside the weights -------------------------------------------------------


NON_FINITE, NOT_POSITIVE = "non-finite", "scale-not-positive"
NOT_ZERO, ZERO_CHANNELS = "zero-point-not-zero", "zero-channels"


def _faults(tensor: TensorInfo, is_ignored: bool, counter: _Counter) -> set[str]:
    """Ids of the findings that a tensor shows; is_ignored: it is a zero point, and
    kernels ignore it."""
    is_float = tensor.dtype in stored.FLOATS
    is_scale = is_float and tensor.name.rpartition(".")[2] in (SCALE, INPUT_SCALE)
    is_zero_point = is_ignored and tensor.dtype in stored.NUMBERS
    if not is_float and not is_zero_point:
        counter.add(_nbytes(tensor))
        return set()
    found = set()
    for _, _, first, count in stored.blocks(1, math.prod(tensor.shape)):
        if is_zero_point and stored.read(tensor, first, count).any():
            found.add(NOT_ZERO)
        if is_float and not stored.is_finite(tensor, first, count):
            found.add(NON_FINITE)
        if is_scale and (stored.read(tensor, first, count) <= 0).any():
            found.add(NOT_POSITIVE)
        counter.add(_nbytes(tensor) * count // math.prod(tensor.shape))
    return found


def _are_zero_channels(module: Module, scale: TensorInfo) -> bool:
    """Whether scales that are not above zero are finite, and belong to channels, or
    tensors, of zeros."""
    weight = module.get(WEIGHT)
    if scale.name.rpartition(".")[2] != SCALE or weight is None or weight.dtype != "I8":
        return False
    values = stored.read(scale, 0, math.prod(scale.shape))
    return bool(np.isfinite(values).all()) and stored.holds_zeros(
        weight.file, weight.start, weight.end, values <= 0
    )


def _fault_findings(faults: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """faults: id -> names of the tensors that show it."""
    if names := faults.get(NON_FINITE):
        yield finding(
            NON_FINITE,
            "wrong",
            "tensors that hold NaN or infinity",
            "one such number makes every answer that meets it NaN; vLLM 0.20.2 loads "
            "it, this fork refuses it",
            f"download the shard again; if it is still so, {EXPORT_AGAIN}",
            names,
        )
    if names := faults.get(NOT_POSITIVE):
        yield finding(
            NOT_POSITIVE,
            "wrong",
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
            "wrong",
            "zero points other than zero, which INT8 kernels ignore",
            "every number of the layer is shifted; vLLM 0.20.2 drops them in silence, "
            "this fork refuses them",
            f"{EXPORT_AGAIN} with symmetric quantization",
            names,
        )


# --- what stands out ------------------------------------------------------------------


def _ratio(value: float, others: Sequence[float]) -> float | None:
    """value over the median of others, on a scale of ratios; None for too few."""
    if len(others) < LEAST_NEIGHBOURS:
        return None
    return math.exp(math.log(value) - median(map(math.log, others)))


def _norm_outliers(modules: Sequence[ModuleStats]) -> dict[str, float]:
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


def _stand_out(modules: Sequence[ModuleStats]) -> Iterator[Finding]:
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
    if outliers := _norm_outliers(modules):
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


def _reference_findings(
    modules: Sequence[ModuleStats], missing: Sequence[str]
) -> Iterator[Finding]:
    """modules: those that were compared; missing: names of those that were not."""
    errors = {module.name: module.error for module in modules}
    known = {name: error for name, error in errors.items() if error is not None}
    lost = [name for name in errors if name not in known]
    names = sorted(known, key=lambda name: -known[name])
    wrong = lost + [name for name in names if known[name] >= ERROR_WRONG]
    if wrong:
        worst = f"up to {known[names[0]]:.3g}" if names else "not a number"
        yield finding(
            "reference-differs",
            "wrong",
            f"weights that are not the reference's: relative error {worst}",
            f"rounding to INT8 gives some 0.01; {ERROR_WRONG:g} and more is another "
            "tensor, another scale, or another model",
            f"{EXPORT_AGAIN} from the reference, or give the model it was made from",
            wrong,
        )
    far = [name for name in names if ERROR_WORTH_A_LOOK <= known[name] < ERROR_WRONG]
    if far:
        yield finding(
            "reference-error",
            "warning",
            f"weights far from the reference's: relative error up to "
            f"{known[far[0]]:.3g}",
            "rounding to INT8 gives some 0.01; outliers with one scale a tensor, or a "
            "scale that cuts weights off, give more",
            f"{EXPORT_AGAIN} with one scale a channel, or exclude these modules",
            far,
        )
    if missing:
        yield finding(
            "reference-missing",
            "warning",
            "weights that the reference does not hold",
            "they were not compared",
            "give the float model that was quantized, whole",
            missing,
        )


# --- the whole ------------------------------------------------------------------------


def deep_findings(
    known: Known,
    reference: Path | None = None,
    progress: Progress | None = None,
) -> DeepResult:
    """Read all tensors, of a checkpoint on this machine, and what they say.

    known: of the checkpoint;
    reference: folder of the float checkpoint to compare with; progress: called now and
    then. Needs memory for some MiB and the scales of one module, whatever the size of
    the tensors. Raises CheckpointError for a file that cannot be read and for a
    reference that is no float version of the same model.
    """
    tensors = known.export.tensors
    int8 = {each.name: each for each in known.int8}
    order = sorted(
        known.export.modules.items(),
        key=lambda item: min((each.file, each.start) for each in item[1].values()),
    )
    compared = _Reference(reference) if reference else None
    pairs: list[tuple[str, Module, int, int, tuple[TensorInfo, int] | None]] = []
    missing = []
    for name, module in order:
        if not _is_int8(module):
            continue
        rows, columns = module[WEIGHT].shape[-2:]
        for part, index, count in stored.parts(name, module):
            found = None
            if compared and _Scales.of(module, index, count, rows):
                found = compared.find(part, rows, columns)
                if found is None:
                    missing.append(part)
            pairs.append((part, module, index, count, found))
    total = sum(map(_nbytes, tensors.values()))
    total += sum(
        _nbytes(found[0]) // (found[0].shape[0] if len(found[0].shape) == 3 else 1)
        for *_, found in pairs
        if found
    )
    counter = _Counter(total, progress)
    modules = [_measure(*pair, counter) for pair in pairs]
    faults: dict[str, list[str]] = defaultdict(list)
    for name, module in order:
        for suffix, tensor in module.items():
            if suffix == WEIGHT and _is_int8(module):
                continue
            read = int8.get(name)
            is_ignored = read is not None and must_be_zero(
                suffix, read.is_experts, read.config
            )
            for each in _faults(tensor, is_ignored, counter):
                if each == NOT_POSITIVE and _are_zero_channels(module, tensor):
                    each = ZERO_CHANNELS
                faults[each].append(tensor.name)
    findings = [*_fault_findings(faults), *_stand_out(modules)]
    if compared:
        pairs_compared = {part for part, *_, found in pairs if found}
        both = [module for module in modules if module.name in pairs_compared]
        findings += _reference_findings(both, missing)
    return DeepResult(tuple(worst_first(findings)), tuple(modules))
