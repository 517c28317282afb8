"""HTTP's whole speech: a WAV is posted, and its frames come back as they are made, or as a video with the speech.

MJPEG is multipart/x-mixed-replace: each part a frame as it is, its time and number in its headers, so that nothing
waits and nothing is encoded twice; `ffmpeg -f mpjpeg` reads it, and so does any multipart parser. MP4 is a whole file
with sound, which plays everywhere, and needs the package's extra `video`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .. import pcm
from ..call import Call, Frame, Stages
from ..disk import disk_fault
from ..errors import DiskFull, ExtraMissing, InvalidInput, LipsyncError, RequestTimeout
from ..pcm import Samples
from ..pipeline import Compositor
from ..rendering import Output
from ..scratch import scratch_folder
from .admission import Admission, check_fps, check_speech
from .faults import error_fields
from .ledger import Entry
from .origins import check_origin

log = logging.getLogger(__name__)

BOUNDARY: Final = "frame"
MJPEG: Final = "multipart/x-mixed-replace"
MP4: Final = "video/mp4"
_FORMATS = {"mjpeg": MJPEG, "mp4": MP4}
_Answer = TypeVar("_Answer")


class Uploads:
    """Answers posted speech."""

    def __init__(self, compositor: Compositor, admission: Admission) -> None:
        self._compositor = compositor
        self._admission = admission
        self._settings = compositor.settings

    async def speak(self, request: Request) -> Response:
        """POST a WAV. Query: format (mjpeg or mp4, instead of Accept), fps, start, quality. Raises LipsyncError."""
        # Not left to CORS: it keeps pages from reading answers, and not from asking.
        check_origin(request.headers.get("origin"), request.headers.get("host"), self._settings.http.allowed_origins)
        kind = _format(request)
        fps, start, quality = (_number(request, name) for name in ("fps", "start", "quality"))
        async with contextlib.AsyncExitStack() as slot:
            await slot.enter_async_context(self._admission.counted())
            entry: Entry = request.state.entry
            tenant = await self._compositor.open(request.path_params["tenant"], Stages())
            entry.serve(tenant.name)
            call = Call(tenant, Output(quality=quality), Stages(), span=entry.span)
            fps = fps or call.tenant.manifest.fps
            check_fps(fps)
            samples, rate = await self._speech(request)
            frames = self._compositor.generate(call, samples, rate, start, fps)
            slot.push_async_callback(frames.aclose)  # also where the answer is never begun
            if kind == MP4:
                return await _unless_gone(request, _film(frames, samples, rate, fps))
            # The first frame shows what is wrong while there still is a status to tell it with.
            first = await _unless_gone(request, anext(frames))
            return _Frames(_parts(first, frames, entry), slot.pop_all())
        raise AssertionError("unreachable")

    async def _speech(self, request: Request) -> tuple[Samples, int]:
        """Mono samples and their rate."""
        try:
            body = await asyncio.wait_for(self._body(request), self._settings.server.timeout_s)
        except asyncio.TimeoutError:
            raise RequestTimeout(f"the WAV did not come within {self._settings.server.timeout_s:g} s") from None
        samples, rate = await asyncio.to_thread(pcm.read_wav, body)
        check_speech(samples, rate, self._settings.server.max_audio_s)
        return samples, rate

    async def _body(self, request: Request) -> bytearray:
        most = self._settings.http.max_message_mb << 20
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"the WAV is larger than {self._settings.http.max_message_mb} MiB")
        return body


def _format(request: Request) -> str:
    """The media type wanted: by ?format=, else the first known one in Accept, else MJPEG."""
    name = request.query_params.get("format")
    if name is not None:
        if name not in _FORMATS:
            raise InvalidInput(f"format {name[:40]!r} is unknown: use {' or '.join(_FORMATS)}", field="format")
        return _FORMATS[name]
    accepted = [item.split(";")[0].strip().lower() for item in request.headers.get("accept", "*/*").split(",")]
    for item in accepted:
        if item in _FORMATS.values():
            return item
    if "*/*" in accepted:
        return MJPEG
    if "video/*" in accepted:
        return MP4
    raise HTTPException(406, f"this makes {' or '.join(_FORMATS.values())}")


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidInput(f"{name} {text[:40]!r} is no number: use digits", field=name)
    return int(text)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Answer]) -> _Answer:
    """What `work` returns; a client that goes away stops it, which raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parts(first: Frame, frames: AsyncGenerator[Frame, None], entry: Entry) -> AsyncGenerator[bytes, None]:
    """The parts of the answer; what fails on the way becomes its last part."""
    entry.sending()
    yield _part(first)
    entry.sent()
    try:
        async for frame in frames:
            entry.sending()
            yield _part(frame)
            entry.sent()
    except LipsyncError as error:
        entry.fail(error)
        body = json.dumps({"error": error_fields(error)}).encode()
        yield _head("application/json", len(body)) + body + b"\r\n"
    # Without a line end, which ffmpeg would take for the beginning of another part.
    yield f"--{BOUNDARY}--".encode("ascii")


def _part(frame: Frame) -> bytes:
    head = _head("image/jpeg", len(frame.data), f"X-Pts: {frame.pts_samples}", f"X-Number: {frame.number}")
    return b"".join((head, frame.data, b"\r\n"))


def _head(kind: str, length: int, *more: str) -> bytes:
    lines = [f"--{BOUNDARY}", f"Content-Type: {kind}", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode("ascii")


class _Frames(StreamingResponse):
    """A stream that is closed, and its slot given back, however it ends."""

    def __init__(self, parts: AsyncGenerator[bytes, None], slot: contextlib.AsyncExitStack) -> None:
        super().__init__(parts, media_type=f"{MJPEG}; boundary={BOUNDARY}", headers={"Cache-Control": "no-store"})
        self._parts = parts
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._slot, contextlib.aclosing(self._parts):
            await super().__call__(scope, receive, send)


class _Film(FileResponse):
    """A file that is deleted with its directory, however the answer ends."""

    def __init__(self, path: Path, directory: contextlib.ExitStack) -> None:
        super().__init__(path, media_type=MP4, headers={"Cache-Control": "no-store"})
        self._directory = directory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._directory:
            await super().__call__(scope, receive, send)


async def _film(frames: AsyncGenerator[Frame, None], samples: Samples, rate: int, fps: int) -> Response:
    try:
        from ..video import Video
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ExtraMissing(
            "MP4 needs the extra `video`: pip install 'triton-lipsync[video]'; or ask for format=mjpeg", field="format"
        ) from error

    async def write(step: Callable[..., _Answer], *arguments: object) -> _Answer:
        try:
            return await asyncio.get_running_loop().run_in_executor(writer, step, *arguments)
        except DiskFull as error:
            reason = getattr(error.__cause__, "strerror", "")
            raise disk_fault(path.parents[1], f"no room for the video ({reason})") from error
        except InvalidInput as error:
            # Not the caller's: H.264 is missing, say.
            log.error("a video was not written: %s", error.message)
            raise LipsyncError("the video cannot be written; the service's log has the details") from error

    with contextlib.ExitStack() as files:
        path = files.enter_context(scratch_folder()) / "speech.mp4"
        # One thread: what is cancelled here goes on there, and must not meet what follows.
        writer = ThreadPoolExecutor(1, thread_name_prefix="film")
        files.callback(writer.shutdown, wait=False)
        video = await write(Video, path, samples, rate, fps)
        try:
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    await write(video.put, frame.data)
            await write(video.close)
        except BaseException:
            await write(video.discard)
            raise
        return _Film(path, files.pop_all())
    raise AssertionError("unreachable")
