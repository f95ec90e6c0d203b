# SPDX-License-Identifier: Apache-2.0
"""Step-3.5's attention asks kernels of ours: before it for queries and keys, after it
where its INT8 output layer quantizes its heads with their gate."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear.scaled_mm import int8_gated
from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
    FewTokensInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod
from vllm.model_executor.layers.rotary_embedding import qk_norm_rope
from vllm.model_executor.models.step3p5 import Step3p5Attention

from tests.kernels.utils import DEVICE, interpreted
from tests.quantization.utils import random_int8, random_scales

HEADS, HEAD_DIM = 3, 4


def run(qkv: Tensor, attn: Any, gate: Tensor) -> Tensor:
    """Upstream's `forward`, of which nothing but these and o_proj does anything."""
    size = HEADS * HEAD_DIM
    module = SimpleNamespace(
        qkv_proj=lambda x: (qkv, None),
        q_size=size,
        kv_size=size,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        q_norm=lambda x: x,
        k_norm=lambda x: x,
        use_rope=False,
        attn=attn,
        use_head_wise_attn_gate=True,
        g_proj=lambda x: (gate, None),
        o_proj=lambda x: (x, None),
    )
    module.attend = partial(Step3p5Attention.attend, module)
    return Step3p5Attention.forward(module, torch.arange(2), torch.zeros(2, 8))


def test_attention_takes_queries_and_keys(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Patch 0026: instead of upstream's norms and rotation, wherever it serves."""
    qkv = torch.randn(2, 3 * HEADS * HEAD_DIM, generator=rng)
    gate = torch.full((2, HEADS), torch.inf)
    taken = []

    def attn(*arguments: Tensor) -> Tensor:
        taken.append(arguments)
        return arguments[0]

    run(qkv, attn, gate)
    monkeypatch.setattr(qk_norm_rope, "serves", lambda layer, x: x is qkv)
    monkeypatch.setattr(
        qk_norm_rope,
        "queries_and_keys",
        lambda layer, positions, x: (x[:, :12] + positions[:, None], x[:, 12:24] + 3),
    )
    run(qkv, attn, gate)
    (q, k, v), (our_q, our_k, our_v) = taken
    torch.testing.assert_close(torch.cat([q, k, v], 1), qkv, rtol=0, atol=0)
    torch.testing.assert_close(our_q, q + torch.arange(2)[:, None])
    torch.testing.assert_close(our_k, k + 3)
    assert torch.equal(our_v, v)


def attend(attention: Tensor, gate: Tensor) -> Tensor:
    """`forward` with this output of attention."""
    return run(torch.zeros(2, 3 * HEADS * HEAD_DIM), lambda q, k, v: attention, gate)


def test_attention_hands_its_gate_over(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Patch 0025: instead of what upstream does, wherever it serves."""
    attention = torch.randn(2, HEADS * HEAD_DIM, generator=rng)
    gate = torch.randn(2, HEADS, generator=rng)
    expected = attend(attention, gate)
    by_head = attention.view(2, HEADS, HEAD_DIM) * gate.sigmoid()[..., None]
    torch.testing.assert_close(expected, by_head.flatten(1))
    asked = []

    def gated_linear(layer: Any, x: Tensor, gate: Tensor) -> str:
        asked.append((layer(1), x, gate))
        return "out"

    monkeypatch.setattr(int8_gated, "serves_gate", lambda layer: True)
    monkeypatch.setattr(int8_gated, "gated_linear", gated_linear)
    assert attend(attention, gate) == "out"
    [(layers, x, its_gate)] = asked
    assert layers == (1, None) and x is attention and its_gate is gate


def make_layer(**changes: Any) -> Any:
    """A row-parallel layer with INT8 weights, as far as these functions look."""
    layer: Any = RowParallelLinear.__new__(RowParallelLinear)
    nn.Module.__init__(layer)
    kernel = object.__new__(FewTokensInt8ScaledMMLinearKernel)
    kernel._get_layer_params = lambda of: ("weight", "scale", None, None, None)
    about: dict[str, Any] = {
        "quant_method": QuarkLinearMethod.__new__(QuarkLinearMethod),
        "scheme": SimpleNamespace(kernel=kernel),
        "input_is_parallel": True,
        "bias": None,
        "reduce_results": True,
        "tp_size": 1,
    }
    for name, value in (about | changes).items():
        setattr(layer, name, value)
    return layer


def test_serves_row_parallel_layers_of_its_kernel() -> None:
    assert int8_gated.serves_gate(make_layer())
    assert not int8_gated.serves_gate(make_layer(input_is_parallel=False))
    assert not int8_gated.serves_gate(make_layer(bias=nn.Parameter(torch.zeros(1))))
    others = SimpleNamespace(kernel=object())
    assert not int8_gated.serves_gate(make_layer(scheme=others))
    assert not int8_gated.serves_gate(make_layer(scheme=SimpleNamespace()))
    # One that transforms its input before, for one.
    assert not int8_gated.serves_gate(make_layer(quant_method=object()))
    # What is around a layer, LoRA's for one, has more to do.
    around = nn.Module()
    around.scheme = make_layer().scheme
    assert not int8_gated.serves_gate(around)
    assert not int8_gated.serves_gate(
        ColumnParallelLinear.__new__(ColumnParallelLinear)
    )


@interpreted
@pytest.mark.parametrize("reduce_results", [True, False])
def test_ranks_add_up(
    reduce_results: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks has half of the heads, and their results, which are added up
    where the layer is to, make that of one. One input scale makes them exact."""
    heads, head_dim, rows = 4, 16, 33
    x = torch.randn(2, heads, head_dim, generator=rng).to(DEVICE)
    gate = torch.randn(2, heads, generator=rng).to(DEVICE)
    weight = random_int8(rows, heads * head_dim, rng=rng).to(DEVICE)
    scale = random_scales(rows, 1, rng=rng).to(DEVICE)
    input_scale = torch.tensor(1 / 64, device=DEVICE)
    reduced: list[Tensor] = []

    def all_reduce(out: Tensor) -> Tensor:
        reduced.append(out)
        return out

    monkeypatch.setattr(int8_gated, "tensor_model_parallel_all_reduce", all_reduce)

    def run_share(rank: int, size: int) -> Tensor:
        half = slice(rank * heads // size, (rank + 1) * heads // size)
        columns = weight.view(rows, heads, head_dim)[:, half].flatten(1).contiguous()
        layer = make_layer(tp_size=size, reduce_results=reduce_results)
        parameters = columns.t(), scale, input_scale, None, None
        layer.scheme.kernel._get_layer_params = lambda of: parameters
        mine = x[:, half].flatten(1), gate[:, half].contiguous()
        return int8_gated.gated_linear(layer, *mine)

    one = run_share(0, 1)
    assert not reduced
    two = run_share(0, 2), run_share(1, 2)
    assert len(reduced) == (2 if reduce_results else 0)
    torch.testing.assert_close(two[0] + two[1], one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(two[0], one)
