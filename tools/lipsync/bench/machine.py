"""What a run's figures depend on: the machine, the versions of what did the work, the commit. No names, no paths."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from compositor import jpeg
from lipsync.triton_install import WHEEL

_PACKAGES = ("numpy", "onnxruntime", "opencv-python-headless", "PyTurboJPEG", "tritonclient", "grpcio")
_TRITONSERVER = "2.51.0 (release 24.10)"


def machine() -> dict[str, str | int | float]:
    """CPU model, cores that this process may use, memory, kernel."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024 / 1e9, 1),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Of everything whose speed shows in a figure."""
    found = {"python": platform.python_version(), **{package: metadata.version(package) for package in _PACKAGES}}
    found["libjpeg-turbo"] = libjpeg_turbo_version()
    found["tritonserver"] = f"{_TRITONSERVER}, from {WHEEL}"
    return found


def libjpeg_turbo_version() -> str:
    """As the library itself says it in one of its strings; it has no function that tells."""
    ctypes.CDLL(jpeg.LIBRARY)
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next(line.split(maxsplit=5)[5] for line in maps if "libturbojpeg" in line)
    match = re.search(rb"libjpeg-turbo version (\d+(?:\.\d+)+)", Path(path).read_bytes())
    return match[1].decode() if match else "unknown"


def commit() -> str:
    """The checkout's commit, `+` behind it where files differ; `unknown` outside of a checkout."""
    root = Path(__file__).parents[3]
    if not (root / "pyproject.toml").is_file():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=normal").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def command_line() -> str:
    """What was called, without where the program lies."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def _field(path: str, name: str) -> str:
    """The value of the first line `name : value`."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
