# SPDX-License-Identifier: Apache-2.0
"""Build the fork's wheel: find the base wheel, get it, repack it."""

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote
from zipfile import BadZipFile, ZipFile

from tools.download import fetch
from tools.errors import ForkError
from tools.groups import asked_for, choice
from tools.installed import INSTALLED, Found, find, installed_wheel, make_base
from tools.location import VARIABLE, parse
from tools.repack import check_named, metadata, repack
from tools.requires import check_python, check_version, headers_of, torch_note
from tools.rocm_index import rocm_wheel
from tools.series import Patch, dependants, read_series, with_dependencies
from tools.target import target_device
from tools.upstream import (
    BASE_NAMES,
    BaseWheel,
    fork_table,
    label_of,
    listed_wheel,
    own_wheel,
    release,
)


def location() -> str | None:
    """The user's own base wheel: a path or a URL, perhaps with a sha256, or INSTALLED;
    None if he has none."""
    return os.environ.get(VARIABLE) or None


def base_wheel() -> BaseWheel:
    """The base wheel that the environment asks for. Raises ForkError.

    VLLM_TARGET_DEVICE and VLLM_PRECOMPILED_WHEEL_LOCATION are upstream's variables;
    VLLM_BASE_VERSION chooses a release of UPSTREAM.toml other than the default.
    """
    own = location()
    if own == INSTALLED:
        found = find()
        target, reason = _target_of(found)
        print(f"target: {target} ({reason}); base: {found}", file=sys.stderr)
        return installed_wheel(found, target)
    target, reason = target_device()
    print(f"target: {target} ({reason})", file=sys.stderr)
    if own:
        return own_wheel(unquote(parse(own).path.name), target)
    chosen = release(os.environ.get("VLLM_BASE_VERSION"))
    if target == "rocm":
        return rocm_wheel(chosen)
    return listed_wheel(chosen, target)


def _target_of(found: Found) -> tuple[str, str]:
    """What an installed vLLM says it is for, unless VLLM_TARGET_DEVICE says it."""
    label = label_of(found.name, found.version)
    if label and "VLLM_TARGET_DEVICE" not in os.environ:
        return label, "the installed vLLM"
    return target_device()


def get_base(wheel: BaseWheel) -> tuple[Path, tuple[str, ...]]:
    """Where the base wheel is on this machine, and the names that its METADATA may
    have. Raises ForkError."""
    if location() == INSTALLED:
        found = find()
        return make_base(found, wheel), (found.name,)
    return fetch(wheel, location()), BASE_NAMES


@dataclass(frozen=True)
class Plan:
    """What to build: a base wheel, and the groups of patches and patches for it."""

    wheel: BaseWheel
    groups: list[str]
    patches: list[Patch]
    version: str

    def record(self, base_path: Path) -> bytes:
        """What the wheel says of itself, for `vllm quark-check --about`."""
        with base_path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        held = [
            {"number": p.number, "group": p.group, "subject": p.message.subject}
            for p in self.patches
        ]
        told = {
            "fork": fork_table()["local_version"],
            "version": self.version,
            "release": self.wheel.release.version,
            "target": self.wheel.target,
            "base": {"file": self.wheel.filename, "sha256": sha256},
            "groups": self.groups,
            "patches": held,
        }
        return (json.dumps(told, indent=1) + "\n").encode()


def plan(without: Collection[str] = (), only: Collection[str] = ()) -> Plan:
    """What the environment asks for, VLLM_QUARK_GROUPS too. Raises ForkError.

    `without` names patches to leave out, with those that depend on them; `only` the
    patches to build, with those they depend on. The version then says so.
    """
    wheel = base_wheel()
    every = read_series(wheel.release.series)
    check_named()
    if unknown := {*without, *only} - {patch.number for patch in every}:
        raise ForkError(f"no patch is numbered {', '.join(sorted(unknown))}.")
    if only:
        patches = with_dependencies(every, only)
        label = runs("only", [patch.number for patch in patches])
        return Plan(wheel, [], patches, wheel.version(label))
    chosen = choice(every, wheel.target, asked_for())
    gone = {*without, *dependants(every, without)}
    patches = [patch for patch in chosen.patches if patch.number not in gone]
    gone = {patch.number for patch in chosen.patches} - {p.number for p in patches}
    label = [*chosen.label, *runs("without", gone)]
    return Plan(wheel, chosen.groups, patches, wheel.version(label))


def build_metadata() -> bytes:
    """METADATA of the wheel that `build_wheel` would make. Raises ForkError."""
    planned = plan()
    base_path, names = get_base(planned.wheel)
    with ZipFile(base_path) as base:
        check_python(headers_of(base), planned.wheel.filename)
        return metadata(base, planned.version, names)


def runs(word: str, numbers: Iterable[str]) -> list[str]:
    """What a version says of patches that were left out: without0001to0003 and
    without0005, not each by itself, as a file's name has 255 bytes."""
    found: list[list[str]] = []
    for number in sorted(numbers):
        if found and int(number) == int(found[-1][-1]) + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [
        f"{word}{run[0]}" + (f"to{run[-1]}" if len(run) > 1 else "") for run in found
    ]


def check_requirements(wheel: BaseWheel, base_path: Path) -> None:
    """See that this Python will do, and that a wheel of upstream's ROCm index is what
    its name says; say where the installed torch will not do. Raises ForkError."""
    try:
        with ZipFile(base_path) as base:
            headers = headers_of(base)
    except BadZipFile as error:
        raise ForkError(f"{base_path}: not a wheel, or damaged: {error}.") from None
    check_python(headers, base_path.name)
    if wheel.url:
        check_version(headers, wheel.filename)
    if note := torch_note(headers, base_path.name):
        print(note, file=sys.stderr)


def build_wheel(
    dist_folder: Path, without: Collection[str] = (), only: Collection[str] = ()
) -> Path:
    """Write the fork's wheel to `dist_folder` and return its path; what goes into it is
    `plan`'s. Raises ForkError."""
    started = time.monotonic()
    # Unwind, so that the half-made wheel goes, and end in one line.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("error: interrupted; no wheel made"))
    planned = plan(without, only)
    if planned.wheel.url:
        print(
            f"{planned.wheel.filename}: its sha256, {planned.wheel.sha256}, is what "
            f"{planned.wheel.source} states today. It is not one of our pins.",
            file=sys.stderr,
        )
    base_path, names = get_base(planned.wheel)
    check_requirements(planned.wheel, base_path)
    record = planned.record(base_path)
    path = repack(
        base_path, planned.patches, planned.version, dist_folder, record, names
    )
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    seconds = time.monotonic() - started
    print(
        f"{path}: {planned.wheel.filename} + {len(planned.patches)} patches, "
        f"{seconds:.0f} s, peak memory {usage} MiB"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    parser.add_argument("--without", nargs="*", default=[], metavar="0001")
    args = parser.parse_args()
    try:
        build_wheel(args.dist, args.without)
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
