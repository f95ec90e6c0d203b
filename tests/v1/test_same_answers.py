# SPDX-License-Identifier: Apache-2.0
"""Through the engine: answers depend neither on how many ranks share the weights nor
on loading the weights a second time."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.platforms import current_platform

from tests.engine import Answers, ask
from tests.models import step3p5_reference

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

FIXTURES = Path(__file__).parents[1] / "fixtures/step3p5-tiny"
EXPORT, BF16 = FIXTURES / "int8-3key", FIXTURES / "bf16"
NUM_TOKENS = 6
TOP = 20
# In nats: seven times as likely as the next.
CLEAR = 2.0


def make_prompts() -> list[list[int]]:
    """Sums as bytes, which are the tokens."""
    draw = random.Random(0)
    sums = [f"{draw.randrange(1000)}+{draw.randrange(1000)}=" for _ in range(32)]
    return [list(text.encode()) for text in sums]


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same export with other scales in INT8 linear layers."""
    folder = tmp_path_factory.mktemp("exports") / "other"
    shutil.copytree(EXPORT, folder)
    weights = load_file(folder / "model.safetensors")
    changed = [name for name in weights if name.endswith("o_proj.weight_scale")]
    assert changed
    for name in changed:
        weights[name] *= -0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def loads(other_export: Path) -> list[Answers]:
    """Of one rank: the export, then the other one and the export into the same one."""
    return ask(EXPORT, PROMPTS, NUM_TOKENS, reloads=[other_export, EXPORT])


def test_weights_load_a_second_time(loads):
    first, other, again = loads
    assert not torch.allclose(first.logprobs, other.logprobs, atol=0.01)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.logprobs, first.logprobs)


def rounding(answers: Answers, reference: Tensor) -> float:
    """Distance of the first token from the unquantized model: |d logprob|, its mean
    over the likeliest tokens and its median over the prompts.

    The median, as rounding sends a token that is between two experts to either.
    """
    likeliest = reference.topk(TOP).indices
    delta = (answers.logprobs[:, 0] - reference).gather(-1, likeliest).abs()
    return delta.mean(-1).median().item()


@pytest.mark.parametrize("experts", [False, True], ids=["tensor", "expert"])
def test_two_ranks_answer_as_one(loads, experts):
    """Ranks quantize their share of a token each on its own: other rounding, no more.

    So two ranks are to be as far from the unquantized model as one, which is the
    tolerance; twice as far leaves room for chance. With each rank on the first share
    of w2 they were thirty times as far. Greedy tokens are the same wherever the first
    choice is clear.
    """
    one = loads[0]
    [two] = ask(
        EXPORT,
        PROMPTS,
        NUM_TOKENS,
        tensor_parallel_size=2,
        enable_expert_parallel=experts,
    )

    best, second = one.logprobs.topk(2).values.unbind(-1)
    clear = (best - second > CLEAR).all(dim=1)
    assert clear.double().mean() >= 0.5
    assert torch.equal(two.tokens[clear], one.tokens[clear])

    reference = step3p5_reference.logprobs(step3p5_reference.load(BF16), PROMPTS)
    of_one, of_two = (rounding(a, reference.double()) for a in (one, two))
    print(f"median |d logprob|: one rank {of_one:.3g}, two ranks {of_two:.3g}")
    assert not torch.equal(two.logprobs, one.logprobs)
    assert of_two <= 2 * of_one
