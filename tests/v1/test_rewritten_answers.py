# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM answers wrong what Quark wrote, and right what quark-check made of it.

Through the engine, on a CPU. Stock is 0.20.2 with patches 0004-0007, for CPUs, and what
these need, which read no checkpoint; for INT8 experts in compressed-tensors format, of
which stock has no CPU kernel, examples/ask_rewritten.py lends the fork's. `python -m
examples.rewritten --stock FOLDER` is the same with a stock build as it is, on a GPU.
"""

import pytest
from vllm.platforms import current_platform

from examples import rewritten
from examples.rewritten import Case


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs a vLLM built for CPUs")
def test_stock_answers_right(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    # The interpreter, which other tests need, is not for an engine.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = (Case("int8-3key", "compressed-tensors"), Case("int8-3key", "quark"))
    found = rewritten.run(cases)
    assert found["int8-3key"]["outcome"] == "garbage"
    for case in cases:
        assert found[case.name]["outcome"] == "right", found[case.name]
        assert found[case.name]["exact_match"] == 1
