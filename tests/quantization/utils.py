# SPDX-License-Identifier: Apache-2.0
"""Random numbers as a Quark INT8 export holds them, and memory that shows gaps."""

import pytest
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform


def skip_without_int8_ops() -> None:
    """vLLM's build for CPUs without AVX-512 lacks its own INT8 kernels. Without the
    group `cpu` it ends there with an AttributeError, as stock does."""
    if current_platform.is_cpu() and not hasattr(
        torch.ops._C, "static_scaled_int8_quant"
    ):
        pytest.skip("needs vLLM's INT8 kernels: a CPU with AVX-512, or a GPU")


def random_int8(*shape: int, rng: torch.Generator) -> Tensor:
    """int8 in [-127, 127] without zeros."""
    magnitude = torch.randint(1, 128, shape, generator=rng, device="cpu")
    sign = torch.randint(0, 2, shape, generator=rng, device="cpu") * 2 - 1
    return (magnitude * sign).to(torch.int8)


def random_scales(*shape: int, rng: torch.Generator) -> Tensor:
    """float32 between 2^-9 and 2^-7."""
    uniform = torch.rand(shape, generator=rng, device="cpu", dtype=torch.float32)
    return (uniform * 3 + 1) / 512


@torch.no_grad()
def poison(module: nn.Module) -> None:
    """Fill every parameter with what no test loads: NaN, or -128 where it is int8."""
    for param in module.parameters():
        param.fill_(-128 if param.dtype == torch.int8 else torch.nan)
