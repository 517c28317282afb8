"""Origins of web pages as browsers write them: a scheme and a host, with the port where it is not the scheme's own, in
small letters (RFC 6454, section 6.2). Pure."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

PORTS: Final = {"http": 80, "https": 443}
"""The port that is a scheme's own."""
_HOST = re.compile(r"[a-z0-9._~-]+|[0-9a-f:.]+")


def origin_of(url: str) -> str:
    """The origin of a page at `url`. Raises ValueError, which says what to mend, for what is no page's."""
    parts = urlsplit(url)
    scheme, host, port = parts.scheme, parts.hostname, parts.port
    if not scheme or not host:
        raise ValueError("name scheme and host, such as https://shop.example.org")
    if "*" in host:
        raise ValueError("name each host: * is for all and stands alone")
    if not host.isascii():
        raise ValueError("write the host in Punycode (xn--...), as browsers do")
    if not _HOST.fullmatch(host):
        raise ValueError("name a host that can be, such as https://shop.example.org")
    named = f"[{host}]" if ":" in host else host
    return f"{scheme}://{named}" if port in (None, PORTS.get(scheme)) else f"{scheme}://{named}:{port}"
