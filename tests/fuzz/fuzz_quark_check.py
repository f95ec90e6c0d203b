# SPDX-License-Identifier: Apache-2.0
"""Open 10,000 hostile checkpoints with `vllm quark-check`, and see that each ends with
a report or one clear error, in time.

    python -m tests.fuzz.fuzz_quark_check [--count 10000] [--first 0]
    python -m tests.fuzz.fuzz_quark_check --only SEED

Each seed is one set of files of hostile.py. A worker process reports on it as text and
as JSON. Exits 1 on a failure.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from rich.console import Console

from tests.fuzz import fuzz_checkpoints
from tests.fuzz.hostile import mutate

WORKER = [sys.executable, "-m", "tests.fuzz.fuzz_quark_check", "--worker"]
# What quark-check gives itself here, instead of a minute; and what it may take in all.
SECONDS, LIMIT = 1, 20
BYTES = 6 << 30
CLASSES = {
    "fine": "status 0",
    "findings": "status 1",
    "unreadable": "status 2 and one error",
}
FAILURES = {
    "traceback": "an exception",
    "status": "another status, or a report that is not of that status",
    "control": "control characters in the output",
    "slow": f"over {LIMIT} s",
    "crash": "the process died",
    "hang": f"no end after {fuzz_checkpoints.SECONDS} s",
}


def report(folder: Path, as_json: bool) -> tuple[int, str]:
    """Status and output."""
    from vllm.model_executor.layers.quantization.quark.quark_check import run
    from vllm.model_executor.layers.quantization.quark.quark_check.cli import (
        add_arguments,
    )

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    more = ["--json"] if as_json else ["--verbose"]
    # Ten thousand models would take days.
    arguments = parser.parse_args([str(folder), "--no-model", *more])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = run.run(arguments)
    return status, output.getvalue()


def judge(folder: Path) -> tuple[str, str]:
    """Class of what came of a folder, and what shows it."""
    started = time.monotonic()
    try:
        status, text = report(folder, as_json=False)
        other, machine = report(folder, as_json=True)
        told = json.loads(machine)
    except Exception:
        return "traceback", traceback.format_exc()[-1500:]
    if time.monotonic() - started > LIMIT:
        return "slow", f"{time.monotonic() - started:.0f} s"
    if status != other or status != told["exit_status"] or status not in (0, 1, 2):
        return "status", f"{status}, {other}, {told['exit_status']}"
    if (status == 2) != ("error" in told) or (status == 2) != text.startswith("error"):
        return "status", text[:200]
    if any(not char.isprintable() and char != "\n" for char in text):
        return "control", ascii(text)[:400]
    return ("fine", "findings", "unreadable")[status], text[:300] if status == 2 else ""


def work() -> None:
    """Seeds from stdin; a line of JSON before and after each."""
    from vllm.model_executor.layers.quantization.quark.quark_check import limits

    limits.SECONDS = SECONDS
    limits.NUM_BYTES = 2 << 30
    resource.setrlimit(resource.RLIMIT_AS, (BYTES + (8 << 30),) * 2)
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for seed in map(int, sys.stdin.read().split()):
            lines.write(json.dumps({"begin": seed}) + "\n")
            files, mutation = mutate(seed)
            folder = scratch / f"checkpoint-{seed}"
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            outcome, error = judge(folder)
            shutil.rmtree(folder)
            said = {"seed": seed, "mutation": mutation[:300], "outcome": outcome}
            lines.write(json.dumps(said | {"error": error}) + "\n")
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return
    console = Console()
    seeds = list(range(args.first, args.first + args.count))
    started = time.monotonic()
    outcomes = fuzz_checkpoints.fuzz(
        seeds if args.only is None else [args.only], worker=WORKER
    )
    if args.only is not None:
        console.print_json(data=outcomes[0])
    console.print(f"{len(outcomes)} mutations, {time.monotonic() - started:.0f} s")
    if not fuzz_checkpoints.show(outcomes, console, CLASSES, FAILURES):
        sys.exit(1)


if __name__ == "__main__":
    main()
