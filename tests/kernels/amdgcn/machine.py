# SPDX-License-Identifier: Apache-2.0
"""Runs a compiled kernel: all waves of some workgroups at once, in NumPy.

Waves with the lowest program counter go first, so that they come together again after a
branch. Or one wave runs after another, each until it waits for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.checks import Checks, Guard
from tests.kernels.amdgcn.code import (
    ACCUMULATORS,
    EXEC,
    VCC,
    Instruction,
    Kernel,
)
from tests.kernels.amdgcn.lds import Lds, compile_lds, grain_of
from tests.kernels.amdgcn.matrix import compile_matrix
from tests.kernels.amdgcn.memory import Memory, compile_memory
from tests.kernels.amdgcn.scalar import compile_scalar
from tests.kernels.amdgcn.vector import compile_vector
from tests.kernels.amdgcn.waves import LANES, Fault, Waves

Order = Literal["together", "forward", "backward"]
Run = Callable[[], None]
# Workgroups at once: NumPy's calls cost much, registers of many waves leave the cache.
GROUPS_AT_ONCE = 16
_NOTHING = ("s_nop", "s_setprio", "s_sleep")


@dataclass
class Options:
    """How to run: the order of waves, and what is approximate off by a unit or not."""

    order: Order = "together"
    nudge: bool = False
    seed: int = 0
    measure: bool = False  # count the clocks of LDS


@dataclass
class Statistics:
    """Of a launch: how often a wave executed each instruction, and so on."""

    counts: ndarray
    groups: int
    waves: int
    loaded_bytes: dict[str, int]  # of each tensor
    stored_bytes: dict[str, int]
    lds_bytes: int
    lds_clocks: int


class Machine:
    """A kernel whose instructions are compiled once, when they are first executed."""

    def __init__(self, kernel: Kernel, options: Options | None = None) -> None:
        self.kernel, self.options = kernel, options or Options()
        registers = kernel.vector_registers
        if kernel.accumulators:
            registers = ACCUMULATORS + kernel.accumulators
        self.w = Waves(kernel.num_warps, registers, self.options.nudge)
        self.memory = Memory()
        self.checks = Checks(self.w, len(kernel.instructions))
        grain = grain_of(kernel.instructions)
        self.lds = Lds(self.w, self.checks, kernel.lds_bytes, grain)
        self.lds.measure = self.options.measure
        self.jumps = [is_control(inst) for inst in kernel.instructions]
        self.compiled: list[Run | None] = [None] * len(kernel.instructions)
        self.at = 0

    def launch(
        self,
        grid: tuple[int, ...],
        arguments: list[bytes | ndarray],
        most_groups: int | None = None,
    ) -> Statistics:
        """Run all workgroups of a grid, or the first of them.

        Args:
            arguments: what the kernel's source names: the bytes of numbers, and arrays
                of bytes, uint8 [n], which are changed in place.

        Raises:
            Fault: the program does what it must not, or what the machine does not know.
        """
        kernel, memory = self.kernel, self.memory
        x, y, z = (*grid, 1, 1)[:3]
        memory.start()
        block = pack(kernel, self.place(arguments), (x, y, z))
        address = memory.add("the arguments", block)
        user: list[int | None] = [None] * kernel.directive("user_sgpr_count")
        user[:2] = address & 0xFFFFFFFF, address >> 32
        preloaded = kernel.directive("user_sgpr_kernarg_preload_length")
        user[2 : 2 + preloaded] = block.view(np.uint32)[:preloaded].tolist()
        ids = np.stack(np.meshgrid(range(z), range(y), range(x), indexing="ij"), -1)
        ids = ids.reshape(-1, 3)[:most_groups, ::-1]
        step = GROUPS_AT_ONCE if self.options.order == "together" else 1
        rng = np.random.default_rng(self.options.seed)
        self.counts = np.zeros(len(kernel.instructions), np.int64)
        self.lds.clocks = self.lds.moved_bytes = 0
        with np.errstate(all="ignore"):
            for i in range(0, len(ids), step):
                self.start(ids[i : i + step], user, rng)
                self.run()
        return Statistics(
            self.counts,
            len(ids),
            len(ids) * kernel.num_warps,
            {t.name: t.loaded_bytes for t in memory.tensors if t.loaded_bytes},
            {t.name: t.stored_bytes for t in memory.tensors if t.stored_bytes},
            self.lds.moved_bytes,
            self.lds.clocks,
        )

    def place(self, arguments: list[bytes | ndarray]) -> list[bytes]:
        packed = []
        for i, value in enumerate(arguments):
            if isinstance(value, np.ndarray):
                address = self.memory.add(f"argument {i}", value)
                value = address.to_bytes(8, "little")
            packed.append(value)
        return packed

    def start(
        self,
        groups: ndarray,
        user: list[int | None],
        rng: np.random.Generator,
    ) -> None:
        """What registers hold at the start. groups: [n, 3], their place in the grid."""
        w, checks = self.w, self.checks
        w.start(len(groups), rng)
        self.lds.start(rng)
        checks.start()
        ids = groups[w.group]
        given = [(n, value) for n, value in enumerate(user) if value is not None]
        register = len(user)
        for i, name in enumerate("xyz"):
            if self.kernel.directive(f"system_sgpr_workgroup_id_{name}"):
                given.append((register, ids[:, i]))
                register += 1
        for n, value in given:
            w.S[n] = value
            checks.scalar_defined[n] = True
        self.pc = np.full(w.num, self.kernel.start)
        self.done, self.waiting = np.zeros((2, w.num), bool)

    def run(self) -> None:
        """Until all waves have ended."""
        w, pc, compiled = self.w, self.pc, self.compiled
        while True:
            ready = ~(self.done | self.waiting)
            if not ready.any():
                if self.done.all():
                    return
                # Waves that have ended no longer take part in a barrier.
                self.lds.pass_barrier(self.waiting)
                self.waiting[:] = False
                continue
            active, end = self.choose(ready)
            if not np.array_equal(active, w.active):
                w.set_active(active)
            i, count = int(pc[active][0]), int(active.sum())
            while True:
                self.at = i
                self.counts[i] += count
                fn = compiled[i] or self.compile(i)
                fn()
                if self.jumps[i]:
                    break
                i += 1
                if i == end:
                    pc[active] = i
                    break

    def choose(self, ready: ndarray) -> tuple[ndarray, int]:
        """The waves that go on, and where others join them."""
        pc = self.pc
        if self.options.order == "together":
            first = pc[ready].min()
            later = pc[ready & (pc > first)]
            return ready & (pc == first), int(later.min()) if later.size else -1
        waves = np.flatnonzero(ready)
        active = np.zeros_like(ready)
        active[waves[0 if self.options.order == "forward" else -1]] = True
        return active, -1

    def compile(self, index: int) -> Run:
        inst = self.kernel.instructions[index]
        w, checks = self.w, self.checks
        fn = (
            self.control(inst)
            or compile_scalar(w, inst)
            or compile_memory(w, self.memory, checks, inst)
            or compile_lds(w, self.lds, checks, inst)
            or compile_matrix(w, inst)
            or compile_vector(w, inst)
        )
        if fn is None:
            raise Fault(
                f"{inst.text}: {inst.name} is not known to the machine; add it, with a "
                "test in tests/kernels/amdgcn/test_instructions.py"
            )
        self.compiled[index] = guarded = guard(inst, index, fn, checks)
        return guarded

    def control(self, inst: Instruction) -> Run | None:
        name = inst.name
        if name in _NOTHING:
            return lambda: None
        if name == "s_waitcnt":
            counts = {key: int(value) for key, value in inst.modifiers.items()}
            return lambda: self.checks.wait(counts)
        if name == "s_barrier":
            return self.barrier
        if name == "s_endpgm":
            return self.end
        if name == "s_branch":
            return lambda: self.jump(np.ones(self.w.num, bool), inst.target)
        if name.startswith("s_cbranch_"):
            condition = self.conditions()[name.removeprefix("s_cbranch_")]
            return lambda: self.jump(condition(), inst.target)
        return None

    def conditions(self) -> dict[str, Callable[[], ndarray]]:
        w = self.w
        return {
            "scc0": lambda: ~w.scc,
            "scc1": lambda: w.scc,
            "vccz": lambda: w.scalar64(VCC) == 0,
            "vccnz": lambda: w.scalar64(VCC) != 0,
            "execz": lambda: w.scalar64(EXEC) == 0,
            "execnz": lambda: w.scalar64(EXEC) != 0,
        }

    def jump(self, where: ndarray, target: int) -> None:
        active = self.w.active
        self.pc[active] = np.where(where, target, self.at + 1)[active]

    def barrier(self) -> None:
        self.pc[self.w.active] = self.at + 1
        self.waiting |= self.w.active

    def end(self) -> None:
        self.done |= self.w.active


def is_control(inst: Instruction) -> bool:
    return inst.name.startswith(("s_branch", "s_cbranch", "s_barrier", "s_endpgm"))


def guard(inst: Instruction, index: int, fn: Run, checks: Checks) -> Run:
    """The instruction with its checks."""
    found = Guard(inst, index)
    if found.is_empty:
        return fn
    by_all = checks.executed_by_all

    def run() -> None:
        if checks.pending:
            found.waits(checks)
        if not by_all[index]:
            found.definitions(checks)
        fn()

    return run


def pack(kernel: Kernel, arguments: list[bytes], grid: tuple[int, ...]) -> ndarray:
    """The block of arguments, as bytes, with Triton's two for its own memory and what
    the runtime adds."""
    hidden = {f"hidden_block_count_{c}": n for c, n in zip("xyz", grid, strict=True)}
    hidden |= {
        "hidden_group_size_x": LANES * kernel.num_warps,
        "hidden_group_size_y": 1,
        "hidden_group_size_z": 1,
        "hidden_grid_dims": 3,
        "hidden_dynamic_lds_size": kernel.lds_bytes,
    }
    named = [x for x in kernel.arguments if not x.kind.startswith("hidden")]
    values = [*arguments, bytes(8), bytes(8)]
    if len(named) != len(values):
        raise Fault(
            f"{kernel.name}: {len(arguments)} arguments, expected {len(named) - 2}"
        )
    # A word beyond the end may be preloaded.
    block = np.zeros(kernel.directive("kernarg_size") + 64, np.uint8)
    for argument in kernel.arguments:
        if argument.kind.startswith("hidden"):
            value = hidden.get(argument.kind, 0).to_bytes(argument.size, "little")
        else:
            value = values[named.index(argument)]
        if len(value) != argument.size:
            raise Fault(f"{kernel.name}: {len(value)} bytes at {argument.offset}")
        block[argument.offset : argument.offset + argument.size] = np.frombuffer(
            value, np.uint8
        )
    return block


def knows(inst: Instruction) -> bool:
    """Whether the machine knows an instruction."""
    kernel = Kernel("", [inst], 0, [], 1, 0, {}, 2 * ACCUMULATORS, 0)
    try:
        Machine(kernel).compile(0)
    except Fault:
        return False
    return True
