"""What is listed of tenants: what their files say, as `read_manifest` reads them, and what Triton says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as wire
from hypothesis import given
from hypothesis import strategies as st

from compositor.catalogue import CONFIG, Catalogue
from compositor.manifest import FORMAT, MANIFEST, Manifest, read_manifest
from compositor.settings import TritonSettings
from lipsync import tenant_list
from lipsync.sources import open_source
from lipsync.tenant_list import Entry, list_tenants, read_entries
from lipsync.tritonserver import EmbeddedTriton

from .conftest import add, install_encoder, write_source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an encoder and the tenant anna."""
    root = tmp_path_factory.mktemp("list")
    install_encoder(root / "models")
    add(root / "models", open_source(write_source(root / "source")))
    return root / "models"


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "models"))


def copy(models: Path, name: str) -> Path:
    """The tenant anna again under another name; its manifest."""
    for suffix in ("", ".raw"):
        shutil.copytree(models / f"anna{suffix}", models / f"{name}{suffix}")
        config = models / f"{name}{suffix}" / CONFIG
        config.write_text(config.read_text().replace('"anna', f'"{name}'))
    manifest = models / name / "1" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"anna"', f'"{name}"'))
    return manifest


def test_entries_say_what_manifests_and_configs_do(models: Path) -> None:
    copy(models, "berta")
    entries = read_entries(models)
    assert [entry.tenant for entry in entries] == ["anna", "berta"]
    for entry in entries:
        manifest = read_manifest(models, entry.tenant)
        memory = Catalogue(models).facts(entry.tenant).bytes
        assert memory > 1e7
        assert entry == Entry(
            entry.tenant, manifest.frames, manifest.width, manifest.height, manifest.fps, manifest.encoder,
            manifest.created, memory,
        )  # fmt: skip


def test_manifests_as_they_are_written_are_not_read_slowly(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Manifest:
        raise AssertionError

    monkeypatch.setattr(tenant_list, "read_manifest", refuse)
    assert [entry.fault for entry in read_entries(models)] == [""]


def test_manifests_that_look_otherwise_are_read_all_the_same(models: Path) -> None:
    expected = read_entries(models)
    manifest = models / "anna" / "1" / MANIFEST
    fields = json.loads(manifest.read_text())
    for text in (json.dumps(fields), json.dumps(dict(reversed(fields.items()))), json.dumps(fields, indent=8)):
        manifest.write_text(text)
        assert read_entries(models) == expected


@given(st.text(max_size=30), st.integers(1, 10**6))
def test_whatever_a_manifest_holds_is_read_as_it_is_meant(text: str, number: int) -> None:
    """Names with quotes, braces and escapes, too: a pattern must not be taken in."""
    fields = {
        "format": FORMAT, "tenant": text, "created": text, "frames": number, "width": number, "height": number,
        "fps": number, "quality": 75, "header": text, "encoder": text, "files": {},
    }  # fmt: skip
    found = tenant_list.FIELDS.match(json.dumps(fields, indent=2))
    if found:
        values = [text, text, *[str(number)] * 4, text]
        assert list(found.groups()) == values


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("garbage", "manifest.json: Invalid JSON"),
        ("", "manifest.json: Invalid JSON"),
        ('{"format": 1}', "has format 1"),
        ('{"format": 2}', "Field required"),
    ],
)
def test_damage_is_told(models: Path, content: str, fault: str) -> None:
    manifest = copy(models, "berta")
    manifest.write_text(content)
    sound, damaged = read_entries(models)
    assert sound.fault == ""
    assert fault in damaged.fault
    assert dataclasses.replace(damaged, fault="") == Entry("berta")


def test_a_manifest_of_another_tenant_is_damage(models: Path) -> None:
    shutil.copytree(models / "anna", models / "berta")
    assert "belongs to the tenant 'anna'" in read_entries(models)[1].fault


def test_what_is_no_tenant_is_not_listed(models: Path, tmp_path: Path) -> None:
    (models / "file").write_text("")
    (models / "empty").mkdir()
    (models / ".staging").mkdir()
    assert [entry.tenant for entry in read_entries(models)] == ["anna"]
    assert read_entries(tmp_path / "nowhere") == []


def test_a_tenant_without_config_takes_an_unknown_size(models: Path) -> None:
    (models / "anna" / CONFIG).unlink()
    assert read_entries(models)[0].memory_bytes == 0


def test_tritons_say_what_is_loaded_where_and_how_it_is_used(models: Path, triton_home: Path) -> None:
    copy(models, "berta")
    begun_s = time.time()
    with EmbeddedTriton(models) as first, EmbeddedTriton(models) as second:
        for server, names in ((first, ["anna"]), (second, ["anna", "anna.raw"])):
            with wire.InferenceServerClient(server.grpc) as client:
                for name in names:
                    client.load_model(name)
        with wire.InferenceServerClient(first.grpc) as client:
            inputs = [
                wire.InferInput("frame_index", [3, 1], "INT32"),
                wire.InferInput("audio", [3, 32, 16, 16], "FP32"),
            ]
            inputs[0].set_data_from_numpy(np.zeros((3, 1), np.int32))
            inputs[1].set_data_from_numpy(np.zeros((3, 32, 16, 16), np.float32))
            client.infer("anna", inputs)
        tritons = TritonSettings(endpoints=(first.grpc, second.grpc))
        # Triton counts a request only after it was answered.
        give_up_s = time.monotonic() + 60
        while not (listed := list_tenants(models, tritons))[0][0].copies[0].uses:
            assert time.monotonic() < give_up_s
    (anna, berta), silent = listed
    assert silent == {}
    assert berta.copies == []
    used, idle = anna.copies
    assert (used.triton, used.state, used.device, used.uses) == (first.grpc, "ready", "cpu", 3)
    assert begun_s - 1 <= used.last_use_s <= time.time() + 1
    assert (idle.triton, idle.state, idle.device, idle.uses, idle.last_use_s) == (second.grpc, "ready", "cpu", 0, 0)


def test_tritons_that_do_not_answer_are_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there, and one that accepts and says nothing."""
    monkeypatch.setattr(tenant_list, "PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        addresses = tuple(f"127.0.0.1:{each.getsockname()[1]}" for each in (free, silent))
        entries, unanswered = list_tenants(models, TritonSettings(endpoints=addresses))
    assert unanswered == dict.fromkeys(addresses, "it does not answer")
    assert [entry.copies for entry in entries] == [[]]
