# SPDX-License-Identifier: Apache-2.0
"""Every instruction of the project's kernels in the machine, against arithmetic of its
own: Python's whole numbers, fractions and `struct`, a value at a time.

What an instruction does is from AMD's documents of the instruction sets: "AMD Instinct
MI300 Instruction Set Architecture", and for gfx950 the one of CDNA4. There, in both,
chapter 12 has a section a format (of CDNA4: 12.1 SOP2, 12.2 SOPK, 12.3 SOP1, 12.4 SOPC,
12.5 SOPP, 12.6 SMEM, 12.7 VOP2, 12.8 VOP1, 12.9 VOPC, 12.10 VOP3P with MFMA, 12.11
VOP3, 12.12 LDS, 12.13 MUBUF), in which an instruction stands under its name. Layouts of
matrices are those that AMD's amd_matrix_instruction_calculator prints.
"""

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.amdgcn import reference as r
from tests.kernels.amdgcn.code import VCC, parse_instruction
from tests.kernels.amdgcn.program import FULL, Program
from tests.kernels.amdgcn.reference import MASK, MASK64, as_float, as_half, signed

LANES = range(64)
EDGES = [0, 1, 2, 31, 32, 63, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000]
EDGES += [0x7FFFFF, 0x800000, 0xFFFFFF, 0x1000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
# Zeros, denormals, normal numbers from the smallest to the largest, infinities, NaN.
FLOATS = [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF]
FLOATS += [0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, 0xBF800000, 0x3F800001]
FLOATS += [0x3F000000, 0x40490FDB, 0x4B000000, 0x4F000000, 0x4F800000, 0xCF000001]
FLOATS += [0x477FE000, 0x33800000, 0x7E800001, 0x0C000000, 0x42FE0000, 0x00400000]


@pytest.fixture
def dice(rng: torch.Generator) -> random.Random:
    return random.Random(rng.initial_seed())


def number(dice: random.Random, is_float: bool) -> int:
    if dice.random() < 0.5:
        return dice.choice(FLOATS if is_float else EDGES)
    if is_float and dice.random() < 0.7:
        return (
            dice.getrandbits(1) << 31
            | dice.randint(90, 160) << 23
            | (dice.getrandbits(23))
        )
    return dice.getrandbits(32)


def is_nan(x: int) -> bool:
    return math.isnan(as_float(x))


# Vector instructions. Operands stand where the functions' arguments say: x is v0, y v1,
# z v3; d is v2 before; X, Y are v[6:7], v[8:9]; s is s8 and S s[12:13]; m is the lane's
# bit of s[4:5] and vcc that of vcc. The result goes to v2, or v[10:11].
U16 = 0xFFFF
WHOLE: dict[str, Callable[..., Any]] = {
    "v_mov_b32_e32 v2, v0": lambda x: x,
    "v_mov_b32_e32 v2, s8": lambda s: s,
    "v_mov_b32_e32 v2, 0xffff0001": lambda: 0xFFFF0001,
    "v_mov_b32_e32 v2, -16": lambda: 0xFFFFFFF0,
    "v_mov_b64_e32 v[10:11], v[6:7]": lambda X: X,
    "v_mov_b64_e32 v[10:11], s[12:13]": lambda S: S,
    "v_mov_b64_e32 v[10:11], -1": lambda: MASK64,
    "v_accvgpr_write_b32 a2, v0": lambda x: x,
    "v_accvgpr_read_b32 v2, a3": lambda: 0x12345678,
    "v_not_b32_e32 v2, v0": lambda x: ~x,
    "v_bfrev_b32_e32 v2, v0": lambda x: int(f"{x:032b}"[::-1], 2),
    "v_and_b32_e32 v2, v0, v1": lambda x, y: x & y,
    "v_or_b32_e32 v2, v0, v1": lambda x, y: x | y,
    "v_xor_b32_e32 v2, s8, v1": lambda s, y: s ^ y,
    "v_or3_b32 v2, v0, v1, v3": lambda x, y, z: x | y | z,
    "v_and_or_b32 v2, v0, v1, v3": lambda x, y, z: x & y | z,
    "v_bfi_b32 v2, v0, v1, v3": lambda x, y, z: x & y | ~x & z,
    "v_bfe_u32 v2, v0, v1, v3": lambda x, y, z: x >> y % 32 & (1 << z % 32) - 1,
    "v_bfe_i32 v2, v0, v1, v3": lambda x, y, z: (
        signed(x >> y % 32, z % 32) if z % 32 else 0
    ),
    "v_alignbit_b32 v2, v0, v1, v3": lambda x, y, z: (x << 32 | y) >> z % 32,
    "v_perm_b32 v2, v0, v1, v3": lambda x, y, z: r.permuted(x, y, z),
    "v_bcnt_u32_b32 v2, v0, v1": lambda x, y: x.bit_count() + y,
    "v_lshlrev_b32_e32 v2, v0, v1": lambda x, y: y << x % 32,
    "v_lshrrev_b32_e32 v2, v0, v1": lambda x, y: y >> x % 32,
    "v_ashrrev_i32_e32 v2, v0, v1": lambda x, y: signed(y) >> x % 32,
    "v_lshlrev_b64 v[10:11], v0, v[6:7]": lambda x, X: X << x % 64,
    "v_lshlrev_b16_e32 v2, v0, v1": lambda x, y: y << x % 16 & U16,
    "v_lshrrev_b16_e32 v2, v0, v1": lambda x, y: (y & U16) >> x % 16,
    "v_add_u16_e32 v2, v0, v1": lambda x, y: x + y & U16,
    "v_add_u32_e32 v2, v0, v1": lambda x, y: x + y,
    "v_sub_u32_e32 v2, v0, v1": lambda x, y: x - y,
    "v_sub_u32_e64 v2, v0, v1 clamp": lambda x, y: max(x - y, 0),
    "v_subrev_u32_e32 v2, v0, v1": lambda x, y: y - x,
    "v_add3_u32 v2, v0, v1, v3": lambda x, y, z: x + y + z,
    "v_lshl_add_u32 v2, v0, v1, v3": lambda x, y, z: (x << y % 32) + z,
    "v_add_lshl_u32 v2, v0, v1, v3": lambda x, y, z: (x + y & MASK) << z % 32,
    "v_lshl_or_b32 v2, v0, v1, v3": lambda x, y, z: x << y % 32 | z,
    "v_xad_u32 v2, v0, v1, v3": lambda x, y, z: (x ^ y) + z,
    "v_lshl_add_u64 v[10:11], v[6:7], 4, v[8:9]": lambda X, Y: (X << 4) + Y,
    "v_lshl_add_u64 v[10:11], s[12:13], 0, v[8:9]": lambda S, Y: S + Y,
    "v_max_i32_e32 v2, v0, v1": lambda x, y: max(signed(x), signed(y)),
    "v_min_i32_e32 v2, v0, v1": lambda x, y: min(signed(x), signed(y)),
    "v_mul_lo_u32 v2, v0, v1": lambda x, y: x * y,
    "v_mul_hi_u32 v2, v0, v1": lambda x, y: x * y >> 32,
    "v_mul_i32_i24_e32 v2, v0, v1": lambda x, y: signed(x, 24) * signed(y, 24),
    "v_mul_u32_u24_e32 v2, v0, v1": lambda x, y: x % 2**24 * (y % 2**24),
    "v_mad_i32_i24 v2, v0, v1, v3": lambda x, y, z: signed(x, 24) * signed(y, 24) + z,
    "v_mad_u32_u24 v2, v0, v1, v3": lambda x, y, z: x % 2**24 * (y % 2**24) + z,
    "v_dot4c_i32_i8_e32 v2, v0, v1": lambda x, y, d: (
        d + sum(signed(x >> 8 * k, 8) * signed(y >> 8 * k, 8) for k in range(4))
    ),
    "v_cndmask_b32_e32 v2, v0, v1, vcc": lambda x, y, vcc: y if vcc else x,
    "v_cndmask_b32_e64 v2, v0, v1, s[4:5]": lambda x, y, m: y if m else x,
    "v_cndmask_b32_e64 v2, -v0, |v1|, s[4:5]": lambda x, y, m: (
        y & 0x7FFFFFFF if m else x ^ 0x80000000
    ),
    "v_bitop3_b32 v2, v0, v1, v3 bitop3:0x36": lambda x, y, z: r.looked_up(
        x, y, z, 0x36, 32
    ),
    "v_bitop3_b32 v2, v0, v1, v3 bitop3:0xec": lambda x, y, z: r.looked_up(
        x, y, z, 0xEC, 32
    ),
    "v_pack_b32_f16 v2, v0, v1": lambda x, y: x & U16 | (y & U16) << 16,
    # SDWA
    "v_and_b32_sdwa v2, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 "
    "src1_sel:DWORD": lambda x, y: x >> 16 & y,
    "v_or_b32_sdwa v2, v0, v1 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:BYTE_2 "
    "src1_sel:DWORD": lambda x, y: (x >> 16 & 0xFF | y) << 16,
    "v_lshlrev_b32_sdwa v2, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD "
    "src0_sel:DWORD src1_sel:BYTE_0": lambda x, y: (y & 0xFF) << x % 32,
    "v_mul_i32_i24_sdwa v2, sext(v0), sext(v1) dst_sel:DWORD dst_unused:UNUSED_PAD "
    "src0_sel:BYTE_3 src1_sel:BYTE_1": lambda x, y: (
        signed(x >> 24, 8) * signed(y >> 8, 8)
    ),
    "v_cndmask_b32_sdwa v2, v0, v1, vcc dst_sel:DWORD dst_unused:UNUSED_PAD "
    "src0_sel:DWORD src1_sel:WORD_1": lambda x, y, vcc: y >> 16 if vcc else x,
    # With a carry, or a product of 64 bits: the second result is a mask.
    "v_addc_co_u32_e32 v2, vcc, v0, v1, vcc": lambda x, y, vcc: (
        x + y + vcc,
        x + y + vcc > MASK,
    ),
    "v_addc_co_u32_e64 v2, s[10:11], 0, v1, s[4:5]": lambda y, m: (y + m, y + m > MASK),
    "v_subrev_co_u32_e32 v2, vcc, v0, v1": lambda x, y: (y - x, x > y),
    "v_mad_u64_u32 v[10:11], s[10:11], v0, v1, v[6:7]": lambda x, y, X: (
        x * y + X,
        x * y + X > MASK64,
    ),
    "v_mad_i64_i32 v[10:11], s[10:11], v0, v1, v[6:7]": lambda x, y, X: (
        signed(x) * signed(y) + X,
        signed(x) * signed(y) + signed(X, 64) < 0,
    ),
}


def compared(name: str) -> Callable[..., bool]:
    """v_cmp_ of whole numbers or floats, v0 and v1 or pairs."""
    _, _, how, kind, *_ = name.split("_")
    width = 64 if "64" in kind else 32

    def value(x: int) -> Any:
        return {"f": as_float, "i": lambda v: signed(v, width), "u": lambda v: v}[
            kind[0]
        ](x)

    def compare(x: int, y: int) -> bool:
        a, b = value(x), value(y)
        ordered = not (a != a or b != b)
        return {
            "eq": ordered and a == b,
            "ne": not (ordered and a == b),
            "gt": ordered and a > b,
            "ge": ordered and a >= b,
            "lt": ordered and a < b,
            "le": ordered and a <= b,
            "o": ordered,
        }[how]

    if width == 64:
        return lambda X, Y: compare(X, Y)
    return compare


COMPARISONS = {}
for kind, orders in {
    "f32": "eq ge gt o",
    "i32": "ge gt le lt",
    "u32": "eq gt le lt ne",
    "i64": "gt",
}.items():
    for how in orders.split():
        for form, to in (("e32", "vcc"), ("e64", "s[10:11]")):
            name = f"v_cmp_{how}_{kind}_{form}"
            sources = "v[6:7], v[8:9]" if kind == "i64" else "v0, v1"
            COMPARISONS[f"{name} {to}, {sources}"] = compared(name)


COMPARISONS["v_cmp_lt_i32_sdwa s[10:11], v0, v1 src0_sel:BYTE_0 src1_sel:DWORD"] = (
    lambda x, y: x & 0xFF < signed(y)
)


def ldexp(x: int, y: int) -> int:
    value = as_float(x)
    if not math.isfinite(value) or value == 0:
        return x
    power = max(min(signed(y), 400), -400)
    return r.to_float32(r.Fraction(value) * r.Fraction(2) ** power, value < 0)


def fixed_up(x: int, y: int, z: int) -> int:
    """V_DIV_FIXUP_F32 of a quotient x of z / y: where both are plain, with its sign."""
    n, d = as_float(z), as_float(y)
    plain = math.isfinite(n) and math.isfinite(d) and n != 0 and d != 0
    if not plain or (z >> 23 & 255) - (y >> 23 & 255) < -150:
        return r.divided(z, y)
    return x & 0x7FFFFFFF | (y ^ z) & 0x80000000


FLOAT: dict[str, Callable[..., Any]] = {
    "v_add_f32_e32 v2, v0, v1": r.add,
    "v_add_f32_e64 v2, -v0, |v1|": lambda x, y: r.add(r.negated(x), y & 0x7FFFFFFF),
    "v_sub_f32_e32 v2, v0, v1": lambda x, y: r.add(x, r.negated(y)),
    "v_mul_f32_e32 v2, v0, v1": r.multiply,
    "v_mul_f32_e64 v2, -v0, s8": lambda x, s: r.multiply(r.negated(x), s),
    "v_mul_f32_e32 v2, 0.5, v1": lambda y: r.multiply(0x3F000000, y),
    "v_fma_f32 v2, v0, -v1, v3": lambda x, y, z: r.fma(x, r.negated(y), z),
    "v_fmac_f32_e32 v2, v0, v1": lambda x, y, d: r.fma(x, y, d),
    "v_fmamk_f32 v2, v0, 0x3c000000, v1": lambda x, y: r.fma(x, 0x3C000000, y),
    "v_max_f32_e32 v2, v0, v1": r.larger,
    "v_max_f32_e64 v2, |v0|, |v1|": lambda x, y: r.larger(
        x & 0x7FFFFFFF, y & 0x7FFFFFFF
    ),
    "v_max3_f32 v2, v0, |v1|, v3": lambda x, y, z: r.larger(
        r.larger(x, y & 0x7FFFFFFF), z
    ),
    "v_ldexp_f32 v2, v0, v1": ldexp,
    "v_cvt_f32_i32_e32 v2, v0": lambda x: r.to_float32(r.Fraction(signed(x))),
    "v_cvt_f32_u32_e32 v2, v0": lambda x: r.to_float32(r.Fraction(x)),
    "v_cvt_u32_f32_e32 v2, v0": lambda x: r.truncated(x, 0, MASK),
    "v_cvt_f32_f16_e32 v2, v0": lambda x: r.bits(as_half(x)),
    "v_cvt_f16_f32_e32 v2, v0": r.to_float16,
    "v_div_fixup_f32 v2, v0, v1, v3": fixed_up,
}
PAIRS: dict[str, Callable[[int, int], int]] = {
    "v_cvt_pk_bf16_f32 v2, v0, v1": lambda x, y: (
        r.to_bfloat16(x) | r.to_bfloat16(y) << 16
    ),
    "v_cvt_pk_f16_f32 v2, v0, v1": lambda x, y: r.to_float16(x) | r.to_float16(y) << 16,
}


def same(found: int, expected: int, is_float: bool) -> bool:
    return found == expected or is_float and is_nan(found) and is_nan(expected)


def check_vector(
    text: str,
    fn: Callable[..., Any],
    dice: random.Random,
    is_float: bool,
    equal: Callable[[int, int], bool],
) -> None:
    """All lanes, and some: what is off keeps what it holds."""
    names = list(inspect.signature(fn).parameters)
    for mask in (FULL, dice.getrandbits(64), 0):
        given = {
            c: [number(dice, is_float) for _ in LANES] for c in ("x", "y", "z", "d")
        }
        given |= {
            c: [number(dice, False) << 32 | number(dice, False) for _ in LANES]
            for c in "XY"
        }
        scalar, wide = number(dice, is_float), dice.getrandbits(62)
        if "S" in names:
            wide = dice.getrandbits(64)
        flags, vcc = dice.getrandbits(64), dice.getrandbits(64)
        program = Program(text).all_defined()
        program.vector(0, given["x"], given["y"], given["d"], given["z"])
        for first, c in ((6, "X"), (8, "Y")):
            program.vector(first, [v & MASK for v in given[c]])
            program.vector(first + 1, [v >> 32 for v in given[c]])
        old = [dice.getrandbits(32) for _ in LANES], [dice.getrandbits(32)] * 64
        program.vector(10, *old).vector(256 + 3, 0x12345678)
        program.vector(256 + 2, given["d"])
        program.scalar(8, scalar).scalar64(12, wide)
        program.scalar64(4, flags).scalar64(VCC, vcc).exec(mask).run()
        given |= {"s": [scalar] * 64, "S": [wide] * 64}
        given["m"] = [flags >> i & 1 for i in LANES]
        given["vcc"] = [vcc >> i & 1 for i in LANES]
        results = [fn(*(given[c][i] for c in names)) for i in LANES]
        to = parse_instruction(text).operands[0]
        carry = None
        if to.file == "s":
            carry, results = to.first, [(None, flag) for flag in results]
        elif isinstance(results[0], tuple):
            carry = parse_instruction(text).operands[1].first
        if carry is not None:
            expected = sum(int(flag) << i for i, (_, flag) in enumerate(results))
            assert program.mask(carry) == expected & mask, text
            results = [value for value, _ in results]
        if to.file == "s":
            continue
        for k in range(to.count):
            found = program.lanes(to.first + k)
            before = old[k] if to.first == 10 else given["d"]
            for i in LANES:
                wanted = results[i] >> 32 * k & MASK if mask >> i & 1 else before[i]
                values = {c: given[c][i] for c in names}
                assert equal(found[i], wanted), (
                    text,
                    i,
                    hex(found[i]),
                    hex(wanted),
                    values,
                )


@pytest.mark.parametrize("text", WHOLE)
def test_whole_numbers(text: str, dice: random.Random) -> None:
    check_vector(text, WHOLE[text], dice, False, int.__eq__)


@pytest.mark.parametrize("text", COMPARISONS)
def test_comparisons(text: str, dice: random.Random) -> None:
    is_float = "_f32" in text
    check_vector(text, COMPARISONS[text], dice, is_float, int.__eq__)


@pytest.mark.parametrize("text", FLOAT)
def test_floats(text: str, dice: random.Random) -> None:
    halves = "f16_f32" in text

    def equal(found: int, wanted: int) -> bool:
        if halves:
            nans = math.isnan(as_half(found)) and math.isnan(as_half(wanted))
            return found == wanted or found < 0x10000 and nans
        return same(found, wanted, True)

    check_vector(text, FLOAT[text], dice, True, equal)


@pytest.mark.parametrize("text", PAIRS)
def test_pairs_of_halves(text: str, dice: random.Random) -> None:
    def quiet(x: int) -> int:
        """One NaN for all."""
        kind = "bf16" if "bf16" in text else "f16"
        infinity, nan = {"bf16": (0x7F80, 0x7FC0), "f16": (0x7C00, 0x7E00)}[kind]
        return nan if x & 0x7FFF > infinity else x

    def equal(found: int, wanted: int) -> bool:
        return [quiet(found >> s & U16) for s in (0, 16)] == [
            quiet(wanted >> s & U16) for s in (0, 16)
        ]

    check_vector(text, PAIRS[text], dice, True, equal)


def test_bits_of_halves(dice: random.Random) -> None:
    """The upper half of the result is not documented."""
    text = "v_bitop3_b16 v2, v0, v1, v3 bitop3:0xec"
    check_vector(
        text,
        lambda x, y, z: r.looked_up(x, y, z, 0xEC, 16),
        dice,
        False,
        lambda found, wanted: found & U16 == wanted & U16,
    )


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("v_rcp_f32_e32", lambda x: 1 / x),
        ("v_rcp_iflag_f32_e32", lambda x: 1 / x),
        ("v_rsq_f32_e32", lambda x: 1 / math.sqrt(x)),
        ("v_sqrt_f32_e32", math.sqrt),
        ("v_exp_f32_e32", lambda x: 2.0**x),
        ("v_log_f32_e32", math.log2),
    ],
)
def test_approximations(
    name: str, fn: Callable[[float], float], dice: random.Random
) -> None:
    """The nearest float32; or that or the next one, and both do occur."""
    values = [dice.uniform(0.01, 100) for _ in LANES]
    for nudge in (False, True):
        program = Program(f"{name} v2, v0")
        program.w.nudge = nudge
        program.vector(0, [r.bits(v) for v in values]).run()
        off = 0
        for value, found in zip(values, program.lanes(2), strict=True):
            nearest = r.to_float32(r.Fraction(fn(as_float(r.bits(value)))))
            assert abs(found - nearest) <= nudge
            off += found != nearest
        assert bool(off) == nudge


def test_division_rounds_as_a_quotient(dice: random.Random) -> None:
    """The sequence that LLVM writes for n / d, over all exponents."""
    program = Program(
        "v_div_scale_f32 v2, s[10:11], v1, v1, v0",
        "v_div_scale_f32 v3, vcc, v0, v1, v0",
        "v_rcp_f32_e32 v4, v2",
        "v_fma_f32 v5, -v2, v4, 1.0",
        "v_fmac_f32_e32 v4, v5, v4",
        "v_mul_f32_e32 v5, v3, v4",
        "v_fma_f32 v6, -v2, v5, v3",
        "v_fmac_f32_e32 v5, v6, v4",
        "v_fma_f32 v2, -v2, v5, v3",
        "v_div_fmas_f32 v2, v2, v4, v5",
        "v_div_fixup_f32 v2, v2, v1, v0",
    )
    for _ in range(20):
        n, d = ([number(dice, True) for _ in LANES] for _ in range(2))
        again = Program(*(i.text for i in program.machine.kernel.instructions[:-1]))
        again.vector(0, n, d).run()
        for a, b, found in zip(n, d, again.lanes(2), strict=True):
            wanted = r.divided(a, b)
            if wanted & 0x7FFFFFFF == 0x7F800000 and math.isfinite(as_float(a)):
                continue  # an overflow, which AMD's document leaves open
            # A denormal quotient is rounded twice.
            is_denormal = wanted & 0x7F800000 == 0
            near = is_denormal and abs(found - wanted) <= 1
            assert near or same(found, wanted, True), (hex(a), hex(b), hex(found))


@pytest.mark.parametrize("which", ["n", "d"])
def test_div_scale(which: str) -> None:
    """V_DIV_SCALE_F32, case by case: what of it is scaled, and whether the result is
    to be scaled back. Powers of two."""
    cases = [  # n, d: n's power after, d's power after, flag
        ((0, 0), (0, 0), False),
        ((100, 0), (100, 64), True),
        ((-60, -130), (4, -66), False),
        ((-10, 127), (-74 + 64, 63), True),
        ((3, 127), (-61, 63), False),
        ((-80, 60), (-16, 60), True),
        ((-110, -110), (-46, -46), False),
    ]
    for (n, d), (n_after, d_after), flag in cases:
        x, y = (r.to_float32(r.Fraction(2) ** k) for k in (n, d))
        source = "v0" if which == "n" else "v1"
        program = Program(f"v_div_scale_f32 v2, vcc, {source}, v1, v0")
        program.vector(0, x, y).run()
        after = n_after if which == "n" else d_after
        assert program.lanes(2)[0] == r.to_float32(r.Fraction(2) ** after), (n, d)
        assert program.mask() == (FULL if flag else 0), (n, d)


@pytest.mark.parametrize("low", [0, 1])
@pytest.mark.parametrize("high", [0, 1])
def test_packed_moves(low: int, high: int, dice: random.Random) -> None:
    """In place too, where the first move would change what the second reads."""
    values = [[number(dice, False) for _ in LANES] for _ in range(4)]
    for to in (10, 0, 2):
        text = f"v_pk_mov_b32 v[{to}:{to + 1}], v[0:1], v[2:3] op_sel:[{low},{high}]"
        program = Program(text).vector(0, *values).run()
        assert program.lanes(to) == values[low]
        assert program.lanes(to + 1) == values[2 + high]


@pytest.mark.parametrize(
    ("text", "fn", "sources"),
    [
        ("v_pk_add_f32 v[10:11], v[0:1], v[2:3]", r.add, [(0, 2), (1, 3)]),
        (
            "v_pk_add_f32 v[10:11], v[0:1], v[2:3] op_sel:[1,0] op_sel_hi:[0,1]",
            r.add,
            [(1, 2), (0, 3)],
        ),
        ("v_pk_mul_f32 v[10:11], v[0:1], v[2:3]", r.multiply, [(0, 2), (1, 3)]),
        (
            "v_pk_mul_f32 v[10:11], v[0:1], v[2:3] op_sel_hi:[1,0]",
            r.multiply,
            [(0, 2), (1, 2)],
        ),
        (
            "v_pk_fma_f32 v[10:11], v[0:1], v[2:3], v[4:5] op_sel_hi:[1,0,1]",
            r.fma,
            [(0, 2, 4), (1, 2, 5)],
        ),
    ],
)
def test_packed_floats(
    text: str, fn: Callable[..., int], sources: list[tuple], dice: random.Random
) -> None:
    values = [[number(dice, True) for _ in LANES] for _ in range(6)]
    program = Program(text).vector(0, *values).run()
    count = len(sources[0])
    low, high = [1, 0, 0][:count], [0, 1, 0][:count]
    signs = f" neg_lo:{low} neg_hi:{high}".replace(", ", ",")
    negated = Program(text + signs).vector(0, *values).run()
    for k, registers in enumerate(sources):
        for i in LANES:
            given = [values[n][i] for n in registers]
            assert same(program.lanes(10 + k)[i], fn(*given), True)
            given[k] ^= 0x80000000
            assert same(negated.lanes(10 + k)[i], fn(*given), True)


def test_mixed_floats(dice: random.Random) -> None:
    x, y, z, d = ([number(dice, True) for _ in LANES] for _ in range(4))
    plain = "v0, v1, v2 op_sel:[0,1,0] op_sel_hi:[1,1,0]"
    for name in ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16"):
        program = Program(f"{name} v3, {plain}").vector(0, x, y, z, d).run()
        for i in LANES:
            half, upper = r.bits(as_half(x[i])), r.bits(as_half(y[i] >> 16))
            wanted = r.fma(half, upper, z[i])
            found = program.lanes(3)[i]
            if name == "v_fma_mix_f32":
                assert same(found, wanted, True)
                continue
            kept = {"lo": d[i] >> 16, "hi": d[i] & U16}[name[9:11]]
            result, other = found & U16, found >> 16
            if "hi" in name:
                result, other = other, result
            assert other == kept
            nan = math.isnan(as_half(result)) and is_nan(wanted)
            assert nan or result == r.to_float16(wanted)


def lane_read(kind: str, argument: Any, lane: int) -> int | None:
    """The lane that DPP reads, of rows of 16 lanes; None where there is none."""
    row, place = divmod(lane, 16)
    if kind == "quad_perm":
        return lane - lane % 4 + argument[lane % 4]
    if kind == "row_shl":
        return lane + argument if place + argument < 16 else None
    if kind == "row_shr":
        return lane - argument if place >= argument else None
    if kind == "row_ror":
        return 16 * row + (place - argument) % 16
    if argument == 15:
        return 16 * row - 1 if row else None
    return 31 if row >= 2 else None


@pytest.mark.parametrize("bound", ["", " bound_ctrl:1"])
@pytest.mark.parametrize(
    ("kind", "argument"),
    [("row_shr", n) for n in (1, 2, 3, 4, 8)]
    + [("row_shl", n) for n in (1, 4, 8, 12)]
    + [("row_ror", 4), ("row_bcast", 15), ("row_bcast", 31)]
    + [("quad_perm", [2, 3, 0, 1]), ("quad_perm", [1, 0, 3, 3])],
)
def test_other_lanes(kind: str, argument: Any, bound: str, dice: random.Random) -> None:
    """v_mov_b32_dpp, v_add_u32_dpp and v_add_f32_dpp; in place and not, with lanes that
    are off: what they hold is not read."""
    shown = str(argument).replace(" ", "")
    for name, in_place in (("mov_b32", False), ("add_u32", True), ("add_f32", False)):
        for mask, rows in ((FULL, 0xF), (dice.getrandbits(64), 0xA)):
            x, y, d = ([number(dice, name == "add_f32") for _ in LANES] for _ in "xyd")
            to = 0 if in_place else 2
            second = "" if name == "mov_b32" else ", v1"
            text = (
                f"v_{name}_dpp v{to}, v0{second} {kind}:{shown} row_mask:{rows:#x} "
                f"bank_mask:0xf{bound}"
            )
            program = Program(text).vector(0, x, y, d).exec(mask).run()
            for i in LANES:
                before = x[i] if in_place else d[i]
                lane = lane_read(kind, argument, i)
                if lane is not None and not mask >> lane & 1:
                    lane = None
                value = x[lane] if lane is not None else 0
                if not (mask >> i & 1 and rows >> i // 16 & 1) or (
                    lane is None and not bound
                ):
                    wanted = before
                elif name == "mov_b32":
                    wanted = value
                elif name == "add_u32":
                    wanted = value + y[i] & MASK
                else:
                    wanted = r.add(value, y[i])
                assert same(program.lanes(to)[i], wanted, name == "add_f32"), (text, i)


def test_lanes_to_scalars(dice: random.Random) -> None:
    x = [dice.getrandbits(32) for _ in LANES]
    for mask in (FULL, 0b101000, 1 << 63, 0):
        program = Program("v_readfirstlane_b32 s3, v0", "v_readlane_b32 s4, v0, 63")
        program.vector(0, x).exec(mask).run()
        first = next((i for i in LANES if mask >> i & 1), 0)
        assert (program.number(3), program.number(4)) == (x[first], x[63])


@pytest.mark.parametrize("size", [16, 32])
def test_rows_change_places(size: int, dice: random.Random) -> None:
    """v_permlane16_swap_b32 and v_permlane32_swap_b32."""
    x, y = ([dice.getrandbits(32) for _ in LANES] for _ in "xy")
    name = f"v_permlane{size}_swap_b32_e32"
    program = Program(f"{name} v0, v1").vector(0, x, y).run()
    for start in range(0, 64, 2 * size):
        x[start + size : start + 2 * size], y[start : start + size] = (
            y[start : start + size],
            x[start + size : start + 2 * size],
        )
    assert (program.lanes(0), program.lanes(1)) == (x, y)


# Scalar instructions: s8 and s9, or s[8:9] and s[10:11], to s4 or s[4:5], with the
# condition code after; a missing one stays.
def scc(value: int, width: int = 32) -> tuple[int, bool]:
    value &= (1 << width) - 1
    return value, value != 0


def overflow(value: int) -> tuple[int, bool]:
    return value, not -(2**31) <= value < 2**31


SCALAR: dict[str, Callable[..., Any]] = {
    "s_mov_b32 s4, s8": lambda x: x,
    "s_movk_i32 s4, 0x8000": lambda: 0xFFFF8000,
    "s_movk_i32 s4, 0x240": lambda: 0x240,
    "s_abs_i32 s4, s8": lambda x: scc(abs(signed(x))),
    "s_add_i32 s4, s8, s9": lambda x, y: overflow(signed(x) + signed(y)),
    "s_sub_i32 s4, s8, s9": lambda x, y: overflow(signed(x) - signed(y)),
    "s_add_u32 s4, s8, s9": lambda x, y: (x + y, x + y > MASK),
    "s_addc_u32 s4, s8, s9": lambda x, y, c: (x + y + c, x + y + c > MASK),
    "s_addk_i32 s4, 0x7fff": lambda d: overflow(signed(d) + 0x7FFF),
    "s_addk_i32 s4, 0xfff0": lambda d: overflow(signed(d) - 16),
    "s_mulk_i32 s4, 0x180": lambda d: d * 0x180,
    "s_mulk_i32 s4, 0xfffd": lambda d: d * -3,
    "s_mul_i32 s4, s8, s9": lambda x, y: x * y,
    "s_mul_hi_u32 s4, s8, s9": lambda x, y: x * y >> 32,
    "s_mul_hi_i32 s4, s8, s9": lambda x, y: signed(x) * signed(y) >> 32,
    "s_max_i32 s4, s8, s9": lambda x, y: (
        max(signed(x), signed(y)),
        signed(x) > signed(y),
    ),
    "s_and_b32 s4, s8, s9": lambda x, y: scc(x & y),
    "s_or_b32 s4, s8, s9": lambda x, y: scc(x | y),
    "s_xor_b32 s4, s8, s9": lambda x, y: scc(x ^ y),
    "s_lshl_b32 s4, s8, s9": lambda x, y: scc(x << y % 32),
    "s_lshr_b32 s4, s8, s9": lambda x, y: scc(x >> y % 32),
    "s_ashr_i32 s4, s8, s9": lambda x, y: scc(signed(x) >> y % 32),
    "s_bfe_u32 s4, s8, 0x10010": lambda x: scc(x >> 16 & 1),
    "s_bfe_u32 s4, s8, 0x70003": lambda x: scc(x >> 3 & 127),
    "s_bfe_i32 s4, s8, 0x10007": lambda x: scc(-(x >> 7 & 1)),
    "s_bfe_i32 s4, s8, 0x70003": lambda x: scc(
        (x >> 3 & 127) - (128 if x >> 9 & 1 else 0)
    ),
    "s_lshl1_add_u32 s4, s8, s9": lambda x, y: (2 * x + y, 2 * x + y > MASK),
    "s_lshl2_add_u32 s4, s8, s9": lambda x, y: (4 * x + y, 4 * x + y > MASK),
    "s_lshl3_add_u32 s4, s8, s9": lambda x, y: (8 * x + y, 8 * x + y > MASK),
    "s_lshl4_add_u32 s4, s8, s9": lambda x, y: (16 * x + y, 16 * x + y > MASK),
    "s_pack_ll_b32_b16 s4, s8, s9": lambda x, y: x & U16 | (y & U16) << 16,
    "s_cselect_b32 s4, s8, s9": lambda x, y, c: x if c else y,
    "s_mov_b64 s[4:5], s[8:9]": lambda X: X,
    "s_mov_b64 s[4:5], -1": lambda: MASK64,
    "s_and_b64 s[4:5], s[8:9], s[10:11]": lambda X, Y: scc(X & Y, 64),
    "s_or_b64 s[4:5], s[8:9], s[10:11]": lambda X, Y: scc(X | Y, 64),
    "s_xor_b64 s[4:5], s[8:9], s[10:11]": lambda X, Y: scc(X ^ Y, 64),
    "s_andn2_b64 s[4:5], s[8:9], s[10:11]": lambda X, Y: scc(X & ~Y, 64),
    "s_lshl_b64 s[4:5], s[8:9], s12": lambda X, n: scc(X << n % 64, 64),
    "s_ashr_i64 s[4:5], s[8:9], s12": lambda X, n: scc(signed(X, 64) >> n % 64, 64),
    "s_cselect_b64 s[4:5], s[8:9], s[10:11]": lambda X, Y, c: X if c else Y,
}
SCALAR_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "s_bitcmp0_b32 s8, s9": lambda x, y: not x >> y % 32 & 1,
    "s_bitcmp1_b32 s8, s9": lambda x, y: bool(x >> y % 32 & 1),
    "s_cmp_eq_u32 s8, s9": lambda x, y: x == y,
    "s_cmp_lg_u32 s8, s9": lambda x, y: x != y,
    "s_cmp_ge_u32 s8, s9": lambda x, y: x >= y,
    "s_cmp_ge_i32 s8, s9": lambda x, y: signed(x) >= signed(y),
    "s_cmp_gt_i32 s8, s9": lambda x, y: signed(x) > signed(y),
    "s_cmp_lt_i32 s8, s9": lambda x, y: signed(x) < signed(y),
    "s_cmpk_gt_i32 s8, 0x7f": lambda x, y: signed(x) > 127,
    "s_cmpk_lt_i32 s8, 0xfffe": lambda x, y: signed(x) < -2,
    "s_cmpk_lt_u32 s8, 0xfffe": lambda x, y: x < 0xFFFE,
}


@pytest.mark.parametrize("text", [*SCALAR, *SCALAR_COMPARISONS])
def test_scalars(text: str, dice: random.Random) -> None:
    fn = SCALAR.get(text) or SCALAR_COMPARISONS[text]
    names = list(inspect.signature(fn).parameters)
    width = 64 if "s[4:5]" in text else 32
    for _ in range(60):
        given = {c: number(dice, False) for c in "xyd"}
        given |= {c: number(dice, False) << 32 | number(dice, False) for c in "XY"}
        given |= {"n": number(dice, False), "c": dice.getrandbits(1)}
        program = Program(text).scalar(4, given["d"], 7).scalar(12, given["n"])
        if width == 64:
            program.scalar64(8, given["X"]).scalar64(10, given["Y"])
        else:
            program.scalar(8, given["x"], given["y"])
        program.w.scc[:] = given["c"]
        program.run()
        result = fn(*(given[c] for c in names))
        found = program.mask(4) if width == 64 else program.number(4)
        code = given["c"]
        if text in SCALAR_COMPARISONS:
            result, code = given["d"], result
        elif isinstance(result, tuple):
            result, code = result
        assert found == result & ((1 << width) - 1), (text, given)
        assert bool(program.w.scc[0]) == bool(code), (text, given)


def test_exec_is_saved() -> None:
    program = Program("s_and_saveexec_b64 s[4:5], s[8:9]", "v_mov_b32_e32 v0, 1")
    program.vector(0, 0).scalar64(8, 0b110).exec(0b11).run()
    assert program.mask(4) == 0b11 and program.mask(126) == 0b10
    assert program.lanes(0)[:3] == [0, 1, 0] and program.w.scc[0]
    program = Program("s_or_saveexec_b64 s[4:5], s[8:9]", "v_mov_b32_e32 v0, 1")
    program.vector(0, 0).scalar64(8, 0b110).exec(0b10).run()
    assert program.mask(4) == 0b10 and program.mask(126) == 0b110
    assert program.lanes(0)[:3] == [0, 1, 1] and program.w.scc[0]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("s_branch", lambda c, vcc, exec: True),
        ("s_cbranch_scc0", lambda c, vcc, exec: not c),
        ("s_cbranch_scc1", lambda c, vcc, exec: c),
        ("s_cbranch_vccz", lambda c, vcc, exec: not vcc),
        ("s_cbranch_vccnz", lambda c, vcc, exec: vcc),
        ("s_cbranch_execz", lambda c, vcc, exec: not exec),
        ("s_cbranch_execnz", lambda c, vcc, exec: exec),
    ],
)
def test_branches(name: str, taken: Callable[..., bool]) -> None:
    for c in (0, 1):
        for vcc in (0, 1 << 40):
            for mask in (0, 1 << 50):
                program = Program(f"{name} .L", "s_mov_b32 s4, 1", "s_mov_b32 s5, 1")
                branch = program.machine.kernel.instructions[0]
                object.__setattr__(branch, "target", 2)
                program.scalar(4, 0, 0).scalar64(VCC, vcc).exec(mask)
                program.w.scc[:] = c
                program.run()
                assert program.number(4) == (not taken(c, vcc, mask))
                assert program.number(5) == 1


def test_nothing() -> None:
    """s_nop, s_setprio and s_waitcnt change no register."""
    program = Program("s_nop 1", "s_setprio 1", "s_waitcnt vmcnt(0) lgkmcnt(0)")
    vectors, scalars = program.w.V.copy(), program.w.S.copy()
    program.run()
    assert (vectors == program.w.V).all() and (scalars == program.w.S).all()
