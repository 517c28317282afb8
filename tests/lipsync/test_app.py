"""The `lipsync` command as a whole: each subcommand under its name, and no more imported than the one needs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from click.testing import CliRunner

from lipsync.app import COMMANDS, build


def named(names: list[str]) -> set[str]:
    return set(typer.main.get_command(build(names)).commands)  # type: ignore[attr-defined]


def test_every_command_has_its_name() -> None:
    assert named(list(COMMANDS)) == set(COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_that_is_built_alone_keeps_its_name(name: str) -> None:
    command = typer.main.get_command(build([name]))
    assert set(command.commands) == {name}  # type: ignore[attr-defined]
    shown = CliRunner().invoke(command, [name, "--help"])  # type: ignore[arg-type]
    assert shown.exit_code == 0, shown.output
    assert f"{name} " in shown.output


def test_listing_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """Else it takes longer to start than to list thousands of tenants."""
    code = (
        "import sys\n"
        "from lipsync.app import main\n"
        f"sys.argv = ['lipsync', 'tenant', 'list', '-r', {str(tmp_path)!r}, '--triton', '127.0.0.1:1']\n"
        "try:\n    main()\n"
        "finally:\n    print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lipsync.tenant_list" in loaded
    assert not loaded & {"onnx", "onnxruntime", "av", "locust", "lipsync.bench", "compositor.server"}


TOLD = """
import os, signal, sys
from lipsync.app import main

class Told:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.Signals[sys.argv.pop()])

sys.meta_path.insert(0, Told())
main()
"""


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_libraries_are_loaded_ends_it_in_order(name: str, number: signal.Signals) -> None:
    """Told as the first of them begins to be imported. A service that is told to stop has done so; another command has
    not done what it was for, and says that by its status."""
    command = [sys.executable, "-c", TOLD, name, number.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    broken_off = 130 if number is signal.SIGINT else -signal.SIGTERM
    assert done.returncode == (0 if name in ("up", "serve", "triton") else broken_off)
    assert (done.stdout, done.stderr) == ("", "")
