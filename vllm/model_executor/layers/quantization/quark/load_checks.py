# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No silence while a Quark INT8 checkpoint is loaded.

Three times something is asked. `check_model`, while vLLM reads the config: are the
files whole, and is the config one that can be read? `Checks.layer`, while the model is
built: what do the files hold for this layer (export.py)? `checked`, while weights are
loaded: is every tensor taken by a parameter of its kind, is every parameter filled, are
scales finite and above zero?

What would make an answer wrong ends in a CheckpointError that names the tensor, what
was expected, what was found and a remedy; with VLLM_QUARK_INT8_CHECKS=warn it is logged
instead. What cannot change an answer is logged once (problems.py). Checkpoints without
INT8 weights are left as upstream has them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.quark.checkpoint import (
    CheckpointError,
    TensorInfo,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.export import (
    COMPANIONS,
    INPUT_SCALE,
    SCALES,
    ZERO_POINT,
    Export,
    Layer,
    Mapper,
    Stored,
    config_problems,
    expert_of,
    int8_with_scales,
    must_be_zero,
    number_problems,
)
from vllm.model_executor.layers.quantization.quark.problems import (
    EXPORT_AGAIN,
    KINDS,
    Problem,
    of_tensor,
)
from vllm.model_executor.layers.quantization.quark.rules import Config, has_int8
from vllm.model_executor.layers.quantization.quark.watch import Watch, Weights, Write
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

logger = init_logger(__name__)

# Parameters that an export need not hold: zero points of symmetric quantization, and
# scales of the key/value cache.
_OPTIONAL = re.compile(r"(zero_point|\.(q|k|v|prob)_scale)$")
# Scales of the key/value cache, by the names that Quark gives them.
_CACHE_SCALE = re.compile(r"output_scale$")
# Beyond, handing a tensor to a thread takes less time than looking at it.
_LARGE_BYTES = 1 << 20
_CHECKED_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Names that a message shows of many.
_NUM_SHOWN = 3


class Checks:
    """What is asked about one export, and what was found so far.

    model: a folder, or a name on a hub, as the engine was given it; config: the
    quantization_config as the file has it. Travels to worker processes, each of which
    reads the headers when it is first asked.
    """

    def __init__(self, model: str, revision: str | None, config: Config) -> None:
        self.model, self.revision, self.config = model, revision, config
        self.problems: list[Problem] = []
        self._export: Export | None = None
        self._is_read = False
        self._mappers: list[Mapper] = []
        self._num_seen = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__ | {"_export": None, "_is_read": False, "_num_seen": 0}
        return kept | {"problems": []}

    @property
    def export(self) -> Export | None:
        """The files' tensors beside the config; None where there are no safetensors."""
        if not self._is_read:
            self._is_read = True
            folder = self._folder()
            tensors = read_checkpoint(folder) if folder is not None else {}
            if tensors:
                self._export = Export(tensors, self.config)
                for mapper in self._mappers:
                    self._export.rename(mapper)
        return self._export

    def _folder(self) -> Path | None:
        """Where the files are. A model of a hub is downloaded now, as it would be when
        its weights are loaded."""
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        if Path(self.model).is_dir():
            return Path(self.model)
        loader = get_model_loader(get_current_vllm_config().load_config)
        if not isinstance(loader, DefaultModelLoader):
            return None
        try:
            found = loader._prepare_weights(self.model, None, self.revision, True, None)
        except (OSError, RuntimeError):  # the loader will say what is wrong
            self._is_read = False
            return None
        return Path(found[0])

    def rename(self, mapper: Mapper) -> None:
        """Follow a model that renames the modules of its checkpoint."""
        self._mappers.append(mapper)
        if self._export is not None:
            self._export.rename(mapper)

    def layer(
        self, layer: nn.Module, prefix: str, packed: Mapping[str, Sequence[str]]
    ) -> Layer | None:
        """What the files hold for a layer that is being built; None for nothing that
        is known. Raises CheckpointError for what would be read wrong."""
        if self.export is None:
            return None
        if isinstance(layer, FusedMoE):
            is_new = self.export.asked(prefix) is None
            found = self.export.experts(prefix)
            if is_new and found is not None:
                problem = _count_problem(prefix, layer, found)
                if problem is not None:
                    self.report(problem)
        elif isinstance(layer, LinearBase):
            found = self.export.linear(prefix, packed)
        else:
            return None
        new = self.export.problems[self._num_seen :]
        self._num_seen += len(new)
        for problem in new:
            self.report(problem)
        return found

    def report(self, problem: Problem) -> None:
        """Raise an error, or keep it and a warning for the log."""
        is_error = problem.kind.severity == "error"
        if is_error and envs.VLLM_QUARK_INT8_CHECKS == "error":
            raise problem.error
        self.problems.append(problem)

    def log(self) -> None:
        """Say once what was found of each kind."""
        by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            by_kind[problem.id].append(problem)
        for id, problems in by_kind.items():
            logger.warning_once(_in_words(id, problems))
        self.problems = []


def _in_words(id: str, problems: Sequence[Problem]) -> str:
    """One warning about all problems of a kind."""
    kind = KINDS[id]
    names = list(dict.fromkeys(problem.name for problem in problems))
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    seen = f"{', '.join(names[:_NUM_SHOWN])}{more}"
    if kind.severity == "warning":
        return f"Quark INT8: {kind.summary} ({id}): {seen}. {kind.why}"
    return (
        f"Quark INT8: ANSWERS WILL BE WRONG: {problems[0].error}. {kind.why} "
        f"({id}: {seen}; VLLM_QUARK_INT8_CHECKS=warn lets it pass)"
    )


def check_model(model_config: ModelConfig, quant_config: "QuarkConfig") -> None:
    """Look into the files of a model on disk while vLLM reads its config: nothing is
    started yet. Raises CheckpointError for damaged files."""
    config = quant_config.quant_config
    if not has_int8(config):
        return
    if Path(model_config.model).is_dir():
        read_checkpoint(Path(model_config.model))
    checks = Checks(model_config.model, model_config.revision, config)
    settings = model_config.hf_config.to_dict()
    for problem in (
        *number_problems(settings),
        *config_problems(config),
        *_architecture_problems(model_config),
    ):
        checks.report(problem)
    checks.log()
    quant_config.checks = checks


def _architecture_problems(model_config: ModelConfig) -> list[Problem]:
    """Whether vLLM's own code computes this architecture, where nobody asked for
    other code."""
    if (
        model_config.model_impl != "auto"
        or not model_config.using_transformers_backend()
    ):
        return []
    name = model_config.architectures[0]
    expected, found = "an architecture that this vLLM has", "none of that name"
    folder, media = Path(model_config.model), model_config.multimodal_config
    if media is None or not folder.is_dir():
        return [Problem("architecture-of-transformers", name, expected, found)]
    limits = media.limit_per_prompt.values()
    is_asked = not limits or any(getattr(each, "count", each) for each in limits)
    if is_asked and not any(folder.glob("*processor_config.json")):
        found += ", and no preprocessor_config.json for Transformers' code"
        return [Problem("architecture-missing", name, expected, found)]
    return [Problem("architecture-of-transformers", name, expected, found)]


def without_scheme(prefix: str, config: Config) -> NotImplementedError:
    """The error for a layer whose config asks for what vLLM cannot compute here."""
    parts = []
    for kind in ("weight", "input_tensors", "output_tensors", "bias"):
        part = config.get(kind)
        if isinstance(part, Mapping):
            how = "dynamic" if part.get("is_dynamic") else "static"
            parts.append(f"{kind} {part.get('dtype')} {part.get('qscheme')} {how}")
        elif part:
            parts.append(f"{kind} {part!r:.100}")
    return NotImplementedError(
        f"{prefix}: expected a scheme that vLLM has a kernel for on "
        f"{current_platform.device_type}, found {', '.join(parts)}; {EXPORT_AGAIN} "
        "with another scheme for it, or run it on another device"
    )


# --- once the model is built --------------------------------------------------------


def checked(loader: "DefaultModelLoader", model: Any, model_config: ModelConfig) -> Any:
    """The model, with a `load_weights` that checks what it loads where that is INT8."""
    if model_config.quantization is None:
        _refuse_int8_without_config(Path(model_config.model))
        return model
    checks = _checks_of(model, model_config)
    if checks is None:
        return model
    return _CheckedModel(model, model_config, checks)


def _refuse_int8_without_config(folder: Path) -> None:
    """A checkpoint that lost its quantization_config would be read as floats."""
    try:
        tensors = read_checkpoint(folder)
    except CheckpointError:
        return  # not known to be INT8, so left to the loader
    for tensor in int8_with_scales(tensors):
        expected = "a quantization_config in config.json, since it is stored as INT8"
        problem = of_tensor("config-lost", tensor, expected, "none")
        checks = Checks(str(folder), None, {})
        checks.report(problem)
        checks.log()
        return


def _checks_of(model: nn.Module, model_config: ModelConfig) -> Checks | None:
    """Those that the layers of the model asked while they were built."""
    for module in model.modules():
        quant_config = getattr(module, "quant_config", None)
        if (checks := getattr(quant_config, "checks", None)) is not None:
            return checks
    config = _quantization_config(model_config)
    if not has_int8(config):
        return None
    checks = Checks(model_config.model, model_config.revision, config)
    if (mapper := getattr(model, "hf_to_vllm_mapper", None)) is not None:
        checks.rename(mapper)
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for name, module in model.named_modules():
        checks.layer(module, name, packed)
    return checks


def _quantization_config(model_config: ModelConfig) -> Config:
    config = getattr(model_config.hf_config, "quantization_config", None)
    text = getattr(model_config.hf_config, "text_config", None)
    return config or getattr(text, "quantization_config", None) or {}


def _layers(
    model: nn.Module, checks: Checks
) -> Generator[tuple[str, Any, Layer], None, None]:
    """The layers of a model that the files hold weights for, INT8 ones and floats."""
    export = checks.export
    if export is None:
        return
    for prefix, module in model.named_modules():
        # A layer knows the name under which it asked.
        asked = getattr(module, "prefix", getattr(module, "layer_name", prefix))
        found = export.asked(asked) or export.asked(prefix)
        if found is not None and _is_int8(module) == (found.config is not None):
            yield prefix, module, found


def _is_int8(module: nn.Module) -> bool:
    """Whether a linear layer, or a layer of experts, holds INT8 weights."""
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "w13_weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.int8


def _check_shapes(model: nn.Module, checks: Checks) -> None:
    """Compare the shapes of weights with those of the layers that take them: a loader
    cuts its share out of a larger tensor without a word."""
    for prefix, module, layer in _layers(model, checks):
        if isinstance(module, FusedMoE):
            expected = [_expert_shapes(module, layer)] * len(layer.weights)
        else:
            expected = _linear_shapes(module, len(layer.weights))
        for stored, shapes in zip(layer.weights, expected, strict=False):
            shape = stored.weight.shape[-2:]
            if shape in shapes or (layer.config is None and _may_fit(shape, shapes)):
                continue
            wanted = " or ".join(str(list(each)) for each in sorted(shapes))
            found = f"{stored.weight.dtype} {list(stored.weight.shape)}"
            kind = "floats" if layer.config is None else "I8"
            expected_there = f"{kind} {wanted} for {prefix}"
            checks.report(
                of_tensor("weight-misshapen", stored.weight, expected_there, found)
            )


def _may_fit(shape: tuple[int, ...], shapes: set[tuple[int, ...]]) -> bool:
    """Whether a float weight may become one of these: models turn some around, or fill
    them up. What is larger either way would be cut."""
    return any(
        all(size <= limit for size, limit in zip(one, wanted, strict=True))
        for one in (shape, shape[::-1])
        for wanted in shapes
    )


def _linear_shapes(module: Any, count: int) -> list[set[tuple[int, ...]]]:
    """The shape [N, K] of each of the `count` weights of a linear layer in the
    checkpoint; empty where the layer is made of other parts, or its model has given the
    weight another shape, as that of a convolution."""
    if module.weight.ndim != 2:
        return []
    if hasattr(module, "total_num_kv_heads"):
        key = module.total_num_kv_heads * module.head_size
        value = module.total_num_kv_heads * getattr(
            module, "v_head_size", module.head_size
        )
        sizes = [module.total_num_heads * module.head_size, key, value]
    else:
        sizes = list(getattr(module, "output_sizes", [module.output_size]))
    if count == 1:
        sizes = [sum(sizes)]
    if len(sizes) != count:
        return []
    return [{(size, module.input_size)} for size in sizes]


def _expert_shapes(module: Any, layer: Layer) -> set[Any]:
    """The shapes [N, K] that the weights of an expert have in the checkpoint: gate, up
    and down, or gate and up as one."""
    width = module.moe_config.intermediate_size_per_partition_unpadded * module.tp_size
    hidden = module.moe_config.hidden_dim_unpadded
    shapes = {(hidden, width), (width, hidden)}
    names = (stored.weight.name.removesuffix(".weight") for stored in layer.weights)
    is_whole = len({name.rpartition(".")[2] for name in names}) == 3
    return shapes if is_whole else shapes | {(2 * width, hidden)}


def _count_problem(prefix: str, module: FusedMoE, layer: Layer) -> Problem | None:
    """Whether an expert of the model is missing: found before memory is taken for as
    many as config.json claims."""
    count = getattr(module, "logical_num_experts", None)
    if count is None:
        return None
    held: set[int] = set()
    for stored in layer.weights:
        if expert := expert_of(f"{stored.module}."):
            held.add(expert[1])
        elif len(stored.weight.shape) == 3:
            num_stacked = stored.weight.shape[0]
            if num_stacked < count:
                return _missing(prefix, count, num_stacked, num_stacked)
    missing = next((each for each in range(count) if each not in held), None)
    if not held or missing is None:
        return None
    return _missing(prefix, count, sum(each < count for each in held), missing)


def _missing(prefix: str, count: int, found: int, missing: int) -> Problem:
    expected = f"experts 0 to {count - 1}, as config.json has it"
    return Problem(
        "experts-miscounted", prefix, expected, f"{found}: {missing} is missing"
    )


# --- the numbers of scales and zero points ------------------------------------------


def _check_values(model: nn.Module, checks: Checks) -> None:
    """Scales are finite and above zero, ignored zero points are zero."""
    by_file: dict[Path, list[tuple[Stored, TensorInfo, str, bool]]] = defaultdict(list)
    for _, module, layer in _layers(model, checks):
        if layer.config is None:
            continue
        is_experts = isinstance(module, FusedMoE)
        for stored in layer.weights:
            for suffix, tensor in stored.companions.items():
                if suffix in SCALES or must_be_zero(suffix, is_experts, layer.config):
                    place = stored, tensor, suffix, is_experts
                    by_file[tensor.file].append(place)
    for file, found in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for stored, tensor, suffix, is_experts in found:
                values = stream.get_tensor(tensor.name)
                if suffix in SCALES:
                    problem = scale_problem(stored, tensor, values)
                else:
                    problem = _zero_point_problem(tensor, suffix, values, is_experts)
                if problem:
                    checks.report(problem)


def scale_problem(
    stored: Stored, tensor: TensorInfo, values: torch.Tensor
) -> Problem | None:
    """What is wrong with the numbers of a scale: [], [N], [N, 1] or with [E] before."""
    values = values.float()
    good = torch.isfinite(values) & (values > 0)
    if good.all():
        return None
    bad = ~good
    if torch.isfinite(values).all() and _holds_zeros(stored.weight, bad):
        found = f"{int(bad.sum())} of {bad.numel()}"
        return of_tensor("zero-channels", tensor, "scales above zero", found)
    where = bad.nonzero()[0].tolist()
    value = values[tuple(where)].item()
    return of_tensor(
        "scale-not-positive",
        tensor,
        "scales that are finite and above zero, but for channels of zeros",
        f"{value} at {where}, {int(bad.sum())} of {bad.numel()} such",
    )


def _holds_zeros(weight: TensorInfo, bad: torch.Tensor) -> bool:
    """Whether all channels of a weight are zeros whose scale is marked in `bad`."""
    with safe_open(weight.file, framework="pt") as stream:
        values = stream.get_tensor(weight.name)
    if bad.ndim and bad.shape[-1] == 1 and bad.ndim == values.ndim:
        bad = bad.squeeze(-1)
    if bad.numel() == 1:
        return not values.count_nonzero()
    return not values[bad].count_nonzero()


def _zero_point_problem(
    tensor: TensorInfo, suffix: str, values: torch.Tensor, is_experts: bool
) -> Problem | None:
    if not values.count_nonzero():
        return None
    what = "weights" if suffix == ZERO_POINT else "activations"
    of = "experts" if is_experts else "linear layers"
    where = values.nonzero()[0].tolist()
    return of_tensor(
        "zero-point-not-zero",
        tensor,
        f"zero points of 0: INT8 kernels ignore those of {what} of {of}",
        f"{int(values[tuple(where)])} at {where}",
    )


# --- while the weights are loaded ---------------------------------------------------


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


class _CheckedModel:
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
        _check_shapes(self._model, checks)
        _check_values(self._model, checks)
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

    def _is_int8(self, parameter: str) -> bool:
        return _is_int8(self._modules[parameter.rpartition(".")[0]])

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
                isinstance(module, FusedMoE) and _is_int8(module)
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
            isinstance(module, FusedMoE)
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
