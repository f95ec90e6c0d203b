# SPDX-License-Identifier: Apache-2.0
"""Arithmetic for tests of instructions, one value at a time: whole numbers of Python,
fractions and `struct`, and nothing of the machine."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

MASK = 0xFFFFFFFF
MASK64 = (1 << 64) - 1
NAN = float("nan")


def signed(x: int, width: int = 32) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> (width - 1) else x


def as_float(x: int) -> float:
    """The value of a float32's bits."""
    return struct.unpack("<f", struct.pack("<I", x & MASK))[0]


def as_half(x: int) -> float:
    return struct.unpack("<e", struct.pack("<H", x & 0xFFFF))[0]


def is_negative(x: float) -> bool:
    return math.copysign(1.0, x) < 0


def rounded(value: Fraction, digits: int, least: int, most: int) -> Fraction | None:
    """To so many binary digits, halves to even; None beyond 2 ** most. Below
    2 ** least fewer digits are left."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    result = round(value / unit) * unit
    return None if abs(result) >= Fraction(2) ** most else result


def to_float32(value: Fraction, negative_zero: bool = False) -> int:
    """The bits of the nearest float32."""
    nearest = rounded(value, 24, -126, 128)
    if nearest is None:
        return 0xFF800000 if value < 0 else 0x7F800000
    if nearest == 0:
        return 0x80000000 if value < 0 or negative_zero else 0
    return struct.unpack("<I", struct.pack("<f", float(nearest)))[0]


def to_float16(x: int) -> int:
    """The bits of the float16 nearest to a float32."""
    return _to_16_bits(x, 11, -14, 16, 0x7C00, lambda value: struct.pack("<e", value))


def to_bfloat16(x: int) -> int:
    """The bits of the bfloat16 nearest to a float32."""
    upper_half = slice(2, 4)
    return _to_16_bits(
        x, 8, -126, 128, 0x7F80, lambda value: struct.pack("<f", value)[upper_half]
    )


def _to_16_bits(
    x: int,
    digits: int,
    least: int,
    most: int,
    infinity: int,
    pack: Callable[[float], bytes],
) -> int:
    """`digits`, `least`, `most`: as of `rounded`; `pack`: bytes of what is rounded."""
    value = as_float(x)
    if math.isnan(value):
        return infinity | 1 << (digits - 2)  # the fraction's first bit: a quiet NaN
    sign = 0x8000 if is_negative(value) else 0
    if math.isinf(value):
        return sign | infinity
    nearest = rounded(Fraction(value), digits, least, most)
    if nearest is None:
        return sign | infinity
    return sign | struct.unpack("<H", pack(abs(float(nearest))))[0]


def bits(x: float) -> int:
    """Of a value that is a float32."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def fma(x: int, y: int, z: int) -> int:
    """x * y + z of float32's bits, rounded once."""
    a, b, c = as_float(x), as_float(y), as_float(z)
    if not all(map(math.isfinite, (a, b, c))):
        # Finite products of float32 are finite in float64.
        return bits(a * b + c)
    product_negative = is_negative(a) != is_negative(b)
    total = Fraction(a) * Fraction(b) + Fraction(c)
    return to_float32(total, product_negative and is_negative(c))


def add(x: int, y: int) -> int:
    return fma(x, 0x3F800000, y)


def multiply(x: int, y: int) -> int:
    a, b = as_float(x), as_float(y)
    if not (math.isfinite(a) and math.isfinite(b)):
        return bits(a * b)
    negative = is_negative(a) != is_negative(b)
    return to_float32(Fraction(a) * Fraction(b), negative)


def negated(x: int) -> int:
    return x ^ 0x80000000


def larger(x: int, y: int) -> int:
    """AMD's maximum: of a NaN and a number the number; +0 is larger than -0."""
    a, b = as_float(x), as_float(y)
    if math.isnan(a):
        return y
    if math.isnan(b):
        return x
    if a == b:
        return y if is_negative(a) else x
    return x if a > b else y


def divided(x: int, y: int) -> int:
    """The float32 nearest to x / y."""
    a, b = as_float(x), as_float(y)
    if math.isnan(a) or math.isnan(b):
        return bits(NAN)
    sign = 0x80000000 if is_negative(a) != is_negative(b) else 0
    if b == 0 or math.isinf(a):
        special = (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b))
        return bits(NAN) if special else sign | 0x7F800000
    if math.isinf(b):
        return sign
    return to_float32(Fraction(a) / Fraction(b), bool(sign))


def truncated(x: int, low: int, high: int) -> int:
    """A float32 to a whole number, towards zero, held within limits; NaN is 0."""
    value = as_float(x)
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return low if value < 0 else high
    return min(max(int(value), low), high)


def permuted(high: int, low: int, selector: int) -> int:
    """V_PERM_B32."""
    octets = (high << 32 | low).to_bytes(8, "little")
    result = []
    for s in selector.to_bytes(4, "little"):
        if s < 8:
            result.append(octets[s])
        elif s < 12:
            result.append(255 * (octets[2 * (s - 8) + 1] >> 7))
        else:
            result.append(0 if s == 12 else 255)
    return int.from_bytes(bytes(result), "little")


def looked_up(x: int, y: int, z: int, table: int, width: int) -> int:
    """V_BITOP3: each bit's place in the table, x first."""
    result = 0
    for i in range(width):
        index = (x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1
        result |= (table >> index & 1) << i
    return result
