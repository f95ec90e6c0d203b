# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The INT8 fused MoE's two products for many tokens, in Gluon, for Hopper.

Triton waits for the tensor cores after every step over K if the sums are integers: its
pipeliner lets products overlap only where they are float32. Gluon, Triton's lower
level, leaves it to the kernel. Here some warps copy tiles to shared memory, as far
ahead as its `STAGES` buffers allow, and others multiply, of which one product is always
on its way. Programs stay and take tiles in turn, so that the copies for the next tile
run while results are written. With two groups of warps that multiply, each takes every
other tile, so that one multiplies while the other writes results.

Tiles, arguments and results are those of `w13_kernel` and `w2_kernel` in
product_kernels.py, to the bit.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Warps that gather tokens, and registers of each of their threads; one warp is enough
# to ask for tiles that lie together.
GATHER_WARPS = gl.constexpr(4)
GATHER_REGISTERS = gl.constexpr(56)
COPY_WARPS = gl.constexpr(1)
COPY_REGISTERS = gl.constexpr(24)
# Of the second group of warps that multiplies; the first has what is left.
GROUP_REGISTERS = gl.constexpr(224)


class _Layout(gl.NVMMASharedLayout):
    """A layout whose text is made once: Triton asks for it at each launch."""

    def __init__(self, layout: gl.NVMMASharedLayout) -> None:
        self.__dict__.update(layout.__dict__, text=repr(layout))

    def __repr__(self) -> str:
        return self.text


class _Descriptor(TensorDescriptor):
    """A descriptor that is not checked at each launch.

    `tensors.check` has looked at the layer's shapes; the driver refuses an address that
    is no multiple of 16.
    """

    def __post_init__(self) -> None:
        pass


@functools.cache
def _layout(block_rows: int, block_size_k: int) -> _Layout:
    box = [block_rows, block_size_k]
    return _Layout(gl.NVMMASharedLayout.get_default_for(box, gl.int8))


def make_tma_descriptor(
    matrix: torch.Tensor, block_rows: int, block_size_k: int
) -> TensorDescriptor:
    """Of an int8 matrix, in boxes of block_rows by block_size_k as the kernels want
    them in shared memory."""
    layout = _layout(block_rows, block_size_k)
    box = [block_rows, block_size_k]
    return _Descriptor(matrix, matrix.shape, matrix.stride(), box, layout)


@gluon.jit
def _wait_for_inputs(PDL: gl.constexpr):
    """`int8_triton.wait_for_inputs`, for Gluon."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@gluon.jit
def _buffers(
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_W: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """Buffers of both operands, and barriers: a buffer is full, or may be filled, or a
    group may multiply.

    ARRIVALS make a buffer full, beside the bytes that they announce.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [BLOCK_SIZE_M, BLOCK_SIZE_K], gl.int8
    )
    a = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_SIZE_M, BLOCK_SIZE_K], layout)
    w = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_SIZE_W, BLOCK_SIZE_K], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(free.index(i), count=1)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(ready.index(group), count=1)
    return a, w, full, free, ready


@gluon.constexpr_function
def _sums_layout(columns: int, num_warps: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, min(columns, 128), 32]
    )


@gluon.jit
def _multiply(
    buffers,
    turn,
    size_k,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_W: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    GATHERED: gl.constexpr,
):
    """The sums, [BLOCK_SIZE_M, BLOCK_SIZE_W] int32, of the program's tile `turn`.

    A buffer is free again when the product that reads it has ended, one step later.

    Two groups take tiles in turn. A group begins when the other one has asked for its
    last product, since buffers are filled in the order of tiles. It must not look at
    them before: a barrier tells an even number of fillings from an odd one, no more.
    """
    a, w, full, free, ready = buffers
    sums = gl.zeros(
        [BLOCK_SIZE_M, BLOCK_SIZE_W], gl.int32, _sums_layout(BLOCK_SIZE_W, NUM_WARPS)
    )
    step = turn * gl.cdiv(size_k, BLOCK_SIZE_K)
    if GROUPS == 2:
        # The first group's first wait is for the phase before the first: it has ended.
        mbarrier.wait(ready.index(GROUP), turn // 2 + 1 + GROUP & 1)
    for k in range(0, size_k, BLOCK_SIZE_K):
        buffer = step % STAGES
        mbarrier.wait(full.index(buffer), step // STAGES & 1)
        if GATHERED:
            fence_async_shared()
        w_tile = w.index(buffer).permute((1, 0))
        sums = warpgroup_mma(a.index(buffer), w_tile, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if GROUPS == 2:
        mbarrier.arrive(ready.index(1 - GROUP))
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
    return sums


@gluon.jit
def _tile_of(turn, num_n, num_tiles):
    """The tile of a turn; of one beyond the last, some tile that lies in memory."""
    return gl.maximum(gl.minimum(turn // num_n, num_tiles - 1), 0)


@gluon.jit
def _pairs_of(
    tile,
    sorted_pairs_ptr,
    num_pairs,
    BLOCK_SIZE_M: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A tile's rows and pairs, [BLOCK_SIZE_M], as the first dimension of LAYOUT."""
    rows = tile * BLOCK_SIZE_M + gl.arange(0, BLOCK_SIZE_M, gl.SliceLayout(1, LAYOUT))
    pairs = gl.load(sorted_pairs_ptr + rows)
    return rows, pairs, pairs < num_pairs


@gluon.jit
def _along_a(values):
    return gl.expand_dims(values, 1)


@gluon.jit
def _along_w(values):
    return gl.expand_dims(values, 0)


@gluon.jit
def _w_scale(w_scale_ptr, expert, first_row, w_rows, mask, PER_CHANNEL: gl.constexpr):
    """The scales of an expert's w_rows; its own first row is first_row."""
    if PER_CHANNEL:
        w_scale = gl.load(w_scale_ptr + first_row + w_rows, mask=mask, other=0.0)
    else:
        w_scale = gl.load(w_scale_ptr + expert + w_rows * 0)
    return w_scale


@gluon.jit
def _scale(
    sums,
    a_scale,
    w_scale,
    bias_ptr,
    first_row,
    w_rows,
    mask,
    HAS_BIAS: gl.constexpr,
):
    """Sums times a_scale [BLOCK_SIZE_M] and the weights' scales, and the bias."""
    x = sums.to(gl.float32) * (_along_a(a_scale) * _along_w(w_scale))
    if HAS_BIAS:
        bias = gl.load(bias_ptr + first_row + w_rows, mask=mask, other=0.0)
        x += _along_w(bias.to(gl.float32))
    return x


@gluon.constexpr_function
def _quads(rows: int, columns: int, num_warps: int) -> gl.DistributedLinearLayout:
    """Of a tile: four threads have the columns that they have in `_sums_layout`, but
    each has eight on end, 16 bytes."""
    in_thread = [[0, 1], [0, 2], [0, 4], [8, 0]]
    in_thread += [[0, column] for column in (32, 64, 128) if column < columns]
    in_thread += [[row, 0] for row in (32, 64) if 16 * num_warps <= row < rows]
    in_warp = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    warps = [[row, 0] for row in (16, 32, 64) if row < 16 * num_warps]
    return gl.DistributedLinearLayout(in_thread, in_warp, warps, [], [rows, columns])


@gluon.jit
def _halves(x, M: gl.constexpr, N: gl.constexpr):
    """x [M, N] as its first and its last columns."""
    return x.reshape([M, 2, N // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _copy_w13(
    xq_ptr,
    w13,
    buffers,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles,
    num_pairs,
    size_n,
    size_k,
    topk,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    a, w, full, free, _ = buffers
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [GATHER_WARPS, 1], [1, 0])
    k = gl.arange(0, BLOCK_SIZE_K, gl.SliceLayout(0, layout))
    num_n = gl.cdiv(size_n, BLOCK_SIZE_N)
    step = 0
    tile = _tile_of(gl.program_id(0), num_n, num_tiles)
    next_expert = gl.load(tile_experts_ptr + tile)
    _, next_pairs, next_is_pair = _pairs_of(
        tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, layout
    )
    for i in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        row = next_expert * 2 * size_n + i % num_n * BLOCK_SIZE_N
        pairs = next_pairs
        is_pair = next_is_pair
        # The next tile's are asked for before they are needed.
        tile = _tile_of(i + gl.num_programs(0), num_n, num_tiles)
        next_expert = gl.load(tile_experts_ptr + tile)
        _, next_pairs, next_is_pair = _pairs_of(
            tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, layout
        )
        tokens = (pairs // topk).to(gl.int64)
        xq_ptrs = xq_ptr + _along_a(tokens * size_k) + _along_w(k)
        for k0 in range(0, size_k, BLOCK_SIZE_K):
            buffer = step % STAGES
            mbarrier.wait(free.index(buffer), step // STAGES & 1 ^ 1)
            bar = full.index(buffer)
            mbarrier.expect(bar, 2 * w13.block_type.nbytes)
            gate = w.index(buffer).slice(0, BLOCK_SIZE_N)
            up = w.index(buffer).slice(BLOCK_SIZE_N, BLOCK_SIZE_N)
            tma.async_copy_global_to_shared(w13, [row, k0], bar, gate)
            tma.async_copy_global_to_shared(w13, [row + size_n, k0], bar, up)
            mask = _along_a(is_pair) & _along_w(k < size_k - k0)
            async_copy.async_copy_global_to_shared(a.index(buffer), xq_ptrs + k0, mask)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1


@gluon.jit
def _multiply_w13(
    GROUP: gl.constexpr,
    buffers,
    x_scale_ptr,
    w13_scale_ptr,
    bias_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles,
    h_ptr,
    num_pairs,
    size_n,
    size_k,
    topk,
    GROUPS: gl.constexpr,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SWIGLUSTEP_LIMIT: gl.constexpr,
):
    layout: gl.constexpr = _sums_layout(2 * BLOCK_SIZE_N, NUM_WARPS)
    wide: gl.constexpr = _quads(BLOCK_SIZE_M, BLOCK_SIZE_N, NUM_WARPS)
    num_n = gl.cdiv(size_n, BLOCK_SIZE_N)
    turn = GROUP
    first = gl.program_id(0) + GROUP * gl.num_programs(0)
    for i in range(first, num_tiles * num_n, GROUPS * gl.num_programs(0)):
        tile = i // num_n
        n0 = i % num_n * BLOCK_SIZE_N
        # What sums are multiplied by is asked for before it is needed.
        expert = gl.load(tile_experts_ptr + tile).to(gl.int64)
        _, pairs, is_pair = _pairs_of(
            tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, layout
        )
        x_scale = gl.load(x_scale_ptr + pairs // topk, mask=is_pair, other=0.0)
        n = gl.arange(0, 2 * BLOCK_SIZE_N, gl.SliceLayout(0, layout))
        w_rows = n0 + n % BLOCK_SIZE_N + n // BLOCK_SIZE_N * size_n
        in_n = n0 + n % BLOCK_SIZE_N < size_n
        first_row = expert * 2 * size_n
        w_scale = _w_scale(w13_scale_ptr, expert, first_row, w_rows, in_n, PER_CHANNEL)
        rows, _, is_row = _pairs_of(
            tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, wide
        )
        sums = _multiply(
            buffers,
            turn,
            size_k,
            GROUP,
            GROUPS,
            BLOCK_SIZE_M,
            2 * BLOCK_SIZE_N,
            BLOCK_SIZE_K,
            STAGES,
            NUM_WARPS,
            True,
        )
        turn += GROUPS
        both = _scale(
            sums,
            x_scale,
            w_scale,
            bias_ptr,
            first_row,
            w_rows,
            in_n,
            HAS_BIAS,
        )
        gate, up = _halves(both, BLOCK_SIZE_M, 2 * BLOCK_SIZE_N)
        gate = gate / (1.0 + gl.exp(-gate))
        if SWIGLUSTEP_LIMIT is not None:
            gate = gl.minimum(gate, SWIGLUSTEP_LIMIT)
            up = gl.minimum(gl.maximum(up, -SWIGLUSTEP_LIMIT), SWIGLUSTEP_LIMIT)
        h = (gate * up).to(h_ptr.dtype.element_ty)
        h = gl.convert_layout(h, wide)
        n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, wide))
        h_ptrs = h_ptr + _along_a(rows.to(gl.int64) * size_n) + _along_w(n)
        gl.store(h_ptrs, h, mask=_along_a(is_row) & _along_w(n < size_n))


@gluon.jit(do_not_specialize=["num_pairs", "topk"])
def w13_kernel(
    xq_ptr,
    x_scale_ptr,
    w13,
    w13_scale_ptr,
    bias_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    h_ptr,
    num_pairs,
    size_n,
    size_k,
    topk,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    GROUPS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SWIGLUSTEP_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
):
    """`product_kernels.w13_kernel`; w13 is a TMA descriptor, BLOCK_SIZE_N rows a box.

    NUM_WARPS multiply, or two GROUPS of so many; GATHER_WARPS copy. Each of STAGES
    buffers holds BLOCK_SIZE_M + 2 BLOCK_SIZE_N rows of BLOCK_SIZE_K bytes, and a thread
    BLOCK_SIZE_M BLOCK_SIZE_N / (16 NUM_WARPS) sums.
    """
    _wait_for_inputs(PDL)
    buffers = _buffers(
        BLOCK_SIZE_M, 2 * BLOCK_SIZE_N, BLOCK_SIZE_K, STAGES, 1 + 32 * GATHER_WARPS
    )
    num_tiles = gl.load(num_tiles_ptr)
    # Arguments are written out each time: in a tuple of a name of its own Gluon makes
    # tensors of what is constexpr, and takes no None.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _multiply_w13,
                    (
                        0,
                        buffers,
                        x_scale_ptr,
                        w13_scale_ptr,
                        bias_ptr,
                        sorted_pairs_ptr,
                        tile_experts_ptr,
                        num_tiles,
                        h_ptr,
                        num_pairs,
                        size_n,
                        size_k,
                        topk,
                        GROUPS,
                        BLOCK_SIZE_M,
                        BLOCK_SIZE_N,
                        BLOCK_SIZE_K,
                        STAGES,
                        NUM_WARPS,
                        PER_CHANNEL,
                        HAS_BIAS,
                        SWIGLUSTEP_LIMIT,
                    ),
                ),
                (
                    _multiply_w13,
                    (
                        1,
                        buffers,
                        x_scale_ptr,
                        w13_scale_ptr,
                        bias_ptr,
                        sorted_pairs_ptr,
                        tile_experts_ptr,
                        num_tiles,
                        h_ptr,
                        num_pairs,
                        size_n,
                        size_k,
                        topk,
                        GROUPS,
                        BLOCK_SIZE_M,
                        BLOCK_SIZE_N,
                        BLOCK_SIZE_K,
                        STAGES,
                        NUM_WARPS,
                        PER_CHANNEL,
                        HAS_BIAS,
                        SWIGLUSTEP_LIMIT,
                    ),
                ),
                (
                    _copy_w13,
                    (
                        xq_ptr,
                        w13,
                        buffers,
                        sorted_pairs_ptr,
                        tile_experts_ptr,
                        num_tiles,
                        num_pairs,
                        size_n,
                        size_k,
                        topk,
                        BLOCK_SIZE_M,
                        BLOCK_SIZE_N,
                        BLOCK_SIZE_K,
                        STAGES,
                    ),
                ),
            ],
            [NUM_WARPS, GATHER_WARPS],
            [GROUP_REGISTERS, GATHER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply_w13,
                    (
                        0,
                        buffers,
                        x_scale_ptr,
                        w13_scale_ptr,
                        bias_ptr,
                        sorted_pairs_ptr,
                        tile_experts_ptr,
                        num_tiles,
                        h_ptr,
                        num_pairs,
                        size_n,
                        size_k,
                        topk,
                        GROUPS,
                        BLOCK_SIZE_M,
                        BLOCK_SIZE_N,
                        BLOCK_SIZE_K,
                        STAGES,
                        NUM_WARPS,
                        PER_CHANNEL,
                        HAS_BIAS,
                        SWIGLUSTEP_LIMIT,
                    ),
                ),
                (
                    _copy_w13,
                    (
                        xq_ptr,
                        w13,
                        buffers,
                        sorted_pairs_ptr,
                        tile_experts_ptr,
                        num_tiles,
                        num_pairs,
                        size_n,
                        size_k,
                        topk,
                        BLOCK_SIZE_M,
                        BLOCK_SIZE_N,
                        BLOCK_SIZE_K,
                        STAGES,
                    ),
                ),
            ],
            [GATHER_WARPS],
            [GATHER_REGISTERS],
        )


@gluon.jit
def _copy_w2(
    hq,
    w2,
    buffers,
    tile_experts_ptr,
    num_tiles,
    size_n,
    size_k,
    first_n,
    end_n,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    a, w, full, free, _ = buffers
    num_n = gl.cdiv(end_n - first_n, BLOCK_SIZE_N)
    step = 0
    tile = _tile_of(gl.program_id(0), num_n, num_tiles)
    next_expert = gl.load(tile_experts_ptr + tile)
    for i in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        a_row = i // num_n * BLOCK_SIZE_M
        row = next_expert * size_n + first_n + i % num_n * BLOCK_SIZE_N
        # The next tile's is asked for before it is needed.
        tile = _tile_of(i + gl.num_programs(0), num_n, num_tiles)
        next_expert = gl.load(tile_experts_ptr + tile)
        for k0 in range(0, size_k, BLOCK_SIZE_K):
            buffer = step % STAGES
            mbarrier.wait(free.index(buffer), step // STAGES & 1 ^ 1)
            bar = full.index(buffer)
            mbarrier.expect(bar, hq.block_type.nbytes + w2.block_type.nbytes)
            tma.async_copy_global_to_shared(hq, [a_row, k0], bar, a.index(buffer))
            tma.async_copy_global_to_shared(w2, [row, k0], bar, w.index(buffer))
            step += 1


@gluon.jit
def _multiply_w2(
    GROUP: gl.constexpr,
    buffers,
    h_scale_ptr,
    w2_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles,
    y_ptr,
    num_pairs,
    size_n,
    size_k,
    first_n,
    end_n,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    APPLY_ROUTER_WEIGHT: gl.constexpr,
):
    layout: gl.constexpr = _sums_layout(BLOCK_SIZE_N, NUM_WARPS)
    wide: gl.constexpr = _quads(BLOCK_SIZE_M, BLOCK_SIZE_N, NUM_WARPS)
    num_n = gl.cdiv(end_n - first_n, BLOCK_SIZE_N)
    turn = GROUP
    first = gl.program_id(0) + GROUP * gl.num_programs(0)
    for i in range(first, num_tiles * num_n, 2 * gl.num_programs(0)):
        tile = i // num_n
        n0 = first_n + i % num_n * BLOCK_SIZE_N
        expert = gl.load(tile_experts_ptr + tile).to(gl.int64)
        rows, pairs, is_pair = _pairs_of(
            tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, layout
        )
        h_scale = gl.load(h_scale_ptr + rows, mask=is_pair, other=0.0)
        weight = h_scale
        if APPLY_ROUTER_WEIGHT:
            weight = gl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
            weight = weight.to(gl.float32)
        n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, layout))
        w_scale = _w_scale(
            w2_scale_ptr, expert, expert * size_n, n, n < size_n, PER_CHANNEL
        )
        _, pairs, is_row = _pairs_of(
            tile, sorted_pairs_ptr, num_pairs, BLOCK_SIZE_M, wide
        )
        sums = _multiply(
            buffers,
            turn,
            size_k,
            GROUP,
            2,
            BLOCK_SIZE_M,
            BLOCK_SIZE_N,
            BLOCK_SIZE_K,
            STAGES,
            NUM_WARPS,
            False,
        )
        turn += 2
        y = _scale(
            sums,
            h_scale,
            w_scale,
            bias_ptr,
            expert * size_n,
            n,
            n < size_n,
            HAS_BIAS,
        )
        if APPLY_ROUTER_WEIGHT:
            y *= _along_a(weight)
        y = y.to(y_ptr.dtype.element_ty)
        y_rows = y_ptr + _along_a(pairs.to(gl.int64) * (end_n - first_n))
        y = gl.convert_layout(y, wide)
        n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, wide))
        mask = _along_a(is_row) & _along_w(n < end_n)
        gl.store(y_rows + _along_w(n - first_n), y, mask=mask)


@gluon.jit(do_not_specialize=["num_pairs"])
def w2_kernel(
    hq,
    h_scale_ptr,
    w2,
    w2_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    y_ptr,
    num_pairs,
    size_n,
    size_k,
    first_n,
    end_n,
    BLOCK_SIZE_M: gl.constexpr,
    BLOCK_SIZE_N: gl.constexpr,
    BLOCK_SIZE_K: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    APPLY_ROUTER_WEIGHT: gl.constexpr,
    PDL: gl.constexpr,
):
    """`product_kernels.w2_kernel`; hq and w2 are TMA descriptors, BLOCK_SIZE_M and
    BLOCK_SIZE_N rows.

    Two groups of NUM_WARPS multiply, COPY_WARPS copy. Each of STAGES buffers holds
    BLOCK_SIZE_M + BLOCK_SIZE_N rows of BLOCK_SIZE_K bytes, and a thread
    BLOCK_SIZE_M BLOCK_SIZE_N / (32 NUM_WARPS) sums.
    """
    _wait_for_inputs(PDL)
    buffers = _buffers(BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, STAGES, 1)
    num_tiles = gl.load(num_tiles_ptr)
    gl.warp_specialize(
        [
            (
                _multiply_w2,
                (
                    0,
                    buffers,
                    h_scale_ptr,
                    w2_scale_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    sorted_pairs_ptr,
                    tile_experts_ptr,
                    num_tiles,
                    y_ptr,
                    num_pairs,
                    size_n,
                    size_k,
                    first_n,
                    end_n,
                    BLOCK_SIZE_M,
                    BLOCK_SIZE_N,
                    BLOCK_SIZE_K,
                    STAGES,
                    NUM_WARPS,
                    PER_CHANNEL,
                    HAS_BIAS,
                    APPLY_ROUTER_WEIGHT,
                ),
            ),
            (
                _multiply_w2,
                (
                    1,
                    buffers,
                    h_scale_ptr,
                    w2_scale_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    sorted_pairs_ptr,
                    tile_experts_ptr,
                    num_tiles,
                    y_ptr,
                    num_pairs,
                    size_n,
                    size_k,
                    first_n,
                    end_n,
                    BLOCK_SIZE_M,
                    BLOCK_SIZE_N,
                    BLOCK_SIZE_K,
                    STAGES,
                    NUM_WARPS,
                    PER_CHANNEL,
                    HAS_BIAS,
                    APPLY_ROUTER_WEIGHT,
                ),
            ),
            (
                _copy_w2,
                (
                    hq,
                    w2,
                    buffers,
                    tile_experts_ptr,
                    num_tiles,
                    size_n,
                    size_k,
                    first_n,
                    end_n,
                    BLOCK_SIZE_M,
                    BLOCK_SIZE_N,
                    BLOCK_SIZE_K,
                    STAGES,
                ),
            ),
        ],
        [NUM_WARPS, COPY_WARPS],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )
