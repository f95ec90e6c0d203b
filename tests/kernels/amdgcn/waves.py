# SPDX-License-Identifier: Apache-2.0
"""The state of waves that run at once, and how operands are read and written.

V is [register, wave, lane] and S [register, wave], both uint32. What a function here
returns for an operand reads it when it is called: an instruction is compiled once and
runs often.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.code import EXEC, VCC, Operand

Get = Callable[[], Any]
LANES = 64
LANE = np.arange(LANES)
SCALAR_REGISTERS = 128
LOW = np.uint64(0xFFFFFFFF)
SIGN = np.uint32(0x80000000)


class Fault(Exception):
    """What hardware would do silently: a program that is wrong, or not known here."""


class Waves:
    """Registers and masks of groups of waves. What nothing has written is noise."""

    def __init__(self, per_group: int, registers: int, nudge: bool = False) -> None:
        self.per_group, self.registers = per_group, registers
        self.nudge = nudge  # some of what is approximate is off by a unit

    def start(self, groups: int, rng: np.random.Generator) -> None:
        """So many groups."""
        self.num = groups * self.per_group
        self.group = np.arange(self.num) // self.per_group
        shape = self.registers, self.num, LANES
        self.V = rng.integers(0, 2**32, shape, dtype=np.uint32)
        self.S = rng.integers(0, 2**32, (SCALAR_REGISTERS, self.num), dtype=np.uint32)
        self.S[EXEC : EXEC + 2] = 0xFFFFFFFF
        self.V[0] = np.arange(self.num)[:, None] % self.per_group * LANES + LANE
        self.scc = np.zeros(self.num, bool)
        self.active = np.ones(self.num, bool)  # the waves that execute
        self.read_exec()

    def read_exec(self) -> None:
        """Lanes by `exec`; called when it has changed."""
        self.lanes = lanes_of(self.scalar64(EXEC))
        self.read_active()

    def read_active(self) -> None:
        self.all_active = bool(self.active.all())
        self.mask = self.lanes if self.all_active else self.lanes & self.active[:, None]
        self.full = bool(self.mask.all())

    def set_active(self, active: ndarray) -> None:
        self.active = active
        self.read_active()

    def scalar64(self, register: int) -> ndarray:
        low, high = self.S[register], self.S[register + 1]
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def put(self, register: int, value: ndarray, where: ndarray | None = None) -> None:
        """To a vector register, in the lanes that are on."""
        if where is not None:
            np.copyto(self.V[register], value, where=self.mask & where)
        elif self.full:
            self.V[register] = value
        else:
            np.copyto(self.V[register], value, where=self.mask)

    def put64(self, register: int, value: ndarray) -> None:
        self.put(register, (value & LOW).astype(np.uint32))
        self.put(register + 1, (value >> np.uint64(32)).astype(np.uint32))

    def put_scalar(self, register: int, value: Any) -> None:
        if self.all_active:
            self.S[register] = value
        else:
            np.copyto(self.S[register], value, where=self.active)
        if register >= EXEC:
            self.read_exec()

    def put_scalar64(self, register: int, value: ndarray) -> None:
        low, high = (value & LOW).astype(np.uint32), (value >> np.uint64(32))
        np.copyto(self.S[register], low, where=self.active)
        np.copyto(self.S[register + 1], high.astype(np.uint32), where=self.active)
        if register == EXEC:
            self.read_exec()

    def put_mask(self, register: int, flags: ndarray) -> None:
        """Flags [waves, lanes] as a mask, zero in lanes that are off."""
        packed = np.packbits(flags & self.lanes, axis=1, bitorder="little")
        self.put_scalar64(register, packed.view(np.uint64)[:, 0])

    def put_scc(self, value: ndarray) -> None:
        np.copyto(self.scc, value, where=self.active, casting="unsafe")


def lanes_of(mask: ndarray) -> ndarray:
    """A mask, uint64 [waves], as bool [waves, lanes]."""
    octets = np.ascontiguousarray(mask).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def bits32(w: Waves, operand: Operand, scalar: bool = False) -> Get:
    """uint32 [waves, lanes], [waves, 1] or []; of scalar operations [waves] or []."""
    register = operand.first
    if operand.file == "c":
        value = np.uint32(operand.value & 0xFFFFFFFF)
        return lambda: value
    if operand.file == "v":
        if scalar:
            raise Fault(f"{operand.text} in a scalar operation")

        def get() -> ndarray:
            return w.V[register]
    elif scalar:

        def get() -> ndarray:
            return w.S[register]
    else:

        def get() -> ndarray:
            return w.S[register][:, None]

    if operand.absolute and operand.negative:
        return lambda: get() | SIGN
    if operand.absolute:
        return lambda: get() & ~SIGN
    if operand.negative:
        return lambda: get() ^ SIGN
    return get


def bits64(w: Waves, operand: Operand, scalar: bool = False) -> Get:
    """As `bits32`, but uint64; a constant is extended by its sign."""
    register = operand.first
    if operand.file == "c":
        if not -16 <= operand.value < 2**31:
            raise Fault(f"{operand.text} as 64 bits is not known")
        value = np.uint64(operand.value & 0xFFFFFFFFFFFFFFFF)
        return lambda: value
    if operand.count != 2:
        raise Fault(f"{operand.text}: expected two registers")
    if operand.file == "s":
        if scalar:
            return lambda: w.scalar64(register)
        return lambda: w.scalar64(register)[:, None]

    def get() -> ndarray:
        high = w.V[register + 1].astype(np.uint64) << np.uint64(32)
        return high | w.V[register]

    return get


def mask_of(w: Waves, operand: Operand) -> Get:
    """A mask of lanes, bool [waves, lanes]."""
    get = bits64(w, operand, scalar=True)
    return lambda: lanes_of(np.broadcast_to(get(), (w.num,)))


VCC_OPERAND = Operand("vcc", "s", VCC, 2)
