"""What the files say of models: memory as measured, whose they are, and that other files are noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from compositor.catalogue import CONFIG, MEMORY_PARAMETER, Catalogue, memory_of
from compositor.manifest import MANIFEST, MODEL
from compositor.residency.models import Facts
from lipsync.model_config import encoder_config, raw_config, tenant_config


def write(repository: Path, name: str, config: str, *, manifest: bool = False) -> Path:
    """A model's directory; another one where it is there already."""
    folder = repository / name
    if folder.exists():
        folder.rename(repository / f"{len(list(repository.iterdir()))}.old")
    (folder / "1").mkdir(parents=True)
    (folder / CONFIG).write_text(config)
    (folder / "1" / MODEL).write_bytes(b"graph")
    if manifest:
        (folder / "1" / MANIFEST).write_text("{}")
    return folder


def facts(bytes_: int, evictable: bool, found: Facts) -> bool:
    return (found.bytes, found.evictable) == (bytes_, evictable) and found.stamp is not None


@given(st.integers(1, 10**15 - 1))
def test_memory_is_read_as_it_was_written(size: int) -> None:
    for config in (
        tenant_config("anna", "resident", 4, "auto", 1, measured_bytes=size),
        raw_config("anna.raw", 4, "cpu", 1, size),
        encoder_config("audio_encoder", measured_bytes=size),
    ):
        assert memory_of(config) == size
        parsed = text_format.Parse(config, model_config_pb2.ModelConfig())
        assert parsed.parameters[MEMORY_PARAMETER].string_value == str(size)


@pytest.mark.parametrize(
    "config",
    [
        "",
        tenant_config("anna", "sent", 4, "auto", 1),
        f'# parameters {{ key: "{MEMORY_PARAMETER}" value {{ string_value: "5" }} }}',
        f'parameters {{ key: "{MEMORY_PARAMETER}" value {{ string_value: "-5" }} }}',
        f'parameters {{ key: "{MEMORY_PARAMETER}" value {{ string_value: "{10**15}" }} }}',
        f'parameters {{ key: "x{MEMORY_PARAMETER}" value {{ string_value: "5" }} }}',
    ],
)
def test_memory_that_is_not_said_is_unknown(config: str) -> None:
    assert memory_of(config) == 0


def test_a_parameter_spread_over_lines_is_read() -> None:
    assert memory_of(f'parameters {{\n  key: "{MEMORY_PARAMETER}"\n  value: {{ string_value: "7" }}\n}}') == 7


def test_tenants_and_their_raw_graphs_may_be_unloaded(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    write(tmp_path, "anna", tenant_config("anna", "resident", 4, "auto", 1, measured_bytes=11), manifest=True)
    write(tmp_path, "anna.raw", raw_config("anna.raw", 4, "auto", 1, 12))
    write(tmp_path, "audio_encoder", encoder_config("audio_encoder", measured_bytes=13))
    write(tmp_path, "old_encoder", encoder_config("old_encoder"))
    assert facts(11, True, catalogue.facts("anna"))
    assert facts(12, True, catalogue.facts("anna.raw"))
    assert facts(13, False, catalogue.facts("audio_encoder"))
    assert facts(0, False, catalogue.facts("old_encoder"))


def test_a_tenants_encoder_is_known(repository: Path, tmp_path: Path) -> None:
    assert Catalogue(repository).facts("plain").encoder == "audio_encoder"
    assert Catalogue(repository).facts("audio_encoder").encoder == ""
    write(tmp_path, "damaged", raw_config("damaged", 4, "auto", 1, 11), manifest=True)
    assert Catalogue(tmp_path).facts("damaged").encoder == ""


def test_facts_are_of_the_files_as_they_are_now(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    assert catalogue.facts("anna") == Facts(0, False, None)
    folder = write(tmp_path, "anna", raw_config("anna", 4, "auto", 1, 11), manifest=True)
    first = catalogue.facts("anna")
    assert catalogue.facts("anna") is first, "and cost no more than a look"
    os.utime(folder / "1" / MODEL, ns=(1, 1))
    touched = catalogue.facts("anna")
    assert touched.stamp not in (None, first.stamp)
    write(tmp_path, "anna", raw_config("anna", 4, "auto", 1, 12), manifest=True)
    replaced = catalogue.facts("anna")
    assert facts(12, True, replaced)
    assert replaced.stamp not in (first.stamp, touched.stamp)


def test_what_is_gone_keeps_its_facts_but_has_no_stamp(tmp_path: Path) -> None:
    """It may be loaded still."""
    catalogue = Catalogue(tmp_path)
    folder = write(tmp_path, "anna", raw_config("anna", 4, "auto", 1, 11), manifest=True)
    before = catalogue.facts("anna")
    folder.rename(tmp_path / "away")
    assert catalogue.facts("anna") == Facts(11, True, None, gone=True)
    (tmp_path / "away").rename(folder)
    assert catalogue.facts("anna") == before


def test_a_repository_that_is_not_there_took_no_model_away(tmp_path: Path) -> None:
    """Where a disk was unmounted, all that is loaded serves on."""
    repository = tmp_path / "repository"
    catalogue = Catalogue(repository)
    write(repository, "anna", raw_config("anna", 4, "auto", 1, 11), manifest=True)
    assert catalogue.facts("anna").stamp is not None
    repository.rename(tmp_path / "away")
    assert catalogue.facts("anna") == Facts(11, True, None)
    repository.mkdir()
    assert catalogue.facts("anna") == Facts(11, True, None)


@pytest.mark.parametrize("name", ["", ".raw", "../anna", "anna/1", "Anna", "a\0", "anna.raw.raw", "loop"])
def test_names_of_others_are_not_looked_for(tmp_path: Path, name: str) -> None:
    write(tmp_path, "anna", raw_config("anna", 4, "auto", 1, 11), manifest=True)
    (tmp_path / "loop").symlink_to("loop")
    assert Catalogue(tmp_path / "anna").facts(name) == Facts(0, False, None)
    assert Catalogue(tmp_path).facts(name) == Facts(0, False, None)
