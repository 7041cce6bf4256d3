"""Reading tars, without Ray: members of every kind, damage, appended and joined archives."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from helpers.pipelines.sources import config, items_of, picture, read_source, write, write_tar
from pipelines.ingestion.reading.items import Item

MEMBERS = [
    ("0001.jpg", b"1"),
    ("0001.cls", b"7"),
    ("0002.json", json.dumps({"label": "dog", "caption": "x"}).encode()),
    ("0002.left.png", b"2"),
    ("0002.right.png", b"3"),
    ("cat/0003.webp", b"4"),
    ("cat/0003.txt", b"a caption"),
    ("./0004.jpeg", b"5"),
]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")]
)
def test_tar_labels(tmp_path: Path, name: str, mode: str) -> None:
    tar = write_tar(tmp_path / name, MEMBERS, mode)
    items = items_of(config(tmp_path))
    assert [(item.uri, item.data, item.label) for item in items] == [
        (f"{tar}#0001.jpg", b"1", 7),
        (f"{tar}#0002.left.png", b"2", "dog"),
        (f"{tar}#0002.right.png", b"3", "dog"),
        (f"{tar}#cat/0003.webp", b"4", "cat"),
        (f"{tar}#./0004.jpeg", b"5", None),
    ]


def test_tars_in_name_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c/a.tar"):
        write_tar((write(tmp_path / name)), [("x.jpg", name.encode())])
    assert [i.data for i in items_of(config(tmp_path))] == [b"a.tar", b"b.tar", b"c/a.tar"]


def test_damaged_header_keeps_what_stands_before_and_is_reported(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes([i])) for i in range(4)])
    data = bytearray(tar.read_bytes())
    data[2 * 1024 + 100] ^= 0xFF  # the mode field of the third header (512 header, 512 data)
    tar.write_bytes(data)
    items = items_of(config(tar))
    assert [item.uri for item in items] == [f"{tar}#0.jpg", f"{tar}#1.jpg", str(tar)]
    assert items[-1].problem is not None
    reason, detail = items[-1].problem
    assert reason == "corrupt_archive"
    assert "bad member header" in detail
    assert "after 2 images" in detail


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_off_tar_is_reported(tmp_path: Path, mode: str) -> None:
    members = [(f"{i}.jpg", bytes([i]) * 40_000) for i in range(4)]
    name = "a.tar" if mode == "w" else "a.tar.gz"
    tar = write_tar(tmp_path / name, members, mode)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 5 // 8])
    items = items_of(config(tar))
    assert [item.problem is None for item in items[:-1]] == [True] * (len(items) - 1)
    assert 1 <= len(items) - 1 < 4
    assert items[-1].problem is not None
    assert items[-1].problem[0] == "corrupt_archive"


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_reported(tmp_path: Path, data: bytes) -> None:
    tar = write(tmp_path / "a.tar", data)
    (item,) = items_of(config(tar))
    assert item.uri == str(tar)
    assert item.problem is not None
    assert item.problem[0] == "corrupt_archive"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_joined_archives_are_read_to_the_end(tmp_path: Path, mode: str) -> None:
    """As `cat a.tar b.tar` makes them: equal names in them are different samples."""
    parts = [
        [("0.png", picture(1)), ("0.cls", b"1"), ("1.png", picture(2)), ("1.cls", b"2")],
        [("0.png", picture(3)), ("1.cls", b"4"), ("1.png", picture(4))],
        [("2.png", picture(5)), ("0.cls", b"3")],
    ]
    paths = [write_tar(tmp_path / f"{i}", part, mode) for i, part in enumerate(parts)]
    joined = write(tmp_path / "all" / "all.tar", b"".join(path.read_bytes() for path in paths))
    items, tally = read_source(config(joined))
    assert [(item.uri.removeprefix(str(joined)), item.data, item.label) for item in items] == [
        *(("#0.png", picture(1), 1), ("#1.png", picture(2), 2)),
        *(("#0.png#2", picture(3), 3), ("#1.png#2", picture(4), 4)),
        ("#2.png", picture(5), None),
    ]
    assert tally.ignored == {"label": 4}


def test_zstd_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "plain", [("0.png", picture(1)), ("0.cls", b"1")]).read_bytes()
    frames = b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (tar, tar))
    items = items_of(config(write(tmp_path / "a.tar.zst", frames)))
    assert [(item.data, item.label) for item in items] == [(picture(1), 1)] * 2


def test_appended_members_are_read_beside_those_of_their_name(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("d/x.png", picture(0)), ("d/y.png", picture(1))])
    write_tar(tar, [("d/x.png", picture(2)), ("d/x.png", picture(3))], "a")
    items = items_of(config(tar))
    assert [item.uri.partition("#")[2] for item in items] == [
        *("d/x.png", "d/y.png", "d/x.png#2", "d/x.png#3")
    ]
    assert [item.data for item in items] == [picture(i) for i in range(4)]


def add_link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def test_links_inside_are_the_members_they_lead_to(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("d/0.png", picture(0)), ("d/0.cls", b"5")])
    write_tar(path, [("d/1.png", picture(1))], "a")
    with tarfile.open(path, "a") as tar:
        add_link(tar, "d/1.cls", "d/0.cls", tarfile.LNKTYPE)
        add_link(tar, "e/2.png", "../d/0.png")
        add_link(tar, "e/3.png", "/etc/passwd")
        add_link(tar, "latest", "e")
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    items, tally = read_source(config(path))
    assert {item.uri.partition("#")[2]: (item.label, item.problem) for item in items} == {
        "d/0.png": (5, None),
        "d/1.png": (5, None),
        "e/3.png": (None, ("unreadable", "a link to '/etc/passwd', which is not in this archive")),
        "pipe.png": (None, ("unreadable", "no regular file")),
    }
    assert tally.ignored == {"label": 2, "link": 2}


def test_large_members_are_not_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.png", bytes(201)), ("2.cls", b"7" * 201)])
    write_tar(tar, [("2.png", picture(2)), ("weights.pt", bytes(201))], "a")
    items, tally = read_source(config(tar, max_bytes=200))
    assert [item.problem and item.problem[0] for item in items] == ["too_many_bytes", None]
    assert items[1].label_problem == (*("too_many_bytes", "201 is over the limit of 200 bytes"),)
    assert tally.ignored == {".pt": 1, "label": 1}


def test_what_a_mac_adds_is_passed_over(tmp_path: Path) -> None:
    double = b"\x00\x05\x16\x07" + bytes(20)
    members = [("./._0.cls", double), ("./0.cls", b"1"), ("./._0.png", double)]
    members += [("./0.png", picture(0)), ("./.DS_Store", double), ("__MACOSX/._0.png", double)]
    members += [
        ("__MACOSX/0.png", double),
        ("PaxHeaders.7/0.png", b"30 mtime=1"),
        ("a/.b/c.png", b""),
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    items, tally = read_source(config(tar))
    assert items == [Item(f"{tar}#./0.png", picture(0), 1)]
    assert tally.ignored == {"label": 1, "hidden": 7}


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    names = ["\u732b/\u732b.png", "caf\xe9/caf\xe9.png", "\u30c6\u30b9\u30c8/\u8868.png"]
    encodings = ["gbk", "latin-1", "shift_jis"]
    path = tmp_path / "a.tar"
    for index, (name, encoding) in enumerate(zip(names, encodings, strict=True)):
        with tarfile.open(
            tmp_path / encoding, "w", format=tarfile.GNU_FORMAT, encoding=encoding
        ) as tar:
            for member, data in ((name, picture(index)), (name[:-3] + "cls", b"%d" % index)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with path.open("ab") as file:
            file.write((tmp_path / encoding).read_bytes())
    items = items_of(config(path))
    assert [(item.data, item.label) for item in items] == [(picture(i), i) for i in range(3)]


def test_formats_are_known_by_content_and_the_rest_is_counted(tmp_path: Path) -> None:
    ppm = b"P6 2 2 255\n" + bytes(12)
    members = [("0.ppm", ppm), ("1.avif", picture(1, "AVIF")), ("2.jp2", picture(2, "JPEG2000"))]
    members += [("3", picture(3)), ("4.img", picture(4)), ("5.pyd", picture(5, "JPEG"))]
    members += [("5.npy", b"\x93NUMPY"), ("5.txt", b"a caption"), ("README", b"BM is not a bitmap")]
    tar = write_tar(tmp_path / "a.tar", members)
    items, tally = read_source(config(tar))
    assert [item.uri.partition("#")[2] for item in items] == [name for name, _ in members[:6]]
    assert [item.data for item in items] == [data for _, data in members[:6]]
    assert tally.ignored == {".npy": 1, ".txt": 1, "no suffix": 1}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("options", [["--format=gnu", "-V", "a volume"], ["--format=posix"]])
def test_archives_of_gnu_tar(tmp_path: Path, options: list[str]) -> None:
    """A sparse file, a hard link, a long name, a volume label; twice, joined."""
    root = tmp_path / "set"
    data = picture(1) + bytes(300_000)  # PNG readers stop before the zeros
    write(root / "cat" / "0.png", picture(0))
    sparse = write(root / "cat" / "1.png", picture(1))
    with sparse.open("r+b") as file:
        file.truncate(len(data))
    (root / "cat" / "2.png").hardlink_to(root / "cat" / "0.png")
    long = "n" * 80
    write(root / "dog" / long / long / "3.png", picture(3))
    command = ["tar", *options, "--sparse", "--sort=name", "-C", str(root), "-cf"]
    archive = tmp_path / "a.tar"
    subprocess.run([*command, str(archive), "."], check=True)
    archive.write_bytes(archive.read_bytes() * 2)
    items, tally = read_source(config(archive))
    assert [(item.data, item.label) for item in items] == [
        *((picture(0), "cat"), (data, "cat"), (picture(3), long)),
    ] * 2
    volume = {"special file": 2} if "-V" in options else {}
    assert tally.ignored == {"folder": 10, "link": 2, **volume}


def test_incremental_archives_keep_their_names(tmp_path: Path) -> None:
    """GNU tar writes times where other tars have the beginning of a long name."""
    write(tmp_path / "set" / "d" / "0.png", picture(0))
    write(tmp_path / "set" / "d" / "0.cls", b"3")
    os.utime(tmp_path / "set" / "d" / "0.cls", (1, 1))
    archive = tmp_path / "a.tar"
    snapshot = f"--listed-incremental={tmp_path}/snapshot"
    command = ["tar", "-C", str(tmp_path / "set"), "-cf", str(archive), snapshot, "d"]
    subprocess.run(command, check=True)
    items, tally = read_source(config(archive))
    assert items == [Item(f"{archive}#d/0.png", picture(0), 3)]
    assert tally.ignored == {"label": 1, "special file": 1}


def test_odd_names(tmp_path: Path) -> None:
    names = [
        "cat\\0.png",
        "/abs/1.png",
        "../../2.png",
        "a//b/../3.png",
        "h#a#4.png",
        "new\nline/5.png",
    ]
    tar = write_tar(tmp_path / "a.tar", [(name, picture(i)) for i, name in enumerate(names)])
    items = items_of(config(tar))
    assert [item.uri for item in items] == [f"{tar}#{name}" for name in names]
    assert [item.label for item in items] == ["cat", "abs", None, "a", None, "new\nline"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.lz4", "a.7z", "a.tar.Z"])
def test_other_archives_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"PK\3\4")
    with pytest.raises(ValueError, match=rf"unpack .*{name}, or pack it as \.tar"):
        items_of(config(tmp_path))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_damaged_is_told_and_raises_nothing(tmp_path: Path, seed: int) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(4)] + [(f"{i}.cls", b"1") for i in range(4)]
    mode, suffix = [("w", ""), ("w:gz", ".gz"), ("w:bz2", ".bz2"), ("w:xz", ".xz")][seed % 4]
    tar = write_tar(tmp_path / f"a.tar{suffix}", members, mode)
    data, rng = bytearray(tar.read_bytes()), random.Random(seed)
    start = rng.randrange(min(len(data), 8000))
    data[start : start + 8] = rng.randbytes(8)
    tar.write_bytes(data)
    items = items_of(config(tar))
    changed = [item for item in items if item.problem or item.data not in dict(members).values()]
    same_names = {item.uri.partition("#")[2] for item in items} == {f"{i}.png" for i in range(4)}
    assert changed or not same_names or mode == "w"  # in padding, or in a label
