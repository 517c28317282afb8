from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest

from compositor.errors import InvalidInput
from lipsync.model_check import inspect, inspect_encoder

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training.__main__ import avatar, encoder, evaluate, main, speech  # noqa: E402
from training.checkpoints import load_model  # noqa: E402
from training.encoder import MouthReader  # noqa: E402
from training.targets import Target  # noqa: E402

needs_synthesisers = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite and espeak-ng are not installed"
)


@needs_synthesisers
def test_from_nothing_to_both_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speech, an encoder and an avatar, each trained for a step or two: whole, if of no use."""
    monkeypatch.setattr("training.__main__._SHEET", 2)
    work, output = tmp_path / "work", tmp_path / "output"
    speech(work, sentences=20)
    assert "hours of speech" in capsys.readouterr().out
    encoder(output, work, sentences=20, width=0.125, steps=2, threads=1)
    figures = json.loads((output / "audio_encoder.json").read_text())
    assert {"known voices", "known voices, noise at 20 dB", "unseen voice", "unseen voice, noise at 20 dB"} <= set(
        figures
    )
    assert all(-1 <= values["correlation"] <= 1 and values["frames"] > 0 for values in figures.values())
    assert inspect_encoder(output / "audio_encoder.onnx").batch == "dynamic"

    avatar(output, work, sentences=20, encoder_width=0.125, width=0.125, steps=2, each=1, threads=1)
    assert inspect(output / "model_best.onnx").batch == "dynamic"
    assert json.loads((output / "avatar.json").read_text())["pictures"] == 1
    sheet = cv2.imread(str(output / "avatar.png"))
    assert sheet is not None
    assert sheet.shape == (328, 8 * 164, 3)


def test_evaluation_says_which_targets_are_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = [
        Target("this", 0.91, "at least", 0.9),
        Target("that", 12.5, "at most", 10, "ms a frame"),
        Target("nothing", None, "at least", 80, "%"),
    ]
    monkeypatch.setattr("training.__main__.evaluate_models", lambda *_: reached)
    evaluate(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "met     this: 0.91, at least 0.9",
        "MISSED  that: 12.5 ms a frame, at most 10",
        "MISSED  nothing: nothing to measure, at least 80",
    ]
    assert str(tmp_path / "evaluation.json") in lines[-1]


def test_what_is_refused_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["training", "avatar", str(tmp_path / "out"), "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert said.err == f"error: checkpoint: {tmp_path / 'encoder.pt'} is missing; train it first\n"


def test_a_missing_or_other_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="missing"):
        load_model(tmp_path / "encoder.pt", MouthReader(0.125))
    torch.save({"model": MouthReader(0.125).state_dict()}, tmp_path / "encoder.pt")
    with pytest.raises(InvalidInput, match="another network"):
        load_model(tmp_path / "encoder.pt", MouthReader(0.25))
