# SPDX-License-Identifier: Apache-2.0
"""Compare builds of vLLM on the test exports with a float32 reference in plain torch.

    python -m examples.compare_builds [--tensor-parallel-size N] RESULTS.json
        [LABEL=FOLDER ...]

Each FOLDER holds a build, to be put on PYTHONPATH; without any, the installed vLLM is
run. RESULTS gets `{"device", "date", "prompts", "tensor_parallel_size", "rows":
[{"build", "layout", "exact_match", "top1", "overlap20", "mean_abs_dlogprob",
"seconds"}]}`.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.fixtures import addition
from tests.fixtures.step3p5_tiny import EOS_ID
from tests.models.step3p5_reference import greedy, load, logprobs

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/step3p5-tiny"
WORK = ROOT / "build/demo"
SCRIPT = ROOT / "examples/ask_checkpoints.py"
EXPORTS = {"3key": FIXTURES / "int8-3key", "per_expert": FIXTURES / "int8-per-expert"}
QUESTIONS = addition.held_out(200)
TOP = 20
MAX_TOKENS = 5  # the same in ask_checkpoints.py
# Set, the cache is not measured, and builds may be run at the same time.
CACHE_BYTES = 256 << 20


# What a build said to one checkpoint's questions; examples/ask_checkpoints.py.
Answers = dict[str, Any]


def make_prompts() -> list[list[int]]:
    """The questions as token ids."""
    return [addition.encode(addition.question(*pair)) for pair in QUESTIONS]


def make_reference(prompts: Sequence[Sequence[int]]) -> Answers:
    """The float32 model's texts, and its log probabilities [prompts, vocab] float32."""
    torch.set_num_threads(1)  # for so small a model more cost more than they bring
    model = load(FIXTURES / "bf16")
    answers = greedy(model, prompts, EOS_ID, MAX_TOKENS)
    return {
        "texts": [addition.decode(token_ids) for token_ids in answers],
        "logprobs": logprobs(model, prompts),
    }


def environment(package: Path | None) -> dict[str, str]:
    """For a process that is to import the build in the folder `package`."""
    path = [str(package)] if package else []
    if inherited := os.environ.get("PYTHONPATH"):
        path.append(inherited)
    # A gigabyte is plenty for the keys and values of so small a model.
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Nor does it pay to compile for it: that takes longer than all the answers.
        "TORCHDYNAMO_DISABLE": "1",
        # Errors are to reach the process that asks, not to stay in another.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join(path),
    }


def ask(
    build: str,
    checkpoints: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    package: Path | None,
    script: Path | None = None,
    tensor_parallel_size: int = 1,
    env: Mapping[str, str] | None = None,
    seconds: float = math.inf,
    options: Mapping[str, Any] | None = None,
    pictures: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    python: str = sys.executable,
) -> Generator[tuple[str, Answers], None, None]:
    """Names and answers of the checkpoints by a build, in order, as they come.

    `script` does what ask_checkpoints.py, which stands for None, does in another way.
    `env` holds further environment variables, `options` further ones of `LLM`.
    `pictures` are questions with a picture, for some of the checkpoints. `python` is
    that of another environment.

    Where a checkpoint ends the process or takes longer than so many seconds, its answer
    is an error and another process goes on with the rest.
    """
    folder = WORK / build
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left = dict(checkpoints)
    while left:
        job, log = folder / "job.json", folder / f"{next(iter(left))}.log"
        paths = {name: str(path) for name, path in left.items()}
        engine = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": CACHE_BYTES}
        engine |= options or {}
        if tensor_parallel_size > 1:
            engine["tensor_parallel_size"] = tensor_parallel_size
        asked = {"prompts": prompts, "pictures": pictures or {}}
        job.write_text(json.dumps({"options": engine, "checkpoints": paths, **asked}))
        with log.open("w") as file:
            process = subprocess.Popen(
                [python, script or SCRIPT, job, folder],
                env=environment(package) | dict(env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        last_answer = time.monotonic()
        try:
            while left:
                name = next(iter(left))
                answers = folder / f"{name}.json"
                ended = process.poll() is not None
                if answers.exists():
                    yield name, json.loads(answers.read_text())
                elif ended:
                    said = f"ended with status {process.returncode}; see {log}"
                    yield name, {"error": said, "loaded": True}
                elif time.monotonic() - last_answer > seconds:
                    process.kill()
                    ended = True
                    said = f"no answer in {seconds:.0f} s; see {log}"
                    yield name, {"error": said, "loaded": True}
                else:
                    time.sleep(0.2)
                    continue
                del left[name]
                last_answer = time.monotonic()
                if ended and not answers.exists():
                    break
        finally:
            if left:
                process.kill()
            process.wait()


def compare(reference: torch.Tensor, answers: Answers) -> dict[str, Any]:
    """Figures of one run against the reference, [prompts, vocab].

    exact_match: share of the questions whose answer is right; and `compare_logprobs`.
    """
    exact_match = addition.exact_match(QUESTIONS, answers["texts"])
    return {
        "exact_match": exact_match,
        **compare_logprobs(reference, answers["logprobs"]),
    }


def compare_logprobs(
    reference: torch.Tensor, rows: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    """Figures of a run's rows, None where not finite, against the reference's.

    top1: how often both put the same token first. overlap20: the share of the
    reference's 20 likeliest tokens that are among the run's. mean_abs_dlogprob: over
    the reference's 20 likeliest; None if the run has no finite value there.
    """
    values = [[-math.inf if x is None else x for x in row] for row in rows]
    found = torch.tensor(values, dtype=torch.float64)
    wanted = reference.double()
    if found.shape != wanted.shape:
        sys.exit(f"error: expected logprobs {wanted.shape}, found {found.shape}")
    finite = found.isfinite()
    likeliest = wanted.topk(TOP).indices
    of_run = found.topk(TOP).indices
    shared = (likeliest[:, :, None] == of_run[:, None, :]).any(-1)
    shared &= finite.gather(1, likeliest)
    first = (likeliest[:, 0] == of_run[:, 0]) & finite.any(-1)
    delta = (found - wanted).abs().gather(1, likeliest)
    delta = delta[delta.isfinite()]
    return {
        "top1": first.double().mean().item(),
        "overlap20": shared.double().mean().item(),
        "mean_abs_dlogprob": delta.mean().item() if len(delta) else None,
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("builds", nargs="*", metavar="LABEL=FOLDER")
    args = parser.parse_args()
    num_ranks = args.tensor_parallel_size
    builds: dict[str, Path | None] = {} if args.builds else {"installed": None}
    for label in args.builds:
        build, folder = label.split("=", 1)
        builds[build] = Path(folder)
    prompts = make_prompts()
    reference = make_reference(prompts)["logprobs"]
    rows = []
    for build, package in builds.items():
        started = time.monotonic()
        for layout, answers in ask(
            build, EXPORTS, prompts, package, tensor_parallel_size=num_ranks
        ):
            if error := answers.get("error"):
                sys.exit(f"error: {build}, {layout}: {error}")
            seconds = round(time.monotonic() - started, 1)
            figures = compare(reference, answers)
            rows.append(
                {"build": build, "layout": layout, **figures, "seconds": seconds}
            )
            print(rows[-1], flush=True)
            started = time.monotonic()
    date = datetime.date.today().isoformat()
    found = {
        "device": device_name(),
        "date": date,
        "prompts": len(prompts),
        "tensor_parallel_size": num_ranks,
        "rows": rows,
    }
    args.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
