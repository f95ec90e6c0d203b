# SPDX-License-Identifier: Apache-2.0
"""What a program must do itself, checked while it runs: wait for what it has asked for,
and write a register before it reads it."""

import numpy as np

from tests.kernels.amdgcn.code import M0, VCC, Instruction, Operand
from tests.kernels.amdgcn.waves import SCALAR_REGISTERS, Fault, Waves

_BOTH = {"v_permlane16_swap_b32", "v_permlane32_swap_b32"}
_IN_PLACE = {"v_fmac_f32", "v_dot4c_i32_i8"}
_PART_OF = {"v_fma_mixlo_f16", "v_fma_mixhi_f16"}
_WITH_CARRY = {
    "v_add_co_u32",
    "v_sub_co_u32",
    "v_subrev_co_u32",
    "v_addc_co_u32",
    "v_mad_u64_u32",
    "v_mad_i64_i32",
    "v_div_scale_f32",
}
_ADDS_64 = {"v_mad_u64_u32", "v_mad_i64_i32", "v_lshl_add_u64"}
_NO_RESULT = (
    *("global_store", "buffer_store", "ds_write", "ds_add"),
    *("s_cmp", "s_bitcmp"),
)
_NO_REGISTERS = (
    "s_waitcnt",
    "s_nop",
    "s_setprio",
    "s_barrier",
    "s_branch",
    "s_cbranch",
)


def _halves(inst: Instruction) -> list[Operand]:
    """The registers that a packed operation reads of each pair."""
    read = []
    for i, operand in enumerate(inst.operands[1:]):
        chosen = set()
        selects = {"op_sel": 0}
        if inst.base != "v_pk_mov_b32":
            selects["op_sel_hi"] = 1
        for name, default in selects.items():
            given = inst.modifiers.get(name)
            chosen.add(int(given.strip("[]").split(",")[i]) if given else default)
        if operand.file != "c":
            read += [Operand("", operand.file, operand.first + k, 1) for k in chosen]
    return read


def registers_of(inst: Instruction) -> tuple[list[Operand], list[Operand]]:
    """What an instruction reads and writes, but for what is implied."""
    name, operands = inst.base, list(inst.operands)
    if name.startswith(_NO_REGISTERS):
        return [], []
    if name.startswith(_NO_RESULT):
        return operands, []
    if name in _BOTH:
        return operands, operands
    if name.startswith("v_pk_"):
        return _halves(inst), operands[:1]
    if name in _WITH_CARRY:
        return operands[2:], operands[:2]
    if name in _IN_PLACE or name in _PART_OF or name in ("s_addk_i32", "s_mulk_i32"):
        return operands, operands[:1]
    return operands[1:], operands[:1]


def _numbers(operands: list[Operand], file: str) -> np.ndarray:
    found = {n for o in operands if o.file == file for n in o.registers}
    return np.array(sorted(found), int)


class Checks:
    """Tickets of what is under way: each wave counts what it has asked for, and what a
    register waits for holds the number of that.

    Vector memory, and LDS, come back in the order they were asked for, scalar loads in
    any: for these nothing but a count of 0 is enough.
    """

    def __init__(self, w: Waves, num_instructions: int) -> None:
        self.w = w
        self.executed_by_all = [False] * num_instructions

    def start(self) -> None:
        waves, registers, instructions = (
            self.w.num,
            self.w.registers,
            len(self.executed_by_all),
        )
        self.pending = False
        self.vector_asked, self.vector_done = np.zeros((2, waves), np.int64)
        self.lds_asked, self.lds_done = np.zeros((2, waves), np.int64)
        self.vector_ticket = np.zeros((registers, waves), np.int64)
        self.lds_ticket = np.zeros((registers, waves), np.int64)
        self.scalar_waits = np.zeros((SCALAR_REGISTERS, waves), bool)
        self.vector_defined = np.zeros((registers, waves), bool)
        self.vector_defined[0] = True
        self.scalar_defined = np.zeros((SCALAR_REGISTERS, waves), bool)
        self.scalar_defined[M0:] = True
        self.executed = np.zeros((instructions, waves), bool)
        self.executed_by_all[:] = [False] * instructions

    def issue_vector(self, registers: range) -> None:
        """A load to these vector registers, or with none a store, has begun."""
        self.pending = True
        self.vector_asked += self.w.active
        for register in registers:
            np.copyto(
                self.vector_ticket[register], self.vector_asked, where=self.w.active
            )

    def issue_lds(self, registers: range) -> None:
        self.pending = True
        self.lds_asked += self.w.active
        for register in registers:
            np.copyto(self.lds_ticket[register], self.lds_asked, where=self.w.active)

    def issue_scalar(self, registers: range) -> None:
        self.pending = True
        self.scalar_waits[registers.start : registers.stop, self.w.active] = True

    def wait(self, counts: dict[str, int]) -> None:
        """s_waitcnt: until no more than so many are under way."""
        active = self.w.active
        if "vmcnt" in counts:
            done = np.maximum(self.vector_done, self.vector_asked - counts["vmcnt"])
            np.copyto(self.vector_done, done, where=active)
        if "lgkmcnt" in counts:
            done = np.maximum(self.lds_done, self.lds_asked - counts["lgkmcnt"])
            np.copyto(self.lds_done, done, where=active)
            if counts["lgkmcnt"] == 0:
                self.scalar_waits[:, active] = False
        self.pending = bool(
            (self.vector_done < self.vector_asked).any()
            or (self.lds_done < self.lds_asked).any()
            or self.scalar_waits.any()
        )


class Guard:
    """The checks of one instruction."""

    def __init__(self, inst: Instruction, index: int) -> None:
        read, written = registers_of(inst)
        self.index, self.text = index, inst.text
        self.vector = _numbers(read + written, "v")
        self.scalar = _numbers(read + written, "s")
        self.vector_read, self.scalar_read = _numbers(read, "v"), _numbers(read, "s")
        self.vector_written = _numbers(written, "v")
        self.scalar_written = _numbers(written, "s")
        if inst.base.startswith("v_cmp_") and inst.name.endswith("_e32"):
            self.scalar_written = np.array([VCC, VCC + 1])
        # LLVM adds 64 bits of which it uses the lower half, to registers whose upper
        # half nothing has written: then that of the result is not written either.
        self.upper: tuple[int, int] | None = None
        addend = inst.operands[-1] if inst.operands else None
        if inst.base in _ADDS_64 and addend and addend.file == "v":
            self.upper = addend.first + 1, inst.operands[0].first + 1
            if addend.first + 1 not in _numbers(read[:-1], "v"):
                self.vector_read = self.vector_read[self.vector_read != self.upper[0]]
        self.is_empty = not (self.vector.size or self.scalar.size)

    def waits(self, checks: Checks) -> None:
        """No register may be touched while something on its way to it may arrive."""
        active = checks.w.active
        if self.vector.size:
            late = checks.vector_ticket[self.vector] > checks.vector_done
            if (late & active).any():
                raise Fault(f"{self.text}: no s_waitcnt vmcnt for a register of it")
            late = checks.lds_ticket[self.vector] > checks.lds_done
            if (late & active).any():
                raise Fault(f"{self.text}: no s_waitcnt lgkmcnt for a register of it")
        if self.scalar.size and (checks.scalar_waits[self.scalar] & active).any():
            raise Fault(f"{self.text}: no s_waitcnt lgkmcnt for a scalar load")

    def definitions(self, checks: Checks) -> None:
        """Registers stay defined: the first time of each wave is enough."""
        active = checks.w.active
        for file, defined, read in (
            ("v", checks.vector_defined, self.vector_read),
            ("s", checks.scalar_defined, self.scalar_read),
        ):
            undefined = ~defined[read] & active
            if undefined.any():
                register = read[undefined.any(axis=1)][0]
                raise Fault(f"{self.text}: nothing has written {file}{register}")
        defined = checks.vector_defined
        if self.upper:
            upper = defined[self.upper[0]].copy()
        defined[self.vector_written] |= active
        if self.upper:
            np.copyto(defined[self.upper[1]], upper, where=active)
        checks.scalar_defined[self.scalar_written] |= active
        executed = checks.executed[self.index]
        executed |= active
        checks.executed_by_all[self.index] = bool(executed.all())
