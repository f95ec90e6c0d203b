# SPDX-License-Identifier: Apache-2.0
"""INT8 on a CPU: quantization, exact products on each instruction set, linear layers.

References are exact integers and float64; none of them multiplies int8.
"""

import os
import platform
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm._custom_ops as ops
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn
from vllm.model_executor.kernels.linear.scaled_mm import cpu_exact
from vllm.model_executor.kernels.linear.scaled_mm.cpu import (
    CPUInt8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.cpu_exact import (
    CPUExactInt8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils import cpu_int8_utils
from vllm.model_executor.layers.quantization.utils.cpu_int8_utils import (
    has_exact_int8_dot,
    int8_mm,
    per_token_quant_int8,
    per_token_quant_int8_asymmetric,
    static_per_tensor_quant_int8,
)
from vllm.platforms import PlatformEnum, current_platform
from vllm.triton_utils import tl, triton

# By name: to mypy these are the overlay's folders.
linear = import_module("vllm.model_executor.kernels.linear")
int8_utils = import_module("vllm.model_executor.layers.quantization.utils.int8_utils")

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = st_numpy.arrays(
    np.float32,
    st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=17),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def full_range(*shape: int, rng: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    return a.long() @ b.long().t()


# --- quantization ---


def quantized_in_decimal(row: np.ndarray) -> tuple[list[int], np.float32]:
    """The rule of `per_token_quant_int8`: two float32 operations, then decimal."""
    absmax = max(np.abs(row).max(), np.float32(1e-10))
    factor = np.float32(127) / absmax
    steps = [Decimal(float(np.float32(x * factor))) for x in row]
    whole = [int(x.quantize(Decimal(1), ROUND_HALF_UP)) for x in steps]
    return whole, absmax / np.float32(127)


@given(ROWS)
def test_per_token_quant_rounds_each_row_by_the_rule(x):
    x_q, scale = per_token_quant_int8(torch.from_numpy(x))
    assert (x_q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (len(x), 1)
    for row, row_q, row_scale in zip(x, x_q.tolist(), scale[:, 0], strict=True):
        expected, expected_scale = quantized_in_decimal(row)
        assert row_q == expected
        assert row_scale.item() == expected_scale


def test_per_token_quant_at_every_half():
    """Halves go away from zero; the float32 before a half goes to zero."""
    halves = torch.arange(-126.5, 127, dtype=torch.float32)
    toward_zero = torch.nextafter(halves, torch.zeros(()))
    x = torch.stack([halves, toward_zero])
    x = torch.cat([x, torch.full((2, 1), 127.0)], dim=1)  # a scale of one
    x_q, scale = per_token_quant_int8(x)
    assert torch.equal(scale, torch.ones(2, 1))
    assert x_q[0, :-1].tolist() == [int(h + 0.5 * np.sign(h)) for h in halves.tolist()]
    assert x_q[1, :-1].tolist() == [int(h) for h in halves.tolist()]


def test_per_token_quant_of_zeros():
    x_q, scale = per_token_quant_int8(torch.zeros(2, 5, dtype=torch.bfloat16))
    assert not x_q.any()
    assert torch.equal(scale, torch.full((2, 1), 1e-10) / 127)


@triton.jit
def round_int8(x):
    """libdevice's round, which Triton's interpreter lacks: halves away from zero."""
    return tl.where(x < 0, tl.ceil(x - 0.5), tl.floor(x + 0.5)).to(tl.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_token_quant_equals_upstream_kernel(dtype, rng, monkeypatch):
    """Triton's interpreter divides in IEEE float32, so all bits agree."""
    monkeypatch.setattr(int8_utils, "round_int8", round_int8)
    x = torch.randn(99, 96, generator=rng).to(dtype)
    x[:, 0] = x.abs().amax(dim=1) / 2  # a half, in exact arithmetic
    x[0] = torch.arange(96) - 33.5
    x[0, 0] = 127
    x[1] = 0
    expected_q, expected_scale = int8_utils.per_token_quant_int8(x)
    x_q, scale = per_token_quant_int8(x)
    assert torch.equal(x_q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.skipif(
    not ops._supports_onednn,
    reason="needs scaled_int8_quant: vLLM's AVX2 build lacks it",
)
def test_static_quant_equals_upstream_kernel(rng):
    x = torch.randn(9, 64, generator=rng) * 100
    x[0] = (torch.arange(64) - 31.5) / 2  # halves
    scale = torch.tensor(0.5)
    expected_q, _, _ = ops.scaled_int8_quant(x, scale=scale)
    x_q, row_scale = static_per_tensor_quant_int8(x, scale)
    assert torch.equal(x_q, expected_q)
    assert x_q.min() == -128 and x_q.max() == 127  # it saturates
    assert torch.equal(row_scale, torch.full((9, 1), 0.5))


@given(ROWS)
def test_asymmetric_quant_is_within_half_a_step(x):
    """Of 1/255 of the row's range; a row of equal numbers is held by one step."""
    x_q, scale, zero_point = per_token_quant_int8_asymmetric(torch.from_numpy(x))
    assert (x_q.dtype, scale.dtype, zero_point.dtype) == (
        torch.int8,
        torch.float32,
        torch.int32,
    )
    assert scale.shape == zero_point.shape == (len(x), 1)
    exact = x.astype(np.float64)
    held = (x_q.double() - zero_point.double()) * scale.double()
    error = np.abs(held.numpy() - exact).max(axis=1)
    span, absmax = np.ptp(exact, axis=1), np.abs(exact).max(axis=1)
    is_equal = span <= absmax * 2**-12
    # The zero point and x / scale are as exact as float32 has them.
    step = span / 255 * (0.5 + 255 * absmax / np.maximum(span, 1e-30) * 2**-22)
    assert (error <= np.where(is_equal, absmax * 2**-12 + 1e-11, step)).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-20])
def test_asymmetric_quant_of_equal_numbers(value):
    x_q, scale, zero_point = per_token_quant_int8_asymmetric(torch.full((2, 5), value))
    held = (x_q.double() - zero_point) * scale.double()
    assert held.sub(value).abs().max() <= abs(value) * 1e-6 + 1e-12


@pytest.mark.skipif(
    not ops._supports_onednn,
    reason="needs dynamic_scaled_int8_quant: vLLM's AVX2 build lacks it",
)
def test_asymmetric_quant_equals_upstream_kernel(rng):
    x = torch.randn(99, 96, generator=rng) + 3 * torch.randn(99, 1, generator=rng)
    expected = ops.onednn_scaled_int8_quant(x, None, None, False)
    for found, upstreams in zip(
        per_token_quant_int8_asymmetric(x), expected, strict=True
    ):
        assert torch.equal(found, upstreams.view_as(found))
    scale, zero_point = torch.tensor(0.03), torch.tensor(-17, dtype=torch.int32)
    expected_q, _, _ = ops.onednn_scaled_int8_quant(x, scale, zero_point, False)
    x_q, _ = static_per_tensor_quant_int8(x, scale, zero_point)
    assert torch.equal(x_q, expected_q)
    assert x_q.min() == -128 and x_q.max() == 127  # it saturates


# --- products ---

PRODUCTS: dict[str, Any] = {
    "int8_mm": int8_mm,
    "float32": cpu_int8_utils._int8_mm_in_float32,
    "op": torch.ops.quark_int8.cpu_int8_mm,
}
each_product = pytest.mark.parametrize("product", PRODUCTS)


@each_product
@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 33, 100])
@pytest.mark.parametrize(
    "n, k", [(1, 1), (5, 1), (3, 7), (64, 64), (257, 1025), (33, 4096)]
)
def test_product_is_exact(product, m, n, k, rng):
    a, b = full_range(m, k, rng=rng), full_range(n, k, rng=rng)
    result = PRODUCTS[product](a, b)
    assert result.dtype == torch.int32
    assert result.is_contiguous()
    assert torch.equal(result.long(), exact_product(a, b))


@each_product
@pytest.mark.parametrize("left, right", [(-128, -128), (-128, 127), (127, 127)])
def test_product_of_the_largest_values_is_exact(product, left, right):
    """The sums pass 2**24, where float32 stops holding every integer, and are odd."""
    a = torch.full((17, 4097), left, dtype=torch.int8)
    b = torch.full((19, 4097), right, dtype=torch.int8)
    b[:, 0] = 1
    assert torch.equal(PRODUCTS[product](a, b).long(), exact_product(a, b))


def test_product_takes_rows_that_are_apart(rng):
    a, b = full_range(8, 96, rng=rng)[:, :64], full_range(128, 64, rng=rng)[::64]
    assert b.stride(0) == 4096
    assert torch.equal(int8_mm(a, b).long(), exact_product(a, b))


def test_product_is_sound_where_compiled(rng):
    a, b = full_range(3, 64, rng=rng), full_range(5, 64, rng=rng)
    torch.library.opcheck(torch.ops.quark_int8.cpu_int8_mm.default, (a, b))


ON_EACH_ISA = """
import sys, torch
from vllm.model_executor.layers.quantization.utils import cpu_int8_utils as utils
largest = torch.full((64, 1024), 127, dtype=torch.int8)
for a, b in (largest, largest), (largest, ~largest), (~largest, ~largest):
    for rows in (1, 4, 16, 64):
        expected = a[:rows].long() @ b.long().t()
        assert torch.equal(utils.int8_mm(a[:rows], b).long(), expected), rows
for _ in range(20):
    m, n, k = torch.randint(1, 100, (3,)).tolist()
    a, b = (torch.randint(-128, 128, (i, k), dtype=torch.int8) for i in (m, n))
    assert torch.equal(utils.int8_mm(a, b).long(), a.long() @ b.long().t()), (m, n, k)
print("exact dot:", utils.has_exact_int8_dot())
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs an x86-64 CPU: it names x86 ISAs"
)
@pytest.mark.parametrize(
    "isa", ["AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_AMX"]
)
def test_product_is_exact_on(isa):
    """oneDNN uses the best instruction set that this CPU has, up to the named one."""
    child = subprocess.run(
        [sys.executable, "-c", ON_EACH_ISA],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    # Without VNNI it saturates. On CPUs without AVX-512 torch does not ask oneDNN.
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    if isa in ("AVX2", "AVX512_CORE") and has_avx512:
        assert "exact dot: False" in child.stdout


ON_AVX2 = """
import torch
torch.cpu._is_avx512_supported = lambda: False  # vLLM then loads its build for AVX2
import vllm._custom_ops as ops
assert not ops._supports_onednn
assert not hasattr(torch.ops._C, "static_scaled_int8_quant")
import vllm.model_executor.kernels.linear
for dtype in (torch.bfloat16, torch.float32):
    x = (torch.randn(33, 70) * 100).to(dtype)
    scale, zero_point = torch.tensor(0.5), torch.tensor(-17, dtype=torch.int32)
    x[0] = (torch.arange(70) - 34.5) / 2  # halves
    steps = x.double() / 0.5
    found, _, _ = ops.scaled_int8_quant(x, scale=scale)
    assert torch.equal(found.double(), steps.round().clamp(-128, 127))
    found, _, _ = ops.scaled_int8_quant(x, scale, zero_point, symmetric=False)
    assert torch.equal(found.double(), (steps - 17).round().clamp(-128, 127))
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs an x86-64 CPU, for its AVX2 build"
)
def test_build_for_avx2_gets_the_operator_that_it_lacks():
    child = subprocess.run(
        [sys.executable, "-c", ON_AVX2], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


# --- linear layers ---

NAMES = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
WIDTHS = [24, 8]  # of a fused layer's two parts
OUT_FEATURES, IN_FEATURES = sum(WIDTHS), 40
INPUT_SCALES, ZERO_POINTS = [0.02, 0.015], [-100, 90]  # of each part, where static


def make_linear(
    rng: torch.Generator,
    channelwise: bool,
    static: bool,
    column: bool = True,
    symmetric: bool = True,
) -> tuple[CPUExactInt8ScaledMMLinearKernel, Any, Tensor]:
    """A kernel, its layer as loaded, and the weight's scale for each channel."""
    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=static,
        is_channelwise=channelwise,
        input_symmetric=symmetric,
    )
    layer: Any = nn.Module()
    layer.logical_widths = WIDTHS
    weight = full_range(OUT_FEATURES, IN_FEATURES, rng=rng)
    scale = torch.rand(OUT_FEATURES if channelwise else 2, generator=rng) + 0.5
    by_channel = scale if channelwise else scale.repeat_interleave(torch.tensor(WIDTHS))
    loaded = {
        "weight": weight,
        "weight_scale": scale[:, None] if channelwise and column else scale,
        "input_scale": torch.tensor(INPUT_SCALES) if static else None,
        "input_zero_point": torch.tensor(ZERO_POINTS, dtype=torch.int8)
        if static and not symmetric
        else None,
        "azp_adj": None,
    }
    for name, tensor in loaded.items():
        parameter = None if tensor is None else nn.Parameter(tensor, False)
        layer.register_parameter(name, parameter)
    kernel = CPUExactInt8ScaledMMLinearKernel(config, NAMES)
    kernel.process_weights_after_loading(layer)
    return kernel, layer, by_channel


@pytest.fixture
def no_upstream_kernel(monkeypatch):
    """A CPU on which upstream's kernel cannot be used."""
    monkeypatch.setattr(ops, "_supports_onednn", False)


def linear_in_float64(
    x: Tensor, weight: Tensor, scale: Tensor, static: bool, symmetric: bool
) -> Tensor:
    zero_point = torch.zeros(())
    if static and symmetric:
        x_q, x_scale = static_per_tensor_quant_int8(x, torch.tensor(max(INPUT_SCALES)))
    elif symmetric:
        x_q, x_scale = per_token_quant_int8(x)
    elif static:
        # One range holds those of both parts.
        pairs = list(zip(INPUT_SCALES, ZERO_POINTS, strict=True))
        smallest = min(s * (-128 - z) for s, z in pairs)
        step = (max(s * (127 - z) for s, z in pairs) - smallest) / 255
        zero_point = torch.tensor(round(-128 - smallest / step))
        x_scale = torch.full((len(x), 1), step)
        x_q, _ = static_per_tensor_quant_int8(x, torch.tensor(step), zero_point)
    else:
        x_q, x_scale, zero_point = per_token_quant_int8_asymmetric(x)
    product = (x_q.double() - zero_point.double()) @ weight.double().t()
    return product * x_scale.double() * scale.double()


@pytest.mark.usefixtures("no_upstream_kernel")
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "channelwise, column", [(True, True), (True, False), (False, False)]
)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3)], ids=str)
def test_linear_matches_float64(
    channelwise, column, static, symmetric, has_bias, shape, rng
):
    kernel, layer, scale = make_linear(rng, channelwise, static, column, symmetric)
    x = torch.randn(*shape, IN_FEATURES, generator=rng) + 1
    bias = torch.randn(OUT_FEATURES, generator=rng) * 100 if has_bias else None
    output = kernel.apply_weights(layer, x, bias)
    expected = linear_in_float64(
        x.reshape(-1, IN_FEATURES), layer.weight, scale, static, symmetric
    )
    if bias is not None:
        expected = expected + bias
    expected = expected.view(*shape, OUT_FEATURES)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("no_upstream_kernel")
def test_linear_of_rows_far_from_zero(rng):
    """A zero point times the sum of a channel's weights passes 32 bits."""
    kernel, layer, scale = make_linear(rng, True, False, symmetric=False)
    with torch.no_grad():
        layer.weight.fill_(127)
    kernel.process_weights_after_loading(layer)
    x = 5000 + 2 * torch.rand(3, IN_FEATURES, generator=rng)
    _, _, zero_point = per_token_quant_int8_asymmetric(x)
    assert (zero_point.double() * 127 * IN_FEATURES).abs().min() > 2**31
    expected = linear_in_float64(x, layer.weight, scale, False, False)
    output = kernel.apply_weights(layer, x)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("no_upstream_kernel")
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_compiles_whole_and_keeps_the_dtype(dtype, symmetric, rng):
    kernel, layer, _ = make_linear(rng, True, False, symmetric=symmetric)
    x = torch.randn(5, IN_FEATURES, generator=rng).to(dtype)
    compiled = torch.compile(kernel.apply_weights, fullgraph=True, backend="aot_eager")
    output = compiled(layer, x)
    assert output.dtype == dtype
    assert torch.equal(output, kernel.apply_weights(layer, x))


# (oneDNN in the build, exact int8 dot, AMX) -> who serves INT8 linear layers
CPUS = {
    "AVX2": (False, False, False, CPUExactInt8ScaledMMLinearKernel),
    "AVX2_VNNI": (False, True, False, CPUExactInt8ScaledMMLinearKernel),
    "AVX512": (True, False, False, CPUExactInt8ScaledMMLinearKernel),
    "AVX512_VNNI": (True, True, False, CPUInt8ScaledMMLinearKernel),
    "AMX": (True, True, True, CPUExactInt8ScaledMMLinearKernel),
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("cpu", CPUS)
def test_linear_kernel_of(cpu, symmetric, monkeypatch):
    has_onednn, is_exact, has_amx, expected = CPUS[cpu]
    monkeypatch.setattr(ops, "_supports_onednn", has_onednn)
    monkeypatch.setattr(cpu_exact, "has_exact_int8_dot", lambda: is_exact)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    chosen = linear.init_int8_linear_kernel(True, False, symmetric, "a test")
    assert type(chosen) is expected


def test_other_platforms_keep_their_kernels(monkeypatch):
    for name, kernels in linear._POSSIBLE_INT8_KERNELS.items():
        listed = CPUExactInt8ScaledMMLinearKernel in kernels
        assert listed == (name == PlatformEnum.CPU)
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(cpu_exact, "current_platform", gpu)
    assert CPUExactInt8ScaledMMLinearKernel.is_supported() == (False, "requires CPU.")


def test_probe_agrees_with_the_product(rng):
    """On this very CPU."""
    a, b = full_range(32, 512, rng=rng), full_range(64, 512, rng=rng)
    is_exact = torch.equal(torch._int_mm(a, b.t()).long(), exact_product(a, b))
    assert has_exact_int8_dot() == is_exact


def test_the_dot_is_tried_out_whatever_the_default_device():
    has_exact_int8_dot.cache_clear()
    with torch.device("meta"):
        on_meta = has_exact_int8_dot()
    has_exact_int8_dot.cache_clear()
    assert on_meta == has_exact_int8_dot()
