# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU ends cleanly, whatever the build of torch and without a driver."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.server import END_SECONDS, START_SECONDS, serve

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

MODEL = Path(__file__).parents[2] / "fixtures/step3p5-tiny/int8-3key"
OPTIONS = ["--enforce-eager", "--max-model-len", "128"]
OPTIONS += ["--gpu-memory-utilization", "0.1"]
OPTIONS += ["--kv-cache-memory-bytes", str(16 << 20)]
# The model was trained to add.
PROMPT, ANSWER = list(b"999+999="), list(b"1998")

GENERATE = f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM({str(MODEL)!r}, enforce_eager=True, max_model_len=128,
              gpu_memory_utilization=0.1, kv_cache_memory_bytes={16 << 20})
    sampling = SamplingParams(temperature=0, max_tokens=4)
    [output] = llm.generate({{"prompt_token_ids": {PROMPT}}}, sampling)
    print("tokens:", output.outputs[0].token_ids)
"""


@pytest.mark.parametrize("runner", [CPUModelRunner, GPUModelRunner])
def test_only_gpu_runners_synchronize_the_accelerator(runner, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append(1))
    part = runner.__new__(runner)
    part.cache_config = SimpleNamespace(num_gpu_blocks=1)
    part.compilation_config = SimpleNamespace(static_forward_context={})
    part._cleanup_profiling_kv_cache()
    assert part.cache_config.num_gpu_blocks is None
    assert len(calls) == (runner is GPUModelRunner)


def assert_clean(log: str) -> None:
    for sign in ("Traceback", "Found no NVIDIA driver"):
        assert sign not in log, log


def test_llm_ends_cleanly(tmp_path):
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    child = subprocess.run(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS + END_SECONDS,
    )
    assert child.returncode == 0, child.stdout
    assert f"tokens: {ANSWER}" in child.stdout
    assert_clean(child.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_server_ends_cleanly(sent, tmp_path):
    with serve(MODEL, tmp_path / "log", OPTIONS) as server:
        server.wait_until_ready()
        server.process.send_signal(sent)
        assert server.wait_for_end(END_SECONDS) == 0, server.log.read_text()
    assert_clean(server.log.read_text())
