# SPDX-License-Identifier: Apache-2.0
"""Through the engine: answers depend neither on how many ranks share the weights nor
on loading the weights a second time."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.platforms import current_platform

from tests.engine import Answers, ask, ask_data_parallel, reload
from tests.v1.utils import EXPORT, NUM_TOKENS, PIPELINE, PROMPTS, assert_alike, clear

pytestmark = [
    pytest.mark.slow,  # an engine for each way to share the weights
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
    ),
]


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
    steps = [reload(other_export), reload(EXPORT)]
    return ask(EXPORT, PROMPTS, NUM_TOKENS, steps)


def test_weights_load_a_second_time(loads):
    first, other, again = loads
    assert not torch.allclose(first.logprobs, other.logprobs, atol=0.01)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.logprobs, first.logprobs)


@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        PIPELINE,
    ],
    ids=["tensor", "expert", "pipeline"],
)
def test_two_ranks_answer_as_one(loads, ranks):
    """Tensor and expert parallel ranks quantize their share of a token each on its own:
    other rounding, no more. With each rank on the first share of w2 answers were thirty
    times as far from the unquantized model. Pipeline ranks compute the same."""
    one = loads[0]
    [two] = ask(EXPORT, PROMPTS, NUM_TOKENS, **ranks)

    assert clear(one).double().mean() >= 0.5
    assert_alike(two, one)
    same = torch.equal(two.logprobs, one.logprobs)
    assert same == ("pipeline_parallel_size" in ranks)


@pytest.mark.parametrize("expert_parallel", [True, False], ids=["expert", "tensor"])
def test_data_parallel_ranks_answer_as_one(loads, expert_parallel):
    """Each rank attends to its own prompts and holds half of the experts, or half of
    each; they serve the prompts of both."""
    layer = "model.layers.3.moe"
    held = f"{layer}.experts.w13_weight_scale"
    two = ask_data_parallel(
        EXPORT,
        PROMPTS,
        NUM_TOKENS,
        2,
        enable_expert_parallel=expert_parallel,
        worker_extension_cls="tests.gloo_all2all.Watched",
        parameters=[held],
    )
    stored = load_file(EXPORT / "model.safetensors")
    gate, up = (stored[f"{layer}.{name}_proj.weight_scale"] for name in ("gate", "up"))
    dim = 0 if expert_parallel else 1
    for rank, scales in enumerate(two.parameters[held]):
        share = [one.chunk(2, dim)[rank] for one in (gate, up)]
        assert torch.equal(scales.flatten(1), torch.cat(share, dim=1))
    assert_alike(two, loads[0])
