# SPDX-License-Identifier: Apache-2.0
"""Through the engine on a GPU: the INT8 MoE's own kernels run and answer right."""

import pytest
import torch
from vllm.platforms import current_platform

from tests.engine import ONE_PROCESS, ask
from tests.models import step3p5_reference
from tests.v1.test_same_answers import (
    BF16,
    CLEAR,
    EXPORT,
    NUM_TOKENS,
    PROMPTS,
    rounding,
)

HOPPER = current_platform.is_cuda() and current_platform.is_device_capability(90)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_int8_moe_runs_and_answers_right(eager: bool) -> None:
    """Of upstream's kernel and ours, both are as far from the unquantized model, which
    is the tolerance; twice as far leaves room for chance."""
    [ours] = ask(EXPORT, PROMPTS, NUM_TOKENS, env=ONE_PROCESS, enforce_eager=eager)
    [upstreams] = ask(
        EXPORT, PROMPTS, NUM_TOKENS, env=ONE_PROCESS, moe_backend="triton"
    )
    assert ours.int8_moe_runs > 0
    assert upstreams.int8_moe_runs == 0

    best, second = upstreams.logprobs.topk(2).values.unbind(-1)
    clear = (best - second > CLEAR).all(dim=1)
    assert clear.double().mean() >= 0.25
    assert torch.equal(ours.tokens[clear], upstreams.tokens[clear])

    reference = step3p5_reference.logprobs(step3p5_reference.load(BF16), PROMPTS)
    of_ours, of_upstreams = (
        rounding(answers, reference.double()) for answers in (ours, upstreams)
    )
    print(f"median |d logprob|: ours {of_ours:.3g}, upstream's {of_upstreams:.3g}")
    assert of_ours <= 2 * of_upstreams
