# SPDX-License-Identifier: Apache-2.0
"""Exports of several families: what they hold, what their references feel, and a few
of them through the engine. `make matrix` runs them all."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples import families as runner
from examples.compare_builds import ask
from examples.families import Cell, faults, judge, judge_control, make_cells
from tests.fixtures import families
from tests.fixtures.families import BY_NAME, FAMILIES, Export, Family

ASKED = (
    "llama--by-glob",
    "qwen3-moe--by-glob",
    "stablelm--attention-excluded",
    "mimo--mtp-bf16",
    "mimo--mtp-int8",
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.needs_group("correct"),  # exports exclude by globs
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def prompts_of(rng: torch.Generator, number: int) -> list[list[int]]:
    seed = int(torch.randint(2**31, (), generator=rng))
    return families.make_prompts(number, seed)


# --- through the engine --------------------------------------------------------------


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    prompts = families.make_prompts(runner.NUM_PROMPTS)
    wanted = [BY_NAME[key.partition("--")[0]] for key in ASKED]
    made = [c for f in dict.fromkeys(wanted) for c in make_cells(f, prompts, None)]
    return {cell.key: cell for cell in made if cell.key in ASKED}


@pytest.fixture(scope="module")
def answers(cells: dict[str, Cell]) -> dict[str, dict]:
    """The fork's, over poisoned memory."""
    prompts = families.make_prompts(runner.NUM_PROMPTS)
    folders = {key: cell.folder for key, cell in cells.items()}
    return dict(ask("test-families", folders, prompts, None, seconds=runner.SECONDS))


@pytest.mark.parametrize("key", ASKED)
def test_the_engine_answers_right(key: str, cells: dict, answers: dict):
    # The unquantized model is not asked: these families run on any device.
    control = judge_control(cells[key], {"error": "not asked"})
    found = judge(cells[key], answers[key], control)
    assert found["outcome"] == "right", found


# --- exports -------------------------------------------------------------------------


@every_family
def test_an_export_says_what_it_leaves_alone(family: Family):
    for name in families.exports(family):
        export = families.make_export(family, name)
        entries = export.config["quantization_config"]["exclude"]
        modules = families._modules(
            {k: v for k, v in export.weights.items() if k not in export.mtp}
        )
        float_modules = {
            m for m in modules if export.weights[f"{m}.weight"].dtype != torch.int8
        }
        named = families._matching(modules, entries)
        assert named <= float_modules, (name, named - float_modules)
        unnamed = float_modules - named
        if name == "by-glob":
            assert not unnamed
        for module in unnamed:
            # Nobody names what is no nn.Linear to Quark.
            is_stack = export.weights[f"{module}.weight"].dim() == 3
            assert is_stack or re.search(family.router, module), (name, module)
        if not family.router_is_linear and name == "by-name":
            assert unnamed
        assert (name == "router-unnamed") <= bool(unnamed)
        globs = [entry for entry in entries if "*" in entry]
        is_by_name = name in ("by-name", "attention-excluded", "experts-float")
        assert bool(globs) is not is_by_name


@every_family
def test_int8_is_what_its_scales_say(family: Family):
    plain = families.float_export(family).weights
    if family.unstack:
        plain = family.unstack(plain)
    export = families.make_export(family, "by-name")
    num_int8 = 0
    for name, tensor in export.weights.items():
        if name.endswith("_scale"):
            assert tensor.dtype == torch.float32
        elif tensor.dtype == torch.int8:
            num_int8 += 1
            scale = export.weights[f"{name}_scale"]
            assert scale.shape == tensor.shape[:-1]
            step = scale.double()[..., None]
            error = (tensor.double() * step - plain[name].double()).abs()
            assert (error <= step * (0.5 + 1e-4)).all()
            assert (tensor.abs().amax(-1) == 127).all()
        else:
            assert torch.equal(tensor, plain[name])
    assert num_int8 >= 8


@pytest.mark.parametrize("name", ["mimo", "qwen3-next", "glm4-moe", "ernie4.5-moe"])
def test_mtp_is_there_and_asked_of_nobody(name: str, rng: torch.Generator):
    family = BY_NAME[name]
    prompts = prompts_of(rng, 4)
    without = families.make_export(family, "by-glob")
    expected = families.logprobs(families.reference(without), prompts)
    for kind, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        export = families.make_export(family, f"mtp-{kind}")
        assert set(without.weights) == set(export.weights) - export.mtp
        assert dtype in {
            export.weights[k].dtype for k in export.mtp & {*export.weights}
        }
        found = families.logprobs(families.reference(export), prompts)
        assert torch.equal(expected, found)


def test_stacks_come_back_from_single_experts(rng: torch.Generator):
    for transposed in (False, True):
        for split in (False, True):
            shape = (3, 6, 4) if transposed else (3, 4, 6)
            stacked = {
                "l.experts.gate_up_proj": torch.randn(shape, generator=rng),
                "l.experts.gate_up_proj_bias": torch.randn(3, 4, generator=rng),
                "l.router.weight": torch.randn(3, 6, generator=rng),
            }
            apart = families._unstack(transposed, split)(stacked)
            part = "gate_proj" if split else "gate_up_proj"
            rows = 2 if split else 4
            assert apart[f"l.experts.2.{part}.weight"].shape == (rows, 6)
            together = families._stack(transposed, split)(apart)
            assert together.keys() == stacked.keys()
            assert all(torch.equal(together[k], stacked[k]) for k in stacked)


def test_an_export_is_written_whole(tmp_path: Path):
    export = families.make_export(BY_NAME["gemma3"], "by-glob")
    folder = export.write(tmp_path / "cell")
    assert load_file(folder / "model.safetensors").keys() == export.weights.keys()
    assert json.loads((folder / "config.json").read_text()) == export.config
    assert (folder / "processor_config.json").exists()


# --- references ----------------------------------------------------------------------


def damaged(export: Export) -> Iterator[tuple[str, Export]]:
    """The export with the channels of one kind of module, in all layers, moved along
    by one; for each kind."""
    kinds: dict[str, list[str]] = {}
    for name in export.weights.keys() - export.mtp:
        if name.endswith("_scale"):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for kind, names in kinds.items():
        weights = dict(export.weights)
        for name in names:
            weight = name.removesuffix("_scale")
            weights[weight] = weights[weight].roll(1, -2)
            weights[name] = weights[name].roll(1, -1)
        yield kind, Export(export.family, weights, export.config, export.mtp)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        "qwen3-moe",
        "qwen3.5-moe",
        "deepseek-v3",
        "gpt-oss",
        "granitemoe",
        "jamba",
    ],
)
def test_a_reference_feels_every_module(name: str):
    """Wrong channels in any kind of module are garbage by the bar."""
    prompts = families.make_prompts(runner.NUM_PROMPTS)
    export = families.make_export(BY_NAME[name], "by-name")
    model = families.reference(export)
    expected = families.logprobs(model, prompts)
    with families.Rounded(model):
        rounded = families.logprobs(model, prompts)
    least = runner.bar(expected, rounded)
    assert runner.overlaps(expected, rounded).mean() > least > 0.85
    for kind, wrong in damaged(export):
        found = families.logprobs(families.reference(wrong), prompts)
        print(kind, runner.overlaps(expected, found).mean().item(), least)
        assert runner.overlaps(expected, found).mean() < least, kind


# --- how outcomes are told apart -----------------------------------------------------


def some_cell(rng: torch.Generator, export: str = "by-name") -> Cell:
    logprobs = torch.randn(8, 64, generator=rng).log_softmax(-1)
    return Cell(
        BY_NAME["llama"], export, Path(), logprobs, logprobs.roll(1, 0), (0.9,) * 2
    )


def answered(logprobs: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"logprobs": logprobs.tolist(), **more}


def test_what_is_right(rng: torch.Generator):
    cell = some_cell(rng)
    control = judge_control(cell, answered(cell.unquantized))
    right = judge(cell, answered(cell.dequantized), control)
    assert right["outcome"] == "right" and right["overlap20"] == 1
    assert right["reference"] == runner.DEQUANTIZED
    assert right["overlap20_unquantized"] < 0.9
    wrong = judge(cell, answered(cell.unquantized), control)
    assert wrong["outcome"] == "garbage"
    rows = answered(cell.dequantized)
    rows["logprobs"][3][5] = None  # what ask_checkpoints.py writes for NaN
    assert judge(cell, rows, control)["outcome"] == "garbage"


def test_pictures_are_asked_of_the_unquantized_model(rng: torch.Generator):
    cell = some_cell(rng)
    pictures = torch.randn(4, 64, generator=rng).log_softmax(-1)
    control = answered(cell.unquantized, pictures=pictures.tolist())
    control = judge_control(cell, control)
    blind = answered(cell.dequantized, pictures=pictures.roll(1, 0).tolist())
    assert judge(cell, blind, control)["outcome"] == "garbage: with pictures"
    sees = answered(cell.dequantized, pictures=pictures.tolist())
    found = judge(cell, sees, control)
    assert found["outcome"] == "right" and found["overlap20_pictures"] == 1
    sees["pictures"][0][0] = None
    assert judge(cell, sees, control)["outcome"] == "garbage: with pictures"


def test_where_a_cpu_is_known_to_differ_the_unquantized_model_is_the_reference(
    rng: torch.Generator,
):
    cell = some_cell(rng)
    others = torch.randn(8, 64, generator=rng).log_softmax(-1)
    control = judge_control(cell, answered(others))
    assert control["outcome"].startswith("garbage: 0.")
    assert judge(cell, answered(others), control)["outcome"] == "garbage"
    known = replace(cell, family=BY_NAME["deepseek-v3-mha"])
    found = judge(known, answered(others), control, is_stock=True)
    assert found["outcome"] == "right"
    assert found["reference"].startswith(runner.STOCK_FLOAT)
    found = judge(known, answered(cell.dequantized), control, is_stock=True)
    assert found["outcome"] == "garbage"
    # What stock does wrong unquantized is no excuse for the fork.
    assert judge(known, answered(others), control)["outcome"] == "garbage"
    assert judge(known, answered(cell.dequantized), control)["outcome"] == "right"
    control = judge_control(cell, answered(cell.unquantized))
    assert control["outcome"] == "right"
    assert judge(known, answered(cell.dequantized), control)["outcome"] == "right"


def test_errors(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cell, error = some_cell(rng), {"error": "KeyError: 'x'", "loaded": False}
    fine = judge_control(cell, answered(cell.unquantized))
    assert judge(cell, error, fine)["outcome"] == "refused: KeyError: 'x'"
    assert judge(cell, error, error)["outcome"] == "needs a GPU: KeyError: 'x'"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert judge(cell, error, error)["outcome"] == "refused: KeyError: 'x'"


@pytest.mark.parametrize(
    ("stock", "fork", "of_stock", "of_fork", "number"),
    [
        ("right", "right", "right", "right", 0),
        ("garbage", "right", "garbage", "right", 0),
        ("refused: why", "refused: why", "not known", "refused", 0),
        ("needs a GPU: why", "needs a GPU: why", "not known", "not known", 0),
        ("right", "refused: why", "right", "refused", 1),
        ("garbage", "garbage", "garbage", "garbage", 1),
        ("right", "garbage: with pictures", "right", "garbage", 2),
        ("garbage", "right", "right", "right", 2),
        ("refused: why", "needs a GPU: why", "refused", "right", 2),
    ],
)
def test_faults(stock: str, fork: str, of_stock: str, of_fork: str, number: int):
    said = {"fork": of_fork, "stock": of_stock}
    checks = {"installed": said, "alone": said}
    row = {"stock": stock, "fork": fork, "quark_check": checks}
    assert len(faults(row | {"unquantized": "right"})) == number
    # Of stock nothing can be said where it is wrong unquantized, of the fork it can.
    of_the_fork = [
        f for f in faults(row | {"unquantized": "right"}) if "of stock" not in f
    ]
    assert faults(row | {"unquantized": "garbage: 0.6"}) == of_the_fork
