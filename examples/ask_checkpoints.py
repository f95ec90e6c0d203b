# SPDX-License-Identifier: Apache-2.0
"""Ask checkpoints, one after the other in one process, the same questions.

    ask_checkpoints.py JOB.json ANSWERS

JOB is `{"prompts": [[token ids]], "options": {..}, "checkpoints": {name: folder}}`; the
options are vLLM's `LLM`'s, beside those below. The folder ANSWERS gets one NAME.json a
checkpoint: `{"texts": [..], "logprobs": [[..]]}`, the greedy answer to each prompt and
the log probability of every token of the vocabulary after it, null where not finite;
or `{"error": "..", "loaded": ..}`, where loaded says that the error came afterwards.
JOB's `"pictures": {name: [{"prompt": "..", "seed": ..}]}`, if it has any, asks some of
them questions with a picture too, whose log probabilities are `"pictures"`.
Runs with whatever vLLM comes first on the path, so that builds
can be compared.
"""

import gc
import json
import math
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.entrypoints.llm import LLM
from vllm.sampling_params import SamplingParams
from vllm.v1.executor.uniproc_executor import UniProcExecutor

MAX_TOKENS = 5  # the longest answer and the end token


def load(folder: str, options: dict[str, Any]) -> LLM:
    """The engine, loaded over poisoned memory.

    A parameter that the checkpoint does not fill holds NaN or the largest integer then,
    and not, by chance, what an earlier checkpoint left there.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return engine(folder, options)
    finally:
        torch.use_deterministic_algorithms(False)


def engine(folder: str, options: dict[str, Any]) -> LLM:
    if "tensor_parallel_size" not in options:
        # Given as a class, it runs the model in this process on a CPU too: no worker
        # has to start for each checkpoint, and errors come through whole.
        options = options | {"distributed_executor_backend": UniProcExecutor}
    return LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        max_logprobs=-1,
        seed=0,
        **options,
    )


def first_logprobs(llm: LLM, requests: Sequence[Any]) -> list[list[float | None]]:
    first = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    rows = []
    for output in llm.generate(requests, first, use_tqdm=False):
        [found] = output.outputs[0].logprobs
        values = [found[token].logprob for token in sorted(found)]
        rows.append([value if math.isfinite(value) else None for value in values])
    return rows


def ask(llm: LLM, prompts: Sequence[list[int]]) -> dict[str, Any]:
    requests = [{"prompt_token_ids": token_ids} for token_ids in prompts]
    whole = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    rows = first_logprobs(llm, requests)
    answers = llm.generate(requests, whole, use_tqdm=False)
    return {"texts": [a.outputs[0].text for a in answers], "logprobs": rows}


def with_picture(prompt: str, seed: int) -> dict[str, Any]:
    """A request with a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(256, size=(56, 56, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    return {"prompt": prompt, "multi_modal_data": {"image": picture}}


def last_line(error: Exception) -> str:
    """The end of what the error says, as Python prints it."""
    lines = str(error).strip().splitlines()
    for line in lines:
        # Pydantic repeats its input after the error.
        if found := re.match(r"\s*Value error, (.*?)( \[type=value_error.*)?$", line):
            return f"ValueError: {found[1]}"
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else repr(error)


def allow_text_without_pictures() -> None:
    """vLLM 0.20 finds out how many tokens a picture takes by handing the text with its
    placeholder to the processor, without the picture: new transformers refuse it."""
    if hasattr(ProcessorMixin, "validate_inputs"):
        ProcessorMixin.validate_inputs = lambda *_, **__: None  # type: ignore[method-assign]


def main() -> None:
    allow_text_without_pictures()
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = Path(sys.argv[2])
    for name, folder in job["checkpoints"].items():
        llm = None
        try:
            llm = load(folder, job["options"])
            answer = ask(llm, job["prompts"])
            if pictures := job.get("pictures", {}).get(name):
                requests = [with_picture(**picture) for picture in pictures]
                answer["pictures"] = first_logprobs(llm, requests)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": last_line(error), "loaded": llm is not None}
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        partial = answers / f"{name}.partial"
        partial.write_text(json.dumps(answer))
        partial.rename(answers / f"{name}.json")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
