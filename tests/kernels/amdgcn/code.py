# SPDX-License-Identifier: Apache-2.0
"""AMD's machine code as text: what LLVM writes and Triton assembles, byte for byte.

The names of instructions, registers and modifiers are LLVM's ("Syntax of AMDGPU
Instructions" in its documentation).
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

VCC, M0, EXEC = 106, 124, 126
# Accumulation registers, a0 and on, follow the vector registers.
ACCUMULATORS = 256
_NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
_ONE_OVER_TWO_PI = 0x3E22F983
_FLAGS = "offen|idxen|clamp|sc0|sc1|nt|glc|slc|lds|gds"
_MODIFIER = re.compile(rf"\s(?:(\w+):(\[[^\]]*\]|\w+\([^)]*\)|\S+)|({_FLAGS})\b)")
_SUFFIX = re.compile(r"_(e32|e64|dpp|sdwa)$")
_REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])")


@dataclass(frozen=True)
class Operand:
    """Registers of a file, "v" or "s"; or a constant, "c", as 32 bits or as an integer;
    or a word of the assembler, "w"."""

    text: str
    file: str
    first: int = 0
    count: int = 0
    value: int = 0
    negative: bool = False
    absolute: bool = False
    sign_extended: bool = False

    @property
    def registers(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Instruction:
    text: str
    name: str  # with _e32 and the like
    operands: tuple[Operand, ...] = ()
    modifiers: dict[str, str] = field(default_factory=dict)
    target: int = -1  # the index that a branch goes to

    @cached_property
    def base(self) -> str:
        return _SUFFIX.sub("", self.name)


@dataclass(frozen=True)
class Argument:
    """Where an argument lies among the kernel's arguments, in bytes."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and what the hardware is told of it."""

    name: str
    instructions: Sequence[Instruction]
    start: int  # past the loads for firmware that does not preload arguments
    arguments: list[Argument]
    num_warps: int
    lds_bytes: int
    directives: dict[str, int]
    vector_registers: int
    accumulators: int

    def directive(self, name: str) -> int:
        return self.directives[f".amdhsa_{name}"]


def parse_operand(text: str) -> Operand:
    """Raises ValueError for what is neither a register nor a constant."""
    rest = text
    sign_extended = rest.startswith("sext(")
    if sign_extended:
        rest = rest[len("sext(") : -1]
    negative = rest.startswith("-") and not rest[1].isdigit()
    if negative:
        rest = rest[1:]
    absolute = rest.startswith("|")
    if absolute:
        rest = rest.strip("|")
    signs = dict(negative=negative, absolute=absolute, sign_extended=sign_extended)
    if match := _REGISTER.fullmatch(rest):
        first = int(match[2] or match[3])
        count = int(match[4]) - first + 1 if match[4] else 1
        if match[1] == "a":
            first += ACCUMULATORS
        return Operand(text, "s" if match[1] == "s" else "v", first, count, **signs)
    if rest in _NAMED:
        return Operand(text, "s", *_NAMED[rest], **signs)
    if rest.startswith("0.15915494"):
        return Operand(text, "c", value=_ONE_OVER_TWO_PI)
    if re.fullmatch(r"-?\d+\.\d+", rest):
        value = struct.unpack("<I", struct.pack("<f", float(rest)))[0]
        return Operand(text, "c", value=value)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", rest):
        return Operand(text, "c", value=int(rest, 0), **signs)
    if rest == "off" or rest.startswith("."):
        return Operand(text, "w")
    raise ValueError(f"operand {text!r}: expected a register, a constant or a label")


def parse_instruction(text: str) -> Instruction:
    """One line without its comment."""
    text = " ".join(text.split())
    name, _, rest = text.partition(" ")
    if name == "s_waitcnt":
        return Instruction(
            text, name, modifiers=dict(re.findall(r"(\w+)\((\d+)\)", rest))
        )
    modifiers = {}
    for match in _MODIFIER.finditer(" " + rest):
        modifiers[match[1] or match[3]] = match[2] or "1"
    words = _MODIFIER.sub("", " " + rest).split(",")
    operands = tuple(parse_operand(word.strip()) for word in words if word.strip())
    return Instruction(text, name, operands, modifiers)


def parse_kernel(asm: str, num_warps: int, lds_bytes: int) -> Kernel:
    """The kernel of a text, with the warps and the dynamic LDS of its launch."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    entries = []
    directives = {}
    for line in asm.splitlines():
        line = re.sub(r"\s*(;|//).*", "", line).rstrip()
        if match := re.fullmatch(r"([.\w$]+):", line):
            labels[match[1]] = len(instructions)
        elif re.match(r"\t(s|v|ds|global|buffer|flat|scratch)_", line):
            instructions.append(parse_instruction(line))
        elif re.match(r"\t\.p2align\s+8", line):
            entries.append(len(instructions))
        elif match := re.match(r"\t\t(\.amdhsa_\w+) (\d+)$", line):
            directives[match[1]] = int(match[2])
    for i, instruction in enumerate(instructions):
        if "branch" in instruction.name:
            target = labels[instruction.operands[0].text]
            instructions[i] = Instruction(
                instruction.text, instruction.name, target=target
            )
    metadata = asm[asm.index(".amdgpu_metadata") :]
    arguments = re.findall(
        r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", metadata
    )

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", metadata)
        assert match, name
        return int(match[1])

    name = re.search(r"\.amdhsa_kernel (\S+)", asm)
    assert name
    accumulators = number("agpr_count")
    return Kernel(
        name[1],
        instructions,
        entries[1] if len(entries) > 1 else 0,
        [Argument(int(a), int(b), kind) for a, b, kind in arguments],
        num_warps,
        lds_bytes,
        directives,
        number("vgpr_count"),
        accumulators,
    )
