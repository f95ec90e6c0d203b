# SPDX-License-Identifier: Apache-2.0
"""What models say of checkpoints without their bytes, and what is told without them."""

import ast
import fnmatch
import inspect
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import regex
import torch
from vllm.model_executor.layers.quantization.quark.quark_check.architectures import (
    Asked,
    Renames,
    architecture,
    general,
    special,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.dry_run import (
    DryRun,
    dry_run,
)
from vllm.model_executor.layers.quantization.quark.quark_check.known import know
from vllm.model_executor.layers.quantization.quark.quark_check.opened import (
    open_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import (
    FORK,
    FORK_GPU,
    releases,
    scope_of,
)
from vllm.model_executor.layers.quantization.quark.quark_check.stock import StockConfig
from vllm.model_executor.layers.quantization.quark.quark_check.verdicts import judge
from vllm.model_executor.models.registry import _VLLM_MODELS
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from tests.fixtures.cells import CELLS
from tests.fixtures.families import BY_NAME, FAMILIES, make_export
from tests.fuzz.mutations import mutate
from tests.moe_layers import plain_name
from tools.errors import ForkError
from tools.fix import QUARK
from tools.peek import sources
from tools.upstream import ROOT

STEP, QWEN = "int8-per-expert", "qwen2-moe-tiny-int8-per-expert"
FAMILY_EXPORTS = (
    "llama--by-glob",
    "qwen3-moe--router-unnamed",
    "qwen3-next--mtp-int8",
    "deepseek-v3--mtp-int8",
    "llama4-text--by-name",
    "mimo--mtp-bf16",
    "starcoder2--attention-excluded",
    "gemma3--by-glob",
    "granitemoe--by-name",
)
# Newer releases have it, and serve such a model on a CPU.
CPU_MLA = "vllm.v1.attention.backends.mla.cpu_mla"
UNKNOWN, LOST = "unknown architecture", "scale-missing"
SEEDS = range(60)


def write(key: str, folder: Path) -> Path:
    family, _, name = key.partition("--")
    if name:
        return make_export(BY_NAME[family], name).write(folder)
    [cell] = [cell for cell in CELLS if cell.key == (STEP if key == UNKNOWN else key)]
    cell.write(folder)
    if key == UNKNOWN:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_asked(folder: Path) -> bool:
    """Whether quark-check comes so far as to ask a model."""
    try:
        return open_checkpoint(folder).export is not None
    except (CheckpointError, ValueError):
        return False


@pytest.fixture
def draw(rng: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(1 << 31, (), generator=rng)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("checkpoints")
    keys = (STEP, QWEN, LOST, UNKNOWN, *FAMILY_EXPORTS)
    found = {key: write(key, place / key.replace(" ", "-")) for key in keys}
    for seed in SEEDS:
        folder = place / str(seed)
        folder.mkdir()
        for name, data in mutate(seed)[1].items():
            (folder / name).write_bytes(data)
        if is_asked(folder):
            found[str(seed)] = folder
    return found


@pytest.fixture(scope="module")
def said(folders: dict[str, Path]) -> dict[str, DryRun]:
    """One process asks all of them: it takes longest to import vLLM."""
    questions = [(each, read_checkpoint(each)) for each in folders.values()]
    return dict(zip(folders, dry_run(questions, 600), strict=True))


def skip_what_is_lacking(key: str) -> None:
    family = BY_NAME.get(key.partition("--")[0])
    if family and family.processor:
        pytest.importorskip("torchvision", reason="its processor of pictures wants it")
    if family and _VLLM_MODELS[family.architecture][0] == "transformers":
        pytest.skip(f"needs {family.architecture}, which this vLLM has no more")


@pytest.mark.parametrize("key", [STEP, QWEN, *FAMILY_EXPORTS])
def test_every_tensor_has_its_place(key, folders, said):
    """The model takes them all, but for other models' and those of pictures."""
    skip_what_is_lacking(key)
    looked = said[key].structure
    assert (said[key].failed, looked.stage, looked.error) == ("", "", "")
    tensors = read_checkpoint(folders[key])
    left = [
        name
        for name in tensors
        if name not in looked.taken and not name.endswith("_scale")
    ]
    beside = ("mtp", "layers.2.") if "mtp" in key else ()
    if looked.only_text:
        beside = ("vision_tower", "multi_modal_projector")
    assert not [name for name in left if not any(each in name for each in beside)]
    assert bool(left) == bool(beside)
    assert not looked.unfilled


def plain(modules: Mapping[str, Any]) -> dict[str, Any]:
    """By name; where a layer of experts is two modules, the one with the weights."""
    left = {n: m for n, m in modules.items() if f"{n}.routed_experts" not in modules}
    return {plain_name(name): module for name, module in left.items()}


def test_what_modules_are(said):
    looked = said[STEP].structure
    layer = "model.layers.3"
    fused = looked.modules[f"{layer}.self_attn.qkv_proj"]
    assert (fused.kind, fused.prefix) == ("linear", f"{layer}.self_attn.qkv_proj")
    assert fused.packed == ("q_proj", "k_proj", "v_proj")  # patch 0003
    assert looked.taken[f"{layer}.self_attn.k_proj.weight"] == (
        f"{layer}.self_attn.qkv_proj.weight",
    )
    experts = plain(looked.modules)[f"{layer}.moe.experts"]
    assert (experts.kind, experts.num_experts) == ("experts", 16)
    assert looked.modules["lm_head"].kind == "head"
    assert looked.modules["model.embed_tokens"].kind == "embedding"
    # A module that no config is asked about is never quantized.
    assert looked.modules["model.norm"].prefix is None


def test_how_modules_are_quantized(said):
    modules = plain(said[STEP].engine.modules)
    attention = modules["model.layers.3.self_attn.qkv_proj"]
    assert (attention.method, attention.scheme) == (
        "QuarkLinearMethod",
        "QuarkW8A8Int8",
    )
    shared = modules["model.layers.3.moe.share_expert.gate_up_proj"]
    assert (shared.method, shared.scheme) == ("UnquantizedLinearMethod", "")
    assert modules["model.layers.3.moe.experts"].method == "QuarkW8A8Int8MoEMethod"
    router = said["qwen3-moe--router-unnamed"].engine
    assert router.modules["model.layers.0.mlp.gate"].method == "UnquantizedLinearMethod"


def test_the_engines_own_problems_are_told(said):
    clean = said[STEP].engine
    assert (clean.stage, clean.problems) == ("", ())
    [router, _] = said["qwen3-moe--router-unnamed"].engine.problems
    assert router["id"] == "float-not-excluded"
    lost = {each["id"] for each in said[LOST].engine.problems}
    assert "scale-missing" in lost


def test_tensors_that_a_loader_makes_anew_are_followed(said):
    """Llama-4's permutes queries and keys before it hands any on."""
    taken = said["llama4-text--by-name"].engine.taken
    name = "model.layers.0.self_attn"
    for part in "qkv":
        assert f"{name}.qkv_proj.weight" in taken[f"{name}.{part}_proj.weight"]


@pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs: GPUs have MLA"
)
def test_what_the_platform_lacks_is_told(said):
    lacks = any("MLA" in each for each in said["deepseek-v3--mtp-int8"].structure.lacks)
    assert lacks != (find_spec(CPU_MLA) is not None)
    assert not said[STEP].structure.lacks


def test_how_far_a_model_got(said):
    assert said[UNKNOWN].structure.stage and said[UNKNOWN].structure.error
    granite = said["granitemoe--by-name"]
    assert granite.structure.stage == ""
    assert granite.engine.stage == "load"
    assert re.search("KeyError|no module or parameter", granite.engine.error)


def test_a_process_that_does_not_answer(tmp_path: Path):
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    [said] = dry_run([(tmp_path, {})], 0.5, slow)
    assert said.failed == "no answer within 0.5 s"
    broken = (sys.executable, "-c", "raise SystemExit('out of memory')")
    [said] = dry_run([(tmp_path, {})], 60, broken)
    assert said.failed == "ended with 1: out of memory"


# --- and what is told without asking ----------------------------------------------


@pytest.mark.parametrize("key", [STEP, QWEN, *FAMILY_EXPORTS])
def test_the_file_tells_what_the_model_tells(key, folders, said):
    """Of exports that it was not made from, too: each tensor's place, and what each
    layer asks."""
    skip_what_is_lacking(key)
    checkpoint = open_checkpoint(folders[key])
    alone, asked = know(checkpoint), know(checkpoint, said[key])
    assert alone and asked and alone.structure and asked.structure
    assert not alone.structure.is_derived and asked.structure.is_derived
    told = dict(alone.structure.places)
    for name, place in asked.structure.places.items():
        module = place and plain_name(place.module)
        expected = place and (module, place.kind, place.asked is not None)
        assert name in told
        found = told.pop(name)
        shown = found and (found.module, found.kind, found.asked is not None)
        assert shown == expected, name
    assert not told
    decided = [
        {
            plain_name(prefix): layer.config is not None
            for prefix, (_, layer) in each.layers.items()
        }
        for each in (alone, asked)
    ]
    assert decided[0] == decided[1]


def outcomes(folder: Path, looked: DryRun | None) -> dict[str, str]:
    checkpoint = open_checkpoint(folder)
    judgement = judge(checkpoint, know(checkpoint, looked))
    return {each.target: each.outcome for each in judgement.verdicts}


def test_verdicts_are_the_same_asked_or_not(folders, said):
    """Of whole and of damaged exports: nothing is right without asking that is refused
    when the model is asked, and the other way around."""
    compared = 0
    for key, folder in folders.items():
        alone, asked = outcomes(folder, None), outcomes(folder, said[key])
        for target in FORK:
            pair = {alone[target], asked[target]}
            assert pair != {"right", "refused"} or "deepseek" in key, (key, target)
            compared += "not known" not in pair
    assert compared > 40


def test_file_knows_every_family():
    missing = [each.name for each in FAMILIES if not architecture(each.architecture)]
    assert not missing
    for each in FAMILIES:
        told = architecture(each.architecture)
        assert told and {"0.20.2", "0.22.0"} <= set(told.releases)


@pytest.mark.parametrize(
    ("name", "pattern", "numbers"),
    [
        ("lm_head", "lm_head", ()),
        ("model.layers.3.mlp", "model.layers.*.mlp", (3,)),
        ("a.0.b2.17", "a.*.b2.*", (0, 17)),
    ],
)
def test_names_with_stars(name, pattern, numbers):
    assert general(name) == (pattern, numbers)
    assert special(pattern, numbers) == name


def test_renames_are_those_of_vllm(draw: random.Random):
    parts = ("model.", "visual.", "language_model.", ".weight", "lm_head", "x")
    for _ in range(300):
        some = lambda: {draw.choice(parts): draw.choice((*parts, "", None))}  # noqa: E731
        renames = {
            f"orig_to_new_{kind}": some() for kind in ("substr", "prefix", "suffix")
        }
        ours = Renames(
            {key[12:]: [list(e) for e in each.items()] for key, each in renames.items()}
        )
        names = ["".join(draw.choices(parts, k=3)) for _ in range(20)]
        assert ours.apply_list(names) == WeightsMapper(**renames).apply_list(names)


# --- how releases read a config -----------------------------------------------------

CONFIG_UTILS = f"{QUARK.rpartition('/')[0]}/utils/config_utils"
HEADER = (
    "from __future__ import annotations\n"
    "from types import MappingProxyType\nfrom typing import *\n"
)
PATTERNS = ("find_matching_patterns", "is_equal_or_regex_match")
IGNORES = (
    "should_ignore_layer",
    "check_equal_or_regex_match",
    "_is_equal_or_regex_match",
)
METHODS = ("_find_matched_config", "get_layer_quant_config_from_name")
# The first and the last release of each.
EVERY_RANGE = [
    version
    for each in releases()
    for version in dict.fromkeys((each.looked_into[0], each.looked_into[-1]))
]


def stock_code(version: str) -> tuple[Any, Any]:
    """A release's own should_ignore_layer and QuarkConfig._find_matched_config."""
    patterns = f"{CONFIG_UTILS}.py"
    names = [f"{QUARK}/utils.py", f"{QUARK}/quark.py", patterns]
    try:
        texts = [each.decode() for each in sources(version, names).values()]
    except ForkError as error:
        pytest.skip(f"needs the sources of vLLM {version}: {error}")
    space: dict[str, Any] = {"re": regex, "fnmatch": fnmatch.fnmatch}
    # From 0.30.0 on a part of utils.py is in another module.
    exec(HEADER + functions(texts[2], PATTERNS), space)
    exec(HEADER + functions(texts[0], ("deep_compare", *IGNORES)), space)
    ignores = space["should_ignore_layer"]
    methods = {**space, "fnmatch": fnmatch}
    exec(HEADER + functions(texts[1], METHODS), methods)
    return ignores, {name: methods[name] for name in METHODS if name in methods}


def functions(text: str, names: Sequence[str]) -> str:
    """Functions of a module, whatever it imports."""
    tree = ast.parse(text)
    kept = [n for n in ast.walk(tree) if getattr(n, "name", "") in names]
    return "\n".join(map(ast.unparse, kept))


def decide_as_stock(
    code: tuple[Any, Any], config: Mapping[str, Any], asked: Asked
) -> object:
    ignores, methods = code
    packed = (
        {asked.prefix.rpartition(".")[2]: list(asked.packed)} if asked.packed else {}
    )
    holder = SimpleNamespace(quant_config=config, packed_modules_mapping=packed)
    for name, method in methods.items():
        setattr(holder, name, partial(method, holder))
    is_experts = asked.kind == "experts"
    children = (
        {"check_children": is_experts}
        if "check_children" in str(inspect.signature(ignores))
        else {}
    )
    try:
        if ignores(
            asked.prefix, ignore=config["exclude"], fused_mapping=packed, **children
        ):
            # Before 0.26.0 they get the method of a linear layer.
            return "refused" if is_experts and not children else None
        return holder._find_matched_config(asked.prefix, object())
    except ValueError:
        return "refused"


@pytest.mark.parametrize("version", EVERY_RANGE)
def test_decides_as_releases_do(version, draw: random.Random):
    """Compared with their own code, on random configs."""
    code = stock_code(version)
    row = scope_of(version).rows[0]
    layers = ("model.layers.0.self_attn", "model.layers.1.mlp", "model.visual.blocks.0")
    parts = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate", "o_proj")
    names = [f"{layer}.{part}" for layer in layers for part in parts]
    patterns = ["*q_proj", "*.self_attn.*", "re:.*k_proj", "re:model.*gate", "*"]
    patterns += ["re:.*qkv_proj", "model.layers.1.mlp.gate.3.up_proj", "*gate.*"]
    seen = set()
    for _ in range(500):
        config = {
            "export": {"kv_cache_group": []},
            "exclude": draw.sample(names + patterns, draw.randrange(6)),
            "layer_quant_config": {
                name: {"weight": {"dtype": "int8", "ch_axis": draw.randrange(2)}}
                for name in draw.sample(names + patterns[:2], draw.randrange(4))
            },
            "layer_type_quant_config": {},
            "global_quant_config": {"weight": {"dtype": "int8"}},
        }
        packed = draw.choice([None, ("q_proj", "k_proj", "v_proj")])
        last = "qkv_proj" if packed else draw.choice(parts)
        kind = "experts" if last == "gate" else "linear"
        asked = Asked(f"{draw.choice(layers)}.{last}", kind, packed)
        decision = StockConfig(config, row).decide(asked)
        found = "refused" if decision.refusal else decision.config
        assert found == decide_as_stock(code, config, asked), (config, asked)
        seen.add(str(found)[:7])
    assert len(seen) > 2


MEASURED = json.loads((ROOT / "docs/results/families-h200.json").read_text())["rows"]


@pytest.mark.parametrize(
    "row",
    [row for row in MEASURED if row["export"] == "by-glob"],
    ids=lambda row: row["family"],
)
def test_verdicts_are_what_was_measured(row, tmp_path, monkeypatch):
    """On an H200, of stock 0.20.2 and of this fork, with Quark's own excludes."""
    family = BY_NAME[row["family"]]
    if family.processor:
        pytest.importorskip("torchvision", reason="its processor of pictures wants it")
    for name, value in family.env.items():
        monkeypatch.setenv(name, value)
    told = outcomes(make_export(family, row["export"]).write(tmp_path / "x"), None)
    for target, build in (("0.20.0-0.21.0", "stock"), (FORK_GPU, "fork")):
        assert told[target] == row[build].partition(":")[0]
