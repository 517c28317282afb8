"""Checks of an installation: settings and a place to look at go in, findings with what to do about them come out.

Everything is tried rather than looked up where that costs nothing: ports are bound, memory is taken, a picture is
encoded. Nothing is installed and nothing is left behind. What Triton is asked is in `doctor_triton`, certificates in
`doctor_tls`.
"""

from __future__ import annotations

import ctypes
import errno
import http.client
import os
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from compositor import jpeg
from compositor.blending import CROP_SIZE
from compositor.errors import LipsyncError
from compositor.manifest import MODEL, tenant_names
from compositor.settings import Settings
from compositor.tenant import Tenant
from lipsync.triton_install import check_platform, default_home, install

NEEDED_MB, WANTED_MB = 500, 5_000
"""Free space below which something fails soon, and below which it is time to look."""
_LONG_TIMEOUT_S = 30.0
_TIME_ERROR = 5
"""What adjtimex(2) returns while the clock follows no reference."""


class State(Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """What a check found, and where it is not well, what to do."""

    check: str
    state: State
    found: str
    advice: str = ""


Check = Callable[[], Iterator[Finding]]


def carry_out(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check; an error, whosever it is, is one, too."""
    try:
        yield from check()
    except LipsyncError as error:
        yield Finding(name, State.WRONG, error.message)
    except OSError as error:
        yield Finding(name, State.WRONG, str(error))
    except Exception as error:
        # The other checks are wanted all the more.
        yield Finding(name, State.WRONG, f"it cannot be checked: {type(error).__name__}: {error}")


def check_jpeg() -> Iterator[Finding]:
    """That libturbojpeg is there and writes restart markers."""
    name = "libturbojpeg"
    data = jpeg.encode(np.zeros((16, 64, 3), np.uint8), jpeg.Encoding(restart_interval=2))
    if jpeg.split(data)[2] == 2:
        yield Finding(name, State.OK, f"{jpeg.LIBRARY} writes restart markers")
    else:
        advice = "install libjpeg-turbo 2.1 or newer: `apt-get install libturbojpeg0`"
        yield Finding(name, State.WRONG, f"{jpeg.LIBRARY} does not honour TJ_RESTART", advice)


def check_embedded(home: Path | None = None) -> Iterator[Finding]:
    """That the embedded Triton runs here, if it was installed, and has its backend."""
    name, home = "embedded Triton", home or default_home()
    try:
        check_platform()
    except LipsyncError as error:
        yield Finding(name, State.WARNING, error.message)
        return
    if not (home / "wheel").is_dir():
        yield Finding(name, State.OK, f"not installed in {home}; the first `lipsync up` installs it")
        return
    advice = f"delete {home}; the next `lipsync up` installs it again"
    layout = install(home, lambda _: None)
    environment = {**os.environ, "LD_LIBRARY_PATH": layout.library_path}
    try:
        # It ends with 1 after its help, so the text itself is the proof.
        shown = subprocess.run(
            [str(layout.server), "--help"], capture_output=True, text=True, env=environment, timeout=_LONG_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(name, State.WRONG, f"{layout.server} does not run: {error}", advice)
        return
    if "--model-control-mode" not in shown.stdout + shown.stderr:
        said = (shown.stderr or shown.stdout).strip().splitlines() or [f"it ends with {shown.returncode}"]
        yield Finding(name, State.WRONG, f"{layout.server} does not run: {said[-1]}", advice)
        return
    parts = ("python/libtriton_python.so", "python/triton_python_backend_stub", "onnxruntime/model.py")
    if missing := [part for part in parts if not (layout.backends / part).is_file()]:
        yield Finding(name, State.WRONG, f"{layout.backends} lacks {', '.join(missing)}", advice)
    else:
        yield Finding(name, State.OK, f"tritonserver runs, with its backend, in {home}")


def check_memory(settings: Settings, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """That the shared memory that mouths come through can be had."""
    name = "shared memory"
    if settings.triton.shared_memory == "off":
        yield Finding(name, State.OK, "not used: triton.shared_memory is off")
        return
    region = settings.triton.slots * settings.triton.slot_frames * CROP_SIZE * CROP_SIZE * 3
    needed = region * settings.server.workers * len(settings.triton.endpoints)
    advice = "make it larger (of a container: --shm-size), or lower triton.slots or triton.slot_frames"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserved, not only promised, and given back at once.
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        found = f"{folder} has no {needed / 1e6:.0f} MB to give: {error.strerror}; mouths will come as tensors"
        yield Finding(name, State.WRONG, found, advice)
        return
    yield Finding(name, State.OK, f"{folder} gives the {needed / 1e6:.0f} MB that mouths come through")


def check_ports(settings: Settings) -> Iterator[Finding]:
    """That the service may listen where it is told to, or listens there already."""
    for setting, host, port in (
        ("server.port", settings.server.host, settings.server.port),
        ("http.port", settings.http.host, settings.http.port),
    ):
        yield _check_port(setting, host, port, settings.http.port)
        if host in ("0.0.0.0", "::"):
            advice = "listen on 127.0.0.1, or put a proxy in front that asks who comes"
            yield Finding(setting, State.WARNING, f"{host}: whoever reaches this machine may use the service", advice)


def _check_port(setting: str, host: str, port: int, http_port: int) -> Finding:
    if port == 0:
        return Finding(setting, State.OK, "0: a free port is taken")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_ours(host, http_port):
            return Finding(setting, State.OK, f"{host}:{port} is the service, which runs")
        advice = {
            errno.EADDRINUSE: f"stop what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another",
            errno.EACCES: "choose a port of 1024 or more",
        }.get(error.errno or 0, "choose an address of this machine")
        return Finding(setting, State.WRONG, f"{host}:{port} cannot be bound: {error.strerror}", advice)
    return Finding(setting, State.OK, f"{host}:{port} is free")


def _is_ours(host: str, http_port: int) -> bool:
    """Whether this service answers on the HTTP port."""
    connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, http_port, timeout=5)
    try:
        connection.request("GET", "/stats")
        return b'"sessions"' in connection.getresponse().read(1_000_000)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def check_clock(settings: Settings) -> Iterator[Finding]:
    """That the clock can be right: later than what was installed, and following a reference."""
    name, now_s = "clock", time.time()
    newest_s = max(
        (path.stat().st_mtime for path in (settings.model_repository, Path(__file__)) if path.exists()), default=0.0
    )
    if now_s < newest_s - 60:
        found = f"it says {time.ctime(now_s)}, but files here are of {time.ctime(newest_s)}"
        yield Finding(name, State.WRONG, found, "set it: `timedatectl set-ntp true`")
    elif ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        found = f"it says {time.ctime(now_s)}, and follows no reference"
        advice = "run a time service where several machines share a Triton: `timedatectl set-ntp true`"
        yield Finding(name, State.WARNING, found, advice)
    else:
        yield Finding(name, State.OK, "it follows a reference")


def check_disk(settings: Settings, temporary: Path | None = None) -> Iterator[Finding]:
    """That there is room, and that the repository can be read and written."""
    repository = settings.model_repository
    if not repository.is_dir():
        advice = "create it, or name another: `--repository`, or model_repository in the settings"
        yield Finding("model repository", State.WRONG, f"{repository} is no directory", advice)
    elif not os.access(repository, os.R_OK | os.X_OK, effective_ids=True):
        yield Finding("model repository", State.WRONG, f"{repository} cannot be read", "chown or chmod it")
    elif not os.access(repository, os.W_OK, effective_ids=True):
        found = f"{repository} can be read only: it serves, and `lipsync tenant add` does not work from here"
        yield Finding("model repository", State.WARNING, found, "chown it, if tenants are to be added from here")
    else:
        yield Finding("model repository", State.OK, f"{repository} can be read and written")
    for path in filter(Path.is_dir, (repository, temporary or Path(tempfile.gettempdir()))):
        yield _check_room(path)


def _check_room(path: Path) -> Finding:
    name, status = f"room in {path}", os.statvfs(path)
    free_mb = status.f_bavail * status.f_frsize / 1e6
    found = f"{free_mb:,.0f} MB free"
    if status.f_files and not status.f_favail:
        return Finding(name, State.WRONG, "no further file can be made", "remove files that nobody needs")
    if free_mb < NEEDED_MB:
        return Finding(name, State.WRONG, found, "remove tenants that nobody needs, or move it to a larger disk")
    if free_mb < WANTED_MB:
        return Finding(name, State.WARNING, found, "a tenant takes 0.2 to 1 GB: make room in time")
    return Finding(name, State.OK, found)


def check_tenants(settings: Settings) -> Iterator[Finding]:
    """That every tenant opens and has its audio encoder."""
    name, repository = "tenants", settings.model_repository
    tenants = tenant_names(repository)
    encoders, broken = set[str](), 0
    for tenant in tenants:
        opened = _open(repository, tenant)
        if isinstance(opened, Tenant):
            encoders.add(opened.manifest.encoder)
        else:
            broken += 1
            yield opened
    for encoder in sorted(encoders):
        if not (repository / encoder / "1" / MODEL).is_file():
            advice = f"install it: `lipsync encoder add MODEL.onnx --name {encoder}`"
            yield Finding(name, State.WRONG, f"the audio encoder {encoder!r} is missing", advice)
    if not tenants:
        yield Finding(name, State.OK, "none yet; add one with `lipsync tenant add`")
    elif broken < len(tenants):
        yield Finding(name, State.OK, f"{len(tenants) - broken} open")


def _open(repository: Path, tenant: str) -> Tenant | Finding:
    try:
        return Tenant(repository, tenant)
    except LipsyncError as error:
        advice = f"add it again: `lipsync tenant remove {tenant}`, then `lipsync tenant add`"
        return Finding("tenants", State.WRONG, error.message, advice)


def check_files(settings: Settings) -> Iterator[Finding]:
    """That the process may open as many files as it may have connections."""
    # The service raises the soft limit to the hard one.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.http.max_connections + settings.server.max_calls + 256
    found = f"{most} may be open at once"
    if most != resource.RLIM_INFINITY and most < needed:
        advice = f"`ulimit -n {needed}` (LimitNOFILE, --ulimit nofile), or lower http.max_connections"
        yield Finding("open files", State.WRONG, f"{found}, and {needed} are needed", advice)
    else:
        yield Finding("open files", State.OK, found)
