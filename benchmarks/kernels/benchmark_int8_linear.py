# SPDX-License-Identifier: Apache-2.0
"""Time INT8 linear layers of few tokens on this GPU against upstream's operators.

    python -m benchmarks.kernels.benchmark_int8_linear

For each shape and number of tokens: upstream's quantization and CUTLASS product, and
the kernel for few tokens, on random data over as many weights as do not stay in the
cache. The limit is the bytes of the weight and the tokens over the measured copy
bandwidth.

Writes `<chip>/int8_linear.json` and a plot beside it. With --sweep it tries all tiles
for each shape, prints the best, and writes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import runner
from benchmarks.kernels.runner import Benchmark, Calls, Case, Row, Timed
from benchmarks.plots import Panel


@dataclass(frozen=True)
class Shape:
    """A weight [N, K], as one rank holds it."""

    n: int
    k: int
    source: str


SHAPES = [
    Shape(14336, 4096, "Step-3.5-Flash, qkv of sliding attention"),
    Shape(4096, 12288, "Step-3.5-Flash, output of sliding attention"),
    Shape(10240, 4096, "Step-3.5-Flash, qkv of full attention"),
    Shape(4096, 8192, "Step-3.5-Flash, output of full attention"),
    Shape(1792, 4096, "Step-3.5-Flash, qkv of sliding attention over 8 ranks"),
    Shape(4096, 1536, "Step-3.5-Flash, output of sliding attention over 8 ranks"),
    Shape(5120, 2048, "Qwen3-30B-A3B, qkv"),
    Shape(2048, 4096, "Qwen3-30B-A3B, output"),
]
TINY = [Shape(48, 64, "a dry run")]
TOKENS = [1, 2, 4, 8]
# More than the cache of any GPU that this knows.
CACHE_BYTES = 200 << 20
Layer = tuple[Tensor, Tensor]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def make_layers(shape: Shape) -> list[Layer]:
    """Weights [N, K] int8 with their scales [N, 1]."""
    size, device = (shape.n, shape.k), runner.device()
    enough = -(-CACHE_BYTES // (shape.n * shape.k)) if runner.on_gpu() else 1
    return [
        (
            torch.empty(size, dtype=torch.int8, device=device).random_(-127, 128),
            torch.rand(shape.n, 1, device=device) * 1e-3,
        )
        for _ in range(max(2, enough))
    ]


def stock(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from vllm import _custom_ops as ops

    xq, x_scale, _ = ops.scaled_int8_quant(x)
    return ops.cutlass_scaled_mm(xq, weight.t(), x_scale, scale, x.dtype, None)


def with_tiles(tiles: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens

    return int8_few_tokens.run_int8_linear(tiles, x, weight, scale, None, None)


def make_calls(product: Product, x: Tensor, shape: Shape) -> Calls:
    return [partial(product, x, *layer) for layer in make_layers(shape)]


def make_x(shape: Shape, num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, shape.k, device=runner.device()).bfloat16()


def prepare(shape: Shape, num_tokens: int) -> Timed:
    from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens

    x = make_x(shape, num_tokens)
    tiles = int8_few_tokens.choose_tiles(1, shape.n, shape.k)
    moved = shape.n * shape.k + 2 * num_tokens * (shape.n + shape.k)
    return Timed(
        {
            "stock_us": make_calls(stock, x, shape),
            "ours_us": make_calls(partial(with_tiles, tiles), x, shape),
        },
        runner.limit_us(moved),
    )


def sweep(shapes: list[Shape], tokens: list[int]) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import Tiles

    def candidates(x: Tensor, shape: Shape) -> Iterator[tuple[Any, Calls]]:
        for block_n, warps, programs in itertools.product(
            (1, 2, 4, 8), (4, 8, 16), (1, 2, 3, 4, 1024)
        ):
            if block_n * shape.k <= 4 * 16384 * (warps // 4):
                tiles = Tiles(block_n, warps, programs)
                yield tiles, make_calls(partial(with_tiles, tiles), x, shape)

    for shape, num_tokens in itertools.product(shapes, tokens):
        x = make_x(shape, num_tokens)
        # Upstream's operators are those of a GPU.
        upstream = make_calls(stock, x, shape) if runner.on_gpu() else None
        what = f"{shape.n}x{shape.k} {num_tokens}"
        runner.best_tiles(what, upstream, candidates(x, shape))


def panels(rows: list[Row]) -> list[Panel]:
    lines = []
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        of = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        lines.append(runner.line(f"{n} x {k}", of, "ours_us", over="stock_us"))
    return [Panel("N x K", lines)]


BENCHMARK = Benchmark(
    "int8_linear",
    ours={"ours_us": "stock_us"},
    panels=panels,
    ylabel="times upstream's speed",
    has_limit=True,
)


def main() -> None:
    parser = runner.make_parser(__doc__, TOKENS)
    parser.add_argument("--sweep", action="store_true", help="try all tiles")
    args = runner.parse(parser, interpreted_tokens=[1, 2])
    shapes = TINY if args.interpret else SHAPES
    if args.sweep:
        sweep(shapes, args.tokens)
        return
    cases = [
        Case({"n": s.n, "k": s.k, "m": m}, partial(prepare, s, m))
        for s, m in itertools.product(shapes, args.tokens)
    ]
    bandwidth = runner.rounded(runner.copy_tbps(), 3)
    BENCHMARK.measure(cases, args.out, copy_tbps=bandwidth)


if __name__ == "__main__":
    main()
