# SPDX-License-Identifier: Apache-2.0
"""Processes of a build under test: none is left behind, and none dies unnoticed."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving import jobs
from benchmarks.serving.errors import BenchmarkError
from tests import sessions
from tests.sessions import Server

START_SECONDS = 400  # for an engine that has compiled nothing yet
# Has the kernel end a process when this one is killed.
WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--")
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
        return {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": sessions.HOST,
            "no_proxy": sessions.HOST,
            "VLLM_LOGGING_LEVEL": "INFO",  # its lines are read
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self.cache / "vllm"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
        }

    def compiled_kernels(self) -> set[str]:
        """Names of the Triton kernels that its processes have compiled."""
        return {file.stem for file in self.cache.rglob("*.json")}


def end_on_signals() -> None:
    """Have the first SIGINT or SIGTERM raise BenchmarkError; those that follow do not
    stop the stopping of what was started."""
    numbers = signal.SIGINT, signal.SIGTERM

    def handle(number: int, _: Any) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise BenchmarkError(f"ended by {signal.Signals(number).name}")

    for number in numbers:
        signal.signal(number, handle)


@contextmanager
def server(
    build: Build, model: Path, engine_args: Sequence[str], log: Path
) -> Iterator[Server]:
    """`vllm serve`, not ready yet."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    options = ["--disable-uvicorn-access-log", *engine_args]
    what = f"the server of {build.name}"
    env = build.environment()
    with sessions.serve(model, log, options, env, None, WITH_PARENT, what) as one:
        yield one


def wait_until_ready(servers: Sequence[Server]) -> None:
    """Wait until all servers answer; raises if any ends before."""

    def are_ready() -> bool:
        for one in servers:
            one.check()
        return all(one.is_ready() for one in servers)

    for one in servers:
        one.wait_until(are_ready, "ready", START_SECONDS)


@dataclass(frozen=True)
class Job:
    """A job of jobs.py in a process of a build; its answers are kept in a file."""

    process: Server
    connection: Connection
    answers: Path
    others: Sequence[Server]  # which are to live as long

    def ask(self, **question: Any) -> Any:
        """What it answers; raises if it, or any of the others, ends before."""
        with suppress(BrokenPipeError):
            self.connection.send(question)
        while not self.connection.poll(0.1):
            for one in (self.process, *self.others):
                one.check()
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.process.wait()
            raise self.process.error(
                f"ended with status {self.process.process.returncode}"
            ) from None
        with self.answers.open("a") as file:
            file.write(json.dumps({**question, "answer": answer}) + "\n")
        return answer


@contextmanager
def job(
    name: str,
    build: Build,
    folder: Path,
    env: dict[str, str],
    others: Iterable[Server] = (),
    **settings: Any,
) -> Iterator[Job]:
    """Start a job; what it prints and answers is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    log, answers = (folder / f"{name}-{build.name}{end}" for end in (".log", ".jsonl"))
    for file in (log, answers):
        file.unlink(missing_ok=True)
    ours, its = Pipe()
    command = [*WITH_PARENT, sys.executable, "-P", jobs.__file__, str(its.fileno())]
    with (
        ours,
        sessions.run(
            command,
            log,
            build.environment() | env,
            [its.fileno()],
            f"the {name} job of {build.name}",
        ) as process,
    ):
        its.close()
        ours.send(
            {"job": name, "out": str(folder / f"{name}-{build.name}"), **settings}
        )
        yield Job(process, ours, answers, list(others))


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
