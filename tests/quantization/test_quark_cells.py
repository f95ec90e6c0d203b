# SPDX-License-Identifier: Apache-2.0
"""The cells of the matrix: that each is what it says, and that plain torch reads it.

`make matrix` runs them through the engine.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from examples import matrix
from tests.fixtures import addition, qwen2_moe_tiny, relayout
from tests.fixtures.cells import BASE, CELLS, FIXTURES, MAIN_MODEL, Cell
from tests.models import step3p5_reference as reference

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = addition.held_out(200)
PROMPTS = [addition.encode(addition.question(*pair)) for pair in QUESTIONS]
BF16 = FIXTURES / MAIN_MODEL / "bf16"
MODELS = sorted({cell.model for cell in CELLS})
BY_KEY = {cell.key: cell for cell in CELLS}

every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)


@pytest.fixture(scope="module")
def bf16_logprobs(one_thread: None) -> Tensor:
    return reference.logprobs(reference.load(BF16), PROMPTS)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# The registry.


def test_keys_are_unique_and_fit_for_files():
    keys = [cell.key for cell in CELLS]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if Path(key).name != key]


@every_cell
def test_what_is_made_by_hand_says_why(cell: Cell):
    assert bool(cell.why_by_hand) == (cell.made_by == "hand")
    assert bool(cell.relayout) == bool(cell.source)
    assert cell.made_by == "hand" or not cell.relayout


@pytest.mark.parametrize("model", MODELS)
def test_files_are_those_of_the_manifest(model: str):
    folder = FIXTURES / model
    expected = json.loads((folder / "MANIFEST.json").read_text())["sha256"]
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "MANIFEST.json"
    }
    assert found == expected


@pytest.mark.parametrize("model", MODELS)
def test_no_folder_is_without_a_cell(model: str):
    folders = {path.name for path in (FIXTURES / model).iterdir() if path.is_dir()}
    cells = {cell.name for cell in CELLS if cell.model == model and not cell.source}
    assert folders == cells | {"bf16"}


def test_files_are_small_enough_to_commit():
    sizes = [path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()]
    assert max(sizes) < 4e6
    assert sum(sizes) < 32e6


# What each cell holds.


@every_cell
def test_a_cell_is_a_whole_checkpoint(cell: Cell, tmp_path: Path):
    folder = cell.write(tmp_path / "cell")
    assert (folder / "tokenizer.json").exists()
    held = tensors(folder)
    assert any(tensor.dtype == torch.int8 for tensor in held.values())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == held.keys()


@pytest.mark.parametrize(
    "cell",
    [
        cell
        for cell in CELLS
        if cell.model == MAIN_MODEL and cell.key != "scale-missing"
    ],
    ids=lambda cell: cell.key,
)
def test_plain_torch_reads_it_right(cell: Cell, tmp_path: Path, bf16_logprobs: Tensor):
    """So where vLLM answers otherwise, its reading is to blame and not the export."""
    folder = cell.write(tmp_path / "cell")
    found = reference.logprobs(reference.load(folder), PROMPTS)
    assert not torch.equal(found, bf16_logprobs)
    likeliest = bf16_logprobs.topk(20).indices
    delta = (found - bf16_logprobs).abs().gather(1, likeliest).mean().item()
    assert delta < matrix.BAR_DIFFERENCE / 2
    assert reference.agreement(bf16_logprobs, found)[1] >= matrix.BAR_OVERLAP


def test_qwen2_moe_reference_depends_on_the_shared_expert(tmp_path: Path):
    folder = FIXTURES / "qwen2-moe-tiny/bf16"
    whole = qwen2_moe_tiny.logprobs(folder, PROMPTS[:8])
    weights = qwen2_moe_tiny.random_weights()
    held = load_file(folder / "model.safetensors")
    assert all(torch.equal(held[name], weight) for name, weight in weights.items())
    assert whole.exp().sum(-1).allclose(torch.ones(8))


NO_ZERO = "weight_zero_point"
EXPERT = "model.layers.2.moe.experts.0.up_proj"


def test_cells_vary_what_they_say(tmp_path: Path):
    held = {key: tensors(cell.weights_folder) for key, cell in BY_KEY.items()}
    config = {key: quantization(cell.folder) for key, cell in BY_KEY.items()}
    scale = f"{EXPERT}.weight_scale"
    assert held[BASE][scale].shape == (64,) and held[BASE][scale].dtype == torch.float32
    assert held["weight-per-tensor"][scale].shape == ()
    assert held["layer-override"][scale].shape == (64,)
    attention = "model.layers.2.self_attn"
    assert held["layer-override"][f"{attention}.o_proj.weight_scale"].shape == ()
    assert "*.o_proj" in config["layer-override"]["layer_quant_config"]
    assert "Linear" in config["layer-type-override"]["layer_type_quant_config"]
    assert held["layer-type-override"][scale].shape == (64,)
    assert held["scales-bfloat16"][scale].dtype == torch.bfloat16
    assert not held["scales-bfloat16"][f"{EXPERT}.{NO_ZERO}"].any()
    assert held["weight-asymmetric"][f"{EXPERT}.{NO_ZERO}"].any()
    assert held["act-static"][f"{EXPERT}.input_scale"] > 0
    assert not held["act-static"][f"{EXPERT}.input_zero_point"].any()
    assert held["act-static-asymmetric"][f"{EXPERT}.input_zero_point"].any()
    assert not [
        name
        for name in held["act-static-without-scales"]
        if name.endswith("input_scale")
    ]
    for key, layer in (
        ("shared-quantized", "model.layers.2.share_expert.up_proj"),
        ("dense-quantized", "model.layers.0.mlp.up_proj"),
        ("lm-head-quantized", "lm_head"),
        ("all-quantized", "model.layers.2.moe.gate"),
    ):
        assert held[key][f"{layer}.weight"].dtype == torch.int8
        assert held[BASE][f"{layer}.weight"].dtype == torch.bfloat16
        assert layer in config[BASE]["exclude"] and layer not in config[key]["exclude"]
    q_proj = f"{attention}.q_proj.weight"
    assert held["attention-excluded"][q_proj].dtype == torch.bfloat16
    assert len(list(BY_KEY["sharded"].folder.glob("*.safetensors"))) == 4


# Re-layouts, each on the smallest example of what it changes.


def excluding(*names: str) -> dict:
    return {"quantization_config": {"exclude": list(names)}}


EXCLUDED = (
    "lm_head",
    "model.layers.12.share_expert.up_proj",
    "model.layers.2.moe.gate",
)


def test_exclude_by_glob():
    _, config = relayout.exclude_by_glob({}, excluding(*EXCLUDED))
    expected = ["*.share_expert.*", "lm_head", "model.layers.*.moe.gate"]
    assert config["quantization_config"]["exclude"] == expected


def test_exclude_by_regex():
    _, config = relayout.exclude_by_regex({}, excluding(*EXCLUDED))
    assert config["quantization_config"]["exclude"] == [
        "re:lm_head",
        r"re:model\.layers\.\d+\.moe\.gate",
        r"re:model\.layers\.\d+\.share_expert\.up_proj",
    ]


def test_forget_shared_experts_leaves_its_argument_alone():
    given = excluding(*EXCLUDED)
    _, config = relayout.forget_shared_experts({}, given)
    kept = ["lm_head", "model.layers.2.moe.gate"]
    assert config["quantization_config"]["exclude"] == kept
    assert given == excluding(*EXCLUDED)


def test_scales_change_and_weights_do_not():
    weights = {"a.weight": torch.ones(3, 4), "a.weight_scale": torch.rand(3)}
    columns, _ = relayout.column_scales(weights, {})
    assert columns["a.weight_scale"].shape == (3, 1)
    halves, _ = relayout.float16_scales(weights, {})
    assert halves["a.weight_scale"].dtype == torch.float16
    for changed in (columns, halves):
        assert torch.equal(changed["a.weight"], weights["a.weight"])


def test_drop_a_scale_drops_one():
    names = [
        f"l.moe.experts.{e}.up_proj.weight{s}" for e in "01" for s in ("", "_scale")
    ]
    left, _ = relayout.drop_a_scale(dict.fromkeys(names, torch.ones(1)), {})
    assert set(names) - set(left) == {"l.moe.experts.1.up_proj.weight_scale"}


def test_an_export_that_lost_a_file_is_an_error(tmp_path: Path):
    folder = BY_KEY["sharded"].write(tmp_path / "cell")
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SafetensorError):
        reference.load(folder)


# How outcomes are told apart.


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict]:
    """A reference of four questions, and the same answers as a build gives them."""
    monkeypatch.setattr(matrix, "QUESTIONS", QUESTIONS[:4])
    monkeypatch.setattr("examples.compare_builds.QUESTIONS", QUESTIONS[:4])
    logprobs = torch.randn(4, 64).log_softmax(-1)
    texts = [addition.answer(*pair) for pair in QUESTIONS[:4]]
    given = {"texts": list(texts), "logprobs": logprobs.tolist()}
    return {"texts": texts, "logprobs": logprobs}, given


def test_the_same_answers_are_right(answers: tuple[dict, dict]):
    right, given = answers
    assert matrix.judge(given, right)["outcome"] == "right"


def test_one_wrong_answer_of_four_is_garbage(answers: tuple[dict, dict]):
    right, given = answers
    given["texts"][2] = "no number"
    found = matrix.judge(given, right)
    assert (found["outcome"], found["exact_match"]) == ("garbage", 0.75)


@pytest.mark.parametrize("shift", [0.2, float("nan")])
def test_other_logprobs_are_garbage(answers: tuple[dict, dict], shift: float):
    right, given = answers
    rows = [[value + shift for value in row] for row in given["logprobs"]]
    if shift != shift:  # what ask_checkpoints.py writes for it
        rows = [[None] * len(row) for row in rows]
    found = matrix.judge(given | {"logprobs": rows}, right)
    assert found["outcome"] == "garbage"


def test_random_models_are_judged_by_logprobs_alone(answers: tuple[dict, dict]):
    right, given = answers
    del right["texts"]
    given["texts"][0] = "anything"
    found = matrix.judge(given, right)
    assert found["outcome"] == "right" and "exact_match" not in found


@pytest.mark.parametrize(("loaded", "outcome"), [(False, "refused"), (True, "crashed")])
def test_an_error_refuses_only_while_loading(loaded: bool, outcome: str):
    found = matrix.judge({"error": "no", "loaded": loaded}, {})
    assert found == {"outcome": outcome, "error": "no"}


@pytest.mark.parametrize(
    ("expected", "outcome", "fine"),
    [
        ("right", "right", True),
        ("right", "refused", False),
        ("right", "garbage", False),
        ("refused", "refused", True),
        ("refused", "right", True),
        ("refused", "garbage", False),
        ("refused", "crashed", False),
    ],
)
def test_as_expected(expected: str, outcome: str, fine: bool):
    cell = Cell("name", "varies", expected=expected)  # type: ignore[arg-type]
    assert matrix.as_expected(cell, outcome) is fine  # type: ignore[arg-type]
