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
- profile: where the GPU time of a decode step and of a prefill goes; torch's memory;
  with --before of an earlier build of the fork too, each alone on the GPU

Writes medians to OUT/<chip>/serving_int8.json (serving_int8_alone.json with --alone), a
plot beside it, and the profile to docs/results, or to another OUT. Rows that are
measured again are replaced. Exits 0 whether the bars are met or missed, and 1 where it
cannot be measured.
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.serving import report
from benchmarks.serving.checkpoint import Widths, weights_bytes, write_checkpoint
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.jobs import Watch
from benchmarks.serving.kernel_kinds import summarize
from benchmarks.serving.processes import (
    Build,
    Job,
    device_memory,
    end_on_signals,
    job,
    loading,
    server,
    wait_until_ready,
)
from tests.sessions import Server, ServerError

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PROFILES = ROOT / "benchmarks/results", ROOT / "docs/results"
TURNS = ("stock", "fork", "fork", "stock")
# How often all turns are taken where a run has few tokens, or one request at a time:
# such runs differ by up to a quarter; requests arrive, or the processor is in the way.
ROUNDS, FEW_TOKENS = 3, 20_000
BATCHES, PROMPT_TOKENS = (1, 8, 64, 256), (128, 2048, 8192)
OUTPUT_TOKENS = 96
# Before a cell counts: enough for each kernel that it needs to be compiled.
WARM_UP_PROMPT_TOKENS, WARM_UP_OUTPUT_TOKENS = 1 << 19, 8
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
# Decode steps of so many requests, or prefills.
PHASES = [
    *(
        {"batch": batch, "prompt_tokens": prompt_tokens}
        for batch, prompt_tokens in ((1, 128), (1, 8192), (64, 128), (256, 128))
    ),
    {"prompt_tokens": 8192},
]
# By these Triton kernels a build is known; each must have run its own alone.
STOCKS, FORKS = {"fused_moe_kernel"}, {"w13_kernel", "w13_few_kernel"}
Cell = dict[str, int]

console = Console(width=140, log_path=False)
log = partial(console.log, highlight=False)


@dataclass(frozen=True)
class Settings:
    """What is measured, by which builds, and where it goes."""

    builds: dict[str, Build]
    work: Path
    out: Path
    widths: Widths
    batches: Sequence[int] = BATCHES
    prompt_tokens: Sequence[int] = PROMPT_TOKENS
    alone: bool = False  # each server has the GPU for itself
    fork_moe_backend: str | None = None  # where `auto` is not the fork's kernel
    before: Build | None = None  # the fork before a change, for the profile

    @property
    def profiled(self) -> list[Build]:
        """In this order, one after the other."""
        stock, fork = self.builds.values()
        return [stock, *([self.before] if self.before else []), fork]

    @property
    def model(self) -> Path:
        return self.work / "checkpoint"

    @property
    def jobs(self) -> Path:
        """For the logs of processes, and what they answer."""
        return self.work / "jobs"


def cell(batch: int, prompt_tokens: int) -> Cell:
    """A run of `vllm bench serve`: long enough to tell, some seconds at most."""
    num_prompts = max(batch, min(16 * batch, 32))
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "num_prompts": num_prompts,
        "output_tokens": OUTPUT_TOKENS,
    }


def rounds(cell: Cell) -> int:
    """How often all turns are taken."""
    tokens = cell["num_prompts"] * (cell["prompt_tokens"] + cell["output_tokens"])
    return ROUNDS if cell["batch"] == 1 or tokens < FEW_TOKENS else 1


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


def engine_args(settings: Settings, build: Build) -> list[str]:
    """The same for all engines, so that times and memory can be compared; but for the
    experts' kernel, if the fork is to be told."""
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
        *(
            ("--moe-backend", settings.fork_moe_backend)
            if settings.fork_moe_backend and build.name != "stock"
            else ()
        ),
    ]


@contextmanager
def engine_job(
    settings: Settings, build: Build, name: str, env: dict[str, str]
) -> Iterator[Job]:
    """A job with an engine."""
    model, args = str(settings.model), engine_args(settings, build)
    log(f"{name}: {build.name}")
    with job(name, build, settings.jobs, env, model=model, engine_args=args) as one:
        yield one


def measure_serving(settings: Settings, results: report.Results) -> None:
    """Add the rows of each cell, once both builds have run it."""
    builds = list(settings.builds.values())
    runs: dict[tuple[int, int], report.Samples] = {}
    for together in [[build] for build in builds] if settings.alone else [builds]:
        with ExitStack() as stack:
            servers = start_servers(settings, together, stack)
            # The client is of the build that it asks, or of the fork if it asks both.
            client = stack.enter_context(
                job(
                    "serve",
                    together[-1],
                    settings.jobs,
                    {},
                    list(servers.values()),
                    model=str(settings.model),
                )
            )
            for prompt_tokens in settings.prompt_tokens:
                for batch in settings.batches:
                    samples = runs.setdefault((batch, prompt_tokens), {})
                    run_cell(client, servers, cell(batch, prompt_tokens), samples)
                    if all(len(of) == len(builds) for of in samples.values()):
                        results.add(rows=cell_rows(samples, batch, prompt_tokens))


def start_servers(
    settings: Settings, builds: Sequence[Build], stack: ExitStack
) -> dict[str, Server]:
    """The servers by the build's name, ready; they end with the stack."""
    servers = {}
    for build in builds:
        # What is found there afterwards, this run has compiled.
        shutil.rmtree(build.cache, ignore_errors=True)
        file = settings.jobs / f"server-{build.name}.log"
        log(f"starting the server of {build.name}: {file}")
        args = engine_args(settings, build)
        one = server(build, settings.model, args, file)
        servers[build.name] = stack.enter_context(one)
    wait_until_ready(list(servers.values()))
    return servers


def run_cell(
    client: Job, servers: dict[str, Server], cell: Cell, samples: report.Samples
) -> None:
    """Add to the samples what the servers' runs say, after one that does not count."""
    most = max(1, WARM_UP_PROMPT_TOKENS // cell["prompt_tokens"])
    warm_up = {
        "num_prompts": min(cell["num_prompts"], most),
        "output_tokens": WARM_UP_OUTPUT_TOKENS,
    }
    for one in servers.values():
        client.ask(url=one.url, **cell | warm_up)
    for build in TURNS * rounds(cell):
        if build in servers:
            result = client.ask(url=servers[build].url, **cell)
            for metric, name in report.SERVING.items():
                of = samples.setdefault(metric, {})
                of.setdefault(build, []).append(result[name])


def cell_rows(
    samples: report.Samples, batch: int, prompt_tokens: int
) -> list[report.Row]:
    rows = [
        report.make_row(metric, of, batch, prompt_tokens)
        for metric, of in samples.items()
    ]
    for row in rows:
        log(f"{report.describe(row)}: {report.figures(row)}")
    return rows


def measure_offline(settings: Settings, results: report.Results) -> None:
    """Add the start of each build's engine, then the rows of latency and throughput."""
    # As the command `vllm` does: forked from a process with threads an engine may hang.
    env = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    measures = {
        report.LATENCY: ("latency", LATENCY, LATENCY_RUNS),
        report.THROUGHPUT: ("throughput", THROUGHPUT, THROUGHPUT_RUNS),
    }
    with ExitStack() as stack:
        engines: dict[str, Job] = {}
        for build in settings.builds.values():
            with Watch(device_memory, 0.05) as memory:
                started = time.time()
                one = stack.enter_context(engine_job(settings, build, "offline", env))
                # Not counted: what it takes at most, and what it compiles.
                for name, cell, _ in measures.values():
                    ready = one.ask(name=name, runs=1, **cell)["ready"]
            engines[build.name] = one
            weights_s, model_gib = loading(one.process.log)
            peak = (max(memory.samples) - memory.samples[0]) / 2**30
            start = {
                "build": build.name,
                "weights_s": round(weights_s, 2),
                "start_s": round(ready - started, 2),
                "model_gib": model_gib,
                "peak_gib": round(peak, 3) or None,
            }
            log(f"offline: {start}")
            results.add(starts=[start])
        for metric, (name, cell, runs) in measures.items():
            samples: dict[str, list[float]] = {build: [] for build in report.BUILDS}
            for turn in TURNS:
                said = engines[turn].ask(name=name, runs=runs, **cell)
                samples[turn] += said["samples"]
            place = cell["batch"], cell["prompt_tokens"]
            results.add(rows=[report.make_row(metric, samples, *place)])


def measure_profile(settings: Settings, results: report.Results) -> None:
    """Add each build's profile, phase by phase, and torch's part of the memory."""
    if not torch.cuda.is_available():
        raise BenchmarkError("a profile needs a GPU: a trace of a CPU has no kernels")
    # The profiler sees its own process; it is told the parts of a step by name.
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1",
    }
    if settings.before:
        # What is found there afterwards, this run has compiled.
        shutil.rmtree(settings.before.cache, ignore_errors=True)
    for build in settings.profiled:
        found: dict[str, Any] = {}
        with engine_job(settings, build, "profile", env) as one:
            for phase in PHASES:
                said = one.ask(**phase)
                found[said["phase"]] = summary(said)
        reserved, allocated = said["torch_gib"]
        memory = {"reserved_gib": reserved, "allocated_gib": allocated}
        log(f"profile: {memory}")
        results.add_profile(build.name, found, memory)


def summary(said: dict[str, Any]) -> dict[str, Any]:
    """A phase of a profile, from what the job says of it."""
    try:
        found = summarize(json.loads(Path(said["trace"]).read_text()), said["steps"])
    except ValueError as error:
        raise BenchmarkError(f"{said['trace']}: {error}") from error
    return {name: said[name] for name in report.TIMES} | found


def check_kernels(builds: Iterable[Build]) -> None:
    """Each build has compiled its own kernels of the INT8 MoE and not the other's."""
    for build in builds:
        compiled = build.compiled_kernels()
        own, other = (STOCKS, FORKS) if build.name == "stock" else (FORKS, STOCKS)
        if not compiled & own or compiled & other:
            raise BenchmarkError(
                f"{build.name}: expected one of the kernels {sorted(own)} and none of "
                f"{sorted(other)} in {build.cache}, found "
                f"{sorted(compiled & (own | other))}: is {build.folder} that build?"
            )


PARTS = {
    "serve": measure_serving,
    "offline": measure_offline,
    "profile": measure_profile,
}


def measure(settings: Settings, parts: Sequence[str]) -> None:
    """Measure the parts, save and show."""
    chip = chip_name()
    name = "serving_int8_alone" if settings.alone else "serving_int8"
    profiles = PROFILES if settings.out == RESULTS else settings.out
    results = report.Results(
        settings.out / chip / f"{name}.json",
        profiles / profile_name(chip),
        {"chip": chip, "layers": settings.widths.layers},
    )
    write_checkpoint(settings.model, settings.widths)
    for part, measure_part in PARTS.items():
        if part in parts:
            measure_part(settings, results)
            if torch.cuda.is_available():
                profiled = part == "profile"
                check_kernels(
                    settings.profiled if profiled else settings.builds.values()
                )
            report.plot(results.result, results.path.with_suffix(".png"))
    for table in results.tables():
        console.print(table, highlight=False, markup=False)


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
    parser.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="an earlier build of the fork, of which the profile is taken as well",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
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
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to measure"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="serve with one server after the other, so that each may fill the GPU; "
        "for `--parts serve`, into serving_int8_alone.json",
    )
    parser.add_argument(
        "--fork-moe-backend",
        metavar="NAME",
        help="of the fork's engines: quark_int8 on a GPU where auto is upstream's",
    )
    parser.add_argument(
        "--tables",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="measure nothing: print these as Markdown",
    )
    args = parser.parse_args()
    if args.before and "profile" not in args.parts:
        parser.error("--before: expected --parts profile, which is all that it is for")
    if args.layers < 2:
        parser.error("--layers: the first is dense, at least one has experts")
    if args.alone and args.parts != ["serve"]:
        parser.error("--alone: expected --parts serve, which is all that it is for")
    if not args.tables:
        if not args.stock:
            parser.error("--stock FOLDER: a stock build of vLLM to compare with")
        for folder in filter(None, (args.stock, args.fork, args.before)):
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

    def build(name: str, folder: Path | None) -> Build:
        return Build(name, folder, work / "cache" / name)

    settings = Settings(
        builds={"stock": build("stock", args.stock), "fork": build("fork", args.fork)},
        before=build("before", args.before) if args.before else None,
        work=work,
        out=args.out,
        widths=Widths(layers=args.layers),
        batches=args.batches,
        prompt_tokens=args.prompt_tokens,
        alone=args.alone,
        fork_moe_backend=args.fork_moe_backend,
    )
    try:
        measure(settings, args.parts)
    except (BenchmarkError, ServerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
