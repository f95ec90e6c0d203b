# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that NumPy has no operation for. uint32 in, unless said otherwise."""

from typing import Any

import numpy as np
from numpy import ndarray

f32, f64 = np.float32, np.float64
u16, u32, u64 = np.uint16, np.uint32, np.uint64
i32, i64 = np.int32, np.int64
QUIET_NAN = u32(0x7FC00000)


def bits(x: ndarray) -> ndarray:
    return np.asarray(x, f32).view(u32)


def sign_extend(x: ndarray, width: int) -> ndarray:
    shift = 32 - width
    return (np.asarray(x) << u32(shift)).view(i32) >> i32(shift)


def fma(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. So is the sum with its error, which says how to
    round the sum to odd: then rounding to float32 rounds the exact value. (Boldo and
    Melquiond: "Emulation of FMA and correctly rounded sums", 2008.)
    """
    product = np.asarray(a).astype(f64) * np.asarray(b).astype(f64)
    c = np.asarray(c).astype(f64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    as_int = np.ascontiguousarray(total).view(i64).reshape(total.shape)
    to_odd = (error != 0) & np.isfinite(total) & (as_int & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(to_odd, as_int + step, as_int).view(f64).astype(f32)


def maximum(a: ndarray, b: ndarray) -> ndarray:
    """The larger; the number of a number and a NaN; +0 of +0 and -0."""
    return np.where(a == b, bits(a) & bits(b), bits(np.fmax(a, b))).view(f32)


def minimum(a: ndarray, b: ndarray) -> ndarray:
    return np.where(a == b, bits(a) | bits(b), bits(np.fmin(a, b))).view(f32)


def median(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    return maximum(minimum(a, b), minimum(maximum(a, b), c))


def _exponent(x: ndarray) -> ndarray:
    return (bits(x) >> u32(23) & u32(255)).astype(i32)


def div_scale(x: ndarray, d: ndarray, n: ndarray) -> tuple[ndarray, ndarray]:
    """x, which is d or n, scaled for n / d; and whether `div_fmas` scales back.

    Where both n / d and 1 / d are denormal, AMD's document scales d by 2**64. Then the
    quotient would not come out; by 2**-64 it does, with what `div_fmas` scales back.
    """
    x, d, n = np.broadcast_arrays(x, d, n)
    quotient = np.abs(n.astype(f64) / d.astype(f64))
    is_tiny = (quotient < 2.0**-126) & (quotient != 0)
    is_huge = np.abs(d.astype(f64)) > 2.0**126
    is_zero = (d == 0) | (n == 0)
    # The first that holds: which of the two is scaled, by what, and the flag.
    cases = (
        (is_zero, False, 0, False),
        (_exponent(n) - _exponent(d) >= 96, bits(x) == bits(d), 64, True),
        ((_exponent(d) == 0) & (d != 0), True, 64, False),
        (is_huge & is_tiny, bits(x) == bits(d), -64, True),
        (is_huge, True, -64, False),
        (is_tiny, bits(x) == bits(n), 64, True),
        (_exponent(n) <= 23, True, 64, False),
    )
    conditions = [condition for condition, *_ in cases]
    powers = [np.where(scaled, power, 0) for _, scaled, power, _ in cases]
    flag = np.select(conditions, [np.full(x.shape, f) for *_, f in cases], False)
    scaled = np.ldexp(x, np.select(conditions, powers, 0)).astype(f32)
    return np.where(is_zero, f32(np.nan), scaled), flag


def div_fmas(a: ndarray, b: ndarray, c: ndarray, flag: ndarray) -> ndarray:
    power = np.where(_exponent(c) > 127, 64, -64)
    total = fma(a, b, c)
    return np.where(flag, np.ldexp(total, power), total).astype(f32)


def div_fixup(q: ndarray, d: ndarray, n: ndarray) -> ndarray:
    """The quotient q of n / d, or what stands for it where n or d is special."""
    q, d, n = np.broadcast_arrays(q, d, n)
    sign = (bits(d) ^ bits(n)) & u32(0x80000000)
    result = bits(q) & u32(0x7FFFFFFF) | sign
    result = np.where(_exponent(n) - _exponent(d) < -150, sign, result)
    result = np.where(np.isinf(d) | (n == 0), sign, result)
    result = np.where(np.isinf(n) | (d == 0), u32(0x7F800000) | sign, result)
    neither = (n == 0) & (d == 0) | np.isinf(n) & np.isinf(d)
    return np.where(np.isnan(n) | np.isnan(d) | neither, QUIET_NAN, result).view(f32)


def to_int(x: ndarray, low: float, high: float) -> ndarray:
    """Towards zero, clamped; NaN is 0. float64."""
    x = np.nan_to_num(x.astype(f64), nan=0.0, posinf=high, neginf=low)
    return np.clip(np.trunc(x), low, high)


def to_bf16(x: ndarray) -> ndarray:
    """float32 to bfloat16, halves to even, in the low 16 bits."""
    value = bits(x)
    rounded = value + u32(0x7FFF) + (value >> u32(16) & u32(1))
    return np.where(np.isnan(x), value | u32(0x400000), rounded) >> u32(16)


def reverse_bits(x: ndarray) -> ndarray:
    octets = np.atleast_1d(np.ascontiguousarray(x)).view(np.uint8).reshape(-1, 4)
    flipped = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    packed = np.packbits(np.ascontiguousarray(flipped), axis=1, bitorder="little")
    return packed.view(u32).reshape(np.shape(x))


def extract(x: ndarray, offset: ndarray, width: ndarray) -> ndarray:
    """`width` bits, 0 to 31, from `offset` on."""
    return x >> (offset & u32(31)) & ((u32(1) << (width & u32(31))) - u32(1))


def extract_signed(x: ndarray, offset: ndarray, width: ndarray) -> ndarray:
    width = np.asarray(width & u32(31)).astype(i64)
    value = np.asarray(extract(x, offset, width.astype(u32))).astype(i64)
    sign = value >> np.maximum(width - 1, 0) & 1
    return (value - (sign << width)).astype(i32)


def permute_bytes(high: ndarray, low: ndarray, selector: ndarray) -> ndarray:
    """A byte of the eight, or a sign, or 0 or 255, for each byte of the selector."""
    pair = np.asarray(high).astype(u64) << u64(32) | np.asarray(low).astype(u64)
    result: Any = u32(0)
    for k in range(4):
        s = np.asarray(selector >> u32(8 * k) & u32(255)).astype(u64)
        octet = pair >> (s & u64(7)) * u64(8) & u64(255)
        sign = (pair >> ((s & u64(3)) * u64(16) + u64(15)) & u64(1)) * u64(255)
        constant = np.where(s == 12, u64(0), u64(255))
        chosen = np.where(s < 8, octet, np.where(s < 12, sign, constant))
        result = result | chosen.astype(u32) << u32(8 * k)
    return result


def dot4(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """c + the products of four int8 each."""
    for k in range(4):
        shift = u32(8 * k)
        c = c + sign_extend(a >> shift, 8) * sign_extend(b >> shift, 8)
    return c


def bit_operation(a: ndarray, b: ndarray, c: ndarray, table: int) -> ndarray:
    """Bit by bit, bit 4 a + 2 b + c of the table."""
    result: Any = u32(0)
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> k & 1 else ~v for v, k in ((a, 2), (b, 1), (c, 0)))
            result = result | x & y & z
    return result
