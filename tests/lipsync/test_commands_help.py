"""The help of every command shows what was written for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from lipsync.app import build


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


EVERY = list(commands(typer.main.get_command(build())))


def squeezed(text: str) -> str:
    """Without what a table breaks lines with."""
    return "".join(character for character in text if not character.isspace() and character not in "│|")


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[" ".join(path) or "lipsync" for path, _ in EVERY])
def test_help_is_shown_as_written(path: tuple[str, ...], command: Any) -> None:
    shown = CliRunner().invoke(build(), [*path, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert shown.exit_code == 0, shown.output
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    for text in filter(None, texts):
        assert squeezed(text.replace("\\[", "[")) in squeezed(shown.output)
    assert "\\[" not in shown.output


def test_the_encoder_s_shapes_are_in_its_help() -> None:
    shown = CliRunner().invoke(build(), ["encoder", "add", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert "mel [n,1,80,16] -> [n,512]" in shown.output
