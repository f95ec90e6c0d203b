# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What watches a model while its weights are loaded."""

import math
import re
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.quark_int8_compat import (
    ExpertsLayer,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.quark.load_checks.checks import (
    Checks,
    checks_of,
)
from vllm.model_executor.layers.quantization.quark.load_checks.files import (
    refuse_int8_without_config,
)
from vllm.model_executor.layers.quantization.quark.load_checks.model import (
    check_shapes,
    check_values,
    holds_int8,
)
from vllm.model_executor.layers.quantization.quark.load_checks.watch import (
    Watch,
    Weights,
    Write,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
    TensorInfo,
)
from vllm.model_executor.layers.quantization.quark.quark_check.problems import (
    Problem,
    of_tensor,
)
from vllm.model_executor.layers.quantization.quark.quark_check.weights import (
    COMPANIONS,
    INPUT_SCALE,
    expert_of,
)
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

# Parameters that an export need not hold: zero points of symmetric quantization, and
# scales of the key/value cache.
_OPTIONAL = re.compile(r"(zero_point|\.(q|k|v|prob)_scale)$")
# Scales of the key/value cache, by the names that Quark gives them.
_CACHE_SCALE = re.compile(r"output_scale$")
# Beyond, handing a tensor to a thread takes less time than looking at it.
_LARGE_BYTES = 1 << 20
_CHECKED_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def checked(loader: "DefaultModelLoader", model: Any, model_config: ModelConfig) -> Any:
    """The model, with a `load_weights` that checks what it loads where that is INT8."""
    if model_config.quantization is None:
        refuse_int8_without_config(Path(model_config.model))
        return model
    checks = checks_of(model, model_config)
    if checks is None:
        return model
    return CheckedModel(model, model_config, checks)


def _non_finite(name: str, tensor: torch.Tensor, where: str) -> Problem | None:
    if not tensor.numel() or tensor.is_meta:
        return None
    # One pass: NaN is both the least and the greatest of numbers that hold it.
    least, greatest = tensor.aminmax()
    if least.isfinite() and greatest.isfinite():
        return None
    bad = ~tensor.isfinite()
    first = bad.nonzero()[0].tolist()
    found = f"{tensor[tuple(first)].item()} at {first}, {int(bad.sum())} such"
    return Problem("non-finite", name, "finite numbers", found, where=where)


class CheckedModel:
    """Everything of a model but `load_weights`."""

    def __init__(self, model: Any, model_config: ModelConfig, checks: Checks) -> None:
        self._model, self._config, self._checks = model, model_config, checks
        export = checks.export
        self._tensors = export.tensors if export is not None else {}
        self._modules = dict(model.named_modules())
        # Of tensors that hold numbers that are none, until something takes them.
        self._suspects: dict[str, Problem] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Weights) -> set[str] | None:
        checks = self._checks
        if checks.export is not None:
            for entry in checks.export.exclude_without_module():
                checks.report(entry)
        check_shapes(self._model, checks)
        check_values(self._model, checks)
        watch = self._watch = Watch(self._model, self._before_write)
        try:
            with watch.watching():
                loaded = self._model.load_weights(watch.watch(self._looked_at(weights)))
        except (
            AssertionError,
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            known = isinstance(error, (CheckpointError, torch.OutOfMemoryError))
            if known:
                raise
            raise self._failed(watch.current, error) from error
        for name, problem in self._suspects.items():
            if name in watch.taken:
                checks.report(problem)
        unfilled = self._unfilled(watch, loaded or set())
        left = self._left_out(watch)
        for problem in (*unfilled, *left):
            checks.report(problem)
        checks.log()
        return loaded

    def _place(self, name: str) -> str:
        return str(self._tensors[name]) if name in self._tensors else ""

    def _looked_at(
        self, weights: Weights
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The weights, of which large ones are looked at while they are copied to a
        GPU; [N, 1] scales as [N]."""
        with ThreadPoolExecutor(1) as thread:
            for name, tensor in weights:
                if (
                    name.endswith(COMPANIONS)
                    and tensor.ndim > 1
                    and tensor.shape[-1] == 1
                ):
                    tensor = tensor.squeeze(-1)
                if tensor.dtype not in _CHECKED_FLOATS:
                    yield name, tensor
                elif tensor.nbytes < _LARGE_BYTES or current_platform.is_cpu():
                    problem = _non_finite(name, tensor, self._place(name))
                    yield name, tensor
                    self._suspect(name, problem)
                else:
                    look = thread.submit(_non_finite, name, tensor, self._place(name))
                    yield name, tensor
                    self._suspect(name, look.result())

    def _suspect(self, name: str, problem: Problem | None) -> None:
        """Numbers that are none are wrong as soon as a parameter takes them."""
        if problem is None:
            return
        if name in self._watch.taken:
            self._checks.report(problem)
        else:
            self._suspects[name] = problem

    def _before_write(self, write: Write) -> None:
        """A tensor is of the kind of its parameter, and fills what it is written to."""
        target, source = write.target, write.source
        if "zero_point" in write.parameter:
            return
        name = write.tensor or "a tensor of the checkpoint"
        is_exact = target.dtype == torch.int8 and source.dtype != torch.int8
        if is_exact or target.is_floating_point() != source.is_floating_point():
            id, expected = self._other_kind(write)
            found = str(source.dtype).removeprefix("torch.")
            problem = Problem(id, name, expected, found, where=self._place(name))
            self._checks.report(problem)
        elif target.numel() != source.numel() and self._is_int8(write.parameter):
            self._checks.report(
                Problem(
                    "weight-misshapen",
                    name,
                    f"{list(target.shape)} for a part of {write.parameter}",
                    str(list(source.shape)),
                    where=self._place(name),
                )
            )

    def holds_int8(self, parameter: str) -> bool:
        return holds_int8(self._modules[parameter.rpartition(".")[0]])

    def _other_kind(self, write: Write) -> tuple[str, str]:
        """Why a tensor is of another kind than its parameter, and what was expected."""
        module = write.tensor.rpartition(".")[0]
        export = self._checks.export
        dtype = str(write.target.dtype).removeprefix("torch.")
        expected = f"{dtype} for {write.parameter}"
        if write.source.dtype == torch.int8 and export is not None:
            if (entry := export.excluded_by(module)) is not None:
                return "int8-excluded", f"{expected}, since exclude has {entry!r}"
            if module in export.modules:
                return "head-quantized", f"{expected}, which vLLM does not quantize"
        return "tensor-of-other-kind", expected

    def _failed(
        self, current: tuple[str, torch.Tensor] | None, error: Exception
    ) -> CheckpointError:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        # Some loaders list all names of the model.
        why = why if len(why) <= 300 else f"{why[:300]}..."
        if current is None:  # the loader had taken them all before it began
            name, expected, found = self._checks.model, "tensors", why
            where = ""
        else:
            name, tensor = current
            dtype = str(tensor.dtype).removeprefix("torch.")
            found = f"{dtype} {list(tensor.shape)}, {why}"
            expected = "a tensor"
            where = self._tensors[name].file.name if name in self._tensors else ""
        expected = f"{expected} that the loader of {type(self._model).__name__} takes"
        problem = Problem("tensor-without-place", name, expected, found, where=where)
        return problem.error

    def _unfilled(self, watch: Watch, loaded: set[str]) -> list[Problem]:
        """Parameters, or parts of them, that no tensor filled."""
        found = []
        for name, parameter in watch.parameters.items():
            if _OPTIONAL.search(name):
                continue
            filled = watch.num_filled(name)
            if filled >= parameter.numel():
                continue
            module = self._modules[name.rpartition(".")[0]]
            whole = isinstance(module, LinearBase) or (
                isinstance(module, ExpertsLayer) and holds_int8(module)
            )
            if not whole and (filled or name in loaded):
                continue
            share = f"{filled} of {parameter.numel()} numbers"
            share += _first_gap(parameter, watch.written.get(name, ()))
            found.append(
                Problem(
                    "scale-missing" if "scale" in name else "weight-missing",
                    name,
                    "tensors of the checkpoint that fill it",
                    share if filled else "none",
                    where=str(list(parameter.shape)),
                )
            )
        return found

    def _left_out(self, watch: Watch) -> list[Problem]:
        """Tensors that nothing took: an error beside an INT8 weight that was loaded,
        unless they are zeros or of no effect; else a warning."""
        # Multi-token prediction is loaded from the model's own checkpoint.
        if getattr(self._config, "runner", None) == "draft":
            return []
        loaded = {
            name.rpartition(".")[0]
            for name in watch.taken
            if name in self._tensors and self._tensors[name].dtype == "I8"
        }
        shares_experts = any(
            isinstance(module, ExpertsLayer)
            and module.local_num_experts < module.global_num_experts
            for module in self._modules.values()
        )
        found = []
        for name in watch.not_taken:
            if is_pp_missing_parameter(name, self._model):
                continue  # another pipeline rank's
            if shares_experts and expert_of(name):
                continue  # another expert-parallel rank's; what is here gets filled
            tensor = self._tensors.get(name)
            module, _, suffix = name.rpartition(".")
            if module not in loaded or tensor is None or self._is_harmless(tensor):
                problem = Problem("tensor-not-taken", name, "a parameter", "none")
            else:
                expected = f"a parameter of {type(self._model).__name__} that takes it"
                found_there = "none: it would be left out"
                id = (
                    "rotation-not-applied"
                    if "rotation" in suffix
                    else ("tensor-left-out")
                )
                problem = of_tensor(id, tensor, expected, found_there)
            found.append(problem)
        return found

    def _is_harmless(self, tensor: TensorInfo) -> bool:
        """Whether a layer computes the same without this tensor: one that holds zeros,
        a scale of the key/value cache, a scale of activations that are dynamic."""
        suffix = tensor.name.rpartition(".")[2]
        if _CACHE_SCALE.search(suffix) or suffix == INPUT_SCALE:
            return True
        with safe_open(tensor.file, framework="pt") as stream:
            return not stream.get_tensor(tensor.name).count_nonzero()


def _first_gap(parameter: nn.Parameter, parts: Iterable[tuple]) -> str:
    """Where a stacked parameter lacks an expert, that expert."""
    if parameter.ndim < 2:
        return ""
    size = parameter.nbytes // parameter.shape[0]
    filled = [0] * parameter.shape[0]
    for offset, shape, _ in parts:
        filled[offset // size] += math.prod(shape)
    missing = [
        row for row, count in enumerate(filled) if count * parameter.itemsize < size
    ]
    return f"; the first gap is at index {missing[0]}" if missing else ""
