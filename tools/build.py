# SPDX-License-Identifier: Apache-2.0
"""Build the fork's wheel: find the base wheel, get it, repack it."""

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote
from zipfile import ZipFile

from tools.download import fetch
from tools.errors import ForkError
from tools.location import VARIABLE, parse
from tools.repack import metadata, repack
from tools.series import read_series
from tools.target import target_device
from tools.upstream import BaseWheel, listed_wheel, own_wheel, release


def location() -> str | None:
    """The user's own base wheel: a path or a URL, perhaps with a sha256, or None."""
    return os.environ.get(VARIABLE) or None


def base_wheel() -> BaseWheel:
    """The base wheel that the environment asks for. Raises ForkError.

    VLLM_TARGET_DEVICE and VLLM_PRECOMPILED_WHEEL_LOCATION are upstream's variables;
    VLLM_BASE_VERSION chooses a release of UPSTREAM.toml other than the default.
    """
    target, reason = target_device()
    print(f"target: {target} ({reason})", file=sys.stderr)
    if own := location():
        return own_wheel(unquote(parse(own).path.name), target)
    return listed_wheel(release(os.environ.get("VLLM_BASE_VERSION")), target)


def build_metadata() -> bytes:
    """METADATA of the wheel that `build_wheel` would make. Raises ForkError."""
    wheel = base_wheel()
    with ZipFile(fetch(wheel, location())) as base:
        return metadata(base, wheel.version)


def left_out(numbers: Collection[str]) -> list[str]:
    """What a version says of patches that were left out: without0001to0003 and
    without0005, not each by itself, as a file's name has 255 bytes."""
    found: list[list[str]] = []
    for number in sorted(numbers):
        if found and int(number) == int(found[-1][-1]) + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [
        f"without{run[0]}" + (f"to{run[-1]}" if len(run) > 1 else "") for run in found
    ]


def build_wheel(dist_folder: Path, without: Collection[str] = ()) -> Path:
    """Write the fork's wheel to `dist_folder` and return its path. Raises ForkError.

    `without` names patches to leave out, such as "0001"; the version then says so.
    """
    started = time.monotonic()
    # Unwind, so that the half-made wheel goes, and end in one line.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("error: interrupted; no wheel made"))
    wheel = base_wheel()
    base_path = fetch(wheel, location())
    patches = read_series(wheel.release.series, without)
    version = ".".join([wheel.version, *left_out(without)])
    path = repack(base_path, patches, version, dist_folder)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    seconds = time.monotonic() - started
    print(
        f"{path}: {wheel.filename} + {len(patches)} patches, {seconds:.0f} s, "
        f"peak memory {usage} MiB"
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
