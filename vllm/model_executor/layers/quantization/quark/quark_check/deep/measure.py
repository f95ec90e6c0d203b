# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The numbers of one INT8 weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import stored
from ..checkpoint import DTYPE_BITS, TensorInfo
from ..weights import SCALE, WEIGHT, Module

# A row is saturated where so large a share of its weights, and no fewer than so many,
# lie at the end of the range. A row scaled by its largest weight has one or two there.
SATURATED_SHARE, SATURATED_COUNT = 0.02, 8
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


class Counter:
    """Tells `progress` of what was read."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


def nbytes(tensor: TensorInfo) -> int:
    return tensor.end - tensor.start


class Scales:
    """The scales of one weight [rows, columns] of a module that has `count`."""

    def __init__(self, tensor: TensorInfo, index: int, count: int) -> None:
        self.tensor = tensor
        self.each = math.prod(tensor.shape) // count
        self.first = index * self.each
        self.least, self.greatest = math.inf, -math.inf

    @classmethod
    def of(cls, module: Module, index: int, count: int, rows: int) -> "Scales | None":
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


def measure(
    name: str,
    module: Module,
    index: int,
    count: int,
    reference: tuple[TensorInfo, int] | None,
    counter: Counter,
) -> ModuleStats:
    """Read weight `index` of a module's `count`, and its reference."""
    weight = module[WEIGHT]
    rows, columns = weight.shape[-2:]
    scales, ends = Scales.of(module, index, count, rows), _Ends(columns)
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
