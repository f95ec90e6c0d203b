# SPDX-License-Identifier: Apache-2.0
"""Quark INT8 fused MoE: loading, processing and the configuration that kernels get."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.fused_moe import (
    invoke_fused_moe_triton_kernel,
)
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.quark.quark_moe import (
    QuarkW8A8Int8MoEMethod,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, tl

from tests.moe_layers import apply_experts, make_experts, quant_config_of
from tests.quantization.utils import (
    poison,
    random_int8,
    random_scales,
    skip_without_int8_ops,
)
from tests.v1.utils import HOPPER

NUM_EXPERTS = 6
TOP_K = 2
NUM_TOKENS = 5
HIDDEN = 64
INTERMEDIATE = 32
# Rows of each tensor of an expert in the checkpoint.
ROWS = {"w1": INTERMEDIATE, "w3": INTERMEDIATE, "w2": HIDDEN}
COLUMNS = {"w1": HIDDEN, "w3": HIDDEN, "w2": INTERMEDIATE}
SCALES = ("w13_weight_scale", "w2_weight_scale")

NEEDS_0002 = pytest.mark.needs_patch("0002")
RIGHT_SCALES = pytest.mark.needs_patch("0009")
EPLB = pytest.mark.needs_patch("0015")


@dataclass(frozen=True)
class Layout:
    """One rank's share of the experts: their rows, or some of them."""

    rank: int
    size: int
    by_expert: bool = False

    def __str__(self) -> str:
        kind = "expert" if self.by_expert else "tensor"
        return f"{kind}_rank{self.rank}of{self.size}"

    @property
    def experts(self) -> range:
        if not self.by_expert:
            return range(NUM_EXPERTS)
        part = NUM_EXPERTS // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    @property
    def intermediate(self) -> slice:
        """The channels between the two products that this rank holds."""
        part = INTERMEDIATE if self.by_expert else INTERMEDIATE // self.size
        rank = 0 if self.by_expert else self.rank
        return slice(rank * part, (rank + 1) * part)


LAYOUTS = (
    Layout(0, 1),
    Layout(0, 2),
    Layout(1, 2),
    Layout(0, 2, by_expert=True),
    Layout(1, 2, by_expert=True),
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


class Checkpoint:
    """Random experts as Quark exports them, one tensor for each expert.

    weight int8 [E, N, K]; scale float32 [E, N], or [E] per tensor; input_scale
    float32 [E]; each by shard id.
    """

    def __init__(self, quark: dict[str, Any], rng: torch.Generator) -> None:
        scheme = quark["global_quant_config"]
        per_channel = scheme["weight"]["qscheme"] == "per_channel"
        self.static = not scheme["input_tensors"]["is_dynamic"]
        self.weight = {
            shard: random_int8(NUM_EXPERTS, rows, COLUMNS[shard], rng=rng)
            for shard, rows in ROWS.items()
        }
        self.scale = {
            shard: random_scales(NUM_EXPERTS, *([rows] if per_channel else []), rng=rng)
            for shard, rows in ROWS.items()
        }
        first, second = random_scales(2, NUM_EXPERTS, rng=rng)
        self.input_scale = {"w1": first, "w3": first, "w2": second}

    def load_into(self, layer: Any) -> None:
        """Offer every expert to the layer, as a model's load_weights does."""
        for shard in ROWS:
            prefix = "w2_" if shard == "w2" else "w13_"
            tensors = {"weight": self.weight, "weight_scale": self.scale}
            if self.static:
                tensors["input_scale"] = self.input_scale
            for name, tensor in tensors.items():
                param = getattr(layer, prefix + name)
                for expert_id in range(NUM_EXPERTS):
                    param.weight_loader(
                        param,
                        tensor[shard][expert_id],
                        f"model.layers.0.moe.experts.{prefix}{name}",
                        shard_id=shard,
                        expert_id=expert_id,
                    )

    def scales(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Per-channel scales of a rank: w13 [E, 2 * I], w2 [E, hidden]."""
        experts = list(layout.experts)
        gate, up = (self.scale[shard][experts] for shard in ("w1", "w3"))
        rows = layout.intermediate
        w13 = torch.cat([gate[:, rows], up[:, rows]], dim=1)
        return w13, self.scale["w2"][experts]


def random_topk_ids(rng: torch.Generator) -> Tensor:
    """int32 [M, top k], each token's experts distinct."""
    order = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=rng, device="cpu").argsort()
    return order[:, :TOP_K].int()


@pytest.fixture(autouse=True)
def _context(vllm_config: VllmConfig) -> None:
    """Every layer here is built under a current VllmConfig."""


def build(quark: dict[str, Any], **options: Any) -> Any:
    scheme = quark["global_quant_config"]
    per_channel = scheme["weight"]["qscheme"] == "per_channel"
    static = scheme["input_tensors"]["is_dynamic"] is False
    if per_channel and static and not (current_platform.is_cpu() or HOPPER):
        pytest.skip(
            "per-channel weights, static activations: needs a CPU, or a GPU of compute "
            "capability 9.0"
        )
    layer = make_experts(
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        quant_config=QuarkConfig.from_config(quark),
        prefix="model.layers.0.moe.experts",
        **options,
    )
    poison(layer)
    return layer


def process(layer: Any) -> None:
    try:
        layer.quant_method.process_weights_after_loading(layer)
    except AttributeError as error:
        if "static_scaled_int8_quant" in str(error):  # of per-tensor weights
            skip_without_int8_ops()
        raise


def apply(layer: Any, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
    """The experts' output, on the CPU, of arguments there."""
    device = layer.w13_weight.device
    return apply_experts(
        layer, x.to(device), weights.to(device), topk_ids.to(device)
    ).cpu()


def assert_scales(layer: Any, expected: tuple[Tensor, Tensor]) -> None:
    for name, scale in zip(SCALES, expected, strict=True):
        assert torch.equal(getattr(layer, name).data.cpu(), scale), name


@pytest.fixture
def parallel(vllm_config, tensor_parallel):
    def apply(layout: Layout) -> None:
        tensor_parallel(layout.rank, layout.size)
        vllm_config.parallel_config.enable_expert_parallel = layout.by_expert

    return apply


@each_layout
def test_per_channel_scales_load(layout, parallel, quark_dict, rng):
    parallel(layout)
    layer = build(quark_dict())
    checkpoint = Checkpoint(quark_dict(), rng)
    checkpoint.load_into(layer)
    assert_scales(layer, checkpoint.scales(layout))


@NEEDS_0002
@each_layout
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_per_channel_scales_become_columns(layout, static, parallel, quark_dict, rng):
    parallel(layout)
    quark = quark_dict(static=static)
    layer = build(quark)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)
    w13, w2 = checkpoint.scales(layout)
    assert_scales(layer, (w13[..., None], w2[..., None]))


def test_columns_stay_columns(quark_dict, rng):
    layer = build(quark_dict())
    checkpoint = Checkpoint(quark_dict(), rng)
    checkpoint.load_into(layer)
    columns = {name: getattr(layer, name).data.unsqueeze(-1) for name in SCALES}
    for name, column in columns.items():
        setattr(layer, name, torch.nn.Parameter(column, requires_grad=False))
    process(layer)
    for name, column in columns.items():
        assert torch.equal(getattr(layer, name), column)


def test_scale_keeps_its_loader(quark_dict, rng):
    layer = build(quark_dict())
    Checkpoint(quark_dict(), rng).load_into(layer)
    process(layer)
    for name in SCALES:
        assert getattr(layer, name).weight_loader == layer.weight_loader


def test_column_of_one_expert_on_disk_is_refused(quark_dict, rng):
    """A layer takes an expert's scale as [N] alone, whatever the edits."""
    layer = build(quark_dict())
    checkpoint = Checkpoint(quark_dict(), rng)
    checkpoint.scale = {k: scale[..., None] for k, scale in checkpoint.scale.items()}
    with pytest.raises(RuntimeError, match="shape"):
        checkpoint.load_into(layer)


@each_layout
def test_per_tensor_scales_of_static_activations(layout, parallel, quark_dict, rng):
    """One scale an expert: gate and up are quantized again with the larger of theirs.

    vLLM does so through float16, which moves a value by up to 127 * 2^-11.
    """
    parallel(layout)
    quark = quark_dict(weight="per_tensor", static=True)
    layer = build(quark)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)

    experts, rows = list(layout.experts), layout.intermediate
    gate, up, down = (checkpoint.scale[shard][experts] for shard in ("w1", "w3", "w2"))
    larger = torch.maximum(gate, up)
    assert_scales(layer, (larger, down))
    parts = layer.w13_weight.data.cpu().double().chunk(2, dim=1)
    for part, shard, scale in zip(parts, ("w1", "w3"), (gate, up), strict=True):
        weight = checkpoint.weight[shard][experts, rows].double()
        exact = weight * (scale.double() / larger)[:, None, None]
        assert (part - exact).abs().max() < 0.5 + 127 * 2**-11


@RIGHT_SCALES
@each_layout
def test_per_tensor_scales_of_dynamic_activations(layout, parallel, quark_dict, rng):
    """A scale for each channel, as the kernels want it; the weights as they were."""
    parallel(layout)
    quark = quark_dict(weight="per_tensor")
    layer = build(quark)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)

    experts, rows = list(layout.experts), layout.intermediate
    num_rows = rows.stop - rows.start
    gate, up, down = (checkpoint.scale[shard][experts] for shard in ("w1", "w3", "w2"))
    ones = torch.ones(len(experts), num_rows, device="cpu", dtype=torch.float32)
    w13 = torch.cat([gate[:, None] * ones, up[:, None] * ones], dim=1)
    w2 = down[:, None] * torch.ones(1, HIDDEN, device="cpu", dtype=torch.float32)
    assert_scales(layer, (w13[..., None], w2[..., None]))
    weight = torch.cat([checkpoint.weight[s][experts, rows] for s in ("w1", "w3")], 1)
    assert torch.equal(layer.w13_weight.data.cpu(), weight)


@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_static_input_scales_are_joined(weight, quark_dict, rng):
    quark = quark_dict(weight=weight, static=True)
    layer = build(quark)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)
    for name, shard in (("w13_input_scale", "w1"), ("w2_input_scale", "w2")):
        scale = getattr(layer, name).data.cpu()
        assert torch.equal(scale, checkpoint.input_scale[shard].max())


def test_zero_points_are_gone_after_loading(quark_dict, rng):
    layer = build(quark_dict())
    Checkpoint(quark_dict(), rng).load_into(layer)
    process(layer)
    assert not [name for name, _ in layer.named_parameters() if "zero" in name]


@pytest.mark.parametrize(
    "weight, static",
    [
        pytest.param("per_channel", False, marks=NEEDS_0002),
        pytest.param("per_channel", True, marks=NEEDS_0002),
        ("per_tensor", True),
    ],
)
def test_weights_load_a_second_time(weight, static, quark_dict, rng):
    """Through upstream's reload; kernels go on with the tensors that they hold."""
    quark = quark_dict(weight=weight, static=static)
    layer = build(quark)
    record_metadata_for_reloading(layer)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)
    held = quant_config_of(layer)

    for _ in range(2):
        checkpoint = Checkpoint(quark, rng)
        initialize_layerwise_reload(layer)
        checkpoint.load_into(layer)
        finalize_layerwise_reload(layer, None)

        if weight == "per_channel":
            w13, w2 = (s[..., None] for s in checkpoint.scales(LAYOUTS[0]))
        else:
            w13 = torch.maximum(checkpoint.scale["w1"], checkpoint.scale["w3"])
            w2 = checkpoint.scale["w2"]
        assert_scales(layer, (w13, w2))
        assert held.w1_scale is layer.w13_weight_scale
        assert held.w2_scale is layer.w2_weight_scale
        assert torch.equal(layer.w2_weight.data.cpu(), checkpoint.weight["w2"])
        if static:
            assert torch.equal(held.a2_scale.cpu(), checkpoint.input_scale["w2"].max())


@NEEDS_0002
def test_loading_again_without_reload_is_refused(quark_dict, rng):
    """A processed scale has another shape than the checkpoint's; it must not load."""
    layer = build(quark_dict())
    checkpoint = Checkpoint(quark_dict(), rng)
    checkpoint.load_into(layer)
    process(layer)
    with pytest.raises(ValueError, match="quant method must be one of"):
        checkpoint.load_into(layer)


@dataclass(frozen=True)
class Flags:
    """What the kernels are told: how activations and weights are scaled."""

    per_act_token: bool
    per_out_ch: bool | None  # None: releases differ, and no kernel asks


SELECTION = [
    pytest.param("per_channel", False, Flags(True, False), marks=NEEDS_0002),
    ("per_channel", True, Flags(False, None)),
    ("per_tensor", False, Flags(True, False)),
    ("per_tensor", True, Flags(False, False)),
]


@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("weight, static, flags", SELECTION)
def test_quant_config_selection(weight, static, flags, has_bias, quark_dict, rng):
    quark = quark_dict(weight=weight, static=static)
    layer = build(quark, has_bias=has_bias)
    Checkpoint(quark, rng).load_into(layer)
    process(layer)
    config = layer.quant_method.get_fused_moe_quant_config(layer)

    assert config.quant_dtype == config.weight_quant_dtype == torch.int8
    assert config.use_int8_w8a8
    assert config.block_shape is None
    assert config.per_act_token_quant == flags.per_act_token
    assert flags.per_out_ch in (None, config.per_out_ch_quant)
    assert config.w1_scale is layer.w13_weight_scale
    assert config.w2_scale is layer.w2_weight_scale
    assert config.a1_scale is layer.w13_input_scale
    assert config.a2_scale is layer.w2_input_scale
    assert (config.a1_scale is None) is not static
    assert config.w1_bias is layer.w13_bias
    assert config.w2_bias is layer.w2_bias
    if has_bias:
        assert config.w1_bias.shape == (NUM_EXPERTS, 2 * INTERMEDIATE)
        assert config.w2_bias.shape == (NUM_EXPERTS, HIDDEN)
    else:
        assert config.w1_bias is None and config.w2_bias is None


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_method_selection(weight, static, quark_dict):
    method = build(quark_dict(weight=weight, static=static)).quant_method
    assert isinstance(method, QuarkW8A8Int8MoEMethod)
    assert method.weight_qscheme == weight
    assert method.static_input_scales is static


@pytest.mark.parametrize(
    "part, field",
    [("weight", {"symmetric": False}), ("input_tensors", {"qscheme": "per_tensor"})],
    ids=["asymmetric weight", "dynamic per tensor"],
)
def test_method_without_a_kernel_is_refused(part, field, quark_dict):
    quark = quark_dict()
    quark["global_quant_config"][part] |= field
    with pytest.raises(RuntimeError, match="Unsupported FusedMoe scheme"):
        build(quark)


@dataclass(frozen=True)
class Product:
    """The first product of fused experts, by vLLM's Triton kernel.

    activations int8 [M, K], weights int8 [E, N, K], topk_ids int32 [M, top k].
    """

    activations: Tensor
    weights: Tensor
    topk_ids: Tensor

    @classmethod
    def random(cls, rng: torch.Generator) -> "Product":
        return cls(
            random_int8(NUM_TOKENS, HIDDEN, rng=rng),
            random_int8(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, rng=rng),
            random_topk_ids(rng),
        )

    def run(
        self,
        act_scale: Tensor,
        weight_scale: Tensor,
        per_act_token: bool,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> Tensor:
        """float32 [M, top k, N], each block of the kernel taking a single token."""
        shape = (NUM_TOKENS, TOP_K, 2 * INTERMEDIATE)
        output = torch.full(shape, torch.nan, dtype=torch.float32)
        blocks = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32}
        invoke_fused_moe_triton_kernel(
            self.activations.to(device),
            self.weights.to(device),
            output,
            act_scale.to(device),
            weight_scale.to(device),
            topk_weights=None,
            sorted_token_ids=None,
            expert_ids=self.topk_ids.flatten().to(device),
            num_tokens_post_padded=torch.tensor(
                [self.topk_ids.numel() * blocks["BLOCK_SIZE_M"]], dtype=torch.int32
            ),
            mul_routed_weight=False,
            top_k=TOP_K,
            config=blocks | {"GROUP_SIZE_M": 1},
            compute_type=tl.float32,
            use_fp8_w8a8=False,
            use_int8_w8a8=True,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=per_act_token,
            B_bias=None if bias is None else bias.to(device),
        )
        return output.cpu()

    def expected(self, act_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """float64 [M, top k, N]; act_scale [M, 1] or [], weight_scale [E, N or 1]."""
        chosen = self.topk_ids.long()
        exact = torch.einsum(
            "mk,mtnk->mtn", self.activations.double(), self.weights.double()[chosen]
        )
        return (
            exact * act_scale.double().reshape(-1, 1, 1) * weight_scale.double()[chosen]
        )


@pytest.fixture
def product(rng) -> Product:
    if not HAS_TRITON:
        pytest.skip("needs Triton, which vLLM turns off in this build")
    return Product.random(rng)


def assert_float32(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=0)


def test_kernel_reads_vectors_and_columns_alike(product, device, rng):
    """With activations per token, 0002 changes no bit of this kernel's output."""
    act_scale = random_scales(NUM_TOKENS, 1, rng=rng)
    vectors = random_scales(NUM_EXPERTS, 2 * INTERMEDIATE, rng=rng)
    of_vectors, of_columns = (
        product.run(act_scale, scale, per_act_token=True, device=device)
        for scale in (vectors, vectors[..., None])
    )
    assert torch.equal(of_vectors, of_columns)
    assert_float32(of_columns, product.expected(act_scale, vectors))


def test_kernel_adds_the_bias_after_scaling(product, device, rng):
    act_scale = random_scales(NUM_TOKENS, 1, rng=rng)
    scale = random_scales(NUM_EXPERTS, 2 * INTERMEDIATE, rng=rng)
    bias = random_int8(NUM_EXPERTS, 2 * INTERMEDIATE, rng=rng).float()
    output = product.run(act_scale, scale[..., None], True, device, bias)
    expected = product.expected(act_scale, scale)
    expected += bias.double()[product.topk_ids.long()]
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-4)


def test_kernel_reads_per_tensor_scales_of_static_activations(product, device, rng):
    act_scale = random_scales(1, rng=rng)[0]
    scale = random_scales(NUM_EXPERTS, rng=rng)
    output = product.run(act_scale, scale, per_act_token=False, device=device)
    assert_float32(output, product.expected(act_scale, scale[:, None]))


@pytest.mark.parametrize("columns", [False, True], ids=["vectors", "columns"])
def test_kernel_misreads_per_channel_scales_of_static_activations(
    columns, product, device, rng
):
    """It takes the first E numbers of [E, N] for one scale an expert."""
    act_scale = random_scales(1, rng=rng)[0]
    scale = random_scales(NUM_EXPERTS, 2 * INTERMEDIATE, rng=rng)
    given = scale[..., None] if columns else scale
    output = product.run(act_scale, given, per_act_token=False, device=device)
    misread = scale.flatten()[:NUM_EXPERTS, None]
    assert_float32(output, product.expected(act_scale, misread))


def test_kernel_misreads_per_tensor_scales_of_dynamic_activations(product, device, rng):
    """It takes the first expert's scale for every expert."""
    act_scale = random_scales(NUM_TOKENS, 1, rng=rng)
    scale = random_scales(NUM_EXPERTS, rng=rng)
    output = product.run(act_scale, scale, per_act_token=True, device=device)
    misread = scale[:1].expand(NUM_EXPERTS)[:, None]
    assert_float32(output, product.expected(act_scale, misread))


def quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [M, K] to whole numbers and their scale, that of each token if None."""
    if scale is None:
        scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / scale.double()).round().clamp(-128, 127), scale.double()


def experts_in_float64(
    checkpoint: Checkpoint, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """Fused experts from the checkpoint's numbers, quantizing what they quantize."""

    def product(shard: str, expert: int, x: Tensor) -> Tensor:
        static = checkpoint.input_scale[shard].max() if checkpoint.static else None
        q, act_scale = quantize(x, static)
        weight_scale = checkpoint.scale[shard][expert].double()
        return (
            q @ checkpoint.weight[shard][expert].double().T * act_scale * weight_scale
        )

    output = torch.zeros(x.shape, dtype=torch.float64, device="cpu")
    for expert in range(NUM_EXPERTS):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        inputs = x[token].double()
        gate, up = (product(shard, expert, inputs) for shard in ("w1", "w3"))
        hidden = torch.nn.functional.silu(gate) * up
        weighted = product("w2", expert, hidden) * topk_weights[token, slot, None]
        output.index_add_(0, token, weighted)
    return output


@pytest.mark.gpu
@pytest.mark.parametrize(
    "weight, static",
    [
        ("per_channel", False),
        ("per_channel", True),
        ("per_tensor", False),
        ("per_tensor", True),
    ],
)
def test_experts_match_float64(weight, static, device, quark_dict, rng):
    """Up to the int8 steps that bfloat16 between the products tips over.

    They measure 1 to 2.5 percent of the output; a wrong scale, tens of percent.
    """
    quark = quark_dict(weight=weight, static=static)
    layer = build(quark)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    process(layer)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=rng, device="cpu").bfloat16() / 4
    topk_ids = random_topk_ids(rng)
    topk_weights = random_scales(*topk_ids.shape, rng=rng) * 128

    output = apply(layer, x, topk_weights, topk_ids)

    expected = experts_in_float64(checkpoint, x, topk_weights, topk_ids)
    error = (output.double() - expected).norm() / expected.norm()
    assert error < 0.05


@EPLB
@pytest.mark.needs_patch("0028")  # with which the kernels go that apply them
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_experts_that_eplb_moved_answer_alike(weight, has_bias, quark_dict, rng):
    """EPLB writes an expert's rows where another's were, in place."""
    quark = quark_dict(weight=weight)
    layer = build(quark, enable_eplb=True, has_bias=has_bias)
    checkpoint = Checkpoint(quark, rng)
    checkpoint.load_into(layer)
    if has_bias:
        for bias in (layer.w13_bias, layer.w2_bias):
            bias.data.copy_(torch.randn(bias.shape, generator=rng, device="cpu"))
    process(layer)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=rng, device="cpu").bfloat16()
    topk_ids = random_topk_ids(rng)
    topk_weights = random_scales(*topk_ids.shape, rng=rng) * 128
    before = apply(layer, x, topk_weights, topk_ids)

    order = torch.arange(NUM_EXPERTS, device="cpu").roll(1)
    for rows in layer.get_expert_weights():
        rows.copy_(rows[order].clone())
    now_at = order.argsort().int()

    assert torch.equal(apply(layer, x, topk_weights, now_at[topk_ids.long()]), before)
    assert not torch.equal(apply(layer, x, topk_weights, topk_ids), before)


def test_eplb_with_static_activations_is_refused(quark_dict, vllm_config):
    """A rank joins the input scales of the experts that it loaded, and keeps that."""
    vllm_config.parallel_config.enable_eplb = True
    with pytest.raises(NotImplementedError, match="EPLB is not supported"):
        build(quark_dict(weight="per_tensor", static=True), enable_eplb=True)
