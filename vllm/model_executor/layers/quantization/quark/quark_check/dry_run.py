# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ask the installed vLLM's own model what it makes of a checkpoint's tensors.

The model is asked in a process of its own: the package `dry_run` beside this one, which
needs vLLM. Here are its questions and answers.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import TensorInfo

Tensors = Mapping[str, TensorInfo]
SECONDS = 180.0
QUARK = "vllm.model_executor.layers.quantization.quark"
STAGES = ("config", "architecture", "build", "load")
# What belongs to a quantization, which the structure of a model has nothing of.
_QUANTIZATION = ("_scale", "_zero_point", ".scale", ".zero_point")


def is_structure(name: str) -> bool:
    """Whether a tensor belongs to the structure of a model, by its name, and not to a
    quantization of it."""
    return not name.endswith(_QUANTIZATION)


@dataclass(frozen=True)
class Module:
    """A module of the model. `prefix`: the name under which it asks the quantization
    config, None where it does not; `packed`: what it is fused from, by what the model
    tells that config; `mappers`: how many of the model's renamings came before."""

    kind: str
    cls: str
    prefix: str | None = None
    packed: tuple[str, ...] | None = None
    mappers: int = 0
    num_experts: int | None = None
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    method: str = ""
    scheme: str = ""


@dataclass(frozen=True)
class Pass:
    """One model that was built and loaded, as far as that went.

    stage: of STAGES, the one that failed, "" for none; error: its message; lacks: what
    the platform cannot compute of the model; mappers: of names in the checkpoint to
    vLLM's names, in order; taken: tensor -> parameters; unfilled: parameters that lack
    numbers; problems: those of the engine's checks, as keyword arguments.
    """

    stage: str
    error: str = ""
    architecture: str = ""
    only_text: bool = False
    lacks: tuple[str, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    mappers: tuple[Mapping[str, Any], ...] = ()
    taken: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unfilled: tuple[str, ...] = ()
    problems: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class DryRun:
    """What a vLLM of some version and platform says of a checkpoint; `failed` where
    the process itself did not get so far, with the reason."""

    vllm: str = ""
    platform: str = ""
    structure: Pass = Pass("config")
    engine: Pass = Pass("config")
    failed: str = ""


def _pass_of(said: Mapping[str, Any]) -> Pass:
    modules = {
        name: Module(
            each["kind"],
            each["class"],
            each["prefix"],
            None if each["packed"] is None else tuple(each["packed"]),
            each["mappers"],
            each["experts"],
            {key: tuple(shape) for key, shape in each["parameters"].items()},
            each["method"],
            each["scheme"],
        )
        for name, each in said.get("modules", {}).items()
    }
    return Pass(
        said["stage"],
        said.get("error", ""),
        said.get("architecture", ""),
        said.get("only_text", False),
        tuple(said.get("lacks", ())),
        modules,
        tuple(said.get("mappers", ())),
        {name: tuple(taken) for name, taken in said.get("taken", {}).items()},
        tuple(said.get("unfilled", ())),
        tuple(said.get("problems", ())),
    )


def dry_run(
    questions: Sequence[tuple[Path, Tensors]],
    seconds: float = SECONDS,
    command: Sequence[str] = (sys.executable, "-m", f"{QUARK}.dry_run"),
    environment: Mapping[str, str] | None = None,
) -> list[DryRun]:
    """Ask the installed vLLM what it makes of the tensors of folders with config.json.

    Never raises for what a model does: `stage`, `error` and `failed` say it. The
    process that is asked ends after `seconds`.
    """
    asked = [
        {
            "folder": str(folder.absolute()),
            "tensors": {
                name: (tensor.dtype, tensor.shape, str(tensor.file))
                for name, tensor in tensors.items()
            },
        }
        for folder, tensors in questions
    ]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    more = {"TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet, **more, **(environment or {})},
        # Away from modules of the checkpoint's, and all ended together.
        cwd=tempfile.gettempdir(),
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(json.dumps(asked), timeout=seconds)
    except subprocess.TimeoutExpired:
        return [DryRun(failed=f"no answer within {seconds:g} s")] * len(questions)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        said = json.loads(out)
    except ValueError:
        last = errors.strip().splitlines()[-1:] or ["nothing said"]
        failed = f"ended with {process.returncode}: {last[0]:.300}"
        return [DryRun(failed=failed)] * len(questions)
    return [
        DryRun(
            each["vllm"],
            each["platform"],
            _pass_of(each["structure"]),
            _pass_of(each["engine"]),
        )
        for each in said
    ]
