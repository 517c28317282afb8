"""Where a profiled compositor's CPU went: stacks and threads' CPU seconds in, a share for each stage out. Pure.

A thread's CPU is shared out among its stages by its samples; samples of waiting count for nothing. Threads without an
interpreter (gRPC's own) are a stage of their own.
"""

from __future__ import annotations

import linecache
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath

from .profiler import Frame, Profile, Stack

RESIZE, BLEND, ENCODE, SPLICE = "resize", "feather and blend", "patch encode", "splice"
LOOK_UP = "look up the frame"
FEATURES = "audio features"
REQUEST = "request to Triton"
HAND_OVER = "hand-over between loop and pool"
SEND = "gRPC server: protobuf, send"
OWN_THREADS = "gRPC's own threads: sockets"
OTHER = "event loop, other"
STAGES = (FEATURES, REQUEST, RESIZE, BLEND, ENCODE, SPLICE, LOOK_UP, HAND_OVER, SEND, OWN_THREADS, OTHER)

_WAITING = "waiting"
_LOCK = "pthread_cond_timedwait"
_NEAR_BYTES = 0x1000
_SYSTEM_CALLS = ("epoll_wait", "pthread_cond_timedwait", "pthread_cond_wait", "sem_wait", "poll")


@dataclass(frozen=True)
class Rule:
    """A stack belongs to `stage` where one of its calls fits: a part of its file's path, its function if given, and a
    part of its source line if given."""

    stage: str
    file: str
    function: str = ""
    source: str = ""

    def fits(self, frame: Frame) -> bool:
        return (
            self.file in frame.file
            and self.function in ("", frame.function)
            and self.source in linecache.getline(frame.file, frame.line)
        )


# The first rule that fits any call of a stack decides.
RULES = (
    Rule(RESIZE, "compositor/blending.py", source="cv2.resize("),
    Rule(BLEND, "compositor/blending.py"),
    Rule(ENCODE, "compositor/jpeg.py", "encode"),
    Rule(ENCODE, "turbojpeg"),
    Rule(SPLICE, "compositor/jpeg.py"),
    Rule(LOOK_UP, "compositor/rendering.py"),
    Rule(LOOK_UP, "compositor/tenant"),
    Rule(FEATURES, "compositor/features.py"),
    Rule(FEATURES, "compositor/audio.py"),
    Rule(FEATURES, "compositor/pcm.py"),
    Rule(REQUEST, "compositor/triton/inference.py"),
    Rule(REQUEST, "compositor/triton/slots.py"),
    Rule(REQUEST, "tritonclient/"),
    Rule(REQUEST, "grpc/aio/_call.py"),
    Rule(HAND_OVER, "concurrent/futures/"),
    Rule(HAND_OVER, "asyncio/futures.py"),
    Rule(HAND_OVER, "compositor/pipeline.py", "_in_pool"),
    Rule(HAND_OVER, "", "_write_to_self"),
    Rule(HAND_OVER, "", "_read_from_self"),
    Rule(SEND, "compositor/transports/"),
    Rule(SEND, "grpc/"),
    Rule(SEND, "cygrpc"),
    Rule(SEND, "google/"),
)


def shares(profile: Profile) -> dict[str, float]:
    """The share of the process's CPU by stage, in sum 1, all stages there. Raises ValueError where none was spent."""
    samples: dict[int, Counter[str]] = {}
    locks = _lock_addresses(profile.stacks)
    for stack in profile.stacks:
        stage = _WAITING if _locked(stack, locks) else stage_of(stack)
        samples.setdefault(stack.thread, Counter())[stage] += stack.samples
    spent: Counter[str] = Counter()
    for (thread, _), cpu_s in profile.cpu_s.items():
        for stage, share in _of_thread(samples.get(thread)).items():
            spent[stage] += cpu_s * share  # type: ignore[assignment]
    total = sum(spent.values())
    if not total:
        raise ValueError("the process took no CPU while it was profiled")
    return {stage: spent[stage] / total for stage in STAGES}


def _lock_addresses(stacks: list[Stack]) -> set[int]:
    """Where the C library waits for locks, in stripped functions: seen inside those whose name is known."""
    return {
        address
        for stack in stacks
        if (address := _address(stack)) and any(_LOCK in frame.function for frame in stack.frames)
    }


def _locked(stack: Stack, locks: set[int]) -> bool:
    """Whether the stack ends in or beside one of these: the C library's lock functions lie side by side."""
    address = _address(stack)
    return address > 0 and any(abs(address - lock) < _NEAR_BYTES for lock in locks)


def _address(stack: Stack) -> int:
    """That of the innermost call, where it is one of the C library without a name; else 0."""
    last = stack.frames[-1] if stack.frames else Frame("", "")
    return (
        int(last.function, 16) if last.function.startswith("0x") and PurePath(last.file).name.startswith("libc.") else 0
    )


def _of_thread(samples: Counter[str] | None) -> dict[str, float]:
    if samples is None:
        return {OWN_THREADS: 1.0}
    busy = {stage: count for stage, count in samples.items() if stage != _WAITING}
    return {stage: count / sum(busy.values()) for stage, count in busy.items()} or {OTHER: 1.0}


def stage_of(stack: Stack) -> str:
    """The stage that a stack belongs to, or `waiting`."""
    last = next((frame for frame in reversed(stack.frames) if frame.file.endswith(".py")), None)
    if last is None or _waits(stack.frames, last):
        return _WAITING
    if last.function.rpartition(".")[2] == "run" and last.file.endswith("threading.py"):
        return OWN_THREADS  # a thread that gRPC starts from Python, whose work is compiled
    return next((rule.stage for rule in RULES if any(rule.fits(frame) for frame in stack.frames)), OTHER)


def _waits(frames: tuple[Frame, ...], last: Frame) -> bool:
    """Whether the innermost Python call, or a system call inside it, waits for work or for the interpreter lock."""
    return (
        any(frame.function in _SYSTEM_CALLS for frame in frames)
        or last.function.rpartition(".")[2] == "select"
        or "work_queue.get(" in linecache.getline(last.file, last.line)
    )
