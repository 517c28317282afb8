"""A prepared tenant against the plain way: whole frames encoded, mouths pasted as FIELD.md pastes them."""

from __future__ import annotations

import base64
import errno
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import onnx
import pytest

from compositor import jpeg
from compositor.blending import Blend, Pixels, paste, split_planes
from compositor.errors import InvalidInput
from compositor.geometry import Box, Subsampling
from compositor.jpeg import Encoding, LibraryMissing
from compositor.manifest import FILES, MANIFEST, Manifest
from compositor.rendering import Output, render
from compositor.tenant import Tenant
from lipsync import architecture, preparation
from lipsync.preparation import Choices, prepare
from lipsync.sources import Source, open_source

from .conftest import Array, as_graph, boxes, install_encoder, negative, pictures, run, silent, write_source

MOUTH = np.random.default_rng(3).integers(0, 256, (328, 328, 3), dtype=np.uint8)
EVERY_SUBSAMPLING = list(Subsampling)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(write_source(tmp_path_factory.mktemp("preparation") / "source"))


def prepared(folder: Path, source: Source, model: onnx.ModelProto | None = None, **choices: Any) -> Tenant:
    """The tenant `anna`, prepared without any check of its model."""
    encoder = folder / "audio_encoder" / "1" / "model.onnx"
    if not encoder.exists():
        install_encoder(folder)
    version = folder / "anna" / "1"
    version.mkdir(parents=True)
    prepare(version, "anna", source, as_graph(model or negative()), encoder, Choices(**choices), silent)
    return Tenant(folder, "anna")


def reference_crop(frame: Array, rect: Box) -> Array:
    face = frame[rect.y : rect.bottom, rect.x : rect.right]
    crop: Array = cv2.resize(face, (328, 328), interpolation=cv2.INTER_CUBIC)
    return crop


def reference_paste(frame: Array, crop: Array, rect: Box) -> Array:
    """FIELD.md: resize 328 -> (w, h) INTER_CUBIC, overwrite the rectangle."""
    out: Array = frame.copy()
    resized = cv2.resize(crop, (rect.width, rect.height), interpolation=cv2.INTER_CUBIC)
    out[rect.y : rect.bottom, rect.x : rect.right] = resized
    return out


def negative_mouth(crop: Array) -> Pixels:
    """What `negative` predicts, set into the crop: times 255, truncated; what float32 lacks to a whole level counts."""
    mouth: Pixels = crop.astype(np.uint8)
    roi = crop[4:324, 4:324].astype(np.float32) / np.float32(255)
    mouth[4:324, 4:324] = ((1 - roi) * 255 + 1e-4).astype(np.uint8)
    return mouth


def scan_of(data: bytes) -> bytes:
    return bytes(jpeg.split(data)[1])


def whole_encode(tenant: Tenant, frame: Pixels) -> bytes:
    """The full encode of a frame with the tenant's encoding, its header marked synthetic."""
    header, scan, interval = jpeg.split(jpeg.encode(frame, tenant.encoding))
    assert interval == tenant.encoding.restart_interval
    return jpeg.mark_synthetic(header) + bytes(scan) + jpeg.EOI


@pytest.mark.parametrize("subsampling", EVERY_SUBSAMPLING)
def test_background_frames_are_the_full_encode_of_the_source(
    tmp_path: Path, shared: Source, subsampling: Subsampling
) -> None:
    tenant = prepared(tmp_path, shared, idle="background", subsampling=subsampling, quality=60)
    assert tenant.encoding == Encoding(60, subsampling, tenant.manifest.restart_interval)
    for number, picture in enumerate(pictures()):
        data = tenant.frame(number).jpeg()
        assert data == whole_encode(tenant, picture)
        plain = jpeg.encode(picture, replace(tenant.encoding, restart_interval=0))
        np.testing.assert_array_equal(jpeg.decode(data), jpeg.decode(plain))
        other = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)).astype(int)
        assert np.abs(other - jpeg.decode(data)).mean() < 1, "another decoder reads it, too"


@pytest.mark.parametrize("blend", ["hard", "feather"])
def test_rendered_frames_hold_the_mouth_for_silence(tmp_path: Path, shared: Source, blend: Blend) -> None:
    tenant = prepared(tmp_path, shared, blend=blend)
    for number, (picture, rect) in enumerate(zip(pictures(), boxes(), strict=True)):
        mouth = negative_mouth(reference_crop(picture, rect))
        composed = paste(picture, mouth, rect, blend)
        if blend == "hard":
            np.testing.assert_array_equal(composed, reference_paste(picture, mouth, rect))
        assert tenant.frame(number).jpeg() == whole_encode(tenant, composed)


def test_idle_mouths_hear_what_the_encoder_makes_of_silence(tmp_path: Path, shared: Source) -> None:
    """Digital silence is -4 in the mel, which this encoder passes on; this model adds a 16th of it to the picture."""
    model = architecture.do_nothing()
    for tensor in model.graph.initializer:
        if tensor.name == "nothing":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(1 / 16, np.float32), "nothing"))
    tenant = prepared(tmp_path, shared, model, blend="hard")
    for number, (picture, rect) in enumerate(zip(pictures(), boxes(), strict=True)):
        mouth = reference_crop(picture, rect).astype(np.uint8)
        prediction = mouth[4:324, 4:324].astype(np.float32) / np.float32(255) - np.float32(0.25)
        mouth[4:324, 4:324] = np.clip(prediction * 255, 0, 255).astype(np.uint8)
        assert tenant.frame(number).jpeg() == whole_encode(tenant, paste(picture, mouth, rect, "hard"))


def test_crops_and_patches_are_the_sources_pixels(tmp_path: Path, shared: Source) -> None:
    tenant = prepared(tmp_path, shared)
    for number, (picture, rect) in enumerate(zip(pictures(), boxes(), strict=True)):
        assert tenant.rect(number) == rect
        np.testing.assert_array_equal(tenant.crop(number), reference_crop(picture, rect))
        patch = tenant.frame(number).patch
        pixels = picture[patch.y : patch.bottom, patch.x : patch.right]
        np.testing.assert_array_equal(tenant.background(number), pixels)


@pytest.mark.parametrize("subsampling", EVERY_SUBSAMPLING)
@pytest.mark.parametrize("idle", ["rendered", "background"])
@pytest.mark.parametrize("blend", ["hard", "feather"])
def test_a_rendered_frame_is_the_full_encode_of_the_composited_one(
    tmp_path: Path, shared: Source, blend: Blend, idle: Literal["rendered", "background"], subsampling: Subsampling
) -> None:
    tenant = prepared(tmp_path, shared, blend=blend, idle=idle, subsampling=subsampling)
    for number in (0, 5, 7):
        picture, rect = pictures()[number], boxes()[number]
        data = render(tenant, number, split_planes(MOUTH), Output()).data
        assert data == whole_encode(tenant, paste(picture, MOUTH, rect, blend))


def test_hard_is_the_reference_paste(tmp_path: Path, shared: Source) -> None:
    tenant = prepared(tmp_path, shared, blend="hard", idle="background")
    smooth = cv2.GaussianBlur(MOUTH, (0, 0), 5).astype(np.uint8)
    for number, (picture, rect) in enumerate(zip(pictures(), boxes(), strict=True)):
        raw = np.frombuffer(render(tenant, number, split_planes(smooth), Output(raw=True)).data, np.uint8).reshape(
            240, 320, 3
        )
        expected = reference_paste(picture, smooth, rect)
        # Around the patch a raw frame is the decoded background; the paste itself has met no JPEG.
        patch = tenant.frame(number).patch
        area = (slice(patch.y, patch.bottom), slice(patch.x, patch.right))
        error = np.mean((raw[area].astype(float) - expected[area]) ** 2)
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 45


def test_the_restart_interval_suits_all_rectangles(tmp_path: Path, shared: Source) -> None:
    tenant = prepared(tmp_path, shared, idle="background")
    assert 20 % tenant.manifest.restart_interval == 0
    assert tenant.manifest.restart_interval == jpeg.restart_interval_for(320, Subsampling.S420, boxes())


def test_the_manifest_says_what_was_chosen(tmp_path: Path, shared: Source) -> None:
    choices: dict[str, Any] = {
        "quality": 66,
        "subsampling": Subsampling.S444,
        "blend": "hard",
        "idle": "background",
        "crops": "sent",
        "encoder": "other",
        "fps": 30,
        "max_batch_size": 7,
    }
    manifest = prepared(tmp_path, shared, **choices).manifest
    assert {key: getattr(manifest, key) for key in choices} == choices
    assert (manifest.tenant, manifest.frames, manifest.width, manifest.height) == ("anna", 8, 320, 240)
    assert manifest.model_sha256 == as_graph(negative()).sha256
    version = tmp_path / "anna" / "1"
    assert {path.name for path in version.iterdir()} == {*FILES, MANIFEST}
    assert {file: record.size for file, record in manifest.files.items()} == {
        file: (version / file).stat().st_size for file in FILES
    }
    assert base64.b64decode(manifest.header).count(b"compositeWithTrainedAlgorithmicMedia") == 1
    assert Manifest.model_validate_json((version / MANIFEST).read_bytes()) == manifest
    Tenant(tmp_path, "anna").verify()


def test_crops_are_resident_up_to_a_length(tmp_path: Path, shared: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    for longest, expected in ((8, "resident"), (7, "sent")):
        monkeypatch.setattr(preparation, "RESIDENT_FRAMES", longest)
        tenant = prepared(tmp_path / expected, shared, idle="background")
        assert tenant.manifest.crops == expected
        model = onnx.load(tenant.directory / "model.onnx", load_external_data=False)
        assert model.graph.input[0].name == {"resident": "frame_index", "sent": "crop"}[expected]
    assert prepared(tmp_path / "asked", shared, idle="background", crops="resident").manifest.crops == "resident"


def test_the_installed_model_finds_its_crops(tmp_path: Path, shared: Source) -> None:
    tenant = prepared(tmp_path, shared)
    audio = np.zeros((2, 32, 16, 16), np.float32)
    mouths, finite = run(
        tenant.directory / "model.onnx", {"frame_index": np.array([[6], [1]], np.int32), "audio": audio}
    )
    assert finite.all()
    for mouth, number in zip(mouths, (6, 1), strict=True):
        np.testing.assert_array_equal(mouth.transpose(1, 2, 0), negative_mouth(tenant.crop(number)))


def test_progress_is_told_stage_by_stage(tmp_path: Path, shared: Source) -> None:
    told: list[tuple[str, int, int]] = []
    encoder = install_encoder(tmp_path)
    prepare(tmp_path, "anna", shared, as_graph(negative()), encoder, Choices(), lambda *step: told.append(step))
    assert told == [*(("frames", number, 8) for number in range(1, 9)), ("model", 0, 1), ("model", 1, 1)]


@pytest.mark.parametrize("readable", [7, 9])
def test_a_source_that_gives_another_number_of_frames_is_refused(tmp_path: Path, shared: Source, readable: int) -> None:
    class Odd:
        path, names, size = Path("clip.mp4"), shared.frames.names, shared.frames.size

        def __iter__(self) -> Iterator[Pixels]:
            return iter(pictures(readable))

    expected = f"clip.mp4: {readable} frames could be read of 8; export or convert it again"
    with pytest.raises(InvalidInput, match=re.escape(expected)):
        prepared(tmp_path, replace(shared, frames=Odd()), idle="background")


def test_a_model_that_predicts_nan_for_silence_is_refused(tmp_path: Path, shared: Source) -> None:
    model = negative()
    for tensor in model.graph.initializer:
        if tensor.name == "one":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(np.nan), "one"))
    with pytest.raises(InvalidInput, match="predicts NaN or infinity for silence; export the trained weights again"):
        prepared(tmp_path, shared, model)


def test_a_model_that_fails_on_silence_is_refused(tmp_path: Path, shared: Source) -> None:
    model = negative()
    for tensor in model.graph.initializer:
        if tensor.name == "begin":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([2]), "begin"))
    with pytest.raises(
        InvalidInput, match=r"the model fails on silence \(.*\); check the export, or use --idle background"
    ):
        prepared(tmp_path, shared, model)


@pytest.mark.parametrize("content", ["missing", "garbage", "model"])
def test_an_encoder_that_does_not_work_is_refused_with_the_command(
    tmp_path: Path, shared: Source, content: str
) -> None:
    encoder = install_encoder(tmp_path, architecture.do_nothing() if content == "model" else None)
    if content == "missing":
        encoder.unlink()
    if content == "garbage":
        encoder.write_bytes(b"hello")
    with pytest.raises(InvalidInput, match=r"run `lipsync encoder add`|with `lipsync encoder add --replace`") as caught:
        prepare(tmp_path, "anna", shared, as_graph(negative()), encoder, Choices(), silent)
    assert str(encoder) in caught.value.message
    assert "\n" not in caught.value.message
    # Idle frames that are the background need none.
    prepare(tmp_path, "anna", shared, as_graph(negative()), encoder, Choices(idle="background"), silent)


def test_a_library_that_writes_no_restart_markers_is_refused(
    tmp_path: Path, shared: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = jpeg.encode
    monkeypatch.setattr(jpeg, "encode", lambda image, how: encode(image, replace(how, restart_interval=0)))
    with pytest.raises(LibraryMissing, match="writes no restart markers"):
        prepared(tmp_path, shared, idle="background")


def test_a_full_disk_keeps_its_number_half_way_through_an_array(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            preparation._save(tmp_path / "index.npy", np.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
