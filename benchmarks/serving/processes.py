# SPDX-License-Identifier: Apache-2.0
"""Processes of a build under test: none is left behind, and none dies unnoticed."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.errors import BenchmarkError

START_SECONDS = 400  # for an engine that has compiled nothing yet
STOP_SECONDS = 15
LAST_LINES = 25
HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, as little as can be is left for after a fork
LOADING = re.compile(r"Model loading took ([\d.]+) GiB memory and ([\d.]+) seconds")
# The CPU's worker has no line for all of it.
LOADING_ON_CPU = re.compile(r"Loading weights took ([\d.]+) seconds")


@dataclass(frozen=True)
class Build:
    """A vLLM in a folder to be put on PYTHONPATH, or the installed one (None)."""

    name: str
    folder: Path | None
    cache: Path  # what it compiles, apart from what the other build does

    def environment(self) -> dict[str, str]:
        """For its processes: what is inherited goes on behind the folder."""
        path = [str(self.folder.resolve())] if self.folder else []
        if inherited := os.environ.get("PYTHONPATH"):
            path.append(inherited)
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
            "VLLM_LOGGING_LEVEL": "INFO",  # its lines are read
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self.cache / "vllm"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
        }

    def compiled_kernels(self) -> set[str]:
        """Names of the Triton kernels that its processes have compiled."""
        return {file.stem for file in self.cache.rglob("*.json")}


@dataclass
class Running:
    """A process in a session of its own, with all that it starts."""

    what: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float  # time.time()

    def check(self) -> None:
        """Raise if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise BenchmarkError(
                f"{self.what} ended with status {status}; the end of {self.log}:\n"
                + last_lines(self.log)
            )

    def ask(self, **question: Any) -> None:
        """Send a line of JSON to one that is asked, or raise if it has ended."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        self.check()

    def stop(self) -> None:
        """End the whole session, first by asking."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            # All of it: workers hold the device's memory until they are gone.
            deadline = time.monotonic() + seconds
            while group_lives(self.process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        self.process.wait(5)


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; those that wait to be reaped do not."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = file.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                return True
    return False


def last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


_signals: list[int] = []


def end_on_signals() -> None:
    """Have the first SIGINT or SIGTERM raise BenchmarkError, wherever it comes.

    Those that follow do not stop the stopping of what was started.
    """

    def handle(number: int, _: Any) -> None:
        _signals.append(number)
        if len(_signals) == 1:
            check_signals()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def check_signals() -> None:
    """Raise if a signal came: Python loses what is raised while it forks."""
    if _signals:
        raise BenchmarkError(f"ended by {signal.Signals(_signals[0]).name}")


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is killed."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def running(
    what: str,
    command: Sequence[str | Path],
    env: Mapping[str, str],
    log: Path,
    is_asked: bool = False,
) -> Iterator[Running]:
    """Start a command; when the block is left, however, it is stopped.

    One that is asked reads what `Running.ask` sends from its standard input.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        started = time.time()
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=log.parent,
            stdin=subprocess.PIPE if is_asked else subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    found = Running(what, process, log, started)
    try:
        yield found
    finally:
        found.stop()


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


@contextmanager
def server(
    build: Build, model: Path, engine_args: Sequence[str], log: Path
) -> Iterator[tuple[Running, str]]:
    """`vllm serve`, not ready yet; and its URL."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", HOST, "--port", str(port)]
    command += ["--disable-uvicorn-access-log", *engine_args]
    what = f"the server of {build.name}"
    with running(what, command, build.environment(), log) as process:
        yield process, url


def wait_until_ready(servers: Mapping[str, Running]) -> None:
    """Wait until all servers answer, by URL."""
    # No proxy stands between processes of one machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    waiting = list(servers)
    while waiting:
        check_signals()
        for server in servers.values():
            server.check()
        try:
            with opener.open(f"{waiting[0]}/health", timeout=5):
                waiting.pop(0)
                continue
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        if time.monotonic() > deadline:
            late = servers[waiting[0]]
            raise BenchmarkError(
                f"{late.what} was not ready in {START_SECONDS} s; the end of "
                f"{late.log}:\n{last_lines(late.log)}"
            )
        time.sleep(0.1)


def results(
    job: Running, out: Path, others: Sequence[Running] = ()
) -> Iterator[dict[str, Any]]:
    """The lines of JSON that a job writes to a file, as they come, until it ends.

    Raises if it fails, or if any of the others ends before.
    """
    at = 0
    while True:
        check_signals()
        status = job.process.poll()  # first: what it wrote last is read after its end
        *whole, _ = out.read_bytes()[at:].split(b"\n") if out.exists() else [b""]
        for line in whole:
            at += len(line) + 1
            yield json.loads(line)
        if status == 0:
            return
        if status is not None:
            job.check()
        for one in others:
            one.check()
        time.sleep(0.1)


def loading(log: Path) -> tuple[float, float | None]:
    """Seconds that loading took by an engine's log, and GiB; None on a CPU."""
    text = log.read_text(errors="replace")
    if found := LOADING.search(text):
        return float(found[2]), float(found[1])
    if found := LOADING_ON_CPU.search(text):
        return float(found[1]), None
    raise BenchmarkError(f"{log}: expected a line that says how long loading took")


def device_memory() -> int:
    """Bytes of the device's memory that are in use, by whatever process; 0 on a CPU."""
    return torch.cuda.device_memory_used(0) if torch.cuda.is_available() else 0


class MemoryPeak:
    """The most memory of the device that is in use in a `with` block, in GiB.

    What is in use when it is made does not count.
    """

    def __init__(self) -> None:
        self._before = self._most = device_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._most = max(self._most, device_memory())

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def gib(self) -> float:
        return (self._most - self._before) / 2**30
