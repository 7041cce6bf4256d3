"""Small videos of every odd kind, written by the `ffmpeg` program, and the frames it shows of them.

Frame n of the film shows 4 x 2 blocks that are dark or bright by the bits of n, so that no two
frames look alike and a wrong frame is noticed at any scale. The reference is what `ffmpeg` decodes,
which is another program than the reader under test and another release of its libraries.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np

RATE, FRAMES, WIDTH, HEIGHT = 30, 34, 64, 48
LONG, SHORT = 16, 12  # sides of a thumbnail

X264 = "-c:v libx264 -preset veryfast -crf 12 -g 10 -sc_threshold 0"
X265 = "-c:v libx265 -preset ultrafast -crf 12 -x265-params log-level=none:pools=none:keyint=10"
VPX = "-b:v 4M -cpu-used 8 -deadline realtime -g 10"
HIDDEN = "-b:v 4M -cpu-used 5 -auto-alt-ref 1 -lag-in-frames 12 -g 16"
CODECS = {
    "h264": f"{X264} -bf 0",
    "h264b": f"{X264} -bf 3",
    "h264open": f"{X264} -bf 3 -x264-params open-gop=1",
    "h264long": f"{X264} -bf 3 -g 250",
    "h264refresh": f"{X264} -bf 0 -x264-params intra-refresh=1",
    "h264fields": f"{X264} -bf 2 -flags +ilme+ildct -x264-params tff=1",
    "h264deep": f"{X264} -bf 2 -pix_fmt yuv444p10le",
    "hevc": f"{X265}:bframes=0:open-gop=0",
    "hevcb": f"{X265}:bframes=3:open-gop=0",
    "hevcopen": f"{X265}:bframes=3:open-gop=1",
    "vp8": f"-c:v libvpx {VPX}",
    "vp8hidden": f"-c:v libvpx {HIDDEN}",
    "vp9": f"-c:v libvpx-vp9 {VPX}",
    "vp9hidden": f"-c:v libvpx-vp9 {HIDDEN}",
    "av1": "-c:v libaom-av1 -crf 10 -b:v 0 -g 10 -cpu-used 8 -usage realtime",
    "av1hidden": "-c:v libaom-av1 -crf 10 -b:v 0 -g 16 -cpu-used 8 -lag-in-frames 12",
    "mpeg1": "-c:v mpeg1video -q:v 2 -g 10 -bf 2",
    "mpeg2": "-c:v mpeg2video -q:v 2 -g 10 -bf 0",
    "mpeg2b": "-c:v mpeg2video -q:v 2 -g 10 -bf 2",
    "mpeg2fields": "-c:v mpeg2video -q:v 2 -g 10 -bf 2 -flags +ilme+ildct",
    "mpeg4": "-c:v mpeg4 -q:v 2 -g 10 -bf 0",
    "mpeg4b": "-c:v mpeg4 -q:v 2 -g 10 -bf 2",
    "xvid": "-c:v libxvid -q:v 2 -g 10 -bf 2",
    "msmpeg4": "-c:v msmpeg4 -q:v 2 -g 10",
    "mjpeg": "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p",
    "prores": "-c:v prores_ks -profile:v 0 -pix_fmt yuv422p10le",
    "png": "-c:v png -pix_fmt rgb24",
    "theora": "-c:v libtheora -q:v 8 -g 10",
    "ffv1": "-c:v ffv1 -g 10",
    "gif": "-c:v gif -pix_fmt rgb8 -r 25",
}
ENCODED = {
    "mp4": "h264 h264b h264open h264long h264refresh h264fields h264deep hevc hevcb hevcopen vp9 "
    "vp9hidden av1 av1hidden mpeg1 mpeg2 mpeg2b mpeg4 mpeg4b xvid mjpeg",
    "mov": "h264b h264open hevcb hevcopen mpeg2b mpeg2fields mpeg4b mjpeg prores png",
    "mkv": "h264 h264b h264open h264refresh h264fields hevcb hevcopen vp8 vp8hidden vp9hidden "
    "av1hidden mpeg1 mpeg2b mpeg2fields mpeg4b xvid msmpeg4 mjpeg prores theora ffv1",
    "webm": "vp8 vp8hidden vp9 vp9hidden av1 av1hidden",
    "avi": "h264 h264b h264open h264long hevcb mpeg1 mpeg2b mpeg4 mpeg4b xvid msmpeg4 mjpeg vp8 "
    "ffv1",
    "ts": "h264 h264b h264open h264fields hevcb hevcopen mpeg1 mpeg2b mpeg2fields mpeg4b",
    "gif": "gif",
    "flv": "h264b",
    "ogg": "theora",
}
# Cut without encoding anew: from what, into what.
CUTS = {
    "mp4": (
        "mp4",
        "h264b h264open h264long h264refresh hevcb hevcopen mpeg1 mpeg2b mpeg4b vp9hidden",
    ),
    "mov": ("mov", "h264b h264open hevcopen mpeg2b mpeg2fields mpeg4b"),
    "mkv": ("mp4", "h264b h264open h264refresh hevcopen mpeg1 mpeg2b mpeg4b vp9hidden xvid"),
    "ts": ("ts", "h264b h264open h264fields hevcopen mpeg1 mpeg2b mpeg4b"),
    "avi": ("avi", "h264b h264open mpeg2b xvid"),
}
FAST = "-movflags +faststart"
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,900\nhello\n\n2\n00:00:19,000 --> 00:00:25,000\nbye\n"
THIRDS = "select='not(mod(n,3)*mod(n,7))'"
SINE = "-f lavfi -i sine=d=3"


@dataclass(frozen=True)
class Recipe:
    """How `ffmpeg` makes a video.

    Attributes:
        arguments: its command line without the result; braces name other videos, or files, that it
            reads; empty where the files are only laid end to end.
        sources: those that are laid end to end, by name.
        stream: of the video streams, the one that counts.
        upright: taller than wide.
    """

    arguments: str = ""
    sources: tuple[str, ...] = ()
    stream: int = 0
    upright: bool = False


def recipes() -> dict[str, Recipe]:
    """All videos by their file names."""
    film = f"-f rawvideo -pix_fmt gray -s {WIDTH}x{HEIGHT} -r {RATE} -i {{film}}"
    found = {}
    for suffix, codecs in ENCODED.items():
        for codec in codecs.split():
            pixels = "" if "-pix_fmt" in CODECS[codec] else "-pix_fmt yuv420p"
            tag = "-vtag XVID" if suffix == "avi" and codec in ("mpeg4b", "xvid") else ""
            found[f"{codec}.{suffix}"] = Recipe(f"{film} {CODECS[codec]} {pixels} {tag}")
    for suffix, (source, codecs) in CUTS.items():
        for codec in codecs.split():
            fast = FAST if codec == "h264long" else ""
            cut = f"-ss 0.42 -i {{{codec}.{source}}} -c copy {fast}"
            found[f"cut-{codec}.{suffix}"] = Recipe(cut)
    return found | _remuxed() | _changing() | _several()


def _remuxed() -> dict[str, Recipe]:
    copy = "-i {h264b.mp4} -c copy"
    return {
        "cut-end.mp4": Recipe("-ss 0.2 -t 0.5 -i {h264b.mp4} -c copy"),
        "cut-of-ts.mp4": Recipe("-ss 0.42 -i {h264open.ts} -c copy"),
        "cut-of-avi.mp4": Recipe("-ss 0.42 -i {h264b.avi} -c copy"),
        "cut-twice.mp4": Recipe("-ss 0.2 -i {cut-h264b.mp4} -c copy"),
        "cut-fragmented.mp4": Recipe(
            "-ss 0.42 -i {h264b.mp4} -c copy -movflags frag_keyframe+empty_moov"
        ),
        "negative.mp4": Recipe(f"-ss 0.42 {copy} -avoid_negative_ts disabled"),
        "no-edit-list.mp4": Recipe(f"{copy} -use_editlist 0"),
        "negative-offsets.mp4": Recipe(f"{copy} -movflags negative_cts_offsets"),
        "fragmented.mp4": Recipe(f"{copy} -movflags frag_keyframe+empty_moov"),
        "fast.mp4": Recipe(f"{copy} {FAST}"),
        "late.mp4": Recipe(f"{copy} -output_ts_offset 5"),
        "late.mkv": Recipe(f"{copy} -output_ts_offset 5"),
        "wrap-around.ts": Recipe(f"{copy} -output_ts_offset 95443"),
        "of-avi.mkv": Recipe("-fflags +genpts -i {h264b.avi} -c copy"),
        "of-avi.mp4": Recipe("-i {h264b.avi} -c copy"),
        "of-ts.mkv": Recipe("-i {mpeg2b.ts} -c copy"),
        "of-mkv.avi": Recipe("-i {mpeg4b.mkv} -c copy"),
        "turned-90.mp4": Recipe("-display_rotation 90 -i {h264b.mp4} -c copy", upright=True),
        "turned-180.mov": Recipe("-display_rotation 180 -i {h264b.mp4} -c copy"),
        "turned-270.mkv": Recipe("-display_rotation -90 -i {h264b.mp4} -c copy", upright=True),
        "turned-cut.mp4": Recipe(
            "-display_rotation 90 -ss 0.42 -i {h264open.mp4} -c copy", upright=True
        ),
    }


def _changing() -> dict[str, Recipe]:
    """Rates and sizes that change."""
    x264 = "-c:v libx264 -g 6"
    found = {
        "rate.mp4": Recipe(f"-i {{h264.mp4}} -vf {THIRDS} -fps_mode vfr {x264} -bf 3"),
        "rate.mkv": Recipe(f"-i {{h264.mp4}} -vf {THIRDS} -fps_mode vfr {x264} -bf 3"),
        "rate.webm": Recipe(f"-i {{h264.mp4}} -vf {THIRDS} -fps_mode vfr {CODECS['vp9']}"),
        "rate.avi": Recipe(f"-i {{h264.mp4}} -vf {THIRDS} -fps_mode vfr {CODECS['mpeg4']}"),
        "rate-b.avi": Recipe(f"-i {{h264.mp4}} -vf {THIRDS} -fps_mode vfr {CODECS['mpeg4b']}"),
        "one.mp4": Recipe("-i {h264b.mp4} -frames:v 1 -c:v libx264"),
    }
    for name, frames in (("same-time", "-bf 0"), ("same-time-b", "-bf 2")):
        fine = "-vf settb=1/100000,setpts=N*10 -fps_mode passthrough -enc_time_base 1/100000"
        found[f"{name}.mkv"] = Recipe(f"-i {{h264.mp4}} {fine} {x264} {frames}")
    for codec, suffix in (("vp8", "webm"), ("vp9", "webm"), ("h264", "ts"), ("mpeg2b", "ts")):
        larger = (
            f"-i {{ffv1.mkv}} -vf scale=2*iw:-1:flags=neighbor {CODECS[codec]} -pix_fmt yuv420p"
        )
        found[f"large-{codec}.{suffix}"] = Recipe(larger)
        parts = (f"{codec}.{suffix}", f"large-{codec}.{suffix}", f"{codec}.{suffix}")
        found[f"size-{codec}.{suffix}"] = Recipe("-f concat -safe 0 -i {list} -c copy", parts)
    for codec in ("h264open", "hevcopen", "mpeg4b"):  # their ends overlap
        found[f"part-{codec}.mp4"] = Recipe(f"-ss 0.42 -t 0.3 -i {{{codec}.mp4}} -c copy")
        parts = (f"part-{codec}.mp4", f"part-{codec}.mp4")
        found[f"joined-{codec}.mp4"] = Recipe("-f concat -safe 0 -i {list} -c copy", parts)
    found["size-h264.mkv"] = Recipe("-i {size-h264.ts} -c copy")
    found["end-to-end.webm"] = Recipe("", ("vp8.webm", "large-vp8.webm"))
    found["end-to-end.mp4"] = Recipe("", ("h264b.mp4", "h264b.mp4"))
    return found


def _several() -> dict[str, Recipe]:
    """More than one stream."""
    video = "-i {h264b.mp4}"
    picture = "-map 0 -map 1 -frames:v:0 1 -c:v:0 png -disposition:v:0 attached_pic -c:v:1 copy"
    still = "-c:v libaom-av1 -cpu-used 8 -usage realtime -crf 10"
    return {
        "subtitles.mkv": Recipe(f"{video} -i {{subtitles}} -c copy -c:s srt"),
        "subtitles.mp4": Recipe(f"{video} -i {{subtitles}} -c copy -c:s mov_text"),
        "subtitles.mov": Recipe(f"{video} -i {{subtitles}} -c copy -c:s mov_text {FAST}"),
        "sound.mkv": Recipe(f"{video} {SINE} -c:v copy -c:a aac"),
        "sound.mp4": Recipe(f"{SINE} {video} -map 0 -map 1 -c:v copy -c:a aac {FAST}"),
        "sound.ts": Recipe(f"{video} {SINE} -c:v copy -c:a mp2 -shortest"),
        "cover.mp4": Recipe(f"-i {{ffv1.mkv}} {video} {picture}", stream=1),
        "two.mp4": Recipe(f"-i {{hevcb.mp4}} {video} -map 0 -map 1 -c copy"),
        "two.mkv": Recipe(
            f"-i {{hevcb.mp4}} {video} -map 0 -map 1 -c copy -disposition:v:0 0 "
            "-disposition:v:1 default",
            stream=1,
        ),
        "animated.avif": Recipe(f"-i {{h264.mp4}} {still}", stream=1),
    }


class OddVideos:
    """Makes videos, each when it is first asked for.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recipes = recipes()
        bits = np.arange(FRAMES)[:, None] >> np.arange(8) & 1
        blocks = (40 + 175 * bits).astype(np.uint8).reshape(-1, 2, 4)
        film = blocks.repeat(HEIGHT // 2, 1).repeat(WIDTH // 4, 2)
        (folder / "film").write_bytes(film.tobytes())
        (folder / "subtitles").write_text(SUBTITLES)

    def path(self, name: str) -> Path:
        """Returns where a video lies."""
        path = self._folder / name
        if path.exists():
            return path
        recipe = self._recipes[name]
        sources = [self.path(source) for source in recipe.sources]
        if not recipe.arguments:
            path.write_bytes(b"".join(source.read_bytes() for source in sources))
            return path
        listed = self._folder / f"{name}.list"
        listed.write_text("".join(f"file {source}\n" for source in sources))
        arguments = [
            str(listed if word == "{list}" else self.path(word[1:-1])) if word[0] == "{" else word
            for word in recipe.arguments.split()
        ]
        _ffmpeg(*arguments, str(path))
        return path

    def shown(self, name: str) -> tuple[np.ndarray, list[float]]:
        """Returns what `ffmpeg` shows of a video, and when.

        Returns:
            Thumbnails, grey, uint8 [T, H, W], and seconds after the first.
        """
        recipe = self._recipes[name]
        width, height = (SHORT, LONG) if recipe.upright else (LONG, SHORT)
        filters = f"showinfo,scale={width}:{height}:flags=area,format=gray"
        options = f"-map 0:v:{recipe.stream} -fps_mode passthrough -vf {filters} -f rawvideo"
        done = _ffmpeg("-i", str(self.path(name)), *options.split(), "-", level="info", check=False)
        times = [float(t) for t in re.findall(rb"pts_time:\s*(-?[0-9.]+)", done.stderr)]
        thumbnails = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width)
        return thumbnails, [time - times[0] for time in times]


def _ffmpeg(
    *arguments: str, level: str = "error", check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-hide_banner",
        "-loglevel",
        level,
        "-nostdin",
        "-y",
    ]
    single = ("-threads", "1", "-filter_threads", "1")
    done = subprocess.run([*command, *single, *arguments], capture_output=True, timeout=60)
    assert done.returncode == 0 or not check, done.stderr.decode()
    return done
