# SPDX-License-Identifier: Apache-2.0
"""Compare builds of vLLM on the test exports with a float32 reference in plain torch.

    python -m examples.compare_builds RESULTS.json [LABEL=FOLDER ...]

Each FOLDER holds a build, to be put on PYTHONPATH; without any, the installed vLLM is
run. RESULTS gets `{"device", "date", "prompts", "rows": [{"build", "layout", "top1",
"overlap20", "mean_abs_dlogprob", "seconds"}]}`.
"""

import datetime
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.models.step3p5_reference import load, logprobs

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/step3p5-tiny"
WORK = ROOT / "build/demo"
EXPORTS = {"3key": FIXTURES / "int8-3key", "per_expert": FIXTURES / "int8-per-expert"}
NUM_PROMPTS = 64
TOP = 20
MEMORY_SHARE = 0.3  # of the device's memory: more than the small model needs


def make_prompts() -> list[list[int]]:
    """Random prompts of 4 to 64 tokens, the same in every run."""
    vocab_size = json.loads((FIXTURES / "bf16/config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    lengths = [draw.randint(4, 64) for _ in range(NUM_PROMPTS)]
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]


def make_reference(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log probabilities [prompts, vocab] after each prompt, float32."""
    return logprobs(load(FIXTURES / "bf16"), prompts)


def environment(package: Path | None) -> dict[str, str]:
    """For a process that is to import the build in the folder `package`."""
    path = [str(package)] if package else []
    if inherited := os.environ.get("PYTHONPATH"):
        path.append(inherited)
    # A gigabyte is plenty for the keys and values of so small a model.
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


def ask(
    name: str, export: Path, prompts: Sequence[Sequence[int]], package: Path | None
) -> list[list[float | None]]:
    """First-token log probabilities by a build. Exits where it fails."""
    WORK.mkdir(parents=True, exist_ok=True)
    log, answers = WORK / f"{name}.log", WORK / f"{name}.json"
    questions = WORK / "prompts.json"
    questions.write_text(json.dumps(prompts))
    script = ROOT / "examples/first_token_logprobs.py"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, script, export, questions, answers, str(MEMORY_SHARE)],
            env=environment(package),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"error: {name} ended with {done.returncode}; see {log}:\n{tail}")
    return json.loads(answers.read_text())


def compare(reference: torch.Tensor, rows: list[list[float | None]]) -> dict:
    """Figures of one run against the reference, [prompts, vocab] both.

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
    results, *labels = sys.argv[1:]
    builds: dict[str, Path | None] = {"installed": None} if not labels else {}
    for label in labels:
        build, folder = label.split("=", 1)
        builds[build] = Path(folder)
    prompts = make_prompts()
    reference = make_reference(prompts)
    rows = []
    for build, package in builds.items():
        for layout, export in EXPORTS.items():
            started = time.monotonic()
            figures = compare(
                reference, ask(f"{build}-{layout}", export, prompts, package)
            )
            seconds = round(time.monotonic() - started, 1)
            rows.append(
                {"build": build, "layout": layout, **figures, "seconds": seconds}
            )
            print(rows[-1], flush=True)
    date = datetime.date.today().isoformat()
    head = {"device": device_name(), "date": date, "prompts": NUM_PROMPTS}
    Path(results).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
