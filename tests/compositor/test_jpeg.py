from __future__ import annotations

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor import jpeg
from compositor.errors import InvalidInput
from compositor.geometry import Box, Subsampling
from compositor.jpeg import Encoding, Layout, PreparedFrame

from ..integration.waiting import until


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth shapes with some noise: entropy-coded data with long and short codes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / rng.uniform(3, 60) + y / rng.uniform(3, 60) + rng.uniform(0, 6)) for _ in range(3)]
    noise = rng.normal(0, rng.uniform(0, 20), (height, width, 3))
    return np.clip(np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


def prepare(image: NDArray[np.uint8], box: Box, encoding: Encoding) -> PreparedFrame:
    layout = Layout(image.shape[1], image.shape[0], encoding)
    header, scan, _ = jpeg.split(jpeg.encode(image, encoding))
    patch = layout.align(box)
    return PreparedFrame(header, scan, layout, patch, jpeg.cuts(scan, layout, patch))


def changed(image: NDArray[np.uint8], patch: Box, seed: int) -> NDArray[np.uint8]:
    out: NDArray[np.uint8] = image.copy()
    out[patch.y : patch.bottom, patch.x : patch.right] = picture(patch.width, patch.height, seed)
    return out


def cut(image: NDArray[np.uint8], patch: Box) -> NDArray[np.uint8]:
    return image[patch.y : patch.bottom, patch.x : patch.right]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, Box, int, Subsampling, int]:
    width, height = draw(st.integers(48, 420)), draw(st.integers(16, 260))
    x, y = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    box = Box(x, y, draw(st.integers(4, width - x)), draw(st.integers(4, height - y)))
    return width, height, box, draw(st.integers(1, 100)), draw(st.sampled_from(Subsampling)), draw(st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_splice_is_byte_identical_to_the_full_encode(case: tuple[int, int, Box, int, Subsampling, int]) -> None:
    width, height, box, quality, subsampling, seed = case
    encoding = Encoding(quality, subsampling, jpeg.restart_interval_for(width, subsampling, [box]))
    image = picture(width, height, seed)
    frame = prepare(image, box, encoding)
    after = changed(image, frame.patch, seed + 1)
    assert jpeg.splice(frame, cut(after, frame.patch)) == jpeg.encode(after, encoding)


def trustworthy(patch: Box, width: int, height: int, subsampling: Subsampling) -> tuple[slice, slice]:
    """The part of a patch, rows and columns, whose chroma is not interpolated across an edge inside the frame."""
    across = int(subsampling is not Subsampling.S444)
    down = int(subsampling is Subsampling.S420)
    rows = slice(down * (patch.y > 0), patch.height - down * (patch.bottom < height))
    return rows, slice(across * (patch.x > 0), patch.width - across * (patch.right < width))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_prepared_patch_decodes_to_the_pixels_under_it(
    case: tuple[int, int, Box, int, Subsampling, int],
) -> None:
    width, height, box, quality, subsampling, seed = case
    encoding = Encoding(quality, subsampling, jpeg.restart_interval_for(width, subsampling, [box]))
    frame = prepare(picture(width, height, seed), box, encoding)
    data = jpeg.prepared_patch_jpeg(frame)
    part = trustworthy(frame.patch, width, height, subsampling)
    whole = cut(jpeg.decode(frame.jpeg()), frame.patch)
    np.testing.assert_array_equal(jpeg.decode(data)[part], whole[part])
    assert jpeg.decode(data).shape == whole.shape


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_patch_s_jpeg_is_the_encoded_patch(case: tuple[int, int, Box, int, Subsampling, int]) -> None:
    width, height, box, quality, subsampling, seed = case
    encoding = Encoding(quality, subsampling, jpeg.restart_interval_for(width, subsampling, [box]))
    image = picture(width, height, seed)
    frame = prepare(image, box, encoding)
    assert jpeg.prepared_patch_jpeg(frame) == jpeg.patch_jpeg(frame, cut(image, frame.patch))
    pixels = picture(frame.patch.width, frame.patch.height, seed + 1)
    assert jpeg.patch_jpeg(frame, pixels) == jpeg.encode(pixels, encoding)


@pytest.mark.parametrize("subsampling", [Subsampling.S420, Subsampling.S422])
def test_subsampled_chroma_is_interpolated_across_the_patch_s_edge(subsampling: Subsampling) -> None:
    image = picture(320, 240, 3)
    frame = prepare(image, Box(100, 70, 90, 80), Encoding(75, subsampling, 5))
    alone, whole = jpeg.decode(jpeg.prepared_patch_jpeg(frame)), cut(jpeg.decode(frame.jpeg()), frame.patch)
    differs = (alone != whole).any(axis=2)
    assert differs[:, 0].any()
    assert differs[:, -1].any()
    assert differs[0, 1:-1].any() == differs[-1, 1:-1].any() == (subsampling is Subsampling.S420)


def test_a_patch_s_jpeg_says_that_it_is_synthetic() -> None:
    frame = prepare(picture(160, 96), Box(20, 20, 40, 40), Encoding(75, Subsampling.S420, 5))
    marked = dataclasses.replace(frame, header=jpeg.mark_synthetic(frame.header))
    for data in (jpeg.prepared_patch_jpeg(marked), jpeg.patch_jpeg(marked, picture(80, 48))):
        assert b"compositeWithTrainedAlgorithmicMedia" in data
        assert jpeg.decode(data).shape == (48, 80, 3)


@pytest.mark.parametrize("size", [(1280, 720), (720, 1280), (1080, 1920), (1920, 1080)])
@pytest.mark.parametrize("subsampling", list(Subsampling))
def test_splice_at_the_sizes_of_real_video(size: tuple[int, int], subsampling: Subsampling) -> None:
    width, height = size
    image = picture(width, height)
    for box in (Box(500, 210, 182, 182), Box(0, 0, 300, 300), Box(width - 301, height - 299, 301, 299)):
        encoding = Encoding(85, subsampling, jpeg.restart_interval_for(width, subsampling, [box]))
        frame = prepare(image, box, encoding)
        assert frame.patch.area < width * height / 3
        after = changed(image, frame.patch, 7)
        assert jpeg.splice(frame, cut(after, frame.patch)) == jpeg.encode(after, encoding)


def test_threads_of_mixed_restart_intervals_do_not_disturb_each_other() -> None:
    frames = []
    for number, (width, interval) in enumerate([(320, 4), (320, 5), (320, 10), (240, 3), (240, 15), (256, 16)]):
        encoding = Encoding(80, Subsampling.S420, interval)
        image = picture(width, 160, number)
        frame = prepare(image, Box(70, 40, 90, 70), encoding)
        after = changed(image, frame.patch, number + 50)
        frames.append((frame, cut(after, frame.patch), jpeg.encode(after, encoding)))

    def spliced_as_expected(number: int) -> bool:
        frame, pixels, expected = frames[number % len(frames)]
        return jpeg.splice(frame, pixels) == expected

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(spliced_as_expected, range(1200)))


class Held:
    """Stands for the library: keeps each encode until it is let go. `begun`: the restart intervals, in their order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Semaphore(0)

    def encode(self, image: NDArray[np.uint8], **options: object) -> bytes:
        self.begun.append(os.environ["TJ_RESTART"])
        self.go.acquire()
        return b""


def test_no_restart_interval_starves_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes while another interval waits comes after it, though encodes of the own one are under way."""
    library, gate, intervals = Held(), jpeg._restart_gate, (4, 2, 4)
    monkeypatch.setattr(jpeg, "_library", lambda: library)
    with ThreadPoolExecutor(len(intervals)) as pool:
        try:
            for count, interval in enumerate(intervals, 1):
                pool.submit(jpeg.encode, picture(64, 48), Encoding(75, Subsampling.S420, interval))
                until(lambda: len(library.begun) + len(gate._queue) == count)  # noqa: B023
            assert library.begun == ["4B"]
        finally:
            library.go.release(len(intervals))
    assert library.begun == ["4B", "2B", "4B"]


def test_a_prepared_frame_is_the_full_encode() -> None:
    image = picture(160, 96)
    encoding = Encoding(75, Subsampling.S420, 5)
    assert prepare(image, Box(20, 20, 40, 40), encoding).jpeg() == jpeg.encode(image, encoding)


@pytest.mark.parametrize(
    ("width", "allowed"), [(1280, {4, 5, 8, 10, 16, 20, 40, 80}), (720, {3, 5, 9, 15, 45}), (1080, {4, 17, 34, 68})]
)
def test_the_restart_interval_divides_the_columns(width: int, allowed: set[int]) -> None:
    boxes = [Box(x, 100, 182, 182) for x in range(100, 300, 7)]
    assert jpeg.restart_interval_for(width, Subsampling.S420, boxes) in allowed


def test_a_prime_number_of_columns_falls_back_to_whole_rows() -> None:
    assert jpeg.restart_interval_for(53 * 16, Subsampling.S420, [Box(100, 100, 100, 100)]) == 53


def test_the_synthetic_mark_keeps_the_picture() -> None:
    header, scan, _ = jpeg.split(jpeg.encode(picture(160, 96), Encoding(75, Subsampling.S420, 5)))
    marked = jpeg.mark_synthetic(header)
    assert b"compositeWithTrainedAlgorithmicMedia" in marked
    before, after = (jpeg.decode(b"".join((part, scan, jpeg.EOI))) for part in (header, marked))
    assert np.array_equal(before, after)
    assert jpeg.split(b"".join((marked, scan, jpeg.EOI)))[2] == 5


def test_decode_refuses_what_is_no_jpeg() -> None:
    with pytest.raises(InvalidInput, match="not a readable JPEG"):
        jpeg.decode(b"hello")
