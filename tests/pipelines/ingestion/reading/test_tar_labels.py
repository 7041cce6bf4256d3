"""Which label of a tar belongs to which image, wherever the two lie."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from helpers.pipelines.sources import config, labels_by_name, picture, read_source, write_tar
from pipelines.config.ingest import IngestConfig

Members = list[tuple[str, bytes]]


def labels(tmp_path: Path, members: Members, **changes: object) -> dict[str, object]:
    tar = write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(config(tar, **changes))
    return labels_by_name(items)


def test_names_with_dots_keep_their_own_labels(tmp_path: Path) -> None:
    members: Members = []
    for index in range(6):
        stem = f"s{index // 2}.{index % 2}"
        members += [(f"{stem}.png", picture(index)), (f"{stem}.cls", b"%d" % index)]
    members += [("shot_1.0s.jpg", b"x"), ("shot_1.0s.json", b'{"label": 7}')]
    members += [("shot_1.5s.jpg", b"x"), ("shot_1.5s.json", b'{"label": 8}')]
    found = {f"s{i // 2}.{i % 2}.png": i for i in range(6)}
    assert labels(tmp_path, members) == found | {"shot_1.0s.jpg": 7, "shot_1.5s.jpg": 8}


def test_the_longest_stem_that_fits_wins(tmp_path: Path) -> None:
    members: Members = [("x.cls", b"1"), ("x.left.cls", b"2"), ("x.left.png.cls", b"3")]
    members += [(name, b"x") for name in ("x.left.png", "x.left.jpg", "x.right.png", "x.png")]
    assert labels(tmp_path, members) == {
        **{"x.left.png": 3, "x.left.jpg": 2, "x.right.png": 1, "x.png": 1}
    }


ORDERS = ["images first", "labels first", "reversed", "shuffled", "by suffix"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_labels_count_wherever_they_lie(tmp_path: Path, order: str, suffix: str) -> None:
    pairs: list[Members] = []
    for index in range(20):
        text = b"%d" % index if suffix == "cls" else b'{"label": %d}' % index
        pairs.append([(f"train/{index}.png", picture(index)), (f"train/{index}.{suffix}", text)])
    members = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    if order == "labels first":
        members = members[20:] + members[:20]
    elif order == "reversed":
        members.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(members)
    elif order == "by suffix":
        members.sort(key=lambda member: member[0].rpartition(".")[2])
    assert labels(tmp_path, members) == {f"{index}.png": index for index in range(20)}


def test_suffixes_in_any_case_and_byte_order_marks(tmp_path: Path) -> None:
    members: Members = [("0.JPG", b"x"), ("0.CLS", b"\xef\xbb\xbf0"), ("1.Png", b"x")]
    members += [("1.Json", '\ufeff{"label": "cat"}'.encode()), ("2.JPEG", b"x")]
    members += [("2.cLs", "5".encode("utf-16"))]
    assert labels(tmp_path, members) == {"0.JPG": 0, "1.Png": "cat", "2.JPEG": 5}


def test_label_files_without_image_are_counted_and_no_folder_stands_in(tmp_path: Path) -> None:
    members: Members = [(f"images/{i}.png", picture(i)) for i in range(3)]
    members += [(f"labels/{i}.cls", b"1") for i in range(6)]
    members += [("cat/9.png", picture(9)), ("cat/9.txt", b"a caption"), ("cat/9.json", b"{}")]
    tar = write_tar(tmp_path / "a.tar", members)
    items, tally = read_source(config(tar))
    assert labels_by_name(items) == {"0.png": None, "1.png": None, "2.png": None, "9.png": "cat"}
    assert tally.ignored == {"label without image": 6, ".txt": 1, ".json": 1}


def test_an_image_without_label_gets_no_neighbours(tmp_path: Path) -> None:
    members: Members = [("d/s.0.png", picture(0)), ("d/s.1.png", picture(1)), ("d/s.1.cls", b"1")]
    members += [("d/t.png", picture(2)), ("d/u.a.png", picture(3)), ("d/u.b.cls", b"2")]
    members += [("d/v.a.png", picture(4)), ("d/v.b.cls", b"3"), ("d/v.c.json", b'{"cls": 4}')]
    tar = write_tar(tmp_path / "a.tar", members)
    items, tally = read_source(config(tar))
    found = {item.uri.rpartition("/")[2]: (item.label, item.label_problem) for item in items}
    none = "label files of its sample is named after it"
    assert found == {
        "s.0.png": (None, ("no_fitting_label", f"none of 1 {none}")),
        "s.1.png": (1, None),
        "t.png": (None, None),
        "u.a.png": (2, None),  # the only label file of its sample, as in WebDataset
        "v.a.png": (None, ("no_fitting_label", f"none of 2 {none}")),
    }
    assert tally.ignored == {"label": 2, "label without image": 2}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("1.cls", b"caf\xe9", "label_no_text"),
        ("1.json", b"{", "label_broken_json"),
        ("1.json", b"[1]", "label_not_understood"),
        ("1.json", b'{"cls": 1.5}', "label_not_understood"),
        ("1.json", b'{"label": {"id": 3}}', "label_not_understood"),
    ],
)
def test_a_label_never_costs_its_image(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), (name, data), ("2.jpg", b"y")])
    (first, second), _ = read_source(config(tar))
    assert (first.data, first.label, first.problem) == (b"x", None, None)
    assert first.label_problem is not None
    assert first.label_problem[0] == reason
    assert name in first.label_problem[1]
    assert (second.data, second.label, second.label_problem) == (b"y", None, None)


def test_a_good_label_file_stands_in_for_a_bad_one(tmp_path: Path) -> None:
    members: Members = [("1.jpg", b"x"), ("1.json", b'{"label": "cat"}'), ("1.cls", b"caf\xe9")]
    members += [("2.jpg", b"x"), ("2.json", b'{"label": 1}'), ("2.cls", b"2")]
    assert labels(tmp_path, members) == {"1.jpg": "cat", "2.jpg": 2}


def test_equal_names_pair_in_their_order(tmp_path: Path) -> None:
    """As `tar --append` of a second set leaves them, or of new labels."""
    members: Members = [("0.png", picture(0)), ("0.cls", b"0"), ("0.png", picture(1))]
    members += [("0.cls", b"1"), ("1.png", picture(2)), ("1.cls", b"2"), ("1.cls", b"3")]
    members += [("2.png", picture(3)), ("2.png", picture(4)), ("2.cls", b"5")]
    members += [
        ("3.png", picture(5)),
        ("3.png", picture(6)),
        *[("3.cls", b"%d" % i) for i in (1, 2, 3)],
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(config(tar))
    assert [item.label for item in items] == [0, 1, 3, 5, 5, None, None]
    assert [item.label_problem and item.label_problem[0] for item in items[5:]] == [
        "no_fitting_label"
    ] * 2


def test_labels_of_an_archive_of_their_own(tmp_path: Path) -> None:
    images = write_tar(
        tmp_path / "i", [("0.png", picture(0)), ("1.png", picture(1)), ("1.cls", b"7")]
    )
    label_files = write_tar(tmp_path / "l", [("1.cls", b"1"), ("0.cls", b"0")])
    both = tmp_path / "both.tar"
    both.write_bytes(images.read_bytes() + label_files.read_bytes())
    items, tally = read_source(config(both))
    assert labels_by_name(items) == {"0.png": 0, "1.png": 7}
    assert tally.ignored == {"label": 2, "label without image": 1}


# ------------------------------------------------------------------ several pictures a sample


def sample(index: int, *names: str) -> Members:
    numbered = enumerate(names, start=index * 10)
    members = [(f"{index:03d}.{name}", picture(number)) for number, name in numbered]
    return [*members, (f"{index:03d}.json", b'{"label": %d}' % index)]


@pytest.mark.parametrize(
    ("names", "wanted", "kept"),
    [
        (("jpg", "seg.png"), ("jpg",), ["jpg"]),
        (("jpg", "seg.png"), ("seg.png",), ["seg.png"]),
        (("JPG", "seg.PNG"), ("*.jpg",), ["JPG"]),
        (("png", "seg.png"), ("png",), ["png"]),
        (("depth.png", "png"), (".png",), ["png"]),
        (("png", "seg.png"), ("png", "seg.png"), ["png", "seg.png"]),
        (("input.png", "target.png"), ("input.png",), ["input.png"]),
        (("png", "seg.png", "jpg"), ("jpg", "png"), ["png", "jpg"]),
        (("a.jpg", "b.jpg", "c.png"), ("jpg",), ["a.jpg", "b.jpg"]),
    ],
)
def test_image_member_chooses(
    tmp_path: Path, names: tuple[str, ...], wanted: tuple[str, ...], kept: list[str]
) -> None:
    members = [member for index in range(3) for member in sample(index, *names)]
    tar = write_tar(tmp_path / "a.tar", members)
    items, tally = read_source(config(tar, image_member=wanted))
    found = [item.uri.partition("#")[2] for item in items]
    assert found == [f"{index:03d}.{name}" for index in range(3) for name in kept]
    assert [item.label for item in items] == [i for i in range(3) for _ in kept]
    others = 3 * (len(names) - len(kept))
    assert tally.ignored == {"label": 3} | ({"other picture": others} if others else {})
    assert not tally.notes


def test_image_member_of_names_with_dots(tmp_path: Path) -> None:
    members: Members = []
    for index in range(4):
        stem = f"s{index // 2}.{index % 2}"
        members += [(f"{stem}.png", picture(index)), (f"{stem}.seg.png", picture(10 + index))]
        members += [(f"{stem}.cls", b"%d" % index)]
    found = labels(tmp_path, members, image_member=("png",))
    assert found == {f"s{i // 2}.{i % 2}.png": i for i in range(4)}


def test_samples_of_several_images_are_told_of(tmp_path: Path) -> None:
    several = [member for index in range(3) for member in sample(index, "jpg", "seg.png")]
    single: Members = [(f"t{i}.0.png", b"x") for i in range(3)]
    own = [(f"u.{i}.{kind}", b"1") for i in range(3) for kind in ("png", "cls")]
    frames: Members = [(f"frame.{i:04d}.png", b"x") for i in range(40)]
    tar = write_tar(tmp_path / "a.tar", several + single + own + frames)
    _, tally = read_source(config(tar))
    assert tally.notes == {"images that share a sample": 6}


@pytest.mark.parametrize("pattern", ["", ".", "a/b.jpg", "*"])
def test_image_member_must_be_an_ending(pattern: str) -> None:
    with pytest.raises(ValueError, match="--image-member"):
        IngestConfig(source="x", out="y", image_member=(pattern,))
