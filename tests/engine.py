# SPDX-License-Identifier: Apache-2.0
"""Ask an engine of a process of its own: vLLM keeps state, and spawns workers."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    "seed": 0,
}


# The engine in the process that asks, for what is counted there.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@dataclass(frozen=True)
class Answers:
    """Greedy answers: tokens int64 [prompts, T]; logprobs float64 [prompts, T, vocab]
    of each token after those before it. Up to them the engine, if it is of
    `ONE_PROCESS`, has launched the INT8 MoE's own kernels int8_moe_runs times."""

    tokens: Tensor
    logprobs: Tensor
    int8_moe_runs: int


def ask(
    model: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    reloads: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Answers]:
    """Start an engine with these further environment variables and options of `LLM`;
    ask it, and again after loading its weights from each folder of `reloads`."""
    job = {
        "options": OPTIONS | {"model": str(model)} | options,
        "prompts": prompts,
        "num_tokens": num_tokens,
        "reloads": [str(folder) for folder in reloads],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine", json.dumps(job)],
        cwd=ROOT,
        env={
            **os.environ,
            **_one_core_a_rank(options.get("tensor_parallel_size", 1)),
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    [line] = [s for s in done.stdout.splitlines() if s.startswith('{"answers"')]
    return [
        Answers(torch.tensor(tokens), torch.tensor(logprobs, dtype=torch.float64), runs)
        for tokens, logprobs, runs in json.loads(line)["answers"]
    ]


def _one_core_a_rank(num_ranks: int) -> dict[str, str]:
    """On a CPU vLLM wants a NUMA node a rank, or to be told each rank's cores."""
    if num_ranks == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    chosen = (str(cores[rank % len(cores)]) for rank in range(num_ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(chosen)}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe import int8_moe

    job = json.loads(sys.argv[1])
    run = int8_moe.run_int8_experts
    counted = patch.object(int8_moe, "run_int8_experts", wraps=run).start()
    llm = LLM(**job["options"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["num_tokens"],
        ignore_eos=True,
        logprobs=-1,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = []
    for folder in [None, *job["reloads"]]:
        if folder:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            llm.reset_prefix_cache()
        completions = [output.outputs[0] for output in llm.generate(prompts, sampling)]
        logprobs = [
            [[step[t].logprob for t in sorted(step)] for step in one.logprobs]
            for one in completions
        ]
        tokens = [list(one.token_ids) for one in completions]
        answers.append((tokens, logprobs, counted.call_count))
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main()
