# SPDX-License-Identifier: Apache-2.0
"""Heads of queries and keys normalized and rotated by one kernel, against float64.

On a GPU if there is one, else in Triton's interpreter, which cuts bfloat16 off where
GPUs round, so that it takes the other dtypes.
"""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.kernels import int8_triton
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.rotary_embedding import (
    MRotaryEmbedding,
    RotaryEmbedding,
    qk_norm_rope,
)
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import (
    YaRNScalingRotaryEmbedding,
)

from tests.kernels.utils import DEVICE, GPU, interpreted
from tests.platforms import pretended

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
EPS = 1e-5
# Upstream's modules ask for it.
pytestmark = pytest.mark.usefixtures("vllm_config")


def in_float64(
    heads: Tensor, positions: Tensor, cos_sin: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """heads [M, heads, head_dim]: the norm is rounded, what is rotated is not. Then the
    size of what is added up."""
    x = heads.double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight.double())
    x = x.to(heads.dtype).double()
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].double()[:, None].split(half, dim=-1)
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)
    size = (x1 * cos).abs() + (x2 * sin).abs(), (x2 * cos).abs() + (x1 * sin).abs()
    return rotated.flatten(1), torch.cat([*size, rest.abs()], dim=-1).flatten(1)


def make_rope(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> RotaryEmbedding:
    return RotaryEmbedding(head_dim, rotary_dim, 50, 10000, True, dtype).to(DEVICE)


def make_weights(head_dim: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gemma's, which are added to 1."""
    q, k = (
        (torch.randn(2, head_dim, generator=rng, device="cpu") / 4)
        .bfloat16()
        .to(DEVICE)
    )
    return q, k


@interpreted
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(5, 64, 8, 128, 64), (3, 96, 8, 128, 128), (1, 3, 1, 16, 16), (7, 17, 2, 24, 16)],
)
def test_matches_float64(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    index: torch.dtype,
    rng: torch.Generator,
) -> None:
    """In rows that are parts of longer ones; what is not rotated too."""
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    size = num_tokens, columns + 16
    wide = torch.randn(size, generator=rng, dtype=torch.float32, device="cpu").to(
        DEVICE, dtype
    )
    qkv = wide[:, :columns]
    positions = torch.randint(50, (num_tokens,), generator=rng, device="cpu")
    positions = positions.to(DEVICE, index)
    cos_sin = make_rope(head_dim, rotary_dim, dtype).cos_sin_cache
    q_weight, k_weight = make_weights(head_dim, rng)
    before = wide.clone()
    q, k = torch.ops.quark_int8.qk_norm_rope(
        qkv, positions, cos_sin, q_weight, k_weight, EPS, num_heads, num_kv_heads
    )
    assert torch.equal(wide, before)
    q_part, k_part, _ = qkv.split(
        [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)], dim=-1
    )
    step = torch.finfo(dtype).eps
    for found, part, weight in ((q, q_part, q_weight), (k, k_part, k_weight)):
        assert found.shape == part.shape and found.dtype == dtype
        heads = part.reshape(num_tokens, -1, head_dim)
        wanted, total = in_float64(heads, positions, cos_sin, weight)
        error = (found.double() - wanted).abs()
        # float32 may move a norm across a rounding boundary, and counts itself there.
        assert (error <= step * (wanted.abs() + 4 * total)).all()
        if dtype != torch.float32:
            half_a_step = step / 2 * wanted.abs() + 1e-6 * total
            assert (error <= half_a_step).double().mean() > 0.98


@interpreted
@pytest.mark.parametrize("rotary_dim", [64, 128])
def test_matches_upstreams_modules(rotary_dim: int, rng: torch.Generator) -> None:
    """Their norm, then their rotation, where positions and heads differ."""
    size = 6, (5 + 2 * 2) * 128
    qkv = torch.randn(size, generator=rng, dtype=torch.float32, device="cpu").to(DEVICE)
    positions = torch.tensor([0, 7, 49, 3, 3, 1], dtype=torch.int64, device=DEVICE)
    rope = make_rope(128, rotary_dim, torch.float32)
    norms = [GemmaRMSNorm(128, EPS).to(DEVICE) for _ in range(2)]
    for norm, weight in zip(norms, make_weights(128, rng), strict=True):
        norm.weight.data = weight
    q, k, _ = qkv.split([5 * 128, 2 * 128, 2 * 128], dim=-1)
    expected = rope.forward_native(
        positions,
        norms[0].forward_native(q.reshape(6, 5, 128)).reshape(6, -1),
        norms[1].forward_native(k.reshape(6, 2, 128)).reshape(6, -1),
    )
    layer = SimpleNamespace(
        rotary_emb=rope,
        q_norm=norms[0],
        k_norm=norms[1],
        num_heads=5,
        num_kv_heads=2,
    )
    found = qk_norm_rope.queries_and_keys(layer, positions, qkv)
    for ours, upstreams in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, upstreams, rtol=1e-6, atol=2e-6)


def test_no_tokens() -> None:
    qkv = torch.empty(0, 4 * 16, dtype=torch.bfloat16)
    cos_sin, weight = torch.empty(50, 16), torch.empty(16)
    q, k = torch.ops.quark_int8.qk_norm_rope(
        qkv, torch.empty(0, dtype=torch.int64), cos_sin, weight, weight, EPS, 2, 1
    )
    assert q.shape == (0, 32) and k.shape == (0, 16)


def layer_of(rotary_emb: Any, use_rope: bool = True) -> Any:
    return SimpleNamespace(rotary_emb=rotary_emb, use_rope=use_rope)


def test_serves_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation of halves by a table alone; yarn's is one, with another table."""
    dtype = torch.bfloat16
    qkv = torch.empty(1, 64, dtype=dtype)
    rope = RotaryEmbedding(16, 16, 8, 10000, True, dtype)
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(8, 0))
    assert not qk_norm_rope.serves(layer_of(rope), qkv)
    with monkeypatch.context() as asked:
        asked.setenv("VLLM_QUARK_INT8_KERNELS", "on")
        assert qk_norm_rope.serves(layer_of(rope), qkv)
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(9, 0))
    yarn = YaRNScalingRotaryEmbedding(
        16, 16, 8, 10000, True, scaling_factor=2, dtype=dtype
    )
    assert qk_norm_rope.serves(layer_of(rope), qkv)
    assert qk_norm_rope.serves(layer_of(yarn), qkv)
    half = RotaryEmbedding(16, 16, 8, 10000, True, torch.float16)
    assert qk_norm_rope.serves(layer_of(half), qkv.half())
    assert not qk_norm_rope.serves(layer_of(rope, use_rope=False), qkv)
    assert not qk_norm_rope.serves(layer_of(rope), qkv[None])
    assert not qk_norm_rope.serves(layer_of(rope), qkv.half()), "another table"
    single = RotaryEmbedding(16, 16, 8, 10000, True, torch.float32)
    assert not qk_norm_rope.serves(layer_of(single), qkv.float())
    for other in (
        RotaryEmbedding(16, 16, 8, 10000, False, dtype),
        RotaryEmbedding(16, 12, 8, 10000, True, dtype),
        RotaryEmbedding(28, 16, 8, 10000, True, dtype),
        MRotaryEmbedding(16, 16, 8, 10000, True, dtype, [2, 3, 3]),
        RotatedOtherwise(16, 16, 8, 10000, True, dtype),
        torch.nn.Identity(),
    ):
        assert not qk_norm_rope.serves(layer_of(other), qkv)


class RotatedOtherwise(RotaryEmbedding):
    def forward_native(self, *arguments: Any) -> Any:
        raise NotImplementedError


def test_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile asks `serves` and finds the operator, without a graph break."""
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(9, 0))
    rope = RotaryEmbedding(16, 16, 8, 10000, True, torch.bfloat16)
    layer: Any = torch.nn.Module()
    layer.rotary_emb, layer.use_rope = rope, True
    layer.q_norm, layer.k_norm = GemmaRMSNorm(16, EPS), GemmaRMSNorm(16, EPS)
    layer.num_heads, layer.num_kv_heads = 2, 1

    def attend(qkv: Tensor, positions: Tensor) -> Tensor:
        if qk_norm_rope.serves(layer, qkv):
            return qk_norm_rope.queries_and_keys(layer, positions, qkv)[0]
        return qkv

    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(attend, backend=keep, fullgraph=True)(
        torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int64)
    )
    [graph] = graphs
    assert torch.ops.quark_int8.qk_norm_rope in {
        node.target for node in graph.graph.nodes
    }


def test_importing_the_model_is_enough() -> None:
    """A graph from torch.compile's cache names the operator, and nothing else runs."""
    code = (
        "import torch, vllm.model_executor.models.step3p5\n"
        "print(torch.ops.quark_int8.qk_norm_rope)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "quark_int8.qk_norm_rope" in done.stdout, done.stderr[-2000:]
