"""Frames as operators hand them in: what is read, in which order, and every fault with its one line."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from compositor.errors import InvalidInput
from lipsync import frames as frames_module
from lipsync.frames import ImageFolder, VideoFile, open_frames

from .conftest import HEIGHT, WIDTH, Array, pictures, write_frames


def refusal(path: Path) -> str:
    """The one line with which reading all of the frames is refused."""
    with pytest.raises(InvalidInput) as caught:
        list(open_frames(path))
    message = caught.value.message
    assert "\n" not in message
    assert "; " in message, "a remedy"
    return message


def image_bytes(picture: Array, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it has that size, with little in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_video(path: Path, frames: list[Array], codec: str = "libx264", **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame, np.uint8), format="bgr24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_frames(tmp_path / "frames", pictures())


def test_a_folder_gives_its_pictures_in_bgr(folder: Path) -> None:
    opened = open_frames(folder)
    assert opened.size == (WIDTH, HEIGHT)
    assert opened.path == folder
    for found, expected in zip(opened, pictures(), strict=True):
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


def test_numbers_are_ordered_as_numbers_and_other_files_left_alone(tmp_path: Path) -> None:
    names = ["frame_10.png", "frame_2.png", "frame_1.png", "take2_frame_1.PNG", "frame_03.jpeg"]
    picture = pictures(1)[0]
    for name in names:
        cv2.imwrite(str(tmp_path / name), picture)
    for other in ("notes.txt", ".hidden.png", "frame_4.png.bak"):
        (tmp_path / other).write_bytes(b"no picture")
    expected = ["frame_1.png", "frame_2.png", "frame_03.jpeg", "frame_10.png", "take2_frame_1.PNG"]
    assert ImageFolder(tmp_path).names == expected
    assert len(list(ImageFolder(tmp_path))) == 5


def test_jpegs_are_read(tmp_path: Path) -> None:
    for found, expected in zip(open_frames(write_frames(tmp_path / "f", pictures(), ".jpg")), pictures(), strict=True):
        assert np.abs(found.astype(int) - expected).mean() < 5


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_other_ways_to_store_8_bits_are_read(tmp_path: Path, mode: str) -> None:
    Image.fromarray(pictures(1)[0][:, :, ::-1]).convert(mode).save(tmp_path / "frame.png")
    expected = np.asarray(Image.open(tmp_path / "frame.png").convert("RGB"))
    (found,) = open_frames(tmp_path)
    np.testing.assert_array_equal(found, expected[:, :, ::-1])


def test_16_bit_colour_is_read_by_its_upper_8(tmp_path: Path) -> None:
    picture = pictures(1)[0]
    cv2.imwrite(str(tmp_path / "frame.png"), picture.astype(np.uint16) * 256 + 77)
    (found,) = open_frames(tmp_path)
    np.testing.assert_array_equal(found, picture)


def test_16_bit_grey_and_cmyk_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "frame.png"), np.full((64, 64), 300, np.uint16))
    assert "its pixels are I;16; export it as RGB with 8 bits a channel" in refusal(tmp_path)
    (tmp_path / "frame.png").unlink()
    Image.new("CMYK", (64, 64)).save(tmp_path / "frame.jpg")
    assert "its pixels are CMYK; export it as RGB" in refusal(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_is_refused(folder: Path, mode: str) -> None:
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 255))
    picture.putpixel((5, 5), (9, 9, 9, 100))
    picture.convert(mode).save(folder / "frame_3.png", transparency=0 if mode == "P" else None)
    assert refusal(folder).endswith("frame_3.png: it has transparent pixels; flatten it onto its background")


def test_pictures_turned_by_exif_are_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        Image.new("RGB", (64, 64)).save(tmp_path / "frame.jpg", exif=exif)
        if orientation == 1:
            assert len(list(open_frames(tmp_path))) == 1
    assert "turned or mirrored by its EXIF orientation; export it upright" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_picture_is_never_half_decoded(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    data = image_bytes(cv2.GaussianBlur(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), (0, 0), 2), kind)
    path = tmp_path / f"frame.{kind.lower()}"
    path.write_bytes(data)
    (whole,) = open_frames(tmp_path)
    accepted = []
    for length in [*range(0, len(data), 11), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:length])
        try:
            (found,) = open_frames(tmp_path)
        except InvalidInput:
            assert refusal(tmp_path).endswith("; export it again")
        else:
            np.testing.assert_array_equal(found, whole)
            accepted.append(length)
    assert all(length > len(data) - 30 for length in accepted), "only what lies behind the pixels may be missing"


def test_a_truncated_picture_among_others_is_named(folder: Path) -> None:
    path = folder / "frame_5.png"
    path.write_bytes(path.read_bytes()[:2000])
    assert refusal(folder).startswith(f"{path}: truncated or damaged (")


def test_a_flipped_byte_in_a_png_is_refused(folder: Path) -> None:
    path = folder / "frame_2.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    assert refusal(folder).startswith(f"{path}: truncated or damaged (")


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_huge_picture_is_refused_by_its_header(folder: Path, number: int, side: int) -> None:
    (folder / f"frame_{number}.png").write_bytes(png(side, side, zlib.compress(bytes(1000))))
    tracemalloc.start()
    try:
        message = refusal(folder)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert f"frame_{number}.png: " in message
    assert "larger than 3840x2160; scale the frames down" in message
    assert peak_bytes < 4 << 20


def test_no_pixel_is_decoded_before_all_headers_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    (folder / "frame_7.png").write_bytes(png(4000, 4000))
    with pytest.raises(InvalidInput, match=r"frame_7\.png: 4000x4000 is larger"):
        open_frames(folder)


def test_the_limits_themselves_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frame.png").write_bytes(png(3840, 2160))
    assert ImageFolder(tmp_path).size == (3840, 2160)
    (tmp_path / "frame.png").write_bytes(png(2160, 3841))
    assert "2160x3841 is larger" in refusal(tmp_path)
    (tmp_path / "frame.png").write_bytes(png(31, 500))
    assert "31x500 is too small for a face" in refusal(tmp_path)
    (tmp_path / "frame.png").unlink()
    write_frames(tmp_path / "f", pictures())
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 8)
    assert len(ImageFolder(tmp_path / "f").names) == 8
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 7)
    assert "more than 7 frames; cut the video" in refusal(tmp_path / "f")


def test_another_size_is_refused(folder: Path) -> None:
    cv2.imwrite(str(folder / "frame_6.png"), pictures(1)[0][:-1])
    expected = f"{folder / 'frame_6.png'}: 320x239, but the first frame has 320x240; use one size"
    assert refusal(folder) == expected


def test_a_picture_that_changes_after_the_check_is_refused(folder: Path) -> None:
    opened = open_frames(folder)
    cv2.imwrite(str(folder / "frame_6.png"), pictures(1)[0][:-1])
    with pytest.raises(InvalidInput, match=r"frame_6\.png: 320x239, but"):
        list(opened)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none yet")
    assert refusal(tmp_path) == f"{tmp_path}: no frames in it; put in frame_0000.png, frame_0001.png, ... or .jpg"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("hello"), "not a PNG or JPEG image"),
        (lambda path: path.write_bytes(b""), "not a PNG or JPEG image"),
        (lambda path: Image.new("RGB", (64, 64)).save(path, "GIF"), "not a PNG or JPEG image"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.symlink_to("nowhere"), "not a file"),
        (os.mkfifo, "not a file"),
    ],
    ids=["text", "empty", "gif", "folder", "dangling", "pipe"],
)
def test_what_is_no_picture_is_refused(folder: Path, make: Callable[[Path], object], words: str) -> None:
    path = folder / "frame_4.png"
    path.unlink()
    make(path)
    assert refusal(folder).startswith(f"{path}: {words}; ")


def test_a_compressed_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    bomb = b"Comment\0\0" + zlib.compress(bytes(64 << 20))
    data = bytearray(png(64, 64))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    data[33:33] = chunk
    (tmp_path / "frame.png").write_bytes(data)
    assert "frame.png: " in refusal(tmp_path)


def test_an_abandoned_folder_leaves_no_thread(folder: Path) -> None:
    before = set(threading.enumerate())
    reading = iter(open_frames(folder))
    next(reading)
    # Others' threads may begin and end meanwhile.
    own = {each for each in threading.enumerate() if each.name.startswith("ThreadPoolExecutor-")} - before
    assert own
    del reading
    assert not any(thread.is_alive() for thread in own)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".MOV", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx")],
)
def test_a_video_gives_its_frames(tmp_path: Path, suffix: str, codec: str) -> None:
    opened = open_frames(write_video(tmp_path / f"a:b{suffix}", pictures(), codec))
    assert opened.size == (WIDTH, HEIGHT)
    assert opened.names == [str(number) for number in range(8)]
    for found, expected in zip(opened, pictures(), strict=True):
        assert np.abs(found.astype(int) - expected).mean() < 8


def test_a_damaged_video_is_refused_and_nothing_concealed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(20))
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 1500
    for position in range(begin, begin + 200):
        data[position] ^= 0x5A
    path.write_bytes(data)
    assert refusal(path).startswith(f"{path}: ")
    assert "damaged" in refusal(path)


def test_a_video_turned_by_its_metadata_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(path.read_bytes().replace(upright, turned))
    assert refusal(path) == f"{path}: turned by its metadata; convert it upright"


def test_a_truncated_video_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(20))
    path.write_bytes(path.read_bytes()[:-500])
    assert refusal(path).startswith(f"{path}: not a readable video (")


def test_a_video_that_holds_fewer_frames_than_packets_shows_in_its_names(tmp_path: Path) -> None:
    """Cut short behind its header: preparation compares the two counts."""
    path = write_video(tmp_path / "a.mp4", pictures(20), movflags="faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    opened = VideoFile(path)
    readable = 0
    with contextlib.suppress(InvalidInput):
        for _ in opened:
            readable += 1
    assert readable < len(opened.names) < 20


@pytest.mark.parametrize(
    "content",
    [b"", b"just text\n", b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", b"ffconcat version 1.0\nfile other.mp4\n"],
    ids=["empty", "text", "playlist", "concat"],
)
def test_a_text_file_called_mp4_is_refused_and_opens_nothing_else(tmp_path: Path, content: bytes) -> None:
    write_video(tmp_path / "other.mp4", pictures())
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert refusal(path) == (
        f"{path}: not a readable video (Invalid data found when processing input); convert it to MP4"
    )


def test_a_video_of_sound_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
    assert refusal(path) == f"{path}: not a readable video (it has no picture stream); convert it to MP4"


def test_long_videos_are_not_counted_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(20))
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 5)
    assert refusal(path) == f"{path}: more than 5 frames; cut the video"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "frames.zip"
    path.write_bytes(b"PK")
    assert refusal(path).startswith(f"{path}: neither a folder of images nor a video; give a folder, or .avi, ")
