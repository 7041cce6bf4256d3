"""Small real video files for tests, written with PyAV; frame number and time can be read back.

Every frame is a flat grey of 16 + 6 times its number (modulo `CYCLE`), except for a white band
along the top third of its left half, which shows which way up it is.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CYCLE = 39


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Returns uint8 [H, W, 3]."""
    pixels = np.full((height, width, 3), 16 + 6 * (number % CYCLE), np.uint8)
    pixels[: height // 3, : width // 2] = 255
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Reads the number, modulo `CYCLE`, of an upright picture from its bottom right quarter."""
    height, width = pixels.shape[:2]
    return round((float(pixels[height // 2 :, width // 2 :].mean()) - 16) / 6)


def write_video(
    path: Path | io.BytesIO,
    frames: int = 30,
    *,
    rate: int = 30,
    times: list[Fraction] | None = None,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 64),
    rotation: int = 0,
    aspect: Fraction | None = None,
    audio: bool = False,
    container: str | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    drop: tuple[int, ...] = (),
    pixel_format: str | None = None,
    draw: Callable[[int, int, int], np.ndarray] = picture,
) -> Any:
    """Writes `frames` pictures and returns `path`.

    Args:
        path: file, its suffix being the container, or a buffer.
        frames: how many.
        rate: frames a second.
        times: when each is shown, seconds; None is the constant rate.
        codec: FFmpeg's name of the encoder.
        size: height and width.
        rotation: display rotation written to the file, degrees counter-clockwise.
        aspect: width / height of a pixel.
        audio: add a track of silence.
        container: format where the path does not say.
        options: of the encoder.
        muxer: options of the container.
        drop: numbers of packets that are left out.
        pixel_format: of the encoder's input; None is the codec's usual one.
        draw: makes a picture from its number, height and width.
    """
    target = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format=container, container_options=muxer or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        usual = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.pix_fmt = pixel_format or usual
        stream.options = {"threads": "1", **(options or {})}
        if codec == "libx264":
            stream.options = {
                "crf": "1",
                "g": "10",
                "bf": "2",
                "sc_threshold": "0",
                **stream.options,
            }
        stream.codec_context.time_base = Fraction(1, 1000 if times else rate)
        if aspect:
            stream.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = file.add_stream("aac", rate=48000) if audio else None
        packets = 0
        for number in range(frames + 1):
            frame = None
            if number < frames:
                frame = av.VideoFrame.from_ndarray(draw(number, *size), "rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.time_base = stream.codec_context.time_base
                frame.pts = round(times[number] * 1000) if times else number
            for packet in stream.encode(frame):
                if packets not in drop:
                    file.mux(packet)
                packets += 1
        if sound is not None:
            _silence(file, sound, frames / rate)
    return path


def _silence(file: Any, sound: Any, seconds: float) -> None:
    for start in range(0, int(48000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        file.mux(sound.encode(frame))
    file.mux(sound.encode(None))


def write_sound(path: Path) -> Path:
    """Writes a file that holds nothing but a second of silence."""
    with av.open(str(path), "w") as file:
        _silence(file, file.add_stream("aac", rate=48000), 1.0)
    return path
