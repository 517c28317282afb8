"""What a run's figures depend on: the machine, the versions of what did the work, the commit. No names, no paths."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request
from importlib import metadata
from pathlib import Path

from compositor import jpeg
from compositor.errors import LipsyncError
from lipsync.triton_install import WHEEL
from lipsync.tritonserver import EmbeddedTriton, default_home

_PACKAGES = ("numpy", "opencv-python-headless", "PyTurboJPEG", "tritonclient", "grpcio")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"
_NOT_TAKEN = "GPU figures not taken"


def machine() -> dict[str, str | int | float]:
    """CPU model, cores that this process may use, memory, kernel, GPU."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024 / 1e9, 1),
        "kernel": platform.release(),
        "gpu": gpu(),
    }


def gpu() -> str:
    """The GPUs by name, memory and driver, and whether models run there; else that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = "; ".join(line.strip() for line in said.splitlines() if line.strip())
    if not found:
        return f"none at hand ({_NOT_TAKEN})"
    return found if _has_cuda() else f"{found} ({_NOT_TAKEN}: the installed onnxruntime has no CUDA provider)"


def _has_cuda() -> bool:
    spec = importlib.util.find_spec("onnxruntime")
    return bool(spec and spec.origin and (Path(spec.origin).parent / "capi" / _CUDA_PROVIDER).exists())


def versions() -> dict[str, str]:
    """Of everything whose speed shows in a figure."""
    found = {"python": platform.python_version(), **{package: metadata.version(package) for package in _PACKAGES}}
    installed = {distribution.name for distribution in metadata.distributions()}
    found.update({package: metadata.version(package) for package in _RUNTIMES if package in installed})
    found["libjpeg-turbo"] = libjpeg_turbo_version()
    found["tritonserver"] = f"{tritonserver_version()}, from {WHEEL}"
    return found


@functools.cache
def tritonserver_version() -> str:
    """As the embedded server itself tells it, which takes a second; `unknown` where it is not installed or fails."""
    if not (default_home() / "wheel").is_dir():
        return "unknown"
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lipsync-bench-") as empty,
            EmbeddedTriton(Path(empty)) as triton,
            urllib.request.urlopen(f"http://{triton.http}/v2", timeout=10) as answer,
        ):
            return str(json.load(answer)["version"])
    except (LipsyncError, OSError, ValueError, KeyError):
        return "unknown"


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
