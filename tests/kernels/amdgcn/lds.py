# SPDX-License-Identifier: Apache-2.0
"""LDS, the memory that a workgroup shares, and the instructions of it.

Between two barriers no wave may read or write what another writes, but for writing the
same value: Triton lets several lanes write copies of a value. What a wave has not
waited for at a barrier, with s_waitcnt, may happen after it.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from tests.kernels.amdgcn.arithmetic import u32
from tests.kernels.amdgcn.checks import Checks
from tests.kernels.amdgcn.code import Instruction
from tests.kernels.amdgcn.waves import LANE, LANES, Fault, Waves, bits32

Run = Callable[[], None]
_ACCESS = re.compile(r"ds_(read|write)(2?)(st64)?_([bui])(\d+)(_d16_hi)?")
_NOBODY, _SEVERAL = -1, -2
BANKS = 32


class Lds:
    """A part of it for each group, of whole words."""

    def __init__(self, w: Waves, checks: Checks, num_bytes: int, grain: int) -> None:
        self.w, self.checks = w, checks
        self.num_bytes, self.grain = num_bytes, grain
        self.stride = -(-num_bytes // 4) * 4
        self.measure = False  # count clocks
        self.clocks = self.moved_bytes = 0

    def start(self, rng: np.random.Generator) -> None:
        size = max(self.stride * self.w.num // self.w.per_group, 4)
        self.octets = rng.integers(0, 256, size, dtype=np.uint8)
        self.words = self.octets.view(u32)
        self.epoch = np.zeros(self.w.num, np.int64)  # barriers that a wave has passed
        # Accesses that waves have not yet waited for: how, where, by whom, the ticket.
        self.open: list[tuple[str, ndarray, ndarray, ndarray]] = []
        # When each grain was last read, written and added to, and by whom.
        grains = size // self.grain
        self.last = {
            how: (np.full(grains, -1), np.full(grains, _NOBODY))
            for how in ("read", "write", "add")
        }

    def at(
        self, address: ndarray, size: int, how: str, text: str, words: list[ndarray]
    ) -> ndarray:
        """Offsets of the lanes that are on, checked. words: what they write."""
        w = self.w
        address = np.broadcast_to(address, w.mask.shape)
        chosen = address[w.mask]
        if not chosen.size:
            return chosen
        if chosen.min() < 0 or chosen.max() + size > self.num_bytes:
            raise Fault(
                f"{text}: address {chosen.max()} of {size} bytes; the group has "
                f"{self.num_bytes} bytes of LDS"
            )
        if (chosen & min(size, 4) - 1).any():
            raise Fault(f"{text}: an address is no multiple of {min(size, 4)}")
        if self.measure:
            self.count(address, size)
        wave = np.broadcast_to(np.arange(w.num)[:, None], w.mask.shape)[w.mask]
        offset = chosen + w.group[wave] * self.stride
        self.check(offset, wave, size, how, text, words)
        return offset

    def check(
        self,
        offset: ndarray,
        wave: ndarray,
        size: int,
        how: str,
        text: str,
        words: list[ndarray],
    ) -> None:
        for j in range(0, size, self.grain):
            grain = (offset + j) // self.grain
            clash = self.of_another("write", grain, wave)
            if words and clash.any():
                clash &= self.differs(offset, range(j, j + self.grain), words)
            if how != "add":
                clash |= self.of_another("add", grain, wave)
            if how != "read":
                clash |= self.of_another("read", grain, wave)
            if clash.any():
                raise Fault(f"{text}: a race in LDS between two barriers ({how})")
            self.mark(how, grain, wave)
            self.open.append((how, grain, wave, self.checks.lds_asked[wave] + 1))

    def differs(self, offset: ndarray, part: range, words: list[ndarray]) -> ndarray:
        """Where bytes of words are not what LDS holds already."""
        found = np.zeros(offset.shape, bool)
        for k in part:
            octet = (words[k // 4] >> u32(8 * (k % 4))).astype(np.uint8)
            found |= self.octets[offset + k] != octet
        return found

    def of_another(self, how: str, grain: ndarray, wave: ndarray) -> ndarray:
        """Which grains another wave has accessed since the last barrier."""
        when, who = self.last[how]
        return (when[grain] == self.epoch[wave]) & (who[grain] != wave)

    def mark(self, how: str, grain: ndarray, wave: ndarray) -> None:
        when, who = self.last[how]
        others = self.of_another(how, grain, wave)
        when[grain] = self.epoch[wave]
        who[grain] = np.where(others, _SEVERAL, wave)
        if how == "read":  # two waves in this very instruction
            who[grain[who[grain] != wave]] = _SEVERAL

    def pass_barrier(self, waiting: ndarray) -> None:
        """The waves that wait go on."""
        self.epoch[waiting] += 1
        accesses, self.open = self.open, []
        for how, grain, wave, ticket in accesses:
            late = ticket > self.checks.lds_done[wave]
            if late.any():
                grain, wave = grain[late], wave[late]
                self.mark(how, grain, wave)
                self.open.append((how, grain, wave, ticket[late]))

    def count(self, address: ndarray, size: int) -> None:
        """Clocks of an access: neighbouring lanes ask for as many bytes at once as
        there are banks for; a bank gives one word a clock."""
        together = LANES * 4 // size // 2 if size >= 4 else LANES // 2
        together = max(together, 1)
        for wave in np.flatnonzero(self.w.mask.any(axis=1)):
            lanes, on = address[wave], self.w.mask[wave]
            self.moved_bytes += int(on.sum()) * size
            for first in range(0, LANES, together):
                part = (
                    lanes[first : first + together][on[first : first + together]] >> 2
                )
                if part.size:
                    width = np.arange(max(size // 4, 1))
                    words = np.unique(part[:, None] + width)
                    self.clocks += int(np.bincount(words % BANKS).max())


def grain_of(instructions: Sequence[Instruction]) -> int:
    """The fewest bytes that an instruction reads or writes at a time, at most four."""
    sizes = [int(m[5]) // 8 for i in instructions if (m := _ACCESS.fullmatch(i.name))]
    return min([*sizes, 4])


def compile_lds(w: Waves, lds: Lds, checks: Checks, inst: Instruction) -> Run | None:
    """What an instruction does; None if it is not one of these."""
    if inst.name == "ds_bpermute_b32":
        return _permute(w, checks, inst)
    if inst.name == "ds_swizzle_b32":
        return _swizzle(w, checks, inst)
    if inst.name == "ds_add_u32":
        return _add(w, lds, checks, inst)
    if not (match := _ACCESS.fullmatch(inst.name)):
        return None
    size = int(match[5]) // 8
    if match[2]:
        unit = size * (64 if match[3] else 1)
        offsets = [int(inst.modifiers.get(f"offset{i}", 0)) * unit for i in range(2)]
    else:
        offsets = [int(inst.modifiers.get("offset", "0"), 0)]
    if set(inst.modifiers) - {"offset", "offset0", "offset1"} or match[4] == "i":
        raise Fault(f"{inst.text}: this form is not known to the machine")
    if match[1] == "read":
        if match[6]:
            return None
        return _read(w, lds, checks, inst, size, offsets)
    shift = 16 if match[6] else 0
    return _write(w, lds, checks, inst, size, offsets, shift)


def _read(
    w: Waves, lds: Lds, checks: Checks, inst: Instruction, size: int, offsets: list[int]
) -> Run:
    to = inst.operands[0].first
    get = bits32(w, inst.operands[1])
    count = max(size // 4, 1)
    registers = range(to, to + count * len(offsets))

    def run() -> None:
        base = get().astype(np.int64)
        found = []
        for offset in offsets:
            at = lds.at(base + offset, size, "read", inst.text, [])
            for j in range(count):
                word = np.zeros(w.mask.shape, u32)
                if size >= 4:
                    word[w.mask] = lds.words[(at >> 2) + j]
                else:
                    for k in range(size):
                        word[w.mask] |= lds.octets[at + k].astype(u32) << u32(8 * k)
                found.append(word)
        for register, word in zip(registers, found, strict=True):
            w.put(register, word)
        checks.issue_lds(registers)

    return run


def _write(
    w: Waves,
    lds: Lds,
    checks: Checks,
    inst: Instruction,
    size: int,
    offsets: list[int],
    shift: int,
) -> Run:
    get = bits32(w, inst.operands[0])
    data = [operand.first for operand in inst.operands[1:]]

    def run() -> None:
        base = get().astype(np.int64)
        for offset, first in zip(offsets, data, strict=True):
            count = max(size // 4, 1)
            words = [w.V[first + j][w.mask] >> u32(shift) for j in range(count)]
            at = lds.at(base + offset, size, "write", inst.text, words)
            for j, word in enumerate(words):
                if size >= 4:
                    lds.words[(at >> 2) + j] = word
                    same = lds.words[(at >> 2) + j] == word
                else:
                    same = np.True_
                    for k in range(size):
                        octet = (word >> u32(8 * k)).astype(np.uint8)
                        lds.octets[at + k] = octet
                        same &= lds.octets[at + k] == octet
                if not np.all(same):
                    raise Fault(f"{inst.text}: lanes write several values to a place")
        checks.issue_lds(range(0))

    return run


def _add(w: Waves, lds: Lds, checks: Checks, inst: Instruction) -> Run:
    get, data = bits32(w, inst.operands[0]), inst.operands[1].first
    offset = int(inst.modifiers.get("offset", "0"), 0)

    def run() -> None:
        at = lds.at(get().astype(np.int64) + offset, 4, "add", inst.text, [])
        np.add.at(lds.words, at >> 2, w.V[data][w.mask])
        checks.issue_lds(range(0))

    return run


def _permute(w: Waves, checks: Checks, inst: Instruction) -> Run:
    """Each lane reads a register of the lane that a byte address names; 0 if it is
    off."""
    to = inst.operands[0].first
    get, data = bits32(w, inst.operands[1]), bits32(w, inst.operands[2])
    offset = u32(int(inst.modifiers.get("offset", "0"), 0))

    def run() -> None:
        lane = (get() + offset >> u32(2) & u32(LANES - 1)).astype(np.int64)
        values = np.where(w.lanes, data(), u32(0))
        w.put(to, np.take_along_axis(values, np.broadcast_to(lane, values.shape), 1))
        checks.issue_lds(range(to, to + 1))

    return run


def _swizzle(w: Waves, checks: Checks, inst: Instruction) -> Run:
    to, data = inst.operands[0].first, bits32(w, inst.operands[1])
    match = re.fullmatch(r"swizzle\(SWAP,(\d+)\)", inst.modifiers.get("offset", ""))
    if not match:
        raise Fault(f"{inst.text}: this swizzle is not known to the machine")
    lane = LANE ^ int(match[1])

    def run() -> None:
        w.put(to, np.where(w.lanes, data(), u32(0))[:, lane])
        checks.issue_lds(range(to, to + 1))

    return run
