# SPDX-License-Identifier: Apache-2.0
"""Time the INT8 fused MoE on this GPU against other kernels and against its limit.

    python benchmarks/kernels/benchmark_int8_moe.py --out benchmarks/results

For each shape and number of tokens: upstream's `fused_experts` with its default tiles
and with the best of a sweep, the two products alone of Humming (`humming-kernels`, if
installed), and this project's layer. Times are medians of replays of a CUDA graph
on random data, over several batches where weights would stay in the cache. The limit is
the larger of the bytes that one pass over the routed experts' weights and the tokens
must move, over the measured copy bandwidth, and the operations over the peak of the
int8 tensor cores.

Writes `<chip>/int8_moe.json` and a plot beside it, and the winners of the sweep to the
overlay's tuned configs, in upstream's format and place; a later run takes them from
there.
"""

import argparse
import datetime
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Config = dict[str, int]
ROOT = Path(__file__).resolve().parents[2]
TUNED = ROOT / "vllm/model_executor/layers/fused_moe/configs"


@dataclass(frozen=True)
class Shape:
    """A layer, as one rank holds it."""

    num_experts: int
    width: int
    hidden: int
    top_k: int
    source: str
    swept: bool = False


SHAPES = [
    Shape(288, 1280, 4096, 8, "Step-3.5-Flash", swept=True),
    Shape(36, 1280, 4096, 8, "Step-3.5-Flash, experts over 8 ranks", swept=True),
    Shape(288, 160, 4096, 8, "Step-3.5-Flash, width over 8 ranks", swept=True),
    Shape(144, 1280, 4096, 8, "Step-3.5-Flash, experts over 2 ranks"),
    Shape(72, 1280, 4096, 8, "Step-3.5-Flash, experts over 4 ranks"),
    Shape(128, 768, 2048, 8, "Qwen3-30B-A3B, config.json"),
    Shape(256, 1536, 3072, 8, "MiniMax-M2, config.json"),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
SWEEP: list[Config] = [
    {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "SPLIT_K": 1,
        "num_warps": warps,
        "num_stages": stages,
    }
    for m, n, k, group, warps, stages in [
        *itertools.product([16], [32, 64, 128], [128, 256], [1], [4], [3, 4]),
        *itertools.product([32], [64, 128], [128, 256], [1], [4], [3]),
        *itertools.product([64], [64, 128], [64, 128], [1, 16], [4], [3]),
        *itertools.product([64], [128, 256], [128], [1], [8], [3]),
        *itertools.product([128], [128, 256], [64, 128], [1, 16], [8], [3]),
        *itertools.product([128], [128], [64, 128], [1, 16], [4], [3, 4]),
    ]
]


@dataclass(frozen=True)
class Layer:
    shape: Shape
    w13: Tensor
    w2: Tensor
    w13_scale: Tensor
    w2_scale: Tensor


@dataclass(frozen=True)
class Batch:
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def make_layer(shape: Shape) -> Layer:
    def weight(rows: int, columns: int) -> Tensor:
        size = (shape.num_experts, rows, columns)
        return torch.empty(size, dtype=torch.int8, device="cuda").random_(-127, 128)

    def scale(rows: int, columns: int) -> Tensor:
        size = (shape.num_experts, rows, 1)
        return (torch.rand(size, device="cuda") + 0.5) * 4 / 74 / columns**0.5

    return Layer(
        shape,
        weight(2 * shape.width, shape.hidden),
        weight(shape.hidden, shape.width),
        scale(2 * shape.width, shape.hidden),
        scale(shape.hidden, shape.width),
    )


def make_batch(shape: Shape, num_tokens: int, routing: str) -> Batch:
    """Distinct experts a token: all alike, or with Zipf's frequencies."""
    rank = torch.arange(1, shape.num_experts + 1, device="cuda")
    chance = torch.ones_like(rank) if routing == "random" else 1 / rank
    uniform = torch.rand(num_tokens, shape.num_experts, device="cuda")
    # The smallest of exponentially distributed times, at rates that are the chances.
    times = -uniform.clamp(min=1e-30).log() / chance
    topk_ids = times.topk(shape.top_k, largest=False).indices.int()
    weights = torch.rand(num_tokens, shape.top_k, device="cuda")
    x = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
    return Batch(x, topk_ids, weights / weights.sum(dim=1, keepdim=True))


def time_us(functions: list[Callable[[], Any]], repeat: int = 9) -> float:
    """Median microseconds a call, of a graph that calls each once."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(functions))
    return statistics.median(times)


def stock(layer: Layer, batch: Batch, config: Config | None = None) -> Tensor:
    """Upstream's layer; its default tiles are named, as the fork finds tuned ones."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config
    from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    quant_config = int8_w8a8_moe_quant_config(
        w1_scale=layer.w13_scale,
        w2_scale=layer.w2_scale,
        a1_scale=None,
        a2_scale=None,
        per_act_token_quant=True,
    )

    if config is None:
        shape = layer.shape
        sizes = (shape.num_experts, shape.width, shape.hidden, shape.top_k)
        config = get_default_config(batch.x.shape[0], *sizes, dtype=None)
    with override_config(config):
        return fused_experts(
            batch.x,
            layer.w13,
            layer.w2,
            batch.topk_weights,
            batch.topk_ids,
            quant_config=quant_config,
        )


def ours(layer: Layer, batch: Batch) -> Tensor:
    from vllm.model_executor.layers.fused_moe import int8_moe

    return torch.ops.vllm.int8_fused_experts(
        batch.x,
        layer.w13,
        layer.w2,
        batch.topk_weights,
        batch.topk_ids,
        int8_moe.MoEActivation.SILU.value,
        False,
        None,
        layer.w13_scale,
        layer.w2_scale,
        None,
        None,
        None,
        None,
    )


class Humming:
    """Humming's two grouped products, int8 by int8, with its own choice of tiles."""

    def __init__(self, shape: Shape) -> None:
        from humming.config import GemmType
        from humming.layer import HummingLayer, HummingMethod

        self.method, self.sublayers = HummingMethod, []
        self.compute = json.dumps({"gemm_type": GemmType.GROUPED_CONTIGUOUS.value})
        for n, k in ((2 * shape.width, shape.hidden), (shape.hidden, shape.width)):
            layer = HummingLayer(
                shape_n=n,
                shape_k=k,
                weight_config={"dtype": "uint8"},
                input_config={"dtype": "int8"},
                num_experts=shape.num_experts,
                torch_dtype=torch.bfloat16,
            ).cuda()
            for parameter in layer.parameters():
                if parameter.dtype.is_floating_point:
                    parameter.data.fill_(0.01)
                else:
                    parameter.data.view(torch.int8).random_(-127, 128)
            layer.transform()
            tuning = HummingMethod.get_default_tuning_configs(
                layer=layer, gemm_type=GemmType.GROUPED_CONTIGUOUS
            )
            self.sublayers.append((layer, json.dumps(tuning), n, k))

    def __call__(self, batch: Batch, num_experts: int) -> Callable[[], None]:
        num_pairs = batch.topk_ids.numel()
        counts = batch.topk_ids.flatten().long().bincount(minlength=num_experts)
        layout = torch.zeros(num_experts + 1, dtype=torch.int64, device="cuda")
        layout[1:] = counts.cumsum(0)
        calls = []
        for layer, tuning, n, k in self.sublayers:
            inputs = torch.empty((num_pairs, k), dtype=torch.int8, device="cuda")
            calls.append(
                dict(
                    layer=layer,
                    inputs=inputs.random_(-127, 128),
                    input_scale=torch.rand((num_pairs, 1), device="cuda"),
                    outputs=batch.x.new_empty((num_pairs, n)),
                    valid_shape_m=num_pairs,
                    expert_layout=layout,
                    compute_config=self.compute,
                    tuning_config=tuning,
                )
            )

        def run() -> None:
            for call in calls:
                self.method.forward_layer(**call)

        return run


def measure_limits() -> tuple[float, float]:
    """Copy bandwidth in TB/s, read and written bytes, and the int8 peak in TOPS."""
    a = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = min(time_us([partial(b.copy_, a)]), time_us([partial(torch.neg, a, out=b)]))
    bandwidth = 2 * a.nbytes / copy / 1e6
    del a, b
    try:
        from humming.ops.bench import tops_bench

        return bandwidth, tops_bench("int8")
    except Exception as error:  # not installed, or it cannot build here
        print(f"Humming's int8 peak: {error!r}; a library's product instead")
    size = 8192
    m = torch.empty((size, size), dtype=torch.int8, device="cuda").random_(-127, 128)
    return bandwidth, 2 * size**3 / time_us([partial(torch._int_mm, m, m.t())]) / 1e6


def limit_us(shape: Shape, batch: Batch, copy_tbps: float, peak_tops: float) -> float:
    active = batch.topk_ids.unique().numel()
    num_tokens = batch.x.shape[0]
    weights = 3 * shape.width * shape.hidden
    moved = active * weights + 4 * num_tokens * shape.hidden
    operations = 2 * num_tokens * shape.top_k * weights
    return max(moved / copy_tbps, operations / peak_tops) / 1e6


def compile_one(job: tuple[Shape, Config | None, int]) -> None:
    """Fill the compiler's cache from another process, with a small layer."""
    shape, config, num_tokens = job
    small = Shape(max(8, shape.top_k), shape.width, shape.hidden, shape.top_k, "")
    layer, batch = make_layer(small), make_batch(small, num_tokens, "random")
    try:
        stock(layer, batch, config)
    except Exception as error:
        print(f"{config}: {type(error).__name__}")


def sweep(
    layer: Layer, batches: dict[int, Batch], deadline: float
) -> dict[int, tuple[float, Config]]:
    best: dict[int, tuple[float, Config]] = {}
    for num_tokens, batch in batches.items():
        per_expert = batch.topk_ids.numel() / layer.shape.num_experts
        for config in SWEEP:
            # Tiles far from the pairs an expert has never win.
            least = min(128, per_expert / 16)
            if not least <= config["BLOCK_SIZE_M"] <= max(16, per_expert * 8):
                continue
            if time.monotonic() > deadline:
                return best
            try:
                us = time_us([partial(stock, layer, batch, config)], repeat=3)
            except Exception:
                continue  # too much shared memory
            if num_tokens not in best or us < best[num_tokens][0]:
                best[num_tokens] = us, config
    return best


def measure(args: argparse.Namespace) -> None:
    start = time.monotonic()
    chip = torch.cuda.get_device_name().replace(" ", "_")
    out = args.out / chip
    out.mkdir(parents=True, exist_ok=True)
    shapes = [SHAPES[i] for i in args.shapes]
    copy_tbps, peak_tops = measure_limits()
    print(f"{chip}: copy {copy_tbps:.2f} TB/s, int8 peak {peak_tops:.0f} TOPS")

    def config_file(shape: Shape) -> Path:
        name = f"E={shape.num_experts},N={shape.width},device_name={chip}"
        return TUNED / f"{name},dtype=int8_w8a8.json"

    def load_tuned(shape: Shape) -> dict[int, Config]:
        if not config_file(shape).exists():
            return {}
        stored = json.loads(config_file(shape).read_text())
        return {int(m): c for m, c in stored.items() if m != "triton_version"}

    swept = [s for s in shapes if s.swept and args.sweep]
    if any(set(args.tokens) - set(load_tuned(shape)) for shape in swept):
        # The kernel is the same for all shapes.
        jobs = [(swept[0], config, 64) for config in SWEEP]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            pool.map(compile_one, jobs, chunksize=1)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)

    rows: list[dict[str, Any]] = []
    result = {
        "chip": chip,
        "date": datetime.date.today().isoformat(),
        "copy_tbps": round(copy_tbps, 3),
        "int8_peak_tops": round(peak_tops, 1),
        "versions": {p: _version(p) for p in ("torch", "triton", "humming-kernels")},
        "rows": rows,
    }

    def write() -> None:
        (out / "int8_moe.json").write_text(json.dumps(result, indent=1) + "\n")

    for shape in shapes:
        layer = make_layer(shape)
        tuned = load_tuned(shape) if shape.swept else {}
        missing = [m for m in args.tokens if m not in tuned]
        if shape in swept and missing:
            batches = {m: make_batch(shape, m, "random") for m in missing}
            best = sweep(layer, batches, start + args.seconds / 2)
            tuned |= {m: config for m, (_, config) in best.items()}
            stored: dict[str, Any] = {"triton_version": _version("triton")}
            stored |= {str(m): tuned[m] for m in sorted(tuned)}
            config_file(shape).write_text(json.dumps(stored, indent=4) + "\n")
            print(f"swept, {time.monotonic() - start:.0f} s", flush=True)
        for routing, num_tokens in itertools.product(args.routing, args.tokens):
            if time.monotonic() > start + args.seconds:
                break
            copies = 6 if num_tokens <= 8 else 1
            some = [make_batch(shape, num_tokens, routing) for _ in range(copies)]
            row: dict[str, Any] = {
                "num_experts": shape.num_experts,
                "n": shape.width,
                "k": shape.hidden,
                "topk": shape.top_k,
                "m": num_tokens,
                "routing": routing,
                "stock_us": time_us([partial(stock, layer, b) for b in some]),
                "stock_tuned_us": None,
                "humming_products_us": None,
            }
            if num_tokens in tuned:
                config = tuned[num_tokens]
                row["stock_tuned_us"] = time_us(
                    [partial(stock, layer, b, config) for b in some]
                )
            row["ours_us"] = time_us([partial(ours, layer, b) for b in some])
            limits = [limit_us(shape, b, copy_tbps, peak_tops) for b in some]
            row["limit_us"] = statistics.mean(limits)
            rows.append(row)
            print(format_row(row), flush=True)
            write()
        del layer
        torch.cuda.empty_cache()
    for shape in shapes:
        if shape.swept and time.monotonic() < start + args.seconds:
            measure_humming(shape, rows)
            write()
    plot(result, out / "int8_moe.png")


def profile(args: argparse.Namespace) -> None:
    """Run ours once for each shape and number of tokens, for a profiler to see."""
    for shape in (SHAPES[i] for i in args.shapes):
        layer = make_layer(shape)
        for num_tokens in args.tokens:
            batch = make_batch(shape, num_tokens, args.routing[0])
            for _ in range(3):
                ours(layer, batch)
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                ours(layer, batch)
                torch.cuda.synchronize()


def measure_humming(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """Fill in Humming's times where it is installed and can build its kernels."""
    layer = (shape.num_experts, shape.width, shape.hidden)
    try:
        humming = Humming(shape)
        for row in rows:
            if (row["num_experts"], row["n"], row["k"]) != layer:
                continue
            copies = 6 if row["m"] <= 8 else 1
            some = [make_batch(shape, row["m"], row["routing"]) for _ in range(copies)]
            calls = [humming(b, shape.num_experts) for b in some]
            row["humming_products_us"] = time_us(calls)
            print(format_row(row), flush=True)
    except Exception as error:
        print(f"Humming: {error!r}"[:400])
    torch.cuda.empty_cache()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_row(row: dict[str, Any]) -> str:
    others = ("stock_us", "stock_tuned_us", "humming_products_us")
    times = [row[name] for name in others]
    ratios = [f"{t / row['ours_us']:5.2f}" if t else "    -" for t in times]
    reached = row["limit_us"] / row["ours_us"]
    return (
        f"{row['num_experts']:3}x{row['n']:<4} {row['routing']:6} {row['m']:5} "
        f"ours {row['ours_us']:8.1f}  stock {times[0]:8.1f}  "
        f"ratios {' '.join(ratios)}  limit {row['limit_us']:7.1f} ({reached:4.0%})"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    layers = sorted({(r["num_experts"], r["n"], r["k"]) for r in result["rows"]})
    figure, axes = plt.subplots(
        1, len(layers), figsize=(4 * len(layers), 4), squeeze=False, sharey=True
    )
    for axis, layer in zip(axes[0], layers, strict=True):
        rows = [
            r
            for r in result["rows"]
            if (r["num_experts"], r["n"], r["k"]) == layer and r["routing"] == "random"
        ]
        for name, label in (
            ("ours_us", "ours"),
            ("stock_us", "stock"),
            ("stock_tuned_us", "stock, tuned"),
            ("humming_products_us", "Humming, products"),
        ):
            points = [(r["m"], r["limit_us"] / r[name]) for r in rows if r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(title="{} x {}, hidden {}".format(*layer), xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"share of the limit, {result['chip']}")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--shapes",
        type=int,
        nargs="+",
        default=range(len(SHAPES)),
        metavar="I",
        help="; ".join(f"{i}: {s.source}" for i, s in enumerate(SHAPES)),
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--routing", nargs="+", default=["random", "zipf"])
    parser.add_argument("--sweep", action="store_true", help="sweep upstream's tiles")
    parser.add_argument(
        "--profile", action="store_true", help="run ours once, for ncu; time nothing"
    )
    parser.add_argument("--processes", type=int, default=14, help="to compile with")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="stop after; default: an hour"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    (profile if args.profile else measure)(args)
