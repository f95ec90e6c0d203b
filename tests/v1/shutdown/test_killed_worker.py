# SPDX-License-Identifier: Apache-2.0
"""A process of the server is killed, as a kernel short of memory does: the server
answers what it was asked with an error, says which process died, ends with status 1 and
leaves nothing behind; and started again, it answers."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_port

from tests.engine import one_core_a_rank
from tests.fixtures import addition
from tests.server import ROOT, Server, is_alive, serve

pytestmark = pytest.mark.needs_group("serve")

MODEL = ROOT / "tests/fixtures/step3p5-tiny/int8-3key"
MAX_MODEL_LEN = 1024
OPTIONS = ["--enforce-eager", "--served-model-name", "tiny"]
OPTIONS += ["--max-model-len", str(MAX_MODEL_LEN), "--gpu-memory-utilization", "0.1"]
OPTIONS += ["--kv-cache-memory-bytes", str(16 << 20)]
PAIR = (999, 999)
NUM_CHOICES = 32
END_SECONDS, ANSWER_SECONDS = 30, 60

# What is killed, and when: what the log then says. Numbers are pid and rank.
ENGINE, WORKER = "EngineCore", "Worker"
SAID = {
    ("loading", ENGINE): r"Failed core proc\(s\): \{'EngineCore': -9\}",
    # On a busy machine so small a model has loaded before the signal arrives.
    ("loading", WORKER): r"VllmWorker-\d \(pid \d+\) ended before it was ready, exit "
    r"code -9|Worker proc VllmWorker-\d died unexpectedly",
    ("serving", ENGINE): r"EngineCore \(pid \d+\) died with exit code -9",
    ("serving", WORKER): r"Worker proc VllmWorker-\d died unexpectedly",
}
# An engine whose worker loads for ever.
LOADS_FOR_EVER = """
import multiprocessing
import os
import time
from vllm.config import VllmConfig
from vllm.v1.executor.multiproc_executor import WorkerProc

def load(*args, **kwargs):
    print("loading", os.getpid(), flush=True)
    time.sleep(1000)

context = multiprocessing.get_context("fork")
ready, death = context.Pipe(duplex=False), context.Pipe(duplex=False)
WorkerProc.__init__ = load
kwargs = {"ready_pipe": ready[1], "death_pipe": death[0], "vllm_config": VllmConfig()}
worker = context.Process(target=WorkerProc.worker_main, kwargs=kwargs)
worker.start()
worker.join()
"""
# A queue whose other side never connects, shut down while it is waited for.
NEVER_CONNECTED = """
import sys
from threading import Timer
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

queue = MessageQueue(n_reader=1, n_local_reader=1)
if sys.argv[1] == "reader":
    queue = MessageQueue.create_from_handle(queue.export_handle(), 0)
Timer(2, queue.shutdown).start()
queue.wait_until_ready()
"""
SERVER_ENDS = "RuntimeError: The server ends: its engine died; see above."


def post(server: Server, **body: Any) -> Any:
    """The response of a completion request, a stream that is not read yet."""
    question = addition.question(*PAIR)
    body = {"model": "tiny", "prompt": question, "temperature": 0} | body
    request = Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urlopen(request, timeout=ANSWER_SECONDS)


def assert_right(server: Server) -> None:
    with post(server, max_tokens=8) as response:
        [choice] = json.load(response)["choices"]
    assert choice["text"] == addition.answer(*PAIR)


def in_flight(server: Server) -> float:
    """Choices that are computed, or wait for it."""
    with urlopen(f"{server.url}/metrics", timeout=ANSWER_SECONDS) as response:
        metrics = response.read().decode()
    names = r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$"
    return sum(map(float, re.findall(names, metrics, re.M)))


def kill(server: Server, title: str) -> None:
    """The last of the name: of workers not the first, whose answers are sent on."""
    server.named(title)[-1].send_signal(signal.SIGKILL)


def kill_while_loading(server: Server, title: str) -> None:
    def loads() -> bool:
        return "Starting to load model" in server.log.read_text()

    server.wait_until(loads, "loading", 300)
    kill(server, title)
    assert not server.is_ready()


def kill_while_serving(server: Server, title: str) -> None:
    """Two requests in flight end with an error."""
    server.wait_until_ready()
    assert_right(server)
    # So many choices that they take longer than the busiest machine needs to kill. The
    # stream is first: behind them it may have to wait for memory until they end.
    long = {"max_tokens": MAX_MODEL_LEN - 8, "ignore_eos": True, "temperature": 1}
    with ThreadPoolExecutor() as pool:
        with post(server, **long, stream=True) as stream:
            assert stream.readline().startswith(b"data: ")
            whole = pool.submit(post, server, **long, n=NUM_CHOICES)
            server.wait_until(lambda: in_flight(server) > 1, "busy", ANSWER_SECONDS)
            kill(server, title)
            rest = stream.read().decode()
        with pytest.raises(HTTPError) as refused:
            whole.result(ANSWER_SECONDS)
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line]
    assert json.loads(events[-2])["error"]["code"] == 500, events[-3:]
    assert events[-1] == "[DONE]"
    assert refused.value.code == 500
    assert "EngineCore" in json.load(refused.value)["error"]["message"]


def assert_port_is_closed(port: int) -> None:
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0


cpu = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)


@pytest.mark.slow  # five servers
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, marks=cpu, id="cpu"),
        pytest.param(1, marks=pytest.mark.gpu, id="gpu"),
        pytest.param(2, marks=pytest.mark.gpu2, id="gpu2"),
    ],
)
def test_killed(ranks: int, tmp_path: Path) -> None:
    options = [*OPTIONS, "--tensor-parallel-size", str(ranks)]
    env = one_core_a_rank(ranks)
    port = get_open_port()
    for (when, title), said in SAID.items():
        if title == WORKER and ranks == 1 and not current_platform.is_cpu():
            continue  # the engine's process is the worker
        log = tmp_path / f"{when}-{title}.log"
        with serve(MODEL, log, options, env, port) as server:
            {"loading": kill_while_loading, "serving": kill_while_serving}[when](
                server, title
            )
            status = server.wait_for_end(END_SECONDS)
        text = log.read_text()
        assert status == 1, text
        assert re.search(said, text), text
        assert when == "loading" or SERVER_ENDS in text, text
        assert_port_is_closed(port)

    with serve(MODEL, tmp_path / "again.log", options, env, port) as server:
        server.wait_until_ready()
        assert_right(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end(END_SECONDS) == 0, server.log.read_text()


def test_a_worker_that_loads_ends_after_its_engine() -> None:
    engine = subprocess.Popen(
        [sys.executable, "-c", LOADS_FOR_EVER], stdout=subprocess.PIPE, text=True
    )
    try:
        assert engine.stdout
        lines = (line for line in engine.stdout if line.startswith("loading "))
        worker = psutil.Process(int(next(lines).split()[1]))
    finally:
        engine.kill()
        engine.wait()
    try:
        deadline = time.monotonic() + END_SECONDS
        while is_alive(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_alive(worker)
    finally:
        if worker.is_running():
            worker.kill()


@pytest.mark.parametrize("waits", ["writer", "reader"])
def test_waiting_for_a_dead_process_to_connect_ends(waits: str) -> None:
    """As a start has to whose worker died: its monitor shuts the queue down."""
    program = [sys.executable, "-c", NEVER_CONNECTED, waits]
    run = subprocess.run(program, capture_output=True, text=True, timeout=END_SECONDS)
    assert run.returncode == 1
    error = "RuntimeError: cancelled before all processes were connected"
    assert error in run.stderr.splitlines()  # a warning of shared memory follows


def test_processes_that_live_connect() -> None:
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(reader.wait_until_ready)
        time.sleep(1.5)  # longer than the wait goes without a look
        writer.wait_until_ready()
        waiting.result(END_SECONDS)
    writer.enqueue("said")
    assert reader.dequeue(timeout=END_SECONDS) == "said"
