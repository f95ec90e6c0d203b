# SPDX-License-Identifier: Apache-2.0
"""Through the engine on a GPU: INT8 experts answer right, by the kernels they should,
whatever else the engine does."""

from typing import Any

import pytest
import torch

from tests.engine import AGAIN, Answers, ask, sleep
from tests.v1.utils import (
    EXPORT,
    HOPPER,
    NUM_TOKENS,
    PROMPTS,
    assert_alike,
    assert_kernels,
    make_prompts,
)

# Sums with eight solved ones before them: more tokens than a block of the prefix cache.
LONG_PROMPTS = make_prompts(9)
ROOM: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def upstreams() -> Answers:
    """By upstream's kernel."""
    [answers] = ask(EXPORT, PROMPTS, NUM_TOKENS, moe_backend="triton")
    assert answers.runs[0]["moe"] == 0
    return answers


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_answers_are_those_of_upstreams_kernel(upstreams: Answers, eager: bool) -> None:
    [ours] = ask(EXPORT, PROMPTS, NUM_TOKENS, enforce_eager=eager)
    assert_kernels(ours)
    assert_alike(ours, upstreams)


@pytest.mark.parametrize(
    "eager",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_few_tokens(upstreams: Answers, eager: bool) -> None:
    """One prompt at a time: INT8 linear layers take their kernel for few tokens."""
    [alone] = ask(EXPORT, PROMPTS, NUM_TOKENS, enforce_eager=eager, max_num_seqs=1)
    assert_kernels(alone)
    assert (alone.runs[0]["linear"] > 0) == HOPPER
    assert_alike(alone, upstreams)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_no_kernel_is_compiled_while_requests_wait(eager: bool) -> None:
    """Patch 0024: steps of one token to 600 find their kernels compiled."""
    steps = ask(
        EXPORT,
        LONG_PROMPTS,
        NUM_TOKENS,
        [AGAIN],
        enforce_eager=eager,
        max_num_batched_tokens=1500,
        max_num_seqs=5,
        **ROOM,
    )
    for answers in steps:
        assert_kernels(answers)
        assert answers.num_compiled == [0]


@pytest.mark.slow
def test_chunked_prefill_and_prefix_cache() -> None:
    """A prompt in chunks answers as a whole one, and what the cache holds of it too.

    One token: the model was trained on one sum at a time.
    """
    length = max(len(prompt) for prompt in LONG_PROMPTS)
    [whole] = ask(EXPORT, LONG_PROMPTS, 1, **ROOM)
    chunked, cached = ask(
        EXPORT,
        LONG_PROMPTS,
        1,
        [AGAIN],
        enable_prefix_caching=True,
        max_num_batched_tokens=length // 2,
        max_num_seqs=8,
        **ROOM,
    )
    assert chunked.num_cached_tokens == 0
    assert cached.num_cached_tokens > length
    for answers in (chunked, cached):
        assert_kernels(answers)
        assert_alike(answers, whole, LONG_PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_answers_after_sleep(eager: bool) -> None:
    """At level 1 weights wait in the host's memory, at level 2 they load again."""
    first, *woken = ask(
        EXPORT,
        PROMPTS,
        NUM_TOKENS,
        [sleep(1), sleep(2), sleep(1)],
        # In one process the same prompts share each step, which all bits depend on.
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        enable_sleep_mode=True,
        enforce_eager=eager,
        # Sleeping frees so much that it shows while other engines take memory.
        kv_cache_memory_bytes=4 << 30,
    )
    for answers in woken:
        assert_kernels(answers)
        assert torch.equal(answers.tokens, first.tokens)
        assert torch.equal(answers.logprobs, first.logprobs)
