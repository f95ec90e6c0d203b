# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in a session of its own, whose processes are all found again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
from vllm.utils.network_utils import get_open_port

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS, END_SECONDS = 300, 60
TAIL_LINES = 25


class ServerError(Exception):
    """The server did not do what it was to do; the message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A started `vllm serve`; `log` is what it and its workers print."""

    process: subprocess.Popen
    url: str
    log: Path

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
            with urlopen(f"{self.url}/health", timeout=5):
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
            if (status := self.process.poll()) is not None:
                raise self.error(f"ended with status {status} before it was {what}")
            if time.monotonic() > deadline:
                raise self.error(f"is not {what} after {seconds:.0f} s")
            time.sleep(0.05)

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
            "\n".join([f"vllm serve {what}; end of {self.log}:", *lines])
        )


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serve(
    model: Path,
    log: Path,
    options: Sequence[str],
    env: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Start it, with these further options and environment variables; not yet ready.

    Whatever is left of it at the end is killed.
    """
    port = port or get_open_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
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
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        server.kill()
