# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A bound on the time and memory that a stranger's files may take.

The readers bound what they can by themselves. This is for the rest, such as a regular
expression that never ends.
"""

import contextlib
import signal
import threading
from collections.abc import Generator
from pathlib import Path

from .checkpoint import misfit

SECONDS = 60.0
NUM_BYTES = 4 << 30


class _TooLong(Exception):
    pass


@contextlib.contextmanager
def bounded(what: object) -> Generator[None, None, None]:
    """End with a CheckpointError about `what` after SECONDS, or where the process takes
    NUM_BYTES more than it has now. Of no effect outside the main thread, and where the
    operating system has no such limits."""
    remedy = "nothing of a real checkpoint needs as much: look at config.json"
    try:
        with _alarm(), _address_space():
            yield
    except _TooLong:
        expected = f"an answer within {SECONDS:g} s"
        raise misfit(what, expected, "none", remedy) from None
    except MemoryError:
        expected = f"to get by with {NUM_BYTES >> 30} GiB of memory"
        raise misfit(what, expected, "a need of more", remedy) from None


@contextlib.contextmanager
def _alarm() -> Generator[None, None, None]:
    def end(*_: object) -> None:
        raise _TooLong

    is_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "SIGALRM") or not is_main:
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _address_space() -> Generator[None, None, None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + NUM_BYTES
    bounds = [each for each in (soft, hard, wanted) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
