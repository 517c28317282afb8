"""`lipsync talk`: a live session from the command line, and how well it went."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from compositor import pcm
from compositor.errors import InvalidInput
from lipsync.client import ServiceFailed
from lipsync.live_client import Account, Recording, Speech
from lipsync.live_client import talk as converse

from .console import err, say
from .console import size as size_of
from .speaking import read_speech, sink_for


def talk(
    tenant: Annotated[str, typer.Argument(metavar="ID", help="The tenant that speaks.")],
    wav: Annotated[Path, typer.Argument(help="The speech, a WAV file.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PATH", help="A video (OUT.mp4) or a folder (OUT/).")
    ] = "out.mp4",
    server: Annotated[str, typer.Option(help="The compositor's gRPC address.")] = "127.0.0.1:50052",
    burst: Annotated[
        bool, typer.Option("--burst", help="Send the speech at once, not as fast as it is spoken.")
    ] = False,
    interrupt_after: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Interrupt after so much speech was shown.")
    ] = None,
    fps: Annotated[int, typer.Option(min=0, max=60, help="Frames a second; 0: the tenant's own.")] = 0,
) -> None:
    """Speak a WAV file in a live session; write what a viewer sees and hears; print delays, drops, interruptions."""
    samples, rate = pcm.read_wav(read_speech(wav))
    speech = Speech(samples, rate, fps, burst, interrupt_after)
    with tempfile.TemporaryFile() as file:
        recording = Recording(file)
        with Progress(console=err) as bars:
            bar = bars.add_task(tenant, total=len(samples) / rate)
            account = converse(server, tenant, speech, recording, lambda pts: bars.update(bar, completed=pts / rate))
        if account.failures:
            raise ServiceFailed("\n".join(account.failures))
        if not account.arrivals:
            raise InvalidInput("no frame came")
        recording.write(lambda sound, rate_fps: sink_for(output, sound, rate_fps))
    _tell(account)
    say(f"wrote {output}")


def _tell(account: Account) -> None:
    """Frames, delays, drops, and what an interruption did."""
    frames, lateness = len(account.arrivals), account.lateness_ms()
    shown_s = frames / account.started.fps
    say(
        f"{frames} frames in {shown_s:.2f} s, {account.speaking} of them speaking, {account.dropped} dropped; "
        f"{size_of(round(account.bytes / shown_s))}/s"
    )
    if account.first_speaking_s:
        delay_s = account.first_speaking_s - account.first_audio_s
        say(f"first speaking frame {delay_s:.2f} s after the first speech was sent")
    p50, p95, p99 = np.percentile(lateness, (50, 95, 99))
    say(f"lateness p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, most {lateness.max():.1f} ms")
    finished = account.finished
    if finished is not None and finished.interrupted:
        say(
            f"interrupted after {finished.position / account.started.sample_rate:.2f} s of speech: first new frame "
            f"{(account.first_new_s - account.interrupted_s) * 1000:.0f} ms later, {account.late_old} old ones after"
        )
