"""Which web pages may use the service: a browser says in the header Origin where a page came from. Pure."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import OriginRefused

ANY = "*"
_MOST_SAID = 100


def check_origin(origin: str | None, host: str | None, allowed: Collection[str]) -> None:
    """Raises OriginRefused for a page that is neither the service's own nor of an allowed origin.

    origin, host: the request's headers. No browser opens a WebSocket without an Origin, so who has none is a program,
    and may. The service's own pages are those of the host that was asked: whether by http or https does not count, as a
    proxy may end TLS.
    """
    if origin is None or ANY in allowed or origin in allowed:
        return
    # An origin is a scheme and a host, with the port where it is not the scheme's own, as a Host header has it.
    if host and origin.partition("://")[2].lower() == host.lower():
        return
    words = "list that in http.allowed_origins or, if it is the service's own, have the proxy hand on the header Host"
    raise OriginRefused(f"pages of {origin[:_MOST_SAID]!r} may not connect: {words}", field="origin")
