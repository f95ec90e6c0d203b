# SPDX-License-Identifier: Apache-2.0
"""No silence while a Quark INT8 checkpoint is loaded.

`check_folder` judges the files before a model is built: damage, layout, scales and zero
points. `checked` judges the loading itself: every tensor is taken by a parameter
of its kind, and every element of a parameter is filled. Both end in a CheckpointError
that names the tensor, what was expected, what was found and a remedy. Checkpoints
without INT8 weights are left as upstream has them.
"""

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.checkpoint import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    TensorInfo,
    misfit,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.layout import (
    COMPANIONS,
    EXPORT_AGAIN,
    SCALES,
    WEIGHT,
    ZERO_POINT,
    Layout,
    check_config,
    expert_of,
    first_value,
    int8_with_scales,
    layer_index,
)
from vllm.model_executor.layers.quantization.quark.rules import (
    EXPERT_PROJECTIONS,
    Config,
    has_int8,
)
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

Weights = Iterable[tuple[str, torch.Tensor]]

# Buffers of rotary embeddings, which vLLM computes.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
# Parameters that an export need not hold: zero points of symmetric quantization, and
# scales of the key/value cache.
_OPTIONAL = re.compile(r"(zero_point|\.(q|k|v|prob)_scale)$")
_LAYER = re.compile(r"\.layers\.\d+\.")
# Beyond, handing a tensor to a thread takes less time than looking at it.
_LARGE_BYTES = 1 << 20
_CHECKED_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


# --- before the model is built ----------------------------------------------------


def check_model(
    model: str, config: dict[str, Any], hf_config: PretrainedConfig | None
) -> None:
    """`check_folder` for a model on disk, while vLLM reads its config: nothing is
    started yet. Of what passes, `exclude` gets full names beside patterns. A model that
    is to be downloaded is checked by `checked`."""
    if hf_config is None or not Path(model).is_dir():
        return
    if layout := check_folder(Path(model), config, hf_config.to_dict()):
        config["exclude"] = layout.full_names()


def check_folder(
    folder: Path, config: Config, model: Mapping[str, Any]
) -> Layout | None:
    """Raise CheckpointError or ValueError for what vLLM would read wrong.

    config: the quantization_config; model: config.json as a whole. Reads the files'
    headers, and of the tensors the scales and zero points alone. Returns what they
    hold; None without INT8, and for a folder without safetensors, which is left to the
    loader.
    """
    if not has_int8(config):
        return None
    check_config(config)
    tensors = read_checkpoint(folder)
    if not tensors:
        return None
    layout = Layout(tensors, config, model)
    layout.check()
    _check_values(layout)
    return layout


def _check_values(layout: Layout) -> None:
    """Scales are finite and above zero, ignored zero points are zero."""
    by_file: dict[Path, list[tuple[TensorInfo, str, bool]]] = defaultdict(list)
    for name, module, suffix in layout.checked_companions():
        tensor = module[suffix]
        fused = layout.experts_prefix(name, module) is not None
        by_file[tensor.file].append((tensor, suffix, fused))
    for file, found in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for tensor, suffix, fused in found:
                values = stream.get_tensor(tensor.name)
                if suffix in SCALES:
                    _check_scale(tensor, values)
                elif values.count_nonzero():
                    _refuse_zero_point(tensor, suffix, values, fused)


def _check_scale(tensor: TensorInfo, values: torch.Tensor) -> None:
    values = values.float()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = values[tuple(where)].item()
        raise misfit(
            f"{tensor.name} ({tensor})",
            "scales that are finite and above zero",
            f"{value} at {where}, {int(bad.sum())} of {bad.numel()} such",
            f"{EXPORT_AGAIN}: a layer that saw no data has no scale",
        )


def _refuse_zero_point(
    tensor: TensorInfo, suffix: str, values: torch.Tensor, fused: bool
) -> None:
    what = "weights" if suffix == ZERO_POINT else "activations"
    of = "experts" if fused else "linear layers"
    where = values.nonzero()[0].tolist()
    raise misfit(
        f"{tensor.name} ({tensor})",
        f"zero points of 0: INT8 kernels ignore those of {what} of {of}",
        f"{int(values[tuple(where)])} at {where}",
        f"{EXPORT_AGAIN} with symmetric {what}",
    )


# --- the shapes that a built model takes --------------------------------------------


def _expected_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Module in the checkpoint -> shape of its weight, module of vLLM that takes it."""
    packed = getattr(model, "packed_modules_mapping", {})
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, FusedMoE) and _is_int8(module):
            shapes |= _expected_experts(prefix, module)
        elif isinstance(module, LinearBase) and _is_matrix(module):
            parent, _, name = prefix.rpartition(".")
            shards = packed.get(name, [name])
            sizes = _output_sizes(module)
            if len(shards) == len(sizes):
                for shard, size in zip(shards, sizes, strict=True):
                    shapes[f"{parent}.{shard}"] = (size, module.input_size), prefix
    return shapes


def _output_sizes(module: LinearBase) -> list[int]:
    """Rows of each shard of a linear layer in the checkpoint."""
    if hasattr(module, "total_num_kv_heads"):
        key_value = module.total_num_kv_heads * module.head_size
        value = module.total_num_kv_heads * getattr(
            module, "v_head_size", module.head_size
        )
        return [module.total_num_heads * module.head_size, key_value, value]
    return list(getattr(module, "output_sizes", [module.output_size]))


def _expected_experts(
    prefix: str, module: FusedMoE
) -> dict[str, tuple[tuple[int, ...], str]]:
    width = module.moe_config.intermediate_size_per_partition_unpadded * module.tp_size
    hidden, count = module.moe_config.hidden_dim_unpadded, module.logical_num_experts
    parent = prefix.rpartition(".")[0]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for gate, up, down in EXPERT_PROJECTIONS:
        for name, shape in {
            gate: (width, hidden),
            up: (width, hidden),
            down: (hidden, width),
        }.items():
            shapes[f"{parent}.{name}"] = (count, *shape), prefix
            for expert in range(count):
                shapes[f"{prefix}.{expert}.{name}"] = shape, prefix
    return shapes


def _is_matrix(module: LinearBase) -> bool:
    """Whether a linear layer's weight is as in the checkpoint: [N, K], not packed."""
    return _is_int8(module) or isinstance(module.quant_method, UnquantizedLinearMethod)


def _is_int8(module: nn.Module) -> bool:
    """Whether a linear layer, or a layer of experts, holds INT8 weights."""
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "w13_weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.int8


def check_shapes(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError for what a built model shows of the files' headers: a
    weight of another shape or dtype than the layer that takes it, and a tensor that one
    layer lacks and others have. Names that a model's loader makes up are left to it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    shapes = _expected_shapes(model)
    found: dict[str, TensorInfo] = {}
    for tensor in tensors.values():
        for name in mapper.apply_list([tensor.name]) if mapper else [tensor.name]:
            found[name] = tensor
    for name, tensor in found.items():
        module, _, suffix = name.rpartition(".")
        if suffix != WEIGHT or module not in shapes:
            continue
        shape, prefix = shapes[module]
        dtype = "I8" if _is_int8(model.get_submodule(prefix)) else "floating-point"
        is_dtype = (tensor.dtype == "I8") == (dtype == "I8")
        if not is_dtype or tensor.shape != shape:
            raise misfit(
                f"{tensor.name} ({tensor.file.name})",
                f"{dtype} {list(shape)} for {prefix}",
                f"{tensor.dtype} {list(tensor.shape)}",
                "correct config.json so that it fits the weights, or export again",
            )
    kinds = {_kind(name) for name in found}
    for name in _checkpoint_names(model):
        if name not in found and _kind(name) in kinds and not _OPTIONAL.search(name):
            remedy = f"{EXPORT_AGAIN}, or download the shard that has it"
            raise misfit(name, "it in every such layer", "no such tensor", remedy)


def _kind(name: str) -> str:
    """The name without its layer's number."""
    return _LAYER.sub(".layers.*.", name)


def _checkpoint_names(model: nn.Module) -> Iterable[str]:
    """Names that the parameters of a model have in its checkpoint, but for experts."""
    packed = getattr(model, "packed_modules_mapping", {})
    modules = dict(model.named_modules())
    for name, _ in model.named_parameters():
        prefix, _, suffix = name.rpartition(".")
        parent, _, last = prefix.rpartition(".")
        if not isinstance(modules[prefix], FusedMoE):
            for shard in packed.get(last, [last]):
                yield f"{parent}.{shard}.{suffix}" if parent else name


# --- while the weights are loaded ---------------------------------------------------


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        return
    # One pass: NaN is both the least and the greatest of numbers that hold it.
    least, greatest = tensor.aminmax()
    if least.isfinite() and greatest.isfinite():
        return
    bad = ~tensor.isfinite()
    where = bad.nonzero()[0].tolist()
    found = f"{tensor[tuple(where)].item()} at {where}, {int(bad.sum())} such"
    raise misfit(name, "finite numbers", found, DOWNLOAD_AGAIN)


def _looked_at(weights: Weights) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The weights, of which large ones are looked at while they are copied to a GPU."""
    with ThreadPoolExecutor(1) as thread:
        for name, tensor in weights:
            if tensor.dtype not in _CHECKED_FLOATS:
                yield name, tensor
            elif tensor.nbytes < _LARGE_BYTES or current_platform.is_cpu():
                _check_finite(name, tensor)
                yield name, tensor
            else:
                found = thread.submit(_check_finite, name, tensor)
                yield name, tensor
                found.result()


class _Watch:
    """Sees every write into a parameter while weights are loaded.

    A parameter is known by its memory: `weight_loader`s write into views of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.numel()
        }
        spans = sorted(
            (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, name)
            for name, parameter in self.parameters.items()
        )
        self.starts = [start for start, _, _ in spans]
        self.spans = spans
        # Parameter -> the parts of it that were written, each once.
        self.written: dict[str, dict[tuple, int]] = defaultdict(dict)
        self.current: tuple[str, torch.Tensor] | None = None
        self.pending: dict[str, tuple[int, int]] = {}
        self.is_taken = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stand in for the methods of tensors that write.

        A TorchDispatchMode would see more, and take longer than all else that is
        done for an expert: loaders make several views for each write.
        """
        replaced = {
            "copy_": self._copying(torch.Tensor.copy_),
            "fill_": self._filling(torch.Tensor.fill_),
            "zero_": self._filling(torch.Tensor.zero_),
            "__setitem__": self._setting(torch.Tensor.__setitem__),
        }
        own = {name: torch.Tensor.__dict__.get(name) for name in replaced}
        for name, method in replaced.items():
            setattr(torch.Tensor, name, method)
        try:
            yield
        finally:
            for name, before in own.items():
                if before is None:
                    delattr(torch.Tensor, name)
                else:
                    setattr(torch.Tensor, name, before)

    def _copying(self, copy: Callable) -> Callable:
        def copy_(target, source, *args, **kwargs):
            self._note(target, source)
            return copy(target, source, *args, **kwargs)

        return copy_

    def _filling(self, fill: Callable) -> Callable:
        def fill_(target, *args, **kwargs):
            self._note(target)
            return fill(target, *args, **kwargs)

        return fill_

    def _setting(self, set_item: Callable) -> Callable:
        def __setitem__(tensor, index, value):
            source = value if isinstance(value, torch.Tensor) else None
            part = tensor[index]
            if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                self._note(part, source)
            else:  # a copy: the index names single elements
                self._note(tensor, number=part.numel())
            return set_item(tensor, index, value)

        return __setitem__

    def _note(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None = None,
        number: int | None = None,
    ) -> None:
        """Something, or a copy of `source`, is written to all of the target, or to this
        number of its elements."""
        if not target.numel():
            return
        address = target.data_ptr()
        index = bisect_right(self.starts, address) - 1
        if index < 0 or address >= self.spans[index][1]:
            return
        start, _, name = self.spans[index]
        if source is not None:
            self._check_dtype(name, target, source)
        part = (address - start, tuple(target.shape), target.stride())
        self.written[name][part] = target.numel() if number is None else number
        self.is_taken = True
        if source is not None and self.pending:
            read = source.data_ptr()
            for waiting, (first, last) in list(self.pending.items()):
                if first <= read < last:
                    del self.pending[waiting]

    def _check_dtype(
        self, name: str, target: torch.Tensor, source: torch.Tensor
    ) -> None:
        if target.dtype == source.dtype or "zero_point" in name:
            return
        if target.is_floating_point() and source.is_floating_point():
            return
        tensor = self.current[0] if self.current else "a tensor of the checkpoint"
        remedy = (
            "correct exclude in config.json, so that it names exactly the modules "
            "that were not quantized, or export again"
        )
        raise misfit(tensor, f"{target.dtype} for {name}", str(source.dtype), remedy)

    def watch(
        self, weights: Weights
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Pass the weights on, with [N, 1] scales as [N], and see who takes them."""
        for name, tensor in _looked_at(weights):
            if name.endswith(COMPANIONS) and tensor.ndim > 1 and tensor.shape[-1] == 1:
                tensor = tensor.squeeze(-1)
            self.current, self.is_taken = (name, tensor), False
            yield name, tensor
            if not self.is_taken and tensor.numel():
                address = tensor.data_ptr()
                self.pending[name] = address, address + tensor.nbytes
        self.current = None


def checked(loader: "DefaultModelLoader", model: Any, model_config: ModelConfig) -> Any:
    """The model, with a `load_weights` that checks what it loads where that is INT8.

    It raises CheckpointError for a tensor that no parameter took, a parameter that no
    tensor filled, and a tensor of another kind than its parameter; where a weight
    loader fails, it names the tensor.
    """
    if model_config.quantization is None:
        _refuse_int8_without_config(Path(model_config.model))
    config = _quantization_config(model_config)
    if not has_int8(config):
        return model
    folder = Path(model_config.model)
    if not folder.is_dir():
        name, revision = model_config.model, model_config.revision
        folder = Path(loader._prepare_weights(name, None, revision, True, None)[0])
        check_folder(folder, config, model_config.hf_config.to_dict())
    tensors = read_checkpoint(folder)
    check_shapes(model, tensors)
    return _CheckedModel(model, model_config, tensors)


def _refuse_int8_without_config(folder: Path) -> None:
    """A checkpoint that lost its quantization_config would be read as floats."""
    try:
        tensors = read_checkpoint(folder)
    except CheckpointError:
        return  # not known to be INT8, so left to the loader
    for tensor in int8_with_scales(tensors):
        raise misfit(
            f"{tensor.name} ({tensor})",
            "a quantization_config in config.json, since it is stored as INT8",
            "none",
            "copy config.json from the export",
        )


class _CheckedModel:
    """Everything of a model but `load_weights`."""

    def __init__(
        self, model: Any, model_config: ModelConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self._model, self._config, self._tensors = model, model_config, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Weights) -> set[str] | None:
        watch = _Watch(self._model)
        try:
            with watch.watching():
                loaded = self._model.load_weights(watch.watch(weights))
        except (
            AssertionError,
            IndexError,
            KeyError,
            RuntimeError,
            ValueError,
        ) as error:
            known = isinstance(error, (CheckpointError, torch.OutOfMemoryError))
            if watch.current is None or known:
                raise
            raise self._failed(watch.current, error) from error
        # Multi-token prediction is loaded from the model's own checkpoint.
        if getattr(self._config, "runner", None) != "draft":
            _check_taken(self._model, self._config, watch, self._tensors)
        _check_filled(self._model, watch, loaded or set())
        return loaded

    def _failed(
        self, current: tuple[str, torch.Tensor], error: Exception
    ) -> CheckpointError:
        name, tensor = current
        file = f" ({self._tensors[name].file.name})" if name in self._tensors else ""
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        return misfit(
            f"{name}{file}",
            f"a tensor that {type(self._model).__name__} can take",
            f"{tensor.dtype} {list(tensor.shape)}: {why}",
            f"{EXPORT_AGAIN}, or correct config.json",
        )


def _quantization_config(model_config: ModelConfig) -> Config:
    config = getattr(model_config.hf_config, "quantization_config", None)
    text = getattr(model_config.hf_config, "text_config", None)
    return config or getattr(text, "quantization_config", None) or {}


def _check_taken(
    model: nn.Module,
    model_config: ModelConfig,
    watch: _Watch,
    tensors: Mapping[str, TensorInfo],
) -> None:
    config = model_config.hf_config.to_dict()
    depth = first_value(config, "num_hidden_layers")
    is_tied = bool(first_value(config, "tie_word_embeddings"))
    shares_experts = any(
        isinstance(module, FusedMoE)
        and module.local_num_experts < module.global_num_experts
        for module in model.modules()
    )
    for name in watch.pending:
        index = layer_index(name)
        if name.endswith(_COMPUTED) or (is_tied and name.startswith("lm_head.")):
            continue
        if index is not None and depth is not None and index >= depth:
            continue  # multi-token prediction
        if is_pp_missing_parameter(name, model):
            continue  # another pipeline rank's
        if shares_experts and expert_of(name):
            continue  # another expert-parallel rank's; what is here gets filled
        if index is None and not name.endswith(COMPANIONS):
            continue  # outside the decoder, such as a vision tower that is not used
        where = f" ({tensors[name]})" if name in tensors else ""
        raise misfit(
            f"{name}{where}",
            f"a parameter of {type(model).__name__} that takes it",
            "none: it would be left out",
            "correct the tensor's name or config.json, or export again",
        )


def _check_filled(model: nn.Module, watch: _Watch, loaded: set[str]) -> None:
    modules = dict(model.named_modules())
    for name, parameter in watch.parameters.items():
        if _OPTIONAL.search(name):
            continue
        filled = sum(watch.written[name].values()) if name in watch.written else 0
        if filled >= parameter.numel():
            continue
        module = modules[name.rpartition(".")[0]]
        whole = isinstance(module, LinearBase) or (
            isinstance(module, FusedMoE) and _is_int8(module)
        )
        if not whole and (filled or name in loaded):
            continue
        share = f"{filled} of {parameter.numel()} numbers"
        raise misfit(
            f"{name} {list(parameter.shape)}",
            "tensors of the checkpoint that fill it",
            "none"
            if not filled
            else share + _first_gap(parameter, watch.written[name]),
            f"{EXPORT_AGAIN}, with all tensors that config.json speaks of",
        )


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
