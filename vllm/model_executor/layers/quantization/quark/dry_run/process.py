# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Builds and loads the models that are asked about."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm.model_executor.layers.quantization.quark.dry_run.engine_checks import (
    collected,
    has_checks,
)
from vllm.model_executor.layers.quantization.quark.dry_run.given import (
    MetaWatch,
    given,
)
from vllm.model_executor.layers.quantization.quark.dry_run.recorder import (
    Recorder,
    modules_of,
)
from vllm.model_executor.layers.quantization.quark.dry_run.stand_ins import (
    any_experts,
    any_platform,
    in_place_of,
    quantized_by,
)
from vllm.model_executor.layers.quantization.quark.quark_check.dry_run import (
    is_structure,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What the process may take beyond what it has once vLLM is imported.
NUM_BYTES = 8 << 30


def _make_config(folder: str, only_text: bool) -> "VllmConfig":
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        trust_remote_code=False,
        language_model_only=only_text,
    )
    return args.create_engine_config()


def _start_process_groups(config: "VllmConfig") -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return
    # As if the model had experts: one that is asked later may have some.
    config = copy(config)
    config.model_config = None
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{folder}/meeting-point",
            local_rank=0,
            backend="gloo",
        )
        parallel_state.ensure_model_parallel_initialized(1, 1)


def _look(
    folder: str,
    headers: Mapping[str, Any],
    only_text: bool,
    recorder: Any,
    said: dict[str, Any],
) -> None:
    """Fill `said` as far as the model lets; an exception tells how far."""
    import torch

    said |= {"stage": "config", "only_text": only_text}
    with nullcontext() if recorder is None else quantized_by(recorder):
        config = _make_config(folder, only_text)
        said["stage"] = "architecture"
        from vllm.model_executor.model_loader.utils import (
            get_model_architecture,
            initialize_model,
        )
        from vllm.utils.torch_utils import set_default_torch_dtype

        said["architecture"] = get_model_architecture(config.model_config)[0].__name__
        said["stage"] = "build"
        _start_process_groups(config)
        with (
            any_platform(said.setdefault("lacks", [])),
            # This fork's own build says what its platform lacks.
            nullcontext() if has_checks() else any_experts(),
            set_default_torch_dtype(config.model_config.dtype),
            torch.device("meta"),
        ):
            model = initialize_model(vllm_config=config)
    said["modules"] = modules_of(model, {} if recorder is None else recorder.asked)
    said["mappers"] = [] if recorder is None else recorder.mappers
    said["stage"] = "load"
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config), torch.device("meta"):
        watch = _load(model, config, headers, recorder is None)
    said["taken"] = {name: sorted(taken) for name, taken in watch.taken.items()}
    said["unfilled"] = [
        name
        for name, parameter in watch.parameters.items()
        if watch.num_filled(name) < parameter.numel()
    ]
    said["stage"] = ""


def _load(
    model: Any, config: "VllmConfig", headers: Mapping[str, Any], is_engine: bool
) -> Any:
    """Load the weights, in the fork as its engine does; returns the Watch."""
    made: list[Any] = []

    class Kept(MetaWatch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    if is_engine and has_checks():
        from vllm.model_executor.layers.quantization.quark.load_checks import loading

        with in_place_of(loading, "Watch", Kept):
            checked = loading.checked(None, model, config.model_config)
            if checked is not model:
                checked.load_weights(given(headers))
                return made[-1]
    if not is_engine:
        headers = {name: headers[name] for name in filter(is_structure, headers)}
    watch = Kept(model, lambda write: None)
    with watch.watching():
        model.load_weights(watch.watch(given(headers)))
    return watch


def _try(folder: str, headers: Mapping[str, Any], is_engine: bool) -> dict[str, Any]:
    """What one pass says. A model of images and text that does not load is tried
    without its images as well, as `language_model_only` runs it."""
    said: dict[str, Any] = {}
    for only_text in (False, True):
        now: dict[str, Any] = {}
        problems: list[dict[str, str]] = []
        recorder = None if is_engine else Recorder()
        try:
            with collected(headers, problems) if is_engine else nullcontext():
                _look(folder, headers, only_text, recorder, now)
        except Exception as error:
            now["error"] = f"{type(error).__name__}: {error}".rstrip(": ")
            if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
                import traceback

                traceback.print_exc()
        now["problems"] = problems
        if not said or not now["stage"]:
            said = now
        if said["stage"] not in ("build", "load"):
            break
    return said


def _bound_memory() -> None:
    """At most NUM_BYTES more than the process has now. Of no effect where the
    operating system has no such limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = pages * resource.getpagesize() + NUM_BYTES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def look(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is said of each question."""
    import vllm
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    _bound_memory()
    # This process is one of its own already.
    registry._run_in_subprocess = lambda function: function()
    version, platform = vllm.__version__, current_platform.device_type
    said = []
    for each in questions:
        structure, engine = (
            _try(each["folder"], each["tensors"], is_engine)
            for is_engine in (False, True)
        )
        # Attention is looked for once.
        engine["lacks"] = structure.get("lacks", [])
        said.append(
            {
                "vllm": version,
                "platform": platform,
                "structure": structure,
                "engine": engine,
            }
        )
    return said


def answer(questions: TextIO, answers: TextIO) -> None:
    """Read QUESTIONS and write what the package's docstring says."""
    json.dump(look(json.load(questions)), answers)
