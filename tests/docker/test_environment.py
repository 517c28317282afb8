"""What can be set from outside, without an engine."""

from __future__ import annotations

import re

from .deployment import ROOT


def test_the_environment_file_lists_what_compose_takes() -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    taken = set(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    assert {name for name, _ in taken} == set(re.findall(r"\$\{([A-Z_]+)", text))
    listed = re.findall(r"^#([A-Z_]+)=(.*)$", (ROOT / "deploy" / ".env").read_text(), re.MULTILINE)
    assert sorted(pair for pair in listed if not pair[0].startswith("COMPOSE_")) == sorted(taken)
