# SPDX-License-Identifier: Apache-2.0
"""What the fork does on ROCm; elsewhere seen with the platform faked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from packaging.version import Version
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.kernels.linear import TritonInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
    FewTokensInt8ScaledMMLinearKernel,
    run_int8_linear,
)
from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
    TritonInt8Experts,
)
from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs
from vllm.model_executor.layers.fused_moe.router import cpu_topk
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.platforms import current_platform

from tests.moe_layers import make_experts

ROOT = Path(__file__).parents[2]
ON_ROCM = pytest.mark.skipif(
    not current_platform.is_rocm(), reason="needs ROCm; test_with_the_platform_faked"
)
NOT_ON_ROCM = pytest.mark.skipif(
    current_platform.is_rocm(), reason="ROCm is really here, no need to fake it"
)
# Triton 3.6's interpreter makes numbers of arrays, which NumPy 2.4 refuses.
INTERPRETED = pytest.mark.skipif(
    Version(numpy.__version__) >= Version("2.4"),
    reason=f"needs NumPy below 2.4, {numpy.__version__} is installed",
)
# With a platform that is no CPU vLLM loads the library for AVX-512.
HAS_AVX512 = pytest.mark.skipif(
    current_platform.is_cpu()
    and "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="needs a CPU with AVX-512: what vLLM loads where ROCm is faked uses it",
)
FAKED = ("-p", "tests.platforms.faked_rocm")
# Of these the tests that ask for what is not there: a compiled kernel of experts, and
# rounding to bfloat16, which Triton's interpreter cuts.
SUITE = (
    "tests/platforms/test_rocm.py",
    "tests/quantization/test_quark_int8_moe.py",
    "tests/quantization/test_quark_int8_linear.py",
    "tests/quantization/test_quark_exclude.py",
)
NOT_THERE = "not product and not eplb_moved"


def run_pytest(*arguments: str) -> list[str]:
    """The lines that a pytest of its own says; no GPU is there for it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT,
        env={name: s for name, s in os.environ.items() if "PYTEST" not in name}
        | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout.splitlines()


@pytest.mark.slow  # other tests once more
@NOT_ON_ROCM
@INTERPRETED
@HAS_AVX512
def test_with_the_platform_faked():
    """Loading, processing, selection and guards; kernels in Triton's interpreter."""
    said = run_pytest(*FAKED, *SUITE, "-k", NOT_THERE, "-rs")
    assert not any("needs ROCm" in line for line in said)


@pytest.mark.slow
@NOT_ON_ROCM
@HAS_AVX512
def test_the_same_tests_are_collected():
    here, there = (
        {
            line
            for line in run_pytest(*platform, "--collect-only", "tests")
            if "::" in line
        }
        for platform in ((), FAKED)
    )
    assert len(here) > 1000
    assert here == there


@pytest.fixture
def _context(vllm_config: VllmConfig) -> None:
    """Layers are built under a current VllmConfig."""


def experts(config: QuarkConfig) -> Any:
    return make_experts(
        num_experts=4,
        top_k=2,
        hidden_size=64,
        intermediate_size=32,
        quant_config=config,
        prefix="model.layers.0.moe.experts",
    )


@ON_ROCM
@pytest.mark.usefixtures("_context")
def test_experts_take_upstreams_kernel(quark_dict):
    """The INT8 MoE's own kernels were not run on AMD's GPUs."""
    layer = experts(QuarkConfig.from_config(quark_dict()))
    layer.quant_method.process_weights_after_loading(layer)
    kernel = layer.quant_method.moe_kernel.fused_experts
    assert type(kernel) is TritonInt8Experts
    config = kernel.quant_config
    assert config.use_int8_w8a8 and config.per_act_token_quant
    assert config.w1_scale.shape == (4, 64, 1)


@ON_ROCM
@pytest.mark.usefixtures("_context")
def test_scheme_that_upstreams_kernel_misreads_is_refused(quark_dict):
    with pytest.raises(NotImplementedError, match="scales of other channels"):
        experts(QuarkConfig.from_config(quark_dict(static=True)))


@ON_ROCM
@pytest.mark.usefixtures("_context")
def test_linear_layers_take_the_triton_kernel(quark_dict):
    """Without AITER, which has to be asked for."""
    config = QuarkConfig.from_config(quark_dict())
    layer = ReplicatedLinear(
        64, 48, quant_config=config, prefix="model.layers.0.o_proj"
    )
    assert isinstance(layer.scheme.kernel, TritonInt8ScaledMMLinearKernel)


@ON_ROCM
@pytest.mark.needs_group("kernels")
@pytest.mark.usefixtures("_context")
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_linear_layers_take_ours_where_that_is_asked_for(
    quark_dict, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator, num_tokens: int
):
    """Few tokens go through our kernel, more through upstream's Triton kernel: there is
    no CUTLASS that could be called."""
    monkeypatch.setenv("VLLM_QUARK_INT8_KERNELS", "on")
    config = QuarkConfig.from_config(quark_dict())
    layer = ReplicatedLinear(
        64, 48, bias=False, quant_config=config, prefix="model.layers.0.o_proj"
    )
    assert isinstance(layer.scheme.kernel, FewTokensInt8ScaledMMLinearKernel)
    weight = torch.randint(-127, 128, (48, 64), generator=rng, dtype=torch.int8)
    scale = torch.rand(48, generator=rng) / 100
    layer.weight_loader(layer.weight, weight)
    layer.weight_scale.weight_loader(layer.weight_scale, scale)
    layer.quant_method.process_weights_after_loading(layer)
    # Whole numbers up to 127, one of which is that: quantizing changes none.
    x = torch.randint(-126, 127, (num_tokens, 64), generator=rng)
    x[:, 0] = 127
    with (
        patch.object(int8_few_tokens, "run_int8_linear") as ours,
        # Registered for GPUs, and tensors lie on the CPU where the platform is faked.
        patch.object(torch.ops.quark_int8, "int8_linear", int8_few_tokens.int8_linear),
    ):
        ours.side_effect = run_int8_linear
        out, _ = layer(x.half().to(layer.weight.device))
    assert ours.called == (num_tokens == 1)
    expected = x.double() @ weight.double().t() * scale.double()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-3, atol=1e-3)


@ON_ROCM
@pytest.mark.parametrize("name", ["topk_softmax", "topk_sigmoid"])
def test_routing_is_not_the_cpus(name: str):
    """Patch 0005 looks for a CPU, and for nothing else."""
    weights, ids = torch.empty(3, 2), torch.empty(3, 2, dtype=torch.int32)
    with (
        patch.object(cpu_topk, name) as ours,
        patch.object(torch.ops, "_moe_C") as extension,
    ):
        getattr(ops, name)(weights, ids, ids, torch.rand(3, 8), False, None)
    assert not ours.called
    assert getattr(extension, name).called


@ON_ROCM
def test_tuned_configs_are_looked_for():
    """There are none for AMD's GPUs: upstream's defaults serve, and no other chip's."""
    assert get_moe_configs(288, 1280, "int8_w8a8") is None
