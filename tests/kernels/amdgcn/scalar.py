# SPDX-License-Identifier: Apache-2.0
"""Scalar operations: SOP1, SOP2, SOPC and SOPK of AMD's document.

Values are uint32 or uint64, one a wave. Of each operation: the types of its sources and
what it gives, the result and the new condition code (None leaves it).
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.arithmetic import (
    extract,
    extract_signed,
    i32,
    i64,
    u32,
    u64,
)
from tests.kernels.amdgcn.code import EXEC, Instruction
from tests.kernels.amdgcn.waves import Fault, Waves, bits32, bits64

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "lg": operator.ne,
    "ne": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}
Result = tuple[Any, Any]


def _nonzero(value: ndarray) -> Result:
    return value, value != 0


def _add(a: Any, b: Any, carry: Any = False) -> Result:
    total = np.asarray(a).astype(u64) + np.asarray(b).astype(u64)
    total = total + np.asarray(carry).astype(u64)
    return total.astype(u32), total >> u64(32) != 0


def _shift_and_add(bits: int) -> Callable[[Any, Any], Result]:
    """What is shifted out counts for the carry: S_LSHL1_ADD_U32 and its like."""

    def fn(a: Any, b: Any) -> Result:
        total = (np.asarray(a).astype(u64) << u64(bits)) + np.asarray(b).astype(u64)
        return total.astype(u32), total >> u64(32) != 0

    return fn


def _add_signed(a: Any, b: Any) -> Result:
    total = a + b
    return total, ((a ^ total) & (b ^ total)) >> u32(31) != 0


def _sub_signed(a: ndarray, b: ndarray) -> Result:
    difference = a - b
    return difference, ((a ^ b) & (a ^ difference)) >> u32(31) != 0


def _signed(x: ndarray) -> ndarray:
    return np.asarray(x).view(i32)


def _pick(first: ndarray, a: ndarray, b: ndarray) -> Result:
    return np.where(first, a, b), first


# The condition code is that the result is not zero.
LOGIC: dict[str, Callable[..., Any]] = {
    "s_and_b32": operator.and_,
    "s_or_b32": operator.or_,
    "s_xor_b32": operator.xor,
    "s_lshl_b32": lambda a, b: a << (b & u32(31)),
    "s_lshr_b32": lambda a, b: a >> (b & u32(31)),
    "s_ashr_i32": lambda a, b: (_signed(a) >> _signed(b & u32(31))).view(u32),
    "s_bfe_u32": lambda a, b: extract(a, b, b >> u32(16)),
    "s_bfe_i32": lambda a, b: extract_signed(a, b, b >> u32(16)).view(u32),
    "s_abs_i32": lambda a: np.abs(_signed(a)).view(u32),
    "s_not_b32": operator.invert,
}
LOGIC64: dict[str, Callable[..., Any]] = {
    "s_and_b64": operator.and_,
    "s_or_b64": operator.or_,
    "s_xor_b64": operator.xor,
    "s_andn2_b64": lambda a, b: a & ~b,
}
SHIFTS64: dict[str, Callable[..., Any]] = {
    "s_lshl_b64": lambda a, b: a << (b & u32(63)).astype(u64),
    "s_lshr_b64": lambda a, b: a >> (b & u32(63)).astype(u64),
    "s_ashr_i64": lambda a, b: (
        np.asarray(a).view(i64) >> np.asarray(b & u32(63)).astype(i64)
    ).view(u64),
}
# Result and condition code.
ARITHMETIC: dict[str, Callable[..., Result]] = {
    "s_add_u32": _add,
    "s_sub_u32": lambda a, b: (a - b, b > a),
    "s_add_i32": _add_signed,
    "s_sub_i32": _sub_signed,
    "s_max_i32": lambda a, b: _pick(_signed(a) > _signed(b), a, b),
    "s_min_i32": lambda a, b: _pick(_signed(a) < _signed(b), a, b),
    "s_max_u32": lambda a, b: _pick(a > b, a, b),
    "s_min_u32": lambda a, b: _pick(a < b, a, b),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (
        ((np.asarray(a).astype(u64) * b) >> u64(32)).astype(u32),
        None,
    ),
    "s_mul_hi_i32": lambda a, b: (
        ((_signed(a).astype(i64) * _signed(b).astype(i64)) >> i64(32)).astype(u32),
        None,
    ),
    "s_pack_ll_b32_b16": lambda a, b: (a & u32(0xFFFF) | b << u32(16), None),
    "s_mov_b32": lambda a: (a, None),
    **{f"s_lshl{n}_add_u32": _shift_and_add(n) for n in (1, 2, 3, 4)},
}


def compile_scalar(w: Waves, inst: Instruction) -> Callable[[], None] | None:
    """What an instruction does; None if it is not one of these."""
    name = inst.name
    operands = inst.operands
    if name.startswith(("s_cmp_", "s_cmpk_")):
        return _compare(w, inst)
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        return _compare_bit(w, inst)
    if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
        return _with_constant(w, inst)
    if name in ("s_and_saveexec_b64", "s_or_saveexec_b64"):
        return _save_exec(w, inst)
    if not operands:
        return None
    to = operands[0].first
    if name in LOGIC or name in ARITHMETIC or name in ("s_cselect_b32", "s_addc_u32"):
        get = [bits32(w, operand, scalar=True) for operand in operands[1:]]
        if name in LOGIC:
            logic = LOGIC[name]

            def fn(*values: ndarray) -> Result:
                return _nonzero(logic(*values))
        elif name == "s_cselect_b32":

            def fn(*values: ndarray) -> Result:
                return np.where(w.scc, *values), None
        elif name == "s_addc_u32":

            def fn(*values: ndarray) -> Result:
                a, b = values
                return _add(a, b, w.scc)
        else:
            fn = ARITHMETIC[name]
        put = w.put_scalar
    elif name in LOGIC64 or name in SHIFTS64 or name in ("s_mov_b64", "s_cselect_b64"):
        get = [bits64(w, operands[1], scalar=True)]
        second = bits32 if name in SHIFTS64 else bits64
        get += [second(w, operand, scalar=True) for operand in operands[2:]]
        if name == "s_mov_b64":

            def fn(*values: ndarray) -> Result:
                return values[0], None
        elif name == "s_cselect_b64":

            def fn(*values: ndarray) -> Result:
                return np.where(w.scc, *values), None
        else:
            logic = LOGIC64.get(name) or SHIFTS64[name]

            def fn(*values: ndarray) -> Result:
                return _nonzero(logic(*values))

        put = w.put_scalar64
    else:
        return None

    def run() -> None:
        result, scc = fn(*[g() for g in get])
        put(to, result)
        if scc is not None:
            w.put_scc(scc)

    return run


def _sixteen_bits(value: int, signed: bool) -> np.uint32:
    """A constant of 16 bits, which the assembler writes with or without its sign."""
    value &= 0xFFFF
    return u32((value - 0x10000 if signed and value & 0x8000 else value) & 0xFFFFFFFF)


def _compare_bit(w: Waves, inst: Instruction) -> Callable[[], None]:
    value, bit = (bits32(w, operand, scalar=True) for operand in inst.operands)
    wanted = u32(inst.name == "s_bitcmp1_b32")

    def run() -> None:
        w.put_scc(value() >> (bit() & u32(31)) & u32(1) == wanted)

    return run


def _compare(w: Waves, inst: Instruction) -> Callable[[], None]:
    prefix, how, kind = inst.name.split("_")[1:]
    dtype = {"i32": i32, "u32": u32}.get(kind)
    if dtype is None or how not in COMPARISONS:
        raise Fault(f"{inst.text}: this comparison is not known")
    a, b = (bits32(w, operand, scalar=True) for operand in inst.operands)
    if prefix == "cmpk":
        constant = _sixteen_bits(inst.operands[1].value, kind == "i32")

        def b() -> Any:
            return constant

    compare = COMPARISONS[how]
    return lambda: w.put_scc(
        compare(np.asarray(a()).view(dtype), np.asarray(b()).view(dtype))
    )


def _with_constant(w: Waves, inst: Instruction) -> Callable[[], None]:
    to = inst.operands[0].first
    constant = _sixteen_bits(inst.operands[1].value, signed=True)
    if inst.name == "s_movk_i32":
        return lambda: w.put_scalar(to, constant)

    if inst.name == "s_mulk_i32":
        return lambda: w.put_scalar(to, w.S[to] * constant)

    def add() -> None:
        total, overflow = _add_signed(w.S[to], constant)
        w.put_scalar(to, total)
        w.put_scc(overflow)

    return add


def _save_exec(w: Waves, inst: Instruction) -> Callable[[], None]:
    to, is_and = inst.operands[0].first, inst.name == "s_and_saveexec_b64"
    get = bits64(w, inst.operands[1], scalar=True)

    def run() -> None:
        old = w.scalar64(EXEC)
        new = get() & old if is_and else get() | old
        w.put_scalar64(to, old)
        w.put_scalar64(EXEC, new)
        w.put_scc(new != 0)

    return run
