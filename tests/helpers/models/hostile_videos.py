"""Videos made to hang, crash, overflow or mislead a decoder. Everything is seeded or handmade."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from helpers.models.video_files import write_video
from helpers.serve.embeddings import encoded, picture

DEADLINE_S = 4.0
"""Of one decode in the tests; `slow to decode` takes many times that."""
SIDE = 1392  # 1.94 megapixels, just below the tests' limit


@dataclass(frozen=True)
class Hostile:
    """One input.

    Attributes:
        name: what it does.
        data: the file.
        media_type: as the client claims.
        codes: the errors it must lead to; empty where damage may also be survived.
        fps: sampled at this rate.
    """

    name: str
    data: bytes
    media_type: str = "video/mp4"
    codes: tuple[str, ...] = ()
    fps: float | None = None


def hostile_videos(mp4: bytes) -> list[Hostile]:
    """All of them, from a good file of a second."""
    return [*_not_videos(), *_lying_headers(mp4), *_bombs(), *_cut_short(mp4), *_fuzzed(mp4)]


def video_in(container: str, codec: str, frames: int = 20, **options: object) -> bytes:
    buffer = write_video(io.BytesIO(), frames, codec=codec, container=container, **options)  # type: ignore[arg-type]
    return bytes(buffer.getvalue())


def _not_videos() -> list[Hostile]:
    no = ("not_a_video",)
    noise = np.random.default_rng(0).bytes(100_000)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    sdp = (
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    )
    dash = b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>'
    return [
        Hostile("zero bytes", b"", codes=("empty",)),
        Hostile("one byte", b"\0", codes=no),
        Hostile("noise", noise, codes=no),
        Hostile("a web page", b"<html><body>hello</body></html>", codes=no),
        Hostile("a picture", encoded(picture(0)), codes=no),
        Hostile("a picture's type", encoded(picture(0)), "image/png", ("unsupported_media_type",)),
        Hostile("a text's type", b"x", "text/html", ("unsupported_media_type",)),
        Hostile("playlist of a file", hls.format("file:///etc/passwd").encode(), codes=no),
        Hostile("playlist of an address", hls.format("http://127.0.0.1/x.ts").encode(), codes=no),
        Hostile("playlist of a playlist", hls.format("concat:a.m3u8|b.m3u8").encode(), codes=no),
        Hostile("concat script", b"ffconcat version 1.0\nfile /etc/passwd\n", codes=no),
        Hostile("session description", sdp, codes=no),
        Hostile("DASH manifest", dash, codes=no),
        Hostile("gzip", gzip.compress(bytes(1_000_000)), codes=no),
        Hostile("unlisted container", video_in("mpegts", "libx264"), codes=no),
        Hostile("unlisted codec", video_in("avi", "ffvhuff"), codes=("unsupported_codec",)),
        Hostile("too many bytes", bytes(4_000_001), codes=("video_too_large",)),
    ]


def _patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrites bytes `offset` after the type of the first such box."""
    at = data.index(box) + 4 + offset
    return data[:at] + value + data[at + len(value) :]


def _lying_headers(mp4: bytes) -> list[Hostile]:
    """MP4 boxes with absurd values; the offsets are ISO/IEC 14496-12's."""
    most = b"\x7f\xff\xff\xff"
    dimensions = struct.pack(">HH", 65_000, 65_000)
    nested = b""
    for _ in range(2_000):
        nested = struct.pack(">I4s", len(nested) + 8, b"moov") + nested
    head = mp4[: mp4.index(b"moov") - 4]
    squeezed = zlib.compress(bytes(1_000))
    cmvd = struct.pack(">I4sI", len(squeezed) + 12, b"cmvd", 0x7FFF_FFFF) + squeezed
    cmov = struct.pack(">I4s", len(cmvd) + 20, b"cmov") + b"\0\0\0\x0cdcomzlib" + cmvd
    bomb = struct.pack(">I4s", len(cmov) + 8, b"moov") + cmov
    matroska = video_in("matroska", "libx264")
    at = matroska.index(b"\x44\x89\x88") + 3  # Duration, a float of eight bytes
    endless, nonsense = (
        matroska[:at] + struct.pack(">d", value) + matroska[at + 8 :]
        for value in (1e12, float("nan"))
    )
    return [
        Hostile("huge width and height", _patched(mp4, b"avc1", 24, dimensions)),
        Hostile("a duration of years", _patched(mp4, b"mdhd", 16, most)),
        Hostile("no time scale", _patched(mp4, b"mdhd", 12, bytes(4))),
        Hostile("2 billion sample sizes", _patched(mp4, b"stsz", 8, most)),
        Hostile("2 billion chunks", _patched(mp4, b"stco", 4, most)),
        Hostile("2 billion time steps", _patched(mp4, b"stts", 4, most)),
        Hostile("frames 3 months apart", _patched(mp4, b"stts", 12, most)),
        Hostile("media in another file", _patched(mp4, b"url ", 0, bytes(4))),
        Hostile("endless media box", _patched(mp4, b"free", 4, bytes(4))),
        Hostile("2,000 boxes in boxes", head + nested),
        Hostile("squeezed header bomb", head + bomb),
        Hostile("Matroska of 30 years", endless, codes=("too_long",)),
        Hostile("Matroska, no number", nonsense),
    ]


def _gif(width: int, height: int, frames: int) -> bytes:
    """A GIF whose frames are one pixel."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    frame = b"\x21\xf9\x04\0\x02\0\0\0" + b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0"
    return head + (frame + b"\x02\x02\x44\x01\0") * frames + b"\x3b"


def slow_to_decode(frames: int = 19_000) -> bytes:
    """A key frame, then the same frame in which nothing moves, over and over: all must be decoded
    to reach the last.
    """
    source, target = io.BytesIO(), io.BytesIO()
    write_video(
        source, 2, codec="libvpx", size=(SIDE, SIDE), container="webm", options={"g": "999"}
    )
    source.seek(0)
    with av.open(source) as original, av.open(target, "w", format="matroska") as copy:
        template = original.streams.video[0]
        stream = copy.add_stream_from_template(template)
        key, still = (bytes(packet) for packet in original.demux(template) if packet.size)
        for number in range(frames):
            packet = av.Packet(still if number else key)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = number
            packet.is_keyframe = number == 0
            copy.mux(packet)
    return target.getvalue()


def _bombs() -> list[Hostile]:
    mjpeg = bytearray(video_in("avi", "mjpeg"))
    at = 0
    while (at := mjpeg.find(b"\xff\xc0\0\x11\x08", at) + 1) > 0:  # a JPEG's size
        mjpeg[at + 4 : at + 8] = struct.pack(">HH", 65_000, 65_000)
    large = video_in("mp4", "libx264", 1, size=(1500, 1500), options={"preset": "ultrafast"})
    # Sixteen pictures of 12 MB that others may refer to: a decoder must keep them all.
    kept = {"preset": "ultrafast", "refs": "16", "bf": "0", "g": "99", "crf": "30"}
    heavy = video_in(
        "mp4", "libx264", 20, size=(SIDE, SIDE), options=kept, pixel_format="yuv444p10le"
    )
    return [
        Hostile("GIF of 4 gigapixels", _gif(65_000, 65_000, 1), codes=("decode_error",)),
        Hostile("AVI whose frames grow", bytes(mjpeg), codes=("decode_error",)),
        Hostile("large frames", large, codes=("too_many_pixels",)),
        Hostile("100,000 frames", _gif(16, 16, 100_000), codes=("too_many_frames",)),
        Hostile("slow to decode", slow_to_decode(), codes=("decode_timeout",)),
        Hostile(
            "much memory",
            heavy,
            fps=30.0,
            codes=("too_much_memory", "decoder_died", "decode_error"),
        ),
    ]


def _cut_short(mp4: bytes) -> list[Hostile]:
    matroska = video_in("matroska", "libx264", 60)
    return [
        Hostile("MP4 without index", mp4[: len(mp4) // 2], codes=("truncated",)),
        Hostile("Matroska cut in half", matroska[: len(matroska) // 2], codes=("truncated",)),
        Hostile("index only", mp4[: mp4.index(b"ftyp") + 28] + mp4[mp4.index(b"moov") - 4 :]),
        Hostile("first kilobyte", matroska[:1000]),
    ]


def _fuzzed(mp4: bytes) -> list[Hostile]:
    sources = {
        "mp4": mp4,
        "webm": video_in("webm", "libvpx"),
        "matroska": video_in("matroska", "libx264"),
        "avi": video_in("avi", "mpeg4"),
        "gif": video_in("gif", "gif"),
    }
    cases = []
    for name, data in sources.items():
        for seed in range(4):
            rng = np.random.default_rng([seed, len(name)])
            values = np.frombuffer(data, np.uint8).copy()
            # A few bytes of the headers, then of anything, then a block moved.
            span = min(len(values), 2_000 if seed < 2 else len(values))
            places = rng.integers(0, span, 5 + 20 * seed)
            if name == "mp4" and seed < 2:  # its headers are at the end
                places = len(values) - 1 - places[places < len(values) // 2]
            values[places] = rng.integers(0, 256, len(places))
            if seed == 3:
                values = np.roll(values, 1_000)
            cases.append(Hostile(f"fuzzed {name} {seed}", values.tobytes()))
    return cases
