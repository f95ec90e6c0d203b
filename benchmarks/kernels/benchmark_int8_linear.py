# SPDX-License-Identifier: Apache-2.0
"""Time INT8 linear layers of few tokens on this GPU against upstream's operators.

    python -m benchmarks.kernels.benchmark_int8_linear

For each shape and number of tokens: upstream's quantization and CUTLASS product, and
the kernel for few tokens. Times are medians of replays of a CUDA graph on random data,
over as many weights as do not stay in the cache. The limit is the bytes of the weight
and the tokens over the measured copy bandwidth.

Writes `<chip>/int8_linear.json` and a plot beside it. With --sweep it tries all tiles
for each shape, prints the best, and writes nothing.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.benchmark_int8_moe import measure_limits, time_us
from benchmarks.kernels.utils import write_results


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
TOKENS = [1, 2, 4, 8]
# More than the cache of any GPU that this knows.
CACHE_BYTES = 200 << 20


@dataclass(frozen=True)
class Layer:
    weight: Tensor
    scale: Tensor


def make_layers(shape: Shape) -> list[Layer]:
    size = (shape.n, shape.k)
    return [
        Layer(
            torch.empty(size, dtype=torch.int8, device="cuda").random_(-127, 128),
            torch.rand(shape.n, 1, device="cuda") * 1e-3,
        )
        for _ in range(max(2, -(-CACHE_BYTES // (shape.n * shape.k))))
    ]


def stock(x: Tensor, layer: Layer) -> Tensor:
    from vllm import _custom_ops as ops

    xq, x_scale, _ = ops.scaled_int8_quant(x)
    return ops.cutlass_scaled_mm(
        xq, layer.weight.t(), x_scale, layer.scale, x.dtype, None
    )


def with_tiles(tiles: Any, x: Tensor, layer: Layer) -> Tensor:
    from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens

    return int8_few_tokens.run_int8_linear(
        tiles, x, layer.weight, layer.scale, None, None
    )


def time_layers(
    product: Callable[[Tensor, Layer], Tensor], x: Tensor, layers: list[Layer]
) -> float:
    return time_us([partial(product, x, layer) for layer in layers])


def sweep() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import Tiles

    for shape in SHAPES:
        layers = make_layers(shape)
        for num_tokens in TOKENS[:3]:
            x = torch.randn(num_tokens, shape.k, device="cuda").bfloat16()
            found = []
            for block_n, warps, programs in itertools.product(
                (1, 2, 4, 8), (4, 8, 16), (1, 2, 3, 4, 1024)
            ):
                if block_n * shape.k > 4 * 16384 * (warps // 4):
                    continue
                tiles = Tiles(block_n, warps, programs)
                found.append(
                    (time_layers(partial(with_tiles, tiles), x, layers), tiles)
                )
            us = time_layers(stock, x, layers)
            found.sort(key=lambda one: one[0])
            print(f"{shape.n}x{shape.k} {num_tokens}: stock {us:.1f} us", flush=True)
            for time, tiles in found[:6]:
                print(f"    {time:6.1f} us {us / time:5.2f}  {tiles}", flush=True)
        del layers


def measure(out: Path) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
        choose_tiles,
    )

    copy_tbps, _ = measure_limits()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        layers = make_layers(shape)
        ours = partial(with_tiles, choose_tiles(1, shape.n, shape.k))
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, shape.k, device="cuda").bfloat16()
            moved = shape.n * shape.k + 2 * num_tokens * (shape.n + shape.k)
            row = {
                "n": shape.n,
                "k": shape.k,
                "m": num_tokens,
                "stock_us": time_layers(stock, x, layers),
                "ours_us": time_layers(ours, x, layers),
                "limit_us": moved / copy_tbps / 1e6,
            }
            rows.append(row)
            print(
                f"{row['n']:5} x {row['k']:<5} {num_tokens}: stock "
                f"{row['stock_us']:6.1f} us, ours {row['ours_us']:6.1f}, "
                f"{row['stock_us'] / row['ours_us']:.2f}x, "
                f"{row['limit_us'] / row['ours_us']:.0%} of the limit",
                flush=True,
            )
        del layers
    write_results(out, "int8_linear", rows, plot, copy_tbps=round(copy_tbps, 3))


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for shape in SHAPES:
        points = [
            (row["m"], row["stock_us"] / row["ours_us"])
            for row in result["rows"]
            if (row["n"], row["k"]) == (shape.n, shape.k)
        ]
        label = f"{shape.n} x {shape.k}"
        axis.plot(*zip(*points, strict=True), marker=".", label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens", ylabel=f"times upstream's speed, {result['chip']}")
    axis.grid(alpha=0.3)
    axis.legend(title="N x K")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sweep", action="store_true", help="try all tiles")
    args = parser.parse_args()
    sweep() if args.sweep else measure(args.out)


if __name__ == "__main__":
    main()
