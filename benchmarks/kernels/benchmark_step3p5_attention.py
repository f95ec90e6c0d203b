# SPDX-License-Identifier: Apache-2.0
"""Time what is around Step-3.5-Flash's attention on this GPU against upstream's.

    python -m benchmarks.kernels.benchmark_step3p5_attention

For both kinds of layers and each number of tokens: queries and keys normalized and
rotated, and attention's output gated and quantized for `o_proj`; upstream's modules as
torch.compile makes them, with its operator that quantizes, and the Triton kernels.
Times are medians of replays of a CUDA graph on random data, in which our kernels start
while those before end, as in the engine. Before, the results of both are compared.

Writes `<chip>/step3p5_attention.json` and a plot beside it. With --sweep it tries
numbers of heads a program and warps, prints them, and writes nothing.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm.ir
from torch import Tensor, nn

from benchmarks.kernels.benchmark_int8_moe import time_us
from benchmarks.kernels.utils import measure_or_sweep, write_results

HEAD_DIM, KV_HEADS = 128, 8
TOKENS = [1, 8, 64, 256, 1024, 4096, 8192]
POSITIONS = 16384


@dataclass(frozen=True)
class Kind:
    """A kind of attention layer."""

    name: str
    heads: int
    rotary_dim: int


KINDS = [Kind("full", 64, 64), Kind("sliding", 96, 128)]


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


def compare(ours: tuple[Tensor, Tensor], upstreams: tuple[Tensor, Tensor]) -> None:
    """End where they differ by more than roundings of the model's dtype."""
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
    qkv: Tensor
    positions: Tensor
    attention: Tensor
    gate: Tensor


def make_batch(kind: Kind, num_tokens: int) -> Batch:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        edges = Edges(kind).to("cuda", torch.bfloat16)
    columns = kind.heads * HEAD_DIM

    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda").bfloat16()

    return Batch(
        edges,
        random(num_tokens, columns + 2 * KV_HEADS * HEAD_DIM),
        torch.randint(POSITIONS, (num_tokens,), device="cuda"),
        random(num_tokens, columns),
        random(num_tokens, kind.heads),
    )


def measure_row(kind: Kind, num_tokens: int) -> dict[str, Any]:
    batch = make_batch(kind, num_tokens)
    compiled = torch.compile(batch.edges.upstreams, dynamic=False)
    gated = partial(upstreams_gated, torch.compile(gate_heads, dynamic=False))
    qk = batch.qkv, batch.positions
    heads = batch.attention, batch.gate
    row: dict[str, Any] = {"layer": kind.name, "m": num_tokens}
    # Else the norm is an operator that vLLM's own compiler alone looks into.
    with vllm.ir.enable_torch_wrap(False):
        compare(batch.edges.ours(*qk), compiled(*qk))
        compare(ours_gated(*heads), gated(*heads))
        for name, function in (
            ("stock_qk_us", partial(compiled, *qk)),
            ("qk_us", partial(batch.edges.ours, *qk)),
            ("stock_gate_us", partial(gated, *heads)),
            ("gate_us", partial(ours_gated, *heads)),
        ):
            row[name] = time_us([function] * 8)
    torch._dynamo.reset()
    return row


def measure(out: Path, tokens: list[int]) -> None:
    rows: list[dict[str, Any]] = []
    for kind, num_tokens in itertools.product(KINDS, tokens):
        row = measure_row(kind, num_tokens)
        rows.append(row)
        print(
            f"{kind.name:7} {num_tokens:5}: queries and keys "
            f"{row['stock_qk_us']:6.1f} us, {row['qk_us']:6.1f}, "
            f"{row['stock_qk_us'] / row['qk_us']:.2f}x; gate "
            f"{row['stock_gate_us']:6.1f}, {row['gate_us']:6.1f}, "
            f"{row['stock_gate_us'] / row['gate_us']:.2f}x",
            flush=True,
        )
    write_results(out, "step3p5_attention", rows, plot)


def sweep(tokens: list[int]) -> None:
    from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

    for kind, num_tokens in itertools.product(KINDS, tokens):
        batch = make_batch(kind, num_tokens)
        qk = batch.qkv, batch.positions
        for heads, warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
            qk_norm_rope._HEADS_A_PROGRAM = heads
            qk_norm_rope._NUM_WARPS = warps
            us = time_us([partial(batch.edges.ours, *qk)] * 8)
            print(f"{kind.name:7} {num_tokens:5}: {heads:2} {warps} {us:7.1f} us")


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 4.5), sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for colour, name, label in (
            ("C0", "qk_us", "norm and rotation"),
            ("C1", "gate_us", "gate and quantization"),
        ):
            for style, prefix, whose in (("--", "stock_", "upstream"), ("-", "", "")):
                points = [
                    (row["m"], row[prefix + name])
                    for row in result["rows"]
                    if row["layer"] == kind.name
                ]
                of = f"{label}, {whose}" if whose else label
                axis.plot(*zip(*points, strict=True), style, color=colour, label=of)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set(title=f"{kind.name} attention, {kind.heads} heads", xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"microseconds, {result['chip']}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    measure_or_sweep(__doc__, TOKENS, measure, sweep, "heads and warps")
