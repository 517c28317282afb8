"""WAV files and raw PCM to samples, and every way in which they can be wrong."""

from __future__ import annotations

import io
import struct
import wave
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor.errors import InvalidInput, Status
from compositor.pcm import as_samples, pcm16, pcm_float32, read_wav

EXTENSIBLE_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


def fmt(tag: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16, frame_bytes: int | None = None) -> bytes:
    frame = channels * bits // 8 if frame_bytes is None else frame_bytes
    return struct.pack("<HHIIHH", tag, channels, rate, rate * frame % 2**32, frame, bits)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def wav(body: bytes, **layout: Any) -> bytes:
    return riff(chunk(b"fmt ", fmt(**layout)), chunk(b"data", body))


def refused(data: bytes) -> str:
    """The message of the InvalidInput that `data` causes: one line, about the audio, a client's fault."""
    with pytest.raises(InvalidInput) as caught:
        read_wav(data)
    assert caught.value.field == "audio"
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


RAMP = np.linspace(-1, 1 - 2**-7, 201)


def encoded(bits: int, tag: int) -> bytes:
    if tag == 3:
        return RAMP.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(RAMP * 128 + 128).astype(np.uint8).tobytes()
    whole = np.round(RAMP * 2 ** (bits - 1)).astype("<i4")
    return bytes(whole.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes())


@pytest.mark.parametrize(("bits", "tag"), [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_sample_format_gives_the_same_samples(bits: int, tag: int, extensible: bool) -> None:
    header = fmt(tag=tag, bits=bits, rate=44_100)
    if extensible:
        header = struct.pack("<H", 0xFFFE) + header[2:] + struct.pack("<HHIH", 22, bits, 4, tag) + EXTENSIBLE_TAIL
    samples, rate = read_wav(riff(chunk(b"fmt ", header), chunk(b"data", encoded(bits, tag))))
    assert rate == 44_100
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, RAMP, atol=0.5 / 2 ** (bits - 1) + 1e-7 if tag == 1 else 1e-7)


def test_full_scale_is_exact() -> None:
    samples, _ = read_wav(wav(struct.pack("<3h", -32768, 0, 16384)))
    assert samples.tolist() == [-1.0, 0.0, 0.5]
    wide = b"\x00\x00\x80" + b"\x00\x00\x00" + b"\x00\x00\x40"
    assert read_wav(wav(wide, bits=24))[0].tolist() == [-1.0, 0.0, 0.5]
    assert read_wav(wav(bytes([0, 128, 192]), bits=8))[0].tolist() == [-1.0, 0.0, 0.5]


def test_stereo_is_averaged() -> None:
    left_right = struct.pack("<4h", 16384, 0, -32768, 32767)
    samples, _ = read_wav(wav(left_right, channels=2))
    np.testing.assert_allclose(samples, [0.25, -0.5 / 32768])
    np.testing.assert_array_equal(pcm16(left_right, channels=2), samples)


def test_a_file_of_the_standard_library_is_read() -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(22_050)
        writer.writeframes(struct.pack("<3h", 1, -2, 3))
    samples, rate = read_wav(file.getvalue())
    assert rate == 22_050
    np.testing.assert_array_equal(samples * 32768, [1, -2, 3])


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
def test_extra_chunks_and_odd_padding_are_skipped(container: type) -> None:
    body = struct.pack("<2h", 100, 200)
    data = riff(
        chunk(b"JUNK", b"x" * 28),
        chunk(b"LIST", b"odd"),
        chunk(b"fmt ", fmt() + b"\0\0"),
        chunk(b"fact", b"\0" * 5),
        chunk(b"data", body),
        chunk(b"LIST", b"after"),
    )
    np.testing.assert_array_equal(read_wav(container(data))[0] * 32768, [100, 200])


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("tail", [b"", b"\x01"])
def test_a_streamed_wav_without_its_size_is_read_to_the_end(size: int, tail: bytes) -> None:
    body = struct.pack("<3h", 1, 2, 3)
    data = riff(chunk(b"fmt ", fmt()), size=size) + b"data" + struct.pack("<I", size) + body + tail
    np.testing.assert_array_equal(read_wav(data)[0] * 32768, [1, 2, 3])


SAMPLES = struct.pack("<8h", *range(8))
FAULTS = {
    "empty": (b"", "not a WAV file"),
    "text": (b"hello, this is no sound at all", "not a WAV file"),
    "other RIFF": (b"RIFF" + struct.pack("<I", 4) + b"AVI ", "not a WAV file"),
    "short header": (b"RIFF\x04\x00", "not a WAV file"),
    "mp3": (b"ID3\x04" + b"\0" * 40, "an MP3 file"),
    "ogg": (b"OggS" + b"\0" * 40, "an Ogg file"),
    "flac": (b"fLaC" + b"\0" * 40, "a FLAC file"),
    "rf64": (b"RF64" + b"\xff" * 4 + b"WAVE", "an RF64 file"),
    "no chunks": (riff(), "truncated"),
    "no data chunk": (riff(chunk(b"fmt ", fmt())), "truncated"),
    "cut in a chunk header": (riff(chunk(b"fmt ", fmt())) + b"dat", "truncated"),
    "short fmt": (riff(chunk(b"fmt ", fmt()[:14]), chunk(b"data", SAMPLES)), "14 of at least 16 bytes"),
    "short extensible fmt": (riff(chunk(b"fmt ", fmt(tag=0xFFFE)), chunk(b"data", SAMPLES)), "16 of 40 bytes"),
    "foreign extensible": (
        riff(chunk(b"fmt ", fmt(tag=0xFFFE) + b"\x16\0" + b"\x01" * 22), chunk(b"data", SAMPLES)),
        "codec 0xFFFE",
    ),
    "data first": (riff(chunk(b"data", SAMPLES), chunk(b"fmt ", fmt())), "before the fmt chunk"),
    "mu-law": (wav(SAMPLES, tag=7, bits=8), "mu-law"),
    "ADPCM": (wav(SAMPLES, tag=0x11, bits=4), "IMA ADPCM"),
    "MP3 in WAV": (wav(SAMPLES, tag=0x55), "MP3"),
    "unknown codec": (wav(SAMPLES, tag=0x1234), "codec 0x1234"),
    "no channels": (wav(SAMPLES, channels=0), "0 channels"),
    "six channels": (wav(SAMPLES, channels=6), "6 channels"),
    "12 bits": (wav(SAMPLES, bits=12), "12-bit PCM"),
    "16-bit float": (wav(SAMPLES, tag=3), "16-bit float"),
    "wrong frame size": (wav(SAMPLES, frame_bytes=4), "4-byte frames"),
    "rate 0": (wav(SAMPLES, rate=0), "rate 0 Hz is outside 8000..192000"),
    "rate 7999": (wav(SAMPLES, rate=7_999), "rate 7999 Hz"),
    "rate 192001": (wav(SAMPLES, rate=192_001), "rate 192001 Hz"),
    "rate 2**32 - 1": (wav(SAMPLES, rate=2**32 - 1), "rate 4294967295 Hz"),
    "no samples": (wav(b""), "no samples"),
    "no samples, more chunks": (
        riff(chunk(b"fmt ", fmt()), chunk(b"data", b""), chunk(b"LIST", b"abcd")),
        "no samples",
    ),
    "no samples in a stream": (riff(chunk(b"fmt ", fmt()), chunk(b"data", b"", size=0xFFFFFFFF)), "no samples"),
    "cut off": (wav(SAMPLES)[:-4], "announces 16 bytes of samples and 12 are there"),
    "part of a frame": (wav(SAMPLES[:-2], channels=2), "14 bytes of samples are not whole frames of 4"),
    "NaN": (wav(struct.pack("<3f", 0, 1, float("nan")), tag=3, bits=32), "sample 2 (counted from 0) is nan"),
    "too many chunks": (riff(*[chunk(b"JUNK", b"")] * 1001, chunk(b"data", SAMPLES)), "first 1000 chunks"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_malformed_wav_is_refused_with_its_fault(case: str) -> None:
    data, fault = FAULTS[case]
    assert fault in refused(data)


@pytest.mark.parametrize("rate", [8_000, 192_000])
def test_the_limits_of_the_rate_are_allowed(rate: int) -> None:
    assert read_wav(wav(SAMPLES, rate=rate))[1] == rate


def survives(data: bytes) -> None:
    try:
        samples, rate = read_wav(data)
    except InvalidInput:
        return
    assert samples.ndim == 1
    assert len(samples)
    assert np.abs(samples).max() <= 1
    assert 8_000 <= rate <= 192_000


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_cause_nothing_but_invalid_input(data: bytes) -> None:
    survives(data)
    survives(riff(data))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([1, 3, 0xFFFE, 7]),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([8_000, 16_000, 48_000, 5]),
    st.sampled_from([8, 16, 24, 32, 64, 13]),
    st.binary(max_size=64),
    st.sampled_from([None, 0, 3, 0x7FFFF000, 0xFFFFFFFF]),
    st.integers(0, 120),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
)
def test_damaged_wavs_cause_nothing_but_invalid_input(
    tag: int,
    channels: int,
    rate: int,
    bits: int,
    body: bytes,
    size: int | None,
    cut: int,
    damage: list[tuple[int, int]],
) -> None:
    header = fmt(tag=tag, channels=channels, rate=rate, bits=bits)
    data = bytearray(riff(chunk(b"fmt ", header), chunk(b"data", body, size=size)))
    for position, value in damage:
        data[position % len(data)] = value
    survives(bytes(data))
    survives(bytes(data[:cut]))


def test_pcm16() -> None:
    samples = pcm16(struct.pack("<3h", -32768, 16384, 32767))
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, [-1, 0.5, np.float32(32767 / 32768)])
    assert len(pcm16(b"")) == 0


@pytest.mark.parametrize(("count", "channels", "whole"), [(1, 1, 2), (7, 1, 2), (6, 2, 4)])
def test_pcm16_of_parts_of_samples_is_refused(count: int, channels: int, whole: int) -> None:
    with pytest.raises(InvalidInput, match=rf"{count} bytes of audio are not whole samples of {whole} bytes") as caught:
        pcm16(b"\0" * count, channels)
    assert caught.value.field == "audio"


@pytest.mark.parametrize("channels", [-1, 0, 3])
def test_pcm_is_mono_or_stereo(channels: int) -> None:
    for decode in (pcm16, pcm_float32):
        with pytest.raises(InvalidInput, match=f"{channels} audio channels") as caught:
            decode(b"\0" * 24, channels)
        assert caught.value.field == "channels"


def test_pcm_float32() -> None:
    data = struct.pack("<4f", 0.5, -0.5, 1.0, 0.5)
    np.testing.assert_array_equal(pcm_float32(data), [0.5, -0.5, 1.0, 0.5])
    np.testing.assert_array_equal(pcm_float32(data, channels=2), [0.0, 0.75])
    assert len(pcm_float32(b"")) == 0
    with pytest.raises(InvalidInput, match="5 bytes of audio are not whole samples of 4 bytes"):
        pcm_float32(b"\0" * 5)


def test_floats_just_above_full_scale_are_clipped() -> None:
    np.testing.assert_array_equal(pcm_float32(struct.pack("<3f", 1.5, -1.01, 0.9)), np.array([1, -1, 0.9], np.float32))


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf"), (20_000, "20000")]
)
def test_what_is_no_sample_is_named(value: float, named: str) -> None:
    stereo = struct.pack("<6f", 0, 0, 0, value, 0, float("nan"))
    with pytest.raises(InvalidInput, match=rf"^sample 1 \(counted from 0\) is {named}; floats must lie in -1\.\.1"):
        pcm_float32(stereo, channels=2)
    with pytest.raises(InvalidInput, match=rf"^sample 3 \(counted from 0\) is {named};"):
        as_samples(np.frombuffer(stereo, "<f4"))


def test_a_huge_double_is_refused_not_overflowed() -> None:
    assert "sample 1" in refused(wav(struct.pack("<2d", 0, 1e300), tag=3, bits=64))


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.zeros(4, np.int16), np.float32(0)])
def test_as_samples_wants_a_row_of_floats(values: NDArray[Any]) -> None:
    with pytest.raises(InvalidInput, match="1-D float array"):
        as_samples(np.asarray(values))


def test_as_samples_copies() -> None:
    values = np.array([0.25, 1.5], np.float32)
    samples = as_samples(values)
    samples[:] = 0
    assert values.tolist() == [0.25, 1.5]
