# SPDX-License-Identifier: Apache-2.0
"""Which kernel applies INT8 experts, and what the modular kernel makes of it.

Platforms are pretended; what a class computes is computed here, on a GPU if there is
one, else in Triton's interpreter.
"""

import sys
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.kernels import int8_triton
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts import triton_int8_moe
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import experts, tensors
from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import Int8Experts
from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
    TritonInt8Experts,
)
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.oracle.int8 import (
    Int8MoeBackend,
    backend_to_kernel_cls,
    select_int8_moe_backend,
)
from vllm.model_executor.layers.fused_moe.oracle.quark_int8 import (
    SCHEMES,
    experts_classes,
    kInt8StaticTensorSym,
    quant_keys,
    select_quark_int8_experts,
)
from vllm.platforms.interface import Platform

from tests.kernels.moe.test_int8_moe import Case, Layer, check, make, reference
from tests.kernels.moe.utils import make_moe_config, run_experts_class
from tests.kernels.utils import interpreted
from tests.platforms import pretended

CPU = pytest.mark.needs_group("cpu")
LAYER = "model.layers.3.moe.experts"
STANDARD = mk.FusedMoEActivationFormat.Standard
# The class of upstream's that compressed-tensors takes by itself.
[UPSTREAMS] = backend_to_kernel_cls(Int8MoeBackend.TRITON)
PLATFORMS = {
    "cpu": pretended.cpu(),
    "turing": pretended.cuda(7, 5),
    "ampere": pretended.cuda(8, 0),
    "hopper": pretended.cuda(9, 0),
    "blackwell": pretended.cuda(10, 0),
    "rocm": pretended.rocm(),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    def apply(platform: Platform) -> None:
        modules = [int8_triton, experts, triton_int8_moe, mk]
        modules.append(sys.modules[UPSTREAMS.__module__])
        modules += [sys.modules[each.__module__] for each in experts_classes()]
        for module in modules:
            monkeypatch.setattr(module, "current_platform", platform)

    return apply


def moe_config(case: Case = Case(), **attributes: Any) -> Any:  # noqa: B008
    swiglustep = case.limit is not None
    options = dict(
        activation=MoEActivation.SWIGLUSTEP if swiglustep else MoEActivation.SILU,
        in_dtype=case.dtype,
    )
    return make_moe_config(
        case.num_experts, case.top_k, case.hidden, case.width, **options | attributes
    )


@pytest.mark.parametrize(
    "platform, backend, chosen",
    [
        ("hopper", "auto", "Int8Experts"),
        ("hopper", "quark_int8", "Int8Experts"),
        ("hopper", "triton", "TritonInt8Experts"),
        # Upstream's Quark method never looked at the option: nothing is refused.
        ("hopper", "marlin", "TritonInt8Experts"),
        ("ampere", "auto", "TritonInt8Experts"),
        ("ampere", "quark_int8", "Int8Experts"),
        ("blackwell", "auto", "TritonInt8Experts"),
        ("blackwell", "quark_int8", "Int8Experts"),
        ("turing", "auto", "TritonInt8Experts"),
        ("rocm", "auto", "TritonInt8Experts"),
        ("rocm", "quark_int8", "Int8Experts"),
        pytest.param("cpu", "auto", "Int8CpuExperts", marks=CPU),
        pytest.param("cpu", "quark_int8", "Int8CpuExperts", marks=CPU),
    ],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_quarks_experts(
    platform: str,
    backend: str,
    chosen: str,
    per_channel: bool,
    static: bool,
    pretend: Any,
) -> None:
    """Ours where they were measured, or where they are named; upstream's Triton kernel
    elsewhere, but for the scheme that it misreads."""
    pretend(PLATFORMS[platform])
    config = moe_config(moe_backend=backend)
    keys = quant_keys(per_channel, static)
    if chosen == "TritonInt8Experts" and per_channel and static:
        with pytest.raises(NotImplementedError, match="scales of other channels") as e:
            select_quark_int8_experts(config, *keys, LAYER)
        assert str(e.value).startswith(f"{LAYER}: ")
        assert ("--moe-backend quark_int8 tries it" in str(e.value)) == (
            backend == "auto" and platform != "turing"
        )
    else:
        assert select_quark_int8_experts(config, *keys, LAYER).__name__ == chosen


@pytest.mark.parametrize("platform", ["turing", pytest.param("cpu", marks=CPU)])
def test_refused_by_name(platform: str, pretend: Any) -> None:
    """Named, and not there; or a CPU and an activation that none knows."""
    pretend(PLATFORMS[platform])
    config = moe_config(moe_backend="quark_int8", activation=MoEActivation.GELU)
    with pytest.raises(NotImplementedError) as error:
        select_quark_int8_experts(config, *quant_keys(True, False), LAYER)
    said = str(error.value)
    assert said.startswith(f"{LAYER}: ") and "--moe-backend quark_int8" in said
    reason = "current device" if platform == "turing" else "gelu"
    assert f"kernel does not support {reason}" in said.lower().replace(
        "moeactivation.", ""
    )


def test_schemes_are_all_that_quark_writes() -> None:
    assert {quant_keys(c, s) for c in (True, False) for s in (True, False)} == {
        *SCHEMES
    }
    assert len(set(SCHEMES)) == 4
    assert kInt8StaticTensorSym.scale.group_shape.is_per_tensor()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_compressed_tensors_keeps_upstreams_choice(platform: str, pretend: Any) -> None:
    """`auto` means for it what it meant: a class of upstream's, or none."""
    pretend(PLATFORMS[platform])
    supported, _ = UPSTREAMS.is_supported_config(
        UPSTREAMS, moe_config(), *quant_keys(True, False), STANDARD
    )
    if not supported:
        with pytest.raises(NotImplementedError, match="No Int8 MoE backend supports"):
            select_int8_moe_backend(moe_config())
    else:
        chosen = select_int8_moe_backend(moe_config())
        assert chosen == (Int8MoeBackend.TRITON, UPSTREAMS)


@pytest.mark.parametrize(
    "platform, chosen",
    [
        ("hopper", "Int8Experts"),
        ("ampere", "Int8Experts"),
        ("rocm", "Int8Experts"),
        pytest.param("cpu", "Int8CpuExperts", marks=CPU),
    ],
)
def test_compressed_tensors_takes_ours_by_name(
    platform: str, chosen: str, pretend: Any
) -> None:
    pretend(PLATFORMS[platform])
    backend, experts_cls = select_int8_moe_backend(moe_config(moe_backend="quark_int8"))
    assert backend is Int8MoeBackend.TRITON  # the format of the weights
    assert experts_cls.__name__ == chosen


@pytest.mark.parametrize("platform", ["ampere", "hopper"])
def test_experts_that_are_not_quantized_choose_as_by_auto(
    platform: str, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of INT8 experts may have others beside them, in a draft for one."""
    pretend(PLATFORMS[platform])
    monkeypatch.setattr(unquantized, "current_platform", PLATFORMS[platform])
    named, auto = (
        unquantized.select_unquantized_moe_backend(moe_config(moe_backend=name))
        for name in ("quark_int8", "auto")
    )
    assert named == auto


def test_serves_what_it_knows(rng: torch.Generator, pretend: Any) -> None:
    """Of random layers each that is served passes the kernels' own check; each other
    does not, and no two conditions but these decide."""
    pretend(PLATFORMS["hopper"])

    def choose(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=rng))]

    outcomes = set()
    for _ in range(1000):
        case = Case(
            width=choose(16, 48, 88, 160, 176, 1280, 1288, 7),
            hidden=choose(64, 4096, 5120, 2880, 4104, 7168, 100),
            dtype=choose(*tensors.DTYPES, torch.float64),
            per_tensor=choose(True, False),
            static=choose(True, False),
        )
        gated = choose(True, True, True, False)
        activation = choose(*MoEActivation, *([MoEActivation.SILU] * 20))
        config = moe_config(case)
        config.activation = activation
        if isinstance(getattr(FusedMoEConfig, "is_act_and_mul", None), property):
            gated = activation.is_gated  # what newer releases tell it by
        else:
            config.is_act_and_mul = gated
        made = on_meta(case, gated)
        try:
            tensors.check(made.x, made.experts, made.routing)
            knows = activation in (MoEActivation.SILU, MoEActivation.SWIGLUSTEP)
        except ValueError:
            knows = False
        supported, reason = Int8Experts.is_supported_config(
            Int8Experts, config, *quant_keys(not case.per_tensor, case.static), STANDARD
        )
        assert supported == knows and (reason is None) == knows, (case, gated, reason)
        outcomes.add((knows, case.width % 16 == 0, case.hidden % 16 == 0, gated))
    assert {known for known, *_ in outcomes} == {True, False}


def on_meta(case: Case, gated: bool) -> Layer:
    """The layer without memory, with scales of either kind."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    num, width, hidden = case.num_experts, case.width, case.hidden
    rows = 2 * width if gated else width
    return Layer(
        empty(case.num_tokens, hidden, dtype=case.dtype),
        tensors.Experts(
            empty(num, rows, hidden, dtype=torch.int8),
            empty(num, hidden, width, dtype=torch.int8),
            empty(num) if case.per_tensor else empty(num, rows, 1),
            empty(num) if case.per_tensor else empty(num, hidden, 1),
            empty() if case.static else None,
            empty() if case.static else None,
        ),
        tensors.Routing(
            empty(case.num_tokens, case.top_k, dtype=torch.int32),
            empty(case.num_tokens, case.top_k),
        ),
    )


@pytest.mark.parametrize(
    "attributes, reason",
    [
        ({"intermediate_size_per_partition": 1408 // 16}, "88 are not both multiples"),
        ({"in_dtype": torch.float64}, "dtype torch.float64"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"swiglu_limit": 7.0}, "clip no SiLU at 7.0"),
    ],
)
def test_reasons(attributes: dict[str, Any], reason: str, pretend: Any) -> None:
    pretend(PLATFORMS["hopper"])
    supported, said = Int8Experts.is_supported_config(
        Int8Experts, moe_config(**attributes), *quant_keys(True, False), STANDARD
    )
    assert not supported and reason in str(said)


def test_batches_that_are_not_to_matter(
    pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tiles depend on the batch; upstream's kernel serves then."""
    pretend(PLATFORMS["hopper"])
    monkeypatch.setattr(mk.envs, "VLLM_BATCH_INVARIANT", True)
    chosen = select_quark_int8_experts(moe_config(), *quant_keys(True, False), LAYER)
    assert chosen is TritonInt8Experts


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_triton_without_gluon(
    error: type[Exception], pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gluon is wanted for many tokens alone: the first of them would be too late."""

    class Missing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.endswith("hopper_kernels"):
                raise error("triton.experimental.gluon")

    package = sys.modules["vllm.model_executor.layers.fused_moe.experts.quark_int8"]
    pretend(PLATFORMS["hopper"])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.hopper_kernels")
    monkeypatch.delattr(package, "hopper_kernels")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    experts._has_gluon.cache_clear()
    try:
        keys = quant_keys(True, False)
        assert select_quark_int8_experts(moe_config(), *keys, LAYER) is (
            TritonInt8Experts
        )
    finally:
        experts._has_gluon.cache_clear()


def quant_config(layer: Layer) -> FusedMoEQuantConfig:
    e = layer.experts
    return FusedMoEQuantConfig.make(
        torch.int8,
        w1_scale=e.w13_scale,
        w2_scale=e.w2_scale,
        a1_scale=e.a13_scale,
        a2_scale=e.a2_scale,
        w1_bias=e.w13_bias,
        w2_bias=e.w2_bias,
        per_act_token_quant=e.a13_scale is None,
    )


def run_modular(
    layer: Layer, case: Case, on_input: bool = False, **attributes: Any
) -> Tensor:
    return run_experts_class(
        Int8Experts,
        moe_config(case, **attributes),
        quant_config(layer),
        layer.x,
        layer.experts.w13,
        layer.experts.w2,
        layer.routing.topk_weights,
        layer.routing.topk_ids,
        layer.routing.expert_map,
        on_input,
    )


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(static=True, bias=True),
        Case(per_tensor=True),
        Case(limit=7.0, bias=True),
        Case(present=(1, 3, 4)),
    ],
)
def test_modular_kernel_matches_float64(case: Case, rng: torch.Generator) -> None:
    case = replace(case, seed=int(torch.randint(1 << 30, (), generator=rng)))
    layer = make(case)
    num_local_experts = len(case.present) if case.present else case.num_experts
    out = run_modular(layer, case, num_local_experts=num_local_experts)
    check(out, reference(layer, case), rare=2)


@interpreted
def test_router_weight_on_input() -> None:
    """The modular kernel weighs the input, in its dtype; outputs are not weighed."""
    case = Case(top_k=1, apply_router_weight=False)
    layer = make(case)
    out = run_modular(layer, case, on_input=True)
    weighed = replace(layer, x=layer.x * layer.routing.topk_weights)
    check(out, reference(weighed, case))


@interpreted
def test_no_tokens() -> None:
    case = Case(num_tokens=0)
    assert run_modular(make(case), case).shape == (0, case.hidden)


@interpreted
@pytest.mark.needs_group("kernels")
def test_experts_write_the_layers_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no workspace to copy from."""
    case = Case()
    layer = make(case)
    apply = Int8Experts.apply
    written = []

    def record(self: Int8Experts, output: Tensor, *args: Any, **options: Any) -> None:
        written.append(output.data_ptr())
        apply(self, output, *args, **options)

    monkeypatch.setattr(Int8Experts, "apply", record)
    out = run_modular(layer, case)
    assert written == [out.data_ptr()]


@interpreted
@pytest.mark.skipif(
    "inplace" not in signature(mk.FusedMoEKernel).parameters,
    reason="needs a release whose layers may write over their input",
)
def test_the_input_is_not_written_over_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer whose output is its input's memory copies, as upstream's do."""
    case = Case(num_tokens=20)
    layer = make(case)
    expected = reference(layer, case)
    monkeypatch.setattr(mk, "disable_inplace", lambda: False)
    out = run_modular(layer, case, disable_inplace=False)
    assert out.data_ptr() == layer.x.data_ptr()
    check(out, expected)


def test_only_what_is_alike_is_written_instead(rng: torch.Generator) -> None:
    out, other = (torch.rand((4, 32), generator=rng) for _ in range(2))
    experts = object.__new__(Int8Experts)
    assert experts.takes_output(out, other)
    for output in (None, out[:3], out.bfloat16(), out.t().contiguous().t()):
        assert not experts.takes_output(output, other)
