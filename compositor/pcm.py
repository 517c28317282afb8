"""Bytes to samples: WAV files, PCM16 and float32 chunks come in, mono float32 samples go out. Pure, and strict: what it
cannot decode exactly is InvalidInput. Knows nothing of resampling, mel columns or video frames."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compositor.errors import InvalidInput

Samples: TypeAlias = NDArray[np.float32]
"""Mono samples, (n,) float32 in [-1, 1]."""
Bytes: TypeAlias = bytes | bytearray | memoryview

MIN_RATE: Final = 8_000
MAX_RATE: Final = 192_000
MAX_CHANNELS: Final = 2
# Floats somewhat above full scale are clipped; floats far above it are integers in disguise (32,768 for a PCM16 peak).
MAX_FLOAT_PEAK: Final = 16.0

_MAX_CHUNKS: Final = 1_000
# Writers that cannot seek back announce 0, 0xFFFFFFFF (ffmpeg), 0x7FFFF000 (sox) or 0x80000000 (arecord) bytes.
_UNKNOWN_SIZE_FROM: Final = 0x7FFFF000
_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_GUID_TAIL: Final = bytes.fromhex("000000001000800000aa00389b71")  # KSDATAFORMAT_SUBTYPE_*, after the format tag
_CODECS: Final = {
    0x02: "MS ADPCM",
    0x06: "A-law",
    0x07: "mu-law",
    0x11: "IMA ADPCM",
    0x31: "GSM 6.10",
    0x55: "MP3",
    0xFF: "AAC",
}
_OTHER_FILES: Final = {
    b"RF64": "an RF64 file",
    b"RIFX": "a big-endian RIFX file",
    b"OggS": "an Ogg file",
    b"fLaC": "a FLAC file",
    b"ID3\x03": "an MP3 file",
    b"ID3\x04": "an MP3 file",
    b"\x1aE\xdf\xa3": "a Matroska or WebM file",
}
_CONVERT: Final = "convert it to a PCM16 WAV file"


class _Layout(NamedTuple):
    """What a fmt chunk says: format tag (PCM or float), channels, rate and bits a sample."""

    tag: int
    channels: int
    rate_hz: int
    bits: int

    @property
    def frame_bytes(self) -> int:
        return self.channels * self.bits // 8


def read_wav(data: Bytes) -> tuple[Samples, int]:
    """Decode a RIFF WAV file to mono samples at the file's own rate in Hz.

    Takes PCM of 8, 16, 24 or 32 bits and floats of 32 or 64, plain or WAVE_FORMAT_EXTENSIBLE, mono or stereo
    (averaged), and streamed files whose data size was never filled in. Raises InvalidInput for everything else.
    Source: Microsoft/IBM RIFF specification 1.0 and `mmreg.h`.
    """
    view = memoryview(data).cast("B")
    magic = bytes(view[:4])
    if magic != b"RIFF" or bytes(view[8:12]) != b"WAVE":
        raise _fault(f"this is {_OTHER_FILES.get(magic, 'not a WAV file (no RIFF/WAVE header)')}; {_CONVERT}")
    layout: _Layout | None = None
    for name, start, size in _chunks(view):
        if name == b"fmt ":
            layout = _wav_layout(view[start : start + size])
        elif name == b"data":
            if layout is None:
                raise _fault("the data chunk comes before the fmt chunk, so its format is unknown")
            body = _wav_body(view, start, size, layout.frame_bytes)
            return _mono(_decode(body, layout)), layout.rate_hz
    raise _fault("the WAV header is truncated: the file ends before any data chunk")


def pcm16(data: Bytes, channels: int = 1) -> Samples:
    """Mono samples of little-endian signed 16-bit PCM, channels interleaved.

    Raises InvalidInput for part of a sample.
    """
    return _mono(_decode(_whole(data, channels, bits=16), _Layout(_PCM, channels, 0, 16)))


def pcm_float32(data: Bytes, channels: int = 1) -> Samples:
    """Mono samples of little-endian float32, channels interleaved; clipped to [-1, 1].

    Raises InvalidInput for part of a sample and, naming the first bad one, for NaN, Inf or values far out of range.
    """
    return _mono(_decode(_whole(data, channels, bits=32), _Layout(_FLOAT, channels, 0, 32)))


def as_samples(values: NDArray[Any]) -> Samples:
    """`values`, (n,) of any float type, as Samples in an array of its own.

    Raises InvalidInput for another shape or type and, as `pcm_float32`, for what is no sample.
    """
    if values.ndim != 1 or values.dtype.kind != "f":
        raise _fault(f"samples must be a 1-D float array, not {values.dtype}{list(values.shape)}")
    return _in_range(values[:, None])[:, 0]


def check_rate(rate: int) -> None:
    """Raise InvalidInput unless `rate` (Hz) is one that can be resampled sensibly."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidInput(f"sample rate {rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz", field="sample_rate")


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and announced size of each chunk of a RIFF file, as far as chunk headers are whole."""
    offset = 12
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(view):
            return
        name, size = struct.unpack_from("<4sI", view, offset)
        yield name, offset + 8, size
        offset += 8 + size + size % 2
    raise _fault(f"no data chunk among the file's first {_MAX_CHUNKS} chunks")


def _wav_layout(fmt: memoryview) -> _Layout:
    if len(fmt) < 16:
        raise _fault(f"the WAV header is truncated: its fmt chunk has {len(fmt)} of at least 16 bytes")
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", fmt)
    if tag == _EXTENSIBLE:
        if len(fmt) < 40:
            raise _fault(f"the WAV header is truncated: its extensible fmt chunk has {len(fmt)} of 40 bytes")
        tag = struct.unpack_from("<H", fmt, 24)[0] if fmt[26:40] == _GUID_TAIL else _EXTENSIBLE
    if tag not in (_PCM, _FLOAT):
        raise _fault(f"the WAV holds {_CODECS.get(tag, f'codec 0x{tag:04X}')}, neither PCM nor float; {_CONVERT}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise _fault(f"the WAV has {channels} channels; mix it down to mono or stereo")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise _fault(f"the WAV's sample rate {rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz")
    layout = _Layout(tag, channels, rate, bits)
    if bits not in ((8, 16, 24, 32) if tag == _PCM else (32, 64)) or frame_bytes != layout.frame_bytes:
        kind = "PCM" if tag == _PCM else "float"
        raise _fault(
            f"the WAV holds {bits}-bit {kind} in {frame_bytes}-byte frames, which is not supported; {_CONVERT}"
        )
    return layout


def _wav_body(view: memoryview, start: int, size: int, frame_bytes: int) -> memoryview:
    """The bytes of the data chunk, whole frames of them."""
    available = len(view) - start
    riff_size = struct.unpack_from("<I", view, 4)[0]
    if size >= _UNKNOWN_SIZE_FROM or (size == 0 and riff_size + 8 != len(view)):
        size = available - available % frame_bytes
    elif size > available:
        raise _fault(f"the WAV is cut off: its header announces {size} bytes of samples and {available} are there")
    elif size % frame_bytes:
        raise _fault(f"the WAV's {size} bytes of samples are not whole frames of {frame_bytes} bytes")
    if size == 0:
        raise _fault("the WAV holds no samples")
    return view[start : start + size]


def _decode(body: memoryview, layout: _Layout) -> NDArray[np.float32]:
    """(n, channels) float32 in [-1, 1] of whole interleaved frames."""
    values: NDArray[Any]
    if layout.tag == _FLOAT:
        return _in_range(np.frombuffer(body, f"<f{layout.bits // 8}").reshape(-1, layout.channels))
    if layout.bits == 8:
        values, full_scale = np.frombuffer(body, np.uint8).astype(np.float32) - 128, 2**7
    elif layout.bits == 24:
        widened = np.zeros((len(body) // 3, 4), np.uint8)
        widened[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        values, full_scale = widened.view("<i4"), 2**31
    else:
        values, full_scale = np.frombuffer(body, f"<i{layout.bits // 8}"), 2 ** (layout.bits - 1)
    scaled: NDArray[np.float32] = values.astype(np.float32).reshape(-1, layout.channels) / np.float32(full_scale)
    return scaled


def _in_range(frames: NDArray[Any]) -> NDArray[np.float32]:
    """(n, channels) floats as float32 clipped to [-1, 1], or InvalidInput naming the first sample that is none."""
    if len(frames) == 0:
        return np.empty(frames.shape, np.float32)
    peak = np.abs(frames).max()
    if not peak <= MAX_FLOAT_PEAK:  # true of NaN as well
        raise _first_bad_sample(frames)
    limited = frames.clip(-1, 1) if peak > 1 else frames
    return limited.astype(np.float32)


def _first_bad_sample(frames: NDArray[Any]) -> InvalidInput:
    bad = ~(np.abs(frames) <= MAX_FLOAT_PEAK)
    sample, channel = np.unravel_index(int(np.argmax(bad)), frames.shape)
    value = float(frames[sample, channel])
    remedy = "floats must lie in -1..1" + (" (divide PCM16 values by 32768)" if np.isfinite(value) else "")
    return _fault(f"sample {sample} (counted from 0) is {value:g}; {remedy}")


def _mono(frames: NDArray[np.float32]) -> Samples:
    averaged: Samples = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)
    return averaged


def _whole(data: Bytes, channels: int, bits: int) -> memoryview:
    if not 1 <= channels <= MAX_CHANNELS:
        raise InvalidInput(f"{channels} audio channels; send mono or stereo", field="channels")
    view = memoryview(data).cast("B")
    frame_bytes = channels * bits // 8
    if len(view) % frame_bytes:
        fault = f"{len(view)} bytes of audio are not whole samples of {frame_bytes} bytes"
        raise _fault(f"{fault}; cut chunks between samples")
    return view


def _fault(message: str) -> InvalidInput:
    return InvalidInput(message, field="audio")
