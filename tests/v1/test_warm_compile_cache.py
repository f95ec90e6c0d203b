# SPDX-License-Identifier: Apache-2.0
"""A process that finds its graph in torch.compile's cache has the operators in it.

Such a process runs no Python of the model's forward: an operator that only forward's
own imports register is missing then. The engine here is a plain one, without the tests'
worker extension, whose imports would hide that.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from tests.v1.utils import EXPORT

pytestmark = [pytest.mark.slow, pytest.mark.gpu, pytest.mark.needs_group("kernels")]

PROMPT, ANSWER = list(b"999+999="), list(b"1998")
SCRIPT = f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM({str(EXPORT)!r}, max_model_len=128, gpu_memory_utilization=0.1,
              kv_cache_memory_bytes={16 << 20})
    sampling = SamplingParams(temperature=0, max_tokens=4)
    [output] = llm.generate({{"prompt_token_ids": {PROMPT}}}, sampling)
    print("tokens:", output.outputs[0].token_ids)
"""


@pytest.mark.skipif(
    current_platform.is_cpu(), reason="needs a GPU: on a CPU vLLM caches no graph"
)
def test_second_process_loads_the_graph(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    env = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)
    for warm in (False, True):
        done = subprocess.run(
            [sys.executable, str(script)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert f"tokens: {ANSWER}" in done.stdout, done.stdout[-5000:]
        # Else the second process compiled anew, and shows nothing.
        assert ("Directly load AOT compilation" in done.stdout) == warm
        assert "due to a load failure" not in done.stdout
