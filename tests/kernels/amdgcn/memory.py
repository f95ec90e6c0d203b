# SPDX-License-Identifier: Apache-2.0
"""Global memory: tensors at their addresses, and the instructions that reach them.

An access outside of all tensors that a launch was given is a fault. So is one that
may depend on an order: a load of what the launch stores, and a second value for a byte.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.arithmetic import u32, u64
from tests.kernels.amdgcn.checks import Checks
from tests.kernels.amdgcn.code import Instruction
from tests.kernels.amdgcn.waves import Fault, Waves, bits32, bits64

SIZES = {
    "ubyte": 1,
    "byte": 1,
    "ushort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
    "dwordx8": 32,
    "dwordx16": 64,
}
# Which caches keep a line says nothing of values.
CACHES = {"sc0", "sc1", "nt"}


@dataclass
class Tensor:
    """Bytes at an address."""

    name: str
    start: int
    octets: ndarray
    end: int = 0
    words: ndarray = field(default_factory=lambda: np.zeros(0, u32))
    loaded_bytes: int = 0
    stored_bytes: int = 0
    stored: ndarray | None = None  # which bytes a launch has stored

    def __post_init__(self) -> None:
        self.end = self.start + self.octets.size
        self.words = self.octets[: self.octets.size // 4 * 4].view(u32)


class Memory:
    """Tensors, which are changed in place."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.tensors: list[Tensor] = []

    def add(self, name: str, array: ndarray) -> int:
        """Bytes, uint8 [n], that lie at their address, which is returned."""
        address = array.__array_interface__["data"][0]
        if not any(
            t.start == address and t.end >= address + array.size for t in self.tensors
        ):
            self.tensors.append(Tensor(name, address, array))
        return address

    def _find(self, low: int, high: int) -> Tensor | None:
        """The tensor that holds all bytes from low to high."""
        for tensor in self.tensors:
            if tensor.start <= low and high <= tensor.end:
                return tensor
        return None

    def _split(
        self, address: ndarray, mask: ndarray, size: int, text: str
    ) -> Iterator[tuple[Tensor, ndarray, ndarray]]:
        """Of each tensor that lanes reach, the lanes and their offsets."""
        left = mask
        while (wanted := address[left]).size:
            low, high = int(wanted.min()), int(wanted.max()) + size
            tensor = self._find(low, high)
            if tensor is not None:
                yield tensor, left, (wanted - u64(tensor.start)).astype(np.int64)
                return
            tensor = self._find(low, low + size)
            if tensor is None:
                raise self._outside(low, size, text)
            here = left & (address >= u64(tensor.start))
            here &= address + u64(size) <= u64(tensor.end)
            yield tensor, here, (address[here] - u64(tensor.start)).astype(np.int64)
            left = left & ~here

    def _outside(self, address: int, size: int, text: str) -> Fault:
        near = min(
            self.tensors,
            key=lambda t: min(abs(t.start - address), abs(t.end - address)),
            default=None,
        )
        message = f"{text}: {size} bytes at {address:#x} lie in no tensor"
        if near is not None:
            offset = address - near.start
            message += (
                f"; the next is {near.name}, {near.octets.size} bytes, offset {offset}"
            )
        return Fault(message)

    def load(
        self, address: ndarray, mask: ndarray, size: int, text: str
    ) -> list[ndarray]:
        """Words [waves, lanes] that lie at addresses; 0 in lanes that are off."""
        words = [np.zeros(address.shape, u32) for _ in range(max(size // 4, 1))]
        for tensor, lanes, offset in self._split(address, mask, size, text):
            if tensor.stored is not None:
                raise Fault(
                    f"{text}: loads from {tensor.name}, which this launch stores"
                )
            tensor.loaded_bytes += offset.size * size
            if size >= 4 and not (offset & 3).any():
                offset = offset >> 2
                for j, word in enumerate(words):
                    word[lanes] = tensor.words[offset + j]
                continue
            if size < 4 and (offset & size - 1).any():
                raise Fault(f"{text}: an address is no multiple of {size}")
            for j in range(size):
                octet = tensor.octets[offset + j].astype(u32)
                words[j // 4][lanes] |= octet << u32(8 * (j % 4))
        return words

    def store(
        self,
        address: ndarray,
        mask: ndarray,
        words: list[ndarray],
        size: int,
        text: str,
    ) -> None:
        """Words [waves, lanes] to addresses."""
        for tensor, lanes, offset in self._split(address, mask, size, text):
            if tensor.loaded_bytes:
                raise Fault(f"{text}: stores to {tensor.name}, which this launch loads")
            if tensor.stored is None:
                tensor.stored = np.zeros(tensor.octets.size, bool)
            tensor.stored_bytes += offset.size * size
            for j in range(size):
                octet = (words[j // 4][lanes] >> u32(8 * (j % 4))).astype(np.uint8)
                at = offset + j
                clash = tensor.stored[at] & (tensor.octets[at] != octet)
                tensor.octets[at] = octet
                if clash.any() or (tensor.octets[at] != octet).any():
                    raise Fault(f"{text}: two values for a byte of {tensor.name}")
                tensor.stored[at] = True


def compile_memory(
    w: Waves, memory: Memory, checks: Checks, inst: Instruction
) -> Callable[[], None] | None:
    """What an instruction does; None if it is not one of these."""
    if match := re.fullmatch(r"s_load_(dword\w*)", inst.name):
        return _scalar_load(w, memory, checks, inst, SIZES[match[1]])
    match = re.fullmatch(
        r"(global|buffer)_(load|store)_([a-z]+(?:x\d+)?)(_d16_hi)?", inst.name
    )
    if not match or match[3] not in SIZES or (match[4] and match[2] == "load"):
        return None
    first_bit = u32(16 if match[4] else 0)  # of a register that is stored
    size = SIZES[match[3]]
    if match[1] == "global":
        data, address = _global_address(w, inst, match[2] == "load")
        in_range = None
    else:
        data, (address, in_range) = (
            inst.operands[0].first,
            _buffer_address(w, inst, size),
        )
    registers = range(data, data + max(size // 4, 1))
    text = inst.text

    def lanes() -> tuple[ndarray, ndarray]:
        at = np.broadcast_to(address(), w.mask.shape)
        return at, w.mask if in_range is None else w.mask & in_range()

    def load() -> None:
        # Beyond the records of a buffer 0 is loaded.
        at, mask = lanes()
        for register, word in zip(
            registers, memory.load(at, mask, size, text), strict=True
        ):
            w.put(register, word)
        checks.issue_vector(registers)

    def store() -> None:
        at, mask = lanes()
        words = [w.V[register] >> first_bit for register in registers]
        memory.store(at, mask, words, size, text)
        checks.issue_vector(range(0))

    return load if match[2] == "load" else store


def _scalar_load(
    w: Waves, memory: Memory, checks: Checks, inst: Instruction, size: int
) -> Callable[[], None]:
    to = inst.operands[0].first
    base = bits64(w, inst.operands[1], scalar=True)
    offset = u64(inst.operands[2].value)
    if inst.operands[2].file != "c":
        raise Fault(f"{inst.text}: an offset in a register is not known to the machine")
    registers = range(to, to + size // 4)

    def run() -> None:
        address = np.broadcast_to(base() + offset, (w.num,))[:, None]
        words = memory.load(address, w.active[:, None], size, inst.text)
        for register, word in zip(registers, words, strict=True):
            w.put_scalar(register, word[:, 0])
        checks.issue_scalar(registers)

    return run


def _offset(inst: Instruction) -> int:
    return int(inst.modifiers.get("offset", "0"), 0)


def _global_address(
    w: Waves, inst: Instruction, is_load: bool
) -> tuple[int, Callable[[], ndarray]]:
    if set(inst.modifiers) - {"offset"} - CACHES:
        raise Fault(f"{inst.text}: this form is not known to the machine")
    data, vector, scalar = inst.operands
    if not is_load:
        data, vector = vector, data
    offset = u64(_offset(inst) & 0xFFFFFFFFFFFFFFFF)
    if scalar.text == "off":
        base = bits64(w, vector)
        return data.first, lambda: base() + offset
    base, added = bits64(w, scalar), bits32(w, vector)
    return data.first, lambda: base() + offset + added()


def _buffer_address(
    w: Waves, inst: Instruction, size: int
) -> tuple[Callable[[], ndarray], Callable[[], ndarray]]:
    """Addresses, and whether they lie in the buffer: its records are bytes."""
    modifiers = set(inst.modifiers)
    _, vector, resource, scalar = inst.operands
    if "offen" not in modifiers or modifiers - {"offen", "offset"} - CACHES:
        raise Fault(f"{inst.text}: this form is not known to the machine")
    if scalar.file != "c" or scalar.value != 0:
        raise Fault(f"{inst.text}: a scalar offset is not known to the machine")
    get, offset, first = bits32(w, vector), u64(_offset(inst)), resource.first

    def address() -> ndarray:
        high = w.S[first + 1]
        if (high[w.active] >> u32(16) & u32(0x3FFF)).any():
            raise Fault(
                f"{inst.text}: a buffer with a stride is not known to the machine"
            )
        base = w.S[first].astype(u64) | (high & u32(0xFFFF)).astype(u64) << u64(32)
        return base[:, None] + (get().astype(u64) + offset)

    def in_range() -> ndarray:
        end = get().astype(u64) + offset + u64(size)
        return end <= w.S[first + 2].astype(u64)[:, None]

    return address, in_range
