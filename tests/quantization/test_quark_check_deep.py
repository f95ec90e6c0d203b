# SPDX-License-Identifier: Apache-2.0
"""`vllm quark-check --deep`: every statistic against its own planted defect, against
clean exports, and against torch in float64."""

import json
import math
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.model_executor.layers.quantization.quark.quark_check import stored
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
)
from vllm.model_executor.layers.quantization.quark.quark_check.deep import measure
from vllm.model_executor.layers.quantization.quark.quark_check.deep.find import (
    DeepResult,
    deep_findings,
)
from vllm.model_executor.layers.quantization.quark.quark_check.deep.measure import (
    ModuleStats,
)
from vllm.model_executor.layers.quantization.quark.quark_check.deep.outliers import (
    norm_outliers,
)
from vllm.model_executor.layers.quantization.quark.quark_check.known import Known, know
from vllm.model_executor.layers.quantization.quark.quark_check.opened import (
    open_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.plot import (
    histogram,
    write_histogram,
)

from tests.fixtures.cells import CELLS, Cell
from tests.quantization.exports import FIXTURES, PER_EXPERT, STACKED, Export

BF16 = FIXTURES / "bf16"
EXPERT = "model.layers.2.moe.experts.3.up_proj"
STACK = "model.layers.2.moe.up_proj"
LINEAR = "model.layers.1.self_attn.k_proj"


def look(folder: Path, reference: Path | None = None) -> DeepResult:
    return deep_findings(known_of(folder), reference)


def known_of(folder: Path) -> Known:
    known = know(open_checkpoint(folder))
    assert known is not None
    return known


def ids(result: DeepResult) -> set[str]:
    return {found.id for found in result.findings}


def stats(result: DeepResult, name: str) -> ModuleStats:
    [found] = [module for module in result.modules if module.name == name]
    return found


# Clean exports.

FOUND = {
    "weight-asymmetric": {"zero-point-not-zero"},
    "act-static-asymmetric": {"zero-point-not-zero"},
}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_every_cell(cell: Cell, tmp_path: Path):
    result = look(cell.write(tmp_path / "cell"))
    assert ids(result) == FOUND.get(cell.key, set())
    assert len(result.modules) > 50


def test_a_clean_export_is_near_its_reference():
    result = look(FIXTURES / PER_EXPERT, BF16)
    assert not result.findings
    errors = [module.error for module in result.modules]
    assert all(error is not None and 0.001 < error < 0.02 for error in errors)


def test_both_layouts_have_the_same_statistics():
    found = [look(FIXTURES / name, BF16).modules for name in (PER_EXPERT, STACKED)]
    one, other = (sorted(modules, key=lambda each: each.name) for modules in found)
    assert one == other


# Planted defects: each is found, named, and nothing else is.


def set_scale(value: float) -> Callable[[Export], str]:
    def plant(export: Export) -> str:
        export.tensors[f"{EXPERT}.weight_scale"][5] = value
        return f"{EXPERT}.weight_scale"

    return plant


def infinite_norm(export: Export) -> str:
    export.tensors["model.norm.weight"][0] = math.inf
    return "model.norm.weight"


def nan_in_the_head(export: Export) -> str:
    export.tensors["lm_head.weight"][-1, -1] = math.nan
    return "lm_head.weight"


def zero_point_of_weights(export: Export) -> str:
    zero_point = torch.zeros(64, dtype=torch.int8)
    zero_point[63] = -1
    export.tensors[f"{EXPERT}.weight_zero_point"] = zero_point
    return f"{EXPERT}.weight_zero_point"


def zero_point_of_activations(export: Export) -> str:
    name = f"{EXPERT}.input_zero_point"
    export.tensors[name] = torch.tensor(3, dtype=torch.int32)
    return name


def saturated_row(export: Export) -> str:
    export.tensors[f"{EXPERT}.weight"][7, ::2] = -128
    return EXPERT


def zero_channel(export: Export) -> str:
    export.tensors[f"{EXPERT}.weight"][7] = 0
    export.tensors[f"{EXPERT}.weight_scale"][7] = 0
    return f"{EXPERT}.weight_scale"


def scaled_layer(export: Export) -> str:
    export.tensors[f"{LINEAR}.weight_scale"] *= 8
    return LINEAR


def shrunk_layer(export: Export) -> str:
    export.tensors[f"{LINEAR}.weight_scale"] /= 8
    return LINEAR


def scaled_expert(export: Export) -> str:
    export.tensors[f"{EXPERT}.weight_scale"] *= 8
    return EXPERT


PLANTED = {
    "NaN scale": (set_scale(math.nan), "non-finite", "garbage"),
    "infinite scale": (set_scale(math.inf), "non-finite", "garbage"),
    "infinite norm": (infinite_norm, "non-finite", "garbage"),
    "NaN in the head": (nan_in_the_head, "non-finite", "garbage"),
    "scale of zero": (set_scale(0.0), "scale-not-positive", "garbage"),
    "negative scale": (set_scale(-0.001), "scale-not-positive", "garbage"),
    "channel of zeros": (zero_channel, "zero-channels", "note"),
    "weights' zero point": (zero_point_of_weights, "zero-point-not-zero", "garbage"),
    "activations' zero point": (
        zero_point_of_activations,
        "zero-point-not-zero",
        "garbage",
    ),
    "saturated row": (saturated_row, "saturated-weights", "warning"),
    "layer scaled by 8": (scaled_layer, "norm-outlier", "warning"),
    "layer scaled by 1/8": (shrunk_layer, "norm-outlier", "warning"),
    "expert scaled by 8": (scaled_expert, "norm-outlier", "warning"),
}


@pytest.mark.parametrize(
    ("plant", "id", "severity"), PLANTED.values(), ids=PLANTED.keys()
)
def test_a_planted_defect_is_found(
    plant: Callable[[Export], str], id: str, severity: str, tmp_path: Path
):
    export = Export(PER_EXPERT)
    name = plant(export)
    [found] = look(export.write(tmp_path / "export")).findings
    assert (found.id, found.severity) == (id, severity)
    assert (found.tensors, found.count) == ((name,), 1)
    assert found.why and found.remedy


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_defect_of_one_stacked_expert_is_found(value: float, tmp_path: Path):
    export = Export(STACKED)
    export.tensors[f"{STACK}.weight_scale"][3, 5] = value
    [found] = look(export.write(tmp_path / "export")).findings
    assert found.tensors == (f"{STACK}.weight_scale",)


def test_an_outlier_of_a_stack_has_the_expert_in_its_name(tmp_path: Path):
    export = Export(STACKED)
    export.tensors[f"{STACK}.weight_scale"][3] *= 8
    [found] = look(export.write(tmp_path / "export")).findings
    assert (found.id, found.tensors) == ("norm-outlier", (EXPERT,))


def test_zero_points_that_kernels_read_are_left_alone(tmp_path: Path):
    """Those of static asymmetric activations of linear layers."""
    export = Export("act-static-asymmetric")
    for name, tensor in export.tensors.items():
        if ".experts." in name and name.endswith("input_zero_point"):
            tensor.zero_()
    read = export.tensors[f"{LINEAR}.input_zero_point"]
    assert read.any()
    assert not look(export.write(tmp_path / "export")).findings


def module(name: str, rms: float) -> ModuleStats:
    return ModuleStats(name, 4, 4, 0.1, 0.1, 0.0, 0, rms, None)


@pytest.mark.parametrize("odd", [0, 1, 5, 9])
def test_a_layer_of_experts_is_compared_with_its_neighbours(odd: int):
    modules = [
        module(
            f"model.layers.{layer}.moe.experts.{expert}.up_proj",
            (1 + expert / 10) * (8 if layer == odd else 1),
        )
        for layer in range(10)
        for expert in range(4)
    ]
    found = norm_outliers(modules)
    assert list(found) == [f"model.layers.{odd}.moe.experts.*.up_proj"]
    assert found[f"model.layers.{odd}.moe.experts.*.up_proj"] == pytest.approx(8)


def test_norms_that_drift_from_layer_to_layer_are_no_outliers():
    modules = [module(f"model.layers.{n}.mlp.up_proj", 1.4**n) for n in range(40)]
    assert not norm_outliers(modules)


def test_too_few_neighbours_say_nothing():
    modules = [module(f"model.layers.{n}.mlp.up_proj", 100.0**n) for n in range(3)]
    assert not norm_outliers(modules)


# Numbers, against torch in float64.


def random_export(
    rng: torch.Generator, folder: Path, shape: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """One module `model.layers.0.mlp.up_proj`: its weight, scales and reference."""
    weight = torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)
    scales = torch.rand(scale, generator=rng) + 0.01
    rows = scales.reshape(*scale, *[1] * (len(shape) - len(scale))).double()
    noise = torch.randn(shape, generator=rng, dtype=torch.float64)
    reference = (weight.double() * rows + 5 * noise).to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    for path, tensors in (
        (folder / "int8", {f"{name}.weight": weight, f"{name}.weight_scale": scales}),
        (folder / "bf16", {f"{name}.weight": reference}),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
    config = Export(PER_EXPERT).config
    config["quantization_config"]["exclude"] = []
    (folder / "int8/config.json").write_text(json.dumps(config))
    return weight, scales, reference


@pytest.mark.parametrize("chunk", [1, 7, 24, stored.CHUNK])
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((9, 13), (9,)), ((9, 13), (9, 1)), ((9, 13), (1,)), ((9, 13), ())]
    + [((3, 5, 11), (3, 5)), ((3, 5, 11), (3, 5, 1)), ((3, 5, 11), (3,))],
)
def test_statistics(
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    chunk: int,
    rng: torch.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Whatever the shape, and in however many parts it is read."""
    monkeypatch.setattr(stored, "CHUNK", chunk)
    weight, scales, reference = random_export(rng, tmp_path, shape, scale)
    result = look(tmp_path / "int8", tmp_path / "bf16")
    count = shape[0] if len(shape) == 3 else 1
    assert len(result.modules) == count
    for index, found in enumerate(result.modules):
        one = weight[index] if count > 1 else weight
        expected = (reference[index] if count > 1 else reference).double()
        own = (scales[index] if count > 1 else scales).double()
        real = one.double() * own.reshape(-1, 1)
        difference = (real - expected).norm() / expected.norm()
        ends = (one.int().abs() >= 127).sum(1)
        assert (found.rows, found.columns) == tuple(one.shape)
        assert found.scale_min == own.min().item()
        assert found.scale_max == own.max().item()
        assert found.rms == pytest.approx(real.square().mean().sqrt().item(), 1e-12)
        assert found.error == pytest.approx(difference.item(), 1e-12)
        assert found.saturated == ends.sum().item() / one.numel()
        assert found.saturated_rows == (ends >= measure.SATURATED_COUNT).sum()


@pytest.mark.parametrize("chunk", [50, 100, stored.CHUNK])
def test_saturated_rows_are_counted_in_however_many_parts(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "CHUNK", chunk)
    export = Export(PER_EXPERT)
    weight = export.tensors[f"{EXPERT}.weight"].fill_(1)
    weight[0, : measure.SATURATED_COUNT] = 127
    weight[1, -measure.SATURATED_COUNT :] = -127
    weight[2, : measure.SATURATED_COUNT - 1] = -128
    weight[63, 20:30] = 127
    found = stats(look(export.write(tmp_path / "export")), EXPERT)
    assert found.saturated_rows == 3


# The reference.


def test_a_stacked_reference_fits_single_experts_and_the_other_way(tmp_path: Path):
    export = Export("bf16")
    stacks = {
        name for name, tensor in export.tensors.items() if tensor.ndim == 3
    }  # the committed reference is stacked, and so the other way is made here
    for name in stacks:
        parent, last, suffix = name.rsplit(".", 2)
        for expert, tensor in enumerate(export.tensors.pop(name)):
            single = f"{parent}.experts.{expert}.{last}.{suffix}"
            export.tensors[single] = tensor.clone()
    assert stacks
    other = export.write(tmp_path / "reference")
    for name in (PER_EXPERT, STACKED):
        folder = FIXTURES / name
        assert look(folder, BF16).modules == look(folder, other).modules


def test_weights_of_another_scale_are_not_the_references(tmp_path: Path):
    export = Export(PER_EXPERT)
    export.tensors[f"{EXPERT}.weight_scale"] *= 2
    result = look(export.write(tmp_path / "export"), BF16)
    [found] = result.findings
    assert (found.id, found.tensors) == ("reference-differs", (EXPERT,))
    assert stats(result, EXPERT).error == pytest.approx(1, 0.01)


def test_weights_that_were_cut_off_are_far_from_the_reference(tmp_path: Path):
    export = Export(PER_EXPERT)
    weight, scale = (
        export.tensors[f"{EXPERT}.{n}"] for n in ("weight", "weight_scale")
    )
    real = weight.float() * scale[:, None]
    scale /= 2
    weight.copy_((real / scale[:, None]).round().clamp(-127, 127))
    result = look(export.write(tmp_path / "export"), BF16)
    found = {each.id: each for each in result.findings}
    assert found.keys() == {"reference-error", "saturated-weights"}
    assert {each.tensors for each in found.values()} == {(EXPERT,)}


def test_a_nan_scale_differs_from_the_reference(tmp_path: Path):
    export = Export(PER_EXPERT)
    set_scale(math.nan)(export)
    result = look(export.write(tmp_path / "export"), BF16)
    assert ids(result) == {"non-finite", "reference-differs"}
    assert (stats(result, EXPERT).error, stats(result, EXPERT).rms) == (None, None)
    assert stats(result, EXPERT).scale_max


def test_what_the_reference_lacks_is_named(tmp_path: Path):
    export = Export("bf16")
    del export.tensors[f"{LINEAR}.weight"]
    [found] = look(FIXTURES / PER_EXPERT, export.write(tmp_path / "bf16")).findings
    assert (found.id, found.tensors) == ("reference-missing", (LINEAR,))


@pytest.mark.parametrize("name", [PER_EXPERT, STACKED])
def test_an_int8_reference_is_refused(name: str):
    with pytest.raises(CheckpointError, match=r"floats \[\d+, \d+\].*found I8"):
        look(FIXTURES / PER_EXPERT, FIXTURES / name)


def test_a_reference_of_another_shape_is_refused(tmp_path: Path):
    export = Export("bf16")
    export.tensors[f"{LINEAR}.weight"] = torch.zeros(64, 64)
    with pytest.raises(CheckpointError, match=r"k_proj.weight in .*found F32 \[64, 64"):
        look(FIXTURES / PER_EXPERT, export.write(tmp_path / "bf16"))


def test_a_reference_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="in safetensors, found no"):
        look(FIXTURES / PER_EXPERT, tmp_path)


# Reading.


def test_tensors_are_read_in_parts(tmp_path: Path):
    """A matrix of 128 MiB, and its reference of 256 MiB, in less than 48 MiB."""
    rows, columns = 1 << 15, 1 << 12
    name = "model.layers.0.mlp.up_proj"
    for file, tensors in (
        ("int8", {"weight": ("I8", [rows, columns]), "weight_scale": ("F32", [rows])}),
        ("bf16", {"weight": ("BF16", [rows, columns])}),
    ):
        header, position = {}, 0
        for suffix, (dtype, shape) in tensors.items():
            size = math.prod(shape) * {"I8": 1, "BF16": 2, "F32": 4}[dtype]
            offsets = [position, position + size]
            header[f"{name}.{suffix}"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": offsets,
            }
            position += size
        text = json.dumps(header).encode()
        (tmp_path / file).mkdir()
        with (tmp_path / file / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + position)  # sparse: no block is written
    config = Export(PER_EXPERT).config
    config["quantization_config"]["exclude"] = []
    (tmp_path / "int8/config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        result = look(tmp_path / "int8", tmp_path / "bf16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.modules[0].error == 0.0
    assert peak < 48 << 20


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path):
    folder = Export(PER_EXPERT).write(tmp_path / "export")
    known = known_of(folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(500_000)
    with pytest.raises(CheckpointError, match="model.safetensors: expected .* numbers"):
        deep_findings(known)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 4, 4)])
def test_empty_weights_are_passed_over(shape: tuple[int, ...], tmp_path: Path):
    export = Export(PER_EXPERT)
    export.tensors["model.layers.0.extra.weight"] = torch.zeros(shape, dtype=torch.int8)
    assert not look(export.write(tmp_path / "export")).findings


def test_scales_that_do_not_fit_are_left_to_the_layout(tmp_path: Path):
    export = Export(PER_EXPERT)
    export.tensors[f"{EXPERT}.weight_scale"] = torch.ones(7)
    del export.tensors[f"{LINEAR}.weight_scale"]
    result = look(export.write(tmp_path / "export"), BF16)
    assert not result.findings
    for name in (EXPERT, LINEAR):
        found = stats(result, name)
        assert (found.scale_min, found.rms, found.error) == (None, None, None)


def test_progress_ends_at_the_total():
    folder, seen = FIXTURES / STACKED, []
    known = known_of(folder)
    tensors = known.export.tensors
    deep_findings(known, BF16, lambda *call: seen.append(call))
    done = [each for each, _ in seen]
    assert done == sorted(done) and len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > sum(t.end - t.start for t in tensors.values())


def test_the_result_is_json():
    result = look(FIXTURES / PER_EXPERT, BF16)
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    [one] = [each for each in found["modules"] if each["name"] == EXPERT]
    assert ModuleStats(**one) == stats(result, EXPERT)


# The picture.


def test_the_histogram_counts_every_module():
    modules = look(FIXTURES / PER_EXPERT, BF16).modules
    edges, counts = histogram(modules)
    assert sum(found.sum() for found in counts.values()) == len(modules)
    assert counts["k_proj"].sum() == 4
    errors = [each.error for each in modules if each.name.endswith("k_proj")]
    assert all(edges[0] <= error <= edges[-1] for error in errors)


def test_the_histogram_has_a_place_for_zero_and_none():
    modules = [module("a.x", 1.0)] + [
        ModuleStats("a.x", 1, 1, 1.0, 1.0, 0.0, 0, 1.0, error) for error in (0.0, 0.5)
    ]
    assert histogram(modules)[1]["x"].sum() == 2


def test_the_picture_is_a_png(tmp_path: Path):
    file = tmp_path / "errors.png"
    write_histogram(look(FIXTURES / PER_EXPERT, BF16).modules, file, "errors")
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1200, 675)


def test_without_matplotlib_there_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CheckpointError, match="pip install matplotlib"):
        write_histogram([], tmp_path / "errors.png", "errors")


def test_nothing_to_draw_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="--reference"):
        write_histogram([module("a.x", 1.0)], tmp_path / "errors.png", "errors")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path):
    modules = look(FIXTURES / PER_EXPERT, BF16).modules
    with pytest.raises(CheckpointError, match="expected a file to write to"):
        write_histogram(modules, tmp_path / "none/errors.png", "errors")
