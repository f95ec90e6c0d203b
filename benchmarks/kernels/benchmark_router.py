# SPDX-License-Identifier: Apache-2.0
"""Time the router of Step-3.5-Flash on this GPU against upstream's.

    python -m benchmarks.kernels.benchmark_router

For each number of tokens: the product of 288 x 4096 in float32 and the choice of 8
experts, upstream's and the Triton kernels. Times are medians of replays of a CUDA graph
on random data.

Writes `<chip>/router.json` and a plot beside it. With --sweep it tries tiles of the
product for each number of tokens, prints the best, and writes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401  (loads upstream's operators)
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router import triton_router
from vllm.model_executor.layers.fused_moe.router.triton_router import (
    FewTiles,
    Tiles,
    run_product,
)

from benchmarks.kernels.benchmark_int8_moe import time_us
from benchmarks.kernels.utils import measure_or_sweep, write_results

EXPERTS, HIDDEN, TOPK = 288, 4096, 8
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
LAYERS = 12  # whose weights take turns


def upstreams_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight)


def choice(operator: Callable[..., None], logits: Tensor, bias: Tensor) -> None:
    size = logits.shape[0], TOPK
    weights = torch.empty(size, device="cuda")
    ids, rows = (torch.empty(size, dtype=torch.int32, device="cuda") for _ in range(2))
    operator(weights, ids, rows, logits, True, bias)


def time_products(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]
) -> float:
    return time_us([partial(product, x, weight) for weight in weights])


def make_weights() -> list[Tensor]:
    return [torch.randn(EXPERTS, HIDDEN, device="cuda") for _ in range(LAYERS)]


def candidates(num_tokens: int) -> Iterator[FewTiles | Tiles]:
    """Tiles that are neither mostly padding nor far too many or too few programs."""
    if num_tokens <= 64:
        for m, e, warps in itertools.product((1, 2, 4, 8), (1, 2, 4), (4, 8)):
            if m <= num_tokens and m * 64 >= num_tokens:
                yield FewTiles(m, e, warps)
    many = num_tokens > 512
    for m, e, k, warps, stages in itertools.product(
        (16, 32, 64, 128, 256),
        (16, 32, 64, 128),
        (32, 64, 128, 256),
        (4, 8) if many else (4,),
        (3, 4) if many else (4,),
    ):
        programs = -(-num_tokens // m) * -(-EXPERTS // e)
        # Sums of one step and of all take twice so many registers.
        elements = m * e // warps
        fits = stages * k * (2 * m + 6 * e) <= 220 << 10
        fits &= 1024 * many <= elements <= 2048
        if fits and m <= max(num_tokens, 16) and 16 <= programs <= 1024:
            yield Tiles(m, e, k, warps, stages)


def sweep(tokens: list[int]) -> None:
    weights = make_weights()
    for num_tokens in tokens:
        x = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16()
        us = time_products(upstreams_product, x, weights)
        tried = list(candidates(num_tokens))
        found = [
            (time_products(partial(run_product, tiles), x, weights), tiles)
            for tiles in tried
        ]
        found.sort(key=lambda one: one[0])
        print(f"{num_tokens}: upstream {us:.1f} us, {len(tried)} tried", flush=True)
        for time, best in found[:5]:
            print(f"    {time:6.1f} us {us / time:5.2f}  {best}", flush=True)


def measure(out: Path, tokens: list[int]) -> None:
    upstreams_choice = torch.ops._moe_C.topk_sigmoid
    weights, bias = make_weights(), torch.randn(EXPERTS, device="cuda")
    rows: list[dict[str, Any]] = []
    for num_tokens in tokens:
        x = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16()
        logits = torch.randn(num_tokens, EXPERTS, device="cuda")
        row = {
            "m": num_tokens,
            "stock_product_us": time_products(upstreams_product, x, weights),
            "product_us": time_products(triton_router.router_logits, x, weights),
        }
        for name, operator in (
            ("stock_choice_us", upstreams_choice),
            ("choice_us", triton_router.topk_sigmoid),
        ):
            row[name] = time_us([partial(choice, operator, logits, bias)] * LAYERS)
        rows.append(row)
        print(
            f"{num_tokens:5}: product {row['stock_product_us']:7.1f} us, "
            f"{row['product_us']:6.1f}, "
            f"{row['stock_product_us'] / row['product_us']:.2f}x; choice "
            f"{row['stock_choice_us']:6.1f}, {row['choice_us']:5.1f}, "
            f"{row['stock_choice_us'] / row['choice_us']:.2f}x",
            flush=True,
        )
    write_results(out, "router", rows, plot)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, label in (
        ("stock_product_us", "product, upstream"),
        ("product_us", "product"),
        ("stock_choice_us", "choice, upstream"),
        ("choice_us", "choice"),
    ):
        points = [(row["m"], row[name]) for row in result["rows"]]
        style = "--" if name.startswith("stock") else "-"
        colour = "C0" if "product" in name else "C1"
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="tokens", ylabel=f"microseconds, {result['chip']}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    measure_or_sweep(__doc__, TOKENS, measure, sweep, "tiles")
