"""Shows a trained avatar model's pictures beside the truth: figures of the mouth's area and a contact sheet."""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from compositor.blending import ROI_BORDER, Pixels, set_prediction
from training.avatar_model import MOUTH_AREA
from training.packed import PackedUNet
from training.picture_quality import psnr_db
from training.pictures import Pictures, roi, visual

_TILE: Final = 164  # pixels a side of a contact sheet's picture


def predict_crop(model: PackedUNet, pictures: Pictures, index: int) -> Pixels:
    """The crop (328, 328, 3) that the service would paste for a moment: its own frame at rest is all that is shown."""
    crop = np.asarray(pictures.resting[int(pictures.moments.frames[index])])
    own = roi(crop)
    audio = pictures.moments.features[index].astype(np.float32)
    with torch.no_grad():
        output = model(torch.from_numpy(visual(own, own)[None]), torch.from_numpy(audio[None]))
    return set_prediction(crop, output[0].numpy())


def report_avatar(model: PackedUNet, pictures: Pictures) -> dict[str, Any]:
    """PSNR in dB of the mouth's area over all moments: the mean, the worst and, to compare, that of a resting mouth."""
    model.eval()
    ours, resting = list[float](), list[float]()
    for index in range(len(pictures.moments)):
        truth = _mouth(np.asarray(pictures.crops[index]))
        ours.append(psnr_db(_mouth(predict_crop(model, pictures, index)), truth))
        still = psnr_db(_mouth(pictures.resting[int(pictures.moments.frames[index])]), truth)
        if np.isfinite(still):
            resting.append(still)
    return {
        "pictures": len(ours),
        "psnr_mean_db": float(np.mean(ours)),
        "psnr_worst_db": float(np.min(ours)),
        "psnr_of_a_resting_mouth_db": float(np.mean(resting)) if resting else None,
    }


def contact_sheet(model: PackedUNet, pictures: Pictures, columns: int = 8) -> Pixels:
    """All moments as pairs, the prediction above the truth, `columns` a row: BGR uint8."""
    model.eval()
    pairs = [
        np.vstack([_tile(predict_crop(model, pictures, index)), _tile(np.asarray(pictures.crops[index]))])
        for index in range(len(pictures.moments))
    ]
    blank = np.full_like(pairs[0], 255)
    pairs += [blank] * (-len(pairs) % columns)
    rows = [np.hstack(pairs[start : start + columns]) for start in range(0, len(pairs), columns)]
    return np.vstack(rows)


def _mouth(crop: Pixels) -> NDArray[np.uint8]:
    rows, columns = (slice(side.start + ROI_BORDER, side.stop + ROI_BORDER) for side in MOUTH_AREA)
    return crop[rows, columns]


def _tile(crop: Pixels) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(crop, (_TILE, _TILE), interpolation=cv2.INTER_AREA), np.uint8)
