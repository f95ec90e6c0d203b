# SPDX-License-Identifier: Apache-2.0
"""Exports as people have them, which the fork must load as stock does, or refuse by a
name that helps. Each is built, loaded and looked at in this process; that families
answer right is shown by test_quark_families.py and `make matrix`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_KERNELS
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.load_checks import checks, files
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.fixtures.families import BY_NAME, make_export
from tests.quantization import exports
from tests.quantization.exports import PER_EXPERT, STACKED

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.usefixtures("one_thread")]

Tensors = dict[str, Tensor]
Quark = dict[str, Any]
Edit = Callable[[Tensors, Quark, dict[str, Any]], None]


def nothing(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    """Leave the export as it is."""


@dataclass(frozen=True)
class Case:
    """`export` is of the small Step-3.5, or `family--export`. What is done to it; the
    kinds of warnings; the modules of vLLM that must be floats; or the error."""

    export: str
    edit: Edit = nothing
    warns: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    refused: str = ""
    files: Callable[[Path, Tensors], None] | None = None
    env: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        with torch.device("cpu"):
            return self._write(folder)

    def _write(self, folder: Path) -> Path:
        family, _, name = self.export.partition("--")
        if name:
            made = make_export(BY_NAME[family], name)
            made.write(folder)
            tensors, config = dict(made.weights), made.config
        else:
            step = exports.Export(self.export)
            step.write(folder)
            tensors, config = step.tensors, step.config
        self.edit(tensors, config["quantization_config"], config)
        (folder / "config.json").write_text(json.dumps(config))
        for file in folder.glob("model*.safetensors"):
            file.unlink()
        if self.files:
            self.files(folder, tensors)
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


# --- what is done to exports ----------------------------------------------------------


def exclude(*entries: str) -> Edit:
    return lambda tensors, quark, config: quark["exclude"].extend(entries)


def cache_scales(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    """An FP8 key/value cache, as Quark writes it beside INT8 weights."""
    output = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    quark["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    for name in ("*k_proj", "*v_proj"):
        scheme = quark["global_quant_config"] | {"output_tensors": dict(output)}
        quark["layer_quant_config"][name] = scheme
    for name in [n for n in tensors if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        tensors[name.replace("weight", "output_scale")] = torch.tensor(0.5)


def as_float(*parts: str) -> Edit:
    """Store INT8 modules as floats, and name each in exclude."""

    def edit(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            module = name.removesuffix(".weight_scale")
            if any(part in name for part in parts):
                scale = tensors.pop(name)
                weight = tensors[f"{module}.weight"] * scale[..., None]
                tensors[f"{module}.weight"] = weight.bfloat16()
                quark["exclude"].append(module)

    return edit


def without_scheme(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    as_float("o_proj")(tensors, quark | {"exclude": []}, config)
    quark["layer_quant_config"]["*o_proj"] = {"weight": None, "input_tensors": None}


def identity(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    """Overrides that say once more what the global scheme says, of another observer."""
    again = json.loads(json.dumps(quark["global_quant_config"]))
    again["weight"]["observer_cls"] = "PerChannelMinMaxObserver"
    quark["layer_quant_config"] |= {"*qkv_proj": again, "*k_proj": again}


def quantizer_names(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        new = name.replace(".weight_scale", ".weight_quantizer.scale")
        tensors[new] = tensors.pop(name)


def rotation(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    quark["algo_config"] = [
        {"name": "rotation", "r1": True, "online_r1_rotation": True}
    ]


def rotated_weights(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    """A rotation that is in the weights alone."""
    quark["algo_config"] = [{"name": "rotation", "r1": True, "r2": True, "r4": False}]


def fp8_attention(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    part = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "symmetric": True}
    scheme = {"weight": part | {"is_dynamic": False}}
    scheme["input_tensors"] = part | {"is_dynamic": True}
    quark["layer_quant_config"]["*self_attn*"] = scheme
    for name in [n for n in tensors if ".self_attn." in n and "weight" in n]:
        is_scale = name.endswith("scale")
        tensors[name] = (
            torch.tensor(0.5) if is_scale else tensors[name].to(torch.float8_e4m3fn)
        )


def set_export(key: str, value: object) -> Edit:
    return lambda tensors, quark, config: quark["export"].update({key: value})


def renamed(tensors: Tensors, quark: Quark, config: dict[str, Any]) -> None:
    config["architectures"] = ["Step3p9ForConditionalGeneration"]


# --- how they are stored --------------------------------------------------------------


def in_two_files(same: bool) -> Callable[[Path, Tensors], None]:
    def write(folder: Path, tensors: Tensors) -> None:
        """Both are in the index, and hold one tensor each of them."""
        first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002."
        second += "safetensors"
        names = sorted(tensors)
        twice = next(name for name in names if tensors[name].dtype == torch.int8)
        halves = [dict.fromkeys(names[::2]), dict.fromkeys(names[1::2])]
        weight_map = dict.fromkeys(halves[0], first) | dict.fromkeys(halves[1], second)
        for half, file in zip(halves, (first, second), strict=True):
            held = {name: tensors[name] for name in {*half, twice}}
            if weight_map[twice] != file and not same:
                held[twice] = held[twice] ^ 1
            save_file(held, folder / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def with_mark(folder: Path, tensors: Tensors) -> None:
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    save_file(tensors, folder / "model.safetensors")


def with_key_twice(folder: Path, tensors: Tensors) -> None:
    config = folder / "config.json"
    config.write_text('{"vocab_size": 7, ' + config.read_text()[1:])
    save_file(tensors, folder / "model.safetensors")


def in_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def with_adapter(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")
    adapter = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(8, 8)}
    save_file(adapter, folder / "adapter_model.safetensors")


GATES = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
LEFT = "tensor-not-taken"
NAMELESS = "exclude-names-nothing"
# Newer releases multiply FP8 on a CPU.
HAS_FP8_OF_CPU = any(
    kernel.__name__.startswith("CPUF")
    for kernel in _POSSIBLE_FP8_KERNELS.get(PlatformEnum.CPU, ())
)
# Newer releases map the names of these scales before a model's loader sees them.
TAKES_CACHE_SCALES = hasattr(QuarkConfig, "get_cache_scale_mapper")

CASES = {
    "hybrid attention: conv1d": Case("qwen3-next--by-name"),
    "hybrid attention: router by glob": Case(
        "qwen3-next--by-glob", warns=(NAMELESS,), floats=GATES
    ),
    "router by glob": Case("qwen3-moe--by-glob", floats=GATES),
    "router not named": Case(
        "qwen3-moe--router-unnamed", warns=("float-not-excluded",), floats=GATES
    ),
    "kv_b_proj by glob": Case(
        "deepseek-v2-mha--by-name",
        as_float("kv_b_proj"),
        floats=("model.layers.0.self_attn.kv_b_proj",),
        env={"VLLM_MLA_DISABLE": "1"},
    ),
    "attention excluded, fused modules not told of": Case(
        "starcoder2--attention-excluded", floats=("model.layers.0.self_attn.qkv_proj",)
    ),
    "attention excluded, fused modules not told of, StableLM": Case(
        "stablelm--attention-excluded", floats=("model.layers.1.self_attn.qkv_proj",)
    ),
    "globs that match nothing": Case(
        "gemma3-text--by-name",
        exclude("*vision_tower*", "*multi_modal_projector*"),
        warns=(NAMELESS,),
    ),
    "tied head by glob": Case("qwen2--by-glob", warns=(NAMELESS,)),
    "another model's router by glob": Case(
        STACKED, exclude("*router.*"), warns=(NAMELESS,)
    ),
    "name of a tensor": Case(STACKED, exclude("lm_head.weight"), warns=(NAMELESS,)),
    "multi-token prediction, floats": Case("mimo--mtp-bf16", warns=(LEFT,)),
    "multi-token prediction, INT8": Case("mimo--mtp-int8", warns=(LEFT,)),
    "loader that makes tensors": Case("llama4--by-name"),
    "FP8 key/value cache": Case("llama--by-name", cache_scales),
    "FP8 key/value cache, names that are skipped": Case(
        STACKED, cache_scales, warns=() if TAKES_CACHE_SCALES else (LEFT,)
    ),
    "gate of heads by glob": Case(
        STACKED, exclude("*g_proj"), floats=("model.layers.2.self_attn.g_proj",)
    ),
    "experts of one layer as floats": Case(
        PER_EXPERT, as_float("layers.3.moe.experts.")
    ),
    "experts as floats": Case("ernie4.5-moe--experts-float"),
    "layer without a scheme": Case(
        "llama--by-name", without_scheme, floats=("model.layers.0.self_attn.o_proj",)
    ),
    "override that changes nothing": Case("phi3--by-name", identity),
    "rotation in the weights": Case("llama--by-name", rotated_weights),
    "kv_cache_group null": Case(STACKED, set_export("kv_cache_group", None)),
    "same tensor in two files": Case(STACKED, files=in_two_files(same=True)),
    "key twice": Case(STACKED, files=with_key_twice),
    "pytorch_model.bin": Case(STACKED, files=in_bin),
    # --- and what is refused --------------------------------------------------------
    "another tensor of that name in two files": Case(
        STACKED,
        files=in_two_files(same=False),
        refused=r"model-0000\d-of-00002.safetensors: expected '.*' the same in",
    ),
    "byte order mark": Case(
        STACKED, files=with_mark, refused=r"byte order mark before it .*sed -i"
    ),
    "adapter beside the model": Case(
        STACKED,
        files=with_adapter,
        refused=r"lora_A.weight \(adapter_model.safetensors\): expected .{,500}$",
    ),
    "names of another exporter": Case(
        "llama--by-name",
        quantizer_names,
        refused=r"q_proj.weight_quantizer.scale .* another exporter",
    ),
    "online rotation": Case(
        STACKED, rotation, refused=r"algo_config: .*online_r1_rotation true"
    ),
    "fake quantized": Case(
        STACKED,
        set_export("weight_format", "fake_quantized"),
        refused=r"export.weight_format: expected real_quantized",
    ),
    "stacked experts that the loader splits": Case(
        "granitemoe--by-name",
        refused=r"GraniteMoeForCausalLM takes, found (KeyError: .*input_linear|"
        r"float32 .*, ValueError: There is no module or parameter)",
    ),
    "FP8 attention on a CPU": Case(
        "llama--by-name",
        fp8_attention,
        refused=""
        if HAS_FP8_OF_CPU
        else r"layers.0.self_attn.qkv_proj: .* for on cpu, found weight fp8_e4m3",
    ),
    "unknown architecture": Case(
        "gemma3-text--by-name",
        renamed,
        refused=r"Step3p9ForConditionalGeneration'\] are not supported",
    ),
}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    logged: list[str] = []
    monkeypatch.setattr(checks.logger, "warning_once", logged.append)
    yield logged


def load(folder: Path) -> nn.Module:
    """Read the config, build the model and load its weights, as the engine does."""
    arguments = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64
    )
    vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config)
        loader = get_model_loader(vllm_config.load_config)
        loader.load_weights(model, vllm_config.model_config)
    return model


@pytest.mark.parametrize("name", CASES)
def test_field_case(name, tmp_path, warnings, monkeypatch):
    case = CASES[name]
    if name.endswith("on a CPU") and not current_platform.is_cpu():
        pytest.skip("needs a vLLM built for CPUs")
    for key, value in case.env.items():
        monkeypatch.setenv(key, value)
    if case.export.startswith("llama4"):
        pytest.importorskip("torchvision", reason="Llama 4's processor wants it")
    folder = case.write(tmp_path / "export")
    if case.refused:
        with pytest.raises((ValueError, NotImplementedError), match=case.refused):
            load(folder)
        return
    model = load(folder)
    if any("(architecture-of-transformers)" in warning for warning in warnings):
        pytest.skip("needs the architecture, which this release of vLLM dropped")
    for kind in case.warns:
        assert any(f"({kind})" in warning for warning in warnings), kind
    assert len(warnings) == len(case.warns), warnings
    for module in case.floats:
        method = model.get_submodule(module).quant_method
        assert isinstance(method, UnquantizedLinearMethod), module


@pytest.mark.parametrize(
    "limits, has_processor, kind",
    [
        ({}, False, "architecture-missing"),
        ({"image": 1}, False, "architecture-missing"),
        ({"image": 0}, False, "architecture-of-transformers"),
        ({}, True, "architecture-of-transformers"),
    ],
)
def test_code_of_transformers_in_the_place_of_an_architecture(
    limits, has_processor, kind, tmp_path
):
    """Nothing is said where the user asked for it."""
    if has_processor:
        (tmp_path / "preprocessor_config.json").write_text("{}")
    config = SimpleNamespace(
        model=str(tmp_path),
        model_impl="auto",
        architectures=["Step3p9ForConditionalGeneration"],
        multimodal_config=SimpleNamespace(limit_per_prompt=limits),
        using_transformers_backend=lambda: True,
    )
    [problem] = files.architecture_problems(config)
    assert problem.id == kind and problem.name == config.architectures[0]
    config.model_impl = "transformers"
    assert not files.architecture_problems(config)
