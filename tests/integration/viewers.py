"""Viewers of live sessions, each in a thread of its own: all they are told is kept."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import threading
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from compositor import jpeg
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc

from .processes import RATE, Service


class Viewer:
    """One live session: its events are taken, and its pictures acknowledged, until it ends."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.begun = threading.Event()
        self.ending = ""
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self.begun.wait(60)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def finish(self) -> None:
        """The speech is whole: its session may end once it is shown."""
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError

    def took(self, kind: str, event: Any) -> None:
        self.events.append((kind, event))
        if kind == self.waits_for:
            self.begun.set()

    waits_for = "frame"

    def of(self, kind: str) -> list[Any]:
        return [event for name, event in self.events if name == kind]


class Caller(Viewer):
    """By gRPC."""

    def __init__(self, stub: pb_grpc.LipsyncStub, speech: bytes, *, whole: bool = True) -> None:
        super().__init__()
        self._stub = stub
        self.waits_for = "audio" if speech else "frame"
        self._requests = queue.SimpleQueue[pb.SpeakRequest | None]()
        self._requests.put(pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant="avatar", sample_rate=RATE)))
        if speech:
            self._requests.put(pb.SpeakRequest(audio=pb.SpeakRequest.Audio(data=speech)))
            if whole:
                self.finish()

    def finish(self) -> None:
        self._requests.put(pb.SpeakRequest(segment_end=pb.SpeakRequest.SegmentEnd()))

    def _run(self) -> None:
        call = self._stub.Speak(iter(self._requests.get, None), timeout=120)
        try:
            for response in call:
                kind = response.WhichOneof("event")
                self.took(kind, getattr(response, kind))
                if kind == "frame":
                    self._requests.put(pb.SpeakRequest(ack=pb.SpeakRequest.Ack(pts=response.frame.pts)))
            self.ending = "OK"
        except grpc.RpcError as error:
            found: Any = error
            self.ending = f"{found.code().name}: {found.details()}"
        self._requests.put(None)


class Guest(Viewer):
    """By WebSocket."""

    def __init__(self, service: Service, speech: bytes, *, whole: bool = True) -> None:
        super().__init__()
        self._url, self._speech, self._whole = f"ws://{service.http_address}/ws/avatar", speech, whole
        self.waits_for = "audio" if speech else "frame"
        self._socket: ClientConnection

    def finish(self) -> None:
        self._socket.send('{"type":"segment_end"}')

    def _run(self) -> None:
        with connect(self._url, compression=None, max_size=None) as self._socket:
            self._socket.send(json.dumps({"type": "start", "sample_rate": RATE, "binary": False}))
            if self._speech:
                self._socket.send(b"\1\1" + bytes(14) + len(self._speech).to_bytes(4, "little") + self._speech)
                if self._whole:
                    self.finish()
            with contextlib.suppress(ConnectionClosed):
                while True:
                    self._take()
            self.ending = f"{self._socket.close_code}: {self._socket.close_reason}"

    def _take(self) -> None:
        event = json.loads(self._socket.recv())
        self.took(event["type"], event)
        if event["type"] == "frame":
            # Where the close has come already, what came before it is still to be read.
            with contextlib.suppress(ConnectionClosed):
                self._socket.send(json.dumps({"type": "ack", "pts": event["pts"]}))


GOODBYES = ("UNAVAILABLE: the service stops", "1001: the service stops")


def heard(viewer: Viewer) -> int:
    """Bytes of speech that a viewer got."""
    if isinstance(viewer, Caller):
        return sum(len(piece.data) for piece in viewer.of("audio"))
    return sum(len(piece["data"]) * 3 // 4 - piece["data"].count("=") for piece in viewer.of("audio"))


def finished(viewer: Viewer) -> tuple[int, bool]:
    """(samples, interrupted) of its one segment."""
    (event,) = viewer.of("playback_finished")
    return (
        (event.position, event.interrupted) if isinstance(viewer, Caller) else (event["position"], event["interrupted"])
    )


def pictures(viewer: Viewer) -> list[NDArray[np.uint8]]:
    frames = viewer.of("frame")
    if isinstance(viewer, Caller):
        return [jpeg.decode(frame.data) for frame in frames]
    return [jpeg.decode(base64.b64decode(frame["data"])) for frame in frames]
