"""`python -m training`: makes speech, trains the audio encoder, then the avatar; writes ONNX and figures."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import cv2
import torch
import typer

from compositor.errors import LipsyncError
from lipsync import trained
from lipsync.avatar import Avatar
from lipsync.commands.console import err, progress, say
from training.avatar_model import AvatarOptions, train_avatar
from training.avatar_report import contact_sheet, report_avatar
from training.checkpoints import load_model
from training.encoder import EncoderOptions, MouthReader, train_encoder
from training.encoder_report import report_encoder
from training.evaluate import Selection, evaluate_models
from training.export import export_avatar, export_encoder
from training.model_card import number
from training.pictures import Pictures, choose_moments, draw_pictures, keep_moments
from training.recordings import recordings
from training.speech import Split, make_lines, utterances

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Work = Annotated[Path, typer.Option("--work", help="Where speech and checkpoints are kept, to go on from.")]
Sentences = Annotated[int, typer.Option("--sentences", min=20, help="How many sentences; a part is held out.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn by chance.")]
WORK, SENTENCES = Path("out/training"), 3000
_SHEET = 48  # sentences that the avatar is measured on and shown with


@app.command()
def speech(work: Work = WORK, sentences: Sentences = SENTENCES, seed: Seed = 0) -> None:
    """Speak all sentences into the cache."""
    seconds = 0.0
    with progress() as report:
        for split in ("train", "held_out", "unseen_voice"):
            lines = make_lines(split, sentences, seed)
            for utterance in utterances(lines, work / "speech", lambda done, total: report("speech", done, total)):
                seconds += utterance.seconds
    say(f"{seconds / 3600:.2f} hours of speech in {work / 'speech'}")


@app.command()
def encoder(
    output: Annotated[Path, typer.Argument(help="Where to write audio_encoder.onnx and audio_encoder.json.")],
    work: Work = WORK,
    sentences: Sentences = SENTENCES,
    seed: Seed = 0,
    width: Annotated[float, typer.Option(help="Of the layers; 1 is the family's size.")] = EncoderOptions.width,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = EncoderOptions.steps,
    bfloat16: Annotated[bool, typer.Option(help="Convolve in bfloat16 while training.")] = EncoderOptions.bfloat16,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Train the audio encoder; run again, it goes on where it stopped."""
    torch.set_num_threads(threads)
    data = f"{sentences} sentences"
    options = EncoderOptions(width=width, steps=steps, seed=seed, bfloat16=bfloat16, data=data)
    with progress() as report:
        lines = make_lines("train", sentences, seed)
        spoken = list(utterances(lines, work / "speech", lambda done, total: report("speech", done, total)))
        checkpoint = work / "encoder.pt"
        model = train_encoder(spoken, options, checkpoint, lambda step, total, loss: report("train", step, total))
        difference = export_encoder(model.encoder, output / "audio_encoder.onnx")
        figures = report_encoder(model, sentences, seed, work / "speech", report)
    (output / "audio_encoder.json").write_text(json.dumps(figures, indent=1) + "\n")
    say(f"{output / 'audio_encoder.onnx'}: differs from PyTorch by {difference:.1g}")
    for name, values in figures.items():
        say(f"{name}: correlation {values['correlation']:.3f}, lag {values['lag_frames']} frames")


@app.command()
def avatar(
    output: Annotated[Path, typer.Argument(help="Where to write model_best.onnx, avatar.json and avatar.png.")],
    work: Work = WORK,
    sentences: Sentences = SENTENCES,
    seed: Seed = 0,
    encoder_width: Annotated[float, typer.Option(help="Of the encoder trained in --work.")] = EncoderOptions.width,
    width: Annotated[float, typer.Option(help="Of the layers; 1 is the family's size.")] = AvatarOptions.width,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = AvatarOptions.steps,
    each: Annotated[int, typer.Option(min=1, help="Pictures drawn of every sentence.")] = 4,
    bfloat16: Annotated[bool, typer.Option(help="Convolve in bfloat16 while training.")] = AvatarOptions.bfloat16,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Train the avatar's U-Net on the embeddings of the trained encoder; run again, it goes on where it stopped."""
    torch.set_num_threads(threads)
    options = AvatarOptions(width=width, steps=steps, seed=seed, bfloat16=bfloat16)
    drawn, reader = Avatar(), MouthReader(encoder_width)
    load_model(work / "encoder.pt", reader)
    with progress() as report:

        def pictures(split: Split, count: int, each: int) -> Pictures:
            lines = make_lines(split, sentences, seed)[:count]
            spoken = list(utterances(lines, work / "speech", lambda done, total: report("speech", done, total)))
            choose = partial(choose_moments, spoken, reader.encoder, drawn.shot.frames, each, seed)
            moments = keep_moments(work / f"{split}_{len(lines)}_{each}_{seed}.npz", reader.encoder, choose)
            return draw_pictures(drawn, moments, work / split, lambda done, total: report(f"draw {split}", done, total))

        seen, shown = pictures("train", sentences, each), pictures("held_out", _SHEET, 1)
        checkpoint = work / "avatar.pt"
        # Features are the encoder's: with another one they, and so the checkpoint, are of no more use.
        options = replace(options, data=hashlib.sha256(seen.moments.features.tobytes()).hexdigest()[:16])
        model = train_avatar(seen, options, checkpoint, lambda stage, step, total, loss: report(stage, step, total))
    difference = export_avatar(model, output / "model_best.onnx")
    figures = report_avatar(model, shown)
    (output / "avatar.json").write_text(json.dumps(figures, indent=1) + "\n")
    cv2.imwrite(str(output / "avatar.png"), contact_sheet(model, shown))
    say(f"{output / 'model_best.onnx'}: differs from PyTorch by {difference:.1g}")
    say(f"mouth {figures['psnr_mean_db']:.1f} dB, worst {figures['psnr_worst_db']:.1f} dB")


@app.command()
def evaluate(
    output: Annotated[
        Path, typer.Argument(help="Where to write evaluation.json, evaluation.png and the model card's figures.")
    ] = trained.FOLDER,
    avatar: Annotated[Path, typer.Option(help="The avatar's model.")] = trained.AVATAR,
    encoder: Annotated[Path, typer.Option(help="The audio encoder it was trained with.")] = trained.ENCODER,
    work: Work = WORK,
    sentences: Sentences = SENTENCES,
    seed: Seed = 0,
    lines: Annotated[int, typer.Option(min=2, help="How many of the held-out sentences are spoken.")] = 48,
) -> None:
    """Measure both models through the whole service, on sentences and a voice that they were never trained on."""
    with progress() as report:
        said = Selection(sentences, seed, lines, work / "speech")
        reached = evaluate_models(avatar, encoder, output, said, report)
    for target in reached:
        value = "nothing to measure" if target.value is None else f"{number(target.value)} {target.unit}".rstrip()
        say(f"{'met' if target.met else 'MISSED':<7} {target.what}: {value}, {target.bound} {number(target.limit)}")
    if next(recordings(), None) is None:
        say("no recorded speech: install the package alsa-utils")
    say(f"wrote {output / trained.REPORT} and {output / trained.PICTURE}")


def main() -> None:
    """Exit status as `lipsync`'s: 1 and one line on stderr where something is refused."""
    try:
        app()
    except LipsyncError as error:
        err.print(f"error: {error.message}", soft_wrap=True, markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
