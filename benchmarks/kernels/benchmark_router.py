# SPDX-License-Identifier: Apache-2.0
"""Time the router of Step-3.5-Flash on this GPU against upstream's.

    python -m benchmarks.kernels.benchmark_router

For each number of tokens: the product of 288 x 4096 in float32 and the choice of 8
experts, upstream's and the Triton kernels, on random data.

Writes `<chip>/router.json` and a plot beside it. With --sweep it tries tiles of the
product for each number of tokens, prints the best, and writes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import runner
from benchmarks.kernels.runner import Benchmark, Calls, Case, Row, Timed
from benchmarks.plots import Panel

EXPERTS, HIDDEN, TOPK = 288, 4096, 8
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
LAYERS = 12  # whose weights take turns
FIGURES = {"product_us": "stock_product_us", "choice_us": "stock_choice_us"}


def upstreams_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight)


def upstreams_choice(*args: Any) -> None:
    import vllm._custom_ops  # noqa: F401  (loads upstream's operators)

    torch.ops._moe_C.topk_sigmoid(*args)


def choice(operator: Callable[..., None], logits: Tensor, bias: Tensor) -> None:
    size, device = (logits.shape[0], TOPK), logits.device
    weights = torch.empty(size, device=device)
    ids, rows = (torch.empty(size, dtype=torch.int32, device=device) for _ in "ir")
    operator(weights, ids, rows, logits, True, bias)


@cache
def make_weights() -> list[Tensor]:
    device = runner.device()
    return [torch.randn(EXPERTS, HIDDEN, device=device) for _ in range(LAYERS)]


def make_x(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, device=runner.device()).bfloat16()


def products(product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Calls:
    return [partial(product, x, weight) for weight in make_weights()]


def prepare(num_tokens: int) -> Timed:
    from vllm.model_executor.layers.fused_moe.router import triton_router

    x = make_x(num_tokens)
    logits = torch.randn(num_tokens, EXPERTS, device=x.device)
    bias = torch.randn(EXPERTS, device=x.device)
    choices = (upstreams_choice, triton_router.topk_sigmoid)
    stock, ours = ([partial(choice, of, logits, bias)] * LAYERS for of in choices)
    return Timed(
        {
            "stock_product_us": products(upstreams_product, x),
            "product_us": products(triton_router.router_logits, x),
            "stock_choice_us": stock,
            "choice_us": ours,
        }
    )


def candidates(num_tokens: int) -> Iterator[Any]:
    """Tiles that are neither mostly padding nor far too many or too few programs."""
    from vllm.model_executor.layers.fused_moe.router.triton_router import (
        FewTiles,
        Tiles,
    )

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
    from vllm.model_executor.layers.fused_moe.router.triton_router import run_product

    for num_tokens in tokens:
        x = make_x(num_tokens)
        tiles = (
            (one, products(partial(run_product, one), x))
            for one in candidates(num_tokens)
        )
        runner.best_tiles(f"{num_tokens}", products(upstreams_product, x), tiles)


def panels(rows: list[Row]) -> list[Panel]:
    lines = []
    for color, (ours, stock) in zip(("C0", "C1"), FIGURES.items(), strict=True):
        what = ours.removesuffix("_us")
        for name, style, whose in ((stock, "--", ", upstream"), (ours, "-", "")):
            label = what + whose
            line = runner.line(label, rows, name, style=style, color=color)
            lines.append(line)
    return [Panel("", lines)]


BENCHMARK = Benchmark("router", FIGURES, panels, ylabel="microseconds", log=True)


def main() -> None:
    global EXPERTS, HIDDEN, TOPK, LAYERS
    parser = runner.make_parser(__doc__, TOKENS)
    parser.add_argument("--sweep", action="store_true", help="try tiles")
    args = runner.parse(parser, interpreted_tokens=[1, 5])
    if args.interpret:
        EXPERTS, HIDDEN, TOPK, LAYERS = 12, 64, 3, 2
    if args.sweep:
        sweep(args.tokens)
        return
    cases = [Case({"m": m}, partial(prepare, m)) for m in args.tokens]
    BENCHMARK.measure(cases, args.out)


if __name__ == "__main__":
    main()
