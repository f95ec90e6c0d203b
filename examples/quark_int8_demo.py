# SPDX-License-Identifier: Apache-2.0
"""Right against garbage: a Quark INT8 export of a small Step-3.5, with the fork and
with the same fork less patches 0001-0003, against a float32 reference in plain torch.

Prints one table, writes build/demo.json, then serves the export and asks it once.
Exits with 1 where the fork misses the bar.
"""

import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from tests.models.step3p5_reference import load, logprobs
from tools.fix import PROBES
from tools.mutants import install_without

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/step3p5-tiny"
BUILD = ROOT / "build/demo"
EXPORTS = {"3key": FIXTURES / "int8-3key", "per_expert": FIXTURES / "int8-per-expert"}
NUM_PROMPTS = 64
TOP = 20
BAR_OVERLAP, BAR_TOP1 = 0.97, 1.0
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60

console = Console()


@contextmanager
def step(what: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - started:.0f} s", highlight=False)


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Random prompts of 4 to 64 tokens, the same in every run."""
    draw = random.Random(0)
    lengths = [draw.randint(4, 64) for _ in range(NUM_PROMPTS)]
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]


def run(name: str, command: Sequence[str | Path], package: Path | None) -> None:
    """Run a program with the fork, or with the build of it at `package`."""
    log = BUILD / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command, env=environment(package), stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"error: {name} ended with {done.returncode}; see {log}:\n{tail}")


def environment(package: Path | None) -> dict[str, str]:
    path = {"PYTHONPATH": str(package)} if package else {}
    # A gigabyte is plenty for the keys and values of so small a model.
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | path


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


def measure(reference: torch.Tensor, prompts: Path) -> dict[str, dict[str, dict]]:
    results: dict[str, dict[str, dict]] = {"fork": {}, "without_fix": {}}
    with step("Building the fork without 0001-0003"):
        without_fix = install_without(*PROBES)
    for build, package in (("fork", None), ("without_fix", without_fix)):
        for layout, export in EXPORTS.items():
            name = f"{build}-{layout}"
            answers = BUILD / f"{name}.json"
            script = ROOT / "examples/first_token_logprobs.py"
            started = time.monotonic()
            with step(f"Running {layout}, {build.replace('_', ' ')}"):
                run(name, [sys.executable, script, export, prompts, answers], package)
            figures = compare(reference, json.loads(answers.read_text()))
            figures["seconds"] = round(time.monotonic() - started, 1)
            results[build][layout] = figures
    return results


def show(results: dict[str, dict[str, dict]]) -> None:
    title = f"Quark INT8 against float32, {NUM_PROMPTS} prompts"
    table = Table(title=title, title_justify="left")
    table.add_column("layout")
    table.add_column("vLLM")
    for name in ("same first token", f"overlap of top {TOP}", "mean |d logprob|", "s"):
        table.add_column(name, justify="right")
    for layout in EXPORTS:
        for build, colour in (("fork", "green"), ("without_fix", "red")):
            figures = results[build][layout]
            delta = figures["mean_abs_dlogprob"]
            table.add_row(
                layout,
                f"[{colour}]{build.replace('_', ' ')}",
                f"{figures['top1']:.0%}",
                f"{figures['overlap20']:.3f}",
                "not finite" if delta is None else f"{delta:.3f}",
                f"{figures['seconds']:.0f}",
            )
    console.print(table)


def missed_bar(results: dict[str, dict[str, dict]]) -> list[str]:
    missed = []
    for layout in EXPORTS:
        fork, without_fix = results["fork"][layout], results["without_fix"][layout]
        if fork["overlap20"] < BAR_OVERLAP or fork["top1"] < BAR_TOP1:
            missed.append(f"the fork on {layout} is below {BAR_OVERLAP} and {BAR_TOP1}")
        if without_fix["overlap20"] >= BAR_OVERLAP:
            missed.append(f"without the fix {layout} is right as well")
    return missed


def serve_and_ask(export: Path, prompt: str) -> str:
    """Start `vllm serve`, ask through the OpenAI client, stop it; return the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = BUILD / "serve.log"
    vllm = Path(sys.executable).with_name("vllm")
    options = ["--served-model-name", "step3p5-tiny", "--max-model-len", "256"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [vllm, "serve", export, *options],
            env=environment(None),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            completion = client.completions.create(
                model="step3p5-tiny", prompt=prompt, max_tokens=16, temperature=0
            )
        finally:
            server.send_signal(signal.SIGINT)
            try:
                status = server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                sys.exit(f"error: vllm serve did not stop; see {log}")
    if status:
        sys.exit(f"error: vllm serve ended with status {status}; see {log}")
    return completion.choices[0].text


def wait_until_ready(server: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            sys.exit(f"error: vllm serve ended with {server.returncode}:\n{tail}")
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"error: vllm serve did not answer in {START_TIMEOUT_S} s; see {log}")


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    config = json.loads((FIXTURES / "bf16/config.json").read_text())
    prompts = make_prompts(config["vocab_size"])
    mean_length = statistics.mean(map(len, prompts))
    with step(
        f"Reference: {NUM_PROMPTS} prompts of {mean_length:.0f} tokens on average"
    ):
        reference = logprobs(load(FIXTURES / "bf16"), prompts)
    prompts_file = BUILD / "prompts.json"
    prompts_file.write_text(json.dumps(prompts))
    results = measure(reference, prompts_file)
    show(results)
    demo = ROOT / "build/demo.json"
    demo.write_text(json.dumps(results, indent=1) + "\n")
    console.print(
        f"figures: {demo.relative_to(ROOT)}, logs: {BUILD.relative_to(ROOT)}/"
    )
    prompt = "Hello, my name is"
    with step("vllm serve: start, answer, stop"):
        answer = serve_and_ask(EXPORTS["3key"], prompt)
    console.print(f"{prompt!r} -> {answer!r} (the model's weights are random)")
    if missed := missed_bar(results):
        sys.exit(f"error: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
