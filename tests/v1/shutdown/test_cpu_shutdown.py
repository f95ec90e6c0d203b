# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU ends cleanly, whatever the build of torch and without a driver."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

MODEL = Path(__file__).parents[2] / "fixtures/step3p5-tiny/int8-3key"
OPTIONS = {
    "enforce-eager": None,
    "max-model-len": "128",
    "gpu-memory-utilization": "0.1",
    "kv-cache-memory-bytes": str(16 << 20),
}
# The model was trained to add.
PROMPT, ANSWER = list(b"999+999="), list(b"1998")
START_SECONDS, END_SECONDS = 300, 60

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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """`vllm serve`, ready, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in OPTIONS.items():
        command += [f"--{name}"] + ([value] if value else [])
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield process, log
    finally:
        # Workers too, if the test failed and left them.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url):
                return
        except URLError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve is not healthy:\n{log.read_text()}")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_server_ends_cleanly(sent, server):
    process, log = server
    process.send_signal(sent)
    assert process.wait(END_SECONDS) == 0, log.read_text()
    assert_clean(log.read_text())
