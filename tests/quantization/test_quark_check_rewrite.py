# SPDX-License-Identifier: Apache-2.0
"""`vllm quark-check --fix`: the same numbers in another layout, whatever interrupts."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.layers.quantization.quark.quark_check import run
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.fix import relayout
from vllm.model_executor.layers.quantization.quark.quark_check.fix import (
    rewrite as module,
)
from vllm.model_executor.layers.quantization.quark.quark_check.fix.planned import (
    TARGETS,
    Target,
)
from vllm.model_executor.layers.quantization.quark.quark_check.fix.relayout import (
    default_plan,
    make_plan,
)
from vllm.model_executor.layers.quantization.quark.quark_check.fix.rewrite import (
    rewrite,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import FORK

from tests.fixtures.cells import CELLS
from tests.quantization.exports import PER_EXPERT, STACKED, Export, load_model

BY_KEY = {cell.key: cell for cell in CELLS}
QUARK: tuple[Target, ...] = ("quark", "stacked", "per-expert")
MOE = "model.layers.2.moe"
EXPERT = f"{MOE}.experts.3.up_proj"
NO_LINKS = OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An export in four shards, with a tokenizer, to be stacked."""
    return BY_KEY["sharded"].write(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def hashes(folder: Path) -> dict[str, str]:
    """Every file's sha256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.iterdir()
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def exclude_of(folder: Path) -> list[str]:
    return config_of(folder)["quantization_config"]["exclude"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dequantized(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint's weights are, one expert a name: INT8 ones times their scales
    in float64, floats as they are; scales and zero points are left out."""
    tensors, found = tensors_of(folder), {}
    for name, tensor in tensors.items():
        parent, _, suffix = name.rpartition(".")
        if "scale" in suffix or "zero_point" in suffix:
            continue
        if tensor.dtype == torch.int8:
            scale = tensors[f"{parent}.weight_scale"].double()
            while scale.ndim > 1 and scale.shape[-1] == 1:
                scale = scale.squeeze(-1)
            scale = scale.reshape(*scale.shape, *[1] * (tensor.ndim - scale.ndim))
            tensor = tensor.double() * scale
        if tensor.ndim == 3:
            before, _, last = parent.rpartition(".")
            for expert, single in enumerate(tensor):
                found[f"{before}.experts.{expert}.{last}.{suffix}"] = single
        else:
            found[name] = tensor
    return found


def assert_same_numbers(one: Path, other: Path) -> None:
    found, expected = dequantized(one), dequantized(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_read_right(folder: Path) -> None:
    """By what judges any checkpoint."""
    report = run.check(folder)
    outcomes = {each.target: each.outcome for each in report.judgement.verdicts}
    assert "right" in {outcomes[target] for target in FORK}, report.findings


# What comes out.

REWRITTEN: list[tuple[str, Target]] = [
    *((key, target) for key in ("sharded", "int8-3key") for target in TARGETS),
    *(("3key-scales-columns", target) for target in TARGETS),
    *(("weight-per-tensor", target) for target in TARGETS),
    *(("3key-weight-per-tensor", target) for target in TARGETS),
    *(("act-static", target) for target in TARGETS),
    *(("weight-per-tensor-act-static", target) for target in TARGETS),
    *(("scales-bfloat16", target) for target in TARGETS),
    *(("exclude-forgotten", target) for target in TARGETS),
    *(("exclude-regex", target) for target in TARGETS),
    *(("dense-quantized", target) for target in TARGETS),
    *(("layer-override", target) for target in TARGETS),
    ("act-per-tensor", "compressed-tensors"),
    ("act-asymmetric", "compressed-tensors"),
    ("act-static-asymmetric", "compressed-tensors"),
    ("act-static-without-scales", "compressed-tensors"),
    ("qwen2-moe-tiny-int8-per-expert", "compressed-tensors"),
]


@pytest.mark.parametrize(("key", "target"), REWRITTEN)
def test_the_numbers_stay_and_the_layout_is_the_targets(
    key: str, target: Target, tmp_path: Path, out: Path
):
    folder = BY_KEY[key].write(tmp_path / "source")
    before, stamped = hashes(folder), stamps(folder)
    result = rewrite(folder, out, target)
    assert hashes(folder) == before and stamps(folder) == stamped
    assert result.folder == out and result.changes
    assert not (tmp_path / "out.partial").exists()
    assert_same_numbers(out, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    tensors = tensors_of(out)
    ranks = {
        tensor.ndim
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype == torch.int8
    }
    stacked = target == "stacked" or (target == "quark" and "3key" in key)
    assert ranks == ({2, 3} if stacked else {2})
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale") and target == "compressed-tensors":
            weight = tensors[name.removesuffix("_scale")]
            assert tensor.shape == (weight.shape[0], 1)
        elif name.endswith(".weight_scale"):
            assert not tensor.shape or tensor.shape[-1] != 1
    config, expected = config_of(out), config_of(folder)
    quantization = config.pop("quantization_config")
    del expected["quantization_config"]
    assert config == expected
    if target == "compressed-tensors":
        assert quantization["quant_method"] == "compressed-tensors"
        assert not [name for name in tensors if "zero_point" in name]
        assert not [name for name in tensors if "input_scale" in name]
    else:
        assert_read_right(out)


def test_every_tensor_has_its_place_in_the_index(source: Path, out: Path):
    rewrite(source, out, "stacked")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_checkpoint(out)
    assert index["weight_map"] == {
        name: tensor.file.name for name, tensor in tensors.items()
    }
    size = sum(tensor.end - tensor.start for tensor in tensors.values())
    assert index["metadata"] == {"total_size": size}


def test_files_are_aligned_and_say_that_they_are_torchs(source: Path, out: Path):
    rewrite(source, out, "stacked")
    sizes = {"F32": 4, "BF16": 2, "I8": 1}
    for tensor in read_checkpoint(out).values():
        assert tensor.start % sizes[tensor.dtype] == 0
    for file in out.glob("*.safetensors"):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}


def test_exclude_is_completed_with_names_and_those_of_what_vllm_fuses(
    tmp_path: Path, out: Path
):
    folder = BY_KEY["exclude-forgotten"].write(tmp_path / "source")
    rewrite(folder, out, "quark")
    added = set(exclude_of(out)) - set(exclude_of(folder))
    shared = [f"model.layers.{layer}.share_expert" for layer in (2, 3)]
    dense = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    projections = ("gate_proj", "up_proj", "down_proj")
    assert added == {
        *(f"{each}.gate_up_proj" for each in shared + dense),
        *(f"{each}.{name}" for each in shared for name in projections),
    }


def test_exclude_loses_what_names_nothing(tmp_path: Path, out: Path):
    export = Export(PER_EXPERT)
    export.quark["exclude"] += ["model.layers.0.mlp.gate_projj", "*.none.*"]
    rewrite(export.write(tmp_path / "source"), out, "quark")
    assert not [name for name in exclude_of(out) if "projj" in name or "none" in name]
    assert set(Export(PER_EXPERT).quark["exclude"]) < set(exclude_of(out))


def test_excluded_experts_keep_their_entry_in_either_layout(tmp_path: Path, out: Path):
    export = Export(STACKED)
    names = [f"{MOE}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    for name in names:
        export.tensors[f"{name}.weight"] = export.tensors[f"{name}.weight"].bfloat16()
        del export.tensors[f"{name}.weight_scale"]
    export.quark["exclude"] += names
    folder = export.write(tmp_path / "source")
    rewrite(folder, out, "per-expert")
    assert f"{EXPERT}" in exclude_of(out)
    rewrite(folder, tmp_path / "ct", "compressed-tensors")
    assert f"{EXPERT}" in config_of(tmp_path / "ct")["quantization_config"]["ignore"]
    rewrite(out, tmp_path / "back", "stacked")
    for each in (out, tmp_path / "ct", tmp_path / "back"):
        assert_same_numbers(each, folder)


def test_compressed_tensors_ignores_all_that_is_float(tmp_path: Path, out: Path):
    rewrite(Export(PER_EXPERT).write(tmp_path / "source"), out, "compressed-tensors")
    ignore = set(config_of(out)["quantization_config"]["ignore"])
    for name, tensor in tensors_of(out).items():
        if name.endswith(".weight") and tensor.ndim > 1:
            is_float = tensor.dtype != torch.int8
            assert (name.removesuffix(".weight") in ignore) == is_float, name
    assert "model.layers.2.share_expert.gate_up_proj" in ignore
    assert "model.layers.2.self_attn.qkv_proj" not in ignore


def test_compressed_tensors_config_is_one(tmp_path: Path, out: Path):
    """Its own package reads it, and finds the scheme of vLLM's INT8 kernels."""
    from compressed_tensors.quantization import QuantizationConfig

    rewrite(Export(PER_EXPERT).write(tmp_path / "source"), out, "compressed-tensors")
    config = config_of(out)["quantization_config"]
    config.pop("quant_method")
    config.pop("kv_cache_scheme")
    [group] = QuantizationConfig(**config).config_groups.values()
    weights, inputs = group.weights, group.input_activations
    assert (weights.num_bits, weights.strategy, weights.dynamic) == (
        *(8, "channel", False),
    )
    assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True)


def test_a_config_inside_text_config_stays_there(tmp_path: Path, out: Path):
    export = Export(PER_EXPERT)
    export.config["text_config"] = {
        "quantization_config": export.config.pop("quantization_config")
    }
    rewrite(export.write(tmp_path / "source"), out, "compressed-tensors")
    config = config_of(out)
    assert "quantization_config" not in config
    method = config["text_config"]["quantization_config"]["quant_method"]
    assert method == "compressed-tensors"


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("key", "target"),
    [("sharded", "stacked")]
    + [("3key-scales-columns", target) for target in ("quark", "per-expert")],
)
def test_the_fork_loads_the_same_parameters(
    key: str, target: Target, tmp_path: Path, out: Path
):
    expected = load_model(BY_KEY[PER_EXPERT].write(tmp_path / "base"))
    rewrite(BY_KEY[key].write(tmp_path / "source"), out, target)
    found = dict(load_model(out).named_parameters())
    parameters = dict(expected.named_parameters())
    assert found.keys() == parameters.keys()
    for name, tensor in parameters.items():
        assert torch.equal(found[name], tensor), name


# Which files are written.


def test_what_stays_is_linked_and_small_files_are_copied(source: Path, out: Path):
    result = rewrite(source, out, "quark")
    assert (result.written, result.linked) == (0, 4)
    for file in source.glob("*.safetensors"):
        assert (out / file.name).samefile(file)
    # They are edited by hand, which is not to change the source.
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert not (out / name).samefile(source / name)


def test_a_shard_of_which_nothing_changes_is_linked(tmp_path: Path, out: Path):
    export = Export(PER_EXPERT)
    scales = {name for name in export.tensors if name.endswith("weight_scale")}
    for name in scales:
        export.tensors[name] = export.tensors[name][:, None].contiguous()
    folder = export.write(tmp_path / "source", num_shards=40)
    changed = {
        each.file.name for n, each in read_checkpoint(folder).items() if n in scales
    }
    assert len(changed) < 40
    result = rewrite(folder, out, "quark")
    assert (result.written, result.linked) == (len(changed), 40 - len(changed))
    for file in folder.glob("*.safetensors"):
        assert (out / file.name).samefile(file) == (file.name not in changed)
    assert_same_numbers(out, folder)


def test_where_there_are_no_links_shards_are_copied(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise NO_LINKS

    monkeypatch.setattr(os, "link", fail)
    rewrite(source, out, "quark")
    for file in source.glob("*.safetensors"):
        assert not (out / file.name).samefile(file)
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_links_lead_to_the_file_and_not_to_a_symbolic_link(tmp_path: Path, out: Path):
    """A snapshot of Hugging Face's cache is a folder of symbolic links."""
    blobs = BY_KEY["sharded"].write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots/revision"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    rewrite(snapshot, out, "quark")
    assert not [file for file in out.iterdir() if file.is_symlink()]
    assert_same_numbers(out, snapshot)


def test_other_files_go_along(source: Path, out: Path):
    (source / "generation_config.json").write_text("{}")
    (source / "figures").mkdir()
    (source / "figures/one.txt").write_text("one")
    (source / ".cache").mkdir()
    (source / ".cache/lock").write_text("")
    (source / "consolidated.safetensors").write_bytes(b"of another loader")
    os.mkfifo(source / "pipe")
    rewrite(source, out, "stacked")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert {"generation_config.json", "figures/one.txt"} < names
    assert not names & {".cache", "consolidated.safetensors", "pipe"}


def test_a_link_out_of_the_checkpoint_is_refused(source: Path, out: Path):
    (out.with_name("secret")).write_text("of another")
    (source / "notes.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="notes.txt: expected a file, found a li"):
        rewrite(source, out, "stacked")
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_a_header_that_nobody_would_read_is_not_written(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relayout, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="a header of at most 1000 bytes"):
        rewrite(source, out, "compressed-tensors")
    assert list(out.parent.iterdir()) == [source]


# What is refused, before anything is written.

REFUSED: list[tuple[str, Target, str]] = [
    *(("weight-asymmetric", target, "symmetric weights") for target in TARGETS),
    *(("lm-head-quantized", target, "lm_head") for target in TARGETS),
    *(("scale-missing", target, "up_proj.weight") for target in TARGETS),
    *(("act-per-tensor", target, "activations per token") for target in QUARK),
    *(("act-static-asymmetric", target, "zero points of 0") for target in QUARK),
    *(("act-static-without-scales", target, "input_scale") for target in QUARK),
    ("qwen2-moe-tiny-int8-per-expert", "stacked", "choose per-expert"),
]


@pytest.mark.parametrize(("key", "target", "words"), REFUSED)
def test_what_no_rewrite_mends_is_refused(
    key: str, target: Target, words: str, tmp_path: Path, out: Path
):
    folder = BY_KEY[key].write(tmp_path / "source")
    with pytest.raises(ValueError, match=words):
        rewrite(folder, out, target)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_senseless_scale_is_refused(
    value: float, target: Target, tmp_path: Path, out: Path
):
    export = Export(PER_EXPERT)
    export.tensors[f"{EXPERT}.weight_scale"][2] = value
    with pytest.raises(CheckpointError, match="finite, and above zero"):
        rewrite(export.write(tmp_path / "source"), out, target)
    assert not out.exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_channel_of_zeros_may_have_a_scale_of_zero(
    target: Target, tmp_path: Path, out: Path
):
    """As the engine has it; in a layer of its own, and in an expert."""
    export = Export(PER_EXPERT)
    for name in (EXPERT, "model.layers.1.self_attn.o_proj"):
        export.tensors[f"{name}.weight"][2] = 0
        export.tensors[f"{name}.weight_scale"][2] = 0
    folder = export.write(tmp_path / "source")
    if target == "per-expert":
        folder = rewrite(folder, tmp_path / "stacked", "stacked").folder
    rewrite(folder, out, target)
    assert_same_numbers(out, folder)


@pytest.mark.parametrize("target", TARGETS)
def test_a_zero_point_that_is_not_zero_is_refused(
    target: Target, tmp_path: Path, out: Path
):
    export = Export(PER_EXPERT)
    zero_point = torch.zeros(64, dtype=torch.int8)
    zero_point[-1] = 1
    export.tensors[f"{EXPERT}.weight_zero_point"] = zero_point
    with pytest.raises(CheckpointError, match="up_proj.weight_zero_point"):
        rewrite(export.write(tmp_path / "source"), out, target)


def test_a_quantized_key_value_cache_is_not_dropped(tmp_path: Path, out: Path):
    export = Export(PER_EXPERT)
    export.quark["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    with pytest.raises(CheckpointError, match="key/value cache"):
        rewrite(export.write(tmp_path / "source"), out, "compressed-tensors")


@pytest.mark.parametrize("method", [None, "fp8", "compressed-tensors"])
def test_other_formats_are_refused(method: str | None, tmp_path: Path, out: Path):
    export = Export(PER_EXPERT)
    if method is None:
        del export.config["quantization_config"]
    else:
        export.quark["quant_method"] = method
    with pytest.raises(CheckpointError, match="of Quark's with INT8 weights"):
        rewrite(export.write(tmp_path / "source"), out, "quark")


@pytest.mark.parametrize("target", TARGETS)
def test_there_is_nothing_to_do_twice(target: Target, source: Path, out: Path):
    rewrite(source, out, target)
    with pytest.raises(CheckpointError, match="nothing; load it|Quark's with INT8"):
        rewrite(out, out.with_name("again"), target)


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_an_out_that_exists_is_refused(kind: str, source: Path, out: Path):
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="no such file or folder yet"):
        rewrite(source, out, "stacked")
    assert not out.with_name("out.partial").exists()
    assert kind != "file" or out.read_text() == "mine"


def test_an_out_inside_the_source_is_refused(source: Path):
    before = hashes(source)
    with pytest.raises(CheckpointError, match="outside the source"):
        rewrite(source, source / "out", "stacked")
    assert hashes(source) == before and (source / "config.json").exists()


def test_a_disk_without_room_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(out.parent)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out: expected \d+ bytes of room"):
        rewrite(source, out, "stacked")
    assert not out.exists()


def test_the_default_is_what_mends(tmp_path: Path):
    for key, expected in (
        (PER_EXPERT, "quark"),
        ("scales-columns", "quark"),
        ("act-per-tensor", "compressed-tensors"),
    ):
        assert default_plan(BY_KEY[key].write(tmp_path / key)).target == expected
    rewrite(tmp_path / PER_EXPERT, tmp_path / "out", "quark")
    assert default_plan(tmp_path / "out").target == "compressed-tensors"
    with pytest.raises(ValueError, match="lm_head"):
        default_plan(BY_KEY["lm-head-quantized"].write(tmp_path / "head"))


# Interruptions. What is killed dies by SIGKILL in a process of its own.


def in_child(work: Callable[[], None]) -> int:
    """Run it in a fork of this process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_events(work: Callable[[], None]) -> int:
    """How many times `work` touches files."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        seen += is_file_event(event)

    read, write = os.pipe()

    def count() -> None:
        sys.addaudithook(hook)
        work()
        os.write(write, str(seen).encode())

    in_child(count)
    os.close(write)
    with os.fdopen(read) as stream:
        return int(stream.read())


def is_file_event(event: str) -> bool:
    return event == "open" or event.startswith(("os.", "shutil.", "fcntl."))


def kill_at(number: int, work: Callable[[], None]) -> int:
    """Kill `work` the moment before it touches a file for the nth time."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if is_file_event(event):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(hook)
        work()

    return in_child(run)


@pytest.mark.parametrize("target", ["quark", "stacked", "compressed-tensors"])
def test_what_was_killed_goes_on(
    target: Target,
    source: Path,
    out: Path,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
):
    """At random points, one after the other: the same bytes in the end."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 50_000)
    before, whole = hashes(source), out.with_name("whole")
    rewrite(source, whole, target)
    expected = hashes(whole)
    total = count_events(lambda: print(rewrite(source, out, target)))
    shutil.rmtree(out)
    for _ in range(4):
        for _ in range(3):
            point = int(torch.randint(total, (), generator=rng))
            status = kill_at(point, lambda: print(rewrite(source, out, target)))
            assert status in (-signal.SIGKILL, 0)
            assert hashes(source) == before
            if out.exists():  # killed after it got its name, or not at all
                break
        if not out.exists():
            rewrite(source, out, target)
            assert not out.with_name("out.partial").exists()
        assert hashes(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)


def test_what_was_written_is_not_written_again(source: Path, out: Path):
    total = count_events(lambda: print(rewrite(source, out, "stacked")))
    shutil.rmtree(out)
    work = out.with_name("out.partial") / "checkpoint"
    for point in range(total // 4, total, 5):
        kill_at(point, lambda: print(rewrite(source, out, "stacked")))
        if len(list(work.glob("*.safetensors"))) >= 2:
            break
    done = {file.name: file.stat().st_ino for file in work.glob("*.safetensors")}
    assert len(done) >= 2
    rewrite(source, out, "stacked")
    assert {name: (out / name).stat().st_ino for name in done} == done


def interrupted(source: Path, out: Path) -> Path:
    """OUT.partial of a rewrite that was killed once the first shard was there."""

    def work() -> None:
        write = module._Writer._add

        def stop(self: module._Writer, count: int) -> None:
            write(self, count)
            if len(list(self.folder.glob("*.safetensors"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        module._Writer._add = stop  # type: ignore[method-assign]
        rewrite(source, out, "stacked")

    assert in_child(work) == -signal.SIGKILL
    partial = out.with_name("out.partial")
    assert len(list(partial.glob("checkpoint/*.safetensors"))) == 2
    assert not out.exists()
    return partial


def test_remains_of_another_rewrite_are_refused(source: Path, out: Path):
    interrupted(source, out)
    with pytest.raises(CheckpointError, match="out.partial: expected .*; delete it"):
        rewrite(source, out, "compressed-tensors")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00004-of"])
def test_remains_of_a_source_that_changed_are_refused(
    name: str, source: Path, out: Path
):
    interrupted(source, out)
    [file] = source.glob(f"{name}*")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="the source has changed since"):
        rewrite(source, out, "stacked")


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(source: Path, out: Path):
    other = out.with_name("out.partial")
    other.mkdir()
    (other / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="delete it"):
        rewrite(source, out, "stacked")
    assert [path.name for path in other.iterdir()] == ["mine"]


def test_two_at_a_time_are_refused(source: Path, out: Path):
    partial = interrupted(source, out)
    with (partial / "state.json").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="one rewrite at a time"):
            rewrite(source, out, "stacked")


# Disks.


def test_a_full_disk_leaves_nothing_that_looks_finished(source: Path, out: Path):
    """The kernel ends a write in the middle of the third shard."""
    sizes = {name: os.path.getsize(source / name) for name in os.listdir(source)}
    limit = sizes["model-00003-of-00004.safetensors"] // 2

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            rewrite(source, out, "stacked")
        except CheckpointError as error:
            if "room and permission" in str(error) and "goes on" in str(error):
                os.kill(os.getpid(), signal.SIGUSR1)

    assert in_child(work) == -signal.SIGUSR1
    assert not out.exists()
    work_place = out.with_name("out.partial") / "checkpoint"
    files = list(work_place.iterdir())
    assert not [file for file in files if file.name.endswith(".tmp")]
    rewrite(source, out, "stacked")
    assert_same_numbers(out, source)


def test_what_the_disk_refuses_at_the_end_of_a_file_is_told(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        if "safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            rewrite(source, out, "stacked")
    partial = out.with_name("out.partial")
    assert not list((partial / "checkpoint").iterdir())
    rewrite(source, out, "stacked")
    assert_same_numbers(out, source)


def flipping(bit: int, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip a bit of a file between the writing and the verifying."""
    verify = module._Writer.verify

    def damaged(self: module._Writer) -> None:
        path = self.folder / file
        data = bytearray(path.read_bytes())
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        path.write_bytes(data)
        verify(self)

    monkeypatch.setattr(module._Writer, "verify", damaged)


@pytest.mark.parametrize("target", ["stacked", "compressed-tensors"])
@pytest.mark.parametrize(
    "file",
    [f"model-0000{shard}-of-00004.safetensors" for shard in (1, 4)]
    + ["config.json", "model.safetensors.index.json", "tokenizer.json"],
)
def test_a_flipped_bit_is_seen(
    file: str,
    target: Target,
    source: Path,
    out: Path,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
):
    before = hashes(source)
    for bit in (7, *torch.randint(2**31, (5,), generator=rng).tolist()):
        with monkeypatch.context() as patch:
            flipping(bit, file, patch)
            with pytest.raises(CheckpointError, match=f"{file}: expected"):
                rewrite(source, out, target)
        assert not out.exists()
    rewrite(source, out, target)  # and what was damaged is written again
    assert_same_numbers(out, source)
    assert hashes(source) == before


def test_a_flipped_bit_of_a_copied_shard_is_seen(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise NO_LINKS

    monkeypatch.setattr(os, "link", fail)
    file = "model-00002-of-00004.safetensors"
    with monkeypatch.context() as patch:
        flipping(3_000_001, file, patch)
        with pytest.raises(CheckpointError, match=f"{file}: expected the bytes"):
            rewrite(source, out, "quark")
    rewrite(source, out, "quark")
    assert_same_numbers(out, source)


# Size.


def test_tensors_are_written_in_parts(tmp_path: Path, out: Path):
    """Experts of 256 MiB, whose scales lose a dimension, in less than 48 MiB."""
    export = Export(STACKED)
    del export.tensors[f"{MOE}.up_proj.weight"]
    del export.tensors[f"{MOE}.up_proj.weight_scale"]
    folder = export.write(tmp_path / "source")
    shape = [16, 4096, 4096]
    header = {
        f"{MOE}.up_proj.weight": {
            "dtype": "I8",
            "shape": shape,
            "data_offsets": [0, 1 << 28],
        },
        f"{MOE}.up_proj.weight_scale": {
            "dtype": "F32",
            "shape": [*shape[:2], 1],
            "data_offsets": [1 << 28, (1 << 28) + (1 << 18)],
        },
    }
    text = json.dumps(header).encode()
    with (folder / "large.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.seek(8 + len(text) + (1 << 28))  # sparse: no block is written
        stream.write(torch.ones(1 << 16).numpy().tobytes())
    tracemalloc.start()
    try:
        rewrite(folder, out, "quark")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20
    tensors = read_checkpoint(out)
    assert tensors[f"{MOE}.up_proj.weight_scale"].shape == (16, 4096)
    assert not (out / "large.safetensors").samefile(folder / "large.safetensors")


def test_progress_ends_at_the_total(source: Path, out: Path):
    seen: list[tuple[int, int]] = []
    rewrite(source, out, "stacked", lambda *call: seen.append(call))
    done = [each for each, _ in seen]
    assert done == sorted(done) and len({total for _, total in seen}) == 1
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert seen[-1] == (2 * written, 2 * written)


def test_a_plan_writes_nothing(source: Path):
    before = hashes(source.parent)
    plan = make_plan(source, "stacked")
    assert plan.shards() and not plan.linked
    assert hashes(source.parent) == before
