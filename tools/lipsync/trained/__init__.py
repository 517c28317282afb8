"""The models that the project trained for its demo, and what is known of them: MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
AVATAR: Final = FOLDER / "avatar.onnx"
"""The drawn avatar's model."""
ENCODER: Final = FOLDER / "audio_encoder.onnx"
"""The audio encoder that it was trained with."""
CARD: Final = "MODEL_CARD.md"
REPORT: Final = "evaluation.json"
PICTURE: Final = "evaluation.png"
