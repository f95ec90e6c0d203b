# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a vLLM's own model makes of a checkpoint's tensors, without their bytes.

    python -m vllm.model_executor.layers.quantization.quark.dry_run < QUESTIONS

QUESTIONS is a JSON list of objects: `folder`, where config.json lies, and `tensors`,
name -> [dtype, shape, file]. The model is built on torch's meta device, where tensors
have no memory, and its own `load_weights` is given tensors that have a dtype and a
shape alone. It is done twice.

- For the structure: `_Recorder` takes the place of the quantization config, notes what
  each layer asks of it and leaves all of them unquantized. So it does not matter what
  is wrong with the quantization.
- As the engine does it, with the checkpoint's own quantization config, and in the fork
  with the engine's checks, whose problems are collected.

What is written, a JSON list, says which module takes which tensor, what it asks, how
it is quantized, and how far the model got. The vLLM may be a release without the fork.
It is meant to be a process of its own, with bounds on time and memory, without network
and without code of the checkpoint: `dry_run` starts it so. Nothing of torch or vLLM is
needed for that.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization.quark.checkpoint import TensorInfo

Tensors = Mapping[str, "TensorInfo"]

SECONDS = 180.0
# What the process may take beyond what it has once vLLM is imported.
NUM_BYTES = 8 << 30
QUARK = "vllm.model_executor.layers.quantization.quark"
STAGES = ("config", "architecture", "build", "load")

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}
# What belongs to a quantization, which the structure of a model has nothing of.
_QUANTIZATION = ("_scale", "_zero_point", ".scale", ".zero_point")
# What a layer is to a quantization config, by its bases' names: their modules move
# between releases. The most special base counts.
_KINDS = {
    "FusedMoE": "experts",
    "RoutedExperts": "experts",
    "LinearBase": "linear",
    "ParallelLMHead": "head",
    "VocabParallelEmbedding": "embedding",
    "Attention": "attention",
    "MLAAttention": "attention",
}


def is_structure(name: str) -> bool:
    """Whether a tensor belongs to the structure of a model, by its name, and not to a
    quantization of it."""
    return not name.endswith(_QUANTIZATION)


# --- what is told -------------------------------------------------------------------


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


# --- the process: what stands in for what ---------------------------------------------


def _kind(module: "nn.Module") -> str:
    bases = [each.__name__ for each in type(module).__mro__]
    return next((_KINDS[each] for each in bases if each in _KINDS), "other")


def _make_recorder() -> Any:
    """A quantization config that quantizes nothing and notes what it is asked."""
    import torch
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Recorder(QuantizationConfig):
        def __init__(self) -> None:
            super().__init__()
            self.asked: dict[int, dict[str, Any]] = {}
            self.mappers: list[dict[str, Any]] = []

        def get_name(self):
            return "quark"

        def get_supported_act_dtypes(self):
            return [torch.float16, torch.bfloat16, torch.float32]

        @classmethod
        def get_min_capability(cls):
            return 0

        @staticmethod
        def get_config_filenames():
            return []

        @classmethod
        def from_config(cls, config):
            return cls()

        def apply_vllm_mapper(self, hf_to_vllm_mapper):
            found = {}
            for part in ("regex", "substr", "prefix", "suffix"):
                renames = getattr(hf_to_vllm_mapper, f"orig_to_new_{part}", None) or {}
                found[part] = [
                    [getattr(old, "pattern", old), new] for old, new in renames.items()
                ]
            self.mappers.append(found)

        def get_quant_method(self, layer, prefix):
            packed = self.packed_modules_mapping.get(prefix.rpartition(".")[2])
            self.asked[id(layer)] = {
                "prefix": prefix,
                "packed": list(packed) if packed else None,
                "mappers": len(self.mappers),
            }
            kind = _kind(layer)
            if kind == "linear":
                return UnquantizedLinearMethod()
            if kind == "experts":
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return None

    return Recorder()


@contextmanager
def _in_place_of(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """An attribute of a module, class or object that has another value for a while."""
    had, before = name in vars(owner), getattr(owner, name, None)
    before = vars(owner)[name] if had else before
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _quantized_by(quant_config: Any) -> Generator[None, None, None]:
    """Configs of the engine get this quantization config, whatever the folder says."""
    from vllm.config import VllmConfig

    ours = staticmethod(lambda model_config, load_config: quant_config)
    with (
        _in_place_of(VllmConfig, "_get_quantization_config", ours),
        # Asked by models that load a second one.
        _in_place_of(VllmConfig, "get_quantization_config", ours),
    ):
        yield


class _AnyAttentionImpl:
    """Attention that is built and computes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _any_platform(lacks: list[str]) -> Generator[None, None, None]:
    """Of attention that a platform lacks, `lacks` gets its error; the model is built
    all the same, since nothing of it is computed."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    # Of another model that was asked before.
    selector._cached_get_attn_backend.cache_clear()
    before = current_platform.get_attn_backend_cls

    def get_attn_backend_cls(*args, **kwargs):
        try:
            return before(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            if str(error) not in lacks:
                lacks.append(str(error))
            return _any_attention()

    from vllm.model_executor.layers.attention import mla_attention

    prefill = "get_mla_prefill_backend"  # from 0.22 on
    stands_in = hasattr(mla_attention, prefill) and not current_platform.is_cuda_alike()
    with (
        _in_place_of(current_platform, "get_attn_backend_cls", get_attn_backend_cls),
        _in_place_of(mla_attention, prefill, lambda config: _AnyAttentionImpl)
        if stands_in
        else nullcontext(),
    ):
        yield


def _any_attention() -> str:
    """The name by which vLLM finds a backend for `_AnyAttentionImpl`."""
    try:
        from vllm.v1.attention.backend import AttentionBackend
    except ImportError:  # before 0.20
        from vllm.attention.backends.abstract import AttentionBackend

    class AnyAttention(AttentionBackend):
        get_name = staticmethod(lambda: "ANY")
        get_impl_cls = staticmethod(lambda: _AnyAttentionImpl)

    globals()["AnyAttention"] = AnyAttention
    return f"{__name__}.AnyAttention"


def _make_given() -> Any:
    """A kind of tensor that knows from which tensors of the checkpoint it was made."""
    import torch

    class Given(torch.Tensor):
        origins: frozenset[str] = frozenset()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            made = [x for x in _flat(result) if isinstance(x, cls)]
            if any(not each.origins for each in made):
                every = [*_flat(args), *_flat(list((kwargs or {}).values()))]
                found = (x.origins for x in every if isinstance(x, cls))
                origins = frozenset[str]().union(*found)
                for each in made:
                    each.origins = each.origins or origins
            return result

    return Given


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _make_watch() -> Any:
    """The engine's Watch, for tensors without numbers."""
    from vllm.model_executor.layers.quantization.quark.watch import Watch

    class MetaWatch(Watch):
        def _read(self, parameter: str, source: Any) -> str:
            origins = getattr(source, "origins", ())
            for name in origins:
                self.taken[name].add(parameter)
                self._left.pop(name, None)
            return min(origins) if origins else super()._read(parameter, source)

        def _copying(self, copy: Callable) -> Callable:
            def copy_shape(target, source, *args, **kwargs):
                if source.is_meta and not target.is_meta:
                    # Made on a device by name; there are no numbers to copy.
                    source.expand(target.shape)
                    return target
                return copy(target, source, *args, **kwargs)

            return super()._copying(copy_shape)

        def _setting(self, set_item: Callable) -> Callable:
            def set_shape(tensor, index, value):
                if getattr(value, "is_meta", False) and not tensor.is_meta:
                    value.expand(tensor[index].shape)
                    return None
                return set_item(tensor, index, value)

            return super()._setting(set_shape)

    return MetaWatch


def _given(headers: Mapping[str, Any]) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    made = _make_given()
    for name, (dtype, shape, *_) in headers.items():
        kind = getattr(torch, _DTYPES[dtype])
        tensor = torch.empty(shape, dtype=kind, device="meta").as_subclass(made)
        tensor.origins = frozenset([name])
        yield name, tensor


# --- the process: one model -----------------------------------------------------------


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
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{folder}/meeting-point",
            local_rank=0,
            backend="gloo",
        )
        parallel_state.ensure_model_parallel_initialized(1, 1)


def _modules(model: "nn.Module", asked: Mapping[int, Any]) -> dict[str, Any]:
    """What is known of each module that asked, or that has parameters."""
    found = {}
    nothing = {"prefix": None, "packed": None, "mappers": 0}
    for name, module in model.named_modules(remove_duplicate=False):
        parameters = {
            each: list(tensor.shape)
            for each, tensor in module.named_parameters(recurse=False)
        }
        if not parameters and id(module) not in asked:
            continue
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None)
        found[name] = {
            **asked.get(id(module), nothing),
            "kind": _kind(module),
            "class": type(module).__name__,
            "parameters": parameters,
            "experts": getattr(module, "logical_num_experts", None)
            or getattr(module, "global_num_experts", None),
            "method": "" if method is None else type(method).__name__,
            "scheme": "" if scheme is None else type(scheme).__name__,
        }
    return found


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
    with nullcontext() if recorder is None else _quantized_by(recorder):
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
            _any_platform(said.setdefault("lacks", [])),
            set_default_torch_dtype(config.model_config.dtype),
            torch.device("meta"),
        ):
            model = initialize_model(vllm_config=config)
    said["modules"] = _modules(model, {} if recorder is None else recorder.asked)
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

    class Kept(_make_watch()):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    load_checks = _load_checks() if is_engine else None
    if load_checks is not None:
        with _in_place_of(load_checks, "Watch", Kept):
            checked = load_checks.checked(None, model, config.model_config)
            if checked is not model:
                checked.load_weights(_given(headers))
                return made[-1]
    if not is_engine:
        headers = {name: headers[name] for name in filter(is_structure, headers)}
    watch = Kept(model, lambda write: None)
    with watch.watching():
        model.load_weights(watch.watch(_given(headers)))
    return watch


def _load_checks() -> Any:
    """The engine's checks; None in a vLLM that has none."""
    from vllm.model_executor.layers.quantization import quark

    if not Path(quark.__path__[0], "load_checks.py").exists():
        return None
    from vllm.model_executor.layers.quantization.quark import load_checks

    return load_checks


@contextmanager
def _collected(
    headers: Mapping[str, Any], problems: list[dict[str, str]]
) -> Generator[None, None, None]:
    """The engine's checks note their problems there instead of raising the first, know
    the tensors by HEADERS and do not look at numbers."""
    load_checks = _load_checks()
    if load_checks is None:
        yield
        return
    from vllm.model_executor.layers.quantization.quark.checkpoint import TensorInfo

    tensors = {
        name: TensorInfo(name, dtype, tuple(shape), Path(file), 0, 0)
        for name, (dtype, shape, file) in headers.items()
    }

    def report(self: Any, problem: Any) -> None:
        problems.append({key: getattr(problem, key) for key in _PROBLEM})

    is_harmless = load_checks._CheckedModel._is_harmless

    def is_harmless_if_there(self: Any, tensor: Any) -> bool:
        try:
            return is_harmless(self, tensor)
        except (OSError, ValueError, RuntimeError):
            return False

    with (
        _in_place_of(load_checks, "read_checkpoint", lambda folder: tensors),
        _in_place_of(load_checks, "_check_values", lambda *_: None),
        _in_place_of(load_checks.Checks, "report", report),
        _in_place_of(load_checks._CheckedModel, "_is_harmless", is_harmless_if_there),
    ):
        yield


_PROBLEM = ("id", "name", "expected", "found", "remedy", "where")


def _try(folder: str, headers: Mapping[str, Any], is_engine: bool) -> dict[str, Any]:
    """What one pass says. A model of images and text that does not load is tried
    without its images as well, as `language_model_only` runs it."""
    said: dict[str, Any] = {}
    for only_text in (False, True):
        now: dict[str, Any] = {}
        problems: list[dict[str, str]] = []
        recorder = None if is_engine else _make_recorder()
        try:
            with _collected(headers, problems) if is_engine else nullcontext():
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
    """What this process writes."""
    import vllm
    from vllm.model_executor.layers.quantization import quark
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    # A release of vLLM has the folder, but not all of its modules.
    here = str(Path(__file__).parent)
    if here not in quark.__path__:
        quark.__path__.append(here)
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


def main() -> None:
    # vLLM logs to the standard output.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        json.dump(look(json.load(sys.stdin)), out)
    # Threads of vLLM's have nothing more to do.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    # Modules beside this file have names of others'.
    sys.path[:] = [p for p in sys.path if Path(p).absolute() != Path(__file__).parent]
    main()
