"""Origins as browsers write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.web_origin import PORTS, origin_of


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://shop.example.org", "https://shop.example.org"),
        ("https://shop.example.org:443", "https://shop.example.org"),
        ("http://shop.example.org:80/", "http://shop.example.org"),
        ("http://shop.example.org:443", "http://shop.example.org:443"),
        ("https://shop.example.org:08443/a?b#c", "https://shop.example.org:8443"),
        ("HTTPS://Shop.Example.org", "https://shop.example.org"),
        ("https://anna:secret@shop.example.org", "https://shop.example.org"),
        ("http://[::1]:8086", "http://[::1]:8086"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
    ],
)
def test_what_browsers_leave_out(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("shop.example.org", "name scheme and host"),
        ("shop.example.org:443", "name scheme and host"),
        ("null", "name scheme and host"),
        ("https://:443", "name scheme and host"),
        ("", "name scheme and host"),
        ("https://*.example.org", "name each host"),
        ("https://m\N{LATIN SMALL LETTER U WITH DIAERESIS}nchen.example", "Punycode"),
        ("https://a b", "a host that can be"),
        ("https://a\\b", "a host that can be"),
        ("https://[::1", "Invalid IPv6 URL"),
        ("https://a:99999", "Port out of range"),
    ],
)
def test_what_is_no_pages(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        origin_of(url)


@given(
    st.sampled_from([*PORTS, "tauri"]),
    st.from_regex(r"[a-zA-Z0-9.-]+", fullmatch=True),
    st.none() | st.integers(0, 65535),
    st.sampled_from(["", "/", "/page?a=b", "#top"]),
)
def test_an_origin_is_its_own(scheme: str, host: str, port: int | None, path: str) -> None:
    origin = origin_of(f"{scheme}://{host}{'' if port is None else f':{port}'}{path}")
    assert origin_of(origin) == origin
    assert origin == f"{scheme}://{host.lower()}" + ("" if port in (None, PORTS.get(scheme)) else f":{port}")
