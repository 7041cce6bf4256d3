"""Lists of files in every form that people have them in."""

from __future__ import annotations

import json

import pytest

from pipelines.ingestion.listing.tables import read_file_list

WANTED = (("a/0.jpg", "cat"), ("a/1.png", "dog"), ("b c/2.webp", "cat"))
CSV = "a/0.jpg,cat\na/1.png,dog\nb c/2.webp,cat\n"


def separated(sign: str, header: str = "") -> str:
    return header + "".join(f"{path}{sign}{label}\n" for path, label in WANTED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", CSV),
        *((f"x.{suffix}", separated(sign)) for sign in ",;\t|" for suffix in ("csv", "txt", "tsv")),
        ("x.csv", separated(" , ", "Path , Label\n")),
        ("x.txt", separated(" ")),
        ("x.txt", separated("   ", "path label\n")),
        *(
            ("x.csv", separated(",", f"{path},{label}\n"))
            for path in ("path", "filename", "file_name", "File Name", "IMAGE", "image_path", "img")
            for label in ("label", "Class", "category", "target", "class_name")
        ),
        ("x.csv", separated(";", '"file_name";"class"\n')),
        (
            "pandas.csv",
            "," + "path,label\n" + "".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(WANTED)),
        ),
        ("no_header.csv", "".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(WANTED))),
        ("mxnet.lst", "".join(f"{i}\t{c}\t{p}\n" for i, (p, c) in enumerate(WANTED))),
        ("label_first.csv", "".join(f"{c},{p}\n" for p, c in WANTED)),
        ("label_first.csv", "label,path\n" + "".join(f"{c},{p}\n" for p, c in WANTED)),
        ("decimal_commas.csv", "path;label;score\n" + "".join(f"{p};{c};0,5\n" for p, c in WANTED)),
        ("comment.txt", "# path\tlabel\n" + separated("\t")),
        ("remarks.csv", "# mine\n# made, by me\n" + CSV + "# end\n"),
        ("remarks.txt", "# mine\n" + separated(" ") + "# end\n"),
        (
            "masks.csv",
            "path,mask,label\n" + "".join(f"{p},{'1 ' * 99_999},{c}\n" for p, c in WANTED),
        ),
        ("x.json", json.dumps([{"file_name": p, "label": c} for p, c in WANTED], indent=1)),
        ("quoted.csv", "".join(f'"{p}", "{c}"\r\n' for p, c in WANTED)),
        ("empty_lines.csv", "\n\n" + CSV.replace("\n", "\n\n") + ",\n"),
        ("old_mac.csv", CSV.replace("\n", "\r")),
        ("x.jsonl", "".join(json.dumps({"file_name": p, "label": c}) + "\n" for p, c in WANTED)),
        ("x.txt", "".join(json.dumps({"label": c, "image": p}) + "\n\n" for p, c in WANTED)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_paths_and_labels(name: str, text: str) -> None:
    found = read_file_list(text.encode(), name)
    assert found.rows == WANTED
    assert found.labelled


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings(encoding: str, newline: str) -> None:
    text = newline.join(["path,label", "a.jpg,caf\u00e9", "b.jpg,\u00fcber"])
    found = read_file_list(text.encode(encoding), "x.csv")
    assert found.rows == (("a.jpg", "caf\u00e9"), ("b.jpg", "\u00fcber"))
    assert any("is not UTF-8" in note for note in found.notes) == (encoding == "cp1252")


def test_a_name_that_is_not_utf8_stays_the_bytes_it_is() -> None:
    found = read_file_list("caf\u00e9.jpg,cat\n".encode("latin-1"), "x.csv")
    assert found.rows == (("caf\udce9.jpg", "cat"),)


def test_paths_alone() -> None:
    for text in ("a.jpg\nmy photo.jpg\n", "path\na.jpg\nmy photo.jpg\n"):
        found = read_file_list(text.encode(), "x.csv")
        assert found.rows == (("a.jpg", None), ("my photo.jpg", None))
        assert not found.labelled


def test_names_without_a_suffix_are_the_first_column() -> None:
    found = read_file_list(b"d41d8cd9,3\n900150983,4\n", "x.csv")
    assert found.rows == (("d41d8cd9", "3"), ("900150983", "4"))


def test_labels_that_number_the_rows_are_labels_where_there_is_nothing_else() -> None:
    assert read_file_list(b"a.jpg,0\nb.jpg,1\n", "x.csv").rows == (("a.jpg", "0"), ("b.jpg", "1"))


def test_a_row_whose_label_is_called_like_a_header_is_a_row() -> None:
    found = read_file_list(b"a.jpg,image\nb.jpg,file\n", "x.csv")
    assert found.rows == (("a.jpg", "image"), ("b.jpg", "file"))


def test_separators_in_names_and_labels_are_kept() -> None:
    found = read_file_list(b'a;1.jpg,"x, y"\n"b, 2.jpg",x|y\n', "x.csv")
    assert found.rows == (("a;1.jpg", "x, y"), ("b, 2.jpg", "x|y"))


def test_further_columns_are_named() -> None:
    found = read_file_list(b"path,label,split,width\na.jpg,cat,train,32\n", "x.csv")
    assert found.rows == (("a.jpg", "cat"),)
    assert found.notes == ("columns of x.csv that are not read: split, width",)


def test_unknown_headers_over_names_of_images() -> None:
    text = b"picture of,breed,caption\na.jpg,pug,x\nb.jpg,lab,y\n"
    found = read_file_list(text, "x.csv")
    assert found.rows == (("a.jpg", None), ("b.jpg", None))
    assert not found.labelled
    (note,) = found.notes
    assert "breed, caption" in note
    assert "--label-column" in note
    named = read_file_list(text, "x.csv", label_column="breed")
    assert named.rows == (("a.jpg", "pug"), ("b.jpg", "lab"))
    named = read_file_list(b"id,where\n1,a\n2,b\n", "x.csv", path_column="where")
    assert [row[0] for row in named.rows] == ["a", "b"]


@pytest.mark.parametrize("flag", ["image", "label"])
def test_a_named_column_that_is_not_there_is_an_error(flag: str) -> None:
    columns = {"path_column": "x"} if flag == "image" else {"label_column": "x"}
    with pytest.raises(ValueError, match=rf"--{flag}-column: .*no column 'x' \(it has path, label"):
        read_file_list(b"path,label\na.jpg,1\n", "x.csv", **columns)
    with pytest.raises(ValueError, match="no names in its first row"):
        read_file_list(b"a.jpg,1\n", "x.csv", **columns)


def test_json_labels() -> None:
    values = [3, 2.0, True, None, "cat", ["a"], {"b": 1}, float("nan")]
    text = "".join(json.dumps({"path": "a.jpg", "label": value}) + "\n" for value in values)
    found = read_file_list(text.encode(), "x.jsonl")
    assert [label for _, label in found.rows] == ["3", "2.0", "1", None, "cat", None, None, None]
    assert found.notes == ("2 labels of x.jsonl are neither text nor numbers: left out",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "names no file"),
        (b"path,label\n", "names no file"),
        (b"\xff\xfea", "save it as UTF-8"),
        (b'{"path": "a.jpg"}\n{"path"\n', "line 2 of x.csv is no JSON"),
        (b'{"path": "a.jpg"}\n3\n', "line 2 of x.csv is no JSON object"),
        (b'{\n"images": []\n}', "x.csv is one JSON object; give a list of objects"),
        (b"# nothing\n# here\n", "names no file"),
    ],
)
def test_what_is_no_list_is_said(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_file_list(data, "x.csv")
    assert str(error.value).startswith("--source: ")
