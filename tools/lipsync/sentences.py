"""The bundled sentences, spoken: what the demo says, and viewers in the benchmark. Their origin: docs/speech.md."""

from __future__ import annotations

from pathlib import Path

import compositor

SENTENCES = Path(compositor.__file__).parent / "web" / "speech"
"""A folder of WAV files, the page's own."""
HELLO = SENTENCES / "hello.wav"
NUMBERS = SENTENCES / "numbers.wav"
