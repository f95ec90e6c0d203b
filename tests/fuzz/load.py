# SPDX-License-Identifier: Apache-2.0
"""Load one damaged export as the engine does, in this process, and mark what came of
it. Run as a worker by fuzz_checkpoints.py."""

import json
import os
import re
import resource
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import (
    LoadConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.quantization.quark.load_checks import checks
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.fuzz.files import CONFIG, EXPORTS, SIZES, Export, Files, parse
from tests.fuzz.judge import config_is_valid, judge
from tests.fuzz.mutations import mutate
from tests.models import step3p5_micro as micro
from tests.models.step3p5_micro import Share
from tests.process_groups import start_process_groups
from tests.quantization.utils import poison

BYTES = 8 << 30  # of address space that a mutation may claim
# Of Python's slips rather than of a check.
BARE = (
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    TypeError,
    UnicodeError,
    ZeroDivisionError,
)
# Part of a module's or a tensor's name.
NAMED = re.compile(r"model\.|layers\.|_proj|lm_head|embed_tokens|norm|expert|weight")
ORIGINAL = [micro.expected(export.stacked, SIZES, Share()) for export in EXPORTS]


@dataclass(frozen=True)
class Outcome:
    seed: int
    mutation: str
    outcome: str
    error: str = ""


def load(folder: Path) -> dict[str, Tensor]:
    """The steps of the engine's `load_model`; the weights as they were loaded."""
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
        ),
        load_config=LoadConfig(use_tqdm_on_load=False),
    )
    model_config = vllm_config.model_config
    with (
        set_current_vllm_config(vllm_config),
        set_default_torch_dtype(torch.bfloat16),
    ):
        model = initialize_model(vllm_config)
        for name, module in model.named_modules():
            if not name.endswith(".attn"):
                poison_own(module)
        get_model_loader(vllm_config.load_config).load_weights(model, model_config)
        weights = micro.found(model)
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    return weights


def poison_own(module: nn.Module) -> None:
    holder = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    poison(holder)


def is_clear(error: Exception, folder: Path) -> bool:
    """Whether it names a file, a tensor, a module or a setting."""
    if isinstance(error, BARE):
        return False
    text = str(error)
    settings = parse(EXPORTS[0].files[CONFIG])
    keys = [*settings, *settings["quantization_config"], "config"]
    return bool(
        str(folder) in text
        or re.search(r"\.(safetensors|json)", text)
        or NAMED.search(text)
        or any(key in text for key in keys)
    )


def changes_settings(files: Files, export: Export) -> bool:
    """Whether config.json is JSON and another outside its quantization_config."""
    try:
        config = parse(files[CONFIG])
    except (KeyError, ValueError):
        return False
    written = parse(export.files[CONFIG])
    quark = config.get("quantization_config")
    if isinstance(quark, dict):
        config["quantization_config"] = written["quantization_config"]
    return config != written


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def run(seed: int, scratch: Path) -> Outcome:
    export, files, mutation = mutate(seed)
    folder = scratch / f"export-{seed}"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    warned: list[str] = []
    checks.logger.warning_once = warned.append
    try:
        found = load(folder)
    except Exception as error:
        if is_clear(error, folder):
            outcome = "refused"
        else:
            outcome = "upstream" if changes_settings(files, export) else "unclear"
        return Outcome(seed, mutation, outcome, f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder)
    outcome = mark(found, files, export)
    if warned and outcome in ("harmless", "undetectable"):
        return Outcome(seed, mutation, "warned", warned[0])
    return Outcome(seed, mutation, outcome)


def mark(found: dict[str, Tensor], files: Files, export: Export) -> str:
    """Class of what was loaded."""
    if not config_is_valid(files, export):
        return "accepted"
    if same(found, ORIGINAL[EXPORTS.index(export)]):
        config = parse(files[CONFIG])
        unchanged = config == parse(export.files[CONFIG])
        return "harmless" if unchanged else "undetectable"
    held = judge(files, export)
    if held is None:
        return "accepted"
    return "undetectable" if same(found, held) else "wrong"


def main() -> None:
    """Seeds from stdin; a line of JSON before and after each."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        start_process_groups(scratch / "store")
        claimed = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (claimed + BYTES, claimed + BYTES))
        for seed in map(int, sys.stdin.read().split()):
            lines.write(json.dumps({"begin": seed}) + "\n")
            lines.write(json.dumps(asdict(run(seed, scratch))) + "\n")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
