# SPDX-License-Identifier: Apache-2.0
"""Damaged safetensors files and indices end in one error that names the file."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    INDEX,
    CheckpointError,
    LocalFiles,
    check_config_file,
    read_checkpoint,
    read_json,
)

NAMES = ["a.weight", "b.weight", "c.weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index."""
    first = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(4, dtype=torch.int8)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    last = {"c.weight": torch.ones(5, dtype=torch.bfloat16), "d": torch.ones(0, 4)}
    save_file(last, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(last, "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_headers_are_those_of_safetensors(folder):
    found = read_checkpoint(folder)
    assert sorted(found) == [*NAMES, "d"]
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        with safe_open(file, framework="pt") as stream:
            for name, info in found.items():
                if info.file != file:
                    continue
                tensor = stream.get_tensor(name)
                assert info.shape == tuple(tensor.shape)
                assert info.dtype == stream.get_slice(name).get_dtype()
                raw = bytes(tensor.flatten().view(torch.uint8).tolist())
                assert data[info.start : info.end] == raw


def test_folder_without_safetensors_is_empty(tmp_path):
    assert read_checkpoint(tmp_path) == {}


def test_files_without_an_index(folder):
    (folder / INDEX).unlink()
    assert sorted(read_checkpoint(folder)) == [*NAMES, "d"]


Damage = Callable[[Path], None]
FIRST = "model-00001-of-00002.safetensors"
LAST = "model-00002-of-00002.safetensors"


def edit_header(edit: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / FIRST).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
        (folder / FIRST).write_bytes(whole)

    return damage


def rewrite(change: Callable[[bytes], bytes], name: str = FIRST) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def edit_index(edit: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def swap(header: dict[str, Any]) -> None:
    header["a.weight"]["data_offsets"], header["b.weight"]["data_offsets"] = (
        header["b.weight"]["data_offsets"],
        header["a.weight"]["data_offsets"],
    )


DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (rewrite(lambda data: b""), "found 0"),
    "seven bytes": (rewrite(lambda data: data[:7]), "found 7"),
    "header cut off": (rewrite(lambda data: data[:40]), "whole header"),
    "data cut off": (rewrite(lambda data: data[:-1]), "cut off"),
    "data too long": (rewrite(lambda data: data + b"\0"), "bytes, after"),
    "huge header": (rewrite(lambda data: b"\xff" * 8 + data[8:]), "a header of"),
    "no JSON": (rewrite(lambda data: data[:8] + b"[" + data[9:]), "in JSON"),
    "no UTF-8": (rewrite(lambda data: data[:10] + b"\xff" + data[11:]), "in JSON"),
    "deep JSON": (
        rewrite(lambda data: (10**6).to_bytes(8, "little") + b"[" * 10**6),
        "in JSON",
    ),
    "a list": (rewrite(lambda data: b"\2" + bytes(7) + b"[]"), "found list"),
    "entry": (edit_header(lambda h: h.update({"a.weight": 1})), "of 'a.weight'"),
    "extra key": (edit_header(lambda h: h["a.weight"].update(x=1)), "of 'a.weight'"),
    "dtype": (edit_header(lambda h: h["a.weight"].update(dtype="I9")), "'I9'"),
    "shape": (edit_header(lambda h: h["a.weight"].update(shape=[3, 3])), "36 bytes"),
    "negative": (edit_header(lambda h: h["a.weight"].update(shape=[-3, -2])), "whole"),
    "fraction": (edit_header(lambda h: h["a.weight"].update(shape=[6.0])), "whole"),
    "true": (edit_header(lambda h: h["b.weight"].update(shape=[True, 4])), "whole"),
    "offsets": (
        edit_header(lambda h: h["a.weight"].update(data_offsets=[0])),
        "whole numbers",
    ),
    "reversed": (
        edit_header(lambda h: h["a.weight"].update(data_offsets=[24, 0])),
        "24 bytes",
    ),
    "overlap": (
        edit_header(lambda h: h["b.weight"].update(data_offsets=[22, 26])),
        "after",
    ),
    "swapped": (edit_header(swap), "bytes for"),
    "gap": (edit_header(lambda h: h.pop("a.weight")), "after"),
    "shard missing": (lambda folder: (folder / FIRST).unlink(), f"{FIRST}, which"),
    "index empty": (rewrite(lambda data: b"", INDEX), "in JSON"),
    "index list": (rewrite(lambda data: b"[1]", INDEX), "JSON object"),
    "no weight_map": (edit_index(lambda index: index.clear()), "a weight_map"),
    "index twice": (
        rewrite(lambda data: b'{"weight_map": {"a": "x", "a": "y"}}', INDEX),
        "'a' twice",
    ),
    "path": (
        edit_index(lambda i: i["weight_map"].update({"a.weight": f"../{FIRST}"})),
        "beside it",
    ),
    "number": (
        edit_index(lambda i: i["weight_map"].update({"a.weight": 1})),
        "beside it",
    ),
    "wrong shard": (
        edit_index(
            lambda i: i["weight_map"].update(
                {"a.weight": "model-00002-of-00002.safetensors"}
            )
        ),
        "it in model-00001",
    ),
    "unknown tensor": (
        edit_index(lambda i: i["weight_map"].update({"x.weight": FIRST})),
        "it nowhere",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(name, folder):
    damage, expected = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(folder)
    message = str(error.value)
    assert message.startswith(str(folder)), "names the file"
    assert expected in message
    assert "expected" in message and "found" in message and "; " in message
    assert len(message) < 600


def test_missing_shard_without_an_index(folder):
    (folder / INDEX).unlink()
    (folder / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"2 shards.*no {FIRST}"):
        read_checkpoint(folder)


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("is_same", [True, False])
def test_tensor_in_two_files(is_same, has_index, folder):
    """With the same bytes, it does not matter which file is read."""
    again = load_file(folder / FIRST)["a.weight"]
    held = load_file(folder / LAST) | {"a.weight": again if is_same else again + 1}
    save_file(held, folder / LAST)
    if not has_index:
        (folder / INDEX).unlink()
    if is_same:
        assert sorted(found := read_checkpoint(folder)) == [*NAMES, "d"]
        assert not has_index or found["a.weight"].file.name == FIRST
        return
    with pytest.raises(CheckpointError, match=f"'a.weight' the same in {FIRST} and"):
        read_checkpoint(folder)


def test_byte_order_mark_is_named(folder):
    config = folder / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + b"{}")
    with pytest.raises(CheckpointError, match=r"config\.json: .* byte order mark"):
        read_json(config, "the config")
    with pytest.raises(CheckpointError, match=r"config\.json: .* byte order mark"):
        check_config_file(str(folder))
    config.write_bytes(b"{}")
    check_config_file(str(folder))
    check_config_file("someone/model")


def test_key_twice(folder):
    """As transformers reads config.json, the last one counts; nowhere else."""
    file = folder / "config.json"
    file.write_text('{"a": 1, "a": 2}')
    assert read_json(file, "the config", unique=False) == {"a": 2}
    with pytest.raises(CheckpointError, match="'a' twice"):
        read_json(file, "the config")


def test_unreadable_file(folder, monkeypatch):
    def fail(*_):
        raise OSError("Input/output error")

    (folder / INDEX).unlink()
    monkeypatch.setattr(LocalFiles, "read", fail)
    with pytest.raises(CheckpointError, match=f"{FIRST}.*readable file.*Input/output"):
        read_checkpoint(folder)
