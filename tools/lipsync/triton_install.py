"""Lays out the embedded Triton: in goes a folder, out comes a `TritonHome` that names the server and its backends.

The server is the one that the `nvidia-pytriton` wheel carries; the wheel is unpacked into a folder of its own and never
imported. Knows nothing of running servers.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compositor.errors import InvalidInput, LipsyncError

WHEEL = "nvidia-pytriton==0.7.0"
LAYOUT_VERSION = 1
MIN_GLIBC = (2, 35)
_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBPYTHON = f"libpython{_PYTHON_VERSION}.so.1.0"


@dataclass(frozen=True)
class TritonHome:
    """An installed embedded Triton, laid out for the running interpreter."""

    root: Path
    server: Path
    """The tritonserver executable."""
    library_path: str
    """LD_LIBRARY_PATH of the server and of its Python stubs."""
    backends: Path
    """Holds `python/` (Triton's own) and `onnxruntime/model.py` (the project's)."""
    python_bin: Path
    """Holds the `python3` by which a stub finds its standard library, numpy and onnxruntime."""
    cuda: bool
    """Whether this environment's onnxruntime has the CUDA provider."""
    flags: frozenset[str]
    """Optional server flags, of those the project would use, that this version knows."""


def default_home() -> Path:
    """Where the embedded Triton is kept: $LIPSYNC_TRITON_HOME, else `.triton` in a checkout, else the user's cache."""
    if given := os.environ.get("LIPSYNC_TRITON_HOME"):
        return Path(given).expanduser().absolute()
    checkout = _checkout()
    if checkout is not None:
        return checkout / ".triton"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "triton-lipsync" / "triton"


def install(home: Path, report: Callable[[str], None]) -> TritonHome:
    """Makes `home` hold a complete embedded Triton for this interpreter; milliseconds when it already does.

    `report` gets a line for each step that takes time. Safe to call from several processes at once, and to interrupt:
    each part is built aside and renamed into place. Raises `InvalidInput` where this machine cannot run the server.
    """
    check_platform()
    home = home.absolute()
    require_plain_path(home, "the embedded Triton's folder", "LIPSYNC_TRITON_HOME")
    home.mkdir(parents=True, exist_ok=True)
    backend = backend_source()
    with _locked(home / ".lock"):
        if not (home / "wheel").is_dir():
            _install_wheel(home, report)
        layout = home / f"layout-{_layout_key()}"
        if not layout.is_dir():
            _build_layout(home, layout, report)
        _refresh(layout / "backends" / "onnxruntime" / "model.py", backend)
    libraries = home / "wheel" / "nvidia_pytriton.libs"
    flags: list[str] = json.loads((layout / "flags.json").read_text())
    return TritonHome(
        root=home,
        server=_wheel_part(home, "bin/tritonserver"),
        library_path=f"{layout / 'lib'}:{libraries}",
        backends=layout / "backends",
        python_bin=layout / "bin",
        cuda=any((path / "onnxruntime/capi/libonnxruntime_providers_cuda.so").exists() for path in _package_folders()),
        flags=frozenset(flags),
    )


def check_platform() -> None:
    """Raises `InvalidInput` unless the wheel can run here: x86_64 Linux with a glibc that is new enough."""
    machine = platform.machine()
    if sys.platform != "linux" or machine != "x86_64":
        raise InvalidInput(
            f"the embedded Triton runs on x86_64 Linux only, and this is {machine} {sys.platform}:"
            " run NVIDIA's Triton container and `lipsync serve --triton HOST:PORT`"
        )
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < MIN_GLIBC:
        raise InvalidInput(
            f"the embedded Triton needs glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer (Debian 12, Ubuntu 22.04), and"
            f" this is {name or 'no glibc'} {version}:"
            " run NVIDIA's Triton container and `lipsync serve --triton HOST:PORT`"
        )
    if shutil.which("bash") is None:
        raise InvalidInput("Triton's Python backend starts its processes through bash: install the package `bash`")


def require_plain_path(path: Path, what: str, field: str) -> None:
    """Raises `InvalidInput` for a path that would break in the shell line that Triton's Python backend makes of it."""
    if not all(c.isalnum() or c in "/._-+,:=@%" for c in str(path)):
        raise InvalidInput(
            f"{what} is {str(path)!r}: Triton's Python backend takes letters, digits and /._-+,:=@% in a path only;"
            " move it or reach it through a symbolic link",
            field=field,
        )


def backend_source() -> Path:
    """The project's Python-based `onnxruntime` backend: in the checkout, or in the installed package."""
    checkout = _checkout()
    folders = [Path(__file__).parent / "backends"]
    if checkout is not None:
        folders.insert(0, checkout / "deploy" / "backends")
    for folder in folders:
        if (folder / "onnxruntime" / "model.py").is_file():
            return folder / "onnxruntime" / "model.py"
    raise LipsyncError(f"backends/onnxruntime/model.py is missing in {folders[0]}: install triton-lipsync again")


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "tools").is_dir() else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _renamed_into_place(target: Path) -> Iterator[Path]:
    """Gives a staging folder beside `target`, which becomes `target` if the block ends well and vanishes otherwise."""
    for leftover in target.parent.glob(f"{target.name}.staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.staging-", dir=target.parent))
    try:
        staging.chmod(0o755)
        yield staging
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _wheel_part(home: Path, name: str) -> Path:
    return home / "wheel" / "pytriton" / "tritonserver" / name


def _install_wheel(home: Path, report: Callable[[str], None]) -> None:
    report(f"installing {WHEEL} (45 MB) into {home}")
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        raise InvalidInput(f"pip is missing in this environment: run `{sys.executable} -m ensurepip`")
    with _renamed_into_place(home / "wheel") as staging:
        options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        _run([*pip, "install", *options, "--quiet", "--target", str(staging), WHEEL], f"pip could not install {WHEEL}")
        for name in ("bin", "pytriton/__pycache__"):
            shutil.rmtree(staging / name, ignore_errors=True)
        for entry in (staging / "pytriton").iterdir():
            if entry.is_dir() and entry.name != "tritonserver":
                shutil.rmtree(entry)


def _layout_key() -> str:
    """Names one combination of interpreter and environment, so that several can share a home."""
    parts = [LAYOUT_VERSION, WHEEL, sys.version, sys.base_prefix, *_package_folders()]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
    return f"py{_PYTHON_VERSION}-{digest[:12]}"


def _build_layout(home: Path, layout: Path, report: Callable[[str], None]) -> None:
    report(f"laying out Triton's backends for Python {_PYTHON_VERSION}")
    stub = _wheel_part(home, f"python_backend_stubs/{_PYTHON_VERSION}/triton_python_backend_stub")
    if not stub.is_file():
        raise InvalidInput(f"{WHEEL} has no Python backend for Python {_PYTHON_VERSION}: use Python 3.10 to 3.13")
    with _renamed_into_place(layout) as staging:
        python_backend = staging / "backends" / "python"
        python_backend.mkdir(parents=True)
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            shutil.copy2(_wheel_part(home, "backends/python") / name, python_backend)
        shutil.copy2(stub, python_backend)
        (staging / "backends" / "onnxruntime").mkdir()
        _link_libpython(home, staging / "lib", report)
        _build_environment(staging)
        (staging / "flags.json").write_text(json.dumps(_known_flags(home)))


def _refresh(target: Path, source: Path) -> None:
    """Makes `target` a copy of `source`, never seen half written; a running server takes it up with its next load."""
    if not target.is_file() or target.read_bytes() != source.read_bytes():
        staging = target.with_name(f"{target.name}.staging")
        shutil.copyfile(source, staging)
        staging.replace(target)


def _build_environment(folder: Path) -> None:
    """Makes `folder` a virtual environment whose site-packages are those of the running interpreter.

    The stub's Python ignores PYTHONHOME and PYTHONPATH; it goes by the first `python3` of PATH and its pyvenv.cfg.
    """
    executable = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(executable)
    (folder / "pyvenv.cfg").write_text(f"home = {executable.parent}\ninclude-system-site-packages = false\n")
    site_packages = folder / "lib" / f"python{_PYTHON_VERSION}" / "site-packages"
    site_packages.mkdir(parents=True)
    (site_packages / "environment.pth").write_text("".join(f"{path}\n" for path in _package_folders()))


@functools.cache
def _package_folders() -> tuple[Path, ...]:
    """Where this interpreter finds what the backend imports."""
    folders: dict[Path, None] = {}
    for name in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InvalidInput(
                f"{name} is not installed in this environment: run `pip install 'triton-lipsync[tools]'`"
            )
        folders[Path(spec.origin).absolute().parent.parent] = None
    return tuple(folders)


def _link_libpython(home: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Links this interpreter's libpython, and nothing else of its folder, where the stub looks for it."""
    folder.mkdir()
    libraries = home / "wheel" / "nvidia_pytriton.libs"
    major, minor = _PYTHON_VERSION.split(".")
    bundled = list(libraries.glob(f"libpython{major}-*.{minor}.so.1.0"))
    library = _find_libpython()
    if library is None and not bundled:
        _install_libpython(report)
        library = _find_libpython()
    if library is not None:
        for name in (_LIBPYTHON, *(path.name for path in bundled)):
            (folder / name).symlink_to(library)
    elif not bundled:
        raise InvalidInput(f"{_LIBPYTHON} is missing even after installing libpython{_PYTHON_VERSION}")


def _find_libpython() -> Path | None:
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    for candidate in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix) / "lib"):
        if (candidate / _LIBPYTHON).is_file():
            return (candidate / _LIBPYTHON).resolve()
    ldconfig = shutil.which("ldconfig", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if ldconfig is None:
        return None
    listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    for line in listing.splitlines():
        name, _, path = line.strip().partition(" => ")
        if name.startswith(_LIBPYTHON) and "x86-64" in name and Path(path).is_file():
            return Path(path).resolve()
    return None


def _install_libpython(report: Callable[[str], None]) -> None:
    package = f"libpython{_PYTHON_VERSION}"
    apt_get = shutil.which("apt-get")
    if apt_get is None or os.geteuid() != 0:
        raise InvalidInput(
            f"{_LIBPYTHON} is missing, which Triton's Python backend needs: run `sudo apt-get install {package}`,"
            " or use a Python that was built with its shared library"
        )
    report(f"installing {package} through apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(LipsyncError):
        _run([apt_get, "update", "-qq"], "apt-get update failed", environment)
    _run([apt_get, "install", "-y", "-qq", package], f"apt-get could not install {package}", environment)


def _known_flags(home: Path) -> list[str]:
    """Asks the server for its flags, which also shows that it runs here. An unknown flag would end it at its start."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(home / "wheel" / "nvidia_pytriton.libs")}
    command = [str(_wheel_part(home, "bin/tritonserver")), "--help"]
    # The server ends with 1 after its help, so the text itself is the proof.
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    text = shown.stdout + shown.stderr
    if "--model-control-mode" not in text:
        raise LipsyncError(f"tritonserver does not run on this machine: {text.strip() or shown.returncode}")
    return [flag for flag in ("--allow-client-shm",) if flag in text]


def _run(command: list[str], fault: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise LipsyncError(f"{fault}: {lines[-1].strip()}")
