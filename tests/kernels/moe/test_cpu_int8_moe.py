# SPDX-License-Identifier: Apache-2.0
"""INT8 fused experts on a CPU, against float64 that takes the same int8 steps.

The reference computes each token and expert by itself and multiplies no int8. Between
the products it is more precise than float32, so a value close to the half of a step
may fall to the other side: that moves an output by under half a percent of the largest,
and a wrong scale, weight or activation by tens of percent.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import activate
from vllm.model_executor.layers.fused_moe.experts import quark_int8_cpu
from vllm.model_executor.layers.fused_moe.experts.quark_int8_cpu import Int8CpuExperts
from vllm.platforms import current_platform

from tests.kernels.moe.utils import make_moe_config, run_experts_class

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

SILU, SWIGLUSTEP = MoEActivation.SILU, MoEActivation.SWIGLUSTEP


@dataclass(frozen=True)
class Shape:
    num_experts: int = 6
    hidden: int = 64
    intermediate: int = 48


@dataclass(frozen=True)
class Experts:
    """The weights of a layer, and how its activations are quantized."""

    w13: Tensor  # [E, 2N, K] int8
    w2: Tensor  # [E, K, N] int8
    w13_scale: Tensor  # [E, 2N, 1] or [E]
    w2_scale: Tensor  # [E, K, 1] or [E]
    w13_bias: Tensor | None = None  # [E, 2N]
    w2_bias: Tensor | None = None  # [E, K]
    a13_scale: Tensor | None = None  # a scalar; None: one for each token
    a2_scale: Tensor | None = None

    @property
    def quant_config(self) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(
            torch.int8,
            w1_scale=self.w13_scale,
            w2_scale=self.w2_scale,
            a1_scale=self.a13_scale,
            a2_scale=self.a2_scale,
            w1_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            per_act_token_quant=self.a13_scale is None,
        )

    def part(self, experts: list[int]) -> "Experts":
        """The experts that one rank of an expert-parallel group holds."""
        return Experts(
            self.w13[experts],
            self.w2[experts],
            self.w13_scale[experts],
            self.w2_scale[experts],
        )


def make_experts(
    shape: Shape,
    rng: torch.Generator,
    per_tensor: bool = False,
    static: bool = False,
    bias: bool = False,
) -> Experts:
    """Random experts whose projections return values of about 4.

    That is enough for swiglustep to clip some gates and ups and not others.
    """
    num_experts, width = shape.num_experts, shape.intermediate

    def weight(rows: int, columns: int) -> Tensor:
        size = (num_experts, rows, columns)
        return torch.randint(-128, 128, size, generator=rng, dtype=torch.int8)

    def scale(rows: int, columns: int) -> Tensor:
        size = (num_experts,) if per_tensor else (num_experts, rows, 1)
        return (torch.rand(size, generator=rng) + 0.5) * 4 / 74 / columns**0.5

    def made_bias(rows: int) -> Tensor | None:
        return torch.randn(num_experts, rows, generator=rng) * 4 if bias else None

    return Experts(
        weight(2 * width, shape.hidden),
        weight(shape.hidden, width),
        scale(2 * width, shape.hidden),
        scale(shape.hidden, width),
        made_bias(2 * width),
        made_bias(shape.hidden),
        torch.tensor(0.02) if static else None,
        torch.tensor(0.2) if static else None,
    )


@dataclass(frozen=True)
class Batch:
    hidden_states: Tensor  # [M, K]
    topk_weights: Tensor  # [M, topk]
    topk_ids: Tensor  # [M, topk]


def make_batch(
    shape: Shape,
    rng: torch.Generator,
    num_tokens: int = 17,
    top_k: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    order = torch.rand(num_tokens, shape.num_experts, generator=rng).argsort()
    return Batch(
        torch.randn(num_tokens, shape.hidden, generator=rng).to(dtype),
        torch.rand(num_tokens, top_k, generator=rng) + 0.1,
        order[:, :top_k].int(),
    )


@dataclass(frozen=True)
class Options:
    activation: MoEActivation = SILU
    router_weight_on_input: bool = False
    expert_map: Tensor | None = None


DEFAULTS = Options()


def run(experts: Experts, batch: Batch, options: Options = DEFAULTS) -> Tensor:
    """Through the modular kernel, as the engine."""
    num_tokens, top_k = batch.topk_ids.shape
    num_ids = len(experts.w13 if options.expert_map is None else options.expert_map)
    moe_config = make_moe_config(
        num_ids,
        top_k,
        experts.w2.shape[1],
        experts.w2.shape[2],
        num_local_experts=len(experts.w13),
        activation=options.activation,
        in_dtype=batch.hidden_states.dtype,
    )
    return run_experts_class(
        Int8CpuExperts,
        moe_config,
        experts.quant_config,
        batch.hidden_states,
        experts.w13,
        experts.w2,
        batch.topk_weights,
        batch.topk_ids,
        options.expert_map,
        options.router_weight_on_input,
    )


def quantize(x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A float64 vector as whole numbers, and their scale."""
    if static_scale is not None:
        scale = static_scale.double()
        return (x / scale).round().clamp(-128, 127), scale
    scale = x.abs().max().clamp(min=1e-10) / 127
    return ((x / scale).abs() + 0.5).floor().copysign(x), scale


def in_float64(experts: Experts, batch: Batch, options: Options) -> Tensor:
    def project(
        x: Tensor,
        static_scale: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        x_q, x_scale = quantize(x, static_scale)
        out = (weight.double() @ x_q) * x_scale * scale.double().flatten()
        return out if bias is None else out + bias.double()

    def apply(expert: int, x: Tensor, router_weight: Tensor) -> Tensor:
        e, on_input = experts, options.router_weight_on_input
        b13, b2 = (b if b is None else b[expert] for b in (e.w13_bias, e.w2_bias))
        x = x * router_weight if on_input else x
        gate, up = project(
            x, e.a13_scale, e.w13[expert], e.w13_scale[expert], b13
        ).chunk(2)
        gate = gate / (1 + (-gate).exp())
        if options.activation == SWIGLUSTEP:
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        y = project(gate * up, e.a2_scale, e.w2[expert], e.w2_scale[expert], b2)
        return y if on_input else y * router_weight

    output = torch.zeros(batch.hidden_states.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(
        zip(batch.topk_ids.tolist(), batch.topk_weights.double(), strict=True)
    ):
        for expert, weight in zip(ids, weights, strict=True):
            if options.expert_map is not None:
                known = 0 <= expert < len(options.expert_map)
                expert = int(options.expert_map[expert]) if known else -1
            if 0 <= expert < len(experts.w13):
                x = batch.hidden_states[token].double()
                output[token] += apply(expert, x, weight)
    return output


def assert_matches(
    experts: Experts,
    batch: Batch,
    options: Options = DEFAULTS,
    tolerance: float = 0.005,
) -> None:
    output = run(experts, batch, options)
    assert output.dtype == batch.hidden_states.dtype
    assert output.shape == batch.hidden_states.shape
    expected = in_float64(experts, batch, options)
    error = (output.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


# --- against float64 ---


@pytest.mark.parametrize("activation", [SILU, SWIGLUSTEP], ids=lambda a: a.value)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_experts_match_float64(activation, static, per_tensor, bias, rng):
    experts = make_experts(Shape(), rng, per_tensor, static, bias)
    assert_matches(experts, make_batch(Shape(), rng), Options(activation))


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_router_weight_on_input_matches_float64(bias, rng):
    experts = make_experts(Shape(), rng, bias=bias)
    batch = make_batch(Shape(), rng, top_k=1)
    assert_matches(experts, batch, Options(router_weight_on_input=True))


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 0.005), (torch.float16, 0.005), (torch.bfloat16, 0.01)],
    ids=str,
)
def test_output_has_the_dtype_of_the_input(dtype, tolerance, rng):
    """In norm: of short numbers many lie between two int8 steps, to the last bit, and
    may take either one, which moves all outputs of a token."""
    experts, batch = make_experts(Shape(), rng), make_batch(Shape(), rng, dtype=dtype)
    output, expected = (
        run(experts, batch, DEFAULTS),
        in_float64(experts, batch, DEFAULTS),
    )
    assert output.dtype == dtype
    assert output.shape == batch.hidden_states.shape
    assert (output.double() - expected).norm() <= tolerance * expected.norm()


@given(st.data())
def test_any_shape_matches_float64(data):
    def draw(largest: int) -> int:
        return data.draw(st.integers(1, largest))

    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    shape = Shape(num_experts=draw(9), hidden=draw(70), intermediate=draw(40))
    top_k = data.draw(st.integers(1, shape.num_experts))
    batch = make_batch(shape, rng, num_tokens=draw(40), top_k=top_k)
    # One step of a short sum is a larger part of it.
    assert_matches(make_experts(shape, rng), batch, tolerance=0.02)


def test_swiglustep_clips_after_silu(rng):
    """silu(7) is 6.994: a gate clipped before comes out a thousandth too low."""
    gate, up = torch.randn(2, 5, 200, generator=rng) * 8
    output = activate(SWIGLUSTEP.value, torch.cat([gate, up], dim=1))
    gate, up = gate.double(), up.double()
    expected = (gate / (1 + (-gate).exp())).clamp(max=7) * up.clamp(-7, 7)
    assert (expected == 49).any() and (expected == -49).any()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


# --- routing ---


def test_no_tokens():
    rng = torch.Generator().manual_seed(0)
    batch = make_batch(Shape(), rng, num_tokens=0, dtype=torch.bfloat16)
    output = run(make_experts(Shape(), rng), batch)
    assert output.shape == (0, Shape().hidden)
    assert output.dtype == torch.bfloat16


def test_all_tokens_on_one_expert(rng):
    """The others are poisoned: their weights count for nothing."""
    experts = make_experts(Shape(), rng)
    for scale in (experts.w13_scale, experts.w2_scale):
        scale[[0, 1, 3, 4, 5]] = torch.nan
    batch = make_batch(Shape(), rng, num_tokens=40, top_k=1)
    batch.topk_ids.fill_(2)
    assert_matches(experts, batch)


def test_one_expert_twice(rng):
    """Both of a token's slots count, as on GPUs."""
    batch = make_batch(Shape(), rng, top_k=2)
    batch.topk_ids[:, 1] = batch.topk_ids[:, 0]
    assert_matches(make_experts(Shape(), rng), batch)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32], ids=str)
def test_dtype_of_topk_ids(dtype, rng):
    batch = make_batch(Shape(), rng)
    batch = replace(batch, topk_ids=batch.topk_ids.to(dtype))
    assert_matches(make_experts(Shape(), rng), batch)


def test_expert_map_leaves_out_absent_experts(rng):
    held = [4, 0, 3]
    expert_map = torch.full((Shape().num_experts,), -1, dtype=torch.int32)
    expert_map[held] = torch.arange(len(held), dtype=torch.int32)
    part = make_experts(Shape(), rng).part(held)
    assert_matches(part, make_batch(Shape(), rng), Options(expert_map=expert_map))


@pytest.mark.parametrize("mapped", [False, True], ids=["all", "expert_map"])
def test_ids_that_are_no_expert_add_nothing(mapped, rng):
    """As on GPUs: -1 is not the last expert, and nothing is read beyond the last. A
    map's own entries beyond this rank's experts are none either."""
    expert_map = torch.tensor([2, 0, -1, 1, 9, 3], dtype=torch.int32)
    experts = make_experts(Shape(), rng)
    batch = make_batch(Shape(), rng)
    batch.topk_ids[::2, 0] = -1
    batch.topk_ids[1::3, 1] = -7
    batch.topk_ids[::3, 1] = 6
    batch.topk_ids[::4, 2] = 2**31 - 1
    batch.topk_ids[5] = -1
    if mapped:
        experts = experts.part([1, 3, 0, 5])
        assert_matches(experts, batch, Options(expert_map=expert_map))
    else:
        assert_matches(experts, batch)
    assert not run(experts, batch)[5].any()


def test_expert_parallel_ranks_add_up(rng):
    experts, batch = make_experts(Shape(), rng), make_batch(Shape(), rng)
    total = torch.zeros_like(batch.hidden_states)
    for held in ([0, 1], [2, 3], [4, 5]):
        expert_map = torch.full((Shape().num_experts,), -1, dtype=torch.int32)
        expert_map[held] = torch.arange(2, dtype=torch.int32)
        total += run(experts.part(held), batch, Options(expert_map=expert_map))
    torch.testing.assert_close(total, run(experts, batch), rtol=1e-5, atol=1e-4)


def test_no_expert_is_here(rng):
    absent = torch.full((Shape().num_experts,), -1, dtype=torch.int32)
    output = run(
        make_experts(Shape(), rng), make_batch(Shape(), rng), Options(expert_map=absent)
    )
    assert not output.any()


def test_each_experts_weights_are_read_once(rng, monkeypatch):
    read = []

    def int8_mm(a: Tensor, b: Tensor) -> Tensor:
        read.append(b.data_ptr())
        return a.int() @ b.int().t()

    monkeypatch.setattr(quark_int8_cpu, "int8_mm", int8_mm)
    experts, batch = make_experts(Shape(), rng), make_batch(Shape(), rng, top_k=2)
    run(experts, batch)
    used = batch.topk_ids.unique().tolist()
    assert read == [w[e].data_ptr() for w in (experts.w13, experts.w2) for e in used]


# --- integers ---


def test_products_are_the_exact_integers(rng):
    """With scales of one; each column's sum is below 2**24, which float32 holds."""
    shape = Shape(hidden=1000)
    weight = make_experts(shape, rng).w13
    rows = torch.randint(-128, 128, (19, 1000), generator=rng, dtype=torch.int8)
    rows[0], weight[0, 0] = 127, 127
    rows[1], weight[0, 1] = -128, 127
    experts = torch.randint(0, shape.num_experts, (19,), generator=rng)
    experts[:2] = 0
    experts = experts.sort().values
    ones = torch.ones(19, 1), torch.ones(shape.num_experts)
    products = quark_int8_cpu._experts_mm(rows, ones[0], experts, weight, ones[1])
    expected = torch.einsum("pk,pnk->pn", rows.double(), weight[experts].double())
    assert torch.equal(products.double(), expected)
