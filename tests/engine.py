# SPDX-License-Identifier: Apache-2.0
"""Ask engines in processes of their own: vLLM keeps state, and spawns workers."""

import gc
import json
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300
# Small: several engines may run at a time.
OPTIONS = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_logprobs": -1,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 16 << 20,
    "worker_extension_cls": "tests.engine_worker.Watched",
    "seed": 0,
}

# What is done to an engine before it is asked once more: nothing; load the weights of a
# folder; sleep at a level and wake, at level 2 with the weights loaded from disk again.
Step = tuple[str, Any]
AGAIN: Step = ("again", None)


def reload(folder: Path) -> Step:
    return "reload", str(folder)


def sleep(level: int) -> Step:
    return "sleep", level


@dataclass(frozen=True)
class Answers:
    """Greedy answers: tokens int64 [prompts, T]; logprobs float64 [prompts, T, vocab]
    of each token after those before it.

    Up to them each worker launched the fork's own kernels so often: `Watched.runs`.
    While it was asked each compiled num_compiled variants of the fork's Triton kernels.
    num_cached_tokens of the prompts came from the prefix cache. experts_at is each
    worker's `Watched.experts_at`, and parameters what it holds of those asked for.
    """

    tokens: Tensor
    logprobs: Tensor
    runs: list[dict[str, int]]
    num_compiled: list[int]
    num_cached_tokens: int
    experts_at: list[list[list[int]]]
    parameters: dict[str, list[Tensor]]


def ask(
    model: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    steps: Sequence[Step] = (),
    env: Mapping[str, str] | None = None,
    parameters: Sequence[str] = (),
    **options: Any,
) -> list[Answers]:
    """Start an engine with these further environment variables and options of `LLM`;
    ask it, and again after each of the steps."""
    num_ranks = options.get("tensor_parallel_size", 1)
    num_ranks *= options.get("pipeline_parallel_size", 1)
    process = _start(
        [{"model": str(model)} | options],
        prompts,
        num_tokens,
        one_core_a_rank(num_ranks) | dict(env or {}),
        steps,
        parameters,
    )
    [answers] = _results(process)
    return answers


def ask_data_parallel(
    model: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    num_ranks: int,
    parameters: Sequence[str] = (),
    **options: Any,
) -> Answers:
    """The answers of data-parallel ranks, each to its share of the prompts, as one
    engine's: prompts and workers in the order of ranks."""
    port = str(_free_ports(10))
    share = len(prompts) // num_ranks
    processes = []
    cores = one_core_a_rank(num_ranks)
    for rank in range(num_ranks):
        its_prompts = prompts[rank * share : (rank + 1) * share]
        env = cores | {
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(num_ranks),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": port,
        }
        engines = [{"model": str(model)} | options]
        processes.append(
            _start(engines, its_prompts, num_tokens, env, parameters=parameters)
        )
    try:
        ranks = [answers for process in processes for [answers] in _results(process)]
    finally:
        for process in processes:
            process.kill()
    return replace(
        ranks[0],
        tokens=torch.cat([rank.tokens for rank in ranks]),
        logprobs=torch.cat([rank.logprobs for rank in ranks]),
        runs=[worker for rank in ranks for worker in rank.runs],
        num_compiled=[number for rank in ranks for number in rank.num_compiled],
        num_cached_tokens=sum(rank.num_cached_tokens for rank in ranks),
        experts_at=[worker for rank in ranks for worker in rank.experts_at],
        parameters={
            name: [held for rank in ranks for held in rank.parameters[name]]
            for name in ranks[0].parameters
        },
    )


def ask_each(
    engines: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
) -> list[Answers | str]:
    """Ask engines of these options one after the other in one process.

    `env` among the options holds environment variables. An engine that does not start
    is the error's last line.
    """
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = _start(engines, prompts, num_tokens, env)
    results = _results(process, len(engines), errors=True)
    return [one if isinstance(one, str) else one[0] for one in results]


def one_core_a_rank(num_ranks: int) -> dict[str, str]:
    """On a CPU vLLM wants a NUMA node a rank, or to be told each rank's cores."""
    if num_ranks == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    chosen = (str(cores[rank % len(cores)]) for rank in range(num_ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(chosen)}


def _free_ports(number: int) -> int:
    """The first of so many free ports that no other process gets by asking for any."""
    while True:
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + number):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def _start(
    engines: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    env: Mapping[str, str],
    steps: Sequence[Step] = (),
    parameters: Sequence[str] = (),
) -> subprocess.Popen[str]:
    job = {
        "engines": engines,
        "prompts": prompts,
        "num_tokens": num_tokens,
        "steps": steps,
        "parameters": parameters,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine", json.dumps(job)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _results(
    process: subprocess.Popen[str], num_engines: int = 1, errors: bool = False
) -> list[Any]:
    """Of each engine its Answers, in a list, or its error if those are asked for."""
    seconds = START_SECONDS * num_engines
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise AssertionError(f"no answer in {seconds} s:\n{said}") from None
    assert process.returncode == 0, said
    found = []
    for line in said.splitlines():
        if line.startswith('{"error"'):
            assert errors, said
            found.append(json.loads(line)["error"])
        elif line.startswith('{"answers"'):
            found.append([_answers(one) for one in json.loads(line)["answers"]])
    return found


def _answers(one: dict[str, Any]) -> Answers:
    return Answers(
        tokens=torch.tensor(one["tokens"]),
        logprobs=torch.tensor(one["logprobs"], dtype=torch.float64),
        runs=one["runs"],
        num_compiled=one["num_compiled"],
        num_cached_tokens=one["num_cached_tokens"],
        experts_at=one["experts_at"],
        parameters={
            name: [torch.tensor(values) for values in workers]
            for name, workers in one["parameters"].items()
        },
    )


# --- in the process that is asked ---------------------------------------------------


def _take(llm: Any, step: str, argument: Any) -> None:
    if step == "reload":
        llm.collective_rpc("reload_weights", kwargs={"weights_path": argument})
    elif step == "sleep":
        llm.sleep(level=argument)
        if argument == 2:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        else:
            llm.wake_up()
    if step != "again":
        llm.reset_prefix_cache()


def _ask(llm: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["num_tokens"],
        ignore_eos=True,
        logprobs=-1,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    compiled_before = llm.collective_rpc("compiled_kernels")
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    compiled = llm.collective_rpc("compiled_kernels")
    completions = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(one.token_ids) for one in completions],
        "logprobs": [
            [[step[t].logprob for t in sorted(step)] for step in one.logprobs]
            for one in completions
        ],
        "runs": llm.collective_rpc("runs"),
        "num_compiled": [
            after - before
            for after, before in zip(compiled, compiled_before, strict=True)
        ],
        "num_cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "experts_at": llm.collective_rpc("experts_at"),
        "parameters": {
            name: llm.collective_rpc("parameter", args=(name,))
            for name in job["parameters"]
        },
    }


def _run(options: dict[str, Any], job: Mapping[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM

    from tests import engine_worker

    engine_worker.forget()
    llm = LLM(**(OPTIONS | options))
    try:
        answers = [_ask(llm, job)]
        for step in job["steps"]:
            _take(llm, *step)
            answers.append(_ask(llm, job))
        return answers
    finally:
        llm.llm_engine.engine_core.shutdown()


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    from examples.ask_checkpoints import last_line

    job = json.loads(sys.argv[1])
    for options in job["engines"]:
        env = options.pop("env", {})
        os.environ.update(env)
        try:
            print(json.dumps({"answers": _run(options, job)}), flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": last_line(error)}), flush=True)
        for name in env:
            del os.environ[name]
        if len(job["engines"]) > 1:
            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
