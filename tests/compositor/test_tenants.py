"""Open tenants: opened once, opened anew when their files were replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from compositor.errors import InvalidInput, TenantBroken, TenantNotFound
from compositor.tenant import MANIFEST
from compositor.tenants import Tenants
from lipsync import architecture
from lipsync.preparation import Choices, Graph, prepare
from lipsync.sources import open_source

from ..conftest import silent, write_small_source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tenants")
    graph = Graph(architecture.do_nothing(), ("visual", "audio", "output"), "0" * 64)
    for seed, name in enumerate(("first", "second")):
        source = open_source(write_small_source(root / name, architecture.do_nothing(), frames=2 + seed, seed=seed))
        (root / f"{name}.prepared").mkdir()
        prepare(root / f"{name}.prepared", "anna", source, graph, root, Choices(idle="background"), silent)
    return root


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "first.prepared", tmp_path / "anna" / "1")
    return tmp_path


def replace(models: Path, original: Path) -> None:
    """As removing and adding does: another directory in the same place."""
    shutil.copytree(original / "second.prepared", models / "new" / "1")
    (models / "anna").rename(models / "old")
    (models / "new").rename(models / "anna")


def test_a_tenant_is_opened_once(models: Path) -> None:
    tenants = Tenants(models)
    first, new = tenants.get("anna")
    again, newer = tenants.get("anna")
    assert (new, newer) == (True, False)
    assert again is first
    assert first.frames == 2


def test_replaced_files_are_noticed(models: Path, original: Path) -> None:
    tenants = Tenants(models)
    before, _ = tenants.get("anna")
    content = before.crop(1).tobytes()
    replace(models, original)
    shutil.rmtree(models / "old")
    after, new = tenants.get("anna")
    assert new
    assert after.frames == 3
    assert before.crop(1).tobytes() == content, "a frame under way still has its files"
    assert tenants.get("anna") == (after, False)


def test_a_touched_manifest_is_noticed(models: Path) -> None:
    """The same inode at another time: a file system may give a new file the old one's number."""
    tenants = Tenants(models)
    tenants.get("anna")
    os.utime(models / "anna" / "1" / MANIFEST, ns=(1, 1))
    assert tenants.get("anna")[1]


def test_a_removed_tenant_is_not_found(models: Path, original: Path) -> None:
    tenants = Tenants(models)
    tenants.get("anna")
    shutil.rmtree(models / "anna")
    with pytest.raises(TenantNotFound, match="no tenant named 'anna' is installed"):
        tenants.get("anna")
    shutil.copytree(original / "first.prepared", models / "anna" / "1")
    assert tenants.get("anna")[1], "and found again when it is back"


def test_a_tenant_that_breaks_is_refused_until_it_is_mended(models: Path, original: Path) -> None:
    tenants = Tenants(models)
    tenants.get("anna")
    manifest = models / "anna" / "1" / MANIFEST
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.write_text("garbage")
    for _ in range(2):
        with pytest.raises(TenantBroken):
            tenants.get("anna")
    manifest.write_bytes(content)
    tenant, new = tenants.get("anna")
    assert new
    assert tenant.frames == 2


def test_others_go_on(models: Path) -> None:
    tenants = Tenants(models)
    tenant, _ = tenants.get("anna")
    for name, error in (
        ("nobody", TenantNotFound),
        ("../anna", InvalidInput),
        ("a\0", InvalidInput),
        ("", InvalidInput),
    ):
        with pytest.raises(error):
            tenants.get(name)
    assert tenants.get("anna") == (tenant, False)


def test_a_path_that_cannot_be_looked_at_is_broken(models: Path) -> None:
    (models / "loop").symlink_to("loop")
    with pytest.raises(TenantBroken, match="cannot be read"):
        Tenants(models).get("loop")
