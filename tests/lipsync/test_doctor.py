"""Installations that are broken, each in one way, and what `lipsync doctor` says of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from compositor.settings import Settings
from lipsync import doctor
from lipsync.doctor import Finding, State, carry_out
from lipsync.doctor_tls import SOON_DAYS, check_address
from lipsync.doctor_triton import SKEW_S, judge_skew

from ..conftest import Stack
from ..integration.waiting import until
from .conftest import shared_names


def settings(**values: object) -> Settings:
    return Settings.model_validate(values)


def lipsync(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipsync", "doctor", *map(str, arguments)]
    kept = "LIPSYNC_TRITON_HOME"
    inherited = {name: value for name, value in os.environ.items() if name == kept or not name.startswith("LIPSYNC_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**inherited, **environment}, check=False
    )


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_sound_installation(repository: Path, triton_home: Path) -> None:
    done = lipsync("-r", repository, LIPSYNC_SERVER__PORT="0", LIPSYNC_HTTP__PORT="0")
    assert done.returncode == 0, done.stdout
    assert "wrong" not in done.stdout
    for line in (
        "ok      libturbojpeg: libturbojpeg.so.0 writes restart markers",
        f"ok      embedded Triton: tritonserver runs, with its backend, in {triton_home}",
        "ok      tenants: 3 open",
        f"ok      model repository: {repository} can be read and written",
    ):
        assert line in done.stdout.splitlines()


def test_json(repository: Path) -> None:
    done = lipsync("-r", repository / "typo", "--json", LIPSYNC_SERVER__PORT="0", LIPSYNC_HTTP__PORT="0")
    assert done.returncode == 1
    findings = json.loads(done.stdout)
    (wrong,) = [each for each in findings if each["state"] == "wrong"]
    assert wrong["check"] == "model repository"
    assert wrong["found"].endswith("typo is no directory")
    assert wrong["advice"].startswith("create it")


def test_settings_that_are_wrong_are_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("server:\n  prot: 1\n")
    done = lipsync("-c", config)
    assert done.returncode == 1
    assert "server.prot: no such setting; did you mean port?" in done.stdout
    assert "libturbojpeg" in done.stdout


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "libturbojpeg.so.0").write_bytes(b"no library")
    done = lipsync(LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 1
    assert "wrong   libturbojpeg: libturbojpeg.so.0 is missing: run `apt-get install libturbojpeg0`" in done.stdout


def test_an_error_of_the_system_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("here", State.OK, "fine")
        raise PermissionError(13, "Permission denied", "/there")

    first, second = carry_out("here", check)
    assert first.state is State.OK
    assert (second.state, second.found) == (State.WRONG, "[Errno 13] Permission denied: '/there'")


def test_a_check_that_fails_itself_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("here", State.OK, "fine")
        raise ValueError("not foreseen")

    _, second = carry_out("here", check)
    assert (second.state, second.found) == (State.WRONG, "it cannot be checked: ValueError: not foreseen")


@pytest.fixture
def home(triton_home: Path, tmp_path: Path) -> Path:
    """A copy of the embedded Triton, of links, to be broken."""
    copy = tmp_path / "home"
    shutil.copytree(triton_home, copy, copy_function=os.symlink, symlinks=True)
    (copy / ".lock").unlink(missing_ok=True)
    return copy


def test_the_embedded_triton(home: Path) -> None:
    assert only(doctor.check_embedded(home)).state is State.OK


def test_an_embedded_triton_that_is_not_there_yet(tmp_path: Path) -> None:
    finding = only(doctor.check_embedded(tmp_path))
    assert finding.state is State.OK
    assert "the first `lipsync up` installs it" in finding.found


@pytest.mark.parametrize("damage", ["missing", "no program", "lacks a library"])
def test_an_embedded_triton_that_does_not_run(home: Path, damage: str) -> None:
    server = home / "wheel" / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    server.unlink()
    if damage == "no program":
        server.write_bytes(b"\x7fELF, half of it")
        server.chmod(0o755)
    elif damage == "lacks a library":
        server.write_text("#!/bin/sh\necho 'error while loading shared libraries: libx.so.1' >&2\nexit 127\n")
        server.chmod(0o755)
    finding = only(doctor.check_embedded(home))
    assert finding.state is State.WRONG
    assert "tritonserver does not run" in finding.found
    assert finding.advice == f"delete {home}; the next `lipsync up` installs it again"


def test_an_embedded_triton_without_its_backend(home: Path) -> None:
    for library in home.glob("layout-*/backends/python/libtriton_python.so"):
        library.unlink()
    finding = only(doctor.check_embedded(home))
    assert finding.state is State.WRONG
    assert finding.found.endswith("lacks python/libtriton_python.so")


def test_shared_memory(tmp_path: Path) -> None:
    assert only(doctor.check_memory(settings())).state is State.OK
    assert "off" in only(doctor.check_memory(settings(triton={"shared_memory": "off"}), tmp_path / "none")).found
    huge = settings(server={"workers": 64}, triton={"slots": 256, "slot_frames": 50, "endpoints": "a:1,b:1,c:1,d:1"})
    for wanted, folder in ((huge, Path("/dev/shm")), (settings(), tmp_path / "none")):
        before = shared_names(os.getpid())
        finding = only(doctor.check_memory(wanted, folder))
        assert finding.state is State.WRONG
        assert "mouths will come as tensors" in finding.found
        assert finding.advice
        assert {name for name in shared_names(os.getpid()) - before if "deleted" in name} == set()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something listens that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_ports_that_are_taken(taken: int) -> None:
    wanted = settings(server={"port": taken}, http={"port": 0})
    first, second = doctor.check_ports(wanted)
    assert (first.check, first.state) == ("server.port", State.WRONG)
    assert first.found == f"127.0.0.1:{taken} cannot be bound: Address already in use"
    assert f"ss -ltnp 'sport = :{taken}'" in first.advice
    assert second.state is State.OK


def test_addresses_of_other_machines_and_of_everybody() -> None:
    found = list(doctor.check_ports(settings(server={"host": "192.0.2.1"}, http={"host": "0.0.0.0", "port": 0})))
    assert [finding.state for finding in found] == [State.WRONG, State.OK, State.WARNING]
    assert found[0].advice == "choose an address of this machine"
    assert "whoever reaches this machine" in found[2].found


def test_too_few_files() -> None:
    command = f"ulimit -n 256; exec {sys.executable} -m lipsync doctor"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "wrong   open files: 256 may be open at once, and 1536 are needed" in done.stdout


def test_a_clock_before_what_is_installed(tmp_path: Path) -> None:
    assert only(doctor.check_clock(settings(model_repository=tmp_path))).state is not State.WRONG
    os.utime(tmp_path, (time.time() + 86_400,) * 2)
    finding = only(doctor.check_clock(settings(model_repository=tmp_path)))
    assert finding.state is State.WRONG
    assert "timedatectl" in finding.advice


@pytest.mark.parametrize(("ahead_s", "words"), [(0.1, ""), (-SKEW_S - 1, "behind ours"), (3600.0, "3600 s ahead of")])
def test_clocks_that_disagree(ahead_s: float, words: str) -> None:
    finding = judge_skew("Triton", ahead_s)
    assert finding.state is (State.WRONG if words else State.OK)
    assert words in finding.found


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    # A file system that never has room.
    found = list(doctor.check_disk(settings(model_repository="/proc"), tmp_path))
    (full,) = [finding for finding in found if finding.check == "room in /proc"]
    assert (full.state, full.found) == (State.WRONG, "0 MB free")
    assert "larger disk" in full.advice


@pytest.mark.parametrize(("mode", "state", "words"), [(0o555, "WARNING", "be read only"), (0, "WRONG", "be read")])
def test_repositories_that_others_own(mode: int, state: str, words: str) -> None:
    # Root may do everything: it is somebody else for a while, in a process of its own.
    code = (
        "import os, sys; from compositor.settings import Settings; from lipsync.doctor import check_disk\n"
        "os.getuid() or os.seteuid(65534)\n"
        "found = next(check_disk(Settings(model_repository=sys.argv[1])))\n"
        "print(found.state.name, found.found)"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(mode)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        Path(folder).chmod(0o700)
    assert done.stdout.startswith(f"{state} {folder} can")
    assert words in done.stdout


def test_tenants_that_are_damaged(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    scans = copy / "plain" / "1" / "scans.bin"
    scans.write_bytes(scans.read_bytes()[:-100])
    shutil.rmtree(copy / "audio_encoder")
    damaged, encoder, rest = doctor.check_tenants(settings(model_repository=copy))
    assert damaged.state is State.WRONG
    assert "'plain' is damaged: scans.bin has" in damaged.found
    assert damaged.advice.startswith("add it again: `lipsync tenant remove plain`")
    assert (encoder.state, encoder.found) == (State.WRONG, "the audio encoder 'audio_encoder' is missing")
    assert (rest.state, rest.found) == (State.OK, "2 open")


class _Page(BaseHTTPRequestHandler):
    """Answers with the server's status, and handshakes, whose headers it keeps, with one of their own."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        upgrade = "Upgrade" in self.headers
        status = getattr(self.server, "handshake", 101) if upgrade else getattr(self.server, "status", 200)
        if upgrade:
            self.server.asked = dict(self.headers)  # type: ignore[attr-defined]
        self.close_connection = True
        self.send_response(status)
        self.end_headers()
        if status == 101:
            assert self.rfile.read(6)[0] == 0x88  # the client's close frame

    def log_message(self, *arguments: object) -> None:
        pass


class Authority:
    """A certificate authority of our own, by the openssl command."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        self.folder, self.root = folder, folder / "root.pem"
        (folder / "index").touch()
        (folder / "ca.cnf").write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={folder}/index\nrand_serial=yes\nnew_certs_dir={folder}\n"
            "default_md=sha256\npolicy=any\ncopy_extensions=copy\nunique_subject=no\n[any]\ncommonName=supplied\n"
        )
        self._run("req", "-x509", *self._key("root"), "-out", self.root, "-days", "30", "-subj", "/CN=root")

    def issue(self, name: str, begin_days: float, end_days: float) -> ssl.SSLContext:
        """A server's context with a certificate for `name`, valid from and to so many days from now."""
        stamps = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 86_400 * d)) for d in (begin_days, end_days)]
        self._run(
            "req",
            *self._key("leaf"),
            "-out",
            "leaf.csr",
            "-subj",
            f"/CN={name}",
            "-addext",
            f"subjectAltName=DNS:{name}",
        )
        signing: list[str | Path] = [
            "-config",
            "ca.cnf",
            "-cert",
            self.root,
            "-keyfile",
            "root.key",
            "-in",
            "leaf.csr",
            "-out",
            "leaf.pem",
        ]
        self._run("ca", "-batch", "-notext", *signing, "-startdate", stamps[0], "-enddate", stamps[1])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "leaf.pem", self.folder / "leaf.key")
        return context

    def _key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def _run(self, *arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class _Server(HTTPServer):
    """Says when it serves: from then on its socket may be wrapped."""

    def __init__(self, kind: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), kind)
        self.serves = threading.Event()

    def service_actions(self) -> None:
        self.serves.set()


@contextlib.contextmanager
def serving(kind: type[BaseHTTPRequestHandler]) -> Iterator[HTTPServer]:
    with _Server(kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert server.serves.wait(60)
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def page() -> Iterator[HTTPServer]:
    """A page that is not served yet by TLS."""
    with serving(_Page) as server:
        yield server


@contextlib.contextmanager
def forwarding(address: str) -> Iterator[int]:
    """The port of a proxy that hands on all but the header Host, in whose place it names the service, as nginx does
    where it is told nothing else."""

    class Proxy(_Page):
        def do_GET(self) -> None:
            connection = http.client.HTTPConnection(address, timeout=30)
            connection.request("GET", self.path, headers={**self.headers, "Host": address})
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            self.close_connection = True
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Proxy) as server:
        yield server.server_port


def secure(page: HTTPServer, context: ssl.SSLContext) -> str:
    """Serves the page by TLS; its address."""
    page.socket = context.wrap_socket(page.socket, server_side=True)
    return f"https://localhost:{page.server_port}"


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """Trusted by this process."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.root))
    return authority


def test_a_good_certificate(page: HTTPServer, trusted: Authority) -> None:
    certificate, answer, handshake = check_address(secure(page, trusted.issue("localhost", -1, 90)))
    assert (certificate.state, certificate.found) == (State.OK, "the certificate is good for 90 days")
    assert (answer.state, answer.found) == (State.OK, "the service answers, and is ready")
    assert (handshake.state, handshake.found) == (State.OK, "a WebSocket of its page opens")


@pytest.mark.parametrize(
    ("name", "begin", "end", "found", "advice"),
    [
        ("localhost", -10, -1, "certificate has expired", "renew it"),
        ("localhost", 1, 10, "certificate is not yet valid", "set the clock"),
        ("example.org", -1, 90, "Hostname mismatch", "get one for this name"),
    ],
)
def test_bad_certificates(
    page: HTTPServer, trusted: Authority, name: str, begin: float, end: float, found: str, advice: str
) -> None:
    finding = only(check_address(secure(page, trusted.issue(name, begin, end))))
    assert finding.state is State.WRONG
    assert found in finding.found
    assert finding.advice.startswith(advice)


def test_a_certificate_that_ends_soon(page: HTTPServer, trusted: Authority) -> None:
    certificate, *_ = check_address(secure(page, trusted.issue("localhost", -1, SOON_DAYS - 2)))
    assert (certificate.state, certificate.advice) == (State.WARNING, "renew it")


def test_a_certificate_of_an_unknown_authority(page: HTTPServer, authority: Authority) -> None:
    finding = only(check_address(secure(page, authority.issue("localhost", -1, 90))))
    assert finding.state is State.WRONG
    assert "authority that browsers know" in finding.advice


def test_what_is_no_tls_and_what_is_nothing(page: HTTPServer, taken: int) -> None:
    finding = only(check_address(f"https://localhost:{page.server_port}"))
    assert finding.state is State.WRONG
    assert "no TLS is spoken there" in finding.found
    assert "it cannot be reached" in only(check_address("https://localhost:1")).found


@pytest.mark.parametrize(("status", "state", "words"), [(503, State.WRONG, "not ready"), (404, State.WRONG, "else")])
def test_pages_that_are_not_ours_or_not_ready(page: HTTPServer, status: int, state: State, words: str) -> None:
    page.status = status  # type: ignore[attr-defined]
    finding = only(check_address(f"http://127.0.0.1:{page.server_port}"))
    assert finding.state is state
    assert words in finding.found


def found_once_ready(url: str) -> list[Finding]:
    """What is found at a page, when the service behind it says that it is ready."""
    found: list[Finding] = []

    def is_ready() -> bool:
        found[:] = check_address(url)
        return found[0].state is State.OK

    until(is_ready)
    return found


@pytest.mark.triton
@pytest.mark.parametrize("path", ["", "/"])
def test_the_services_own_page_opens_a_websocket(stack: Stack, path: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://{stack.service.http_address}{path}"
    with caplog.at_level("INFO"):
        answer, handshake = found_once_ready(url)
    assert (answer.state, handshake.state) == (State.OK, State.OK)
    assert "WebSocket failed" not in caplog.text


@pytest.mark.triton
def test_a_proxy_that_puts_its_own_host(stack: Stack) -> None:
    with forwarding(stack.service.http_address) as port:
        answer, handshake = found_once_ready(f"http://127.0.0.1:{port}")
    assert answer.state is State.OK
    assert (handshake.state, handshake.found) == (
        State.WRONG,
        "the WebSocket of its own page is refused (ORIGIN_REFUSED)",
    )
    origin = f"http://127.0.0.1:{port}"
    assert handshake.advice == f"let the proxy hand on the header Host, or list {origin} in http.allowed_origins"


@pytest.mark.parametrize("status", [200, 400, 403, 426])
def test_a_proxy_that_hands_on_no_websocket(page: HTTPServer, status: int) -> None:
    page.handshake = status  # type: ignore[attr-defined]
    _, handshake = check_address(f"http://127.0.0.1:{page.server_port}")
    assert (handshake.state, handshake.found) == (State.WRONG, f"no WebSocket opens: HTTP {status}")
    assert handshake.advice == "let the proxy hand on Upgrade and Connection, on every path"
    assert page.asked["Origin"] == f"http://127.0.0.1:{page.server_port}"  # type: ignore[attr-defined]


def test_a_page_without_tls_for_others() -> None:
    first, _ = check_address("http://avatars.invalid")
    assert first.found == "browsers give no microphone to pages without HTTPS"


@pytest.mark.parametrize(
    "url", ["avatars.example.org", "ftp://example.org", "https://", "https://here:99999", "https://[::1"]
)
def test_what_is_no_address(url: str) -> None:
    done = lipsync("--url", url)
    assert done.returncode == 1
    assert f"{url!r} is no address of a page" in done.stdout
