"""What a browser meets at the address that viewers use: a certificate that it trusts for a while, the page, and a
WebSocket that this page may open."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from compositor.errors import InvalidInput, OriginRefused
from compositor.web_origin import origin_of
from lipsync.doctor import Finding, State

SOON_DAYS = 14
_WAIT_S = 10.0
_HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
"""A client's, its key that of RFC 6455, section 1.3."""
_CLOSE = bytes((0x88, 0x80, 0, 0, 0, 0))
"""A client's close frame without a code (RFC 6455, section 5.5.1)."""


def check_address(url: str) -> Iterator[Finding]:
    """url: of the page, https://host or http://host. Raises InvalidInput for what is none."""
    scheme, host, port = _split(url)
    if scheme == "https":
        finding = _check_certificate(url, host, port or 443)
        yield finding
        if finding.state is State.WRONG:
            return
    elif host not in ("localhost", "127.0.0.1", "::1"):
        yield Finding(url, State.WRONG, "browsers give no microphone to pages without HTTPS", "serve it by HTTPS")
    page = _check_page(url, host, port, scheme == "https")
    yield page
    if page.state is State.OK:
        yield _check_websocket(url, host, port, scheme == "https")


def _split(url: str) -> tuple[str, str, int | None]:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and origin_of(url):
            return parts.scheme, parts.hostname, parts.port
    except ValueError:
        pass  # brackets, a host or a port, that cannot be
    raise InvalidInput(f"{url!r} is no address of a page: give such as https://avatars.example.org")


def _check_certificate(url: str, host: str, port: int) -> Finding:
    context = ssl.create_default_context()
    try:
        with (
            socket.create_connection((host, port), _WAIT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            certificate = secured.getpeercert()
    except ssl.SSLCertVerificationError as error:
        return Finding(url, State.WRONG, f"the certificate is not good: {error.verify_message}", _mend(error))
    except ssl.SSLError as error:
        return Finding(url, State.WRONG, f"no TLS is spoken there: {error.reason}", "let a proxy terminate TLS there")
    except OSError as error:
        advice = "start the proxy, or mend the name or the firewall"
        return Finding(url, State.WRONG, f"it cannot be reached: {error}", advice)
    ends = str((certificate or {}).get("notAfter"))
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400
    if days < SOON_DAYS:
        return Finding(url, State.WARNING, f"the certificate ends in {days:.0f} days ({ends})", "renew it")
    return Finding(url, State.OK, f"the certificate is good for {days:.0f} days")


def _mend(error: ssl.SSLCertVerificationError) -> str:
    if "expired" in error.verify_message:
        return "renew it"
    if "not yet valid" in error.verify_message:
        return "set the clock, here or where it was made"
    if "match" in error.verify_message:
        return "get one for this name"
    return "send the whole chain, and get the certificate from an authority that browsers know"


def _connection(host: str, port: int | None, secured: bool) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if secured else http.client.HTTPConnection
    return kind(host, port, timeout=_WAIT_S)


def _check_page(url: str, host: str, port: int | None, secured: bool) -> Finding:
    connection = _connection(host, port, secured)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return Finding(
            url, State.WRONG, f"no answer: {error}", "start the service, and let the proxy lead to http.port"
        )
    finally:
        connection.close()
    if status == 200:
        return Finding(url, State.OK, "the service answers, and is ready")
    if status == 503:
        return Finding(url, State.WRONG, "the service answers, and is not ready", "see what is said of Triton")
    advice = "let the proxy lead to http.port, every path and WebSocket"
    return Finding(url, State.WRONG, f"something else answers: HTTP {status}", advice)


def _check_websocket(url: str, host: str, port: int | None, secured: bool) -> Finding:
    """Whether a page of this address may open a WebSocket there; any tenant's name will do before the start."""
    origin, connection = origin_of(url), _connection(host, port, secured)
    lead = "let the proxy hand on Upgrade and Connection, on every path"
    try:
        connection.request("GET", "/ws/doctor", headers={**_HANDSHAKE, "Origin": origin})
        answer = connection.getresponse()
        if answer.status == http.client.SWITCHING_PROTOCOLS:
            connection.sock.sendall(_CLOSE)
            return Finding(url, State.OK, "a WebSocket of its page opens")
        refused = answer.status == http.client.FORBIDDEN and _reason(answer.read()) == OriginRefused("").reason
    except (OSError, http.client.HTTPException) as error:
        return Finding(url, State.WRONG, f"no WebSocket opens: {error}", lead)
    finally:
        connection.close()
    if refused:
        advice = f"let the proxy hand on the header Host, or list {origin} in http.allowed_origins"
        return Finding(url, State.WRONG, "the WebSocket of its own page is refused (ORIGIN_REFUSED)", advice)
    return Finding(url, State.WRONG, f"no WebSocket opens: HTTP {answer.status}", lead)


def _reason(body: bytes) -> object:
    """That of an error of the service's; None for what is none."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return json.loads(body)["error"]["reason"]
    return None
