"""What trains is never part of the command."""

from __future__ import annotations

import ast
from pathlib import Path

import lipsync

PACKAGE = Path(lipsync.__file__).parent
NEVER = {"torch", "matplotlib", "training"}


def imported(path: Path) -> set[str]:
    """The first part of every absolute name that a module imports, wherever in it the import stands."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_nothing_of_the_training_is_imported() -> None:
    modules = {str(path.relative_to(PACKAGE)): imported(path) for path in PACKAGE.rglob("*.py")}
    assert "onnx" in modules["fusing.py"]
    assert {name: names & NEVER for name, names in modules.items() if names & NEVER} == {}
