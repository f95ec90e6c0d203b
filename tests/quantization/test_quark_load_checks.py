# SPDX-License-Identifier: Apache-2.0
"""What vLLM would read wrong of a Quark INT8 export is refused; the rest loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from vllm import platforms
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.quark import load_checks
from vllm.model_executor.layers.quantization.quark.checkpoint import CheckpointError
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model

from tests.platforms import pretended
from tests.quantization.exports import PER_EXPERT, STACKED, Export, load_model
from tests.quantization.utils import poison

pytestmark = pytest.mark.usefixtures("device")

ATTENTION = "model.layers.2.self_attn"
MOE = "model.layers.2.moe"
SHARED = "model.layers.2.share_expert"
DENSE = "model.layers.0.mlp"

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
    assert torch.equal(found[f"{MOE}.experts.w2_weight_scale"][..., 0].cpu(), expected)


def test_excluded_experts_stay_as_they_are(write):
    def dequantize(export: Export) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = f"{MOE}.{name}"
            scale = export.tensors.pop(f"{module}.weight_scale")
            weight = export.tensors[f"{module}.weight"] * scale[..., None]
            export.tensors[f"{module}.weight"] = weight.bfloat16()
        export.quark["exclude"].append(f"{MOE}.experts.*")

    model = load_model(write(STACKED, dequantize))
    weight = dict(model.named_parameters())[f"{MOE}.experts.w2_weight"]
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


# --- what is refused ------------------------------------------------------------------


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


Q_SCALE = f"{ATTENTION}.q_proj.weight_scale"
DOWN_SCALE = f"{MOE}.down_proj.weight_scale"
INT8 = torch.ones(4, dtype=torch.int8)

# Name -> what is done to the stacked export, what the error says.
REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no scale of a linear layer": (drop(Q_SCALE), (f"{ATTENTION}.q_proj", Q_SCALE)),
    "no scale of the experts": (drop(DOWN_SCALE), (DOWN_SCALE, "no such tensor")),
    "no weight beside a scale": (drop(f"{MOE}.down_proj.weight"), (DOWN_SCALE,)),
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
    "quantized, stored as bf16": (
        include(f"{SHARED}.down_proj"),
        (f"{SHARED}.down_proj.weight", "BF16", "exclude does not name it"),
    ),
    "quantized head gate stored as bf16": (
        include("2.self_attn.g_proj"),
        (f"{ATTENTION}.g_proj.weight", "BF16", f"for {ATTENTION}.g_proj"),
    ),
    "quantized attention stored as bf16": (
        put(f"{ATTENTION}.o_proj.weight", lambda tensor: tensor.bfloat16()),
        (f"{ATTENTION}.o_proj.weight", "BF16", "weight_scale"),
    ),
    "int8 lm_head": (
        both(include("lm_head"), lambda export: quantize(export, "lm_head")),
        ("lm_head.weight", "float lm_head", "exclude"),
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
        (".share_expert.up_proj.weight", "no such tensor"),
    ),
    "float parameter that one layer lacks": (
        drop("model.layers.1.input_layernorm.weight"),
        ("model.layers.1.input_layernorm.weight", "it in every such layer"),
    ),
    "float parameter not filled": (
        drop("model.norm.weight"),
        ("model.norm.weight", "fill it, found none"),
    ),
    "half of a fused float layer": (
        both(with_globs, drop(f"{SHARED}.up_proj.weight")),
        (".share_expert.up_proj.weight", "it in every such layer"),
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
        (f"{MOE}.experts.w13_weight", "found"),
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
    "shape of a norm": (
        put("model.norm.weight", lambda tensor: tensor[:64]),
        ("model.norm.weight", "torch.bfloat16 [64]"),
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
        (f"{MOE}.", "16 experts", "found 15"),
    ),
    "zero points of weights": (
        both(with_zero_points, set_value(f"{MOE}.up_proj.weight_zero_point", 5)),
        (f"{MOE}.up_proj.weight_zero_point", "5 at [0, 3]", "symmetric"),
    ),
    "exclude that matches nothing": (
        exclude("model.layers.2.shared_expert.up_proj"),
        ("'model.layers.2.shared_expert.up_proj'", "names none"),
    ),
    "glob that matches nothing": (exclude("*.visual.*"), ("'*.visual.*'",)),
    "parent of a module": (
        exclude("model.layers.0.mlp"),
        ("'model.layers.0.mlp'", "there is model.layers.0.mlp."),
    ),
    "some shards excluded": (
        include(f"{SHARED}.up_proj"),
        (f"{SHARED}.up_proj", "BF16"),
    ),
    "some int8 shards excluded": (
        both(
            include(f"{SHARED}.up_proj"),
            lambda export: quantize(export, f"{SHARED}.up_proj"),
        ),
        ("share_expert.gate_proj", "share_expert.up_proj", "all or none"),
    ),
    "no quantization_config": (
        lambda export: export.config.pop("quantization_config"),
        ("a quantization_config in config.json", "I8"),
    ),
    "no export": (lambda export: export.quark.pop("export"), ("'export'", "nothing")),
    "no exclude": (set_config("exclude", None), ("'exclude'", "None")),
    "overrides in a list": (
        set_config("layer_quant_config", ["*"]),
        ("'layer_quant_config'", "['*']"),
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
    "static scale of dynamic activations": (
        add(f"{ATTENTION}.q_proj.input_scale", torch.ones(1)),
        (f"{ATTENTION}.q_proj.input_scale", "dynamic activations"),
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
    "one expert too many": (
        lambda export: export.tensors.update(
            {
                name.replace(EXPERT, f"{MOE}.experts.16"): tensor.clone()
                for name, tensor in export.tensors.items()
                if name.startswith(EXPERT + ".")
            }
        ),
        (f"{MOE}.experts", "0 to 15", "16 is one too many"),
    ),
    "no projection": (
        drop(f"{EXPERT}.up_proj.weight", f"{EXPERT}.up_proj.weight_scale"),
        (f"{MOE}.experts.w13_weight", "the first gap is at index 5"),
    ),
    "scale 0": (
        set_value(f"{EXPERT}.up_proj.weight_scale", 0),
        (f"{EXPERT}.up_proj.weight_scale", "0.0 at [3]"),
    ),
    "some excluded": (
        exclude(f"{EXPERT}.up_proj"),
        (f"{EXPERT}.up_proj", "1 of the 48", f"{MOE}.experts"),
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
    "no scale of the experts": "w2_weight_scale",
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
        watch = load_checks._Watch(module)
        with watch.watching():
            change(module.weight.data)
    assert sum(watch.written["weight"].values()) == number
    assert (~module.weight.isnan()).sum() == number
    assert dict(torch.Tensor.__dict__) == methods


def test_tensors_have_their_own_methods_after_an_error():
    methods = dict(torch.Tensor.__dict__)
    with pytest.raises(KeyError), load_checks._Watch(nn.Module()).watching():
        raise KeyError
    assert dict(torch.Tensor.__dict__) == methods


@pytest.mark.parametrize("here", [platforms.current_platform, pretended.cuda(9, 0)])
@pytest.mark.parametrize("numel", [10, 1 << 20], ids=["small", "large"])
def test_number_that_is_none_is_refused(numel, here, monkeypatch):
    """Large tensors, too, which are looked at while they are copied to a GPU."""
    monkeypatch.setattr(load_checks, "current_platform", here)
    tensor = torch.ones(numel, dtype=torch.bfloat16)
    assert [*load_checks._looked_at([("a", tensor), ("b", tensor)])]
    tensor[7] = torch.inf
    with pytest.raises(CheckpointError, match=r"b.*inf at \[7\], 1 such"):
        for _ in load_checks._looked_at([("a", tensor[8:]), ("b", tensor)]):
            pass


@pytest.mark.parametrize("by_expert", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [STACKED, PER_EXPERT])
def test_share_of_one_of_two_ranks_loads(name, rank, by_expert, tensor_parallel, write):
    tensor_parallel(rank, 2)
    load_model(write(name), enable_expert_parallel=by_expert)


def unchecked_config(model_config: ModelConfig) -> VllmConfig:
    """An engine's config, without the checks that come with reading it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_checks, "check_model", lambda *arguments: None)
        return VllmConfig(model_config=model_config)


def floats(model: nn.Module) -> list[torch.Tensor]:
    return [each for each in model.parameters() if each.is_floating_point()]


def test_float_checkpoint_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(load_checks, "read_checkpoint", lambda folder: 1 / 0)
    quark = {"global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
    load_checks.check_folder(tmp_path, quark, {})


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
