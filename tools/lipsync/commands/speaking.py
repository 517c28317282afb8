"""`lipsync speak`: sends a WAV to a compositor and writes what the avatar says."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from compositor import pcm
from compositor.errors import InvalidInput, LipsyncError
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.video import Video
from lipsync.client import FolderSink, Sink, receive

from .console import err, out, say


def speak(
    tenant: Annotated[str, typer.Argument(metavar="ID", help="The tenant that speaks.")],
    wav: Annotated[Path, typer.Argument(help="The speech, a WAV file.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PATH", help="A video (OUT.mp4) or a folder (OUT/).")
    ] = "out.mp4",
    server: Annotated[str, typer.Option(help="The compositor's gRPC address.")] = "127.0.0.1:50052",
) -> None:
    """Speak a WAV file through a tenant; print frames, fps, real-time factor and where the time went."""
    speak_to(server, tenant, read_speech(wav), output)


def read_speech(path: Path) -> bytes:
    """The bytes of a WAV file. Raises InvalidInput for a file that cannot be read or decoded."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror}); give a WAV file") from error
    try:
        pcm.read_wav(data)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error.message}", field=error.field) from error
    return data


def speak_to(server: str, tenant: str, wav: bytes, output: str, stop: threading.Event | None = None) -> None:
    """Speaks, shows progress, writes the frames to `output` and prints the account. Once `stop` is set, the next frame
    ends it with a LipsyncError."""
    samples, rate = pcm.read_wav(wav)
    speech_s = len(samples) / rate
    begin = time.monotonic()
    first_s = 0.0
    with Progress(console=err) as bars:
        bar = bars.add_task(tenant, total=speech_s)

        def arrived(frame: pb.Frame) -> None:
            nonlocal first_s
            if stop is not None and stop.is_set():
                raise LipsyncError("interrupted")
            first_s = first_s or time.monotonic() - begin
            bars.update(bar, completed=frame.pts_samples / 16_000)

        summary = receive(server, tenant, wav, lambda fps: sink_for(output, wav, fps), arrived)
        bars.update(bar, completed=speech_s)
    _account(summary, speech_s, first_s)
    say(f"wrote {output}")


def sink_for(output: str, wav: bytes, fps: int) -> Sink:
    """A folder where `output` ends in a slash, is one, or has no suffix; else a video."""
    path = Path(output)
    if output.endswith("/") or path.is_dir() or not path.suffix:
        return FolderSink(path, wav)
    return Video(path, *pcm.read_wav(wav), fps)


def _account(summary: pb.Summary, speech_s: float, first_s: float) -> None:
    """Frames, fps, real-time factor, and a table of the stages."""
    total_s, frames = summary.stages.total_s, summary.frames
    say(
        f"{frames} frames of {speech_s:.2f} s of speech in {total_s:.2f} s: {frames / total_s:.1f} fps, "
        f"real-time factor {total_s / speech_s:.2f} (below 1 keeps up with speech), first frame after {first_s:.2f} s"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "seconds", "ms a frame"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    stages = {
        "open tenant": summary.stages.open_s,
        "load model": summary.stages.load_s,
        "audio features": summary.stages.features_s,
        "inference": summary.stages.inference_s,
        "blend": summary.stages.blend_s,
        "encode": summary.stages.encode_s,
    }
    for stage, seconds in stages.items():
        table.add_row(stage, f"{seconds:.3f}", f"{seconds / max(frames, 1) * 1000:.2f}")
    out.print(table)
    say("(stages of different frames overlap, and inference includes Triton's queue: they do not add up to the total)")
