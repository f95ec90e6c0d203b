# SPDX-License-Identifier: Apache-2.0
"""Queries rotated on a CPU, in each shape that models hand over, against float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
    ),
    pytest.mark.needs_group("cpu"),
]

NUM_TOKENS, HEADS, SIZE, THETA = 7, 3, 16, 10_000.0
FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}


def rotated(x: Tensor, positions: Tensor, neox: bool) -> Tensor:
    """Each pair of x [tokens, heads, size] as one complex number, times
    exp(i * position / theta^(2 * pair / size)): RoFormer, section 3.2."""
    out = torch.empty(x.shape, dtype=torch.float64)
    half = x.shape[-1] // 2
    for token, position in enumerate(positions.tolist()):
        for pair in range(half):
            first, second = (pair, pair + half) if neox else (2 * pair, 2 * pair + 1)
            angle = position / THETA ** (2 * pair / x.shape[-1])
            a, b = x[token, :, first].double(), x[token, :, second].double()
            out[token, :, first] = a * math.cos(angle) - b * math.sin(angle)
            out[token, :, second] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("shape", ["flat", "heads", "part of heads"])
def test_matches_float64(
    shape: str, neox: bool, rng: torch.Generator, vllm_config: VllmConfig
) -> None:
    rope = get_rope(
        SIZE,
        max_position=64,
        is_neox_style=neox,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        dtype=torch.float32,
    )
    positions = torch.randint(64, (NUM_TOKENS,), generator=rng, device="cpu")
    # DeepSeek rotates the end of each head, and one head of keys.
    queries, keys = (
        torch.randn(NUM_TOKENS, num, 2 * SIZE, generator=rng, **FLOAT)[..., SIZE:]
        for num in (HEADS, 1)
    )
    given = [queries, keys]
    if shape != "part of heads":
        given = [each.contiguous() for each in given]
    if shape == "flat":
        given = [each.flatten(1) for each in given]
    # What the engine calls; a layer by itself would be in torch.
    found = rope.forward_cpu(positions, *(each.clone() for each in given))
    for each, x in zip(found, (queries, keys), strict=True):
        expected = rotated(x, positions, neox)
        error = (each.double().reshape(expected.shape) - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()
