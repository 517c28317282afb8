"""Settings: file, environment, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from compositor.errors import SettingsInvalid, Status
from compositor.settings import RESERVED, Settings, read_settings


def leaves(model: type[BaseModel] = Settings, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(path, field) of every key that is no section."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += leaves(kind, (*path, name))
        else:
            found.append(((*path, name), field))
    return found


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, environment: dict[str, str] | None = None) -> list[str]:
    """The lines of the refusal, without the file's folder."""
    with pytest.raises(SettingsInvalid) as caught:
        read_settings(write(folder, text), environment or {})
    assert caught.value.status is Status.INVALID_ARGUMENT
    return caught.value.message.replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize(
    ("path", "field"), leaves(), ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_every_key_is_documented_and_has_a_sound_default(path: tuple[str, ...], field: Any) -> None:
    assert field.description
    assert field.description.endswith(".")
    values: dict[str, Any] = {path[-1]: field.default}
    for name in reversed(path[:-1]):
        values = {name: values}
    assert Settings.model_validate(values) == Settings()


def test_there_are_defaults() -> None:
    settings = read_settings(None, {})
    assert settings == Settings()
    assert (settings.server.port, settings.triton.endpoints) == (50052, ("127.0.0.1:8001",))
    assert settings.server.host == "127.0.0.1", "nothing without authentication is open to all by default"


def test_the_file_is_read(tmp_path: Path) -> None:
    settings = read_settings(
        write(tmp_path, "model_repository: /models\nserver:\n  port: 7\n  timeout_s: 1.5\naudio: {edge: zeros}\n"), {}
    )
    assert settings.model_repository == Path("/models")
    assert (settings.server.port, settings.server.timeout_s, settings.audio.edge) == (7, 1.5, "zeros")
    assert settings.triton == Settings().triton


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "server:\n  # port: 7\naudio:\n"])
def test_an_empty_file_or_section_gives_defaults(tmp_path: Path, text: str) -> None:
    assert read_settings(write(tmp_path, text), {}) == Settings()


@pytest.mark.parametrize("word", ["off", '"off"', "'off'"])
def test_off_is_a_word(tmp_path: Path, word: str) -> None:
    assert read_settings(write(tmp_path, f"triton: {{shared_memory: {word}}}"), {}).triton.shared_memory == "off"


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {port: 7, host: file}\ntriton: {slots: 3}\n")
    environment = {
        "LIPSYNC_SERVER__PORT": "8",
        "LIPSYNC_MODEL_REPOSITORY": "/env",
        "LIPSYNC_LOGGING__LEVEL": "debug",
        "PATH": "/bin",
        "LIPSYNCED": "1",
    }
    settings = read_settings(path, environment)
    assert (settings.server.port, settings.server.host, settings.triton.slots) == (8, "file", 3)
    assert (settings.model_repository, settings.logging.level) == (Path("/env"), "debug")
    assert read_settings(None, environment).server.port == 8


def test_origins_are_as_browsers_write_them(tmp_path: Path) -> None:
    text = 'http: {allowed_origins: "https://shop.example.org, http://localhost:3000"}'
    listed = read_settings(write(tmp_path, text), {}).http.allowed_origins
    assert listed == ("https://shop.example.org", "http://localhost:3000")
    assert read_settings(None, {"LIPSYNC_HTTP__ALLOWED_ORIGINS": "*"}).http.allowed_origins == ("*",)
    other = ["http://shop.example.org:443", "https://[::1]:8443", "tauri://localhost", "*"]
    assert Settings.model_validate({"http": {"allowed_origins": other}}).http.allowed_origins == tuple(other)


@pytest.mark.parametrize(
    ("wrong", "mended"),
    [
        ("https://shop.example.org:443", "as browsers do: https://shop.example.org, not"),
        ("http://x:80", "leave out user, path and the scheme's own port"),
        ("http://user@x", "as browsers do: http://x, not"),
        ("https://shop.example.org/", "as browsers do: https://shop.example.org, not"),
        ("https://shop.example.org/shop?a=b", "as browsers do: https://shop.example.org, not"),
        ("https://Shop.example.org", "as browsers do: https://shop.example.org, not"),
        ("https://shop.example.org:", "as browsers do: https://shop.example.org, not"),
        ("https://*.example.org", "name each host: * is for all and stands alone"),
        ("https://*/x", "name each host"),
        ("shop.example.org", "name scheme and host, such as https://shop.example.org"),
        ("null", "name scheme and host"),
    ],
)
def test_origins_that_could_never_match_stop_the_start(tmp_path: Path, wrong: str, mended: str) -> None:
    (line,) = refusal(tmp_path, f'http: {{allowed_origins: ["https://a.example", "{wrong}"]}}')
    assert line.startswith("settings.yaml: http.allowed_origins.1: ")
    assert mended in line
    assert f"not '{wrong}'" in line
    assert "as browsers write them" in line


def test_opentelemetrys_own_variables_are_taken_unless_ours_are_there(tmp_path: Path) -> None:
    path = write(tmp_path, "tracing: {endpoint: 'http://file:4317', sample_ratio: 0.5}\n")
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://standard:4317", "OTEL_SERVICE_NAME": "faces"}
    tracing = read_settings(path, standard).tracing
    assert (tracing.endpoint, tracing.service_name, tracing.sample_ratio) == ("https://standard:4317", "faces", 0.5)
    own = {**standard, "LIPSYNC_TRACING__ENDPOINT": "http://own:4317"}
    assert read_settings(path, own).tracing.endpoint == "http://own:4317"
    assert read_settings(path, dict.fromkeys(standard, "")).tracing.endpoint == "http://file:4317"
    with pytest.raises(SettingsInvalid, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: tracing\.endpoint: .* not 'host:4317'"):
        read_settings(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "host:4317"})


def test_lipsync_config_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "server: {port: 9}")
    assert read_settings(None, {"LIPSYNC_CONFIG": str(path)}).server.port == 9
    other = tmp_path / "other.yaml"
    other.write_text("server: {port: 10}")
    assert read_settings(other, {"LIPSYNC_CONFIG": str(path)}).server.port == 10
    assert read_settings(None, {"LIPSYNC_CONFIG": ""}) == Settings()
    monkeypatch.setenv("LIPSYNC_CONFIG", str(path))
    assert read_settings().server.port == 9


def test_variables_that_are_no_settings_are_left_alone() -> None:
    assert read_settings(None, dict.fromkeys(RESERVED - {"LIPSYNC_CONFIG"}, "x")) == Settings()


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "model_repository", Path("x"))  # noqa: B010 - the type checker knows that it is frozen
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings.server, "port", 5)  # noqa: B010


def test_an_unknown_key_in_the_file_gets_a_suggestion(tmp_path: Path) -> None:
    assert refusal(tmp_path, "audio: {egde: zeros}") == [
        "settings.yaml: audio.egde: no such setting; did you mean edge? (allowed here: edge)"
    ]
    assert refusal(tmp_path, "sever: {port: 1}") == [
        "settings.yaml: sever: no such setting; did you mean server? "
        "(allowed here: model_repository, server, triton, residency, http, live, audio, logging, tracing)"
    ]
    (line,) = refusal(tmp_path, "server: {zzz: 1}")
    assert line.startswith("settings.yaml: server.zzz: no such setting (allowed here: host, port, ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LIPSYNC_SERVER__PROT", "server.prot: no such setting; did you mean port?"),
        ("LIPSYNC_SERVER__PORT__NUMBER", "server.port: "),
        ("LIPSYNC_FOO__BAR", "foo: no such setting (allowed here: model_repository, "),
        ("LIPSYNC_SERVER", "server: Input should be a valid dictionary"),
        ("LIPSYNC_", ": no such setting"),
    ],
)
def test_an_unknown_variable_is_named(name: str, words: str) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        read_settings(None, {name: "1"})
    assert caught.value.message.startswith(f"{name}: {words}")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        ("server: {port: 70000}", "server.port", "allowed is at least 0 and at most 65535: gRPC port"),
        ("server: {port: ssh}", "server.port", "not 'ssh'; allowed is at least 0 and at most 65535"),
        ("server: {port: yes}", "server.port", "not 'yes'"),
        ("server: {port: 1.5}", "server.port", "not 1.5"),
        ("server: {port: null}", "server.port", "not None"),
        ("server: {timeout_s: 0}", "server.timeout_s", "allowed is more than 0 and at most 3600"),
        ("server: {timeout_s: .nan}", "server.timeout_s", "allowed is more than 0"),
        ("server: {timeout_s: .inf}", "server.timeout_s", "at most 3600"),
        ("audio: {edge: none}", "audio.edge", "'silence' or 'zeros', not 'none'"),
        ("logging: {level: [1]}", "logging.level", "'debug', 'info', 'warning' or 'error', not [1]"),
        ("triton: {endpoints: triton}", "triton.endpoints.0", "not 'triton'; gRPC addresses, host:port"),
        ("triton: {endpoints: 'http://a:1'}", "triton.endpoints.0", "not 'http://a:1'"),
        ("triton: {endpoints: ''}", "triton.endpoints", "there must be one at least"),
        ("triton: {gpus: '0, x'}", "triton.gpus.1", "not 'x'; GPUs of each Triton"),
        ("server: 5", "server", "not 5"),
        ("server: [1]", "server", "not [1]"),
        ("model_repository: 5", "model_repository", "not 5; Directory of tenants"),
        ("model_repository: {a: b}", "model_repository", "not {'a': 'b'}"),
    ],
)
def test_a_wrong_value_names_its_path_and_what_is_allowed(tmp_path: Path, text: str, path: str, allowed: str) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"settings.yaml: {path}: ")
    assert allowed in line


def test_a_wrong_value_in_the_environment_names_the_variable(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, "server: {port: 80}", {"LIPSYNC_SERVER__PORT": "eighty"})
    assert line.startswith("LIPSYNC_SERVER__PORT: server.port: ")
    assert "not 'eighty'; allowed is at least 0 and at most 65535" in line
    (line,) = refusal(tmp_path, "server: 5", {"LIPSYNC_SERVER__PORT": "80"})
    assert "server: Input should be a valid dictionary" in line


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path, "server: {port: -1, prot: 5}\naudio: {edge: x}\nloging: {}", {"LIPSYNC_TRITON__SLOTS": "many"}
    )
    starts = ["settings.yaml: server.port", "settings.yaml: server.prot", "settings.yaml: audio.edge"]
    starts += ["settings.yaml: loging", "LIPSYNC_TRITON__SLOTS: triton.slots"]
    assert sorted(line.split(": ")[:2] for line in lines) == sorted(start.split(": ") for start in starts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server: [1", "settings.yaml, line 1: not usable YAML: "),
        ("a: b: c", "settings.yaml, line 1: not usable YAML: "),
        (
            "x: !!python/object:os.system {}",
            "settings.yaml, line 1: not usable YAML: could not determine a constructor",
        ),
        ("x: 2020-13-45", "settings.yaml: not usable YAML: month must be in 1..12"),
        ("a\x00b", "settings.yaml: not usable YAML: "),
        (
            "server: {port: 1}\nserver: {host: a}",
            "settings.yaml, line 2: not usable YAML: the key server is there twice",
        ),
        ("server:\n  port: 1\n  port: 2", "settings.yaml, line 3: not usable YAML: the key port is there twice"),
        ("[" * 5000, "settings.yaml"),
        ("- 1", "settings.yaml: must hold keys and values"),
        ("hello", "settings.yaml: must hold keys and values"),
        ("5: 6", "settings.yaml: 5: "),
        ("? [a, b]\n: c", "settings.yaml"),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    for path, words in (
        (tmp_path / "missing.yaml", "cannot be read: No such file or directory; name a file that is there"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "latin.yaml", "not usable YAML: 'utf-8' codec can't decode"),
    ):
        with pytest.raises(SettingsInvalid) as caught:
            read_settings(None, {"LIPSYNC_CONFIG": str(path)})
        assert caught.value.message.startswith(f"{path}: {words}")
        assert "\n" not in caught.value.message


def test_a_list_may_be_one_text_with_commas(tmp_path: Path) -> None:
    listed = read_settings(write(tmp_path, "triton: {endpoints: [a:1, b:2]}"), {})
    told = read_settings(None, {"LIPSYNC_TRITON__ENDPOINTS": "a:1, b:2", "LIPSYNC_TRITON__GPUS": "0,1"})
    assert listed.triton.endpoints == told.triton.endpoints == ("a:1", "b:2")
    assert told.triton.gpus == (0, 1)
