# SPDX-License-Identifier: Apache-2.0
"""Instructions of memory, LDS and matrices in the machine, against bytes and whole
numbers of Python; and what its checks find. Documents: test_instructions.py."""

import random

import numpy as np
import pytest
import torch

from tests.kernels.amdgcn import reference as r
from tests.kernels.amdgcn.code import parse_instruction
from tests.kernels.amdgcn.machine import knows
from tests.kernels.amdgcn.program import FULL, Program
from tests.kernels.amdgcn.reference import MASK, as_float, signed
from tests.kernels.amdgcn.waves import Fault

LANES = range(64)
SIZES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
WAIT = "s_waitcnt vmcnt(0) lgkmcnt(0)"


@pytest.fixture
def dice(rng: torch.Generator) -> random.Random:
    return random.Random(rng.initial_seed())


def tensor(program: Program, data: bytes) -> tuple[np.ndarray, int]:
    """A tensor, and its address."""
    array = np.frombuffer(bytearray(data), np.uint8)
    return array, program.memory.add("a tensor", array)


def span(first: int, size: int) -> str:
    count = max(size // 4, 1)
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def words(data: bytes, count: int) -> list[int]:
    return [
        int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(max(count, 1))
    ]


def at_places(program: Program, form: str, address: int, offsets: list[int]) -> None:
    """Registers that name addresses: vector registers 0 and 1, scalar ones from 4."""
    if form == "vector":
        at = [address + offset for offset in offsets]
        program.vector(0, [a & MASK for a in at], [a >> 32 for a in at])
        return
    program.vector(0, offsets).scalar64(4, address)
    if form == "buffer":
        program.scalar(6, 1 << 31, 0x27000)


@pytest.mark.parametrize("form", ["vector", "scalar", "buffer"])
@pytest.mark.parametrize("size", SIZES)
def test_loads_and_stores(form: str, size: str, dice: random.Random) -> None:
    """global_ and buffer_, each width, with an offset; lanes that are off change
    nothing."""
    count = SIZES[size]
    data = span(10, count)
    kind, offset = ("buffer", 32) if form == "buffer" else ("global", -32)
    unsigned = "u" if count < 4 else ""
    operands = {
        "vector": (f"{data}, v[0:1], off", f"v[0:1], {data}, off"),
        "scalar": (f"{data}, v0, s[4:5]", f"v0, {data}, s[4:5]"),
        "buffer": (f"{data}, v0, s[4:7], 0 offen",) * 2,
    }[form]
    for mask in (FULL, dice.getrandbits(64), 0):
        places = [64 + 20 * i for i in dice.sample(LANES, 64)]
        octets = bytes(dice.getrandbits(8) for _ in range(64 + 20 * 64))
        load = Program(f"{kind}_load_{unsigned}{size} {operands[0]} offset:{offset}")
        store = Program(f"{kind}_store_{size} {operands[1]} offset:{offset}")
        array, address = tensor(load, octets)
        store.memory.add("a tensor", array)
        old = [[dice.getrandbits(32) for _ in LANES] for _ in range(4)]
        for program in (load, store):
            at_places(program, form, address, [place - offset for place in places])
            program.vector(10, *old).exec(mask).run()
            if program is load:
                assert array.tobytes() == octets
        expected = bytearray(octets)
        for i in LANES:
            if mask >> i & 1:
                found = words(octets[places[i] : places[i] + count], count // 4)
                value = b"".join(old[k][i].to_bytes(4, "little") for k in range(4))
                expected[places[i] : places[i] + count] = value[:count]
            else:
                found = [old[k][i] for k in range(max(count // 4, 1))]
            assert [load.lanes(10 + k)[i] for k in range(len(found))] == found
        assert array.tobytes() == bytes(expected)


@pytest.mark.parametrize(
    "text",
    [
        "global_store_short_d16_hi v[0:1], v10, off offset:6",
        "global_store_byte_d16_hi v[0:1], v10, off offset:6",
    ],
)
def test_stores_of_the_high_half(text: str, dice: random.Random) -> None:
    size = 2 if "short" in text else 1
    program = Program(text)
    array, address = tensor(program, bytes(6 + 4 * 64))
    places = [4 * i for i in dice.sample(LANES, 64)]
    values = [dice.getrandbits(32) for _ in LANES]
    mask = dice.getrandbits(64)
    at_places(program, "vector", address, places)
    program.vector(10, values).exec(mask).run()
    expected = bytearray(6 + 4 * 64)
    for i in LANES:
        if mask >> i & 1:
            at = places[i] + 6
            expected[at : at + size] = values[i].to_bytes(4, "little")[2 : 2 + size]
    assert array.tobytes() == bytes(expected)


def test_beyond_the_records_of_a_buffer() -> None:
    """Loads give 0 and stores are dropped: so Triton masks lanes."""
    data = np.arange(8, dtype=np.uint32)
    offsets = [0, 4, 24, 28, 32, 0x80000000, 0xFFFFFFFC] + [0] * 57
    program = Program("buffer_load_dword v1, v0, s[4:7], 0 offen", WAIT)
    address = program.memory.add("a tensor", data.view(np.uint8))
    program.vector(0, offsets).vector(1, 9)
    program.scalar(4, address & MASK, address >> 32, 28, 0x27000).run()
    assert program.lanes(1)[:7] == [0, 1, 6, 0, 0, 0, 0]
    program = Program("buffer_store_dword v1, v0, s[4:7], 0 offen", WAIT)
    program.memory.add("a tensor", data.view(np.uint8))
    program.vector(0, [28, 32, 0x80000000] + [0] * 61).vector(1, 77)
    program.scalar(4, address & MASK, address >> 32, 28, 0x27000).run()
    assert data.tolist() == [77, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_scalar_loads(count: int, dice: random.Random) -> None:
    data = bytes(dice.getrandbits(8) for _ in range(128))
    name = "s_load_dword" + (f"x{count}" if count > 1 else "")
    to = "s8" if count == 1 else f"s[8:{7 + count}]"
    program = Program(f"{name} {to}, s[4:5], 0x1c", WAIT)
    _, address = tensor(program, data)
    program.scalar64(4, address).run()
    assert [program.number(8 + i) for i in range(count)] == words(data[0x1C:], count)


LDS_READS = {
    "ds_read_u16 v10, v0 offset:6": [(6, 2)],
    "ds_read_b32 v10, v0": [(0, 4)],
    "ds_read_b64 v[10:11], v0 offset:8": [(8, 8)],
    "ds_read_b96 v[10:12], v0 offset:16": [(16, 12)],
    "ds_read_b128 v[10:13], v0 offset:32": [(32, 16)],
    "ds_read2_b32 v[10:11], v0 offset1:8": [(0, 4), (32, 4)],
    "ds_read2_b64 v[10:13], v0 offset0:1 offset1:4": [(8, 8), (32, 8)],
    "ds_read2st64_b32 v[10:11], v0 offset0:1 offset1:4": [(256, 4), (1024, 4)],
    "ds_read2st64_b64 v[10:13], v0 offset1:2": [(0, 8), (1024, 8)],
}
LDS_WRITES = {
    "ds_write_b8 v0, v10 offset:3": [(3, 1, 10)],
    "ds_write_b16 v0, v10": [(0, 2, 10)],
    "ds_write_b16_d16_hi v0, v10 offset:8": [(8, 2, 10)],
    "ds_write_b32 v0, v10 offset:4": [(4, 4, 10)],
    "ds_write_b64 v0, v[10:11]": [(0, 8, 10)],
    "ds_write_b128 v0, v[10:13] offset:16": [(16, 16, 10)],
    "ds_write2_b32 v0, v10, v11 offset1:2": [(0, 4, 10), (8, 4, 11)],
    "ds_write2st64_b32 v0, v10, v11 offset1:16": [(0, 4, 10), (4096, 4, 11)],
    "ds_write2st64_b64 v0, v[10:11], v[12:13] offset1:8": [(0, 8, 10), (4096, 8, 12)],
}


@pytest.mark.parametrize("text", LDS_READS)
def test_lds_reads(text: str, dice: random.Random) -> None:
    mask = dice.getrandbits(64)
    program = Program(text, WAIT, lds_bytes=8192)
    data = bytes(dice.getrandbits(8) for _ in range(8192))
    program.lds.octets[:] = np.frombuffer(data, np.uint8)
    places = [32 * i for i in dice.sample(LANES, 64)]
    program.vector(0, places).vector(10, 1, 2, 3, 4).exec(mask).run()
    for i in LANES:
        found = [program.lanes(10 + k)[i] for k in range(4)]
        expected = [1, 2, 3, 4]
        if mask >> i & 1:
            read = []
            for offset, size in LDS_READS[text]:
                start = places[i] + offset
                read += words(data[start : start + size], size // 4)
            expected[: len(read)] = read
        assert found == expected


@pytest.mark.parametrize("text", LDS_WRITES)
def test_lds_writes(text: str, dice: random.Random) -> None:
    mask = dice.getrandbits(64)
    program = Program(text, lds_bytes=8192)
    expected = bytearray(program.lds.octets.tobytes())
    places = [40 * i for i in dice.sample(LANES, 64)]
    values = [[dice.getrandbits(32) for _ in LANES] for _ in range(4)]
    program.vector(0, places).vector(10, *values).exec(mask).run()
    for i in LANES:
        if not mask >> i & 1:
            continue
        octets = b"".join(values[k][i].to_bytes(4, "little") for k in range(4))
        for offset, size, register in LDS_WRITES[text]:
            first = 4 * (register - 10) + 2 * ("d16_hi" in text)
            start = places[i] + offset
            expected[start : start + size] = octets[first : first + size]
    assert program.lds.octets.tobytes() == bytes(expected)


def test_lds_adds(dice: random.Random) -> None:
    program = Program("ds_add_u32 v0, v1 offset:4", lds_bytes=64)
    program.lds.words[:] = 0xFFFFFFF0
    places = [4 * dice.randrange(8) for _ in LANES]
    values = [dice.getrandbits(32) for _ in LANES]
    program.vector(0, places, values).run()
    for n in range(8):
        mine = sum(v for v, p in zip(values, places, strict=True) if p == 4 * n)
        assert int(program.lds.words[n + 1]) == mine + 0xFFFFFFF0 & MASK


def test_lanes_through_lds(dice: random.Random) -> None:
    """ds_bpermute_b32, in place too, and ds_swizzle_b32; a lane that is off gives 0."""
    mask = dice.getrandbits(64)
    x, d = ([dice.getrandbits(32) for _ in LANES] for _ in range(2))
    places = [dice.getrandbits(10) for _ in LANES]
    for to in (2, 1):
        program = Program(f"ds_bpermute_b32 v{to}, v0, v1 offset:8", WAIT)
        program.vector(0, places, x, d).exec(mask).run()
        for i in LANES:
            lane = (places[i] + 8) // 4 % 64
            wanted = (
                (x[lane] if mask >> lane & 1 else 0)
                if mask >> i & 1
                else (d[i] if to == 2 else x[i])
            )
            assert program.lanes(to)[i] == wanted
    for n in (16, 1):
        program = Program(f"ds_swizzle_b32 v2, v1 offset:swizzle(SWAP,{n})", WAIT)
        program.vector(1, x, d).run()
        assert program.lanes(2) == [x[i ^ n] for i in LANES]


@pytest.mark.parametrize(
    ("name", "size", "depth", "kind"),
    [
        ("v_mfma_i32_16x16x32_i8", 16, 32, "i8"),
        ("v_mfma_i32_32x32x16_i8", 32, 16, "i8"),
        ("v_mfma_f32_32x32x8_bf16", 32, 8, "bf16"),
        ("v_mfma_f32_16x16x16_f16", 16, 16, "f16"),
        # Of gfx950, whose lanes hold twice as many numbers.
        ("v_mfma_i32_16x16x64_i8", 16, 64, "i8"),
        ("v_mfma_i32_32x32x32_i8", 32, 32, "i8"),
        ("v_mfma_f32_32x32x16_bf16", 32, 16, "bf16"),
    ],
)
@pytest.mark.parametrize("adds", [False, True], ids=["", "adds"])
def test_matrices(
    name: str, size: int, depth: int, kind: str, adds: bool, dice: random.Random
) -> None:
    """Element by element, where AMD's calculator says that they are: A[i][k] and
    B[k][j] in lane size (k / n) + i, the n numbers of a lane in order; D[i][j] in
    register i % 4 + 4 (i / 8) of lane 32 (i / 4 % 2) + j, or of 16 rows in register
    i % 4 of lane 16 (i / 4) + j. exec means nothing."""
    each = depth * size // 64
    width = 8 if kind == "i8" else 16
    count = each * width // 32
    limit = 1 << width
    a, b = (
        [[dice.randrange(limit) for _ in range(depth)] for _ in range(size)]
        for _ in "ab"
    )
    if kind != "i8":  # small whole numbers: float32 sums are exact
        to_bits = r.to_bfloat16 if kind == "bf16" else r.to_float16
        a, b = (
            [[to_bits(r.bits(float(v % 31 - 15))) for v in row] for row in m]
            for m in (a, b)
        )
    program = Program(
        f"{name} v[32:{31 + size * size // 64}], v[0:{count - 1}], "
        f"v[8:{7 + count}], {f'v[32:{31 + size * size // 64}]' if adds else '0'}"
    )
    for first, matrix in ((0, a), (8, b)):
        for register in range(count):
            lanes = []
            for lane in LANES:
                word = 0
                for part in range(32 // width):
                    k = lane // size * each + register * (32 // width) + part
                    word |= matrix[lane % size][k] << part * width
                lanes.append(word)
            program.vector(first + register, lanes)
    old = [[dice.getrandbits(20) for _ in range(size)] for _ in range(size)]

    def place(i: int, j: int) -> tuple[int, int]:
        if size == 16:
            return i % 4, 16 * (i // 4) + j
        return i % 4 + 4 * (i // 8), 32 * (i // 4 % 2) + j

    for i in range(size):
        for j in range(size):
            register, lane = place(i, j)
            value = old[i][j] if kind == "i8" else r.bits(float(old[i][j]))
            program.w.V[32 + register, 0, lane] = value
    program.all_defined().exec(dice.getrandbits(64)).run()

    def whole(x: int) -> int:
        if kind == "i8":
            return signed(x, 8)
        return int(as_float(x << 16) if kind == "bf16" else r.as_half(x))

    a, b = ([[whole(v) for v in row] for row in m] for m in (a, b))
    for i in range(size):
        for j in range(size):
            register, lane = place(i, j)
            total = sum(x * y for x, y in zip(a[i], b[j], strict=True))
            total += old[i][j] if adds else 0
            found = program.lanes(32 + register)[lane]
            assert (signed(found) if kind == "i8" else as_float(found)) == total


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["ds_read_b32 v2, v0", "v_mov_b32_e32 v3, v2"], "no s_waitcnt lgkmcnt"),
        (["ds_read_b32 v2, v0", "v_mov_b32_e32 v2, v1"], "no s_waitcnt lgkmcnt"),
        (
            ["ds_read_b32 v2, v0", "ds_read_b32 v3, v0", "s_waitcnt lgkmcnt(1)"]
            + ["v_mov_b32_e32 v4, v3"],
            "no s_waitcnt lgkmcnt",
        ),
        (
            ["s_load_dword s8, s[4:5], 0x0", "s_load_dword s9, s[4:5], 0x4"]
            + ["s_waitcnt lgkmcnt(1)", "s_mov_b32 s10, s8"],
            "for a scalar load",
        ),
        (
            ["global_load_dword v2, v0, s[4:5]", "v_mov_b32_e32 v3, v2"],
            "no s_waitcnt vmcnt",
        ),
        (["global_load_dword v2, v0, s[4:5] offset:4"], "lie in no tensor"),
        (["global_store_dword v0, v1, s[4:5] offset:-4"], "lie in no tensor"),
        (["ds_read_b32 v2, v0 offset:64"], "has 256 bytes of LDS"),
        (["ds_read_b32 v2, v3 offset:2"], "no multiple of 4"),
        (["v_mov_b32_e32 v2, v9"], "nothing has written v9"),
        (["s_mov_b32 s2, s9"], "nothing has written s9"),
        (["v_cndmask_b32_e64 v2, v0, v1, s[8:9]"], "nothing has written s8"),
        (
            ["global_load_dword v2, v0, s[4:5]", WAIT]
            + ["global_store_dword v0, v1, s[4:5]"],
            "which this launch loads",
        ),
        (["global_store_dword v3, v0, s[4:5]"], "two values for a byte"),
        (["ds_write_b32 v3, v0"], "several values to a place"),
    ],
)
def test_faults(lines: list[str], found: str) -> None:
    with pytest.raises(Fault, match=found):
        faulty(lines).run()


def faulty(lines: list[str]) -> Program:
    program = Program(*lines, lds_bytes=256)
    array, address = tensor(program, bytes(256))
    program.vector(0, [4 * i for i in LANES], 7).vector(3, 0).scalar64(4, address)
    program.array = array  # type: ignore[attr-defined]  # kept alive
    return program


@pytest.mark.parametrize(
    "lines",
    [
        ["ds_write_b32 v0, v1", "s_waitcnt lgkmcnt(0)", "s_barrier"],
        ["ds_read_b32 v2, v0", "s_waitcnt lgkmcnt(0)", "v_mov_b32_e32 v3, v2"],
        ["ds_read_b32 v2, v0", "ds_read_b32 v3, v0", "s_waitcnt lgkmcnt(1)"]
        + ["v_mov_b32_e32 v4, v2"],
        ["global_load_dword v2, v0, s[4:5]", "global_load_dword v3, v0, s[4:5]"]
        + ["s_waitcnt vmcnt(1)", "v_mov_b32_e32 v3, v2"][:1],
        # Only the lower half of the sum is used.
        ["v_mad_u64_u32 v[4:5], s[8:9], v0, v1, v[8:9]"],
        ["global_store_dword v3, v1, s[4:5]"],
        ["ds_write_b32 v3, v1"],
    ],
)
def test_what_is_right_is_no_fault(lines: list[str]) -> None:
    program = faulty(lines)
    program.machine.checks.vector_defined[8] = True
    program.run()


def two_waves(*lines: str) -> Program:
    """v0 is the place of a lane in LDS, v1 that of the same lane of the other wave."""
    program = Program(*lines, num_warps=2, lds_bytes=512)
    own = np.arange(128).reshape(2, 64) * 4
    return program.vector(0, own, own[::-1], own + 1000)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ds_write_b32 v0, v2", "ds_read_b32 v3, v1"),
        ("ds_read_b32 v3, v1", "ds_write_b32 v0, v2"),
        ("ds_write_b32 v0, v2", "ds_write_b32 v1, v2"),
        ("ds_write_b32 v0, v2", "ds_add_u32 v1, v2"),
        ("ds_add_u32 v0, v2", "ds_read_b32 v3, v1"),
    ],
)
def test_a_race_in_lds(first: str, second: str) -> None:
    between = ["s_waitcnt lgkmcnt(0)", "s_barrier"]
    with pytest.raises(Fault, match="a race in LDS"):
        two_waves(first, second).run()
    two_waves(first, *between, second).run()
    # Not all of what went before has happened at the barrier.
    more = [first, "ds_bpermute_b32 v4, v1, v2"]
    two_waves(*more, "s_waitcnt lgkmcnt(1)", "s_barrier", second).run()
    with pytest.raises(Fault, match="a race in LDS"):
        two_waves(*more, "s_waitcnt lgkmcnt(2)", "s_barrier", second).run()


def test_several_waves_may_write_one_value() -> None:
    """In bytes too, as where a kernel has an access of one."""
    for size in ("b32", "b8"):
        program = two_waves(f"ds_write_{size} v0, v2", f"ds_write_{size} v1, v2")
        program.machine.options.order = "backward"
        program.vector(2, 7).run()


def test_several_waves_may_add_and_read() -> None:
    two_waves("ds_add_u32 v0, v2", "ds_add_u32 v1, v2").run()
    two_waves("ds_read_b32 v3, v0", "ds_read_b32 v4, v1").run()


def test_an_instruction_that_is_not_known_is_named() -> None:
    with pytest.raises(Fault, match="v_sin_f32_e32 is not known to the machine"):
        Program("v_sin_f32_e32 v0, v1").run()
    assert not knows(parse_instruction("v_add_f32_e64 v0, v1, v2 mul:2"))
    assert not knows(
        parse_instruction("v_mfma_i32_16x16x32_i8 v[0:3], v[0:1], v[0:1], 0 cbsz:1")
    )


@pytest.mark.parametrize("order", ["together", "forward", "backward"])
def test_order_of_waves(order: str) -> None:
    """Each wave runs to the barrier, none beyond it before the others."""
    program = two_waves(
        "ds_write_b32 v0, v2",
        "s_waitcnt lgkmcnt(0)",
        "s_barrier",
        "ds_read_b32 v3, v1",
        "s_waitcnt lgkmcnt(0)",
    )
    program.machine.options.order = order  # type: ignore[assignment]
    program.run()
    for wave in range(2):
        assert program.lanes(3, wave) == program.lanes(2, 1 - wave)
