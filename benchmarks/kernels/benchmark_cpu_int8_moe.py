# SPDX-License-Identifier: Apache-2.0
"""Time the INT8 fused experts on this CPU against upstream's bfloat16 ones.

    python benchmarks/kernels/benchmark_cpu_int8_moe.py --experts 64 --width 640

Weights, activations and routing are random, and the routing is fresh for each call.
The two take turns, so that a busy machine slows both. Prints, for each number of
tokens, the medians, their ratio, and the rate at which INT8 weights were read.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.cpu_int8_moe import cpu_int8_fused_experts
from vllm.model_executor.layers.quantization.utils.cpu_int8_utils import (
    has_exact_int8_dot,
)

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def int8_experts(num_experts: int, hidden: int, width: int) -> Experts:
    def weight(rows: int, columns: int) -> Tensor:
        size = (num_experts, rows, columns)
        return torch.randint(-127, 128, size, dtype=torch.int8)

    def scale(rows: int, columns: int) -> Tensor:
        return (torch.rand(num_experts, rows, 1) + 0.5) / 74 / columns**0.5

    w13, w2 = weight(2 * width, hidden), weight(hidden, width)
    quant_config = int8_w8a8_moe_quant_config(
        w1_scale=scale(2 * width, hidden),
        w2_scale=scale(hidden, width),
        a1_scale=None,
        a2_scale=None,
        per_act_token_quant=True,
    )

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return cpu_int8_fused_experts(
            x,
            w13,
            w2,
            topk_weights,
            topk_ids,
            MoEActivation.SILU,
            apply_router_weight_on_input=False,
            expert_map=None,
            quant_config=quant_config,
        )

    return run


def bf16_experts(num_experts: int, hidden: int, width: int) -> Experts:
    """Upstream's kernel for unquantized experts, with AMX where there is one."""
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def weight(rows: int, columns: int) -> Tensor:
        values = torch.randn(num_experts, rows, columns) / columns**0.5
        return ops.cpu_prepack_moe_weight(values.bfloat16(), isa)

    w13, w2 = weight(2 * width, hidden), weight(hidden, width)

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return ops.cpu_fused_moe(
            x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa
        )

    return run


def measure(
    functions: list[Experts], num_tokens: int, args: argparse.Namespace
) -> list[float]:
    """The median seconds of each function."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(args.warmup + args.repeat):
        x = torch.randn(num_tokens, args.hidden).bfloat16()
        topk_weights = torch.rand(num_tokens, args.top_k)
        order = torch.rand(num_tokens, args.experts).argsort()
        topk_ids = order[:, : args.top_k].int()
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function(x, topk_weights, topk_ids)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[args.warmup :]) for times in seconds]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=32, help="default: 32")
    parser.add_argument("--hidden", type=int, default=4096, help="default: 4096")
    parser.add_argument("--width", type=int, default=1280, help="default: 1280")
    parser.add_argument("--top-k", type=int, default=8, help="default: 8")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 128, 512], metavar="M"
    )
    parser.add_argument("--warmup", type=int, default=2, help="calls; default: 2")
    parser.add_argument("--repeat", type=int, default=9, help="calls; default: 9")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    exact = "int8" if has_exact_int8_dot() else "float32, since oneDNN's int8 saturates"
    print(
        f"{args.experts} experts of width {args.width}, hidden {args.hidden}, "
        f"top {args.top_k}; {torch.get_num_threads()} threads; products in {exact}"
    )
    size = args.experts, args.hidden, args.width
    functions = [int8_experts(*size), bf16_experts(*size)]
    expert_bytes = 3 * args.hidden * args.width
    print(f"{'tokens':>6} {'int8 ms':>9} {'bf16 ms':>9} {'bf16/int8':>9} {'GB/s':>6}")
    for num_tokens in args.tokens:
        int8, bf16 = measure(functions, num_tokens, args)
        # Experts that random routing leaves out are not read.
        idle = (1 - args.top_k / args.experts) ** num_tokens
        rate = args.experts * (1 - idle) * expert_bytes / int8 / 1e9
        print(
            f"{num_tokens:6} {int8 * 1e3:9.2f} {bf16 * 1e3:9.2f} {bf16 / int8:9.2f} "
            f"{rate:6.1f}"
        )


if __name__ == "__main__":
    main()
