# SPDX-License-Identifier: Apache-2.0
"""The trained small model, and when two engines answer its sums alike."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.int8_triton import is_hopper

from tests.engine import Answers
from tests.models import step3p5_reference

# Where the INT8 MoE's own kernels serve; elsewhere upstream's does.
HOPPER = is_hopper()
FIXTURES = Path(__file__).parents[1] / "fixtures/step3p5-tiny"
EXPORT, BF16 = FIXTURES / "int8-3key", FIXTURES / "bf16"
NUM_TOKENS = 6
TOP = 20
# In nats: seven times as likely as the next.
CLEAR = 2.0

# Step-3.5 wants experts on each rank: of the four layers the last two have them.
PIPELINE: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "env": {"VLLM_PP_LAYER_PARTITION": "3,1"},
}


def make_prompts(num_sums: int = 1) -> list[list[int]]:
    """Sums as bytes, which are the tokens; all of a prompt but the last with answer."""
    draw = random.Random(0)
    prompts = []
    for _ in range(32):
        pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(num_sums)]
        text = "".join(f"{a}+{b}={a + b}\n" for a, b in pairs[:-1])
        prompts.append(list(f"{text}{pairs[-1][0]}+{pairs[-1][1]}=".encode()))
    return prompts


PROMPTS = make_prompts()


@functools.cache
def _unquantized() -> step3p5_reference.Step3p5:
    return step3p5_reference.load(BF16)


def rounding(answers: Answers, prompts: Sequence[Sequence[int]] = PROMPTS) -> float:
    """Distance of the first token from the unquantized model: |d logprob|, its mean
    over the likeliest tokens and its median over the prompts.

    The median, as rounding sends a token that is between two experts to either.
    """
    reference = step3p5_reference.logprobs(_unquantized(), prompts).double()
    likeliest = reference.topk(TOP).indices
    delta = (answers.logprobs[:, 0] - reference).gather(-1, likeliest).abs()
    return delta.mean(-1).median().item()


def clear(answers: Answers) -> Tensor:
    """bool [prompts]: the first choice is clear at each token."""
    best, second = answers.logprobs.topk(2).values.unbind(-1)
    return (best - second > CLEAR).all(dim=1)


def assert_kernels(answers: Answers) -> None:
    """On each rank the fork's own where they serve, and upstream's where not: of the
    INT8 MoE, and of queries, keys and the gate around attention."""
    for runs in answers.runs:
        for what in ("moe", "heads", "gate"):
            assert (runs[what] > 0) == HOPPER, what


def assert_alike(
    found: Answers, expected: Answers, prompts: Sequence[Sequence[int]] = PROMPTS
) -> None:
    """The same greedy tokens wherever the first choice is clear, and as far from the
    unquantized model, which is the tolerance: twice as far leaves room for chance."""
    is_clear = clear(expected)
    assert is_clear.double().mean() >= 0.25
    assert torch.equal(found.tokens[is_clear], expected.tokens[is_clear])
    of_found, of_expected = (rounding(one, prompts) for one in (found, expected))
    print(f"median |d logprob|: {of_found:.3g}, expected's {of_expected:.3g}")
    assert of_found <= 2 * of_expected
