# SPDX-License-Identifier: Apache-2.0
"""Time the INT8 fused MoE on this GPU against other kernels and against its limit.

    python -m benchmarks.kernels.benchmark_int8_moe

For each shape and number of tokens: upstream's `fused_experts` with its default tiles
and with the best of a sweep, two products alone of other kernels, and this project's
layer, on random data, over several batches where weights would stay in the cache. The
others are Humming (`humming-kernels`, if installed), int8 by int8, and DeepGEMM (the
copy in vLLM's wheel for CUDA), FP8 by FP8: what one would pick on Hopper in place of
INT8. The limit is the larger of the bytes that one pass over the routed experts'
weights and the tokens must move, over the measured copy bandwidth, and the operations
over the peak of the int8 tensor cores.

Writes `<chip>/int8_moe.json` and a plot beside it. With --sweep it first sweeps
upstream's tiles and writes the winners to the overlay's tuned configs, in upstream's
format and place; a later run takes them from there. With --sweep ours it measures tiles
of ours, prints a line for their table, and writes nothing:

    python -m benchmarks.kernels.benchmark_int8_moe --sweep ours --shape 64 1024 2048 8
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import runner
from benchmarks.kernels.runner import Benchmark, Calls, Case, Row, Timed
from benchmarks.plots import Panel

Config = dict[str, int]
TUNED = runner.ROOT / "vllm/model_executor/layers/fused_moe/configs"


class Shape(NamedTuple):
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
TINY = Shape(8, 32, 64, 2, "a dry run")
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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class Fork:
    """What is used of the fork's kernels: tiles are dataclasses of numbers, flags and
    such dataclasses, whatever their fields are called."""

    run_tiles: Callable[[Any, Layer, Batch], Tensor]
    choose: Callable[[Shape, int], Any]  # the table's tiles for so many tokens
    tables: list[Any]  # all tiles that the tables have for this device


@cache
def fork() -> Fork:
    """The one place that knows how the fork's modules are called."""
    from vllm.model_executor.layers.fused_moe.experts.quark_int8 import tiles
    from vllm.model_executor.layers.fused_moe.experts.quark_int8.layer import (
        apply_experts,
    )
    from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
        Experts,
        Routing,
    )

    architecture = tiles.get_architecture()

    def run_tiles(config: Any, layer: Layer, batch: Batch) -> Tensor:
        experts = Experts(layer.w13, layer.w2, layer.w13_scale, layer.w2_scale)
        out = torch.empty_like(batch.x)
        routing = Routing(batch.topk_ids, batch.topk_weights)
        apply_experts(batch.x, experts, routing, out, config)
        return out

    def choose(shape: Shape, num_tokens: int) -> Any:
        experts, width, hidden, top_k = shape[:4]
        sizes = tiles.Shape(num_tokens, top_k, experts, experts, hidden, width)
        return tiles.choose_config(architecture, sizes)

    tables = [
        config
        for name, table in vars(tiles).items()
        if name.startswith(f"_{architecture.upper()}") and isinstance(table, tuple)
        for _, config in table
    ]
    return Fork(run_tiles, choose, list(dict.fromkeys(tables)))


def modular(layer: Layer, batch: Batch) -> Tensor:
    """Ours as the engine calls it, through the modular kernel."""
    return modular_kernel(layer).apply(
        batch.x,
        layer.w13,
        layer.w2,
        batch.topk_weights,
        batch.topk_ids,
        activation=modular_kernel(layer).fused_experts.moe_config.activation,
        global_num_experts=layer.shape.num_experts,
        expert_map=None,
        apply_router_weight_on_input=False,
    )


@lru_cache(maxsize=1)
def modular_kernel(layer: Layer) -> Any:
    from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import (
        Int8Experts,
    )

    from tests.kernels.moe.utils import make_kernel, make_moe_config

    experts, width, hidden, top_k = layer.shape[:4]
    bf16 = torch.bfloat16
    config = make_moe_config(experts, top_k, hidden, width, in_dtype=bf16)
    return make_kernel(Int8Experts, config, quant_config(layer))


def quant_config(layer: Layer) -> Any:
    from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config

    return int8_w8a8_moe_quant_config(
        w1_scale=layer.w13_scale,
        w2_scale=layer.w2_scale,
        a1_scale=None,
        a2_scale=None,
        per_act_token_quant=True,
    )


@lru_cache(maxsize=1)
def make_layer(shape: Shape) -> Layer:
    device = runner.device()

    def weight(rows: int, columns: int) -> Tensor:
        size = (shape.num_experts, rows, columns)
        return torch.empty(size, dtype=torch.int8, device=device).random_(-127, 128)

    def scale(rows: int, columns: int) -> Tensor:
        size = (shape.num_experts, rows, 1)
        return (torch.rand(size, device=device) + 0.5) * 4 / 74 / columns**0.5

    return Layer(
        shape,
        weight(2 * shape.width, shape.hidden),
        weight(shape.hidden, shape.width),
        scale(2 * shape.width, shape.hidden),
        scale(shape.hidden, shape.width),
    )


def make_batch(shape: Shape, num_tokens: int, routing: str) -> Batch:
    """Distinct experts a token: all alike, or with Zipf's frequencies."""
    device = runner.device()
    rank = torch.arange(1, shape.num_experts + 1, device=device)
    chance = torch.ones_like(rank) if routing == "random" else 1 / rank
    uniform = torch.rand(num_tokens, shape.num_experts, device=device)
    # The smallest of exponentially distributed times, at rates that are the chances.
    times = -uniform.clamp(min=1e-30).log() / chance
    topk_ids = times.topk(shape.top_k, largest=False).indices.int()
    weights = torch.rand(num_tokens, shape.top_k, device=device)
    x = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
    return Batch(x, topk_ids, weights / weights.sum(dim=1, keepdim=True))


def make_batches(shape: Shape, num_tokens: int, routing: str) -> list[Batch]:
    """Several where few tokens would leave their experts in the cache."""
    copies = 6 if num_tokens <= 8 and runner.on_gpu() else 1
    return [make_batch(shape, num_tokens, routing) for _ in range(copies)]


def stock(layer: Layer, batch: Batch, config: Config | None = None) -> Tensor:
    """Upstream's layer; its default tiles are named, as the fork finds tuned ones."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    if config is None:
        shape = layer.shape
        sizes = (shape.num_experts, shape.width, shape.hidden, shape.top_k)
        config = get_default_config(batch.x.shape[0], *sizes, dtype=None)
    failed: Exception | None = None
    with override_config(config):
        try:
            return fused_experts(
                batch.x,
                layer.w13,
                layer.w2,
                batch.topk_weights,
                batch.topk_ids,
                quant_config=quant_config(layer),
            )
        except Exception as error:  # which would leave the config behind
            failed = error
    raise failed


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


@lru_cache(maxsize=1)
def make_humming(shape: Shape) -> Humming | None:
    try:
        return Humming(shape)
    except Exception as error:  # not installed, or it does not take the shape
        print(f"Humming: {runner.short(error)}")
        return None


def humming_calls(shape: Shape, batches: list[Batch]) -> Calls | None:
    humming = make_humming(shape) if shape.swept and runner.on_gpu() else None
    if humming is None:
        return None
    try:
        return [humming(batch, shape.num_experts) for batch in batches]
    except Exception as error:
        print(f"Humming: {runner.short(error)}")
        return None


class DeepGemm:
    """DeepGEMM's two grouped products of FP8 (e4m3): a scale for 128 x 128 weights and
    for 128 inputs of a row. Neither SiLU nor quantization nor the sum is in it."""

    BLOCK = 128

    def __init__(self, shape: Shape) -> None:
        from vllm.utils.deep_gemm import (
            get_mk_alignment_for_contiguous_layout,
            m_grouped_fp8_gemm_nt_contiguous,
        )

        self.product = m_grouped_fp8_gemm_nt_contiguous
        self.alignment = get_mk_alignment_for_contiguous_layout()[0]
        w13, w2 = (2 * shape.width, shape.hidden), (shape.hidden, shape.width)
        self.weights = [
            self.make_weights(shape.num_experts, *size) for size in (w13, w2)
        ]

    def make_weights(self, num_experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        """(E, n, k) in FP8, and scales (E, n / 128, k / 128) in float32, rounded up."""
        device, blocks = runner.device(), [-(-size // self.BLOCK) for size in (n, k)]
        w = torch.empty((num_experts, n, k), dtype=torch.float8_e4m3fn, device=device)
        for expert in w:  # one at a time: torch draws no FP8
            expert.copy_(torch.randn((n, k), device=device) * 50)  # e4m3 ends at 448
        return w, torch.rand((num_experts, *blocks), device=device) + 0.5

    def layout(self, batch: Batch, num_experts: int) -> Tensor:
        """Each row's expert, int32; an expert has whole blocks of rows, or none."""
        counts = batch.topk_ids.flatten().long().bincount(minlength=num_experts)
        filled = (counts + self.alignment - 1) // self.alignment * self.alignment
        experts = torch.arange(num_experts, dtype=torch.int32, device=counts.device)
        return experts.repeat_interleave(filled)

    def __call__(self, batch: Batch, num_experts: int) -> Callable[[], None]:
        m_indices = self.layout(batch, num_experts)
        num_rows, calls = len(m_indices), []
        for w, scale in self.weights:
            n, k = w.shape[1:]
            x = torch.randn((num_rows, k), device=w.device).to(w.dtype)
            # The kernel reads a block's scales of neighbouring rows at once.
            x_scale = torch.rand((-(-k // self.BLOCK), num_rows), device=w.device).t()
            out = batch.x.new_empty((num_rows, n))
            calls.append(((x, x_scale + 0.5), (w, scale), out, m_indices))

        def run() -> None:
            for call in calls:
                self.product(*call)

        return run


@lru_cache(maxsize=1)
def make_deep_gemm(shape: Shape) -> DeepGemm | None:
    try:
        return DeepGemm(shape)
    except Exception as error:  # not in this wheel, or not for this GPU
        print(f"DeepGEMM: {runner.short(error)}")
        return None


def deep_gemm_calls(shape: Shape, batches: list[Batch]) -> Calls | None:
    deep_gemm = make_deep_gemm(shape) if runner.on_gpu() else None
    if deep_gemm is None:
        return None
    return [deep_gemm(batch, shape.num_experts) for batch in batches]


def prepare(
    shape: Shape, num_tokens: int, routing: str, tuned: dict[int, Config]
) -> Timed:
    layer, batches = make_layer(shape), make_batches(shape, num_tokens, routing)
    config = tuned.get(num_tokens)
    return Timed(
        {
            "stock_us": [partial(stock, layer, b) for b in batches],
            "stock_tuned_us": [partial(stock, layer, b, config) for b in batches]
            if config
            else None,
            "humming_products_us": humming_calls(shape, batches),
            "deepgemm_products_us": deep_gemm_calls(shape, batches),
            "ours_us": [partial(modular, layer, b) for b in batches],
        },
        limit_us(shape, batches),
    )


def limit_us(shape: Shape, batches: list[Batch]) -> float | None:
    limits = []
    for batch in batches:
        active = batch.topk_ids.unique().numel()
        num_tokens = batch.x.shape[0]
        weights = 3 * shape.width * shape.hidden
        moved = active * weights + 4 * num_tokens * shape.hidden
        operations = 2 * num_tokens * shape.top_k * weights
        limits.append(runner.limit_us(moved, operations))
    return None if None in limits else statistics.mean(filter(None, limits))


# Tiles of upstream's kernel.


def config_file(shape: Shape) -> Path:
    name = f"E={shape.num_experts},N={shape.width},device_name={runner.chip()}"
    return TUNED / f"{name},dtype=int8_w8a8.json"


def load_tuned(shape: Shape) -> dict[int, Config]:
    if not shape.swept or not config_file(shape).exists():
        return {}
    stored = json.loads(config_file(shape).read_text())
    return {int(m): c for m, c in stored.items() if m != "triton_version"}


def compile_one(job: tuple[Shape, Config, int]) -> None:
    """Fill the compiler's cache from another process, with a small layer."""
    shape, config, num_tokens = job
    small = shape._replace(num_experts=max(8, shape.top_k))
    layer, batch = make_layer(small), make_batch(small, num_tokens, "random")
    try:
        stock(layer, batch, config)
    except Exception as error:
        print(f"{config}: {type(error).__name__}")


def sweep_upstreams(shapes: list[Shape], args: argparse.Namespace) -> None:
    """Find upstream's best tiles where there are none yet, and write them down."""
    started = time.monotonic()
    deadline = started + args.seconds / 2
    missing = {
        shape: [m for m in args.tokens if m not in load_tuned(shape)]
        for shape in shapes
        if shape.swept
    }
    missing = {shape: tokens for shape, tokens in missing.items() if tokens}
    if not missing:
        return
    # The kernel is the same for all shapes.
    jobs = [(next(iter(missing)), config, 64) for config in SWEEP]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for shape, tokens in missing.items():
        best = load_tuned(shape)
        for num_tokens in tokens:
            if time.monotonic() < deadline:
                best |= best_of_upstreams(shape, num_tokens, deadline)
        stored: dict[str, Any] = {"triton_version": runner.version("triton")}
        stored |= {str(m): best[m] for m in sorted(best)}
        config_file(shape).write_text(json.dumps(stored, indent=4) + "\n")
        print(f"swept, {time.monotonic() - started:.0f} s", flush=True)


def best_of_upstreams(
    shape: Shape, num_tokens: int, deadline: float
) -> dict[int, Config]:
    """By the number of tokens; nothing where none runs."""
    layer, batch = make_layer(shape), make_batch(shape, num_tokens, "random")
    per_expert = num_tokens * shape.top_k / shape.num_experts
    # Tiles far from the pairs an expert has never win.
    least, most = min(128, per_expert / 16), max(16, per_expert * 8)
    times: list[tuple[float, Config]] = []
    for config in SWEEP:
        if not least <= config["BLOCK_SIZE_M"] <= most or (
            times and time.monotonic() > deadline
        ):
            continue
        try:
            us = runner.time_us([partial(stock, layer, batch, config)], repeat=3)
        except Exception:
            continue  # too much shared memory
        times.append((us, config))
    best = min(times, key=lambda one: one[0], default=None)
    return {num_tokens: best[1]} if best else {}


# Tiles of ours.


def neighbours(tiles: Any) -> Iterator[Any]:
    """Tiles that differ in one number or flag: half, double, or one more or less."""
    for one in fields(tiles):
        value = getattr(tiles, one.name)
        others: list[Any] = []
        if is_dataclass(value):
            others = list(neighbours(value))
        elif isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            counts = any(of in one.name for of in ("stages", "ctas"))
            steps = [value - 1, value + 1] if counts else [value // 2, value * 2]
            others = [n for n in steps if n >= (0 if value == 0 else 1) and n != value]
        for other in others:
            yield replace(tiles, **{one.name: other})


def written(tiles: Any) -> str:
    """As code, without what is the default."""
    if not is_dataclass(tiles):
        return repr(tiles)
    shown = [
        f"{one.name}={written(getattr(tiles, one.name))}"
        for one in fields(tiles)
        if getattr(tiles, one.name) != one.default
    ]
    return f"{type(tiles).__name__}({', '.join(shown)})"


class Climb:
    """The search for tiles of a layer and number of tokens, from the table's on."""

    def __init__(self, shape: Shape, num_tokens: int, routing: str) -> None:
        self.layer = make_layer(shape)
        self.batches = make_batches(shape, num_tokens, routing)
        self.best = self.chosen = fork().choose(shape, num_tokens)
        self.expected = self.run(self.chosen)
        self.tried = {self.chosen}
        self.mine = runner.replay(self.calls(self.chosen))
        self.ratio = 1.0  # of the table's time to that of the best

    def run(self, tiles: Any) -> Tensor:
        return fork().run_tiles(tiles, self.layer, self.batches[0]).float()

    def calls(self, tiles: Any) -> Calls:
        run = fork().run_tiles
        return [partial(run, tiles, self.layer, batch) for batch in self.batches]

    def speed(self, tiles: Any) -> float:
        """How many times as fast as the table's tiles; 0 where they do not work."""
        try:
            error = (self.run(tiles) - self.expected).norm() / self.expected.norm()
            if not error < 0.01:
                print(f"    wrong by {error:.0%}: {written(tiles)}")
                return 0.0
            replays = {"table": self.mine, "tiles": runner.replay(self.calls(tiles))}
        except Exception:  # what does not compile, or takes too much memory
            return 0.0
        times = runner.take_turns(replays, repeat=5)
        return times["table"] / times["tiles"]

    def climb(self, candidates: list[Any], rounds: int, deadline: float) -> None:
        """Go to the fastest of the candidates, then to its neighbours, and so on."""
        for _ in range(rounds):
            before = self.ratio
            for tiles in candidates:
                if tiles in self.tried or time.monotonic() > deadline:
                    continue
                self.tried.add(tiles)
                if (ratio := self.speed(tiles)) > self.ratio:
                    self.ratio, self.best = ratio, tiles
            # Less is what runs differ by.
            if self.ratio < before * 1.01 and candidates is not fork().tables:
                break
            candidates = list(neighbours(self.best))


def sweep_ours(shapes: list[Shape], args: argparse.Namespace) -> None:
    """Print a line of the table for each number of tokens of each shape."""
    deadline = time.monotonic() + args.seconds
    for shape, num_tokens in itertools.product(shapes, args.tokens):
        climb = Climb(shape, num_tokens, args.routing[0])
        climb.climb(fork().tables, args.rounds, deadline)
        per_expert = num_tokens * shape.top_k / shape.num_experts
        us = runner.take_turns({"": climb.mine})[""]
        print(
            f"    # {shape.num_experts} x {shape.width}, hidden {shape.hidden}, top "
            f"{shape.top_k}, {num_tokens} tokens: {us / climb.ratio:.1f} us, the "
            f"table's {us:.1f} ({climb.ratio:.2f}); {len(climb.tried)} tried\n"
            f"    ({per_expert:g}, {written(climb.best)}),",
            flush=True,
        )


def profile(shapes: list[Shape], args: argparse.Namespace) -> None:
    """Run ours once for each shape and number of tokens, for a profiler to see."""
    for shape, num_tokens in itertools.product(shapes, args.tokens):
        layer, batch = make_layer(shape), make_batch(shape, num_tokens, args.routing[0])
        for _ in range(3):
            modular(layer, batch)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            modular(layer, batch)
            torch.cuda.synchronize()


def panels(rows: list[Row]) -> list[Panel]:
    found = []
    for layer in sorted({(row["num_experts"], row["n"], row["k"]) for row in rows}):
        of = [
            row
            for row in rows
            if (row["num_experts"], row["n"], row["k"]) == layer
            and row["routing"] == "random"
        ]
        lines = [
            runner.line(label, of, name, over="limit_us")
            for name, label in (
                ("ours_us", "ours"),
                ("stock_us", "stock"),
                ("stock_tuned_us", "stock, tuned"),
                ("humming_products_us", "Humming, products"),
                ("deepgemm_products_us", "DeepGEMM FP8, products"),
            )
        ]
        found.append(Panel("{} x {}, hidden {}".format(*layer), lines))
    return found


BENCHMARK = Benchmark(
    "int8_moe",
    ours={"ours_us": "stock_us"},
    panels=panels,
    ylabel="share of the limit",
    has_limit=True,
)


def parse_args() -> argparse.Namespace:
    parser = runner.make_parser(__doc__, TOKENS)
    parser.add_argument(
        "--shapes",
        type=int,
        nargs="+",
        default=range(len(SHAPES)),
        metavar="I",
        help="; ".join(f"{i}: {s.source}" for i, s in enumerate(SHAPES)),
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar=("E", "N", "K", "TOPK"),
        help="another one: experts, width and hidden size of a rank, experts a token",
    )
    parser.add_argument("--routing", nargs="+", default=["random", "zipf"])
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="upstream",
        choices=["upstream", "ours"],
        help="tiles of upstream's kernel, before; or of ours, and nothing else",
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="of neighbours, for --sweep ours"
    )
    parser.add_argument(
        "--profile", action="store_true", help="run ours once, for ncu; time nothing"
    )
    parser.add_argument("--processes", type=int, default=14, help="to compile with")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="stop after; default: an hour"
    )
    return runner.parse(parser, interpreted_tokens=[1, 9])


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + args.seconds
    shapes = [TINY] if args.interpret else [SHAPES[i] for i in args.shapes]
    if args.shape:
        experts, width, hidden, top_k = args.shape
        shapes = [Shape(experts, width, hidden, top_k, "named on the command line")]
    if args.profile:
        profile(shapes, args)
        return
    if args.sweep == "ours":
        sweep_ours(shapes, args)
        return
    copy_tbps = runner.rounded(runner.copy_tbps(), 3)
    peak_tops = runner.rounded(runner.int8_peak_tops(), 1)
    print(f"{runner.chip()}: copy {copy_tbps} TB/s, int8 peak {peak_tops} TOPS")
    if args.sweep:
        sweep_upstreams(shapes, args)
    cases = [
        Case(
            {
                "num_experts": shape.num_experts,
                "n": shape.width,
                "k": shape.hidden,
                "topk": shape.top_k,
                "m": num_tokens,
                "routing": routing,
            },
            partial(prepare, shape, num_tokens, routing, load_tuned(shape)),
        )
        for shape in shapes
        for routing, num_tokens in itertools.product(args.routing, args.tokens)
    ]
    packages = ("torch", "triton", "humming-kernels")
    BENCHMARK.measure(
        cases,
        args.out,
        deadline,
        copy_tbps=copy_tbps,
        int8_peak_tops=peak_tops,
        versions={package: runner.version(package) for package in packages},
    )


if __name__ == "__main__":
    main()
