"""Open tenants: opened once, opened anew when their files were replaced."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compositor.errors import InvalidInput, TenantBroken, TenantNotFound, TenantReplaced
from compositor.manifest import MANIFEST
from compositor.tenant import DESCRIPTORS
from compositor.tenants import Tenants, most_open
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


def test_who_holds_a_replaced_tenant_is_told(models: Path, original: Path) -> None:
    """Its backgrounds are still there, but what the model predicts is another person's."""
    tenants = Tenants(models)
    held, _ = tenants.get("anna")
    tenants.check_current(held)
    shutil.move(models / "anna", models / "away")
    tenants.check_current(held)
    shutil.move(models / "away", models / "anna")
    replace(models, original)
    with pytest.raises(TenantReplaced, match="start again"):
        tenants.check_current(held)
    new, _ = tenants.get("anna")
    tenants.check_current(new)


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


@pytest.fixture
def many(models: Path) -> Path:
    """The tenants t0 to t5, of one size."""
    for number in range(6):
        shutil.copytree(models / "anna", models / f"t{number}")
        manifest = models / f"t{number}" / "1" / MANIFEST
        manifest.write_text(manifest.read_text().replace('"anna"', f'"t{number}"'))
    return models


@pytest.fixture
def counted() -> Iterator[None]:
    """Nothing but the number of references decides when an object ends."""
    gc.disable()
    yield
    gc.enable()


def size_of(models: Path) -> int:
    return Tenants(models).get("t0")[0].open_bytes


def mapped(models: Path) -> set[str]:
    """The tenants of which this process maps a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if str(models) in line}
    return {path.parents[1].name for path in paths}


@pytest.mark.usefixtures("counted")
def test_those_whose_use_is_longest_ago_are_let_go(many: Path) -> None:
    size = size_of(many)
    tenants = Tenants(many, most_bytes=3 * size)
    for name in ("t0", "t1", "t2", "t0", "t3"):
        tenants.get(name)
    assert mapped(many) == {"t0", "t2", "t3"}
    assert (len(tenants), tenants.open_bytes) == (3, 3 * size)


@pytest.mark.usefixtures("counted")
def test_a_tenant_that_is_opened_again_is_not_of_new_files(many: Path, original: Path) -> None:
    """Or Triton would be asked to load it anew each time."""
    tenants = Tenants(many, most=2)
    assert [tenants.get(name)[1] for name in ("t0", "t1", "t2", "t0", "t1", "t2")] == [True] * 3 + [False] * 3
    os.utime(many / "t0" / "1" / MANIFEST, ns=(1, 1))
    assert tenants.get("t0")[1]
    assert len(tenants) == 2


@pytest.mark.usefixtures("counted")
def test_what_is_held_is_found_again_and_never_opened_twice(many: Path) -> None:
    tenants = Tenants(many, most=2)
    held, _ = tenants.get("t0")
    for number in range(1, 6):
        tenants.get(f"t{number}")
    assert tenants.get("t0") == (held, False)
    assert tenants.get("t0")[0] is held
    assert mapped(many) == {"t0", "t5"}, "what is held counts, too"


@pytest.mark.usefixtures("counted")
def test_a_view_keeps_its_file_mapped(many: Path) -> None:
    tenants = Tenants(many, most=2)
    view = tenants.get("t0")[0].crop_planes(1)
    content = view.tobytes()
    shutil.rmtree(many / "t0")
    for number in range(1, 6):
        tenants.get(f"t{number}")
    assert len(tenants) == 2
    assert view.tobytes() == content
    assert mapped(many) > {"t0"}
    del view
    assert mapped(many) == {"t4", "t5"}


@pytest.mark.usefixtures("counted")
def test_one_that_is_larger_than_all_may_be_is_opened_all_the_same(many: Path) -> None:
    tenants = Tenants(many, most_bytes=1)
    for number in range(6):
        assert tenants.get(f"t{number}")[0].frames == 2
        assert len(tenants) == 1


@pytest.mark.usefixtures("counted")
def test_older_files_that_a_session_holds_count(many: Path, original: Path) -> None:
    tenants = Tenants(many, most=3)
    old, _ = tenants.get("anna")
    replace(many, original)
    new, _ = tenants.get("anna")
    assert new is not old
    for number in range(4):
        tenants.get(f"t{number}")
    assert len(tenants) == 3, "the old one and the last two"


def open_below(folder: Path) -> list[Path]:
    """The files in a folder that this process has open; other threads open and close others."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.readlink())
    return [path for path in found if folder in path.parents]


def test_file_descriptors_bound_the_number(many: Path) -> None:
    tenants = Tenants(many)
    tenants.get("t0")
    assert len(open_below(many)) == DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        assert most_open() == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
