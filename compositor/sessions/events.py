"""What a live session is told and what it tells: plain values that every transport converts from and to its own wire.

All times are `pts`: samples of the session's own sample rate since it began. Video frame n has pts n * rate // fps, and
the speech heard with it carries the same pts. `epoch` counts interruptions and switches: whatever carries an older
epoch than the newest one seen is out of date.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..errors import LipsyncError
from ..geometry import Box
from ..rendering import Output

SAMPLE_RATE_DEFAULT = 24_000
"""What browsers' voice interfaces and speech services send."""


@dataclass(frozen=True)
class Start:
    """Opens the session; the first command, and only the first.

    sample_rate: Hz, 8000 to 192000, of mono speech. fps: 1 to 60, 0 for the tenant's own. start: position of the first
    background in the endless ping-pong order. flow: `credit` shows at most 2 frames that were not acknowledged; `plain`
    trusts the viewer to keep up. picture: whole `frames`, or `patches` for a viewer that holds the prepared frames.
    audio: whether the speech comes back beside its frames.
    """

    tenant: str
    sample_rate: int = SAMPLE_RATE_DEFAULT
    encoding: Literal["pcm16", "float32"] = "pcm16"
    fps: int = 0
    start: int = 0
    flow: Literal["credit", "plain"] = "credit"
    picture: Literal["frames", "patches"] = "frames"
    output: Output = field(default_factory=Output)
    audio: bool = True


@dataclass(frozen=True)
class Audio:
    """More speech, in the encoding and at the rate that Start named, in chunks of any size."""

    data: bytes


@dataclass(frozen=True)
class SegmentEnd:
    """The speech sent so far is whole: show it to its end without waiting for more."""


@dataclass(frozen=True)
class Interrupt:
    """Be silent now: what was sent and not yet shown is dropped."""


@dataclass(frozen=True)
class Ack:
    """The frame with this pts was shown, and with it every earlier one."""

    pts: int


@dataclass(frozen=True)
class Switch:
    """Go on with another tenant. Speech under way is interrupted."""

    tenant: str


Command: TypeAlias = Start | Audio | SegmentEnd | Interrupt | Ack | Switch


@dataclass(frozen=True)
class Started:
    """The session runs, or runs on with another tenant.

    frames: how many prepared frames the tenant has, of `width` x `height` pixels. lookahead_ms: how much speech beyond
    a frame's own begin the session waits for before it shows the frame.
    """

    session: str
    tenant: str
    epoch: int
    sample_rate: int
    fps: int
    width: int
    height: int
    frames: int
    lookahead_ms: int


@dataclass(frozen=True)
class Shown:
    """A picture whose time has come.

    data: the frame, or in patch mode the JPEG of the patch at `patch` of prepared frame `number`; empty where the
    prepared frame is shown as it is. dropped: how many pictures this viewer has missed so far.
    """

    pts: int
    epoch: int
    number: int
    speaking: bool
    data: bytes
    patch: Box | None = None
    dropped: int = 0


@dataclass(frozen=True)
class Heard:
    """The speech that belongs to the frame with the same pts, in the encoding that Start named."""

    pts: int
    epoch: int
    data: bytes


@dataclass(frozen=True)
class PlaybackStarted:
    """The first frame of a segment is shown at this pts."""

    pts: int
    epoch: int


@dataclass(frozen=True)
class PlaybackFinished:
    """A segment came to its end, or was interrupted. position: samples of it that were really shown."""

    pts: int
    epoch: int
    position: int
    interrupted: bool


@dataclass(frozen=True)
class Failed:
    """A segment could not be shown. The session goes on; what ends it is raised.

    What still comes of that segment is dropped, until SegmentEnd, Interrupt or Switch.
    """

    pts: int
    epoch: int
    error: LipsyncError


Event: TypeAlias = Started | Shown | Heard | PlaybackStarted | PlaybackFinished | Failed
