# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a Quark INT8 export under stress: every answer is judged.

    python -m tests.stress.stress_serving [--minutes 10] [-- OPTIONS OF VLLM SERVE]

Serves the small trained model, keeps `--in-flight` requests under way and mixes right
ones with clients that leave and requests that are to be refused
(requests.py). Then no request may be left in the engine, and SIGTERM must
end it in order. docs/measured/stress.md says what counts as a failure.

Writes `{"device", "date", "vllm", "options", "in_flight", "minutes", "seed",
"finished", "seconds", "kinds": {kind: {"sent", "as_expected", "unexpected", "examples",
"p50_seconds", "p99_seconds"}}, "requests_per_second", "memory": {"rss" and "gpu":
{"what", "after_warm_up_mib", "at_the_end_mib", "growth", "mib_by_tenth"}}, "kv_cache",
"end", "failures"}` to `--results`, again and again while it runs; what was not measured
is null. Exits 1 if anything was not as expected.
"""

import argparse
import asyncio
import datetime
import importlib.metadata
import itertools
import os
import random
import re
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch

from benchmarks.serving import report
from examples.compare_builds import device_name
from tests.server import Server, ServerError, serve
from tests.stress.requests import (
    MODEL,
    WEIGHTS,
    Mix,
    Problem,
    Reply,
    Request,
    clear_sums,
    draw_sums,
)

ROOT = Path(__file__).resolve().parents[2]
EXPORT = ROOT / "tests/fixtures/step3p5-tiny/int8-3key"
WORK = ROOT / "build/stress"
NUM_SUMS = 4000
MIN_CLEAR = 0.9  # of the sums, or the reference is broken
ANSWER_SECONDS = 180
IDLE_SECONDS, END_SECONDS = 60, 60
SAMPLE_SECONDS, MIN_SAMPLES = 5.0, 40
# The server keeps idle connections for longer than any client waits, busy as the
# machine may be, so that each one it drops is a fault.
KEEP_ALIVE_SECONDS = 15
SERVER_ENV = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(2 * ANSWER_SECONDS)}
MAX_EXAMPLES = 5
LAST_QUESTIONS = 20
WARM_UP = 0.2  # of the time
FIFTH = 0.2
MIB = 1 << 20


@dataclass
class Tally:
    """Of one kind of request."""

    sent: int = 0
    as_expected: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def unexpected(self) -> int:
        return self.sent - self.as_expected

    def add(self, request: Request, problem: Problem | None, seconds: float) -> None:
        self.sent += 1
        self.seconds.append(seconds)
        if problem is None:
            self.as_expected += 1
        elif len(self.examples) < MAX_EXAMPLES:
            self.examples.append(
                {
                    "name": request.name,
                    "sent": request.body[:500].decode(errors="replace"),
                    "expected": problem.expected,
                    "found": problem.found,
                }
            )

    def figures(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "as_expected": self.as_expected,
            "unexpected": self.unexpected,
            "p50_seconds": quantile(self.seconds, 0.5),
            "p99_seconds": quantile(self.seconds, 0.99),
            "examples": self.examples,
        }


@dataclass(frozen=True)
class Sample:
    """At one moment; seconds since the start, bytes, requests answered until then."""

    seconds: float
    requests: int
    rss: int
    gpu: int | None
    kv_cache: float
    preemptions: int


@dataclass(frozen=True)
class Memory:
    """What to ask for memory: bytes of RSS, and of the GPU if there is one."""

    rss: Callable[[], int]
    gpu: Callable[[], int] | None = None
    what_gpu: str | None = None


@dataclass
class Run:
    """What is asked of the server at `url`, and what has been seen so far."""

    url: str
    mix: Mix
    memory: Memory
    in_flight: int
    seconds: float
    answer_seconds: float = ANSWER_SECONDS
    idle_seconds: float = IDLE_SECONDS
    tallies: dict[str, Tally] = field(
        default_factory=lambda: {kind: Tally() for kind in WEIGHTS}
    )
    samples: list[Sample] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    count: Iterator[int] = field(default_factory=itertools.count)
    # Of the metrics once all is answered: what did not become zero.
    left: dict[str, float] | None = None

    @property
    def sample_seconds(self) -> float:
        return min(SAMPLE_SECONDS, self.seconds / MIN_SAMPLES)

    def next_id(self, request: Request) -> str:
        return f"{request.kind}-{next(self.count)}"

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def answered(self) -> int:
        return sum(tally.sent for tally in self.tallies.values())


def quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 4)


async def post(
    session: aiohttp.ClientSession, url: str, request: Request, request_id: str
) -> Reply | None:
    """The reply; None where the client left first."""
    # The server's log names requests by it.
    headers = {"Content-Type": request.content_type, "X-Request-Id": request_id}
    async with session.post(
        url + request.path, data=request.body, headers=headers
    ) as response:
        if request.leave_lines is None or response.status != 200:
            return Reply(response.status, await response.read())
        lines = 0
        async for _ in response.content:
            lines += 1
            if lines >= request.leave_lines:
                response.close()
                return None
        return Reply(response.status, b"")


async def ask(run: Run, session: aiohttp.ClientSession, request: Request) -> None:
    started = time.monotonic()
    problem = None
    try:
        async with asyncio.timeout(request.leave_seconds or run.answer_seconds):
            reply = await post(session, run.url, request, run.next_id(request))
        if reply is not None:
            problem = request.check(reply)
    except TimeoutError:
        if request.leave_seconds is None:
            problem = Problem("an answer", f"none in {run.answer_seconds:.0f} s")
    except aiohttp.ClientError as error:
        problem = Problem("a connection that holds", repr(error))
    seconds = time.monotonic() - started
    run.tallies[request.kind].add(request, problem, seconds)


async def read_metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Sums by name of the server's metrics, without `vllm:`."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0) + float(value)
    return sums


async def take_sample(run: Run, session: aiohttp.ClientSession) -> None:
    metrics = await read_metrics(session, run.url)
    run.samples.append(
        Sample(
            run.elapsed,
            run.answered,
            run.memory.rss(),
            run.memory.gpu() if run.memory.gpu else None,
            metrics.get("kv_cache_usage_perc", 0),
            int(metrics.get("num_preemptions_total", 0)),
        )
    )


async def wait_until_idle(run: Run, session: aiohttp.ClientSession) -> None:
    """Ask some last sums, so that the metrics are fresh, and see what is left."""
    for _ in range(LAST_QUESTIONS):
        await ask(run, session, run.mix.right())
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + run.idle_seconds
    while True:
        metrics = await read_metrics(session, run.url)
        # A metric that is missing would say nothing.
        run.left = {name: n for name in names if (n := metrics.get(name, -1)) != 0}
        if not run.left or time.monotonic() > deadline:
            return
        await asyncio.sleep(0.2)


async def stress(
    run: Run, progress: Callable[[], None], end_if_dead: Callable[[], None]
) -> None:
    """Keep the requests in flight for the time, then see that all came to an end.

    `progress` is called after each sample; `end_if_dead` raises if the server died.
    """
    run.started = time.monotonic()

    async def client() -> None:
        while run.elapsed < run.seconds:
            await ask(run, session, run.mix.next())

    async def watch() -> None:
        due = 0.0
        while run.elapsed < run.seconds:
            end_if_dead()
            if run.elapsed >= due:
                await take_sample(run, session)
                progress()
                due += run.sample_seconds
            await asyncio.sleep(min(0.5, run.sample_seconds))

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=run.answer_seconds)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(watch())]
        tasks += [asyncio.create_task(client()) for _ in range(run.in_flight)]
        try:
            await asyncio.gather(*tasks)
            await wait_until_idle(run, session)
        except aiohttp.ClientError as error:
            end_if_dead()
            raise ServerError(f"no metrics of the server: {error!r}") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def over_time(run: Run) -> dict[str, Any]:
    """Requests a second and memory: after the warm-up, at the end, and between."""
    total = run.seconds

    def part(first: float, last: float) -> list[Sample]:
        return [s for s in run.samples if first * total <= s.seconds <= last * total]

    early, late = part(WARM_UP, WARM_UP + FIFTH), part(1 - FIFTH, 1)
    tenths = [part(index / 10, (index + 1) / 10) for index in range(10)]

    def rate(samples: list[Sample]) -> float | None:
        if len(samples) < 2:
            return None
        requests = samples[-1].requests - samples[0].requests
        return round(requests / (samples[-1].seconds - samples[0].seconds), 1)

    def middle(samples: list[Sample], name: str) -> float | None:
        values = [getattr(sample, name) for sample in samples]
        known = [value / MIB for value in values if value is not None]
        return round(statistics.median(known), 1) if known else None

    def memory(name: str, what: str | None) -> dict[str, Any]:
        before, after = middle(early, name), middle(late, name)
        return {
            "what": what,
            "after_warm_up_mib": before,
            "at_the_end_mib": after,
            "growth": round(after / before - 1, 4) if before and after else None,
            "mib_by_tenth": [middle(tenth, name) for tenth in tenths],
        }

    return {
        "requests_per_second": {
            "after_warm_up": rate(early),
            "at_the_end": rate(late),
            "by_tenth": [rate(tenth) for tenth in tenths],
        },
        "memory": {
            "rss": memory("rss", "server, engine and workers, summed"),
            "gpu": memory("gpu", run.memory.what_gpu),
        },
    }


def figures(run: Run) -> dict[str, Any]:
    return {
        "seconds": round(min(run.elapsed, run.seconds), 1),
        "kinds": {kind: tally.figures() for kind, tally in run.tallies.items()},
        **over_time(run),
        "kv_cache": {
            "most_used": max((sample.kv_cache for sample in run.samples), default=None),
            "preemptions": run.samples[-1].preemptions if run.samples else None,
            "left_when_idle": run.left,
        },
    }


def failures(result: dict[str, Any], max_growth: float) -> list[str]:
    """What of a finished run's figures is not as it is to be."""
    failed = []
    for kind, tally in result["kinds"].items():
        if tally["unexpected"]:
            first = tally["examples"][0]
            failed.append(
                f"{kind}: {tally['unexpected']} of {tally['sent']} not as expected; "
                f"first: {first['name']}: sent {first['sent']}, expected "
                f"{first['expected']}, found {first['found']}"
            )
        if not tally["sent"]:
            failed.append(f"{kind}: none sent; give it more time")
    for name, memory in result["memory"].items():
        if memory["what"] is None:
            continue
        if memory["growth"] is None:
            failed.append(f"{name}: too few samples to tell growth; give it more time")
        elif memory["growth"] > max_growth:
            failed.append(
                f"{name} grew by {memory['growth']:.1%} after the warm-up, from "
                f"{memory['after_warm_up_mib']} to {memory['at_the_end_mib']} MiB; "
                f"at most {max_growth:.1%} is allowed"
            )
    left = result["kv_cache"]["left_when_idle"]
    if left is None or left:
        failed.append(f"when all was answered the engine still had {left}")
    return failed


def rss_of(server: Server) -> int:
    total = 0
    for process in server.processes():
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def gpu_memory(server: Server) -> tuple[Callable[[], int] | None, str | None, str]:
    """How to read the GPU's memory, what that is, and the chip's name."""
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        indices = list(range(pynvml.nvmlDeviceGetCount()))
        if wanted is not None and re.fullmatch(r"[\d,]*", wanted):
            indices = [int(index) for index in wanted.split(",") if index]
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
    except pynvml.NVMLError:
        gpus = []
    if not gpus:
        return None, None, device_name()

    def of_processes() -> int | None:
        own = {process.pid for process in server.processes()}
        used = [
            process.usedGpuMemory
            for gpu in gpus
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            if process.pid in own
        ]
        return sum(used) if used and None not in used else None

    def of_devices() -> int:
        return sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus)

    name = pynvml.nvmlDeviceGetName(gpus[0])
    chip = name.decode() if isinstance(name, bytes) else name
    # A container may not see which process it is that uses the memory.
    if of_processes() is None:
        return of_devices, "devices, whoever uses them", chip
    return lambda: of_processes() or 0, "processes of the server", chip


def show(result: dict[str, Any]) -> None:
    print(f"{'kind':10} {'sent':>9} {'as expected':>12} {'p50 s':>8} {'p99 s':>8}")
    for kind, tally in result["kinds"].items():
        p50, p99 = (tally[name] or 0 for name in ("p50_seconds", "p99_seconds"))
        print(
            f"{kind:10} {tally['sent']:9} {tally['as_expected']:12} "
            f"{p50:8.3f} {p99:8.3f}"
        )
    rate = result["requests_per_second"]
    print(f"requests/s: {rate['after_warm_up']} then {rate['at_the_end']}")
    for name, memory in result["memory"].items():
        if memory["what"]:
            before, after = memory["after_warm_up_mib"], memory["at_the_end_mib"]
            print(f"{name} ({memory['what']}): {before} then {after} MiB")
    print(f"KV cache: {result['kv_cache']}")


def end(server: Server) -> dict[str, Any]:
    """SIGTERM; status 0 and no process left, or ServerError."""
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = server.wait_for_end(END_SECONDS)
    seconds = round(time.monotonic() - started, 1)
    if status != 0:
        raise server.error(f"ended with status {status} after SIGTERM")
    return {"status": status, "seconds": seconds}


def end_if_dead(server: Server) -> None:
    if (status := server.process.poll()) is not None:
        raise server.error(f"died under stress with status {status}")


def server_options(args: argparse.Namespace) -> list[str]:
    from vllm.platforms import current_platform

    options = ["--served-model-name", MODEL, "--disable-uvicorn-access-log"]
    options += ["--max-model-len", str(args.max_model_len)]
    options += ["--gpu-memory-utilization", "0.1"]
    options += ["--kv-cache-memory-bytes", str(args.kv_cache_mib * MIB)]
    if current_platform.is_cpu():
        options += ["--enforce-eager"]  # compiling takes longer than it saves
    return options + args.options


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument(
        "--kv-cache-mib",
        type=int,
        default=16,
        help="so little that running requests are preempted",
    )
    parser.add_argument(
        "--max-growth",
        type=float,
        default=0.05,
        help="of memory, from the fifth after the warm-up to the last",
    )
    parser.add_argument("--seed", type=int, help="of the requests; fresh if absent")
    parser.add_argument("--results", type=Path, help="docs/results/stress-<chip>.json")
    parser.add_argument("options", nargs="*", help="further ones of vllm serve")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.in_flight < 1:
        parser.error("--minutes and --in-flight must be above zero")
    if args.max_model_len < 32:
        parser.error("--max-model-len must be at least 32")
    if args.seed is None:
        args.seed = secrets.randbits(32)
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run, with its failures; ServerError where none begins."""
    draw = random.Random(args.seed)
    torch.set_num_threads(1)  # for so small a model more cost more than they bring
    drawn = draw_sums(draw, NUM_SUMS)
    pairs = clear_sums(EXPORT, drawn)
    if len(pairs) < MIN_CLEAR * len(drawn):
        sys.exit(
            f"error: {EXPORT}: the reference answers {len(pairs)} of {len(drawn)} sums "
            f"clearly right, expected {MIN_CLEAR:.0%}; make the fixtures again"
        )
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "serve.log"
    log.unlink(missing_ok=True)
    options = server_options(args)
    with serve(EXPORT, log, options, SERVER_ENV) as server:
        server.wait_until_ready()
        gpu, what_gpu, chip = gpu_memory(server)
        slug = re.sub(r"[^A-Za-z0-9]+", "_", chip).strip("_")
        results = args.results or ROOT / f"docs/results/stress-{slug}.json"
        mix = Mix(draw, pairs, args.max_model_len)
        memory = Memory(lambda: rss_of(server), gpu, what_gpu)
        run = Run(server.url, mix, memory, args.in_flight, args.minutes * 60)
        result: dict[str, Any] = {
            "device": chip,
            "date": datetime.date.today().isoformat(),
            "vllm": importlib.metadata.version("vllm"),
            "options": options,
            "in_flight": args.in_flight,
            "minutes": args.minutes,
            "seed": args.seed,
            "sums": len(pairs),
            "finished": False,
            "end": None,
            "failures": [],
        }

        def progress() -> None:
            result.update(figures(run))
            report.save(results, result)

        print(f"{chip}: {results}, log: {log}", flush=True)
        died = []
        try:
            asyncio.run(stress(run, progress, lambda: end_if_dead(server)))
            result["end"] = end(server)
        except ServerError as error:
            died = [str(error)]
        finally:
            progress()
    result |= {"failures": died + failures(result, args.max_growth), "finished": True}
    report.save(results, result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # As Ctrl-C does, so that the server is not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"requests: repeat with --seed={args.seed}", flush=True)
    try:
        result = measure(args)
    except ServerError as error:
        sys.exit(f"error: {error}")
    show(result)
    if result["failures"]:
        sys.exit("\n".join(f"error: {line}" for line in result["failures"]))


if __name__ == "__main__":
    main()
