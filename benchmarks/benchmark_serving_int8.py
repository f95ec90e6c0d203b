# SPDX-License-Identifier: Apache-2.0
"""Serve a Quark INT8 checkpoint with stock vLLM and with the fork, side by side.

    python -m benchmarks.benchmark_serving_int8 --stock FOLDER

FOLDER holds a stock build of vLLM, with the patches 0001 to 0003, to be put on
PYTHONPATH. Writes a random checkpoint with the widths of Step-3.5-Flash and few layers,
and measures in parts, each of which may be a call of its own:

- serve: both servers on the GPU at the same time; `vllm bench serve` for each batch and
  length of prompts in the turns stock, fork, fork, stock; with --alone one server after
  the other, for a model that leaves no room for both
- offline: loading and memory of an engine of each build, then `vllm bench latency` and
  `vllm bench throughput` of both in the same turns
- profile: where the GPU time of a decode step and of a prefill goes; torch's memory

Writes medians to OUT/<chip>/serving_int8.json (serving_int8_alone.json with --alone), a
plot beside it, and the profile to docs/results. Rows that are measured again are
replaced. Exits 0 whether the bars are met or missed, and 1 where it cannot be measured.
"""

import argparse
import datetime
import json
import re
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.serving import report
from benchmarks.serving.checkpoint import Widths, weights_bytes, write_checkpoint
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.kernel_kinds import summarize
from benchmarks.serving.processes import (
    Build,
    MemoryPeak,
    Running,
    end_on_signals,
    loading,
    results,
    running,
    server,
    wait_until_ready,
)

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "benchmarks/serving/jobs.py"
PARTS = ("serve", "offline", "profile")
TURNS = ("stock", "fork", "fork", "stock")
# How often all turns are taken where a run has few tokens, or one request at a time:
# such runs differ by up to a quarter; requests arrive, or the processor is in the way.
ROUNDS, FEW_TOKENS = 3, 20_000
BATCHES, PROMPT_TOKENS = (1, 8, 64, 256), (128, 2048, 8192)
OUTPUT_TOKENS = 96
MAX_NUM_SEQS = 256
# What a step of the engine takes at most; the server's default on such a GPU.
STEP_TOKENS = 8192
# Device memory of an engine beside its weights and its keys and values.
ENGINE_GIB = 5.0
# Of a GPU's memory, for all: the rest is this process's and the driver's.
MEMORY_SHARE = 0.95
LATENCY = {"batch": 1, "prompt_tokens": 128, "output_tokens": 128}
THROUGHPUT = {"batch": 64, "prompt_tokens": 8192, "output_tokens": 16}
LATENCY_RUNS, THROUGHPUT_RUNS = 5, 2  # in a turn
PROFILE = {
    "decode": [
        {"batch": batch, "prompt_tokens": prompt_tokens}
        for batch, prompt_tokens in ((1, 128), (1, 8192), (64, 128), (256, 128))
    ],
    "prefill": 8192,
}
# By these Triton kernels a build is known; each must have run its own alone.
KERNELS = {"stock": {"fused_moe_kernel"}, "fork": {"w13_kernel", "w13_few_kernel"}}

console = Console(width=140, log_path=False)


@dataclass(frozen=True)
class Settings:
    """What is measured, by which builds, and where it goes."""

    builds: dict[str, Build]
    work: Path
    out: Path
    profile_out: Path
    widths: Widths
    batches: Sequence[int] = BATCHES
    prompt_tokens: Sequence[int] = PROMPT_TOKENS
    alone: bool = False  # each server has the GPU for itself

    @property
    def model(self) -> Path:
        return self.work / "checkpoint"

    @property
    def jobs(self) -> Path:
        """For what is asked of processes, what they answer, and their logs."""
        return self.work / "jobs"


@dataclass(frozen=True)
class Found:
    """What a part has found since it last told."""

    rows: list[report.Row] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    # By build and phase, what `summarize` says.
    profiles: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)  # by build, torch's at most


def cell(batch: int, prompt_tokens: int) -> dict[str, int]:
    """A run of `vllm bench serve`: long enough to tell, some seconds at most."""
    num_prompts = max(batch, min(16 * batch, 32))
    tokens = num_prompts * (prompt_tokens + OUTPUT_TOKENS)
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "num_prompts": num_prompts,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": ROUNDS if batch == 1 or tokens < FEW_TOKENS else 1,
    }


def kv_cache_bytes(widths: Widths, engines: int) -> int:
    """Memory for keys and values of each of so many engines that share the device."""
    if not torch.cuda.is_available():
        return 1 << 28
    total = torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    left = total / engines - weights_bytes(widths) - ENGINE_GIB * 2**30
    if left < 2**30:
        raise BenchmarkError(
            f"{engines} engine(s) with {weights_bytes(widths) / 2**30:.1f} GiB of "
            "weights each, and what they need beside them, do not fit in "
            f"{total / 2**30:.1f} GiB of GPU memory: fewer --layers"
            f"{' or --alone' if engines > 1 else ''}"
        )
    return int(left)


def engine_args(settings: Settings) -> list[str]:
    """The same for all engines, so that times and memory can be compared."""
    cells = [cell(b, p) for b in settings.batches for p in settings.prompt_tokens]
    cells += [LATENCY, THROUGHPUT]
    longest = max(one["prompt_tokens"] + one["output_tokens"] for one in cells)
    engines = 1 if settings.alone else len(settings.builds)
    return [
        *("--max-model-len", str(longest)),
        *("--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-num-batched-tokens", str(STEP_TOKENS)),
        *("--kv-cache-memory-bytes", str(kv_cache_bytes(settings.widths, engines))),
        # Only looked at to see that so much is free when the second one starts.
        *("--gpu-memory-utilization", "0.4"),
        # Prompts that come again are to be read again.
        "--no-enable-prefix-caching",
    ]


def describe_start(
    build: Build, process: Running, ready: float, peak: MemoryPeak
) -> dict[str, Any]:
    """What a start took."""
    weights_s, model_gib = loading(process.log)
    return {
        "build": build.name,
        "weights_s": round(weights_s, 2),
        "start_s": round(ready - process.started, 2),
        "model_gib": model_gib,
        "peak_gib": round(peak.gib, 3) or None,
    }


@contextmanager
def running_job(
    settings: Settings,
    build: Build,
    job: dict[str, Any],
    env: dict[str, str] | None = None,
    is_asked: bool = False,
) -> Iterator[tuple[Running, Path]]:
    """A job of jobs.py that runs in a build, and the file that it writes lines to."""
    name = f"{job['job']}-{build.name}"
    folder = settings.jobs
    folder.mkdir(parents=True, exist_ok=True)
    out, file = folder / f"{name}.jsonl", folder / f"{name}.json"
    out.unlink(missing_ok=True)
    file.write_text(
        json.dumps(job | {"model": str(settings.model), "out": str(out)}, indent=1)
    )
    with running(
        f"the {job['job']} job of {build.name}",
        [sys.executable, "-P", JOBS, file],
        build.environment() | (env or {}),
        folder / f"{name}.log",
        is_asked,
    ) as process:
        yield process, out


def measure_serving(settings: Settings) -> Generator[Found, None, None]:
    """The rows of each cell."""
    builds = list(settings.builds.values())
    cells = [cell(b, p) for p in settings.prompt_tokens for b in settings.batches]
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for together in [[build] for build in builds] if settings.alone else [builds]:
        with closing(serve_together(settings, together, cells)) as results_so_far:
            for run in results_so_far:
                place = run["cell"]["batch"], run["cell"]["prompt_tokens"]
                runs.setdefault(place, []).append(run)
                if len(runs[place]) == len(TURNS) * run["cell"]["rounds"]:
                    yield Found(rows=cell_rows(runs.pop(place)))


def serve_together(
    settings: Settings, builds: Sequence[Build], cells: Sequence[dict[str, int]]
) -> Generator[dict[str, Any], None, None]:
    """The runs of each cell by servers of these builds, in their turns."""
    with ExitStack() as stack:
        servers, urls = {}, {}
        for build in builds:
            # What is found there afterwards, this run has compiled.
            shutil.rmtree(build.cache, ignore_errors=True)
            log = settings.jobs / f"server-{build.name}.log"
            console.log(f"starting the server of {build.name}: {log}")
            process, url = stack.enter_context(
                server(build, settings.model, engine_args(settings), log)
            )
            servers[url] = process
            urls[build.name] = url
        wait_until_ready(servers)
        turns = [turn for turn in TURNS if turn in urls]
        job = {"job": "serve", "urls": urls, "turns": turns, "cells": cells}
        # The client is of the build that it asks, or of the fork if it asks both.
        with running_job(settings, builds[-1], job) as (client, out):
            yield from results(client, out, list(servers.values()))


def cell_rows(runs: Sequence[dict[str, Any]]) -> list[report.Row]:
    """The rows of a cell, from its runs by both builds."""
    cell = runs[0]["cell"]
    rows = []
    for metric, name in (
        (report.TTFT, "median_ttft_ms"),
        (report.TPOT, "median_tpot_ms"),
        (report.OUTPUT_RATE, "output_throughput"),
        (report.TOTAL_RATE, "total_token_throughput"),
    ):
        samples: dict[str, list[float]] = {build: [] for build in report.BUILDS}
        for run in runs:
            samples[run["build"]].append(run["result"][name])
        place = cell["batch"], cell["prompt_tokens"]
        rows.append(report.make_row(metric, samples, *place))
    for row in rows:
        console.log(
            f"{report.describe(row)}: {row['stock']:,.5g} and {row['fork']:,.5g}, "
            f"{report.ratio(row):.2f}x",
            highlight=False,
        )
    return rows


def measure_offline(settings: Settings) -> Generator[Found, None, None]:
    """The start of each build's engine, then the rows of latency and throughput."""
    cells = {"latency": LATENCY, "throughput": THROUGHPUT}
    job = {"job": "offline", "engine_args": engine_args(settings), **cells}
    # As the command `vllm` does: forked from a process with threads an engine may hang.
    env = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with ExitStack() as stack:
        engines: dict[str, Running] = {}
        answers: dict[str, Iterator[dict[str, Any]]] = {}

        def ask(build: str, name: str, runs: int) -> dict[str, Any]:
            engines[build].ask(name=name, runs=runs)
            for answer in answers[build]:
                return answer
            raise BenchmarkError(f"{engines[build].what} ended without an answer")

        for build in settings.builds.values():
            console.log(f"offline: {build.name}")
            with MemoryPeak() as peak:
                process, out = stack.enter_context(
                    running_job(settings, build, job, env, is_asked=True)
                )
                engines[build.name] = process
                answers[build.name] = results(process, out, list(engines.values()))
                # Not counted: what it takes at most, and what it compiles.
                for name in cells:
                    ready = ask(build.name, name, 1)["ready"]
            start = describe_start(build, process, ready, peak)
            console.log(f"offline: {start}", highlight=False)
            yield Found(starts=[start])
        rows = []
        for name, metric, runs in (
            ("latency", report.LATENCY, LATENCY_RUNS),
            ("throughput", report.THROUGHPUT, THROUGHPUT_RUNS),
        ):
            samples: dict[str, list[float]] = {build: [] for build in report.BUILDS}
            for turn in TURNS:
                samples[turn] += ask(turn, name, runs)["samples"]
            place = cells[name]["batch"], cells[name]["prompt_tokens"]
            rows.append(report.make_row(metric, samples, *place))
    yield Found(rows=rows)


def measure_profile(settings: Settings) -> Generator[Found, None, None]:
    """The profile of each build, phase by phase, and torch's share of the memory."""
    if not torch.cuda.is_available():
        raise BenchmarkError("a profile needs a GPU: a trace of a CPU has no kernels")
    job = {"job": "profile", "engine_args": engine_args(settings), **PROFILE}
    # The profiler sees its own process; it is told the parts of a step by name.
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1",
    }
    for build in settings.builds.values():
        console.log(f"profile: {build.name}")
        found: dict[str, Any] = {}
        with running_job(settings, build, job, env) as (process, out):
            for line in results(process, out):
                if "phase" in line:
                    found[line["phase"]] = phase(line)
                else:
                    reserved, allocated = line["torch_gib"]
        memory = {"reserved_gib": reserved, "allocated_gib": allocated}
        console.log(f"profile: {memory}", highlight=False)
        yield Found(profiles={build.name: found}, memory={build.name: memory})


def phase(line: dict[str, Any]) -> dict[str, Any]:
    """A phase of a profile, from what the job says of it."""
    try:
        trace = json.loads(Path(line["trace"]).read_text())
        summary = summarize(trace, line["steps"])
    except ValueError as error:
        raise BenchmarkError(f"{line['trace']}: {error}") from error
    return {**{name: line[name] for name in report.TIMES}, **summary}


def check_kernels(builds: dict[str, Build]) -> None:
    """Each build has compiled its own kernels of the INT8 MoE and not the other's."""
    for name, build in builds.items():
        compiled = build.compiled_kernels()
        [other] = set(KERNELS) - {name}
        if not compiled & KERNELS[name] or compiled & KERNELS[other]:
            raise BenchmarkError(
                f"{name}: expected one of the kernels {sorted(KERNELS[name])} and none "
                f"of {sorted(KERNELS[other])} in {build.cache}, found "
                f"{sorted(compiled & (KERNELS[name] | KERNELS[other]))}: is "
                f"{build.folder} that build?"
            )


def measure(settings: Settings, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the parts; the results so far, these among them."""
    chip = chip_name()
    name = "serving_int8_alone" if settings.alone else "serving_int8"
    path = settings.out / chip / f"{name}.json"
    result = report.load(path, chip, settings.widths.layers)
    write_checkpoint(settings.model, settings.widths)
    profile: dict[str, Any] = {
        "chip": chip,
        "date": datetime.date.today().isoformat(),
        "layers": settings.widths.layers,
        "builds": {},
        "memory": {},
    }
    for part, measure_part in (
        ("serve", measure_serving),
        ("offline", measure_offline),
        ("profile", measure_profile),
    ):
        if part not in parts:
            continue
        # Closed: whatever comes between two of its yields, its processes end.
        with closing(measure_part(settings)) as parts_found:
            for found in parts_found:
                add(result, found)
                report.save(path, result)
                if found.profiles:
                    profile["builds"] |= found.profiles
                    profile["memory"] |= found.memory
                    report.save(settings.profile_out / profile_name(chip), profile)
        if torch.cuda.is_available():
            check_kernels(settings.builds)
        report.plot(result, path.with_suffix(".png"))
    if result["rows"]:
        console.print(report.markdown(result), highlight=False, markup=False)
    if profile["builds"]:
        console.print(report.profile_markdown(profile), highlight=False, markup=False)
    return result


def add(result: dict[str, Any], found: Found) -> None:
    """Put what was found into the results, in place of what it measures again."""
    result["date"] = datetime.date.today().isoformat()
    result["starts"] = report.merge(result["starts"], found.starts, ("build",))
    rows = found.rows + report.loading_rows(result["starts"])
    place = ("metric", "batch", "prompt_tokens")
    rows = report.merge(result["rows"], rows, place)
    result["rows"] = sorted(rows, key=report.order)


def chip_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "_")
    return "CPU"


def profile_name(chip: str) -> str:
    """As the other results are named: h100 for NVIDIA_H100_80GB_HBM3."""
    short = re.sub(r"^(NVIDIA|AMD_Instinct)_", "", chip).partition("_")[0].lower()
    return f"serving-profile-{short}.json"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stock", type=Path, metavar="FOLDER")
    parser.add_argument("--fork", type=Path, metavar="FOLDER", help="if not installed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument(
        "--profile-out", type=Path, default=ROOT / "docs/results", metavar="FOLDER"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/serving",
        metavar="FOLDER",
        help="for the checkpoint (24 GiB with 6 layers), logs and caches",
    )
    parser.add_argument("--layers", type=int, default=Widths().layers, metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N")
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=PROMPT_TOKENS, metavar="N"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="which to measure"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="serve with one server after the other, so that each may fill the GPU; "
        "for `--parts serve`, into serving_int8_alone.json",
    )
    parser.add_argument(
        "--tables",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="measure nothing: print these as Markdown",
    )
    args = parser.parse_args()
    if args.layers < 2:
        parser.error("--layers: the first is dense, at least one has experts")
    if args.alone and tuple(args.parts) != ("serve",):
        parser.error("--alone: expected --parts serve, which is all that it is for")
    if not args.tables:
        if not args.stock:
            parser.error("--stock FOLDER: a stock build of vLLM to compare with")
        for folder in filter(None, (args.stock, args.fork)):
            if not (folder / "vllm/__init__.py").exists():
                parser.error(f"{folder}: expected a folder that holds vllm/")
    return args


def main() -> None:
    args = parse_args()
    for path in args.tables or ():
        result = json.loads(path.read_text())
        tables = report.profile_markdown if "builds" in result else report.markdown
        print(tables(result))
    if args.tables:
        return
    end_on_signals()
    work = args.work.resolve()
    folders = {"stock": args.stock, "fork": args.fork}
    settings = Settings(
        builds={n: Build(n, f, work / "cache" / n) for n, f in folders.items()},
        work=work,
        out=args.out,
        profile_out=args.profile_out,
        widths=Widths(layers=args.layers),
        batches=args.batches,
        prompt_tokens=args.prompt_tokens,
        alone=args.alone,
    )
    try:
        measure(settings, args.parts)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
