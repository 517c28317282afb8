"""A tenant's directory: what opens, what does not and why, and that its views outlive it."""

from __future__ import annotations

import base64
import dataclasses
import gc
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from compositor import jpeg
from compositor.errors import InvalidInput, Status, TenantBroken, TenantNotFound
from compositor.geometry import Box
from compositor.manifest import (
    CROPS,
    CUTS,
    FILES,
    FORMAT,
    INDEX,
    MANIFEST,
    MODEL,
    PATCHES,
    SCANS,
    check_name,
    read_manifest,
    tenant_names,
)
from compositor.tenant import Tenant
from lipsync import architecture
from lipsync.preparation import Choices, Graph, prepare
from lipsync.sources import open_source

from ..conftest import silent, write_small_source

NAME = "anna"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one prepared tenant; tests that damage it take a copy."""
    root = tmp_path_factory.mktemp("tenant")
    source = open_source(write_small_source(root / "source", architecture.do_nothing()))
    graph = Graph(architecture.do_nothing(), ("visual", "audio", "output"), "0" * 64)
    version = root / "models" / NAME / "1"
    version.mkdir(parents=True)
    prepare(version, NAME, source, graph, root, Choices(idle="background"), silent)
    return root / "models"


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "models")
    return tmp_path / "models"


def version(models: Path) -> Path:
    return models / NAME / "1"


def broken(models: Path, *words: str) -> None:
    """The tenant is refused with one line that says what is damaged and how to mend it."""
    with pytest.raises(TenantBroken) as caught:
        Tenant(models, NAME)
    message = caught.value.message
    assert message.startswith("tenant 'anna' is damaged: ")
    assert message.endswith("; remove it and add it again")
    assert "\n" not in message
    assert caught.value.field == "tenant"
    assert caught.value.status is Status.FAILED_PRECONDITION
    for word in words:
        assert word in message


def change_manifest(models: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = version(models) / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def write_array(models: Path, file: str, array: NDArray[Any]) -> None:
    """An array in the place of another, and the manifest made to agree: only its contents are wrong."""
    np.save(version(models) / file, array)
    record_again(models, file)


def record_again(models: Path, file: str) -> None:
    content = (version(models) / file).read_bytes()
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(models, lambda data: data["files"].update({file: record}))


def test_a_sound_tenant_opens(original: Path) -> None:
    tenant = Tenant(original, NAME)
    assert (tenant.name, tenant.frames, tenant.directory) == (NAME, 8, original / NAME / "1")
    assert (tenant.layout.width, tenant.layout.height) == (320, 240)
    tenant.verify()
    for number in range(8):
        frame, rect = tenant.frame(number), tenant.rect(number)
        assert rect == Box(60 + number, 40 + number // 2, 120, 120)
        assert frame.patch == tenant.layout.align(rect)
        assert tenant.background(number).shape == (frame.patch.height, frame.patch.width, 3)
        crop = tenant.crop(number)
        assert crop.shape == (328, 328, 3)
        np.testing.assert_array_equal(crop.transpose(2, 0, 1), tenant.crop_planes(number))
        picture = cv2.imdecode(np.frombuffer(frame.jpeg(), np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert picture.shape == (240, 320, 3)


def test_arrays_are_read_only(original: Path) -> None:
    tenant = Tenant(original, NAME)
    for array in (tenant.crop_planes(0), tenant.background(0)):
        assert not array.flags.writeable
        with pytest.raises(ValueError):
            array.flags.writeable = True
    assert tenant.frame(0).scan.readonly


@pytest.mark.parametrize("number", [-1, 8, 10**9])
def test_frames_out_of_range_are_refused(original: Path, number: int) -> None:
    tenant = Tenant(original, NAME)
    tenant.check_frame(0)
    tenant.check_frame(7)
    with pytest.raises(InvalidInput, match=f"^frame {number} is out of range: 'anna' has frames 0 to 7$"):
        tenant.check_frame(number)


def mapped_resident_kb(folder: Path) -> dict[str, int]:
    """Resident kB of this process's mappings of the files in a folder, by name."""
    found: dict[str, int] = {}
    current = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)", line):
            path = Path(header[1])
            current = path.name if path.parent == folder else ""
        elif current and line.startswith("Rss:"):
            found[current] = found.get(current, 0) + int(line.split()[1])
    return found


def read_bytes() -> int:
    """Bytes that this thread has read through read calls."""
    lines = dict(line.split(": ") for line in Path("/proc/thread-self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_opening_reads_the_index_and_maps_the_rest(models: Path) -> None:
    small = sum((version(models) / file).stat().st_size for file in (MANIFEST, INDEX, CUTS))
    large = sum((version(models) / file).stat().st_size for file in (CROPS, PATCHES, SCANS, MODEL))
    before = read_bytes()
    tenant = Tenant(models, NAME)
    read = read_bytes() - before
    assert read < small + 64_000 < large / 10
    assert mapped_resident_kb(version(models)) == {CROPS: 0, PATCHES: 0, SCANS: 0}
    tenant.crop(3).sum()
    assert mapped_resident_kb(version(models))[CROPS] > 0


def test_views_outlive_the_tenant_and_its_directory(models: Path) -> None:
    tenant = Tenant(models, NAME)
    frame, crop, background = tenant.frame(2), tenant.crop(2), tenant.background(2)
    expected = frame.jpeg(), crop.tobytes(), background.tobytes()
    del tenant
    shutil.rmtree(models)
    gc.collect()
    assert (frame.jpeg(), crop.tobytes(), background.tobytes()) == expected
    assert jpeg.splice(frame, background) == expected[0]
    del frame, crop, background
    gc.collect()
    assert mapped_resident_kb(version(models)) == {}


@pytest.mark.parametrize(
    "name", ["../x", "", "Anna", "a" * 65, "a/b", "a\0b", ".", "..", "anna\n", " anna", "_a", "änna"]
)
def test_names_that_are_none_are_refused(original: Path, name: str) -> None:
    for act in (check_name, lambda name: read_manifest(original, name), lambda name: Tenant(original, name)):
        with pytest.raises(InvalidInput, match="is no tenant name: use 1 to 64 of a-z 0-9 _ -") as caught:
            act(name)
        assert caught.value.field == "tenant"
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "anna-2_b"])
def test_names_that_are_some(name: str) -> None:
    assert check_name(name) == name


def test_a_tenant_that_is_not_there_is_not_found(models: Path) -> None:
    for name in ("nobody", "audio_encoder"):
        with pytest.raises(TenantNotFound, match=f"no tenant named '{name}' is installed") as caught:
            Tenant(models, name)
        assert caught.value.status is Status.NOT_FOUND
    (models / "file").write_text("x")
    with pytest.raises(TenantNotFound):
        Tenant(models, "file")
    shutil.rmtree(models)
    with pytest.raises(TenantNotFound):
        Tenant(models, NAME)


def test_only_tenants_are_listed(models: Path) -> None:
    (models / "audio_encoder" / "1").mkdir(parents=True)
    shutil.copytree(models / NAME, models / "anna.raw")
    shutil.copytree(models / NAME, models / ".staging")
    shutil.copytree(models / NAME, models / "berta")
    (models / "zeta").write_text("x")
    assert tenant_names(models) == ["anna", "berta"]
    assert tenant_names(models / "nowhere") == []


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("fault", ["missing", "short", "long", "empty", "folder"])
def test_a_file_of_another_size_is_refused_by_name(models: Path, file: str, fault: str) -> None:
    path = version(models) / file
    content = path.read_bytes()
    path.unlink()
    if fault == "short":
        path.write_bytes(content[:-1])
    elif fault == "long":
        path.write_bytes(content + b"\0")
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "folder":
        path.mkdir()
    broken(models, file, "cannot be read" if fault == "missing" else "")


@pytest.mark.parametrize("file", sorted(FILES))
def test_verify_finds_a_flipped_byte(models: Path, file: str) -> None:
    tenant = Tenant(models, NAME)
    path = version(models) / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        TenantBroken, match=f"tenant 'anna' is damaged: the checksum of {re.escape(file)} is wrong; remove"
    ):
        tenant.verify()
    path.unlink()
    with pytest.raises(TenantBroken, match=f"{re.escape(file)} cannot be read"):
        tenant.verify()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000, b'{"format": 2}'],
    ids=["empty", "zeros", "brace", "list", "null", "text", "latin", "object", "deep", "bare"],
)
def test_manifest_garbage_is_refused(models: Path, content: bytes) -> None:
    (version(models) / MANIFEST).write_bytes(content)
    broken(models, "manifest.json: ")


def test_a_manifest_cut_short_anywhere_is_refused(models: Path) -> None:
    path = version(models) / MANIFEST
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        broken(models, "manifest.json")


def test_a_manifest_that_is_a_folder_is_refused(models: Path) -> None:
    (version(models) / MANIFEST).unlink()
    (version(models) / MANIFEST).mkdir()
    broken(models, "manifest.json cannot be read (Is a directory)")


def test_another_format_is_told_by_its_number(models: Path) -> None:
    def renew(data: dict[str, Any]) -> None:
        data["format"] = FORMAT + 1
        data["a_new_field"] = {}
        del data["frames"]

    change_manifest(models, renew)
    broken(models, f"manifest.json has format {FORMAT + 1}, but this version reads format {FORMAT}")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tenant", "berta", "belongs to the tenant 'berta'"),
        ("frames", 7, "does not hold 7 crops|does not fit"),
        ("frames", 0, "frames"),
        ("frames", "many", "frames"),
        ("width", -1, "width"),
        ("width", 336, "restart_interval does not divide|does not fit|outside"),
        ("height", 100, "a rectangle is outside of its frame"),
        ("height", 70_000, "height"),
        ("quality", 0, "quality"),
        ("subsampling", "4:1:1", "subsampling"),
        ("subsampling", "4:4:4", "."),
        ("restart_interval", 0, "restart_interval"),
        ("restart_interval", 7, "restart_interval does not divide the width"),
        ("header", "%%%", "header"),
        ("header", base64.b64encode(b"GIF89a").decode(), "header"),
        ("blend", "soft", "blend"),
        ("idle", None, "idle"),
        ("crops", "none", "crops"),
        ("max_batch_size", 0, "max_batch_size"),
        ("extra", 1, "extra"),
        ("files", {}, "files"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(models: Path, key: str, value: object, words: str) -> None:
    change_manifest(models, lambda data: data.update({key: value}))
    broken(models)
    with pytest.raises(TenantBroken, match=words):
        Tenant(models, NAME)


def test_a_manifest_names_its_files_and_no_others(models: Path) -> None:
    change_manifest(models, lambda data: data["files"].pop(CUTS))
    broken(models, "manifest.json: files: ", "cuts.npy is missing or does not belong here")
    record = {"size": 1, "sha256": "0" * 64}
    change_manifest(models, lambda data: data["files"].update({CUTS: record, "../../x": record}))
    broken(models, "../../x is missing or does not belong here")


@pytest.mark.parametrize("file", [INDEX, CUTS])
@pytest.mark.parametrize("fault", ["garbage", "zip", "pickle", "huge", "float", "short", "flat"])
def test_an_array_that_is_another_is_refused(models: Path, file: str, fault: str) -> None:
    path = version(models) / file
    array = np.load(path)
    content = path.read_bytes()
    if fault == "garbage":
        path.write_bytes(b"x" * len(content))
    elif fault == "zip":
        path.write_bytes(b"PK\x03\x04" + content[4:])
    elif fault == "pickle":
        np.save(path, np.array([{}], object), allow_pickle=True)
    elif fault == "huge":
        path.write_bytes(re.sub(rb"'shape': \([^)]*\), }  ", rb"'shape': (99999999999,), }", content, count=1))
    elif fault == "float":
        np.save(path, np.zeros(array.shape, np.float32))
    elif fault == "short":
        np.save(path, array[:-1])
    else:
        np.save(path, array.ravel()[:, None, None])
    record_again(models, file)
    broken(models)


def bad_offset(field: str, frame: int, value: object) -> Callable[[NDArray[np.void]], None]:
    def change(index: NDArray[np.void]) -> None:
        index[field][frame] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bad_offset("scan", 0, (0, 2**63)), "a frame is outside of scans.bin"),
        (bad_offset("scan", 7, (5, 4)), "a frame is outside of scans.bin"),
        (bad_offset("scan", 3, (0, 10)), "a frame is outside of scans.bin"),
        (bad_offset("patch_begin", 7, 2**64 - 1), "a patch is outside of patches.bin"),
        (bad_offset("patch_begin", 1, 1), "a patch is outside of patches.bin"),
        (bad_offset("cuts", 2, (0, 2**32 - 1)), "a frame is outside of cuts.npy"),
        (bad_offset("cuts", 0, (0, 0)), "a frame is outside of cuts.npy"),
        (bad_offset("rect", 4, (-1, 0, 50, 50)), "a rectangle is outside of its frame"),
        (bad_offset("rect", 4, (300, 0, 50, 50)), "a rectangle is outside of its frame"),
        (bad_offset("rect", 4, (2**31 - 1, 0, 2**31 - 1, 50)), "a rectangle is outside of its frame"),
        (bad_offset("rect", 4, (10, 10, 0, 50)), "a rectangle is outside of its frame"),
        (bad_offset("rect", 4, (10, 10, 50, 50)), "a patch does not fit its rectangle"),
        (bad_offset("patch", 4, (0, 0, 320, 240)), "a patch does not fit its rectangle"),
        (bad_offset("patch", 4, (1, 0, 2**31 - 1, 2**31 - 1)), "a patch does not fit its rectangle"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    models: Path, change: Callable[[NDArray[np.void]], None], words: str
) -> None:
    index = np.load(version(models) / INDEX)
    change(index)
    write_array(models, INDEX, index)
    broken(models, words)


@pytest.mark.parametrize(
    ("row", "value"), [(0, (5, 5)), (3, (9, 4)), (5, (0, 2**32 - 1)), (4, (0, 50)), (-1, (1, 2**31))]
)
def test_cuts_that_point_elsewhere_are_refused(models: Path, row: int, value: tuple[int, int]) -> None:
    cuts = np.load(version(models) / CUTS)
    cuts[row] = value
    write_array(models, CUTS, cuts)
    broken(models, "cuts.npy points outside of its frame")


def test_fewer_crops_than_frames_are_refused(models: Path) -> None:
    path = version(models) / CROPS
    path.write_bytes(path.read_bytes()[: -328 * 328 * 3])
    record_again(models, CROPS)
    broken(models, "crops.bin does not hold 8 crops")


def test_prepared_frames_are_plain_values(original: Path) -> None:
    frame = Tenant(original, NAME).frame(1)
    assert dataclasses.is_dataclass(frame)
    assert frame.header.startswith(b"\xff\xd8")
    assert frame.jpeg().endswith(b"\xff\xd9")
