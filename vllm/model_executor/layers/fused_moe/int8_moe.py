# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) fused MoE in Triton: the layer, a registered torch op."""

import functools
from typing import Any

import torch
import vllm.envs as envs
from vllm.model_executor.kernels.int8_triton import (
    has_dot4,
    is_hopper,
    launch,
    num_sms,
)
from vllm.model_executor.layers.fused_moe import int8_moe_kernels as kernels
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.int8_moe_configs import (
    Architecture,
    Config,
    FewConfig,
    Product,
    choose_config,
    choose_few_config,
    get_architecture,
)
from vllm.triton_utils import triton
from vllm.utils.torch_utils import direct_register_custom_op

# The only limit of swiglustep that upstream's fused MoE knows.
SWIGLUSTEP_LIMIT = 7.0
ACTIVATIONS = (MoEActivation.SILU, MoEActivation.SWIGLUSTEP)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the hidden size and the width: int8 in whole vectors of 16 bytes.
_SIZES_STEP = 16

# Pairs that one program of the sorting kernels places, and up to how many pairs each
# program looks at all of them.
_PART = 256
_MOST_PAIRS = 4096

# What pairs' outputs may take before their sum: 4096 tokens of top 8, hidden size 4096.
# Each part reads the int8 pairs again, and takes whole tiles.
_PART_BYTES = 256 << 20
_PART_COLUMNS = 512


def serves(moe: FusedMoEConfig) -> bool:
    """Whether the engine applies these INT8 experts with the kernels of this module."""
    return why_not(moe) is None


def why_not(moe: FusedMoEConfig) -> str | None:
    """Why the engine leaves these INT8 experts to upstream's kernel; None where it does
    not: on Hopper, where the kernels were measured, unless the user asks for others, or
    the kernels do not know the layer."""
    if not is_hopper():
        return "this is no Hopper GPU"
    if moe.moe_backend != "auto":
        return f"--moe-backend is {moe.moe_backend}"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and their tiles depend on the batch"
    if not _has_gluon():
        return "this Triton has no Gluon that they can be written in"
    if moe.activation not in ACTIVATIONS or not moe.is_act_and_mul:
        gated = "" if moe.is_act_and_mul else " without gates"
        return f"they do not know the activation {moe.activation.value}{gated}"
    if moe.in_dtype not in DTYPES:
        return f"they do not know the dtype {moe.in_dtype}"
    hidden_size, width = moe.hidden_dim, moe.intermediate_size_per_partition
    if not _knows_sizes(hidden_size, width):
        return (
            f"the hidden size {hidden_size} and a rank's width {width} are not both "
            f"multiples of {_SIZES_STEP}"
        )
    return None


# torch.compile would look into the import.
@torch.compiler.assume_constant_result
def _has_gluon() -> bool:
    return _import_hopper()


@functools.cache
def _import_hopper() -> bool:
    try:
        _hopper()
    # Gluon is experimental: names come and go.
    except (ImportError, AttributeError):
        return False
    return True


def _knows_sizes(hidden_size: int, width: int) -> bool:
    return hidden_size % _SIZES_STEP == 0 and width % _SIZES_STEP == 0


def int8_fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    quant_config: FusedMoEQuantConfig,
) -> torch.Tensor:
    """Apply INT8 experts: upstream's `fused_experts` for W8A8.

    Integer products are exact. All between them is float32, but the intermediate, each
    pair's output and the result are rounded to the dtype of `hidden_states`. Values are
    quantized as x * (127 / max(abs(x))), rounded once, halves to even.

    Args:
        hidden_states: [M, K], one of `DTYPES`.
        w13: [E, 2N, K] int8, the gate projection above the up projection. N and K are
            multiples of 16.
        w2: [E, K, N] int8.
        topk_weights: [M, topk], float.
        topk_ids: [M, topk], integer: experts of the model if there is an `expert_map`,
            else of this rank. An id that is no expert adds nothing.
        activation: one of `ACTIVATIONS`.
        apply_router_weight_on_input: weight the first product, not the second.
        expert_map: id in the model to id on this rank, -1 where it is absent.
        quant_config: `w1_scale` and `w2_scale` per channel, [E, 2N, 1] and [E, K, 1],
            or per tensor, [E]; `a1_scale` and `a2_scale` a scalar for static
            activations, None for dynamic per-token ones, whatever the weights' scales;
            `w1_bias`, [E, 2N], and `w2_bias`, [E, K], or None.

    Returns:
        [M, K] like `hidden_states`.

    Raises:
        ValueError: a shape, dtype or activation that the kernels do not know.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"INT8 experts know the activations "
            f"{', '.join(a.value for a in ACTIVATIONS)}, not {activation.value}: "
            "choose upstream's kernel with --moe-backend triton."
        )
    assert quant_config.w1_scale is not None and quant_config.w2_scale is not None
    _check(hidden_states, w13, w2, topk_ids, quant_config)
    return torch.ops.vllm.int8_fused_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation.value,
        apply_router_weight_on_input,
        expert_map,
        quant_config.w1_scale,
        quant_config.w2_scale,
        quant_config.a1_scale,
        quant_config.a2_scale,
        quant_config.w1_bias,
        quant_config.w2_bias,
    )


def _check(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    quant_config: FusedMoEQuantConfig,
) -> None:
    num_experts, hidden_size, width = w2.shape

    def expect(name: str, found: object, expected: object) -> None:
        if found != expected:
            raise ValueError(
                f"INT8 experts: {name} is {found}, expected {expected}; w2 is "
                f"{list(w2.shape)}."
            )

    expect("w13's shape", list(w13.shape), [num_experts, 2 * width, hidden_size])
    expect("hidden_states' last dimension", hidden_states.shape[-1], hidden_size)
    expect("topk_ids' first dimension", topk_ids.shape[0], hidden_states.shape[0])
    for name, tensor in (("w13", w13), ("w2", w2)):
        expect(f"{name}'s dtype", tensor.dtype, torch.int8)
        expect(f"{name} contiguous", tensor.is_contiguous(), True)
    if hidden_states.dtype not in DTYPES:
        expect(
            "hidden_states' dtype", hidden_states.dtype, " or ".join(map(str, DTYPES))
        )
    if not _knows_sizes(hidden_size, width):
        expect("sizes", [hidden_size, width], f"multiples of {_SIZES_STEP}")
    for name, scale, channels in (
        ("w1_scale", quant_config.w1_scale, 2 * width),
        ("w2_scale", quant_config.w2_scale, hidden_size),
    ):
        assert scale is not None
        if scale.numel() not in (num_experts, num_experts * channels):
            expect(name, list(scale.shape), f"[{num_experts}, {channels}, 1] or [E]")
    for name, scale in (
        ("a1_scale", quant_config.a1_scale),
        ("a2_scale", quant_config.a2_scale),
    ):
        if scale is not None and scale.numel() != 1:
            expect(name, list(scale.shape), "a scalar")


def _int8_fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens, topk = topk_ids.shape
    if num_tokens == 0 or topk == 0:
        return torch.zeros_like(hidden_states)
    num_ids = w13.shape[0] if expert_map is None else expert_map.numel()
    config = choose(get_architecture(), num_tokens, topk, num_ids, *w2.shape)
    swiglustep = activation == MoEActivation.SWIGLUSTEP.value
    return run_int8_experts(
        config,
        hidden_states.contiguous(),
        w13,
        w2,
        topk_weights.contiguous(),
        topk_ids.contiguous(),
        SWIGLUSTEP_LIMIT if swiglustep else None,
        apply_router_weight_on_input,
        expert_map,
        w13_scale,
        w2_scale,
        a13_scale,
        a2_scale,
        w13_bias,
        w2_bias,
    )


def choose(
    architecture: Architecture,
    num_tokens: int,
    topk: int,
    num_ids: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
) -> Config | FewConfig:
    """The tiles for num_tokens tokens; the other numbers are the layer's, num_experts
    and intermediate_size this rank's."""
    return choose_few_config(
        architecture, num_tokens, topk, num_ids, intermediate_size, hidden_size
    ) or choose_config(
        architecture, num_tokens * topk, num_ids, num_experts, intermediate_size
    )


def pairs_to_sort_at_once(num_pairs: int) -> int:
    """What each program that sorts looks at, all pairs and room for more; 0 where there
    are too many of them."""
    if num_pairs > _MOST_PAIRS:
        return 0
    return max(triton.next_power_of_2(num_pairs), 128)


def run_int8_experts(
    config: Config | FewConfig,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    swiglustep_limit: float | None,
    weigh_input: bool,
    expert_map: torch.Tensor | None,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The layer with the given tiles; arguments as in `int8_fused_experts`.

    Launches kernels and allocates by shape alone, so that it can be captured in a CUDA
    graph.
    """
    num_tokens, hidden_size = x.shape
    num_experts, _, width = w2.shape
    topk = topk_ids.shape[1]
    num_ids = num_experts if expert_map is None else expert_map.numel()
    routing = (topk_ids, expert_map)
    has_map = expert_map is not None
    first: dict[str, Any] = dict(
        PER_CHANNEL=w13_scale.numel() != num_experts,
        HAS_BIAS=w13_bias is not None,
        WEIGH=weigh_input,
        SWIGLUSTEP_LIMIT=swiglustep_limit,
    )
    second: dict[str, Any] = dict(
        PER_CHANNEL=w2_scale.numel() != num_experts,
        HAS_BIAS=w2_bias is not None,
        WEIGH=not weigh_input,
    )

    if isinstance(config, FewConfig):
        out = torch.empty_like(x)
        few: dict[str, Any] = dict(HAS_EXPERT_MAP=has_map, DOT4=has_dot4(x))
        h = x.new_empty((num_tokens * topk, width))
        programs = triton.cdiv(width, config.w13_block_n)
        if config.w13_programs:
            most = config.w13_programs * num_sms(x) // (num_tokens * topk)
            programs = min(programs, max(1, most))
        launch(
            kernels.w13_few_kernel,
            (programs, num_tokens * topk),
            config.pdl,
            x,
            a13_scale,
            w13.view(torch.int32),
            w13_scale,
            w13_bias,
            topk_weights,
            *routing,
            h,
            num_ids,
            width,
            hidden_size,
            topk,
            BLOCK_N=config.w13_block_n,
            BLOCK_K=triton.next_power_of_2(hidden_size // 4),
            STATIC_X=a13_scale is not None,
            TURNS=programs * config.w13_block_n < width,
            STAGES=config.w13_stages,
            num_warps=config.w13_num_warps,
            **first,
            **few,
        )
        programs = triton.cdiv(hidden_size, config.w2_block_n)
        if config.w2_programs:
            most = config.w2_programs * num_sms(x) // num_tokens
            programs = min(programs, max(1, most))
        launch(
            kernels.w2_few_kernel,
            (programs, num_tokens),
            config.pdl,
            h,
            a2_scale,
            w2.view(torch.int32),
            w2_scale,
            w2_bias,
            topk_weights,
            *routing,
            out,
            num_ids,
            hidden_size,
            width,
            topk,
            TOPK=triton.next_power_of_2(topk),
            BLOCK_N=config.w2_block_n,
            BLOCK_K=triton.next_power_of_2(width // 4),
            STATIC_H=a2_scale is not None,
            STAGES=config.w2_stages,
            num_warps=config.w2_num_warps,
            **second,
            **few,
        )
        return out

    num_pairs = num_tokens * topk
    block_m, pdl = config.block_m, config.pdl
    # Largest first: torch's allocator gives smaller tensors parts of a block that would
    # have held a larger one, and what outlives this layer would keep it cut.
    # The first product is read for the last time before the second is written.
    rows = most_tiles(num_pairs, num_experts, block_m) * block_m
    columns = columns_at_once(num_pairs, hidden_size, x.element_size())
    memory = x.new_empty(max(rows * width, num_pairs * columns))
    h = memory[: rows * width].view(rows, width)
    hq, h_scale = _empty_quantized(rows, width, x)
    tiles, xq, x_scale = prepare(
        x, a13_scale, topk_ids, expert_map, num_experts, config
    )
    sorted_pairs, tile_experts, num_tiles = tiles
    max_tiles = tile_experts.numel()
    p = config.w13
    w13_args = (
        w13_scale,
        w13_bias,
        topk_weights,
        *tiles,
        h,
        num_pairs,
        width,
        hidden_size,
        topk,
    )
    programs = max_tiles * triton.cdiv(2 * width, p.block_w)
    if p.hopper:
        weights = _hopper().boxes(w13.view(-1, hidden_size), p.block_w // 2, p.block_k)
        _launch_hopper(
            _hopper().w13_kernel,
            p,
            min(programs, p.programs * num_sms(x)),
            pdl,
            xq,
            x_scale,
            weights,
            *w13_args,
            BLOCK_M=block_m,
            BLOCK_N=p.block_w // 2,
            **first,
        )
    else:
        _launch_product(
            kernels.w13_kernel,
            p,
            programs,
            pdl,
            xq,
            x_scale,
            _paired_boxes(w13, p) if p.tma_w else w13,
            *w13_args,
            BLOCK_M=block_m,
            BLOCK_N=p.block_w // 2,
            EVEN_K=hidden_size % p.block_k == 0,
            **first,
        )
    block_k = triton.next_power_of_2(width)
    rows_a_program = max(1, 8192 // block_k)
    launch(
        kernels.quantize_pairs_kernel,
        (triton.cdiv(rows, rows_a_program),),
        pdl,
        h,
        a2_scale,
        sorted_pairs,
        num_tiles,
        hq,
        h_scale,
        num_pairs,
        width,
        BLOCK_M=block_m,
        ROWS=rows_a_program,
        BLOCK_K=block_k,
        STATIC=a2_scale is not None,
        num_warps=4,
    )

    p = config.w2
    boxes = _hopper().boxes if p.hopper else _boxes
    pairs_h = boxes(hq, block_m, p.block_k) if p.tma_a else hq
    weights = boxes(w2.view(-1, width), p.block_w, p.block_k) if p.tma_w else w2
    out = torch.empty_like(x)
    # Of all columns, not of a part: one kernel serves every number of tokens.
    block_k = min(triton.next_power_of_2(hidden_size), 1024)
    for start in range(0, hidden_size, columns):
        end = min(start + columns, hidden_size)
        y = memory[: num_pairs * (end - start)].view(num_pairs, end - start)
        w2_args = (
            pairs_h,
            h_scale,
            weights,
            w2_scale,
            w2_bias,
            topk_weights,
            *tiles,
            y,
            num_pairs,
            hidden_size,
            width,
            start,
            end,
        )
        programs = max_tiles * triton.cdiv(end - start, p.block_w)
        if p.blocks:
            assert not p.tma_a
            launch(
                kernels.w2_narrow_kernel,
                (max_tiles * triton.cdiv(end - start, p.block_w * p.blocks),),
                pdl,
                *w2_args,
                BLOCK_M=block_m,
                BLOCK_N=p.block_w,
                BLOCK_K=p.block_k,
                BLOCKS=p.blocks,
                SWAP=p.swap,
                TMA_W=p.tma_w,
                STAGES=p.num_stages,
                num_warps=p.num_warps,
                **second,
            )
        elif p.hopper:
            _launch_hopper(
                _hopper().w2_kernel,
                p,
                min(programs, p.programs * num_sms(x)),
                pdl,
                *w2_args,
                BLOCK_M=block_m,
                BLOCK_N=p.block_w,
                **second,
            )
        else:
            _launch_product(
                kernels.w2_kernel,
                p,
                programs,
                pdl,
                *w2_args,
                BLOCK_M=block_m,
                BLOCK_N=p.block_w,
                EVEN_K=width % p.block_k == 0,
                TMA_A=p.tma_a,
                **second,
            )
        launch(
            kernels.sum_topk_kernel,
            (num_tokens, triton.cdiv(end - start, block_k)),
            pdl,
            y,
            *routing,
            out,
            num_ids,
            hidden_size,
            start,
            end,
            TOPK=topk,
            BLOCK_K=block_k,
            HAS_EXPERT_MAP=has_map,
            num_warps=4,
        )
    return out


def columns_at_once(num_pairs: int, hidden_size: int, element_size: int) -> int:
    """Columns of the second product that are made, and added up, before the next ones:
    as many as take _PART_BYTES for all pairs, in steps of _PART_COLUMNS."""
    most = _PART_BYTES // (num_pairs * element_size) // _PART_COLUMNS
    return min(hidden_size, max(most, 1) * _PART_COLUMNS)


Tiles = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """An upper bound of the number of tiles, which the device alone knows."""
    return min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))


def prepare(
    x: torch.Tensor,
    static_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    config: Config,
) -> tuple[Tiles, torch.Tensor, torch.Tensor]:
    """Quantize tokens and sort pairs into tiles of one expert each.

    Returns:
        The pairs of each tile, [max_tiles * block_m] int32, padded with their number;
        each tile's expert, [max_tiles] int32; the number of tiles, [1] int32. The
        contents beyond that number are undefined. Then x as int8 and its scales,
        [M] float32.
    """
    num_tokens, columns = x.shape
    num_pairs = topk_ids.numel()
    num_ids = num_experts if expert_map is None else expert_map.numel()
    block_m = config.block_m
    max_tiles = most_tiles(num_pairs, num_experts, block_m)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=x.device)

    tiles = empty(max_tiles * block_m), empty(max_tiles), empty(1)
    xq, scale = _empty_quantized(num_tokens, columns, x)
    bins = max(triton.next_power_of_2(num_experts + 1), 128)
    block_k = triton.next_power_of_2(columns)
    rows = max(1, 4096 // block_k)
    programs = triton.cdiv(num_tokens, rows)
    pairs = pairs_to_sort_at_once(num_pairs)
    routing = (topk_ids, expert_map)
    has_map = expert_map is not None
    launch(
        kernels.prepare_kernel,
        (programs + (num_experts if pairs else 0),),
        config.pdl,
        x,
        static_scale,
        xq,
        scale,
        *routing,
        *tiles,
        num_tokens,
        columns,
        num_pairs,
        num_ids,
        num_experts,
        ALIGNERS=pairs > 0,
        HAS_EXPERT_MAP=has_map,
        BLOCK_M=block_m,
        PAIRS=pairs,
        BINS=bins,
        ROWS=rows,
        BLOCK_K=block_k,
        STATIC=static_scale is not None,
        num_warps=8,
    )
    if pairs:
        return tiles, xq, scale

    num_parts = triton.cdiv(num_pairs, _PART)
    counts, before, totals = empty(num_parts, bins), empty(num_parts, bins), empty(bins)
    common: dict[str, Any] = dict(HAS_EXPERT_MAP=has_map, PART=_PART, BINS=bins)
    launch(
        kernels.count_kernel,
        (num_parts,),
        config.pdl,
        *routing,
        counts,
        num_pairs,
        num_ids,
        num_experts,
        num_warps=4,
        **common,
    )
    launch(
        kernels.scan_kernel,
        (bins // 16,),
        config.pdl,
        counts,
        before,
        totals,
        num_parts,
        PARTS=128,
        BINS=bins,
        BLOCK=16,
        num_warps=4,
    )
    launch(
        kernels.align_kernel,
        (num_parts,),
        config.pdl,
        *routing,
        before,
        totals,
        *tiles,
        num_pairs,
        num_ids,
        num_experts,
        BLOCK_M=block_m,
        num_warps=8,
        **common,
    )
    return tiles, xq, scale


def _empty_quantized(
    rows: int, columns: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        like.new_empty((rows, columns), dtype=torch.int8),
        like.new_empty(rows, dtype=torch.float32),
    )


def _launch_product(
    kernel: Any,
    product: Product,
    programs: int,
    pdl: bool,
    *args: Any,
    **constants: Any,
) -> None:
    launch(
        kernel,
        (programs,),
        pdl,
        *args,
        BLOCK_K=product.block_k,
        SWAP=product.swap,
        TMA_W=product.tma_w,
        num_warps=product.num_warps,
        num_stages=product.num_stages,
        **constants,
    )


def _hopper() -> Any:
    # Imported late: there is no Gluon without Triton, or with an older one.
    from vllm.model_executor.layers.fused_moe import int8_moe_hopper

    return int8_moe_hopper


def _launch_hopper(
    kernel: Any,
    product: Product,
    programs: int,
    pdl: bool,
    *args: Any,
    **constants: Any,
) -> None:
    if product.programs > 1:
        # Of 65,536; as many warps copy, at most, as multiply.
        constants["maxnreg"] = 1024 // (product.programs * product.num_warps)
    launch(
        kernel,
        (programs,),
        pdl,
        *args,
        BLOCK_K=product.block_k,
        STAGES=product.num_stages,
        NUM_WARPS=product.num_warps,
        num_warps=product.num_warps,
        **constants,
    )


def _boxes(matrix: torch.Tensor, block_rows: int, block_k: int) -> Any:
    """A tensor map of a matrix, in boxes of block_rows by block_k."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, k = matrix.shape
    return TensorDescriptor(matrix, [rows, k], [k, 1], [block_rows, block_k])


def _paired_boxes(w13: torch.Tensor, product: Product) -> Any:
    """A tensor map of w13 in boxes that hold a gate row, its up row, the next gate row.

    Row r, whatever its expert, has the row N further down beside it.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    num_experts, rows, k = w13.shape
    n = rows // 2
    shape = [num_experts * rows - n, 2, k]
    block = [product.block_w // 2, 2, product.block_k]
    return TensorDescriptor(w13, shape, [k, n * k, 1], block)


def _int8_fused_experts_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


direct_register_custom_op(
    op_name="int8_fused_experts",
    op_func=_int8_fused_experts,
    fake_impl=_int8_fused_experts_fake,
)
