# SPDX-License-Identifier: Apache-2.0
"""Right against garbage: a Quark INT8 export of a small Step-3.5, with the fork and
with the same fork less patches 0001-0003, against a float32 reference in plain torch.

Prints one table, writes build/demo.json, then serves the export and asks it once.
Exits with 1 where the fork misses the bar.
"""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from examples.compare_builds import (
    EXPORTS,
    MEMORY_SHARE,
    NUM_PROMPTS,
    ROOT,
    TOP,
    WORK,
    ask,
    compare,
    environment,
    make_prompts,
    make_reference,
)
from tools.fix import PROBES
from tools.mutants import install_without

BAR_OVERLAP, BAR_TOP1 = 0.97, 1.0
CLEARLY_BELOW = 0.85
# The small model's one skill: after each byte comes the next.
PROMPT, ANSWER = "abcdef", "ghijklmn"
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60

# Build -> layout -> figure -> value
Results = dict[str, dict[str, dict]]

console = Console()


@contextmanager
def step(what: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - started:.0f} s", highlight=False)


def measure() -> Results:
    prompts = make_prompts()
    with step(f"The reference answers {NUM_PROMPTS} prompts"):
        reference = make_reference(prompts)
    with step("Building the fork without 0001-0003"):
        without_fix = install_without(*PROBES)
    results: Results = {"fork": {}, "without_fix": {}}
    for build, package in (("fork", None), ("without_fix", without_fix)):
        for layout, export in EXPORTS.items():
            started = time.monotonic()
            with step(f"vLLM answers them from {export.name}, {spoken(build)}"):
                answers = ask(f"{build}-{layout}", export, prompts, package)
            seconds = round(time.monotonic() - started, 1)
            results[build][layout] = compare(reference, answers) | {"seconds": seconds}
    return results


def spoken(build: str) -> str:
    return build.replace("_", " ")


def show(results: Results) -> None:
    title = f"Quark INT8 against float32, {NUM_PROMPTS} prompts"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "vLLM"):
        table.add_column(name)
    for name in ("first token", f"top {TOP}", "|d logprob|", "seconds"):
        table.add_column(name, justify="right")
    for layout in EXPORTS:
        for build, colour in (("fork", "green"), ("without_fix", "red")):
            figures = results[build][layout]
            delta = figures["mean_abs_dlogprob"]
            table.add_row(
                layout,
                f"[{colour}]{spoken(build)}",
                f"{figures['top1']:.0%}",
                f"{figures['overlap20']:.3f}",
                "not finite" if delta is None else f"{delta:.3f}",
                f"{figures['seconds']:.0f}",
            )
    console.print(table)


def missed_bar(results: Results) -> list[str]:
    missed = []
    for layout in EXPORTS:
        fork, without_fix = results["fork"][layout], results["without_fix"][layout]
        if fork["overlap20"] < BAR_OVERLAP or fork["top1"] < BAR_TOP1:
            missed.append(
                f"{layout}: the fork is below {BAR_OVERLAP} or {BAR_TOP1:.0%}"
            )
        if without_fix["overlap20"] > CLEARLY_BELOW:
            missed.append(f"{layout}: without the fix it is right as well")
    return missed


def serve_and_ask(export: Path, prompt: str) -> str:
    """Start `vllm serve`, ask through the OpenAI client, stop it; return the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = WORK / "serve.log"
    vllm = Path(sys.executable).with_name("vllm")
    options = ["--served-model-name", "step3p5-tiny", "--max-model-len", "256"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    options += ["--gpu-memory-utilization", str(MEMORY_SHARE)]
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
            model="step3p5-tiny", prompt=prompt, max_tokens=8, temperature=0
        )
    finally:
        stop(server, log)
    return completion.choices[0].text


def wait_until_ready(server: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    tail = "\n".join(log.read_text().splitlines()[-15:])
    sys.exit(f"error: vllm serve did not get ready; see {log}:\n{tail}")


def stop(server: subprocess.Popen, log: Path) -> None:
    """Stop the server as Ctrl-C does; a clean end has status 0."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    try:
        status = server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        sys.exit(f"error: vllm serve did not stop in {STOP_TIMEOUT_S} s; see {log}")
    if status:
        sys.exit(f"error: vllm serve ended with status {status}; see {log}")


def main() -> None:
    results = measure()
    show(results)
    demo = ROOT / "build/demo.json"
    demo.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {demo.relative_to(ROOT)}, logs: {WORK.relative_to(ROOT)}/")
    with step("vllm serve: start, answer, stop"):
        answer = serve_and_ask(EXPORTS["3key"], PROMPT)
    console.print(f"asked {PROMPT!r}, vllm serve answered {answer!r}")
    if answer != ANSWER:
        sys.exit(f"error: expected {ANSWER!r}: the model was made to go on counting")
    if missed := missed_bar(results):
        sys.exit(f"error: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
