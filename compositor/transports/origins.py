"""Which web pages may use the service: a browser says in the header Origin where a page came from. Pure."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import OriginRefused
from ..web_origin import PORTS

ANY = "*"
_MOST_SAID = 100


def check_origin(origin: str | None, host: str | None, allowed: Collection[str]) -> None:
    """Raises OriginRefused for a page that is neither the service's own nor of an allowed origin.

    origin, host: the request's headers. No browser opens a WebSocket, or posts, without an Origin, so who has none is a
    program, and may. The service's own pages are those of the host that was asked: whether by http or https does not
    count, as a proxy may end TLS.
    """
    if origin is None or ANY in allowed or origin in allowed:
        return
    scheme, _, own = origin.partition("://")
    # A Host header leaves the scheme's own port out, as an origin does, but proxies put it in.
    hosts = {own.lower(), f"{own.lower()}:{PORTS.get(scheme, '')}"}
    if own and host and host.lower() in hosts:
        return
    words = "list that in http.allowed_origins or, if it is the service's own, have the proxy hand on the header Host"
    raise OriginRefused(f"pages of {origin[:_MOST_SAID]!r} may not use this: {words}", field="origin")
