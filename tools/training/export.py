"""Trained networks as the ONNX files that `lipsync` takes, each checked against the network it came from.

Opset 17, symbolic batch, the family's names of tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from compositor.errors import InvalidInput
from compositor.features import ENCODER_BATCH
from lipsync import architecture, model_check
from lipsync.model_interface import AVATAR, ENCODER
from training.networks import AudioEncoder
from training.packed import PackedUNet, packed_graph
from training.weights import fill

_TOLERANCE: Final = 1e-3  # of the largest output
_AVATAR_BATCH: Final = 4


def export_encoder(encoder: AudioEncoder, path: Path) -> float:
    """Writes `mel_spectrogram` [n,1,80,16] -> `audio_features` [n,512] and returns the largest difference from PyTorch.

    Raises InvalidInput where that is more than a thousandth of the largest output, or where `lipsync encoder add`
    would refuse the file.
    """
    graph = fill(architecture.audio_encoder(encoder.width), encoder)
    mel = np.random.default_rng(0).uniform(-4, 4, (3, *architecture.MEL_SHAPE)).astype(np.float32)
    difference = _compare(encoder, graph, {"mel_spectrogram": mel})
    _write(graph, path)
    model_check.probe(path, ENCODER_BATCH, interface=ENCODER)
    return difference


def export_avatar(unet: PackedUNet, path: Path) -> float:
    """Writes `visual` [n,6,320,320] and `audio` [n,32,16,16] -> `output` [n,3,320,320]; else as `export_encoder`."""
    unet.eval()
    graph = packed_graph(unet)
    random = np.random.default_rng(0)
    visual = random.uniform(0, 1, (2, *architecture.VISUAL_SHAPE)).astype(np.float32)
    audio = random.uniform(0, 1, (2, *architecture.AUDIO_SHAPE)).astype(np.float32)
    difference = _compare(unet, graph, {"visual": visual, "audio": audio})
    _write(graph, path)
    model_check.probe(path, _AVATAR_BATCH, interface=AVATAR)
    return difference


def _write(graph: onnx.ModelProto, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def _compare(
    module: AudioEncoder | PackedUNet, graph: onnx.ModelProto, inputs: dict[str, NDArray[np.float32]]
) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    exported = np.asarray(session.run(None, inputs)[0])
    module.eval()
    with torch.no_grad():
        output: Tensor = module(*(torch.from_numpy(value) for value in inputs.values()))
    difference = float(np.abs(output.numpy() - exported).max())
    if difference > _TOLERANCE * float(np.abs(exported).max()):
        raise InvalidInput(f"export: ONNX Runtime differs from PyTorch by {difference:.2g}; use the locked versions")
    return difference
