# SPDX-License-Identifier: Apache-2.0
"""Products of matrices: v_mfma of VOP3P. The layouts are those that AMD's
amd_matrix_instruction_calculator prints.

With M rows the lanes make 64 / M parts. Lane l holds of row l % M of A, and of column
l % M of B, the numbers along K of part l // M, in the order of its registers. Of the
sums it holds column l % M: of 16 rows the four from 4 (l // 16) on; of 32 rows, in each
register r, row 8 (r // 4) + 4 (l // 32) + r % 4.
"""

import re
from collections.abc import Callable

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.arithmetic import f32, i32, u16, u32
from tests.kernels.amdgcn.code import Instruction
from tests.kernels.amdgcn.waves import LANES, Fault, Waves

_NAME = re.compile(r"v_mfma_(i32|f32)_(\d+)x(\d+)x(\d+)_(i8|bf16|f16)")


def compile_matrix(w: Waves, inst: Instruction) -> Callable[[], None] | None:
    """What an instruction does; None if it is not one of these."""
    if not (match := _NAME.fullmatch(inst.name)):
        return None
    rows, columns, depth = (int(match[i]) for i in (2, 3, 4))
    kind = match[5]
    to, a, b, c = inst.operands
    if rows != columns or rows not in (16, 32) or inst.modifiers:
        raise Fault(f"{inst.text}: this form is not known to the machine")
    if c.file == "c" and c.value != 0:
        raise Fault(f"{inst.text}: a constant to add is not known to the machine")
    parts, count = LANES // rows, rows * rows // LANES
    each = depth // parts
    if to.count != count or a.count * 4 != each * (1 if kind == "i8" else 2):
        raise Fault(f"{inst.text}: {each} numbers a lane do not fit the registers")

    def matrix(first: int) -> ndarray:
        """[waves, rows, depth]."""
        x = np.stack([w.V[first + j] for j in range(a.count)], axis=-1)
        if kind == "i8":
            x = x.view(np.int8).astype(f32)
        elif kind == "f16":
            x = x.view(np.float16).astype(f32)
        else:
            x = (x.view(u16).astype(u32) << u32(16)).view(f32)
        x = x.reshape(w.num, parts, rows, each).transpose(0, 2, 1, 3)
        return x.reshape(w.num, rows, depth)

    def run() -> None:
        # Of int8 the sums are exact: less than 2 ** 24.
        sums = matrix(a.first) @ matrix(b.first).transpose(0, 2, 1)
        if rows == 16:
            sums = sums.reshape(w.num, 4, 4, 16).transpose(2, 0, 1, 3)
        else:
            sums = sums.reshape(w.num, 4, 2, 4, 32).transpose(1, 3, 0, 2, 4)
        sums = sums.reshape(count, w.num, LANES)
        old = w.V[c.first : c.first + count] if c.file == "v" else np.zeros(1, u32)
        if kind == "i8":
            result = sums.astype(i32).view(u32) + old
        else:
            result = (sums + old.view(f32)).astype(f32).view(u32)
        # All lanes, whatever exec says.
        if w.all_active:
            w.V[to.first : to.first + count] = result
        else:
            w.V[to.first : to.first + count, w.active] = result[:, w.active]

    return run
