# SPDX-License-Identifier: Apache-2.0
"""Time what is around Step-3.5-Flash's attention on this GPU against upstream's.

    python -m benchmarks.kernels.benchmark_step3p5_attention

For both kinds of layers and each number of tokens: queries and keys normalized and
rotated, and attention's output gated and quantized for `o_proj`; upstream's modules as
torch.compile makes them, with its operator that quantizes, and the Triton kernels. In
the graphs our kernels start while those before end, as in the engine. Before, the
results of both are compared.

Writes `<chip>/step3p5_attention.json` and a plot beside it. With --sweep it tries
numbers of heads a program and warps, prints the best, and writes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import runner
from benchmarks.kernels.runner import Benchmark, Calls, Case, Row, Timed
from benchmarks.plots import Panel

HEAD_DIM, KV_HEADS = 128, 8
TOKENS = [1, 8, 64, 256, 1024, 4096, 8192]
POSITIONS = 16384
REPEATS = 8  # of a call in a graph


@dataclass(frozen=True)
class Kind:
    """A kind of attention layer."""

    name: str
    heads: int
    rotary_dim: int


KINDS = [Kind("full", 64, 64), Kind("sliding", 96, 128)]
TINY = [Kind("full", 8, 64)]


class Edges(nn.Module):
    """What upstream's attention layer does around attention, and ours."""

    def __init__(self, kind: Kind) -> None:
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm
        from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

        super().__init__()
        self.num_heads, self.num_kv_heads = kind.heads, KV_HEADS
        self.sizes = [n * HEAD_DIM for n in (kind.heads, KV_HEADS, KV_HEADS)]
        self.rotary_emb = RotaryEmbedding(
            HEAD_DIM, kind.rotary_dim, POSITIONS, 10000, True, torch.bfloat16
        )
        self.q_norm, self.k_norm = GemmaRMSNorm(HEAD_DIM), GemmaRMSNorm(HEAD_DIM)
        nn.init.normal_(self.q_norm.weight, std=0.1)
        nn.init.normal_(self.k_norm.weight, std=0.1)

    def upstreams(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.split(self.sizes, dim=-1)
        q, k = (
            norm(x.view(len(x), -1, HEAD_DIM).contiguous()).view(x.shape)
            for norm, x in ((self.q_norm, q), (self.k_norm, k))
        )
        return self.rotary_emb.forward_native(positions, q, k)

    def ours(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

        return qk_norm_rope.queries_and_keys(self, positions, qkv)


def gate_heads(x: Tensor, gate: Tensor) -> Tensor:
    heads = x.view(*gate.shape, HEAD_DIM) * gate.unsqueeze(-1).sigmoid()
    return heads.view(x.shape)


def ours_gated(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens

    return int8_few_tokens.run_gate_and_quantize(x, None, gate)


def upstreams_gated(
    compiled: Callable[[Tensor, Tensor], Tensor], x: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    from vllm import _custom_ops as ops

    xq, scale, _ = ops.scaled_int8_quant(compiled(x, gate))
    return xq, scale


def compare(ours: tuple[Tensor, ...], upstreams: tuple[Tensor, ...]) -> None:
    """Raise where they differ by more than roundings of the model's dtype."""
    for found, expected in zip(ours, upstreams, strict=True):
        if found.dtype == torch.int8:
            # Upstream rounds what it gates before it quantizes: one step.
            rtol, atol = 0.0, 1.0
        elif found.dtype == torch.float32:  # scales
            rtol, atol = 2**-6, 0.0
        else:
            # Heads are below 8, of which a bfloat16 is at most 2**-5 from the next.
            rtol, atol = 2**-6, 2**-4
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=rtol, atol=atol
        )


@dataclass(frozen=True)
class Batch:
    edges: Edges
    qk: tuple[Tensor, Tensor]  # queries, keys and values; positions
    heads: tuple[Tensor, Tensor]  # what is gated, and its gate


def make_batch(kind: Kind, num_tokens: int) -> Batch:
    from vllm.config import VllmConfig, set_current_vllm_config

    device = runner.device()
    with set_current_vllm_config(VllmConfig()):
        edges = Edges(kind).to(device, torch.bfloat16)

    def random(columns: int) -> Tensor:
        return torch.randn(num_tokens, columns, device=device).bfloat16()

    columns = kind.heads * HEAD_DIM
    positions = torch.randint(POSITIONS, (num_tokens,), device=device)
    qkv = random(columns + 2 * KV_HEADS * HEAD_DIM)
    return Batch(edges, (qkv, positions), (random(columns), random(kind.heads)))


def prepare(kind: Kind, num_tokens: int) -> Timed:
    torch._dynamo.reset()  # of another number of tokens
    batch = make_batch(kind, num_tokens)
    edges = batch.edges

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        # What a dry run compiles for a CPU it would not use again.
        return torch.compile(function, dynamic=False) if runner.on_gpu() else function

    stock_qk = partial(compiled(edges.upstreams), *batch.qk)
    stock_gate = partial(upstreams_gated, compiled(gate_heads), *batch.heads)
    qk, gate = partial(edges.ours, *batch.qk), partial(ours_gated, *batch.heads)
    compare(qk(), stock_qk())
    if runner.on_gpu():  # upstream's operator rounds otherwise on a CPU
        compare(gate(), stock_gate())
    functions = (stock_qk, qk, stock_gate, gate)
    names = ("stock_qk_us", "qk_us", "stock_gate_us", "gate_us")
    return Timed({n: [f] * REPEATS for n, f in zip(names, functions, strict=True)})


def sweep(kinds: list[Kind], tokens: list[int]) -> None:
    from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

    def candidates(batch: Batch) -> Iterator[tuple[str, Calls]]:
        for heads, warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
            qk_norm_rope._HEADS_A_PROGRAM = heads
            qk_norm_rope._NUM_WARPS = warps
            calls = [partial(batch.edges.ours, *batch.qk)] * REPEATS
            yield f"{heads} heads a program, {warps} warps", calls

    for kind, num_tokens in itertools.product(kinds, tokens):
        batch = make_batch(kind, num_tokens)
        runner.best_tiles(f"{kind.name} {num_tokens}", None, candidates(batch))


def panels(rows: list[Row]) -> list[Panel]:
    found = []
    for kind in dict.fromkeys(row["layer"] for row in rows):
        of = [row for row in rows if row["layer"] == kind]
        lines = []
        for color, name, what in (
            ("C0", "qk_us", "norm and rotation"),
            ("C1", "gate_us", "gate and quantization"),
        ):
            for style, figure, whose in (
                ("--", f"stock_{name}", ", upstream"),
                ("-", name, ""),
            ):
                lines.append(
                    runner.line(what + whose, of, figure, style=style, color=color)
                )
        found.append(Panel(f"{kind} attention", lines))
    return found


BENCHMARK = Benchmark(
    "step3p5_attention",
    ours={"qk_us": "stock_qk_us", "gate_us": "stock_gate_us"},
    panels=panels,
    ylabel="microseconds",
    log=True,
)


def main() -> None:
    parser = runner.make_parser(__doc__, TOKENS)
    parser.add_argument("--sweep", action="store_true", help="try heads and warps")
    args = runner.parse(parser, interpreted_tokens=[2])
    kinds = TINY if args.interpret else KINDS
    if args.sweep:
        sweep(kinds, args.tokens)
        return
    import vllm.ir

    cases = [
        Case({"layer": kind.name, "m": m}, partial(prepare, kind, m))
        for kind, m in itertools.product(kinds, args.tokens)
    ]
    # Else the norm is an operator that vLLM's own compiler alone looks into.
    with vllm.ir.enable_torch_wrap(False):
        BENCHMARK.measure(cases, args.out)


if __name__ == "__main__":
    main()
