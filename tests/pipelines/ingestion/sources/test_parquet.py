"""Listing and reading Parquet files, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.pipelines.sources import config, items_of, write
from pipelines.ingestion.listing.parquet_listing import merge_classes
from pipelines.ingestion.reading.items import Item
from pipelines.ingestion.sources.registry import list_source, read_chunk
from pipelines.ingestion.sources.source_type import Listing


def test_parquet_bytes_and_hugging_face_structs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0", None], "label": [3, -1]}), tmp_path / "a.parquet")
    struct = [{"bytes": b"2", "path": "x"}, {"bytes": None, "path": "y"}]
    pq.write_table(pa.table({"image": struct, "label": ["dog", None]}), tmp_path / "b.parquet")
    items = items_of(config(tmp_path))
    uris = [f"{tmp_path}/{n}.parquet#row={r}" for n in "ab" for r in (0, 1)]
    reason = "missing_image"
    assert items == [
        Item(uris[0], b"0", 3),
        Item(uris[1], problem=(reason, "the row has no image bytes")),
        Item(uris[2], b"2", "dog"),
        Item(uris[3], problem=(reason, "nothing at 'y'")),
    ]


def test_parquet_of_many_row_groups_keeps_row_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ingestion.sources.parquet.CHUNK_BYTES", 1)
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


def test_a_damaged_column_name_costs_its_file_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0"], "spoilt": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "b.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"spoilt", b"\xff\xfeoilt"))
    first, second = items_of(config(tmp_path))
    assert first.problem is not None
    assert first.problem[0] == "corrupt_archive"
    assert second.data == b"1"


def test_parquet_that_vanishes_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"0"] * 5}), path, row_group_size=2)
    cfg = config(tmp_path)
    (chunk,) = list_source(cfg).chunks
    path.unlink()
    items = list(read_chunk(chunk, cfg))
    assert [item.problem and item.problem[0] for item in items] == ["unreadable"] * 5


# ------------------------------------------------------------------ columns


def test_a_label_column_that_was_named_must_be_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0"], "class_id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"--label-column: .*a\.parquet has no column 'class_idd'"):
        list_source(config(tmp_path, label_column="class_idd"))
    with pytest.raises(ValueError, match=r"'label', only \['image', 'class_id'\]"):
        list_source(config(tmp_path, label_column="label"))
    (note,) = list_source(config(tmp_path)).notes
    assert note == "no column 'label': unlabelled (columns: image, class_id)"
    assert [i.label for i in items_of(config(tmp_path, label_column="class_id"))] == [1]


def test_files_with_and_without_the_label_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0"], "label": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"1"], "Label": [1]}), tmp_path / "b.parquet")
    (note,) = list_source(config(tmp_path)).notes
    assert note.startswith("no column 'label' in 1 of 2 files")
    assert "b.parquet has image, Label" in note
    assert [item.label for item in items_of(config(tmp_path))] == [1, None]
    with pytest.raises(ValueError, match=r"--label-column: .*b\.parquet"):
        list_source(config(tmp_path, label_column="label"))


def test_columns_inside_structs_and_names_with_dots(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"0", "meta": {"cls": "cat"}}, "a.b": b"1"},
        {"image": None, "a.b": b"2"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    cfg = config(tmp_path, image_column="image.bytes", label_column="image.meta.cls")
    assert [(item.data, item.label) for item in items_of(cfg)] == [(b"0", "cat"), (b"", None)]
    assert [item.data for item in items_of(config(tmp_path, image_column="a.b"))] == [b"1", b"2"]
    with pytest.raises(ValueError, match="--image-column"):
        list_source(config(tmp_path, image_column="image.pixels"))


def test_two_columns_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"0"]), pa.array([b"1"])], ["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"--image-column: .*a\.parquet has several"):
        list_source(config(tmp_path))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"0", b"1"], pa.large_binary()),
        pa.array([b"0", b"1"], pa.binary_view()),
        pa.array([b"0", b"1"], pa.binary(1)),
        pa.array([b"0", b"1"]).dictionary_encode(),
        pa.array([{"bytes": b"0"}, {"bytes": b"1"}]),
        pa.array([[b"0"], [b"1"]]),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_bytes_of_every_type(tmp_path: Path, column: pa.Array) -> None:
    labels = pa.array(["cat", "dog"]).dictionary_encode()
    pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / "a.parquet")
    items = items_of(config(tmp_path))
    assert [(item.data, item.label) for item in items] == [(b"0", "cat"), (b"1", "dog")]


def test_several_images_in_a_row_are_an_item_each(tmp_path: Path) -> None:
    image = [{"bytes": b"2", "path": None}]
    rows = [{"image": [{"bytes": b"0", "path": None}, None, *image], "label": 1}]
    rows += [{"image": [], "label": 2}, {"image": None, "label": 2}, {"image": image, "label": 3}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert list_source(config(path)).num_items is None
    assert items_of(config(path)) == [
        Item(f"{path}#row=0&image=0", b"0", 1),
        Item(f"{path}#row=0&image=1", problem=("missing_image", "the row has no image bytes")),
        Item(f"{path}#row=0&image=2", b"2", 1),
        Item(f"{path}#row=1", problem=("missing_image", "the row has an empty list of images")),
        Item(f"{path}#row=2", problem=("missing_image", "the row has no image bytes")),
        Item(f"{path}#row=3", b"2", 3),
    ]


def test_images_named_by_a_path_are_read_from_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "set" / "pics" / "0.png", b"0")
    write(tmp_path / "elsewhere.png", b"1")
    write(tmp_path / "set" / "large.png", bytes(101))
    names = ["pics/0.png", f"{tmp_path}/elsewhere.png", f"file://{tmp_path}/elsewhere.png"]
    bad = ["gone.png", "pics", "http://x.org/a.png", "iVBOR\nw0KGgo", "large.png", ""]
    flat = tmp_path / "set" / "flat.parquet"
    pq.write_table(pa.table({"image": names + bad}), flat)
    structs = [{"bytes": None, "path": name} for name in names + bad]
    hugging_face = tmp_path / "set" / "hugging_face.parquet"
    pq.write_table(pa.table({"image": structs}), hugging_face)
    for path in (flat, hugging_face):
        items = items_of(config(path, max_bytes=100))
        assert [item.data for item in items[:3]] == [b"0", b"1", b"1"]
        assert [item.problem for item in items[3:]] == [
            ("missing_image", "nothing at 'gone.png'"),
            ("missing_image", "'pics' is a folder"),
            ("missing_image", "'http://x.org/a.png': of addresses only s3:// and file:// are read"),
            ("missing_image", r"text that is no path: 'iVBOR\nw0KGgo'"),
            ("too_many_bytes", "101 is over the limit of 100 bytes"),
            ("missing_image", "text that is no path: ''"),
        ]


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"--source: the Parquet files at .* have no rows"):
        list_source(config(tmp_path))


def test_what_is_no_image_says_what_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [3]}), tmp_path / "number.parquet")
    pq.write_table(pa.table({"image": [{"width": 3}]}), tmp_path / "struct.parquet")
    pq.write_table(pa.table({"image": [[300, 2]]}), tmp_path / "pixels.parquet")
    problems = [item.problem for item in items_of(config(tmp_path))]
    assert problems == [
        ("missing_image", "int instead of bytes"),
        ("missing_image", "a list of numbers that are no bytes of an encoded image"),
        ("missing_image", "a struct of ['width'], neither bytes nor path among them"),
    ]


@pytest.mark.parametrize(
    ("kind", "values"),
    [(pa.list_(pa.uint8()), [0, 127, 128, 255]), (pa.large_list(pa.int8()), [0, 127, -128, -1])],
)
def test_an_image_as_a_list_of_its_bytes(
    kind: pa.DataType, values: list[int], tmp_path: Path
) -> None:
    table = pa.table({"image": pa.array([values, [], None], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list_source(config(tmp_path)).num_items == 3
    items = items_of(config(tmp_path))
    assert [item.data for item in items] == [b"\x00\x7f\x80\xff", b"", b""]
    assert [bool(item.problem) for item in items] == [False, True, True]


def test_pixels_are_one_refused_item_a_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[0.5] * 9, [300] * 9]}), tmp_path / "a.parquet")
    problem = ("missing_image", "a list of numbers that are no bytes of an encoded image")
    assert [item.problem for item in items_of(config(tmp_path))] == [problem] * 2


def test_a_file_of_any_name_where_its_format_is_given(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    pq.write_table(pa.table({"image": [b"0"], "label": [3]}), file)
    (item,) = items_of(config(file, format="parquet"))
    assert (item.data, item.label) == (b"0", 3)


# ------------------------------------------------------------------ Hive partitions


def test_hive_partitions_are_labels(tmp_path: Path) -> None:
    table = pa.table({"image": [b"0"]})
    for folder in ("label=cat", "label=a%20dog", "label=7", "label=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / "x=1" / folder).mkdir(parents=True)
        pq.write_table(table, tmp_path / "x=1" / folder / "0.parquet")
    listing = list_source(config(tmp_path))
    assert listing.notes == ()
    assert [item.label for item in items_of(config(tmp_path))] == [7, None, "a dog", "cat"]
    assert [item.label for item in items_of(config(tmp_path, label_column="x"))] == [1] * 4
    assert [item.label for item in items_of(config(tmp_path / "x=1" / "label=cat"))] == ["cat"]


def test_a_column_of_the_file_goes_before_its_partition(tmp_path: Path) -> None:
    (tmp_path / "label=cat").mkdir()
    pq.write_table(pa.table({"image": [b"0"], "label": [3]}), tmp_path / "label=cat" / "0.parquet")
    assert [item.label for item in items_of(config(tmp_path))] == [3]


# ------------------------------------------------------------------ declared classes


@pytest.mark.parametrize(
    "meta",
    [
        *("[]", "null", "3", "{", '{"info": null}', '{"info": {"features": [1]}}'),
        *('{"info": {"features": {"label": null}}}', '{"info": {"features": {"label": ["a"]}}}'),
        *('{"info": {"features": {"label": {"names": "ab"}}}}', "\ud800"),
        *('{"info": {"features": {"label": {"names": [1, 2]}}}}', "[" * 100_000),
        '{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
    ],
    ids=range(13),
)
def test_malformed_declarations_count_as_none(tmp_path: Path, meta: str) -> None:
    table = pa.table({"image": [b"0"], "label": [1]})
    described = table.replace_schema_metadata({"huggingface": meta.encode(errors="surrogatepass")})
    pq.write_table(described, tmp_path / "a.parquet")
    assert list_source(config(tmp_path)).classes == ()
    assert [item.label for item in items_of(config(tmp_path))] == [1]


def test_classes_are_brought_together_by_name() -> None:
    same = merge_classes([("cat", "dog"), (), ("cat", "dog")])
    assert same == (("cat", "dog"), [None, None, None])
    classes, maps = merge_classes([("cat", "dog"), (), ("dog", "eel", "cat")])
    assert classes == ("cat", "dog", "eel")
    assert maps == [(0, 1), (), (1, 2, 0)]
    assert merge_classes([(), ()]) == ((), [None, None])
