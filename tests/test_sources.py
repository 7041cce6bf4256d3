"""Listing and reading every kind of source, without Ray."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import IngestConfig
from pipelines.readers import Item, as_label, read_chunk
from pipelines.sources import CHUNK_ITEMS, Listing, list_source, raise_if_unreachable
from pipelines.staging import chunk_from_json, chunk_to_json


def config(source: object, **changes: object) -> IngestConfig:
    return IngestConfig(source=str(source), out="/nowhere/out", **changes)  # type: ignore[arg-type]


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def items_of(cfg: IngestConfig) -> list[Item]:
    chunks = list_source(cfg).chunks
    assert [chunk_from_json(chunk_to_json(chunk)) for chunk in chunks] == list(chunks)
    return [item for chunk in chunks for item in read_chunk(chunk, cfg)]


def labels_by_name(items: list[Item]) -> dict[str, object]:
    return {item.uri.rpartition("/")[2]: item.label for item in items}


# -------------------------------------------------------------------------------- folders


def test_folder_labels_are_the_nearest_folders(tmp_path: Path) -> None:
    for name in ("a.jpg", "cat/b.png", "train/dog/c.webp", "train/cat/no_suffix"):
        write(tmp_path / name)
    assert labels_by_name(items_of(config(tmp_path))) == {
        **{"a.jpg": None, "b.png": "cat"},
        **{"c.webp": "dog", "no_suffix": "cat"},
    }


def test_folder_passes_over_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("a.JPG", "README.md", ".DS_Store", ".cache/x.jpg", "labels.json", "out/old.jpg"):
        write(tmp_path / name)
    cfg = IngestConfig(source=str(tmp_path), out=str(tmp_path / "out"))
    listing = list_source(cfg)
    assert (listing.num_items, listing.ignored) == (1, 2)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["part-0.snappy.parquet", "_SUCCESS"], "parquet"),
        (["a.tar", "LICENSE"], "webdataset"),
        (["a.tar", "b.parquet", "LICENSE"], "webdataset"),
        (["d41d8cd9", "README.md"], "folder"),
        (["a.jpg", "b.parquet", "_SUCCESS"], "folder"),
    ],
)
def test_auto_takes_names_without_a_suffix_last(
    names: list[str], kind: str, tmp_path: Path
) -> None:
    for name in names:
        write(tmp_path / name)
    assert list_source(config(tmp_path)).kind == kind
    if "_SUCCESS" in names or "LICENSE" in names:  # asked for, they are images
        assert list_source(config(tmp_path, format="folder")).kind == "folder"


def test_names_with_glob_characters_and_spaces_are_read(tmp_path: Path) -> None:
    names = ["a[1].jpg", "b*.jpg", "c d.jpg", "e?.jpg", "f#1.jpg", "\u00fc.jpg", "g::h.jpg"]
    for name in names:
        write(tmp_path / "x" / name, name.encode())
    items = items_of(config(tmp_path))
    assert {item.data.decode() for item in items} == set(names)
    assert all(item.uri.endswith(item.data.decode()) for item in items)


def test_glob_takes_only_what_it_matches(tmp_path: Path) -> None:
    for name in (".hidden/one/a.jpg", ".hidden/two/b.jpg", ".hidden/two/b.png"):
        write(tmp_path / name)
    items = items_of(config(tmp_path / ".hidden" / "*" / "*.jpg"))
    assert labels_by_name(items) == {"a.jpg": "one", "b.jpg": "two"}


def test_single_file_is_a_source(tmp_path: Path) -> None:
    items = items_of(config(write(tmp_path / "cat" / "a.jpg")))
    assert labels_by_name(items) == {"a.jpg": None}


def test_order_mixes_classes_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    def listed(root: Path) -> list[str]:
        for index in range(200):
            write(root / f"class{index % 2}" / f"{index:03d}.jpg")
        chunks = list_source(config(root)).chunks
        return [e.path.removeprefix(str(root)) for chunk in chunks for e in chunk.entries]

    order = listed(tmp_path / "here")
    assert order == listed(tmp_path / "there" / "deeper")
    first_half = [path.startswith("/class0") for path in order[:100]]
    assert 30 < sum(first_half) < 70


def test_new_file_changes_one_chunk(tmp_path: Path) -> None:
    for index in range(3 * CHUNK_ITEMS):
        write(tmp_path / f"{index}.jpg")
    before = set(list_source(config(tmp_path)).chunks)
    assert len(before) == 4
    write(tmp_path / "new.jpg")
    assert len(before - set(list_source(config(tmp_path)).chunks)) == 1


def test_large_files_are_not_read_and_lost_ones_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "large.jpg", bytes(101))
    write(tmp_path / "limit.jpg", bytes(100))
    gone = write(tmp_path / "gone.jpg")
    (tmp_path / "link.jpg").symlink_to("/nonexistent")
    cfg = config(tmp_path, max_bytes=100)
    chunks = list_source(cfg).chunks
    gone.unlink()
    items = {item.uri.rpartition("/")[2]: item for c in chunks for item in read_chunk(c, cfg)}
    assert items["limit.jpg"].problem is None
    assert items["large.jpg"].problem == ("too_many_bytes", "101 is over the limit of 100 bytes")
    assert items["gone.jpg"].problem == (
        "unreadable",
        "FileNotFoundError: No such file or directory",
    )
    assert items["link.jpg"].problem is not None
    assert items["link.jpg"].problem[0] == "unreadable"


def test_nothing_to_read_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--source: no images, tars or Parquet .* \(0 files"):
        list_source(config(tmp_path / "missing"))
    write(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"\(1 files there\)"):
        list_source(config(tmp_path))
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no webdataset found"):
        list_source(config(tmp_path, format="webdataset"))


@pytest.mark.parametrize(
    "error", [ConnectionError(), TimeoutError(), OSError(16, "busy"), KeyError()]
)
def test_storage_failures_stop_the_job(error: Exception) -> None:
    with pytest.raises(type(error)):
        raise_if_unreachable(error)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), FileNotFoundError(2, "no"), OSError(5, "no")]
)
def test_failures_of_one_object_do_not(error: Exception) -> None:
    raise_if_unreachable(error)


# -------------------------------------------------------------------------------- tars


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


@pytest.mark.parametrize(
    ("name", "data"),
    [("1.cls", b"\xff\xfe"), ("1.json", b"{"), ("1.json", b"[1]"), ("1.json", b'{"cls": 1.5}')],
)
def test_bad_label_is_a_problem_of_its_images(tmp_path: Path, name: str, data: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), (name, data), ("2.jpg", b"y")])
    first, second = items_of(config(tar))
    assert first.problem is not None
    assert first.problem[0] == "bad_label"
    assert second == Item(f"{tar}#2.jpg", b"y")


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


def test_members_that_are_links_or_too_large(tmp_path: Path) -> None:
    tar_path = tmp_path / "a.tar"
    with tarfile.open(tar_path, "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        large = tarfile.TarInfo("1.jpg")
        large.size = 101
        tar.addfile(large, io.BytesIO(bytes(101)))
    items = items_of(config(tar_path, max_bytes=100))
    assert [item.problem and item.problem[0] for item in items] == ["unreadable", "too_many_bytes"]


# -------------------------------------------------------------------------------- Parquet


def test_parquet_bytes_and_hugging_face_structs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0", None], "label": [3, -1]}), tmp_path / "a.parquet")
    struct = [{"bytes": b"2", "path": "x"}, {"bytes": None, "path": "y"}]
    pq.write_table(pa.table({"image": struct, "label": ["dog", None]}), tmp_path / "b.parquet")
    items = items_of(config(tmp_path))
    uris = [f"{tmp_path}/{n}.parquet#row={r}" for n in "ab" for r in (0, 1)]
    missing = ("missing_image", "the row has no image bytes")
    assert items == [
        Item(uris[0], b"0", 3),
        Item(uris[1], problem=missing),
        Item(uris[2], b"2", "dog"),
        Item(uris[3], problem=missing),
    ]


def test_parquet_of_many_row_groups_keeps_row_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sources.CHUNK_BYTES", 1)
    table = pa.table({"jpg": [str(i).encode() for i in range(300)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    cfg = config(tmp_path, image_column="jpg")
    assert len(list_source(cfg).chunks) == 3
    items = items_of(cfg)
    assert [item.data for item in items] == table["jpg"].to_pylist()
    assert [item.uri.rpartition("=")[2] for item in items] == [str(i) for i in range(300)]
    assert {item.label for item in items} == {None}


def test_declared_class_names_are_taken(tmp_path: Path) -> None:
    feature = {"names": ["zebra", "ant"], "_type": "ClassLabel"}
    meta = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pa.table({"image": [b"0"], "label": [1]}).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "a.parquet")
    listing: Listing = list_source(config(tmp_path))
    assert listing.classes == ("zebra", "ant")


def test_parquet_without_the_column_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"0"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"--image-column: .*a\.parquet has only .*'picture'"):
        list_source(config(tmp_path))


def test_parquet_that_is_none_or_is_damaged_loses_no_row(tmp_path: Path) -> None:
    good = tmp_path / "good.parquet"
    pq.write_table(
        pa.table({"image": [bytes([i]) * 5000 for i in range(200)]}),
        good,
        row_group_size=100,
        compression="ZSTD",
        use_dictionary=False,
    )
    column = pq.ParquetFile(good).metadata.row_group(1).column(0)
    data = bytearray(good.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 40] = bytes(40)
    good.write_bytes(data)
    write(tmp_path / "none.parquet", b"no parquet")
    items = items_of(config(tmp_path))
    assert [item.problem is None for item in items] == [True] * 100 + [False] * 101
    assert {item.problem[0] for item in items if item.problem} == {"corrupt_archive"}


def test_parquet_that_vanishes_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"0"] * 5}), path, row_group_size=2)
    cfg = config(tmp_path)
    (chunk,) = list_source(cfg).chunks
    path.unlink()
    items = list(read_chunk(chunk, cfg))
    assert [item.problem and item.problem[0] for item in items] == ["unreadable"] * 5


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((None, None), ("", None), (-1, None), ("-1", None)),
        *((0, 0), ("7", 7), ("07", 7), (2**20 - 1, 2**20 - 1)),
        *(("cat", "cat"), (2**20, "1048576"), ("1e3", "1e3"), ("--1", "--1")),
    ],
)
def test_as_label(value: object, label: object) -> None:
    assert as_label(value) == label


@pytest.mark.parametrize("value", [1.5, True, [1], {"a": 1}])
def test_as_label_refuses(value: object) -> None:
    with pytest.raises(ValueError, match="neither an integer nor text"):
        as_label(value)
