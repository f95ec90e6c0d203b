# SPDX-License-Identifier: Apache-2.0
"""`vllm serve`, or another command, in a session of its own, whose processes are all
found again."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS, END_SECONDS = 300, 60
TAIL_LINES = 25
HOST = "127.0.0.1"
OPENER = build_opener(ProxyHandler({}))  # none stands inside a machine


class ServerError(Exception):
    """It did not do what it was to do; the message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A started `vllm serve`, or another command; `log` is what it and its workers
    print."""

    process: subprocess.Popen
    url: str
    log: Path
    what: str

    def processes(self) -> list[psutil.Process]:
        """What lives of the server's session: itself, engine, workers, orphans too."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and is_alive(process):
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def named(self, title: str) -> list[psutil.Process]:
        """Its processes with this in their title, which vLLM writes over argv[0]."""
        found = []
        for process in self.processes():
            try:
                if title in process.cmdline()[0]:
                    found.append(process)
            except (IndexError, psutil.NoSuchProcess):
                continue
        return found

    def is_ready(self) -> bool:
        try:
            with OPENER.open(f"{self.url}/health", timeout=5):
                return True
        except (URLError, OSError, HTTPException):
            return False

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        self.wait_until(self.is_ready, "ready", seconds)

    def wait_until(
        self, reached: Callable[[], bool], what: str, seconds: float
    ) -> None:
        """Raises ServerError where it ends first, or takes longer."""
        deadline = time.monotonic() + seconds
        while not reached():
            self.check(f" before it was {what}")
            if time.monotonic() > deadline:
                raise self.error(f"is not {what} after {seconds:.0f} s")
            time.sleep(0.05)

    def check(self, when: str = "") -> None:
        """Raises ServerError where it has ended."""
        if (status := self.process.poll()) is not None:
            raise self.error(f"ended with status {status}{when}")

    def wait_for_end(self, seconds: float = END_SECONDS) -> int:
        """Its status, once no process of it is left; raises ServerError if not so."""
        deadline = time.monotonic() + seconds
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.error(f"runs on after {seconds:.0f} s") from None
        while left := self.processes():
            if time.monotonic() > deadline:
                raise self.error(f"ended with status {status} and left {left}")
            time.sleep(0.05)
        return status

    def kill(self) -> None:
        """Kill what is left of it."""
        while left := self.processes():
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()

    def error(self, what: str) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return ServerError(
            "\n".join([f"{self.what} {what}; end of {self.log}:", *lines])
        )


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


@contextmanager
def serve(
    model: Path,
    log: Path,
    options: Sequence[str],
    env: Mapping[str, str] | None = None,
    port: int | None = None,
    prefix: Sequence[str] = (),
    what: str = "vllm serve",
) -> Iterator[Server]:
    """Start it, with these further options and environment variables; not yet ready.

    Whatever is left of it at the end is killed. A prefix is a command that runs it.
    """
    port = port or free_port()
    command = [*prefix, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(model), "--host", HOST, "--port", str(port), *options]
    with run(command, log, env, what=what, url=f"http://{HOST}:{port}") as server:
        yield server


@contextmanager
def run(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    what: str = "",
    url: str = "",
) -> Iterator[Server]:
    """Start a command in a session of its own; all of it is killed at the end."""
    # Appended to: several processes write it.
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    server = Server(process, url, log, what)
    try:
        yield server
    finally:
        server.kill()
