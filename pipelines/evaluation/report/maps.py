"""The section of the report that shows where in a picture each fitted probe reads its answer.

Shape suffixes: N images or clips, T tokens, D width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.encoders.input_batch import InputBatch
from pipelines.evaluation.features import extract_features
from pipelines.evaluation.probes.probe import Readouts
from pipelines.evaluation.probes.readouts import Readout
from pipelines.evaluation.report.figures import picture_uri
from pipelines.evaluation.report.samples import by_step, channels_last, of_one_grid
from pipelines.evaluation.subject import Subject

SHOWN = 6
"""The first samples, as stored, class by class in turn."""
FOR, AGAINST = np.array((215, 48, 39)), np.array((69, 117, 180))


def patch_maps(
    subject: Subject, readouts: Readouts, samples: InputBatch, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Draws the map of every fitted probe of the encoder over the same few samples.

    Returns:
        For every probe its name, whether its map has a sign, and the samples: the picture, the
        picture under the map, and the probe's answer.
    """
    if not readouts:
        return []
    samples, grid = of_one_grid(subject, samples)
    samples = samples[:SHOWN]
    frames = samples.pixels.shape[2] if samples.pixels.ndim == 5 else 1
    tokens_NTD = torch.from_numpy(
        extract_features(
            subject.encoder,
            subject.preprocessing,
            samples,
            batch_size=SHOWN * frames,
            pooling="patches",
        )
    )
    pictures = channels_last(samples)
    drawn = []
    for (number, name), readout in readouts.items():
        if number is None and len(classes) < 2:
            continue  # there is nothing to tell apart
        maps = by_step(readout.maps(tokens_NTD).cpu().numpy()[..., None], grid)
        maps_NSHW = maps.reshape(len(maps), grid.tubes, grid.rows, grid.columns)
        most = float(np.nanmax(np.abs(maps_NSHW))) or 1.0
        shades = [shaded(p, m / most) for p, m in zip(pictures, maps_NSHW, strict=True)]
        answers = _answers(readout, tokens_NTD, None if number is not None else classes)
        shown = zip(pictures, shades, answers, strict=True)
        drawn.append(
            {
                "title": name if number is None else f"{number}, {name}",
                "signed": readout.signed,
                "samples": [(picture_uri(p), picture_uri(s), answer) for p, s, answer in shown],
            }
        )
    return drawn


def _answers(
    readout: Readout, tokens_NTD: torch.Tensor, classes: Sequence[str] | None
) -> list[str]:
    values = readout.answers(tokens_NTD).tolist()
    return [f"{v:.4g}" for v in values] if classes is None else [classes[v] for v in values]


def shaded(picture: np.ndarray, map_SHW: np.ndarray) -> np.ndarray:
    """Tints a picture or clip, red where its map is positive and blue where it is negative.

    Args:
        picture: uint8 [H, W, 3], or a clip [F, H, W, 3].
        map_SHW: values from -1 to 1 of every time step, row and column of the token grid.
    """
    frames = picture[None] if picture.ndim == 3 else picture
    size, per_step = (frames.shape[2], frames.shape[1]), len(frames) // len(map_SHW)
    shaded = []
    for number, frame in enumerate(frames):
        map_HW = np.nan_to_num(map_SHW[number // per_step]).astype(np.float32)
        tint = np.asarray(Image.fromarray(map_HW).resize(size, Image.Resampling.NEAREST))[..., None]
        colour = np.where(tint > 0, FOR, AGAINST)
        grey = frame.mean(axis=-1, keepdims=True) * 0.6 + 70
        shaded.append(grey + np.abs(tint) * 0.85 * (colour - grey))
    found = np.stack(shaded).clip(0, 255).astype(np.uint8)
    return found[0] if picture.ndim == 3 else found
