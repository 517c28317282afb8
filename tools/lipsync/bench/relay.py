"""A TCP relay that counts what passes: put between a client and a server where bytes on the wire are wanted.

It takes CPU of its own, so nothing is timed through it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_PIECE = 1 << 20


class Relay:
    """Listens on a free port of 127.0.0.1 and connects each connection on to `target`, host:port."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._passed = 0
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Relay:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._listener)
        self._accepting.join()
        for end in self._sockets:
            _end(end)
        for thread in self._threads:
            thread.join()

    @property
    def address(self) -> str:
        """Where to connect to, host:port."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def passed(self) -> int:
        """Bytes that were passed on so far, both directions together, without the headers of TCP and IP."""
        with self._lock:
            return self._passed

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._sockets += (near, far)
                for ends in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._pass_on, args=ends, daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                # Counted first: whoever has received it sees it counted.
                with self._lock:
                    self._passed += len(piece)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)


def _end(end: socket.socket) -> None:
    """Closes a socket that a thread waits on; closing alone would not wake it."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
