"""Whose web pages may connect: the service's own, and those that the settings name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.errors import OriginRefused
from compositor.transports.origins import check_origin


def accepts(origin: str | None, host: str | None, allowed: Sequence[str] = ()) -> bool:
    try:
        check_origin(origin, host, allowed)
    except OriginRefused:
        return False
    return True


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8086", "127.0.0.1:8086"),
        ("http://localhost:8086", "LOCALHOST:8086"),
        ("http://[::1]:8086", "[::1]:8086"),
        ("https://avatars.example.org", "avatars.example.org"),  # a proxy ends TLS
        ("https://avatars.example.org:8443", "avatars.example.org:8443"),
        ("https://avatars.example.org", "Avatars.example.org:443"),  # a proxy says $host:$server_port
        ("http://avatars.example.org", "avatars.example.org:80"),
        ("http://[::1]", "[::1]:80"),
        (None, "127.0.0.1:8086"),
        (None, None),
    ],
)
def test_its_own_pages_and_programs_are_accepted(origin: str | None, host: str | None) -> None:
    assert accepts(origin, host)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://127.0.0.1:8087",  # another service of the same machine
        "http://localhost:8086",  # another name
        "http://127.0.0.1",
        "http://127.0.0.1:8086.evil.example",
        "http://evil.example/127.0.0.1:8086",
        "http://evil.example?http://127.0.0.1:8086",
        "http://evil@127.0.0.1:8086",
        "null",  # of a file, or in a sandbox
        "127.0.0.1:8086",
        "http://[",
        "",
    ],
)
def test_all_others_are_refused(origin: str) -> None:
    assert not accepts(origin, "127.0.0.1:8086")
    assert not accepts(origin, None)
    assert not accepts(origin, "")
    assert accepts(origin, "127.0.0.1:8086", ["*"])
    assert accepts(origin, "127.0.0.1:8086", ["https://shop.example.org", origin])


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://avatars.example.org", "avatars.example.org:443"),
        ("https://avatars.example.org", "avatars.example.org:80"),
        ("https://avatars.example.org", "avatars.example.org:8443"),
        ("https://avatars.example.org:443", "avatars.example.org"),  # no browser writes that
        ("tauri://avatars.example.org", "avatars.example.org:None"),
        ("https://", ":443"),
    ],
)
def test_another_port_is_another_service(origin: str, host: str) -> None:
    assert not accepts(origin, host)


@given(st.text(), st.text(min_size=1))
def test_pages_of_another_host_are_refused(other: str, host: str) -> None:
    assert accepts(f"https://{host}", host)
    assert accepts(f"https://{host}", f"{host}:443")
    assert accepts(f"https://{other}", host) == (
        host.lower() in (other.lower(), f"{other.lower()}:443") and other != ""
    )
    assert not accepts(f"https://{other}", "")


def test_the_refusal_names_the_setting_and_is_of_bounded_length() -> None:
    with pytest.raises(OriginRefused) as caught:
        check_origin("https://" + "x" * 10_000, "127.0.0.1:8086", ())
    assert "http.allowed_origins" in caught.value.message
    assert caught.value.field == "origin"
    assert len(caught.value.message) < 300
