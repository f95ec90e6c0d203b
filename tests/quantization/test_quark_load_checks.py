# SPDX-License-Identifier: Apache-2.0
"""What vLLM would read wrong of a Quark INT8 export is refused; the rest loads."""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import platforms
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.load_checks import (
    checks,
    files,
    loading,
)
from vllm.model_executor.layers.quantization.quark.load_checks.watch import Watch
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
)
from vllm.model_executor.layers.quantization.quark.quark_check.problems import Problem
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import get_quant_config

from tests.moe_layers import ExpertsModule
from tests.platforms import pretended
from tests.quantization.exports import PER_EXPERT, STACKED, Export, load_model
from tests.quantization.utils import poison

pytestmark = pytest.mark.usefixtures("device")

ATTENTION = "model.layers.2.self_attn"
MOE = "model.layers.2.moe"
SHARED = "model.layers.2.share_expert"
DENSE = "model.layers.0.mlp"
# The module that holds the experts' weights: from 0.24.0 inside a runner.
HELD = f"{MOE}.experts" + (
    "" if ExpertsModule.__name__ == "FusedMoE" else ".routed_experts"
)

Edit = Callable[[Export], None]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


@pytest.fixture
def write(tmp_path: Path):
    def write_export(name: str, *edits: Edit, num_shards: int = 1) -> Path:
        export = Export(name)
        for edit in edits:
            edit(export)
        return export.write(tmp_path / "export", num_shards)

    return write_export


def quantize(export: Export, module: str) -> None:
    """Store a float module as Quark stores a quantized one."""
    weight = export.tensors[f"{module}.weight"].float()
    scale = weight.abs().amax(-1) / 127
    export.tensors[f"{module}.weight"] = (weight / scale[:, None]).round().char()
    export.tensors[f"{module}.weight_scale"] = scale


def set_value(name: str, value: float) -> Edit:
    def edit(export: Export) -> None:
        export.tensors[name].view(-1)[3] = value

    return edit


def drop(*names: str) -> Edit:
    def edit(export: Export) -> None:
        for name in names:
            del export.tensors[name]

    return edit


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(export: Export) -> None:
        export.tensors[name] = make(export.tensors[name]).contiguous()

    return edit


def add(name: str, tensor: torch.Tensor) -> Edit:
    return lambda export: export.tensors.update({name: tensor})


def exclude(*entries: str) -> Edit:
    return lambda export: export.quark["exclude"].extend(entries)


def include(*parts: str) -> Edit:
    def edit(export: Export) -> None:
        entries = export.quark["exclude"]
        export.quark["exclude"] = [
            entry for entry in entries if not any(part in entry for part in parts)
        ]

    return edit


def both(*edits: Edit) -> Edit:
    def edit_all(export: Export) -> None:
        for edit in edits:
            edit(export)

    return edit_all


def set_config(path: str, value: object) -> Edit:
    def edit(export: Export) -> None:
        *parents, last = path.split("/")
        config = export.quark
        for parent in parents:
            config = config[parent]
        config[last] = value

    return edit


# --- what loads ---------------------------------------------------------------------


def as_columns(export: Export) -> None:
    for name, tensor in export.tensors.items():
        if name.endswith("weight_scale"):
            export.tensors[name] = tensor[..., None].contiguous()


def with_zero_points(export: Export) -> None:
    for name, tensor in list(export.tensors.items()):
        if name.endswith("weight_scale"):
            zero_point = name.replace("weight_scale", "weight_zero_point")
            export.tensors[zero_point] = torch.zeros_like(tensor, dtype=torch.int8)


def with_prediction_layers(export: Export) -> None:
    """Layers after the last, as Step-3.5-Flash has them; they need not be complete."""
    for name, tensor in list(export.tensors.items()):
        if ".layers.3." in name and "norm" not in name:
            export.tensors[name.replace(".layers.3.", ".layers.4.")] = tensor.clone()
    export.tensors["model.layers.4.eh_proj.weight"] = torch.ones(2, 2)
    export.quark["exclude"].append("model.layers.5.eh_proj")


def with_globs(export: Export) -> None:
    export.quark["exclude"] = [
        *("lm_head", "*.g_proj", "*.mlp.*", "*.moe.gate", "*share_expert*")
    ]


def with_expressions(export: Export) -> None:
    export.quark["exclude"] = [
        "lm_head",
        r"re:.*\.(g_proj|moe\.gate)$",
        r"re:.*\.mlp\.",
        r"re:.*\.share_expert\.",
    ]


SAME: dict[str, tuple[Edit, ...]] = {
    "columns": (as_columns,),
    "zero points of zero": (with_zero_points,),
    "columns of zero points": (with_zero_points, as_columns),
    "multi-token prediction": (with_prediction_layers,),
    "globs": (with_globs,),
    "regular expressions": (with_expressions,),
}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", [STACKED, PER_EXPERT])
@pytest.mark.parametrize("edits", SAME)
def test_another_spelling_loads_the_same(edits, name, num_shards, write, tmp_path):
    expected = state(load_model(Export(name).write(tmp_path / "plain")))
    found = state(load_model(write(name, *SAME[edits], num_shards=num_shards)))
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert torch.equal(found[parameter], tensor), parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_scales_load_as_their_value(dtype, write):
    def shorten(export: Export) -> None:
        for name, tensor in export.tensors.items():
            if name.endswith("weight_scale"):
                export.tensors[name] = tensor.to(dtype)

    expected = (
        Export(STACKED).tensors[f"{MOE}.down_proj.weight_scale"].to(dtype).float()
    )
    found = state(load_model(write(STACKED, shorten)))
    assert torch.equal(found[f"{HELD}.w2_weight_scale"][..., 0].cpu(), expected)


def test_excluded_experts_stay_as_they_are(write):
    def dequantize(export: Export) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = f"{MOE}.{name}"
            scale = export.tensors.pop(f"{module}.weight_scale")
            weight = export.tensors[f"{module}.weight"] * scale[..., None]
            export.tensors[f"{module}.weight"] = weight.bfloat16()
        export.quark["exclude"].append(f"{MOE}.experts.*")

    model = load_model(write(STACKED, dequantize))
    weight = dict(model.named_parameters())[f"{HELD}.w2_weight"]
    assert weight.dtype == torch.bfloat16


def test_layer_type_is_that_of_every_linear_layer(write):
    def move(export: Export) -> None:
        export.quark["layer_type_quant_config"] = {
            "Linear": export.quark["global_quant_config"]
        }
        export.quark["global_quant_config"] = {"weight": {"dtype": "fp8_e4m3"}}

    model = load_model(write(STACKED, move))
    methods = {name: getattr(m, "scheme", None) for name, m in model.named_modules()}
    assert isinstance(methods[f"{ATTENTION}.qkv_proj"], QuarkW8A8Int8)


# --- what loads, with a warning -----------------------------------------------------


def with_a_dead_channel(export: Export) -> None:
    """A channel of the experts that is all zeros, as its scale is."""
    export.tensors[f"{MOE}.up_proj.weight"][3, 5] = 0
    export.tensors[f"{MOE}.up_proj.weight_scale"][3, 5] = 0


# Name -> what is done to an export, the kind of warning, what it says.
ODD: dict[str, tuple[str, Edit, str, str]] = {
    "entry that names nothing": (
        STACKED,
        exclude("model.layers.2.shared_expert.up_proj"),
        "exclude-names-nothing",
        "model.layers.2.shared_expert.up_proj",
    ),
    "glob that matches nothing": (
        STACKED,
        exclude("*vision_tower*"),
        "exclude-names-nothing",
        "*vision_tower*",
    ),
    "parent of a module": (
        STACKED,
        exclude("model.layers.0.mlp"),
        "exclude-names-nothing",
        "model.layers.0.mlp",
    ),
    "float that exclude does not name": (
        STACKED,
        include(f"{SHARED}.down_proj"),
        "float-not-excluded",
        f"{SHARED}.down_proj",
    ),
    "float head gate that exclude does not name": (
        STACKED,
        include("2.self_attn.g_proj"),
        "float-not-excluded",
        f"{ATTENTION}.g_proj",
    ),
    "float shards, some of them excluded": (
        STACKED,
        include(f"{SHARED}.up_proj"),
        "float-not-excluded",
        f"{SHARED}.up_proj",
    ),
    "static scale of dynamic activations": (
        STACKED,
        lambda export: export.tensors.update(
            {f"{ATTENTION}.q_proj.input_scale": torch.ones(1)}
        ),
        "tensor-not-taken",
        f"{ATTENTION}.q_proj.input_scale",
    ),
    "scale of a quantized key/value cache": (
        STACKED,
        lambda export: export.tensors.update(
            {f"{ATTENTION}.k_proj.output_scale": torch.ones(1)}
        ),
        "tensor-not-taken",
        f"{ATTENTION}.k_proj.output_scale",
    ),
    "bias of zeros": (
        STACKED,
        lambda export: export.tensors.update(
            {f"{ATTENTION}.o_proj.bias": torch.zeros(128)}
        ),
        "tensor-not-taken",
        f"{ATTENTION}.o_proj.bias",
    ),
    "one expert too many": (
        PER_EXPERT,
        lambda export: export.tensors.update(
            {
                name.replace("experts.5.", "experts.16."): tensor.clone()
                for name, tensor in export.tensors.items()
                if ".experts.5." in name
            }
        ),
        "tensor-not-taken",
        "experts.16.",
    ),
}


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    logged: list[str] = []
    monkeypatch.setattr(checks.logger, "warning_once", logged.append)
    return logged


@pytest.mark.parametrize("name", ODD)
def test_odd_export_loads_the_same_with_one_warning(name, write, tmp_path, warnings):
    if "key/value cache" in name and hasattr(QuarkConfig, "get_cache_scale_mapper"):
        pytest.skip("this release takes the scale")
    export, edit, kind, seen = ODD[name]
    expected = state(load_model(Export(export).write(tmp_path / "plain")))
    assert not warnings
    found = state(load_model(write(export, edit)))
    for parameter, tensor in expected.items():
        assert torch.equal(found[parameter], tensor), parameter
    [warning] = warnings
    assert f"({kind})" in warning and seen in warning


def test_channel_of_zeros_needs_no_scale(write, warnings):
    model = load_model(write(STACKED, with_a_dead_channel))
    scales = dict(model.named_parameters())[f"{HELD}.w13_weight_scale"]
    assert scales[3, 64 + 5] == 0
    [warning] = warnings
    assert "zero-channels" in warning and f"{MOE}.up_proj.weight_scale" in warning


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_channel_of_zeros_with_another_scale(value, write):
    """Any number times zero is zero, but NaN is none."""
    both_edits = with_a_dead_channel, at(f"{MOE}.up_proj.weight_scale", (3, 5), value)
    folder = write(STACKED, *both_edits)
    if value == value:
        load_model(folder)
    else:
        with pytest.raises(CheckpointError, match="up_proj.weight_scale .*nan at"):
            load_model(folder)


def at(name: str, index: tuple[int, ...], value: float) -> Edit:
    def edit(export: Export) -> None:
        export.tensors[name][index] = value

    return edit


def test_what_a_fork_told_to_warn_says_of_an_error(write, warnings, monkeypatch):
    monkeypatch.setenv("VLLM_QUARK_INT8_CHECKS", "warn")
    load_model(write(STACKED, set_value(DOWN_SCALE, 0.0)))
    [warning] = warnings
    assert "ANSWERS WILL BE WRONG" in warning and f"{DOWN_SCALE} (F32" in warning
    assert "scale-not-positive" in warning


# --- what is refused ------------------------------------------------------------------


Q_SCALE = f"{ATTENTION}.q_proj.weight_scale"
DOWN_SCALE = f"{MOE}.down_proj.weight_scale"
INT8 = torch.ones(4, dtype=torch.int8)

# Name -> what is done to the stacked export, what the error says.
REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no scale of a linear layer": (drop(Q_SCALE), (f"{ATTENTION}.q_proj", Q_SCALE)),
    "no scale of the experts": (drop(DOWN_SCALE), (DOWN_SCALE, "no such tensor")),
    "no weight beside a scale": (
        drop(f"{MOE}.down_proj.weight"),
        (f"{HELD}.w2_weight", "found none"),
    ),
    **{
        f"scale {value}": (
            set_value(name, value),
            (name, "finite and above zero", f"{value} at", "1 of"),
        )
        for value in (0.0, -0.5, float("nan"), float("inf"))
        for name in (DOWN_SCALE,)
    },
    "linear scale nan": (set_value(Q_SCALE, float("nan")), (Q_SCALE, "nan at [3]")),
    "excluded, stored as int8": (
        lambda export: quantize(export, f"{SHARED}.down_proj"),
        (f"{SHARED}.down_proj.weight", "exclude has", "I8"),
    ),
    "quantized attention stored as bf16": (
        put(f"{ATTENTION}.o_proj.weight", lambda tensor: tensor.bfloat16()),
        (f"{ATTENTION}.o_proj.weight", "BF16", "weight_scale"),
    ),
    "int8 lm_head": (
        both(include("lm_head"), lambda export: quantize(export, "lm_head")),
        ("lm_head.weight", "which vLLM does not quantize", "exclude"),
    ),
    "unknown tensor": (
        add(f"{ATTENTION}.q_proj.bias", torch.ones(4)),
        (f"{ATTENTION}.q_proj.bias", "F32 [4]", "none: it would be left out"),
    ),
    "misspelt tensor": (
        both(
            with_globs,
            lambda export: export.rename(
                f"{SHARED}.up_proj.weight", f"{SHARED}.upp_proj.weight"
            ),
        ),
        (".share_expert.gate_up_proj.weight", "fill it, found", "index 1"),
    ),
    "float parameter that one layer lacks": (
        drop("model.layers.1.input_layernorm.weight"),
        ("model.layers.1.input_layernorm.weight", "fill it, found none"),
    ),
    "float parameter not filled": (
        drop("model.norm.weight"),
        ("model.norm.weight", "fill it, found none"),
    ),
    "half of a fused float layer": (
        both(with_globs, drop(f"{SHARED}.up_proj.weight")),
        (".share_expert.gate_up_proj.weight", "fill it, found", "index 1"),
    ),
    "half of every fused float layer": (
        both(
            with_globs,
            lambda export: drop(
                *(
                    n
                    for n in export.tensors
                    if n.endswith("share_expert.up_proj.weight")
                )
            )(export),
        ),
        ("share_expert.gate_up_proj.weight", "numbers", "fill it"),
    ),
    "half of the experts' first product": (
        drop(f"{MOE}.up_proj.weight", f"{MOE}.up_proj.weight_scale"),
        (f"{HELD}.w13_weight", "found"),
    ),
    "rows of a linear layer": (
        both(
            put(f"{ATTENTION}.q_proj.weight", lambda t: torch.cat([t, t[:16]])),
            put(Q_SCALE, lambda t: torch.cat([t, t[:16]])),
        ),
        (f"{ATTENTION}.q_proj.weight", "I8 [208, 128]", "qkv_proj"),
    ),
    "columns of a linear layer": (
        put(f"{ATTENTION}.o_proj.weight", lambda tensor: tensor[:, :64]),
        (f"{ATTENTION}.o_proj.weight", "I8 [128, 64]", "I8 [128, 192]"),
    ),
    "width of the experts": (
        put(f"{MOE}.down_proj.weight", lambda tensor: tensor.repeat(1, 1, 2)),
        (f"{MOE}.down_proj.weight", "[16, 128, 128]", f"{MOE}.experts"),
    ),
    "rows of a float layer": (
        put(f"{SHARED}.up_proj.weight", lambda tensor: tensor.repeat(2, 1)),
        (f"{SHARED}.up_proj.weight", "[64, 128]", "BF16 [128, 128]"),
    ),
    "columns of a float layer": (
        put(f"{SHARED}.down_proj.weight", lambda tensor: tensor.repeat(1, 2)),
        (f"{SHARED}.down_proj.weight", "[128, 64]", "BF16 [128, 128]"),
    ),
    "shape of a norm": (
        put("model.norm.weight", lambda tensor: tensor[:64]),
        ("model.norm.weight", "bfloat16 [64]"),
    ),
    "shape of a scale": (
        put(DOWN_SCALE, lambda tensor: tensor[:, :7]),
        (DOWN_SCALE, "[16, 128]", "[16, 7]"),
    ),
    "dtype of a scale": (
        put(DOWN_SCALE, lambda tensor: tensor.to(torch.int32)),
        (DOWN_SCALE, "F32", "I32"),
    ),
    "one expert too few": (
        both(
            *(
                put(f"{MOE}.{name}_proj.{suffix}", lambda tensor: tensor[:-1])
                for name in ("gate", "up", "down")
                for suffix in ("weight", "weight_scale")
            )
        ),
        (f"{MOE}.", "experts 0 to 15", "found 15"),
    ),
    "zero points of weights": (
        both(with_zero_points, set_value(f"{MOE}.up_proj.weight_zero_point", 5)),
        (f"{MOE}.up_proj.weight_zero_point", "5 at [0, 3]", "symmetric"),
    ),
    "some int8 shards excluded": (
        both(
            include(f"{SHARED}.up_proj"),
            lambda export: quantize(export, f"{SHARED}.up_proj"),
        ),
        ("share_expert.gate_proj.weight as BF16", "share_expert.up_proj.weight as I8"),
    ),
    "rotation of activations": (
        add(f"{ATTENTION}.o_proj.input_rotation", torch.eye(4)),
        (
            f"{ATTENTION}.o_proj.input_rotation",
            "none: it would be left out",
            "rotation",
        ),
    ),
    "rotation in the config": (
        set_config("algo_config", [{"name": "rotation", "r1": True, "r4": True}]),
        ("algo_config", "r4 true", "without online rotation"),
    ),
    "fake quantized": (
        set_config("export/weight_format", "fake_quantized"),
        ("export.weight_format", "'fake_quantized'", "real_quantized"),
    ),
    "names of another exporter": (
        lambda export: export.rename(
            Q_SCALE, Q_SCALE.replace("weight_scale", "weight_quantizer.scale")
        ),
        ("q_proj.weight_quantizer.scale", "q_proj.weight_scale", "another exporter"),
    ),
    "no quantization_config": (
        lambda export: export.config.pop("quantization_config"),
        ("a quantization_config in config.json", "I8"),
    ),
    "no export": (
        lambda export: export.quark.pop("export"),
        ("quantization_config, export", "nothing"),
    ),
    "no exclude": (
        set_config("exclude", None),
        ("config, exclude", "None"),
    ),
    "overrides in a list": (
        set_config("layer_quant_config", ["*"]),
        ("quantization_config, layer_quant_config", "['*']"),
    ),
    "asymmetric weights": (
        set_config("global_quant_config/weight/symmetric", False),
        ("weight", "symmetric weights"),
    ),
    "weights per group": (
        set_config("global_quant_config/weight/qscheme", "per_group"),
        ("per_tensor or per_channel", "per_group"),
    ),
    "input channels": (
        set_config("global_quant_config/weight/ch_axis", 1),
        ("ch_axis 0", "ch_axis 1"),
    ),
    "weights alone": (
        set_config("global_quant_config/input_tensors", None),
        ("int8 activations", "None"),
    ),
    "dynamic per tensor": (
        set_config("global_quant_config/input_tensors/qscheme", "per_tensor"),
        ("per token and dynamic", "per_tensor, dynamic"),
    ),
    "static without scales": (
        both(
            set_config("global_quant_config/input_tensors/qscheme", "per_tensor"),
            set_config("global_quant_config/input_tensors/is_dynamic", False),
        ),
        ("input_scale", "no such tensor"),
    ),
    "float8 in the config": (
        set_config(
            "layer_quant_config", {"*.o_proj": {"weight": {"dtype": "fp8_e4m3"}}}
        ),
        ("o_proj.weight", "fp8_e4m3", "I8"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, write):
    edit, fragments = REFUSED[name]
    with pytest.raises(ValueError) as error:
        load_model(write(STACKED, edit))
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message
    assert "expected" in message and ("found" in message or "excludes" in message)
    assert "; " in message, "a remedy"


EXPERT = f"{MOE}.experts.5"

REFUSED_EXPERTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no expert": (
        drop(
            *(
                f"{EXPERT}.{projection}_proj.{suffix}"
                for projection in ("gate", "up", "down")
                for suffix in ("weight", "weight_scale")
            )
        ),
        (f"{MOE}.experts", "0 to 15", "5 is missing"),
    ),
    "no projection": (
        drop(f"{EXPERT}.up_proj.weight", f"{EXPERT}.up_proj.weight_scale"),
        (f"{HELD}.w13_weight", "the first gap is at index 5"),
    ),
    "scale 0": (
        set_value(f"{EXPERT}.up_proj.weight_scale", 0),
        (f"{EXPERT}.up_proj.weight_scale", "0.0 at [3]"),
    ),
    "some excluded": (
        exclude(f"{EXPERT}.up_proj"),
        (f"{EXPERT}.up_proj", "one scheme", f"{MOE}.experts"),
    ),
    "stored as bf16": (
        put(f"{EXPERT}.up_proj.weight", lambda tensor: tensor.bfloat16()),
        (f"{EXPERT}.up_proj.weight", "BF16"),
    ),
}


@pytest.mark.parametrize("name", REFUSED_EXPERTS)
def test_one_expert_is_refused_by_name(name, write):
    edit, fragments = REFUSED_EXPERTS[name]
    with pytest.raises(ValueError) as error:
        load_model(write(PER_EXPERT, edit))
    for fragment in fragments:
        assert fragment in str(error.value)


# What the files' headers show is judged before the model is built. What is left is
# seen while it is loaded; so it is when the first is left out.
SEEN_WHILE_LOADING = {
    "no scale of a linear layer": "q_proj.weight_scale",
    "no scale of the experts": DOWN_SCALE,
    "excluded, stored as int8": f"{SHARED}.down_proj.weight",
    "quantized attention stored as bf16": f"{ATTENTION}.o_proj.weight",
    "int8 lm_head": "lm_head.weight",
    "rows of a linear layer": f"{ATTENTION}.q_proj.weight",
    "unknown tensor": r"q_proj\.bias",
}


@pytest.mark.parametrize("name", SEEN_WHILE_LOADING)
def test_loading_sees_it_as_well(name, write):
    edit, _ = REFUSED[name]
    with pytest.raises(
        (ValueError, NotImplementedError), match=SEEN_WHILE_LOADING[name]
    ):
        load_model(write(STACKED, edit), is_checked=False)


WRITES: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
    "copy": (lambda weight: weight.copy_(torch.ones(4, 6)), 24),
    "copy to rows": (lambda weight: weight[1:3].copy_(torch.ones(2, 6)), 12),
    "copy of one number": (lambda weight: weight[0].copy_(torch.ones(())), 6),
    "fill": (lambda weight: weight[:, 2].fill_(1), 4),
    "zero": (lambda weight: weight.narrow(1, 2, 3).zero_(), 12),
    "set rows": (lambda weight: weight.__setitem__(slice(2), torch.ones(2, 6)), 12),
    "set one number": (lambda weight: weight.__setitem__((0, 1), 5.0), 1),
    "set chosen rows": (lambda weight: weight.__setitem__([0, 3], torch.ones(6)), 12),
    "set masked": (
        lambda weight: weight.__setitem__(torch.eye(4, 6).bool(), torch.ones(())),
        4,
    ),
    "nothing": (lambda weight: weight[:0].fill_(1), 0),
    "another tensor": (lambda weight: torch.zeros(4, 6).copy_(weight), 0),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_write_is_seen(write):
    """The elements that are written are counted; they are written, and when all is
    done tensors have their own methods again."""
    methods = dict(torch.Tensor.__dict__)
    module = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        module.weight.fill_(torch.nan)
        change, number = WRITES[write]
        watch = Watch(module, lambda write: None)
        with watch.watching():
            change(module.weight.data)
    assert sum(watch.written["weight"].values()) == number
    assert (~module.weight.isnan()).sum() == number
    assert dict(torch.Tensor.__dict__) == methods


def test_tensors_have_their_own_methods_after_an_error():
    methods = dict(torch.Tensor.__dict__)
    with pytest.raises(KeyError), Watch(nn.Module(), lambda write: None).watching():
        raise KeyError
    assert dict(torch.Tensor.__dict__) == methods


class Sink(nn.Module):
    """Takes the tensor `b` of a checkpoint, and leaves others."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.empty(numel, dtype=torch.bfloat16), False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "b":
                self.b.data.copy_(tensor)


@pytest.mark.parametrize("here", [platforms.current_platform, pretended.cuda(9, 0)])
@pytest.mark.parametrize("numel", [10, 1 << 20], ids=["small", "large"])
def test_number_that_is_none_is_refused(numel, here, monkeypatch, tmp_path):
    """Large tensors, too, which are looked at while they are copied to a GPU; but for
    tensors that nothing takes."""
    monkeypatch.setattr(loading, "current_platform", here)
    found = checks.Checks(str(tmp_path), None, {"exclude": []})
    config = SimpleNamespace(runner="generate")
    model = loading.CheckedModel(Sink(numel), config, found)
    good, bad = torch.ones(2, numel, dtype=torch.bfloat16)
    bad[7] = torch.inf
    model.load_weights([("a", bad), ("b", good)])
    with pytest.raises(CheckpointError, match=r"b: .*inf at \[7\], 1 such"):
        model.load_weights([("a", good), ("b", bad)])


@pytest.mark.parametrize("by_expert", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [STACKED, PER_EXPERT])
def test_share_of_one_of_two_ranks_loads(name, rank, by_expert, tensor_parallel, write):
    tensor_parallel(rank, 2)
    load_model(write(name), enable_expert_parallel=by_expert)


def unchecked_config(model_config: ModelConfig) -> VllmConfig:
    """An engine's config, without the checks that come with reading it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "check_model", lambda *arguments: None)
        return VllmConfig(model_config=model_config)


def floats(model: nn.Module) -> list[torch.Tensor]:
    return [each for each in model.parameters() if each.is_floating_point()]


def test_float_checkpoint_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "read_checkpoint", lambda folder: 1 / 0)
    quark = {"global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
    config = QuarkConfig(quark)
    assert files.check_model(SimpleNamespace(model=str(tmp_path)), config) is None


def inside(value: object, seen: tuple[int, ...] = ()) -> object:
    """All that an object holds, to be compared later: attributes and items, down to
    what has none."""
    if id(value) in seen:
        return "itself"
    seen = (*seen, id(value))
    if isinstance(value, dict):
        return [(repr(key), inside(each, seen)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value).__name__, [inside(each, seen) for each in value]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return type(value).__name__, inside(vars(value), seen)
    return repr(value)


@pytest.mark.parametrize("edit", [None, *ODD], ids=str)
def test_config_is_checked_and_not_changed(edit, write):
    export, change = (STACKED, []) if edit is None else (ODD[edit][0], [ODD[edit][1]])
    folder = write(export, *change)
    config = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16")
    quant_config = get_quant_config(config, LoadConfig())
    before = inside(config), inside(quant_config)
    assert "global_quant_config" in str(before[1])
    found = files.check_model(config, quant_config)
    assert (inside(config), inside(quant_config)) == before
    assert found is not None and found.export is not None
    # What a layer asks is what was found.
    assert VllmConfig(model_config=config).quant_config.checks.config == found.config


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_downloaded_model_is_judged_before_its_weights_are_read(
    value, write, monkeypatch
):
    folder = write(STACKED, set_value(DOWN_SCALE, value))
    prepare = DefaultModelLoader._prepare_weights
    monkeypatch.setattr(
        DefaultModelLoader,
        "_prepare_weights",
        lambda self, name, *rest: prepare(self, str(folder), *rest),
    )
    config = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16")
    vllm_config = unchecked_config(config)
    config.model = "someone/step3p5"
    loader = DefaultModelLoader(LoadConfig())
    with set_current_vllm_config(vllm_config):
        model = initialize_model(vllm_config)
        if value:
            loader.load_weights(model, config)
            return
        poison(model)
        with pytest.raises(CheckpointError, match=f"{DOWN_SCALE} .* found 0.0"):
            loader.load_weights(model, config)
    assert all(tensor.isnan().all() for tensor in floats(model))


def test_files_of_a_downloaded_model_decide_while_it_is_built(write, monkeypatch):
    """It is downloaded then, and not once more; a loader of none is not asked."""
    folder = write(STACKED, include("2.self_attn.g_proj"))
    prepare = DefaultModelLoader._prepare_weights
    asked: list[str] = []

    def prepared(self, name, *rest):
        asked.append(name)
        return prepare(self, str(folder), *rest)

    monkeypatch.setattr(DefaultModelLoader, "_prepare_weights", prepared)
    config = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16")
    config.model = "someone/step3p5"
    gate = f"{ATTENTION}.g_proj"
    for load_format, is_float in (("auto", True), ("dummy", False)):
        vllm_config = VllmConfig(
            model_config=config, load_config=LoadConfig(load_format=load_format)
        )
        with set_current_vllm_config(vllm_config):
            model = initialize_model(vllm_config)
        method = model.get_submodule(gate).quant_method
        assert isinstance(method, UnquantizedLinearMethod) == is_float
        assert asked == ["someone/step3p5"]


def test_headers_are_read_again_in_a_worker(write):
    """What the first process found does not travel to it."""
    here = checks.Checks(str(write(STACKED)), None, Export(STACKED).quark)
    assert here.export is not None
    here.problems.append(Problem("zero-channels", "a", "b", "c"))
    there = pickle.loads(pickle.dumps(here))
    assert len(pickle.dumps(here)) < 20_000
    assert there.problems == [] and there._export is None
    assert there.export.modules.keys() == here.export.modules.keys()


def test_damaged_file_ends_before_the_model_is_built(write, monkeypatch):
    from vllm.model_executor.model_loader import base_loader

    folder = write(STACKED)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(base_loader, "initialize_model", lambda **options: 1 / 0)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected .* cut off"):
        load_model(folder)


def test_error_is_a_checkpoint_error(write):
    edit, _ = REFUSED["rows of a linear layer"]
    with pytest.raises(CheckpointError):
        load_model(write(STACKED, edit))


def test_expression_of_a_name_that_vllm_changes(write):
    """vLLM's name for it is model.layers.2.moe.share_expert.up_proj."""
    expression = r"re:model\.layers\.\d+\.share_expert\..*"
    folder = write(STACKED, include("share_expert"), exclude(expression))
    load_model(folder)
    with pytest.raises(CheckpointError, match="share_expert"):
        load_model(folder, is_checked=False)
