# SPDX-License-Identifier: Apache-2.0
"""Small programs for tests of the machine: text, registers before, registers after."""

from typing import Any

import numpy as np

from tests.kernels.amdgcn.code import ACCUMULATORS, VCC, Kernel, parse_instruction
from tests.kernels.amdgcn.machine import Machine

FULL = (1 << 64) - 1


class Program:
    """One group of waves that executes some lines, labels not among them."""

    def __init__(self, *lines: str, num_warps: int = 1, lds_bytes: int = 0) -> None:
        instructions = [parse_instruction(line) for line in lines]
        instructions.append(parse_instruction("s_endpgm"))
        directives = {f".amdhsa_system_sgpr_workgroup_id_{c}": 0 for c in "xyz"}
        self.machine = Machine(
            Kernel(
                "a test",
                instructions,
                0,
                [],
                num_warps,
                lds_bytes,
                directives,
                ACCUMULATORS + 64,
                0,
            )
        )
        machine = self.machine
        machine.start(np.zeros((1, 3), int), [], np.random.default_rng())
        machine.counts = np.zeros(len(instructions), np.int64)
        self.w, self.memory, self.lds = machine.w, machine.memory, machine.lds

    def vector(self, first: int, *values: Any) -> "Program":
        """Each value a number, or one a lane."""
        for register, value in enumerate(values, first):
            self.w.V[register] = np.asarray(value, np.int64).astype(np.uint32)
            self.machine.checks.vector_defined[register] = True
        return self

    def scalar(self, first: int, *values: Any) -> "Program":
        for register, value in enumerate(values, first):
            self.w.S[register] = np.asarray(value, np.int64).astype(np.uint32)
            self.machine.checks.scalar_defined[register] = True
        return self

    def scalar64(self, first: int, value: int) -> "Program":
        return self.scalar(first, value & 0xFFFFFFFF, value >> 32)

    def all_defined(self) -> "Program":
        self.machine.checks.vector_defined[:] = True
        self.machine.checks.scalar_defined[:] = True
        return self

    def exec(self, mask: int) -> "Program":
        self.w.put_scalar64(126, np.full(self.w.num, mask, np.uint64))
        return self

    def run(self) -> "Program":
        with np.errstate(all="ignore"):
            self.machine.run()
        return self

    def lanes(self, register: int, wave: int = 0) -> list[int]:
        return self.w.V[register, wave].tolist()

    def number(self, register: int, wave: int = 0) -> int:
        return int(self.w.S[register, wave])

    def mask(self, register: int = VCC, wave: int = 0) -> int:
        return self.number(register, wave) | self.number(register + 1, wave) << 32
