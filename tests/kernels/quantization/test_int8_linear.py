# SPDX-License-Identifier: Apache-2.0
"""INT8 linear layers of few tokens, against products of whole numbers in float64.

On a GPU if there is one, else in Triton's interpreter, which cuts bfloat16 off where
GPUs round, so it takes the other dtypes.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.kernels import int8_triton, linear
from vllm.model_executor.kernels.linear.scaled_mm import (
    cutlass,
    int8_few_tokens,
    triton,
)
from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
    Tiles,
    choose_tiles,
    run_int8_linear,
)
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.platforms.interface import Platform

from tests.kernels.utils import DEVICE, GPU, interpreted
from tests.platforms import pretended
from tests.quantization.utils import random_int8, random_scales

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
# In the interpreter a product takes seconds.
IN_TURN = [
    dtype
    if GPU or dtype == torch.float32
    else pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in DTYPES
]


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def random_rows(*shape: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Without what lies between two whole numbers: the interpreter rounds twice."""
    x = torch.randn(shape, generator=rng).to(dtype)
    steps = x.double() * 127 / x.double().abs().amax(dim=-1, keepdim=True)
    x[(steps - steps.floor() - 0.5).abs() < 1e-3] = 0
    return x.to(DEVICE)


def quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole numbers and their scales, both float64."""
    if scale is not None:
        divided = x.float() / scale
        return divided.round().clamp(-128, 127).double(), scale.double()
    absmax = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-10)
    inverse = (127.0 / absmax).double()
    return (x.double() * inverse).round(), (absmax / 127.0).double()


def expected(
    x: Tensor, weight: Tensor, scale: Tensor, static: Tensor | None, bias: Tensor | None
) -> Tensor:
    xq, x_scale = quantize(x, static)
    out = (xq @ weight.double().T) * x_scale * scale.double().view(1, -1)
    return out if bias is None else out + bias.double()


@interpreted
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", IN_TURN, ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("per_tensor", [False, True], ids=["channels", "tensor"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_equals_products_of_whole_numbers(
    dtype: torch.dtype, static: bool, per_tensor: bool, bias: bool, rng: torch.Generator
) -> None:
    """Rows of odd numbers, whole and cut blocks, one block each and several in turn.

    Nothing differs but the rounding of the output and of float32 scales.
    """
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    for (n, k), num_tokens, tiles in itertools.product(
        ((1, 16), (7, 48), (33, 272)),
        (1, 2, 5),
        (Tiles(1, 4, 1), Tiles(4, 4, 1024), Tiles(2, 8, 2)),
    ):
        x = random_rows(num_tokens, k, dtype=dtype, rng=rng)
        weight = random_int8(n, k, rng=rng).to(DEVICE)
        scale = random_scales(*((1,) if per_tensor else (n, 1)), rng=rng).to(DEVICE)
        # A few values lie beyond what it holds.
        input_scale = torch.tensor(1 / 64, device=DEVICE) if static else None
        added = torch.randn(n, generator=rng).to(dtype).to(DEVICE) if bias else None
        out = run_int8_linear(tiles, x, weight, scale, input_scale, added)
        reference = expected(x, weight, scale, input_scale, added)
        assert out.dtype == dtype and out.shape == (num_tokens, n)
        largest = reference.abs().max().item()
        torch.testing.assert_close(
            out.double(), reference, rtol=rtol, atol=1e-6 * largest
        )


@interpreted
@pytest.mark.usefixtures("unwritten_is_nan")
def test_the_same_bits_whoever_shares_the_batch(rng: torch.Generator) -> None:
    x = random_rows(2, 272, dtype=torch.float16, rng=rng)
    weight = random_int8(33, 272, rng=rng).to(DEVICE)
    scale = random_scales(33, 1, rng=rng).to(DEVICE)
    tiles = Tiles(4, 4, 2)
    together = run_int8_linear(tiles, x, weight, scale, None, None)
    for row, alone in zip(x, together, strict=True):
        found = run_int8_linear(tiles, row[None], weight, scale, None, None)
        assert torch.equal(found[0], alone)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Float64, one head after the other."""
    heads = gate.shape[1]
    by_head = x.double().view(x.shape[0], heads, -1)
    return (by_head * gate.double().sigmoid()[..., None]).view(x.shape)


@interpreted
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_heads_are_gated_before_they_are_quantized(
    static: bool, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Both kernels, against float64: a step of an int8 at most, and where a value lies
    between two alone."""
    input_scale = torch.tensor(1 / 64, device=DEVICE) if static else None
    for num_tokens, heads, head_dim in ((1, 1, 16), (3, 4, 48), (2, 6, 128)):
        k, n = heads * head_dim, 33
        x = torch.randn(num_tokens, k, generator=rng).to(dtype).to(DEVICE)
        gate = torch.randn(num_tokens, heads, generator=rng).to(dtype).to(DEVICE)
        exact = gated(x, gate)
        wanted, wanted_scale = quantize(exact, input_scale)
        xq, x_scale = int8_few_tokens.run_gate_and_quantize(x, input_scale, gate)
        assert (xq.double() - wanted).abs().max() <= 1
        steps = exact / wanted_scale
        is_half = (steps - steps.floor() - 0.5).abs() < 1e-3
        assert torch.equal(xq.double()[~is_half], wanted[~is_half])
        torch.testing.assert_close(x_scale.double(), wanted_scale, rtol=1e-6, atol=0.0)
        weight = random_int8(n, k, rng=rng).to(DEVICE)
        scale = random_scales(n, 1, rng=rng).to(DEVICE)
        out = run_int8_linear(Tiles(4, 4, 2), x, weight, scale, input_scale, None, gate)
        # The same numbers as by way of int8.
        reference = xq.double() @ weight.double().T * x_scale * scale.double().T
        torch.testing.assert_close(
            out.double(),
            reference,
            rtol=max(torch.finfo(dtype).eps, 1e-6),
            atol=1e-6 * reference.abs().max().item(),
        )


@interpreted
def test_gate_of_a_head_moves_that_head_alone(rng: torch.Generator) -> None:
    x = torch.randn(2, 64, generator=rng).to(DEVICE)
    input_scale = torch.tensor(1 / 64, device=DEVICE)
    gate = torch.zeros(2, 4, device=DEVICE)
    before, _ = int8_few_tokens.run_gate_and_quantize(x, input_scale, gate)
    gate[1, 2] = -100
    after, _ = int8_few_tokens.run_gate_and_quantize(x, input_scale, gate)
    assert torch.equal(after[1, 32:48], torch.zeros_like(after[1, 32:48]))
    after[1, 32:48] = before[1, 32:48]
    assert torch.equal(after, before)


@interpreted
def test_operator_takes_it_for_few_tokens_alone(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens, rows that are no whole vectors and rows that do not lie in registers
    are upstream's; leading dimensions stay; no token gives no row."""
    asked = []

    def upstreams(xq, weight, x_scale, w_scale, dtype, bias):
        asked.append(tuple(xq.shape))
        return torch.full((xq.shape[0], weight.shape[1]), 7.0, dtype=dtype)

    def quantized(x, scale):
        return x.to(torch.int8), None, None

    monkeypatch.setattr(int8_few_tokens.ops, "cutlass_scaled_mm", upstreams)
    monkeypatch.setattr(int8_few_tokens.ops, "scaled_int8_quant", quantized)

    def run(*size: int, n: int = 32, gate: Tensor | None = None) -> Tensor:
        x = random_rows(*size, dtype=torch.float32, rng=rng)
        weight = random_int8(n, size[-1], rng=rng).to(DEVICE).t()
        scale = random_scales(n, 1, rng=rng).to(DEVICE)
        return int8_few_tokens.int8_linear(x, weight, scale, None, None, gate)

    for size in ((1, 64), (4, 64), (1, 4, 64)):
        out = run(*size)
        assert out.shape == (*size[:-1], 32)
        assert not asked and not (out == 7).all()
    for size in ((5, 64), (0, 64), (1, 72), (1, 65552)):
        out = run(*size)
        assert out.shape == (size[0], 32)
        assert asked.pop() == size
    wide = run(2, 4, 64)
    assert wide.shape == (2, 4, 32)
    assert asked == [(8, 64)]
    asked.clear()
    # With a gate tokens are quantized here, few or many.
    monkeypatch.delattr(int8_few_tokens.ops, "scaled_int8_quant")
    out = run(5, 64, gate=torch.zeros(5, 4, device=DEVICE))
    assert asked.pop() == (5, 64) and (out == 7).all()
    open_ = run(1, 1, 64, gate=torch.full((1, 1, 4), 100.0, device=DEVICE))
    assert open_.shape == (1, 1, 32) and not asked


def test_large_weights_are_read_for_fewer_tokens() -> None:
    """What serves some tokens serves fewer, and smaller weights; every weight one."""
    most = [
        [m for m in range(70) if choose_tiles(m, n, 4096)]
        for n in (16, 1024, 4096, 4112, 14336, 65536)
    ]
    for tokens in most:
        assert tokens == list(range(1, len(tokens) + 1)) and tokens
    assert most == sorted(most, reverse=True)
    assert most[0] != most[-1]


@pytest.mark.parametrize("k", [16, 1536, 4096, 12288, 65536])
def test_a_block_lies_in_registers(k: int) -> None:
    tiles = choose_tiles(1, 4096, k)
    assert tiles is not None
    words = 1 << (k // 4 - 1).bit_length()
    # Two blocks, the row and what is multiplied; a thread has 255 registers.
    assert 2 * tiles.block_size_n * words <= tiles.num_warps * 32 * 128


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def apply(major: int, minor: int) -> None:
        for module in (linear, int8_triton, cutlass):
            monkeypatch.setattr(
                module, "current_platform", pretended.cuda(major, minor)
            )

    return apply


@pytest.fixture
def kernel_of_quarks_layer(vllm_config: VllmConfig, quark_dict) -> Callable[..., str]:
    def build(symmetric: bool = True) -> str:
        layer = ReplicatedLinear(
            64,
            32,
            bias=False,
            quant_config=QuarkConfig.from_config(quark_dict(symmetric=symmetric)),
            prefix="model.layers.0.proj",
        )
        return type(layer.scheme.kernel).__name__

    return build


@pytest.mark.parametrize(
    ("capability", "symmetric", "found"),
    [
        ((9, 0), True, "FewTokensInt8ScaledMMLinearKernel"),
        ((9, 0), False, "CutlassInt8ScaledMMLinearKernel"),
        ((8, 0), True, "CutlassInt8ScaledMMLinearKernel"),
        ((10, 0), True, "CutlassInt8ScaledMMLinearKernel"),
    ],
)
def test_quarks_layers_take_it_on_hopper(
    capability: tuple[int, int],
    symmetric: bool,
    found: str,
    pretend: Callable[[int, int], None],
    kernel_of_quarks_layer: Callable[..., str],
) -> None:
    """Where it was measured, for the activations that it quantizes."""
    pretend(*capability)
    assert kernel_of_quarks_layer(symmetric) == found


@pytest.mark.needs_patch("0031")
@pytest.mark.parametrize(
    ("platform", "upstreams", "served"),
    [
        (pretended.cuda(8, 0), "Cutlass", True),
        (pretended.cuda(8, 9), "Cutlass", True),
        (pretended.cuda(10, 0), "Cutlass", True),
        (pretended.cuda(12, 0), "Cutlass", True),
        (pretended.cuda(7, 5), "Cutlass", False),
        (pretended.rocm(), "Triton", True),
    ],
)
def test_other_gpus_take_it_where_that_is_asked_for(
    platform: Platform,
    upstreams: str,
    served: bool,
    kernel_of_quarks_layer: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that it is compiled for; the switch alone makes the difference."""
    for module in (linear, int8_triton, cutlass, triton):
        monkeypatch.setattr(module, "current_platform", platform)
    name = "{}Int8ScaledMMLinearKernel"
    assert kernel_of_quarks_layer() == name.format(upstreams)
    monkeypatch.setenv("VLLM_QUARK_INT8_KERNELS", "on")
    assert kernel_of_quarks_layer() == name.format("FewTokens" if served else upstreams)
    assert kernel_of_quarks_layer(symmetric=False) == name.format(upstreams)
    kernel = linear.init_int8_linear_kernel(True, False, True, "compressed-tensors")
    assert type(kernel).__name__ == name.format(upstreams)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert kernel_of_quarks_layer() == name.format(upstreams)


def test_layers_of_other_formats_keep_upstreams(
    pretend: Callable[[int, int], None],
) -> None:
    """compressed-tensors' scheme asks so; halves of steps round otherwise there."""
    pretend(9, 0)
    kernel = linear.init_int8_linear_kernel(True, False, True, "a test")
    assert type(kernel).__name__ == "CutlassInt8ScaledMMLinearKernel"


def test_is_not_chosen_where_batches_are_not_to_matter(
    pretend: Callable[[int, int], None],
    kernel_of_quarks_layer: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It rounds halves of steps otherwise than upstream's for more tokens."""
    pretend(9, 0)
    monkeypatch.setattr(int8_few_tokens.envs, "VLLM_BATCH_INVARIANT", True)
    assert kernel_of_quarks_layer() == "CutlassInt8ScaledMMLinearKernel"


@pytest.mark.parametrize(
    "disabled, found", [("FewTokens", "Cutlass"), ("Cutlass", "Triton")]
)
def test_it_can_be_put_aside(
    disabled: str,
    found: str,
    pretend: Callable[[int, int], None],
    kernel_of_quarks_layer: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUTLASS too, which it calls for more tokens."""
    pretend(9, 0)
    monkeypatch.setattr(triton, "current_platform", pretended.cuda(9, 0))
    name = "{}Int8ScaledMMLinearKernel"
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", name.format(disabled))
    assert kernel_of_quarks_layer() == name.format(found)
