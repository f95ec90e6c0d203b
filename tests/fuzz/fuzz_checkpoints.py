# SPDX-License-Identifier: Apache-2.0
"""Damage checkpoints at random and see that none is read wrong in silence.

    python -m tests.fuzz.fuzz_checkpoints [--count 10000] [--first 0]
    python -m tests.fuzz.fuzz_checkpoints --only SEED

Each seed is one mutation of a small Quark INT8 export (mutations.py). The engine's own
loader loads it (load.py) in a worker process with a limit of time and memory; what is
right is told from the files alone (judge.py). docs/measured/loading.md says what can be
told at all. Exits 1 on a failure; `--only` repeats one mutation and shows its error.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Event, Timer
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
WORKER = [sys.executable, "-m", "tests.fuzz.load"]
SECONDS = 60  # of one mutation
START_SECONDS = 300  # of a worker, on a busy machine
RESTART_AFTER = 2500  # mutations a process, so that no leak adds up
NUM_WORKERS = 2

Outcome = dict[str, Any]
CLASSES = {
    "refused": "refused by an error that names what is wrong",
    "warned": "one of the next two, with a warning that names what is odd",
    "harmless": "loaded, with exactly the tensors of the undamaged export",
    "undetectable": "another valid checkpoint, loaded exactly",
    "upstream": "a setting of the model, refused by upstream in its own words",
}
FAILURES = {
    "accepted": "loaded, though the files are no valid export",
    "wrong": "loaded, with other values than the files hold",
    "unclear": "refused by an error that names nothing",
    "crash": "the process died",
    "hang": f"no end after {SECONDS} s",
}


def start_worker(seeds: list[int], worker: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        worker,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin
    process.stdin.write(" ".join(map(str, seeds)))
    process.stdin.close()
    return process


def load_all(seeds: list[int], worker: list[str]) -> Iterator[Outcome]:
    """Load mutations one after the other; start again after one that ends the process.

    Exits where a worker does not start.
    """
    while seeds:
        process = start_worker(seeds[:RESTART_AFTER], worker)
        hung, begun, said = Event(), None, None

        def end(process: subprocess.Popen[str] = process, hung: Event = hung) -> None:
            hung.set()
            process.kill()

        timer = Timer(START_SECONDS, end)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            timer.cancel()
            said = json.loads(line)
            begun = said.get("begin")
            if begun is None:
                seeds = seeds[1:]
                yield said
            timer = Timer(SECONDS, end)
            timer.start()
        timer.cancel()
        process.wait()
        if begun is not None:
            seeds = seeds[1:]
            how = "hang" if hung.is_set() else "crash"
            yield {"seed": begun, "mutation": "", "outcome": how, "error": ""}
        elif said is None:
            sys.exit(f"error: no worker starts; `{' '.join(worker)}` says why")


def fuzz(
    seeds: list[int], num_workers: int = NUM_WORKERS, worker: list[str] | None = None
) -> list[Outcome]:
    """Outcome of each seed, as the worker writes it; load.py if it is None."""
    command = worker or WORKER
    shares = [seeds[start::num_workers] for start in range(num_workers)]
    with ThreadPoolExecutor(num_workers) as threads:
        outcomes = threads.map(lambda share: list(load_all(share, command)), shares)
        return sorted(chain(*outcomes), key=lambda outcome: outcome["seed"])


def show(
    outcomes: list[Outcome],
    console: Console,
    classes: dict[str, str] = CLASSES,
    failures_of: dict[str, str] = FAILURES,
) -> bool:
    """Print how often each class was met; whether there was no failure."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    table = Table("class", "count", "what")
    for name, what in (classes | failures_of).items():
        table.add_row(name, str(counts[name]), what)
    console.print(table)
    failures = [outcome for outcome in outcomes if outcome["outcome"] in failures_of]
    for failure in failures:
        console.print(
            f"seed {failure['seed']}, {failure['outcome']}: {failure['mutation']} "
            f"{failure['error']}"[:400],
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return not failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    console = Console()
    if args.only is not None:
        outcomes = fuzz([args.only])
        console.print_json(data=outcomes[0])
    else:
        started = time.monotonic()
        outcomes = fuzz(list(range(args.first, args.first + args.count)))
        seconds = time.monotonic() - started
        console.print(
            f"{len(outcomes)} mutations, seeds {args.first} to "
            f"{args.first + args.count - 1}, {seconds:.0f} s"
        )
    if not show(outcomes, console):
        sys.exit(1)


if __name__ == "__main__":
    main()
