# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The bytes and numbers of a checkpoint's tensors, a few MiB at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checkpoint import DOWNLOAD_AGAIN, DTYPE_BITS, TensorInfo, misfit
from .weights import WEIGHT, Module, expert_of

# Elements of a tensor that are in memory at a time.
CHUNK = 1 << 20
# How numpy holds a dtype of safetensors, and the bits that are all ones in the numbers
# of a float that are NaN or infinite.
_INTEGERS = {
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "U16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
}
_FLOATS: Mapping[str, tuple[type, int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
# numpy's own types, where it has them.
_VIEWS: Mapping[str, type] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
FLOATS = frozenset(_FLOATS)
NUMBERS = FLOATS | frozenset(_INTEGERS)


def _read(tensor: TensorInfo, first: int, count: int) -> NDArray:
    """Elements first to first + count of a tensor, floats as whole numbers."""
    kind = _FLOATS[tensor.dtype][0] if tensor.dtype in _FLOATS else None
    kind = kind or _INTEGERS[tensor.dtype]
    offset = tensor.start + first * DTYPE_BITS[tensor.dtype] // 8
    try:
        found: NDArray = np.fromfile(tensor.file, kind, count, offset=offset)
    except OSError as error:
        raise misfit(
            tensor.file, "a readable file", str(error), DOWNLOAD_AGAIN
        ) from None
    if len(found) < count:
        expected = f"{count} numbers of {tensor.name!r} at {offset}"
        raise misfit(tensor.file, expected, f"{len(found)}", DOWNLOAD_AGAIN)
    return found


def read(tensor: TensorInfo, first: int, count: int) -> NDArray:
    """Elements first to first + count of a tensor of `NUMBERS`: integers as they are,
    floats as float16, float32 or float64; bfloat16 as float32. Raises CheckpointError
    for a file that is shorter than it was."""
    bits = _read(tensor, first, count)
    if tensor.dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(_VIEWS.get(tensor.dtype, bits.dtype))


def is_finite(tensor: TensorInfo, first: int, count: int) -> bool:
    """Whether none of a float tensor's elements is NaN or infinite."""
    mask = _FLOATS[tensor.dtype][1]
    bits = _read(tensor, first, count)
    bits &= bits.dtype.type(mask)
    return not (bits == mask).any()


def holds_zeros(file: Path, start: int, end: int, marked: NDArray) -> bool:
    """Whether all parts of an INT8 weight are zeros that are marked; the weight lies in
    a file between `start` and `end`, in as many equal parts as there are marks."""
    size = (end - start) // max(1, marked.size)
    return not any(
        np.fromfile(file, np.int8, size, offset=start + int(part) * size).any()
        for part in np.flatnonzero(marked)
    )


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) of parts of a matrix that each are one
    piece of memory of at most CHUNK elements: whole rows, or a part of one."""
    if not rows or not columns:
        return
    height, width = max(1, CHUNK // columns), min(columns, CHUNK)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield row, min(height, rows - row), column, min(width, columns - column)


def parts(name: str, module: Module) -> Iterator[tuple[str, int, int]]:
    """A module's weights by the names they have where every expert is on its own:
    (name, which, of how many). Stacked experts [E, N, K] give E, all else gives one."""
    weight = module.get(WEIGHT)
    if weight is None:
        return
    parent, _, last = name.rpartition(".")
    if len(weight.shape) == 3 and expert_of(name + ".") is None:
        for expert in range(weight.shape[0]):
            yield f"{parent}.experts.{expert}.{last}", expert, weight.shape[0]
    else:
        yield name, 0, 1
