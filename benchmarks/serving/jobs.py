# SPDX-License-Identifier: Apache-2.0
"""What runs inside a build: vLLM's own benchmarks, and a profile.

    python -P jobs.py FD

FD is a connection (`multiprocessing.Pipe`). The first message is `{"job": "serve" |
"offline" | "profile", "model": folder, ..}`; the function of that name says what else,
and what it is asked by those that follow, one answer each, until the other end closes.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Answer = Callable[..., Any]

# In a profile: steps until all requests decode, those that are timed, those traced.
WARM_UP_STEPS, TIMED_STEPS, TRACED_STEPS = 8, 50, 10
TIMED_PREFILLS = 10


def parse(module: Any, arguments: list[str]) -> Namespace:
    """The arguments of one of vLLM's commands."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    module.add_cli_args(parser)
    return parser.parse_args(arguments)


def options(**values: Any) -> list[str]:
    """`--input-len 128` for input_len=128."""
    return [
        text
        for name, value in values.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]


def serve(job: Job) -> Answer:
    """`vllm bench serve`: asked with the `url` of a server, a `batch` and so on.

    One process asks all servers, since its start takes longer than a run.
    """
    from vllm.benchmarks import serve

    tokenizer = serve.get_tokenizer(job["model"])
    serve.get_tokenizer = lambda *_, **__: tokenizer

    def run(
        url: str, batch: int, prompt_tokens: int, num_prompts: int, output_tokens: int
    ) -> dict[str, Any]:
        arguments = options(
            base_url=url,
            model=job["model"],
            dataset_name="random",
            # Greedy answers of random weights repeat themselves, and so do experts.
            temperature=1,
            num_prompts=num_prompts,
            max_concurrency=batch,
            random_input_len=prompt_tokens,
            random_output_len=output_tokens,
        )
        arguments += ["--disable-tqdm", "--ignore-eos"]
        result = serve.main(parse(serve, arguments))
        if result["completed"] != num_prompts:
            sys.exit(
                f"error: {result['completed']} of {num_prompts} requests succeeded: "
                "see the log of the server"
            )
        return result

    return run


def offline(job: Job) -> Answer:
    """`vllm bench latency` and `throughput`, with one engine of `engine_args`.

    Asked with the `name` of one, what it is to run, and how many `runs`. Answers with
    the samples, and when the engine was ready.
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

    def run(module: Any, **values: Any) -> dict[str, Any]:
        module.main(parse(module, common + options(**values)))
        return json.loads(out.read_text())

    def answer(
        name: str, runs: int, batch: int, prompt_tokens: int, output_tokens: int
    ) -> dict[str, Any]:
        if name == "latency":
            lengths = {"input_len": prompt_tokens, "output_len": output_tokens}
            counts = {"num_iters": runs, "num_iters_warmup": 1, "batch_size": batch}
            samples = run(latency, **counts, **lengths)["latencies"]
        else:
            samples = [
                run(
                    throughput,
                    dataset_name="random",
                    num_prompts=batch,
                    random_input_len=prompt_tokens,
                    random_output_len=output_tokens,
                )["tokens_per_second"]
                for _ in range(runs)
            ]
        return {"samples": samples, "ready": engines[0][0]}

    return answer


class Watch:
    """What a function says every so often while a `with` block runs, from before on."""

    def __init__(self, sample: Callable[[], Any], seconds: float) -> None:
        self.samples = [sample()]  # here an error is seen
        self._ended = threading.Event()

        def watch() -> None:
            while not self._ended.wait(seconds):
                self.samples.append(sample())

        self._thread = threading.Thread(target=watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def gauges() -> tuple[float | None, float | None]:
    """The GPU's clock, MHz, and power, W, the driver's average of up to a second; None
    on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000


def median(samples: Any) -> float | None:
    known = [sample for sample in samples if sample is not None]
    return statistics.median(known) if known else None


def profile(job: Job) -> Answer:
    """Time and trace steps, of the engine of `engine_args`.

    Asked with `prompt_tokens` and either a `batch`, whose decode steps are measured, or
    none, for prefills one after the other. Answers with the phase, its times and trace,
    how much memory torch had so far at most, and how much of it tensors.

    The engine is in this process, which the profiler sees:
    VLLM_ENABLE_V1_MULTIPROCESSING is 0, and VLLM_CUSTOM_SCOPES_FOR_PROFILING 1, which
    names the parts of a step in the trace.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from vllm import LLM, EngineArgs, SamplingParams

    args = parse(EngineArgs, ["--model", job["model"], *job["engine_args"]])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
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

    def steps(number: int) -> None:
        for _ in range(number):
            engine.step()

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def seconds(work: Callable[[], None]) -> float:
        synchronize = torch.cuda.synchronize if on_gpu else torch.cpu.synchronize
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - started

    def timed(number: int, work: Callable[[], None]) -> dict[str, Any]:
        with Watch(gauges, 0.01) as watch:
            wall = seconds(work)
        clock, power = map(median, zip(*watch.samples, strict=True))
        us = round(wall * 1e6 / number, 1)
        return {"wall_us": us, "clock_mhz": clock, "power_w": power}

    def trace(phase: str, number: int, work: Callable[[], None]) -> dict[str, Any]:
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if on_gpu else []
        file = f"{job['out']}-{phase.replace(' ', '-')}.json"
        with torch.profiler.profile(activities=activities) as profiler:
            seconds(work)
        profiler.export_chrome_trace(file)
        return {"phase": phase, "steps": number, "trace": file}

    def decode(batch: int, prompt_tokens: int) -> dict[str, Any]:
        # Prompts share steps by the thousand tokens: one a request is enough to start.
        most = WARM_UP_STEPS + batch + TIMED_STEPS + TRACED_STEPS + 8
        requests = [add(prompt_tokens, most) for _ in range(batch)]
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in engine.step()}
        steps(WARM_UP_STEPS)
        times = timed(TIMED_STEPS, lambda: steps(TIMED_STEPS))
        phase = f"decode batch {batch} after {prompt_tokens}"
        found = trace(phase, TRACED_STEPS, lambda: steps(TRACED_STEPS))
        engine.abort_request(requests)
        finish()
        return times | found

    def prefill(prompt_tokens: int) -> dict[str, Any]:
        add(prompt_tokens, 1)
        finish()
        for _ in range(TIMED_PREFILLS):
            add(prompt_tokens, 1)
        times = timed(TIMED_PREFILLS, finish)
        add(prompt_tokens, 1)
        return times | trace(f"prefill {prompt_tokens}", 1, finish)

    def answer(prompt_tokens: int, batch: int | None = None) -> dict[str, Any]:
        found = decode(batch, prompt_tokens) if batch else prefill(prompt_tokens)
        most = (0, 0)
        if on_gpu:
            most = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        return found | {"torch_gib": [round(value / 2**30, 3) for value in most]}

    return answer


JOBS = {"serve": serve, "offline": offline, "profile": profile}


def main() -> None:
    # An engine's own processes end with it where it ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    connection = Connection(int(sys.argv[1]))
    job = connection.recv()
    answer = JOBS[job["job"]](job)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        connection.send(answer(**question))


if __name__ == "__main__":
    main()
