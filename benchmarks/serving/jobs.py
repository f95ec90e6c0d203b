# SPDX-License-Identifier: Apache-2.0
"""What runs inside a build: vLLM's own benchmarks, and a profile.

    python -P jobs.py JOB.json

JOB is `{"job": "serve" | "offline" | "profile", "model": folder, "out": file, ..}`; the
function of that name says what else. The file `out` gets a line of JSON a result.
"""

import json
import random
import signal
import statistics
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Emit = Callable[[dict[str, Any]], None]

# Before a cell counts: enough for each kernel that it needs to be compiled.
WARM_UP_PROMPT_TOKENS, WARM_UP_OUTPUT_TOKENS = 1 << 19, 8
# In a profile: steps until all requests decode, those that are timed, those traced.
WARM_UP_STEPS, TIMED_STEPS, TRACED_STEPS = 8, 50, 10
TIMED_PREFILLS = 10


def parse(add_cli_args: Callable[[Any], Any], arguments: list[str]) -> Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser.parse_args(arguments)


def serve(job: Job, emit: Emit) -> None:
    """`vllm bench serve` for each of `cells`, against the servers of `urls` in `turns`,
    a cell's `rounds` times.

    One process asks all servers, since its start takes longer than a run.
    """
    from vllm.benchmarks import serve

    # Of each cell the prompts are the same, and so is the tokenizer: make them once.
    tokenizer = serve.get_tokenizer(job["model"])
    serve.get_tokenizer = lambda *_, **__: tokenizer
    get_samples = serve.get_samples
    samples: dict[tuple[int, ...], Any] = {}

    def get_samples_once(args: Namespace, tokenizer: Any) -> Any:
        key = args.num_prompts, args.random_output_len
        if key not in samples:
            samples[key] = get_samples(args, tokenizer)
        return samples[key]

    serve.get_samples = get_samples_once

    def run(url: str, cell: Job, prompts: int, output_tokens: int) -> dict[str, Any]:
        arguments = ["--base-url", url, "--model", job["model"], "--disable-tqdm"]
        arguments += ["--dataset-name", "random", "--ignore-eos"]
        # Greedy answers of random weights repeat themselves, and then their experts do.
        arguments += ["--temperature", "1"]
        for name, value in (
            ("--num-prompts", prompts),
            ("--max-concurrency", cell["batch"]),
            ("--random-input-len", cell["prompt_tokens"]),
            ("--random-output-len", output_tokens),
        ):
            arguments += [name, str(value)]
        result = serve.main(parse(serve.add_cli_args, arguments))
        if result["completed"] != prompts:
            sys.exit(
                f"error: {result['completed']} of {prompts} requests succeeded: "
                "see the log of the server"
            )
        return result

    for cell in job["cells"]:
        samples.clear()
        for url in job["urls"].values():
            most = max(1, WARM_UP_PROMPT_TOKENS // cell["prompt_tokens"])
            prompts = min(cell["num_prompts"], most)
            run(url, cell, prompts, WARM_UP_OUTPUT_TOKENS)
        for build in job["turns"] * cell["rounds"]:
            url = job["urls"][build]
            result = run(url, cell, cell["num_prompts"], cell["output_tokens"])
            emit({"build": build, "cell": cell, "result": result})


def offline(job: Job, emit: Emit) -> None:
    """`vllm bench latency` and `throughput`, with one engine of `engine_args`.

    `latency` and `throughput` are `{"batch", "prompt_tokens", "output_tokens"}`. Which
    of them runs, how often, and when, a line of standard input says:
    `{"name": "latency" | "throughput", "runs": N}`. Answers with the samples, and when
    the engine was ready.
    """
    from vllm import LLM
    from vllm.benchmarks import latency, throughput

    make = LLM.from_engine_args
    engines: list[tuple[float, LLM]] = []

    def share_engine(engine_args: Any) -> LLM:
        if not engines:
            llm = make(engine_args)
            engines.append((time.time(), llm))
        return engines[0][1]

    LLM.from_engine_args = share_engine
    out = Path(job["out"]).with_suffix(".result.json")
    common = ["--model", job["model"], *job["engine_args"], "--output-json", str(out)]

    def run_latency(runs: int) -> list[float]:
        cell = job["latency"]
        arguments = ["--batch-size", str(cell["batch"]), "--num-iters-warmup", "1"]
        arguments += ["--num-iters", str(runs)]
        arguments += ["--input-len", str(cell["prompt_tokens"])]
        arguments += ["--output-len", str(cell["output_tokens"])]
        latency.main(parse(latency.add_cli_args, common + arguments))
        return json.loads(out.read_text())["latencies"]

    def run_throughput(runs: int) -> list[float]:
        cell = job["throughput"]
        arguments = ["--dataset-name", "random", "--num-prompts", str(cell["batch"])]
        arguments += ["--random-input-len", str(cell["prompt_tokens"])]
        arguments += ["--random-output-len", str(cell["output_tokens"])]
        rates = []
        for _ in range(runs):
            throughput.main(parse(throughput.add_cli_args, common + arguments))
            rates.append(json.loads(out.read_text())["tokens_per_second"])
        return rates

    measures = {"latency": run_latency, "throughput": run_throughput}
    for line in sys.stdin:
        question = json.loads(line)
        samples = measures[question["name"]](question["runs"])
        emit({"samples": samples, "ready": engines[0][0]})


class Gauge:
    """The GPU's clock, MHz, and power, W, while a `with` block runs: medians of what
    the driver says every 10 ms; None on a CPU. Power is the driver's average of up to
    a second."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _sample(self) -> None:
        import torch

        sample = torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000
        self._samples.append(sample)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._sample()

    def __enter__(self) -> "Gauge":
        import torch

        if torch.cuda.is_available():
            self._sample()  # here an error is seen
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._samples:
            self._thread.join()

    def medians(self) -> dict[str, float | None]:
        names = "clock_mhz", "power_w"
        if not self._samples:
            return dict.fromkeys(names)
        columns = zip(*self._samples, strict=True)
        return dict(zip(names, map(statistics.median, columns), strict=True))


def profile(job: Job, emit: Emit) -> None:
    """Time and trace steps of each of `decode`, `{"batch", "prompt_tokens"}`, and
    prefills of `prefill` tokens one after the other; then say how much memory torch had
    at most, and how much of it tensors.

    The engine, of `engine_args`, is in this process, which the profiler sees:
    VLLM_ENABLE_V1_MULTIPROCESSING is 0, and VLLM_CUSTOM_SCOPES_FOR_PROFILING 1, which
    names the parts of a step in the trace.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from vllm import LLM, EngineArgs, SamplingParams

    arguments = ["--model", job["model"], *job["engine_args"]]
    args = parse(EngineArgs.add_cli_args, arguments)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    out = Path(job["out"]).with_suffix("")
    on_gpu = torch.cuda.is_available()
    engine = llm.llm_engine
    vocab = llm.model_config.get_vocab_size()
    names = (f"request-{number}" for number in range(1 << 30))

    def add(prompt_tokens: int, output_tokens: int) -> str:
        name = next(names)
        prompt = {"prompt_token_ids": random.choices(range(vocab), k=prompt_tokens)}
        params = SamplingParams(
            temperature=1.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        engine.add_request(name, prompt, params)
        return name

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def steps(number: int) -> None:
        for _ in range(number):
            engine.step()

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def seconds(work: Callable[[], None]) -> float:
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - started

    def timed(number: int, work: Callable[[], None]) -> dict[str, Any]:
        with Gauge() as gauge:
            wall = seconds(work)
        return {"wall_us": round(wall * 1e6 / number, 1), **gauge.medians()}

    def trace(
        phase: str, number: int, times: dict[str, Any], work: Callable[[], None]
    ) -> None:
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if on_gpu else []
        file = f"{out}-{phase.replace(' ', '-')}.json"
        with torch.profiler.profile(activities=activities) as profiler:
            seconds(work)
        profiler.export_chrome_trace(file)
        emit({"phase": phase, "steps": number, "trace": file, **times})

    for cell in job["decode"]:
        batch, prompt_tokens = cell["batch"], cell["prompt_tokens"]
        # Prompts share steps by the thousand tokens: one a request is enough to start.
        most = WARM_UP_STEPS + batch + TIMED_STEPS + TRACED_STEPS + 8
        requests = [add(prompt_tokens, most) for _ in range(batch)]
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in engine.step()}
        steps(WARM_UP_STEPS)
        times = timed(TIMED_STEPS, lambda: steps(TIMED_STEPS))
        phase = f"decode batch {batch} after {prompt_tokens}"
        trace(phase, TRACED_STEPS, times, lambda: steps(TRACED_STEPS))
        engine.abort_request(requests)
        finish()
    add(job["prefill"], 1)
    finish()
    for _ in range(TIMED_PREFILLS):
        add(job["prefill"], 1)
    times = timed(TIMED_PREFILLS, finish)
    add(job["prefill"], 1)
    trace(f"prefill {job['prefill']}", 1, times, finish)
    if on_gpu:
        most = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        emit({"torch_gib": [round(value / 2**30, 3) for value in most]})


JOBS = {"serve": serve, "offline": offline, "profile": profile}


def main() -> None:
    # An engine's own processes end with it where it ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    job = json.loads(Path(sys.argv[1]).read_text())
    with open(job["out"], "w") as out:

        def emit(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        JOBS[job["job"]](job, emit)


if __name__ == "__main__":
    main()
