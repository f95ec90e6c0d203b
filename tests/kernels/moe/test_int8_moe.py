# SPDX-License-Identifier: Apache-2.0
"""INT8 fused experts in Triton, against float64 that takes the same int8 steps.

The kernels run on a GPU if there is one, else in Triton's interpreter on the CPU, which
`TRITON_INTERPRET=1` selects before Triton is imported. The interpreter cuts bfloat16
off where GPUs round, so it takes the other dtypes.

The reference multiplies whole numbers in float64, which is exact, and rounds where the
layer rounds. In float32 nothing is left to differ but the order of a few float32
operations. A value that these move across a rounding boundary moves one int8 step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.kernels import int8_triton
from vllm.model_executor.kernels.int8_triton import is_hopper
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import int8_moe, int8_moe_hopper
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.int8_moe import int8_fused_experts, prepare
from vllm.model_executor.layers.fused_moe.int8_moe_configs import (
    Config,
    FewConfig,
    Product,
    choose_config,
    choose_few_config,
)
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.quark_moe import (
    QuarkW8A8Int8MoEMethod,
)

from tests.kernels.gluon_interpreter import interpret
from tests.kernels.utils import DEVICE, GPU, interpreted

pytestmark = interpreted

SILU, SWIGLUSTEP = MoEActivation.SILU, MoEActivation.SWIGLUSTEP
# Small tiles, so that small shapes have several and tails.
THIN = Config(16, Product(32, 32, swap=True, num_stages=2), Product(32, 32, swap=True))
WIDE = Config(32, Product(64, 32, num_stages=2), Product(32, 32, num_stages=2))
# Tensor maps, which Triton imitates where there are none.
BOXES = Config(
    16,
    Product(64, 32, num_stages=2, tma_w=True),
    Product(32, 32, num_stages=2, tma_w=True, tma_a=True),
)
# Experts so narrow that one step multiplies them.
NARROW = Config(
    16, Product(32, 32, swap=True), Product(32, 256, swap=True, tma_w=True, blocks=2)
)
# Gluon's kernels: 64 rows a warpgroup.
HOPPER = Config(
    128,
    Product(128, 32, 8, 3, hopper=True),
    Product(64, 32, 4, 2, tma_w=True, tma_a=True, hopper=True, programs=2),
)
NARROW_WIDE = Config(32, Product(64, 32), Product(32, 256, blocks=2))
FEW = FewConfig(8, 4, 1, 0, 4, 4, 1, 0)
# Programs that take turns, with loads ahead of use.
FEW_TURNS = FewConfig(4, 4, 3, 2, 2, 4, 2, 2)
CONFIGS: dict[str, Config | FewConfig] = {
    "thin": THIN,
    "wide": WIDE,
    "boxes": BOXES,
    "narrow": NARROW,
    "narrow-wide": NARROW_WIDE,
    "hopper": HOPPER,
    "few": FEW,
    "few-turns": FEW_TURNS,
}


@dataclass(frozen=True)
class Case:
    """A layer, a batch and what is made of them."""

    num_experts: int = 6
    width: int = 48
    hidden: int = 64
    num_tokens: int = 5
    top_k: int = 3
    dtype: torch.dtype = torch.float32
    per_tensor: bool = False
    static: bool = False
    bias: bool = False
    activation: MoEActivation = SILU
    weigh_input: bool = False
    ids: tuple[int, ...] | None = None  # of all tokens, None for random ones
    present: tuple[int, ...] | None = None  # experts of this rank, None for all
    seed: int = 0


@dataclass(frozen=True)
class Layer:
    x: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None
    quant_config: FusedMoEQuantConfig


def make(case: Case) -> Layer:
    """Random experts whose projections return values of about 4.

    That is enough for swiglustep to clip some gates and ups and not others.
    """
    rng = torch.Generator().manual_seed(case.seed)
    num_experts = len(case.present) if case.present else case.num_experts

    def weight(rows: int, columns: int) -> Tensor:
        size = (num_experts, rows, columns)
        values = torch.randint(-128, 128, size, generator=rng, dtype=torch.int8)
        return values.to(DEVICE)

    def scale(rows: int, columns: int) -> Tensor:
        size = (num_experts,) if case.per_tensor else (num_experts, rows, 1)
        values = (torch.rand(size, generator=rng) + 0.5) * 4 / 74 / columns**0.5
        return values.to(DEVICE)

    def bias(rows: int) -> Tensor | None:
        values = torch.randn(num_experts, rows, generator=rng) * 4
        return values.to(DEVICE) if case.bias else None

    size = (case.num_tokens, case.top_k)
    if case.ids is not None:
        topk_ids = torch.tensor(case.ids).expand(size)
    else:
        order = torch.rand(case.num_tokens, case.num_experts, generator=rng).argsort()
        topk_ids = order[:, : case.top_k]
    expert_map = None
    if case.present is not None:
        expert_map = torch.full((case.num_experts,), -1, dtype=torch.int32)
        expert_map[list(case.present)] = torch.arange(num_experts, dtype=torch.int32)
        expert_map = expert_map.to(DEVICE)
    x = torch.randn(case.num_tokens, case.hidden, generator=rng)
    return Layer(
        x.to(DEVICE, case.dtype),
        weight(2 * case.width, case.hidden),
        weight(case.hidden, case.width),
        (torch.rand(size, generator=rng) + 0.1).to(DEVICE),
        topk_ids.int().contiguous().to(DEVICE),
        expert_map,
        FusedMoEQuantConfig.make(
            torch.int8,
            w1_scale=scale(2 * case.width, case.hidden),
            w2_scale=scale(case.hidden, case.width),
            a1_scale=torch.tensor(0.02, device=DEVICE) if case.static else None,
            a2_scale=torch.tensor(0.2, device=DEVICE) if case.static else None,
            w1_bias=bias(2 * case.width),
            w2_bias=bias(case.hidden),
            per_act_token_quant=not case.static,
        ),
    )


def run(layer: Layer, case: Case) -> Tensor:
    return int8_fused_experts(
        layer.x,
        layer.w13,
        layer.w2,
        layer.topk_weights,
        layer.topk_ids,
        case.activation,
        case.weigh_input,
        layer.expert_map,
        layer.quant_config,
    )


@contextmanager
def tiles(
    config: Config | FewConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Make the layer choose `config`, and poison the memory it allocates."""
    few = config if isinstance(config, FewConfig) else None
    with monkeypatch.context() as patch:
        patch.setattr(int8_moe, "choose_few_config", lambda *_: few)
        patch.setattr(int8_moe, "choose_config", lambda *_: config)
        empty_like = torch.empty_like
        patch.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(torch.nan))
        if isinstance(config, Config) and config.w13.hopper:
            if GPU and not is_hopper():
                pytest.skip("needs a Hopper GPU, or none")
            if not GPU:
                patch.setattr(int8_moe, "num_sms", lambda _: 3)
                for name, kernel in interpret(int8_moe_hopper).items():
                    patch.setattr(int8_moe_hopper, name, kernel)
        yield


def quantize(x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales [rows, 1], as float64; as docs/int8-moe.md says."""
    if static_scale is not None:
        steps = (x.double() / static_scale.double()).round().clamp(-128, 127)
        return steps, static_scale.double().expand(x.shape[0], 1)
    absmax = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-10)
    # Not 127 / absmax: torch takes the reciprocal first, which rounds twice.
    inverse = torch.full_like(absmax, 127) / absmax
    scale = absmax / torch.full_like(absmax, 127)
    return (x.double() * inverse.double()).round(), scale.double()


def reference(layer: Layer, case: Case) -> Tensor:
    q = layer.quant_config
    assert q.w1_scale is not None and q.w2_scale is not None
    xq, x_scale = quantize(layer.x, q.a1_scale)
    out = torch.zeros(layer.x.shape, dtype=torch.float64, device=DEVICE)
    for token, experts in enumerate(layer.topk_ids.tolist()):
        for j, expert in enumerate(experts):
            if layer.expert_map is not None:
                expert = int(layer.expert_map[expert])
            if expert < 0:
                continue
            weight = layer.topk_weights[token, j].double()
            y = layer.w13[expert].double() @ xq[token]
            y = y * x_scale[token] * q.w1_scale[expert].double().flatten()
            if q.w1_bias is not None:
                y += q.w1_bias[expert].double()
            if case.weigh_input:
                y *= weight
            gate, up = y.chunk(2)
            gate = gate * gate.sigmoid()
            if case.activation is SWIGLUSTEP:
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            h = (gate * up).to(case.dtype)
            hq, h_scale = quantize(h[None], q.a2_scale)
            y = layer.w2[expert].double() @ hq[0] * h_scale[0]
            y = y * q.w2_scale[expert].double().flatten()
            if q.w2_bias is not None:
                y += q.w2_bias[expert].double()
            if not case.weigh_input:
                y *= weight
            out[token] += y.to(case.dtype).double()
    return out


def check(out: Tensor, expected: Tensor, rare: int = 0) -> None:
    """All values within what the dtype's rounding and float32 allow.

    As many tokens as `rare` may be off by up to twice that: those with an activation so
    near the middle of two integers that float32 takes the one and float64 the other.
    """
    assert out.shape == expected.shape
    assert out.isfinite().all()
    largest = expected.abs().max() if expected.numel() else 0.0
    step = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
    bound = step[out.dtype] * largest
    errors = (out.double() - expected).abs().amax(dim=1)
    assert (errors <= bound * (2 if rare else 1)).all()
    assert (errors > bound).sum() <= rare


CASES = {
    "dynamic": Case(),
    "float16": Case(dtype=torch.float16),
    "static": Case(static=True),
    "per-tensor": Case(per_tensor=True),
    "per-tensor-static": Case(per_tensor=True, static=True),
    "bias": Case(bias=True),
    "swiglustep": Case(activation=SWIGLUSTEP, bias=True),
    "weigh-input": Case(weigh_input=True, bias=True),
    "expert-parallel": Case(present=(1, 3, 4)),
    "no-expert-here": Case(present=(1,), ids=(0, 2, 5)),
    "one-expert": Case(top_k=1, ids=(4,), num_tokens=20),
    "one-token": Case(num_tokens=1),
    "top-1": Case(top_k=1),
    "odd": Case(num_experts=5, width=80, hidden=144, num_tokens=3, top_k=2),
    "narrow": Case(num_experts=3, width=16, hidden=16, num_tokens=5, top_k=3),
    "unknown-ids": Case(ids=(2, -1, 6)),
}


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in CASES for config in ("thin", "few", "hopper")]
    + [
        (n, c)
        for n in ("dynamic", "odd")
        for c in ("wide", "boxes", "narrow", "narrow-wide", "few-turns")
    ],
)
def test_matches_float64(
    name: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    layer = make(case)
    known = (layer.topk_ids >= 0) & (layer.topk_ids < case.num_experts)
    with tiles(CONFIGS[config], monkeypatch):
        out = run(layer, case)
    # The reference has an expert of weight zero where the layer finds none.
    layer = replace(
        layer,
        topk_ids=torch.where(known, layer.topk_ids, 0),
        topk_weights=torch.where(known, layer.topk_weights, 0.0),
    )
    check(out, reference(layer, case))


@pytest.mark.parametrize("top_k", [8, 32])
def test_many_experts_a_token(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(num_experts=40, width=16, hidden=32, num_tokens=2, top_k=top_k)
    layer = make(case)
    for config in (THIN, FEW):
        with tiles(config, monkeypatch):
            check(run(layer, case), reference(layer, case))


def test_no_token() -> None:
    case = Case(num_tokens=0)
    assert run(make(case), case).shape == (0, case.hidden)


def test_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run after run and whatever the tiles: nothing depends on an order."""
    case = Case(num_tokens=20, bias=True)
    layer = make(case)
    outs = []
    for config in (THIN, THIN, WIDE, BOXES, HOPPER):
        with tiles(config, monkeypatch):
            outs.append(run(layer, case))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    "config", ["thin", "wide", "boxes", "narrow", "narrow-wide", "hopper"]
)
def test_parts_of_the_output_make_all_of_it(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no room at once is made in parts, of which the last is narrower."""
    case = Case(hidden=144, bias=True, present=(0, 1, 2, 5))
    layer = make(case)
    num_pairs = case.num_tokens * case.top_k
    summed: list[int] = []
    launch = int8_moe.launch

    def count(kernel: Any, *arguments: Any, **options: Any) -> None:
        if kernel is int8_moe.kernels.sum_topk_kernel:
            y = arguments[2]
            assert y.numel() * y.element_size() <= int8_moe._PART_BYTES
            summed.append(y.shape[1])
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(int8_moe, "launch", count)
    with tiles(CONFIGS[config], monkeypatch):
        at_once = run(layer, case)
        monkeypatch.setattr(int8_moe, "_PART_BYTES", num_pairs * 4 * 70)
        monkeypatch.setattr(int8_moe, "_PART_COLUMNS", 32)
        assert torch.equal(run(layer, case), at_once)
    assert summed == [144, 64, 64, 16]
    check(at_once, reference(layer, case))


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "columns"),
    [
        (1, 4096, 4096),
        (4096, 4096, 4096),
        (4097, 4096, 3584),
        (8192, 4096, 2048),
        (12288, 4096, 1024),
        (28672, 4096, 512),
        (75000, 256, 256),
    ],
)
def test_room_of_pairs_does_not_grow(
    num_tokens: int, hidden: int, columns: int
) -> None:
    """Up to 32,768 tokens of top 8; beyond, 512 columns take what they take."""
    assert int8_moe.columns_at_once(num_tokens * 8, hidden, 2) == columns
    assert num_tokens > 32768 or num_tokens * 8 * columns * 2 <= 256 << 20


def test_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums: saturation would cut them off."""
    case = Case(hidden=1024, width=16, num_tokens=2, top_k=1, ids=(0,))
    layer = make(case)
    layer.w13.fill_(-128)
    layer.x.fill_(-1.0)
    for config in (THIN, WIDE, HOPPER, FEW):
        with tiles(config, monkeypatch):
            check(run(layer, case), reference(layer, case))


@pytest.mark.parametrize("num_tokens", [1, 30, 300])
@pytest.mark.parametrize("present", [None, (5, 0, 2)])
def test_align(num_tokens: int, present: tuple[int, ...] | None) -> None:
    """Against a plain sort: stable, padded, each tile of one expert."""
    case = Case(num_experts=7, num_tokens=num_tokens, present=present, hidden=16)
    layer = make(case)
    num_experts = len(present) if present else 7
    num_pairs = layer.topk_ids.numel()
    (sorted_pairs, tile_experts, num_tiles), _, _ = prepare(
        layer.x, None, layer.topk_ids, layer.expert_map, num_experts, THIN
    )
    experts = layer.topk_ids.flatten().long()
    if layer.expert_map is not None:
        experts = layer.expert_map[experts].long()
    rows: list[int] = []
    of_tiles: list[int] = []
    for expert in range(num_experts):
        mine = (experts == expert).nonzero().flatten().tolist()
        count = -(-len(mine) // 16)
        rows += mine + [num_pairs] * (count * 16 - len(mine))
        of_tiles += [expert] * count
    assert num_tiles.item() == len(of_tiles) <= tile_experts.numel()
    assert tile_experts[: len(of_tiles)].tolist() == of_tiles
    assert sorted_pairs[: len(rows)].tolist() == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: replace(layer, w13=layer.w13[:, 1:]), "w13's shape"),
        (lambda layer: replace(layer, w2=layer.w2.float()), "w2's dtype"),
        (lambda layer: replace(layer, x=layer.x.double()), "hidden_states' dtype"),
        (lambda layer: replace(layer, topk_ids=layer.topk_ids[1:]), "topk_ids"),
        (
            lambda layer: replace(
                layer,
                w13=layer.w13[..., :8].contiguous(),
                w2=layer.w2[:, :8],
                x=layer.x[:, :8],
            ),
            "contiguous|multiples of 16",
        ),
    ],
)
def test_bad_input(change: Callable[[Layer], Layer], message: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=message):
        run(change(make(case)), case)


def test_unknown_activation() -> None:
    case = Case(activation=MoEActivation.GELU)
    with pytest.raises(ValueError, match="silu, swiglustep, not gelu"):
        run(make(case), case)


def test_traces_under_compile() -> None:
    case = Case()
    layer = make(case)
    compiled = torch.compile(
        lambda x: run(replace(layer, x=x), case) + 1, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(layer.x), run(layer, case) + 1)


def test_table_covers_every_shape() -> None:
    for pairs in (1, 128, 4096, 65536 * 32):
        for experts in (1, 8, 288, 512):
            for width in (160, 1280):
                config = choose_config("hopper", pairs, experts, experts, width)
                assert config.block_m in (16, 32, 64, 128)
                assert not config.w2.blocks or width <= config.w2.block_k
    assert not choose_config("hopper", 8192, 36, 36, 1280).w2.hopper
    assert choose_config("hopper", 16384, 36, 36, 1280).w2.hopper
    assert not choose_config("hopper", 16384, 288, 288, 1280).w2.hopper
    assert choose_config("hopper", 1024, 8, 8, 14336).w2.hopper
    # One of eight ranks has an eighth of the pairs.
    assert choose_config("hopper", 65536, 288, 288, 1280).w2.hopper
    assert not choose_config("hopper", 65536, 288, 36, 1280).w2.hopper
    assert choose_few_config("hopper", 4, 8, 288, 1280, 4096) is not None
    assert choose_few_config("hopper", 5, 8, 288, 1280, 4096) is None
    assert choose_few_config("hopper", 8, 8, 288, 160, 4096) is not None
    assert choose_few_config("hopper", 9, 8, 288, 160, 4096) is None
    assert choose_few_config("hopper", 4, 8, 36, 1280, 4096) is None
    assert choose_few_config("hopper", 1, 32, 512, 8192, 4096) is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 130, 700, 1400, 2500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_shapes_and_graph(num_tokens: int, dtype: torch.dtype) -> None:
    """The tiles that the table chooses; a graph that is replayed with fresh input.

    From 1400 tokens those are Gluon's on Hopper, whose programs take tiles in turn.
    """
    case = Case(32, 1280, 4096, num_tokens, 8, dtype, activation=SWIGLUSTEP)
    if num_tokens >= 1400 and is_hopper():
        config = choose_config("hopper", num_tokens * 8, 32, 32, 1280)
        assert config.w13.hopper and config.pdl == (num_tokens == 1400)
    layer = make(case)
    run(layer, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(layer, case)
    fresh = make(replace(case, seed=1))
    layer.x.copy_(fresh.x)
    layer.topk_ids.copy_(fresh.topk_ids)
    out.fill_(torch.nan)
    graph.replay()
    # Torch in float32 differs from float64 as these kernels do: of the 20,000 pairs of
    # 2500 tokens 19 have another integer, and one token is off by 1.05 steps.
    check(out, reference(layer, case), rare=num_tokens // 1000)


# --- where the engine applies them ---


def moe_config(case: Case, **options: Any) -> FusedMoEConfig:
    config = FusedMoEConfig(
        num_experts=case.num_experts,
        experts_per_token=case.top_k,
        hidden_dim=case.hidden,
        intermediate_size_per_partition=case.width,
        num_local_experts=case.num_experts,
        num_logical_experts=case.num_experts,
        activation=case.activation,
        device=DEVICE,
        routing_method=RoutingMethodType.Unspecified,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=case.dtype,
    )
    for name, value in options.items():
        setattr(config, name, value)
    return config


def pretend(monkeypatch: pytest.MonkeyPatch, is_cuda: bool, capability: int) -> None:
    """A GPU, and upstream's kernel for it that says that it was asked."""
    platform = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: is_cuda,
        is_device_capability=lambda asked: asked == capability,
    )
    for module in (quark_moe, int8_triton):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(fused_moe, "fused_experts", lambda *_, **__: "upstream's")


def apply(made: Layer, case: Case, moe: FusedMoEConfig) -> Tensor | str:
    """What Quark's method makes of the layer."""
    method = QuarkW8A8Int8MoEMethod.__new__(QuarkW8A8Int8MoEMethod)
    method.moe = moe
    method.moe_quant_config = made.quant_config
    layer = SimpleNamespace(
        w13_weight=made.w13,
        w2_weight=made.w2,
        activation=case.activation,
        apply_router_weight_on_input=False,
        expert_map=None,
        global_num_experts=case.num_experts,
    )
    return method.apply(layer, made.x, made.topk_weights, made.topk_ids, None)


@pytest.mark.parametrize(
    "backend, is_cuda, capability, is_used",
    [
        ("auto", True, 90, True),
        ("triton", True, 90, False),
        ("auto", True, 80, False),
        ("auto", True, 100, False),
        ("auto", False, 90, False),  # gfx90a
    ],
)
def test_quark_method_uses_it(
    backend: str,
    is_cuda: bool,
    capability: int,
    is_used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper, unless the user asks for upstream's kernel."""
    case = Case(num_tokens=2)
    made = make(case)
    pretend(monkeypatch, is_cuda, capability)
    out = apply(made, case, moe_config(case, moe_backend=backend))
    if is_used:
        assert isinstance(out, Tensor)
        check(out, reference(made, case))
    else:
        assert out == "upstream's"


def on_meta(case: Case, gated: bool, rng: torch.Generator) -> Layer:
    """The layer without memory, with scales of either kind."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    num, width, hidden = case.num_experts, case.width, case.hidden
    rows = 2 * width if gated else width
    return Layer(
        empty(case.num_tokens, hidden, dtype=case.dtype),
        empty(num, rows, hidden, dtype=torch.int8),
        empty(num, hidden, width, dtype=torch.int8),
        empty(case.num_tokens, case.top_k),
        empty(case.num_tokens, case.top_k, dtype=torch.int32),
        None,
        FusedMoEQuantConfig.make(
            torch.int8,
            w1_scale=empty(num) if case.per_tensor else empty(num, rows, 1),
            w2_scale=empty(num) if case.per_tensor else empty(num, hidden, 1),
            a1_scale=empty() if case.static else None,
            a2_scale=empty() if case.static else None,
            per_act_token_quant=not case.static,
        ),
    )


def test_serves_what_it_knows(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random layers each that is served passes the kernels' own check; each other
    goes to upstream's kernel, and no two conditions but these decide."""
    pretend(monkeypatch, True, 90)

    def choose(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=rng))]

    outcomes = set()
    for _ in range(1000):
        case = Case(
            width=choose(16, 48, 88, 160, 176, 1280, 1288, 7),
            hidden=choose(64, 4096, 5120, 2880, 4104, 7168, 100),
            dtype=choose(*int8_moe.DTYPES, torch.float64),
            activation=choose(*int8_moe.ACTIVATIONS, *MoEActivation),
            per_tensor=choose(True, False),
            static=choose(True, False),
        )
        gated = choose(True, True, True, False)
        made = on_meta(case, gated, rng)
        moe = moe_config(case, is_act_and_mul=gated)
        try:
            knows = case.activation in int8_moe.ACTIVATIONS
            int8_moe._check(made.x, made.w13, made.w2, made.topk_ids, made.quant_config)
        except ValueError:
            knows = False
        assert int8_moe.serves(moe) == knows, (case, gated)
        out = apply(made, case, moe)
        if knows:
            assert isinstance(out, Tensor) and out.shape == made.x.shape
        else:
            assert out == "upstream's"
        outcomes.add((knows, case.width % 16 == 0, case.hidden % 16 == 0, gated))
    assert {known for known, *_ in outcomes} == {True, False}


def test_width_of_a_sixteenth_goes_to_upstreams_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1408 columns over 16 ranks."""
    pretend(monkeypatch, True, 90)
    case = Case(width=1408 // 16)
    assert apply(make(case), case, moe_config(case)) == "upstream's"
    assert int8_moe.why_not(moe_config(case)) == (
        "the hidden size 64 and a rank's width 88 are not both multiples of 16"
    )


def test_layers_that_are_not_to_depend_on_the_batch_go_to_upstreams_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, True, 90)
    case = Case()
    assert int8_moe.serves(moe_config(case))
    monkeypatch.setattr(int8_moe.envs, "VLLM_BATCH_INVARIANT", True)
    assert apply(make(case), case, moe_config(case)) == "upstream's"


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_triton_without_gluon_goes_to_upstreams_kernel(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gluon is wanted for many tokens alone: the first of them would be too late."""

    def missing() -> None:
        raise error("triton.experimental.gluon")

    pretend(monkeypatch, True, 90)
    monkeypatch.setattr(int8_moe, "_hopper", missing)
    int8_moe._import_hopper.cache_clear()
    try:
        case = Case()
        assert apply(make(case), case, moe_config(case)) == "upstream's"
    finally:
        int8_moe._import_hopper.cache_clear()
