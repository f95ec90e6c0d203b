# SPDX-License-Identifier: Apache-2.0
"""Right against garbage: Quark INT8 exports of a small Step-3.5 that was trained to
add, read by the fork and by stock. Stock is the base release plus the patches that a
CPU needs.

From 0.22.0 on upstream holds the group `fix`, and stock reads two of the three exports
right. The third excludes modules by globs, which every release reads wrong.

Asks 200 sums that the model was not trained on. The row bf16 is a float32 forward pass
in plain torch, with the same model's bfloat16 weights. Prints two tables, writes
build/demo.json, then serves an export and asks it once. Exits with 1 where the fork
misses the bar.
"""

import json
import os
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
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.compare_builds import (
    EXPORTS,
    QUESTIONS,
    ROOT,
    TOP,
    WORK,
    Answers,
    ask,
    compare,
    environment,
    make_prompts,
    make_reference,
)
from tests.fixtures import addition
from tests.fixtures.cells import CELLS
from tools.fix import CPU_PATCHES
from tools.mutants import install_only
from tools.upstream import holds_fix, release

BAR_BF16 = 0.97
BAR_EXACT_MATCH = 0.01  # the fork is at most so far from bfloat16
BAR_OVERLAP, BAR_TOP1 = 0.97, 1.0
CLEARLY_BELOW = 0.85
MEMORY_SHARE = 0.3  # of the device's memory: more than the small model needs
NUM_SAMPLES = 3
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60

# Build -> layout -> what it answered, and the figures of it
Said = dict[str, dict[str, Answers]]
Results = dict[str, dict[str, dict[str, Any]]]

# Whatever excludes by globs is read wrong without the group `correct`.
GLOBS = WORK / "exports/globs"
LAYOUTS = EXPORTS | {"globs": GLOBS}
RELEASE = release(os.environ.get("VLLM_BASE_VERSION")).version
READ_BY_STOCK = list(EXPORTS) if holds_fix(RELEASE) else []

console = Console()


@contextmanager
def step(what: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - started:.0f} s", highlight=False)


def measure() -> tuple[Results, Said]:
    prompts = make_prompts()
    next(cell for cell in CELLS if cell.name == "exclude-glob").write(GLOBS)
    with step(f"The reference answers {len(QUESTIONS)} questions"):
        reference = make_reference(prompts)
    with step("Building stock: the base release plus the patches that a CPU needs"):
        stock = install_only(*CPU_PATCHES)
    results: Results = {}
    said: Said = {"bf16": dict.fromkeys(LAYOUTS, reference)}
    for build, package in (("fork", None), ("stock", stock)):
        results[build], said[build] = {}, {}
        with step(f"vLLM answers them from {len(LAYOUTS)} exports, {build}"):
            for layout, answers in ask(build, LAYOUTS, prompts, package):
                if error := answers.get("error"):
                    sys.exit(f"error: {build}, {layout}: {error}")
                said[build][layout] = answers
                results[build][layout] = compare(reference["logprobs"], answers)
    return results, said


def exact_matches(results: Results, said: Said) -> dict[str, float]:
    """By build; of the layouts the fork's worst, and stock's worst."""
    reference = said["bf16"][next(iter(LAYOUTS))]
    return {
        "bf16": addition.exact_match(QUESTIONS, reference["texts"]),
        **{
            build: min(row["exact_match"] for row in rows.values())
            for build, rows in results.items()
        },
    }


def right(exact_match: float) -> str:
    return f"{exact_match * len(QUESTIONS):.0f} of {len(QUESTIONS)}"


def table_of(results: Results, exact_match: dict[str, float]) -> Table:
    """What `make demo` shows first: a row for each layout and build."""
    title = f"Quark INT8 in vLLM {RELEASE} against the float32 reference"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "vLLM"):
        table.add_column(name)
    for name in ("right answers", "first token", f"top {TOP}", "|d logprob|"):
        table.add_column(name, justify="right")
    table.add_row("bf16", "plain torch", right(exact_match["bf16"]))
    for layout in LAYOUTS:
        for build in ("fork", "stock"):
            figures = results[build][layout]
            is_right = build == "fork" or layout in READ_BY_STOCK
            colour = "green" if is_right else "red"
            delta = figures["mean_abs_dlogprob"]
            table.add_row(
                layout,
                f"[{colour}]{build}",
                f"[{colour}]{right(figures['exact_match'])}",
                f"{figures['top1']:.0%}",
                f"{figures['overlap20']:.3f}",
                "not finite" if delta is None else f"{delta:.3f}",
            )
    return table


def show_samples(said: Said, layout: str) -> None:
    table = Table(title=f"What they answered ({layout})", title_justify="left")
    for name in ("question", *said):
        table.add_column(name)
    for index, pair in enumerate(QUESTIONS[:NUM_SAMPLES]):
        texts = [by_layout[layout]["texts"][index] for by_layout in said.values()]
        table.add_row(addition.question(*pair), *map(printable, texts))
    console.print(table)


def printable(text: str) -> Text:
    return Text(ascii(text)[1:-1])


def missed_bar(results: Results, exact_match: dict[str, float]) -> list[str]:
    missed = []
    if exact_match["bf16"] < BAR_BF16:
        missed.append(f"bf16 answers {exact_match['bf16']:.1%}, below {BAR_BF16:.0%}")
    if abs(exact_match["fork"] - exact_match["bf16"]) > BAR_EXACT_MATCH:
        missed.append(f"the fork is more than {BAR_EXACT_MATCH:.0%} from bf16")
    for layout in LAYOUTS:
        fork, stock = results["fork"][layout], results["stock"][layout]
        if fork["overlap20"] < BAR_OVERLAP or fork["top1"] < BAR_TOP1:
            missed.append(
                f"{layout}: the fork is below {BAR_OVERLAP} or {BAR_TOP1:.0%}"
            )
        is_right = max(stock["overlap20"], stock["exact_match"]) > CLEARLY_BELOW
        if is_right != (layout in READ_BY_STOCK):
            found = "right" if is_right else "wrong"
            missed.append(f"{layout}: stock {RELEASE} reads it {found}")
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
    results, said = measure()
    exact_match = exact_matches(results, said)
    console.print(table_of(results, exact_match))
    show_samples(said, "globs")
    demo = ROOT / "build/demo.json"
    figures = {"exact_match": exact_match, **results}
    demo.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"figures: {demo.relative_to(ROOT)}, logs: {WORK.relative_to(ROOT)}/")
    pair = QUESTIONS[-1]
    question, expected = addition.question(*pair), addition.answer(*pair)
    with step("vllm serve: start, answer, stop"):
        answer = serve_and_ask(LAYOUTS["3key"], question)
    console.print(f"asked {question!r}, vllm serve answered {answer!r}")
    if answer != expected:
        sys.exit(f"error: asked {question!r}: expected {expected!r}, found {answer!r}")
    if missed := missed_bar(results, exact_match):
        sys.exit(f"error: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
