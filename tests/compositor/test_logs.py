"""Log lines: one for each event, whatever it quotes, with the ids of the call that it belongs to."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor import logs
from compositor.logs import Json, Text, enter, fields, identify, of_nobody, one_line

FORGED = "no tenant 'a\n2026-01-01 00:00:00,000 ERROR   compositor: forged\r\x1b[2J\u2028'"


class Lines:
    """A logger of its own, and what it wrote."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = io.StringIO()
        handler = logs.Lines(self._stream)
        handler.setFormatter(formatter)
        self.log = logging.Logger("compositor.test")
        self.log.addHandler(handler)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def json(self) -> list[dict[str, object]]:
        return [json.loads(line, parse_constant=refuse) for line in self.text.splitlines()]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.fixture
def text() -> Lines:
    return Lines(Text())


@pytest.fixture
def lines() -> Lines:
    return Lines(Json())


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has ids of its own."""
    monkeypatch.setattr("compositor.logs._ids", ContextVar("ids", default=MappingProxyType({})))


@given(st.text())
def test_a_message_is_one_line_whatever_it_quotes(quoted: str) -> None:
    for formatter in (Text(), Json()):
        lines = Lines(formatter)
        lines.log.info("said: %s", quoted)
        assert len(lines.text.splitlines()) == 1
    assert lines.json()[0]["message"] == f"said: {quoted}"


@given(st.text())
def test_what_is_printable_is_left_as_it_is(text: str) -> None:
    assert one_line(text).isprintable()
    assert one_line(text) == text or not text.isprintable()


def test_a_line_of_text_names_time_level_module_message_and_ids(text: Lines) -> None:
    identify(request="r1")
    identify(session="s1")
    text.log.warning("it is %s", "so")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING compositor\.test: it is so request=r1 session=s1\n", text.text
    )


def raise_forged() -> None:
    raise ValueError(FORGED)


def test_nobody_writes_lines_of_his_own_into_a_traceback(text: Lines) -> None:
    try:
        raise_forged()
    except ValueError:
        text.log.exception("it failed")
    first, *more = text.text.splitlines()
    assert first.endswith("ERROR   compositor.test: it failed")
    assert "raise_forged" in text.text
    assert "forged" in more[-1]
    assert all(line.startswith("    ") for line in more)


def test_an_object_of_json_is_one_line_with_its_traceback(lines: Lines) -> None:
    identify(request="r1")
    try:
        raise_forged()
    except ValueError:
        lines.log.exception("it failed", extra=fields(status="INTERNAL", count=3))
    (line,) = lines.json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    traceback = str(line.pop("exception"))
    assert traceback.startswith("Traceback")
    assert FORGED in traceback
    assert line == {
        "process": os.getpid(),
        "level": "error",
        "logger": "compositor.test",
        "message": "it failed",
        "request": "r1",
        "status": "INTERNAL",
        "count": 3,
    }


def test_what_is_no_json_is_written_as_text(lines: Lines) -> None:
    values = {(1, b"x"): [float("nan"), -float("inf"), 1.5, None, True]}
    lines.log.info("read", extra=fields(path=Path("/x"), data=b"x", values=values))
    (line,) = lines.json()
    assert (line["path"], line["data"]) == ("/x", "b'x'")
    assert line["values"] == {"(1, b'x')": ["nan", "-inf", 1.5, None, True]}


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError(FORGED)

    __repr__ = __str__


@pytest.mark.parametrize("formatter", [Text(), Json()])
@pytest.mark.parametrize(
    ("message", "arguments"), [("it has %d pages\n", ("no",)), ("it is %s", (Unspeakable(),)), ("%s %s", (1,))]
)
def test_what_cannot_be_said_is_one_line_too(
    formatter: logging.Formatter, message: str, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(formatter)
    identify(request="r1")
    lines.log.info(message, *arguments)
    (line,) = lines.text.splitlines()
    assert re.search(r"a line of the log cannot be formatted \((Type|Value)Error\)", line)
    assert "r1" in line
    assert capsys.readouterr().err == ""


def test_what_cannot_be_said_beside_a_message_is_one_line_too(lines: Lines) -> None:
    lines.log.info("it is done", extra=fields(what=Unspeakable()))
    (line,) = lines.json()
    assert line["message"] == "a line of the log cannot be formatted (ValueError): 'it is done'"
    assert line["level"] == "error"


def test_a_call_carries_no_ids_of_the_one_before() -> None:
    enter(request="r1")
    identify(session="s1")
    enter(request="r2")
    assert dict(logs.identity()) == {"request": "r2"}


async def test_ids_go_with_the_call_and_all_its_tasks_and_with_nobody_else(lines: Lines) -> None:
    async def call(name: str) -> None:
        identify(request=name)
        await asyncio.sleep(0)
        await asyncio.create_task(part(name))
        await of_nobody(part("nobody"))

    async def part(name: str) -> None:
        await asyncio.sleep(0)
        lines.log.info(name)

    await asyncio.gather(*(call(name) for name in ("a", "b", "c")))
    lines.log.info("nobody")
    written = [(line["message"], line.get("request", "nobody")) for line in lines.json()]
    assert len(written) == 7
    assert all(message == request for message, request in written)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_service_logs_on_stderr_in_the_format_and_from_the_level_wanted(form: str) -> None:
    program = (
        "import logging; from compositor.logs import set_up_logging; from compositor.settings import LoggingSettings;"
        f"set_up_logging(LoggingSettings(format={form!r}, level='warning'));"
        "logging.getLogger('x').info('hidden'); logging.getLogger('x').warning('shown');"
        "import warnings; warnings.warn('old')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line, warning = done.stderr.splitlines()
    assert not done.stdout
    assert "UserWarning: old" in warning
    if form == "text":
        assert line.endswith(" WARNING x: shown")
    else:
        assert [json.loads(each)["logger"] for each in (line, warning)] == ["x", "py.warnings"]
