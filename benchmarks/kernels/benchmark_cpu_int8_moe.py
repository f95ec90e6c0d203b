# SPDX-License-Identifier: Apache-2.0
"""Time the INT8 fused experts on this CPU against upstream's bfloat16 ones.

    python -m benchmarks.kernels.benchmark_cpu_int8_moe --experts 64 --width 640

Weights, activations and routing are random, and the routing is fresh for each call. For
each number of tokens: the medians, their ratio, and the rate at which INT8 weights were
read. Writes `<CPU>/cpu_int8_moe.json` and a plot below --out, if given.
"""

import argparse
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.kernels import runner
from benchmarks.kernels.runner import Benchmark, Case, Row, Timed
from benchmarks.plots import Panel

TOKENS = [1, 16, 128, 512]
BATCHES = 3  # whose routing differs, in a row
Sizes = tuple[int, int, int]  # experts, hidden size, width
Experts = partial[Tensor]


@cache
def int8_experts(num_experts: int, hidden: int, width: int) -> Experts:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.quark_int8_cpu import (
        cpu_int8_experts,
    )

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
        return cpu_int8_experts(
            x,
            w13,
            w2,
            topk_weights,
            topk_ids,
            MoEActivation.SILU,
            apply_router_weight=True,
            expert_map=None,
            quant_config=quant_config,
        ).to(x.dtype)

    return partial(run)


@cache
def bf16_experts(num_experts: int, hidden: int, width: int) -> Experts:
    """Upstream's kernel for unquantized experts, with AMX where there is one."""
    import vllm._custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def weight(rows: int, columns: int) -> Tensor:
        values = torch.randn(num_experts, rows, columns) / columns**0.5
        return ops.cpu_prepack_moe_weight(values.bfloat16(), isa)

    w13, w2 = weight(2 * width, hidden), weight(hidden, width)

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return ops.cpu_fused_moe(
            x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa
        )

    return partial(run)


def prepare(sizes: Sizes, top_k: int, num_tokens: int) -> Timed:
    num_experts, hidden, _ = sizes
    batches = []
    for _ in range(BATCHES):
        x = torch.randn(num_tokens, hidden).bfloat16()
        order = torch.rand(num_tokens, num_experts).argsort()
        batches.append((x, torch.rand(num_tokens, top_k), order[:, :top_k].int()))
    figures = {"bf16_us": bf16_experts, "int8_us": int8_experts}
    return Timed(
        {
            name: [partial(make(*sizes), *batch) for batch in batches]
            for name, make in figures.items()
        }
    )


def gb_per_s(row: Row) -> Row:
    """Experts that random routing leaves out are not read."""
    idle = (1 - row["topk"] / row["num_experts"]) ** row["m"]
    read = row["num_experts"] * (1 - idle) * 3 * row["k"] * row["n"]
    return {"gb_per_s": round(read / row["int8_us"] / 1e3, 1)}


def panels(rows: list[Row]) -> list[Panel]:
    line = runner.line("INT8", rows, "int8_us", over="bf16_us")
    return [Panel("fused experts", [line])]


BENCHMARK = Benchmark(
    "cpu_int8_moe",
    ours={"int8_us": "bf16_us"},
    panels=panels,
    ylabel="times bfloat16's speed",
    also=gb_per_s,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in ("experts", 32), ("hidden", 4096), ("width", 1280):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"default: {default}"
        )
    parser.add_argument("--top-k", type=int, default=8, help="default: 8")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--repeat", type=int, default=9, help="default: 9")
    parser.add_argument("--out", type=runner.Path, help="for the results")
    args = parser.parse_args()
    runner.warn_of_edits()
    from vllm.model_executor.layers.quantization.utils import cpu_int8_utils

    exact = "int8"
    if not cpu_int8_utils.has_exact_int8_dot():
        exact = "float32, since oneDNN's int8 saturates"
    print(f"{torch.get_num_threads()} threads; products in {exact}")
    sizes = args.experts, args.hidden, args.width
    labels = dict(zip(("num_experts", "k", "n"), sizes, strict=True))
    cases = [
        Case(
            labels | {"topk": args.top_k, "m": m},
            partial(prepare, sizes, args.top_k, m),
        )
        for m in args.tokens
    ]
    BENCHMARK.measure(cases, args.out, repeat=args.repeat)


if __name__ == "__main__":
    main()
