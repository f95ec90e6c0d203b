# SPDX-License-Identifier: Apache-2.0
"""Ask a checkpoint for the log probabilities of the first token after each prompt.

    first_token_logprobs.py CHECKPOINT PROMPTS.json ANSWERS.json MEMORY_SHARE

PROMPTS is a list of token id lists. ANSWERS gets a row a prompt with the log
probability of every token of the vocabulary; null where it is not finite. MEMORY_SHARE
is vLLM's gpu_memory_utilization. Runs with whatever vLLM comes first on the path, so
that two builds can be compared.
"""

import json
import math
import sys
from pathlib import Path

from vllm.entrypoints.llm import LLM
from vllm.sampling_params import SamplingParams


def main() -> None:
    checkpoint, prompts, answers = map(Path, sys.argv[1:4])
    llm = LLM(
        str(checkpoint),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=-1,
        gpu_memory_utilization=float(sys.argv[4]),
        seed=0,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(prompts.read_text())],
        SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False),
    )
    rows = []
    for output in outputs:
        [first] = output.outputs[0].logprobs
        values = [first[token].logprob for token in sorted(first)]
        rows.append([value if math.isfinite(value) else None for value in values])
    answers.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
