# SPDX-License-Identifier: Apache-2.0
"""In a process that sees one build: import what the fork brings, and ask an export.

python -m tools.try_build <folder the build is installed in> <export>
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 32,
    "max_num_batched_tokens": 32,
    "kv_cache_memory_bytes": 1 << 20,
    "skip_tokenizer_init": True,
}


def modules(folder: Path) -> list[str]:
    """The overlay's modules in a build, but what runs as `__main__`."""
    from tools.upstream import overlay_files

    names = [name for name in overlay_files() if (folder / name).exists()]
    python = [name.removesuffix(".py") for name in names if name.endswith(".py")]
    found = [name.removesuffix("/__init__").replace("/", ".") for name in python]
    return [name for name in found if not name.endswith(".__main__")]


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    import vllm

    assert Path(str(vllm.__file__)).is_relative_to(folder), vllm.__file__
    imported = modules(folder)
    for name in imported:
        import_module(name)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(model, **OPTIONS)
    options = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    [answer] = engine.generate(
        [TokensPrompt(prompt_token_ids=[1, 2, 3, 4])], options, use_tqdm=False
    )
    tokens = [*answer.outputs[0].token_ids]
    print(json.dumps({"imported": len(imported), "tokens": tokens}), flush=True)
    # Not the engine's shutdown, which asks for a driver unless the group cpu mends it.
    os._exit(0)


if __name__ == "__main__":
    main()
