# SPDX-License-Identifier: Apache-2.0
"""Two GPUs answer as one does, whatever they share."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import AGAIN, Answers, ask, ask_data_parallel
from tests.v1.utils import (
    EXPORT,
    FIXTURES,
    NUM_TOKENS,
    PIPELINE,
    PROMPTS,
    assert_alike,
    assert_kernels,
)

NUM_EXPERTS = 16
EXPERT_PARALLEL: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
}

pytestmark = pytest.mark.gpu2


@pytest.fixture(scope="module")
def one() -> Answers:
    [answers] = ask(EXPORT, PROMPTS, NUM_TOKENS)
    assert len(answers.runs) == 1
    return answers


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        pytest.param(EXPERT_PARALLEL, marks=slow),
        pytest.param(PIPELINE, marks=slow),
    ],
    ids=["tensor", "expert", "pipeline"],
)
def test_two_ranks_answer_as_one(one: Answers, ranks: dict[str, Any], eager: bool):
    [two] = ask(EXPORT, PROMPTS, NUM_TOKENS, enforce_eager=eager, **ranks)
    assert len(two.runs) == 2
    assert_kernels(two)
    assert_alike(two, one)


@slow
@pytest.mark.parametrize("expert_parallel", [True, False], ids=["expert", "tensor"])
def test_data_parallel_ranks_answer_as_one(one: Answers, expert_parallel: bool):
    """Each rank attends to its own prompts; the experts serve those of both."""
    two = ask_data_parallel(
        EXPORT, PROMPTS, NUM_TOKENS, 2, enable_expert_parallel=expert_parallel
    )
    assert len(two.runs) == 2
    assert_kernels(two)
    assert_alike(two, one)


@slow
@pytest.mark.parametrize("num_redundant_experts", [0, 4])
@pytest.mark.parametrize("export", ["int8-3key", "int8-per-expert"])
def test_eplb_keeps_scales_with_experts(
    one: Answers, export: str, num_redundant_experts: int
):
    """Experts change places while answers are given, and are asked again there."""
    num_physical = NUM_EXPERTS + num_redundant_experts
    at_first = [i % NUM_EXPERTS for i in range(num_physical)]
    first, moved = ask(
        FIXTURES / export,
        PROMPTS,
        NUM_TOKENS,
        [AGAIN],
        enable_eplb=True,
        eplb_config={
            "window_size": 2,
            "step_interval": 2,
            "num_redundant_experts": num_redundant_experts,
        },
        **EXPERT_PARALLEL,
    )
    assert_kernels(moved)
    on_first_rank, on_second_rank = moved.experts_at
    assert on_first_rank == on_second_rank
    for layer in on_first_rank:
        assert len(layer) == num_physical
        assert set(layer) == set(range(NUM_EXPERTS))
        assert layer != at_first
    assert_alike(first, one)
    assert_alike(moved, one)


def test_scales_are_sharded(one: Answers):
    """Column-parallel scales by rows, row-parallel ones on each rank whole; of experts
    those of the gate and of the up projection by rows, those of w2 whole."""
    layer = "model.layers.3"
    names = {
        "qkv": f"{layer}.self_attn.qkv_proj.weight_scale",
        "o": f"{layer}.self_attn.o_proj.weight_scale",
        "w13": f"{layer}.moe.experts.w13_weight_scale",
        "w2": f"{layer}.moe.experts.w2_weight_scale",
    }
    [two] = ask(
        EXPORT,
        PROMPTS,
        NUM_TOKENS,
        parameters=list(names.values()),
        tensor_parallel_size=2,
    )
    held = {
        short: [part.flatten(-2) for part in two.parameters[name]]
        for short, name in names.items()
    }
    stored = load_file(EXPORT / "model.safetensors")

    def half(name: str, rank: int) -> torch.Tensor:
        return stored[f"{layer}.{name}.weight_scale"].chunk(2, dim=-1)[rank]

    for rank in (0, 1):
        qkv = [half(f"self_attn.{name}_proj", rank) for name in "qkv"]
        assert torch.equal(held["qkv"][rank], torch.cat(qkv))
        whole = stored[f"{layer}.self_attn.o_proj.weight_scale"]
        assert torch.equal(held["o"][rank], whole)
        gate_up = [half(f"moe.{name}_proj", rank) for name in ("gate", "up")]
        assert torch.equal(held["w13"][rank], torch.cat(gate_up, dim=-1))
        whole = stored[f"{layer}.moe.down_proj.weight_scale"]
        assert torch.equal(held["w2"][rank], whole)
