# SPDX-License-Identifier: Apache-2.0
"""What quark-check says of checkpoints that are not in the matrix, by their headers."""

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check import run
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
)
from vllm.model_executor.layers.quantization.quark.quark_check.plan import spans
from vllm.model_executor.layers.quantization.quark.quark_check.releases import (
    ALL,
    FORK_CPU,
    FORK_GPU,
)
from vllm.model_executor.layers.quantization.quark.quark_check.report import (
    Report,
    size,
)

from tests.fixtures.cells import FIXTURES
from tests.fuzz.files import CONFIG, pack

STEP, QWEN = "Step3p5ForCausalLM", "Qwen2MoeForCausalLM"
BYTES = {"I8": 1, "BF16": 2, "F32": 4}
OLD, MIDDLE, NEW, NEWEST = "0.16.0-0.19.1", "0.20.0-0.21.0", "0.22.0-0.25.1", "0.33.0"

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def int8(*names: str, scale: tuple[int, ...] = (4,)) -> Tensors:
    """INT8 weights [4, 4] with their scales."""
    found: Tensors = {}
    for name in names:
        found |= {
            f"{name}.weight": ("I8", (4, 4)),
            f"{name}.weight_scale": ("F32", scale),
        }
    return found


def floats(*names: str) -> Tensors:
    return {f"{name}.weight": ("BF16", (4, 4)) for name in names}


def experts(layer: int, make=int8) -> Tensors:
    return make(
        *(
            f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            for expert in range(2)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
    )


def attention(layer: int, make=int8) -> Tensors:
    prefix = f"model.layers.{layer}.self_attn"
    return make(*(f"{prefix}.{each}_proj" for each in "qkvo"))


def config(exclude: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A config.json of INT8, one scale a channel and one a token."""
    written = json.loads((FIXTURES / "step3p5-tiny/int8-3key" / CONFIG).read_text())
    quark = written["quantization_config"] | {"exclude": exclude or []}
    return {
        "architectures": [QWEN],
        "num_hidden_layers": 2,
        "num_experts": 2,
        "quantization_config": quark,
    } | more


def check(folder: Path, tensors: Tensors, model: dict[str, Any]) -> Report:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    (folder / "model.safetensors").write_bytes(pack(header, bytes(end)))
    (folder / CONFIG).write_text(json.dumps(model))
    return run.check(folder)


def severities(report: Report) -> dict[str, str]:
    return {each.id: each.severity for each in report.findings}


def outcomes(report: Report) -> dict[str, str]:
    return {each.target: each.outcome for each in report.judgement.verdicts}


def test_right_everywhere_but_on_what_is_too_old(tmp_path):
    report = check(tmp_path, attention(0) | experts(1), config())
    assert outcomes(report) == {
        **dict.fromkeys(ALL.targets(), "right"),
        OLD: "refused",
    }
    assert report.exit_status == 0


def test_static_linear_layers_are_known_to_the_oldest(tmp_path):
    model = config()
    inputs = model["quantization_config"]["global_quant_config"]["input_tensors"]
    inputs |= {"qscheme": "per_tensor", "is_dynamic": False}
    tensors = attention(0)
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name.replace("weight_scale", "input_scale")] = "F32", ()
    report = check(tmp_path, tensors, model | {"num_hidden_layers": 1})
    assert set(outcomes(report).values()) == {"right"} and not report.findings


@pytest.mark.parametrize("left", [{}, {"quantization_config": None}])
def test_config_that_was_lost(left, tmp_path):
    model = config()
    del model["quantization_config"]
    model |= left
    report = check(tmp_path, attention(0), model)
    assert severities(report) == {"config-lost": "garbage"}
    assert outcomes(report)[MIDDLE] == "garbage"
    assert outcomes(report)[FORK_CPU] == "refused"
    assert report.findings[0].count == 4 and report.exit_status == 1


@pytest.mark.parametrize(
    "change",
    [
        {"exclude": None},
        {"export": None},
        {"exclude": ["re:("]},
        {"layer_quant_config": {"x": 1}},
    ],
)
def test_config_that_is_none(change, tmp_path):
    model = config()
    model["quantization_config"] |= change
    report = check(tmp_path, attention(0), model)
    assert severities(report) == {"config-unreadable": "refused"}
    assert set(outcomes(report).values()) == {"refused"} and report.exit_status == 1


def test_another_format(tmp_path):
    report = check(tmp_path, floats("model.norm"), {"architectures": [QWEN]})
    assert severities(report) == {"not-quark-int8": "note"}
    assert set(outcomes(report).values()) == {"not known"} and report.exit_status == 0


@pytest.mark.parametrize("architecture", [STEP, QWEN])
def test_fused_layer_excluded_in_part(architecture, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    tensors = attention(0)
    del tensors[f"{name}.weight_scale"]
    tensors |= floats(name)
    model = config([name], architectures=[architecture], num_hidden_layers=1)
    report = check(tmp_path, tensors, model)
    # 0.20's Step-3.5 does not say what it fuses, so nobody notices there.
    expected = "garbage" if architecture == STEP else "refused"
    assert outcomes(report)[MIDDLE] == expected
    assert severities(report)["shards-differ"] == "refused"
    assert outcomes(report)[NEW] == outcomes(report)[FORK_CPU] == "refused"


@pytest.mark.parametrize("by_name", [True, False])
def test_excluded_experts(by_name, tmp_path):
    names = [name.removesuffix(".weight") for name in experts(0, floats)]
    exclude = names if by_name else ["model.layers.0.mlp.experts"]
    report = check(tmp_path, experts(0, floats) | experts(1), config(exclude))
    expected = "garbage" if by_name else "refused"
    assert severities(report)["exclude-experts"] == expected
    assert outcomes(report)[MIDDLE] == outcomes(report)[NEW] == expected
    # From 0.26.0 on such experts are found.
    assert outcomes(report)["0.26.0"] == outcomes(report)[NEWEST] == "right"
    assert outcomes(report)[FORK_CPU] == "right"


def test_experts_excluded_by_a_glob(tmp_path):
    """No release finds them, but where it begins with the name of the layer."""
    tensors = experts(0, floats) | experts(1)
    report = check(tmp_path, tensors, config(["*layers.0.mlp.experts.*"]))
    assert outcomes(report)[NEW] == outcomes(report)[NEWEST] == "garbage"
    entry = "model.layers.0.mlp.experts.*.down_proj"
    report = check(tmp_path, tensors, config([entry]))
    assert outcomes(report)[NEW] == "garbage" and outcomes(report)[NEWEST] == "right"


def test_fused_layer_excluded_by_its_own_name(tmp_path):
    """Found from 0.30.0 on; before, where the model does not say what it fuses."""
    names = [f"model.layers.0.self_attn.{each}" for each in ("qkv_proj", "o_proj")]
    tensors = attention(0, floats) | experts(0)
    model = config(names, num_hidden_layers=1)
    report = check(tmp_path, tensors, model)
    found = outcomes(report)
    assert found[MIDDLE] == found["0.28.0-0.29.0"] == "garbage"
    assert found["0.30.0-0.32.0"] == found[NEWEST] == "right"


def test_some_experts_excluded(tmp_path):
    name = "model.layers.0.mlp.experts.0.up_proj"
    report = check(tmp_path, experts(0) | attention(0), config([name]))
    assert "experts-differ" in severities(report)
    assert outcomes(report)[FORK_CPU] == "refused"


@pytest.mark.parametrize(
    ("entry", "is_read"),
    [
        ("model.layers.0.self_attn.o_proj", True),
        ("*.o_proj", True),
        ("re:.*o_proj", False),
        ("model.layers.[0].self_attn.o_proj", False),
    ],
)
def test_override_of_a_linear_layer(entry, is_read, tmp_path):
    model = config()
    quark = model["quantization_config"]
    layer = copy.deepcopy(quark["global_quant_config"])
    layer["weight"]["qscheme"] = "per_tensor"
    quark["layer_quant_config"] = {entry: layer}
    tensors = attention(0)
    tensors |= int8("model.layers.0.self_attn.o_proj", scale=())
    report = check(tmp_path, tensors, model | {"num_hidden_layers": 1})
    assert ("override-unread" in severities(report)) != is_read
    assert outcomes(report)[MIDDLE] == ("right" if is_read else "refused")
    assert outcomes(report)[FORK_CPU] == "right"
    [kind] = [kind for kind in report.kinds if kind.name.endswith("o_proj")]
    pattern = "" if entry.startswith("model.layers.0") else f" {entry!r}"
    assert kind.treatment.rule == f"layer_quant_config{pattern}"
    assert kind.treatment.scheme == "weights per tensor; activations per token"
    assert kind.treatment.scales == "F32 scalar"


def test_experts_that_config_json_does_not_count(tmp_path):
    report = check(tmp_path, experts(0), config(num_experts=3))
    assert severities(report)["experts-miscounted"] == "garbage"
    assert outcomes(report)[FORK_CPU] == "refused"


def test_same_config_of_another_method(tmp_path):
    model = config()
    model["quantization_config"]["quant_method"] = "compressed-tensors"
    report = check(tmp_path, attention(0), model)
    assert severities(report) == {"not-quark-int8": "note"}


def layers(number: int) -> Tensors:
    """Whole layers of that many, after the first."""
    return {k: v for i in range(number) for k, v in (attention(i) | experts(i)).items()}


def test_layers_after_the_last(tmp_path):
    """Of an architecture whose model was seen to leave them out, and of another."""
    beyond = attention(2) | attention(3)
    model = config(architectures=["Glm4MoeForCausalLM"], n_routed_experts=2)
    report = check(tmp_path, layers(2) | beyond, model)
    [note] = [each for each in report.findings if each.id == "tensor-not-taken"]
    assert note.severity == "note" and note.count == 8
    reads = {(kind.where, kind.treatment.reads) for kind in report.kinds}
    assert ("layers 2-3", "nothing") in reads and ("layers 0-1", "INT8") in reads
    assert outcomes(report)[FORK_GPU] == "right"
    report = check(tmp_path, layers(2) | beyond, config())
    assert severities(report)["module-unknown"] == "note"
    assert outcomes(report)[FORK_GPU] == outcomes(report)[NEW] == "not known"


def test_architecture_that_is_not_known(tmp_path):
    report = check(tmp_path, layers(2), config(architectures=["NobodysForCausalLM"]))
    assert set(outcomes(report).values()) == {"not known"} and report.exit_status == 0
    assert {kind.treatment.reads for kind in report.kinds} == {"not known"}


@pytest.mark.parametrize("shape", [(4, 4), (4, 1, 4)])
def test_matrix_of_which_nothing_is_known(shape, tmp_path):
    """A float that no release told of is not called right."""
    more: Tensors = {"model.layers.0.self_attn.new_gate.weight": ("BF16", shape)}
    report = check(tmp_path, layers(2) | more, config())
    assert severities(report)["module-unknown"] == "note"
    assert set(outcomes(report).values()) == {"not known", "refused"}
    assert outcomes(report)[OLD] == "refused"


def test_layer_of_which_nothing_is_there(tmp_path):
    report = check(tmp_path, layers(2), config(num_hidden_layers=3))
    assert severities(report)["weight-missing"] == "garbage"
    assert outcomes(report)[FORK_CPU] == outcomes(report)[FORK_GPU] == "refused"


def test_router_that_nobody_names(tmp_path):
    """Quark names torch.nn.Linear alone: read as it is stored, and by releases as
    INT8."""
    model = config(architectures=["Qwen3MoeForCausalLM"])
    tensors = layers(2) | floats("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    report = check(tmp_path, tensors, model)
    assert outcomes(report)[MIDDLE] == outcomes(report)[NEW] == "garbage"
    assert outcomes(report)[FORK_GPU] == "right" and report.exit_status == 1
    found = [each for each in report.findings if each.id == "float-not-excluded"]
    assert [each.severity for each in found] == ["garbage", "note"]
    # Named, but by Quark's own default, which no release reads.
    model["quantization_config"]["exclude"] = ["*lm_head", "*.gate"]
    report = check(tmp_path, tensors, model)
    assert severities(report)["exclude-patterns"] == "garbage"
    assert outcomes(report)[FORK_GPU] == "right"


def test_fused_layer_of_a_model_that_does_not_say_so(tmp_path):
    """Starcoder2's has no packed_modules_mapping, in any release."""
    names = [f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"]
    model = config(names, architectures=["Starcoder2ForCausalLM"], num_hidden_layers=1)
    mlp = int8("model.layers.0.mlp.c_fc", "model.layers.0.mlp.c_proj")
    report = check(tmp_path, attention(0, floats) | mlp, model)
    assert severities(report)["exclude-fused"] == "garbage"
    assert outcomes(report)[MIDDLE] == outcomes(report)[NEW] == "garbage"
    assert outcomes(report)[FORK_GPU] == "right"


def test_override_that_leaves_a_layer_as_floats(tmp_path):
    model = config(num_hidden_layers=1)
    model["quantization_config"]["layer_quant_config"] = {"*o_proj": {"weight": None}}
    name = "model.layers.0.self_attn.o_proj"
    tensors = attention(0)
    del tensors[f"{name}.weight_scale"]
    report = check(tmp_path, tensors | floats(name), model)
    assert severities(report)["scheme-unread"] == "refused"
    assert outcomes(report)[MIDDLE] == outcomes(report)[NEW] == "refused"
    assert outcomes(report)[FORK_GPU] == "right"


def test_key_value_cache_in_fp8(tmp_path):
    model = config(num_hidden_layers=1)
    quark = model["quantization_config"]
    quark["export"] = {**quark["export"], "kv_cache_group": ["*k_proj", "*v_proj"]}
    layer = {**quark["global_quant_config"], "output_tensors": {"dtype": "fp8_e4m3"}}
    quark["layer_quant_config"] = {
        each: copy.deepcopy(layer) for each in ("*k_proj", "*v_proj")
    }
    more: Tensors = {
        f"model.layers.0.self_attn.{each}_proj.output_scale": ("F32", ())
        for each in "kv"
    }
    report = check(tmp_path, attention(0) | more, model)
    assert severities(report)["key-value-cache"] == "note"
    assert outcomes(report)[MIDDLE] == outcomes(report)[FORK_GPU] == "right"


def test_key_twice(tmp_path):
    check(tmp_path, layers(2), config())
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text[:-1] + ', "num_experts": 2}')
    report = run.check(tmp_path)
    assert severities(report)["keys-twice"] == "note" and report.exit_status == 0


def test_weights_of_another_format(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not looked into"):
        run.check(tmp_path)


def test_rotation(tmp_path):
    more: Tensors = {"model.layers.0.self_attn.q_proj.input_rotation": ("I8", (4, 4))}
    report = check(tmp_path, layers(2) | more, config())
    assert severities(report)["rotation-not-applied"] == "garbage"
    assert outcomes(report)[FORK_CPU] == outcomes(report)[FORK_GPU] == "refused"


def test_weight_without_rows_is_no_reason_to_stop(tmp_path):
    tensors = layers(2) | {"model.x.weight": ("BF16", (0, 4))}
    assert check(tmp_path, tensors, config()).exit_status == 0


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([2, 1, 0], "0-2"), ([0, 2, 3, 9], "0, 2-3, 9")],
)
def test_spans(numbers, text):
    assert spans(numbers) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (217e9, "217.0 GB")],
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text
