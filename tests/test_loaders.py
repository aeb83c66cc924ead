"""The loaders on small files of the published shape, on the real bytes where they are on this machine, and on files that are wrong."""

import gzip
import hashlib
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_importance.data import loaders, registry
from recsys_importance.data.loaders import load_chorus, load_esci, load_file, load_obd, load_online_retail, load_wands, online_retail_lines
from recsys_importance.data.registry import DATASETS, Dataset, File, locate


def real(name: str) -> None:
    """Skips the test where a file of the data set is not on this machine; never downloads."""
    absent = [file.key for file in DATASETS[name].files if locate(file.key) is None]
    if absent:
        pytest.skip(f"{absent[0]} is neither in the override folder nor in the cache nor in a package")


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------- your own file

GOOD = "text_a,text_b,label\nmug,Mug red,1\n"


def refusal(action, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_csv_keeps_ids_and_texts_as_they_are(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("text_a,text_b,label,item_id,clicked,position,price,shelf\nNA,null,1,007,true,1,2.5,B2\nnan,,0,1e3,false,NA,,\n")
    frame = load_file(path)
    assert frame["text_a"].tolist() == ["NA", "nan"]
    assert frame["text_b"][0] == "null" and frame["text_b"].isna()[1]
    assert frame["item_id"].tolist() == ["007", "1e3"]
    assert frame["sample_id"].tolist() == ["log:0", "log:1"]
    assert frame["position"][0] == 1 and frame["position"].isna()[1]
    assert frame["clicked"].tolist() == [True, False] and frame["shelf"][0] == "B2"
    assert frame["label"].tolist() == [1.0, 0.0] and frame["label"].dtype == "float64"


def test_tsv_and_parquet_give_the_same_frame(tmp_path):
    table = pd.DataFrame({"text_a": ["a, b", "c"], "text_b": ["d", 'e "f"'], "label": [1.0, 0.5], "query_id": ["01", "02"]})
    table.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    expected = load_file(tmp_path / "x.csv")
    for ending in ("tsv", "parquet"):
        pd.testing.assert_frame_equal(load_file(tmp_path / f"x.{ending}"), expected)
    assert expected["text_a"][0] == "a, b" and expected["text_b"][1] == 'e "f"'


def test_parquet_integers_with_gaps_become_clean_text(tmp_path):
    table = pd.DataFrame(
        {"text_a": ["a", "b"], "text_b": ["c", "d"], "label": [1, 0], "item_id": pd.array([12345678901, None], dtype="Int64")}
    )
    table.to_parquet(tmp_path / "x.parquet")
    frame = load_file(tmp_path / "x.parquet")
    assert frame["item_id"][0] == "12345678901" and frame["item_id"].isna()[1]


def test_columns_are_mapped_and_a_mapped_column_replaces_its_namesake(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("q,title,label,gain\nmug,Mug,E,1.0\nmug,Cup,S,0.1\n")
    frame = load_file(path, columns={"text_a": "q", "text_b": "title", "label": "gain", "item_id": "title"})
    assert frame["label"].tolist() == [1.0, 0.1]
    assert frame["item_id"].tolist() == frame["text_b"].tolist() == ["Mug", "Cup"]
    assert not {"q", "title", "gain"} & set(frame.columns)
    assert "did you mean 'text_a'" in refusal(load_file, path, columns={"texta": "q"})
    assert "column 'quary' is missing (columns found: q, title, label, gain)" in refusal(load_file, path, columns={"text_a": "quary"})
    assert "map it with columns={'text_a'" in refusal(load_file, path)


def test_byte_order_mark_and_other_encodings(tmp_path):
    path = tmp_path / "x.csv"
    for encoding, option in [
        ("utf-8-sig", "utf-8"),
        ("utf-8", "UTF8"),
        ("cp1252", "cp1252"),
        ("utf-16", "utf-16"),
        ("utf-8-sig", "utf-8-sig"),
    ]:
        path.write_bytes("text_a,text_b,label\nthé,Théière,1\n".encode(encoding))
        frame = load_file(path, encoding=option)
        assert frame.loc[0, ["text_a", "text_b"]].tolist() == ["thé", "Théière"], (encoding, option)
    for wrong in ("utf-9", "utf\0", "", 8):
        assert f"x.csv: no encoding is called {wrong!r}" in refusal(load_file, path, encoding=wrong)
    assert "x.csv: 'base64' is no encoding of text" in refusal(load_file, path, encoding="base64")
    assert "x.csv: not undefined at its end" in refusal(load_file, path, encoding="undefined")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("line", [1, 2, 5000])
def test_mixed_encodings_name_line_and_byte(tmp_path, line, mark):
    """Written so that the first wrong byte is known: `line` and after the two letters 'th'."""
    rows = ["text_a,text_b,label", *["mug,tea,1"] * 6000]
    content = [row.encode() for row in rows]
    content[line - 1] = b"th\xe9,tea,1"
    (tmp_path / "x.csv").write_bytes(mark + b"\n".join(content))
    byte = 3 + (len(mark) if line == 1 else 0)
    assert f"x.csv: not utf-8 at line {line}, byte {byte} (0xe9)" in refusal(load_file, tmp_path / "x.csv")


BAD_FILES = {
    "empty.csv": (b"", "empty.csv: the file is empty"),
    "header_only.csv": (b"text_a,text_b,label\n", "no rows"),
    "wrong_columns.csv": (b"a,b,label\n1,2,3\n", "column 'text_a', 'text_b' is missing (columns found: a, b, label)"),
    "semicolons.csv": (b"text_a;text_b;label\nmug;Mug;1\n", "is missing (columns found: text_a;text_b;label)"),
    "doubled.csv": (b"text_a,text_b,label,label\nmug,Mug,1,1\n", "column 'label' appears more than once"),
    "one_long_row.csv": (GOOD.encode() + b"mug,Mug,red,1\n", "Expected 3 fields in line 3, saw 4"),
    "all_long_rows.csv": (b"text_a,text_b,label\nmug,Mug,red,1\n", "the rows have more fields than the header"),
    "open_quote.csv": (GOOD.encode() + b'mug,"Mug red,1\n', "EOF inside string"),
    "label_text.csv": (b"text_a,text_b,label\nmug,Mug,good\n", "column 'label' must be readable as float64: row 0 ('good')"),
    "infinite.csv": (b"text_a,text_b,label\nmug,Mug,inf\n", "column 'label' must be finite"),
    "same_id.csv": (b"sample_id,text_a,text_b,label\n1,mug,Mug,1\n1,mug,Cup,0\n", "column 'sample_id' must be unique"),
    "day_or_month.csv": (b"text_a,text_b,label,timestamp\nm,M,1,2026-01-31\nm,M,1,01/02/2026\n", "row 1 ('01/02/2026')"),
    "seconds.csv": (b"text_a,text_b,label,timestamp\nm,M,1,1767225600\n", "must be ISO 8601"),
    "log.xlsx": (b"PK", "files that end in '.xlsx' are not read; expected .csv, .tsv or .parquet"),
    "short_row.csv": (
        GOOD.encode() + b"cup,Cup blue\n",
        "2 fields at line 3, the header has 3; the file is cut short",
    ),
    "cut.csv": (GOOD.encode() * 1 + b"cup", "1 field at line 3, the header has 3"),
    "cut.tsv": (b"text_a\ttext_b\tlabel\nmug\tMug\t1\ncup\tCu", "2 fields at line 3, the header has 3"),
    "quoted_short_row.csv": (GOOD.encode() + b'"a\nb",cup\nmug,Mug,1\n', "2 fields at line 4, the header has 3"),
    "blank_lines.csv": (b"\n\n\n", "the file has no header line"),
    "doubled_after_blank.csv": (b"\ntext_a,text_b,label,label\nmug,Mug,1,1\n", "column 'label' appears more than once"),
    "gzip.csv": (gzip.compress(GOOD.encode()), "not utf-8 at line 1, byte 2 (0x8b)"),
    "log.csv.gz": (gzip.compress(GOOD.encode()), "files that end in '.gz' are not read"),
    "zeros.csv": (bytes(64), "is missing"),
    "empty.parquet": (b"", "not a readable Parquet file"),
    "text.parquet": (GOOD.encode(), "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_file_is_one_clear_error_and_nothing_is_left(tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    message = refusal(load_file, tmp_path / name)
    assert expected in message and str(tmp_path / name) in message
    assert files_under(tmp_path) == [name] and (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.99])
def test_truncated_parquet(tmp_path, kept):
    path = tmp_path / "x.parquet"
    pd.DataFrame({"text_a": ["a"] * 99, "text_b": ["b"] * 99, "label": 1.0}).to_parquet(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "x.parquet: not a readable Parquet file, perhaps cut short" in refusal(load_file, path)


def test_a_last_column_that_may_be_empty_is_no_short_row(tmp_path):
    (tmp_path / "x.csv").write_text("text_a,text_b,label,brand\nmug,Mug,1,\n\ncup,Cup,0,Acme\n")
    assert load_file(tmp_path / "x.csv")["brand"].isna().tolist() == [True, False]


def test_other_encodings_that_do_not_fit(tmp_path):
    (tmp_path / "x.csv").write_bytes("text_a,text_b,label\nthé,Théière,1\n".encode("utf-16-le"))
    for encoding in ("utf-16", "utf-32", "ascii", "utf-8"):  # UTF-16 without its mark is no error in Latin-1: its columns are
        message = refusal(load_file, tmp_path / "x.csv", encoding=encoding)
        assert str(tmp_path / "x.csv") in message and (encoding in message or "is missing" in message)
    (tmp_path / "odd.csv").write_bytes("text_a,text_b,label\nthé,Théière,1\n".encode("utf-16")[:-1])
    assert "odd.csv: not utf-16 at" in refusal(load_file, tmp_path / "odd.csv", encoding="utf-16")


def test_a_folder_in_place_of_a_file(tmp_path):
    for name in ("x.csv", "x.tsv", "x.parquet", "Broad_Query_Set_individual_ratings.csv"):
        (tmp_path / name).mkdir()
    for name in ("x.csv", "x.tsv", "x.parquet"):
        assert f"{tmp_path / name}: a folder, not a file" in refusal(load_file, tmp_path / name)
    assert "a folder, not a file; folder= must hold" in refusal(load_chorus, folder=tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([["x"], ["y"]]), "column 'text_a' must be text or numbers, its type is list<element: string>"),
        (pa.array([{"x": 1}, {"x": 2}]), "column 'text_a' must be text or numbers, its type is struct<x: int64>"),
        (pa.array([b"\xff", b"a"]), "column 'text_a' must be text or numbers, its type is binary"),
    ],
)
def test_parquet_with_a_text_column_of_another_kind(tmp_path, values, expected):
    pq.write_table(pa.table({"text_a": values, "text_b": ["a", "b"], "label": [1, 0]}), tmp_path / "x.parquet")
    assert f"x.parquet: {expected}" in refusal(load_file, tmp_path / "x.parquet")


def test_lines_of_blanks_are_no_rows(tmp_path):
    (tmp_path / "x.csv").write_text("   \n\ntext_a,text_b,label,brand\n  \nmug,Mug,1,\n   \n")
    assert load_file(tmp_path / "x.csv")["text_a"].tolist() == ["mug"]


def test_parquet_with_a_column_twice(tmp_path):
    columns = ["text_a", "text_b", "label", "label"]
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1.0]), pa.array([0.0])], names=columns), tmp_path / "x.parquet")
    assert "x.parquet: column 'label' appears more than once" in refusal(load_file, tmp_path / "x.parquet")


def test_missing_file(tmp_path):
    assert "nowhere.csv: no such file" in refusal(load_file, tmp_path / "nowhere.csv")


def test_timestamps_are_utc(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text_a,text_b,label,timestamp\na,b,1,2026-07-01T14:00:00+02:00\na,b,1,2026-07-01 12:00:00\na,b,1,\n")
    expected = [pd.Timestamp("2026-07-01 12:00:00")] * 2
    assert load_file(path)["timestamp"].tolist()[:2] == expected and load_file(path)["timestamp"].isna()[2]
    table = pd.DataFrame({"text_a": ["a"], "text_b": ["b"], "label": [1], "timestamp": pd.to_datetime(["2026-07-01T14:00:00+02:00"])})
    table.to_parquet(tmp_path / "x.parquet")
    assert load_file(tmp_path / "x.parquet")["timestamp"].tolist() == expected[:1]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, texts, st.floats(-1e6, 1e6)), min_size=1, max_size=6))
def test_any_text_survives_the_round_trip(tmp_path, rows):
    """What pandas writes to CSV comes back letter by letter: NA, quotes, separators, Chinese, emoji."""
    table = pd.DataFrame(rows, columns=["text_a", "text_b", "label"])
    table.to_csv(tmp_path / "x.csv", index=False)
    frame = load_file(tmp_path / "x.csv")
    assert frame["text_a"].tolist() == [row[0] for row in rows]
    assert frame["text_b"].tolist() == [row[1] for row in rows]
    assert frame["label"].tolist() == [row[2] for row in rows]


# ----------------------------------------------------------------------------------------------------------------------- Chorus

PRODUCTS = [
    {"id": "10", "title": "Mug, red", "short_description": "300 ml", "supplier": "A", "price": 995},
    {"id": "11", "title": "Teapot", "supplier": "B", "price": 1250},
    {"id": "12", "title": "Cup", "short_description": " ", "supplier": "B", "price": 95},
    {"id": "13", "title": "Never judged", "short_description": "x", "supplier": "B", "price": 1},
]
RATINGS = "query,docid,name,description,agent_1_rating,agent_2_rating,agent_3_rating,final_rating\n"
JUDGED = [("Red  Mug!", 10, "3,3,2,3"), ("Red  Mug!", 11, "0,1,0,0"), ("cup", 12, "2,0,3,2"), ("cup", 10, "1,1,1,1")]


def write_chorus(folder: Path, judged=JUDGED) -> Path:
    rows = "".join(f'{query},{product},"short, name",,{grades}\n' for query, product, grades in judged)
    (folder / "Broad_Query_Set_individual_ratings.csv").write_text(RATINGS + rows)
    for part, product in enumerate(PRODUCTS, 1):
        with zipfile.ZipFile(folder / f"{part}.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{part}.json", json.dumps([product]))
    return folder


def test_chorus_rows_by_hand(tmp_path):
    frame = load_chorus(folder=write_chorus(tmp_path))
    assert frame["sample_id"].tolist() == ["chorus:red-mug:10", "chorus:red-mug:11", "chorus:cup:12", "chorus:cup:10"]
    assert frame["text_a"].tolist() == ["Red  Mug!", "Red  Mug!", "cup", "cup"]
    assert frame["text_b"].tolist() == ["Mug, red", "Teapot", "Cup", "Mug, red"]
    assert frame["label"].tolist() == [1.0, 0.0, 2 / 3, 1 / 3]
    assert frame["grade"].tolist() == [3, 0, 2, 1]
    assert frame[["rater_1", "rater_2", "rater_3"]].to_numpy().tolist() == [[3, 3, 2], [0, 1, 0], [2, 0, 3], [1, 1, 1]]
    assert frame["price"].tolist() == [9.95, 12.5, 0.95, 9.95]
    assert frame["name"].unique().tolist() == ["short, name"] and frame["supplier"].tolist() == ["A", "B", "B", "A"]
    longer = load_chorus(folder=tmp_path, text="title and description")["text_b"].tolist()
    assert longer == ["Mug, red. 300 ml", "Teapot", "Cup", "Mug, red. 300 ml"]


def test_chorus_refusals(tmp_path):
    assert "text is 'name', expected one of 'title', 'title and description'" in refusal(load_chorus, text="name", folder=tmp_path)
    write_chorus(tmp_path, [*JUDGED, ("cup", 99, "1,1,1,1")])
    assert "1 judged products are not in the catalogue, the first is '99'" in refusal(load_chorus, folder=tmp_path)
    write_chorus(tmp_path, [*JUDGED, ("cup", 13, "1,1,1,7")])
    assert "grades must be 0, 1, 2 or 3; row 4 has 7, 1, 1, 1" in refusal(load_chorus, folder=tmp_path)
    write_chorus(tmp_path, [*JUDGED, ("cup", 13, "1,1,,2")])
    assert "grades must be 0, 1, 2 or 3; row 4 has 2.0, 1.0, 1.0, nan" in refusal(load_chorus, folder=tmp_path)
    write_chorus(tmp_path, [*JUDGED, ("cup", 13, "1,1,1,good")])
    assert "grades must be 0, 1, 2 or 3; row 4 has good, 1, 1, 1" in refusal(load_chorus, folder=tmp_path)
    (tmp_path / "2.json.zip").unlink()
    write = (tmp_path / "Broad_Query_Set_individual_ratings.csv").write_text
    write(RATINGS + "cup,10,x,,1,1,1,1\n")
    assert "2.json.zip: no such file" in refusal(load_chorus, folder=tmp_path)
    write(RATINGS.replace("agent_2_rating", "rating_2") + "cup,10,x,,1,1,1,1\n")
    assert "column 'agent_2_rating' is missing" in refusal(load_chorus, folder=tmp_path)


def zip_of(*members: tuple[str, bytes]):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)

    return write


def changed(offset: int, value: bytes, *, deflated=True):
    """A zip of the good member with bytes changed in both of its headers, `offset` counted as in the central one."""

    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
            archive.writestr("1.json", json.dumps([PRODUCTS[0]] * 50))
        content = bytearray(path.read_bytes())
        central = content.rindex(b"PK\x01\x02")
        for start in (central + offset, offset - 2):
            content[start : start + len(value)] = value
        path.write_bytes(content)

    return write


def with_method(method: int):
    def write(path):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("1.json", json.dumps([PRODUCTS[0]]))

    return write


def bomb(path):
    """Some 30 KB that unpack to 32 MB, as the header says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.json", b"[" + b" " * (32 << 20) + b"]")


def lying_bomb(path):
    """The same, but both headers say 100 bytes."""
    bomb(path)
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    for start in (central + 24, 22):
        content[start : start + 4] = (100).to_bytes(4, "little")
    path.write_bytes(content)


def nested(path):
    write_chorus(path.parent)
    inner = path.read_bytes()
    zip_of(("1.json", inner))(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage(path):
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(15)
    path.write_bytes(content)


BAD_ZIPS = {
    "truncated": cut,
    "damaged inside": damage,
    "not a zip": lambda path: path.write_bytes(b"<html>"),
    "empty": lambda path: path.write_bytes(b""),
    "no member": zip_of(),
    "two members": zip_of(("1.json", b"[]"), ("2.json", b"[]")),
    "wrong JSON": zip_of(("1.json", b'[{"id": "10",')),
    "other JSON": zip_of(("1.json", b'{"id": "10"}')),
    "products without title": zip_of(("1.json", b'[{"id": "10", "price": 1}]')),
    "not UTF-8": zip_of(("1.json", b'["\xff\xfe\xfa"]')),
    "encrypted": changed(8, b"\x01"),
    "strongly encrypted": changed(8, b"\x41"),
    "patched data": changed(8, b"\x20"),
    "unknown method": changed(10, b"\x63"),
    "unknown version": changed(6, b"\xff"),
    "bzip2": with_method(zipfile.ZIP_BZIP2),
    "LZMA": with_method(zipfile.ZIP_LZMA),
    "bomb": bomb,
    "bomb that lies": lying_bomb,
    "wrong length": changed(24, b"\x05\x00\x00\x00", deflated=False),
    "wrong checksum": changed(16, b"\x05\x00\x00\x00"),
    "nested": nested,
    "another member": zip_of(("products.json", json.dumps(PRODUCTS[:1]).encode())),
    "absolute member": zip_of(("/1.json", json.dumps(PRODUCTS[:1]).encode())),
    "member above": zip_of(("../1.json", json.dumps(PRODUCTS[:1]).encode())),
    "a folder inside": zip_of(("1.json/", b"")),
    "many members": zip_of(*((f"{number}.json", b"[]") for number in range(300))),
    "deep JSON": zip_of(("1.json", b"[" * 100_000)),
    "long number": zip_of(("1.json", b'[{"id": "10", "title": "Mug", "price": ' + b"9" * 5000 + b"}]")),
    "price in words": zip_of(("1.json", b'[{"id": "10", "title": "Mug", "price": "cheap"}]')),
    "title without text": zip_of(("1.json", b'[{"id": "10", "title": ["Mug"], "price": 1}]')),
    "products that are none": zip_of(("1.json", b'["Mug"]')),
    "null": zip_of(("1.json", b"null")),
}


@pytest.mark.parametrize("kind", list(BAD_ZIPS))
def test_chorus_bad_zip_is_one_clear_error(tmp_path, kind, monkeypatch):
    before = files_under(write_chorus(tmp_path))
    monkeypatch.setattr(loaders, "_LARGEST_PART", 1 << 20)
    BAD_ZIPS[kind](tmp_path / "1.json.zip")
    tracemalloc.start()
    message = refusal(load_chorus, folder=tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 << 20 and len(message) < 400
    assert f"{tmp_path / '1.json.zip'}: not a zip of one JSON file of products" in message
    assert files_under(tmp_path) == before


def test_loaders_read_through_the_registry(tmp_path, monkeypatch):
    """Without folder= the files are the registry's, so a changed byte in the override folder is refused before it is read."""
    folder = tmp_path / "chorus"
    folder.mkdir()
    write_chorus(folder)
    files = tuple(
        File(key=f"chorus/{path.name}", url="http://127.0.0.1:9/x", sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.iterdir())
    )
    about = dict(title="", rows="", columns="", licence="", citation="", home="", simulated=True, noise="")
    monkeypatch.setitem(DATASETS, "chorus", Dataset(name="chorus", files=files, **about))
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path))
    assert len(load_chorus()) == 4
    cut(folder / "3.json.zip")
    assert "3.json.zip: the bytes have sha256" in refusal(load_chorus)


def test_real_chorus():
    real("chorus")
    frame = load_chorus()
    assert len(frame) == 3188 and frame["query_id"].nunique() == frame["text_a"].nunique() == 135 and frame["item_id"].nunique() == 2349
    assert frame["grade"].value_counts().to_dict() == {0: 1471, 3: 1426, 1: 198, 2: 93}
    raters = frame[["rater_1", "rater_2", "rater_3"]].to_numpy()
    spread = raters.max(axis=1) - raters.min(axis=1)
    # The figures that the data card states.
    assert round(100 * np.mean(spread == 0)) == 71 and round(100 * np.mean(spread >= 2)) == 19
    assert [round(100 * float(share), 1) for share in np.mean(raters != frame["grade"].to_numpy()[:, None], axis=0)] == [13.7, 17.2, 18.4]
    first = frame.iloc[0]
    assert first["text_a"] == "bluetooth speaker" and first["item_id"] == "1993197" and first["price"] == 40.95
    assert first["text_b"].startswith("Sony Portable Bluetooth Speaker MBS-100")
    assert frame[["text_a", "text_b", "label"]].notna().all(axis=None)


# ---------------------------------------------------------------------------------------------------------------- Online Retail

FIRST = [  # invoice, stock code, description, quantity, date, price, customer
    ("1", "11111", "CUP", 6, "2010-11-01", 2.0, 7.0),
    ("1", "22222a", "BOWL ", 1, "2010-11-01", 3.0, 7.0),
    ("1", "POST", "POSTAGE", 1, "2010-11-01", 5.0, 7.0),
    ("2", "11111", "CUP", 4, "2010-11-02", 2.0, 7.0),
    ("C3", "11111", "CUP", -4, "2010-11-03", 2.0, 7.0),  # takes back invoice 2
    ("C4", "11111", "CUP", -5, "2010-11-03", 2.0, 7.0),  # no purchase of 5: a partial return of nothing that is known
    ("5", "33333", "JUG", 1, "2010-12-01", 4.0, 8.0),
    ("5", "11111", "CUP, OLD NAME", 1, "2010-12-01", 2.0, 8.0),
    ("C6", "33333", "JUG", -1, "2010-12-02", 4.0, 9.0),  # another customer's
]
SECOND = [
    ("5", "33333", "JUG", 1, "2010-12-01", 4.0, 8.0),
    ("5", "11111", "CUP, OLD NAME", 1, "2010-12-01", 2.0, 8.0),
    ("10", "44444", "PLATE", 2, "2011-01-01", 1.0, 7.0),
    ("10", "22222A", "BOWL", 2, "2011-01-01", 3.0, 7.0),
    ("10", "55555", "Missing_Description", 2, "2011-01-01", 3.0, 7.0),
    ("11", "44444", "PLATE", 1, "2011-01-02", 1.5, 8.0),
    ("11", "DCGS0003", "BOX", 1, "2011-01-02", 0.0, 8.0),
    ("12", "11111", "CUP", 1, "2011-01-03", 2.0, 0.0),
    ("12", "22222A", "BOWL", 1, "2011-01-03", 3.0, 8.0),
]


def write_retail(folder: Path, first=FIRST, second=SECOND) -> Path:
    for name, rows, (invoice, price, user) in [
        ("online_retail_2009_2010.parquet", first, ("Invoice", "Price", "Customer ID")),
        ("online_retail_2010_2011.parquet", second, ("InvoiceNo", "UnitPrice", "CustomerID")),
    ]:
        table = pd.DataFrame(rows, columns=[invoice, "StockCode", "Description", "Quantity", "InvoiceDate", price, user])
        table["InvoiceDate"] += " 10:00:00"
        if invoice == "InvoiceNo":
            table[invoice] = table[invoice].astype("int64")
        table.assign(Country="France").to_parquet(folder / name)
    return folder


def test_retail_lines_by_hand(tmp_path):
    lines = online_retail_lines(folder=write_retail(tmp_path))
    assert len(lines) == len(FIRST) + len(SECOND) - 2  # invoice 5 is in both files
    assert lines["timestamp"].is_monotonic_increasing
    assert lines.loc[lines["cancelled"], "invoice"].tolist() == ["C3", "C4", "C6"]
    assert lines.loc[lines["returned"], ["invoice", "item_id"]].to_numpy().tolist() == [["2", "11111"]]
    assert lines.loc[~lines["product"], "item_id"].tolist() == ["POST"]
    assert lines.loc[lines["invoice"] == "1", "item_id"].tolist() == ["11111", "22222A", "POST"]
    assert lines.loc[lines["invoice"] == "1", "description"].tolist() == ["CUP", "BOWL", "POSTAGE"]
    assert lines["user_id"].isna().sum() == 1 and set(lines["user_id"].dropna()) == {"7", "8", "9"}
    assert lines["description"].isna().sum() == 1
    spent = (lines["quantity"] * lines["price"]).groupby(lines["user_id"]).sum()
    assert spent["7"] == 12 + 3 + 5 + 8 - 8 - 10 + 2 + 6 + 6


def test_retail_samples_by_hand(tmp_path):
    """Customer 7: cup, bowl, plate (the second cup came back, the second bowl is a reorder). Customer 8: jug, cup, plate, bowl."""
    frame = load_online_retail(folder=write_retail(tmp_path), history=2)
    assert frame[["user_id", "text_a", "text_b"]].to_numpy().tolist() == [
        ["7", "CUP", "BOWL"],
        ["7", "BOWL | CUP", "PLATE"],
        ["8", "JUG", "CUP"],
        ["8", "CUP | JUG", "PLATE"],
        ["8", "PLATE | CUP", "BOWL"],
    ]
    assert frame["sample_id"].tolist()[:2] == ["online_retail:7:1:22222A", "online_retail:7:10:44444"]
    assert frame["label"].eq(1.0).all() and not frame["sampled"].any()
    assert frame["quantity"].tolist() == [1, 2, 1, 1, 1] and frame["price"].tolist() == [3.0, 1.0, 2.0, 1.5, 3.0]
    assert load_online_retail(folder=tmp_path, history=1)["text_a"].tolist() == ["CUP", "BOWL", "JUG", "CUP", "PLATE"]
    assert load_online_retail(folder=tmp_path, history=9)["text_a"].tolist()[-1] == "PLATE | CUP | JUG"


def test_retail_last_events_keep_their_history(tmp_path):
    frame = load_online_retail(folder=write_retail(tmp_path), last_events=1)
    assert frame[["text_a", "text_b"]].to_numpy().tolist() == [["BOWL | CUP", "PLATE"], ["PLATE | CUP | JUG", "BOWL"]]
    one = load_online_retail(folder=tmp_path, max_users=1, seed=3)
    assert one["user_id"].nunique() == 1
    assert {load_online_retail(folder=tmp_path, max_users=1, seed=seed)["user_id"][0] for seed in range(20)} == {"7", "8"}


def test_retail_negatives_by_hand(tmp_path):
    """Sold so far: cup and bowl from November, the jug from December, the plate from January. At its first purchase customer 7 has both
    products there are, at its last customer 8 has all four: nothing to draw from. At each of the others one product is left, and the
    bowl stays a negative of customer 8, who buys it in the end."""
    frame = load_online_retail(folder=write_retail(tmp_path), negatives=1, seed=4)
    assert frame[["user_id", "text_b", "label"]].to_numpy().tolist() == [
        ["7", "PLATE", 1.0],
        ["7", "JUG", 0.0],
        ["8", "CUP", 1.0],
        ["8", "BOWL", 0.0],
        ["8", "PLATE", 1.0],
        ["8", "BOWL", 0.0],
    ]
    assert frame.attrs["purchases_left_out"] == 2 and load_online_retail(folder=tmp_path).attrs["purchases_left_out"] == 0
    negative = frame[frame["sampled"]]
    assert negative["quantity"].eq(0).all() and negative["price"].tolist() == [4.0, 3.0, 3.0]
    assert frame["sample_id"].tolist()[:2] == ["online_retail:7:10:44444", "online_retail:7:10:44444:not:33333"]
    assert "negatives is 2, but at no purchase were there more than 1 products to draw from" in refusal(
        load_online_retail, folder=tmp_path, negatives=2
    )


def test_retail_negatives_are_drawn_uniformly_and_by_seed(tmp_path):
    """Nine products are on sale before customer 7 comes; it buys two of them, so each of the other seven is drawn with 2/7."""
    shelf = [(str(n), f"{n}0000", f"THING {n}", 1, "2010-11-01", float(n), 6.0) for n in range(1, 10)]
    sales = [(f"a{n}", f"{n}0000", f"THING {n}", 1, f"2010-11-0{n + 1}", float(n), 7.0) for n in (1, 2)]
    write_retail(tmp_path, first=shelf + sales, second=SECOND[-1:])
    draws = [load_online_retail(folder=tmp_path, negatives=2, seed=seed, history=1) for seed in range(60)]
    pd.testing.assert_frame_equal(draws[3], load_online_retail(folder=tmp_path, negatives=2, seed=3, history=1))
    drawn = pd.concat([draw[draw["sampled"] & (draw["user_id"] == "7")] for draw in draws])
    assert drawn.groupby("sample_id").size().max() > 1 and len(drawn) == 120
    counts = drawn["text_b"].value_counts()
    assert set(counts.index) == {f"THING {n}" for n in range(3, 10)} and counts.between(6, 32).all()  # 17 expected
    assert all(draw["sample_id"].is_unique for draw in draws)


def test_retail_samples_know_nothing_of_what_comes_later(tmp_path):
    """The log, and the log cut after each day: a purchase that both have, and that stands in both, is the same sample to the letter."""
    second = [*SECOND, ("14", "11111", "CUP, GREEN", 1, "2011-01-05", 9.0, 9.0), ("15", "11111", "CUP, GREEN", 1, "2011-01-06", 9.0, 6.0)]
    second += [("16", "11111", "CUP, GREEN", 1, "2011-01-07", 9.0, 5.0), ("17", "88888", "NEW", 1, "2011-01-08", 9.0, 7.0)]
    whole = load_online_retail(folder=write_retail(tmp_path, second=second)).set_index("sample_id")
    days = sorted({row[4] for row in FIRST + second})
    compared = 0
    for day in days[1:]:
        cut_log = [[row for row in rows if row[4] <= day] for rows in (FIRST, second)]
        try:
            past = load_online_retail(folder=write_retail(tmp_path, *cut_log)).set_index("sample_id")
        except ValueError as error:
            assert "no rows" in str(error)
            continue
        shared = past.index.intersection(whole.index)
        pd.testing.assert_frame_equal(past.loc[shared], whole.loc[shared])
        assert set(whole.index[whole["timestamp"] <= f"{day} 23:00:00"]) <= set(past.index)
        compared += len(shared)
    assert compared > 20
    assert whole["text_b"].str.contains("GREEN").sum() == 0  # three later lines with the new name, four lines with the old one


def test_retail_history_holds_a_purchase_until_it_is_taken_back(tmp_path):
    first = [
        ("1", "11111", "CUP", 1, "2010-11-01", 2.0, 7.0),
        ("1", "22222", "BOWL", 6, "2010-11-01", 3.0, 7.0),
        ("2", "33333", "JUG", 1, "2010-11-02", 4.0, 7.0),
        ("C3", "22222", "BOWL", -6, "2010-11-03", 3.0, 7.0),
        ("4", "44444", "PLATE", 1, "2010-11-04", 1.0, 7.0),
        ("5", "22222", "BOWL", 1, "2010-11-05", 3.0, 7.0),
    ]
    frame = load_online_retail(folder=write_retail(tmp_path, first, SECOND[-2:]))
    assert frame[["text_a", "text_b"]].to_numpy().tolist() == [
        ["BOWL | CUP", "JUG"],  # the bowl goes back the day after
        ["JUG | CUP", "PLATE"],
        ["PLATE | JUG | CUP", "BOWL"],  # and is bought again
    ]


def by_definition(lines: pd.DataFrame) -> list[tuple]:
    """Slow oracle of the samples and of what may be a negative: for each line, everything is read off the log before it."""
    rows, end = list(lines.itertuples()), len(lines)
    taken = loaders._taken_back(lines)
    until = [end if back < 0 else back for back in taken]
    sold = [r.product and not r.cancelled and isinstance(r.description, str) and r.price > 0 and r.quantity > 0 for r in rows]
    samples = []
    for now, row in enumerate(rows):
        if not sold[now] or not isinstance(row.user_id, str):
            continue
        seen = [i for i in range(end) if sold[i] and rows[i].timestamp <= row.timestamp]

        def name(item, seen=seen):
            counts, best = {}, None
            for i in seen:
                if rows[i].item_id == item:
                    counts[rows[i].description] = counts.get(rows[i].description, 0) + 1
                    best = rows[i].description if best is None or counts[rows[i].description] > counts[best] else best
            return best

        has = {}  # item -> since when, of what the customer has just before this line
        for i in range(now):
            if sold[i] and rows[i].user_id == row.user_id:
                since, ends = has.get(rows[i].item_id, (i, -1))
                has[rows[i].item_id] = (since, max(ends, until[i])) if i < ends else (i, until[i])
        has = {item: since for item, (since, ends) in has.items() if ends > now}
        ends = until[now]
        for i in range(now + 1, end):
            if sold[i] and rows[i].user_id == row.user_id and rows[i].item_id == row.item_id and i < ends:
                ends = max(ends, until[i])
        if row.item_id in has or ends < end or not has:
            continue
        touched = {r.item_id for r in rows if r.user_id == row.user_id and r.timestamp <= row.timestamp}
        touched |= {r.item_id for r in rows if r.invoice == row.invoice}
        history = [name(item) for item in sorted(has, key=has.get, reverse=True)]
        allowed = {rows[i].item_id for i in seen} - touched
        samples.append((f"{row.user_id}:{row.invoice}:{row.item_id}", " | ".join(history), name(row.item_id), allowed))
    return samples


@st.composite
def small_logs(draw):
    """Invoice lines of three customers and three products with changing names, some of them taken back."""
    first, day = [], 0
    for number in range(draw(st.integers(4, 14))):
        day += draw(st.integers(0, 1))
        user, item = draw(st.sampled_from([7.0, 8.0, 0.0])), draw(st.sampled_from("1234"))
        back = draw(st.integers(0, 3)) == 0
        name = draw(st.sampled_from(["OLD", "NEW"])) + item
        first.append((f"{'C' if back else ''}{number - day % 2}", item * 5, name, -1 if back else 1, f"2010-11-{day + 1:02d}", 2.0, user))
    return first


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=small_logs())
def test_retail_samples_agree_with_a_slow_oracle(tmp_path, first):
    second = [("99", "99999", "LAST", 1, "2011-01-01", 1.0, 5.0)]
    lines = online_retail_lines(folder=write_retail(tmp_path, first, second))
    expected = by_definition(lines)
    if len({sample[0] for sample in expected}) < len(expected):
        return  # an invoice that sells one product twice, taken back in between: the ids would repeat, and validate says so
    if not expected:
        assert "no rows" in refusal(load_online_retail, folder=tmp_path)
        return
    frame = load_online_retail(folder=tmp_path, history=9).set_index("query_id")
    assert frame[["text_a", "text_b"]].apply(tuple, axis=1).to_dict() == {key: (text, name) for key, text, name, _ in expected}
    for negatives in (1, 2):
        enough = {key: allowed for key, *_, allowed in expected if len(allowed) >= negatives}
        if not enough:
            assert "products to draw from" in refusal(load_online_retail, folder=tmp_path, negatives=negatives)
            continue
        drawn = load_online_retail(folder=tmp_path, negatives=negatives)
        assert set(drawn["query_id"]) == set(enough) and drawn.attrs["purchases_left_out"] == len(expected) - len(enough)
        for key, items in drawn[drawn["sampled"]].groupby("query_id")["item_id"]:
            assert len(set(items)) == negatives and set(items) <= enough[key]


def brute_force_returned(rows) -> list[bool]:
    """Slow oracle of the rule: each cancellation takes back the latest earlier, still standing purchase of the same size."""
    flags = [False] * len(rows)
    for i, (user, item, quantity, cancelled) in enumerate(rows):
        if cancelled and user is not None:
            for j in range(i - 1, -1, -1):
                if not rows[j][3] and not flags[j] and rows[j][:3] == (user, item, -quantity):
                    flags[j] = True
                    break
    return flags


events = st.tuples(st.sampled_from(["7", "8", None]), st.sampled_from(["a", "b"]), st.integers(1, 2), st.booleans())


@settings(max_examples=100, deadline=None)
@given(st.lists(events, max_size=14))
def test_returned_agrees_with_a_slow_oracle(drawn):
    rows = [(user, item, -quantity if cancelled else quantity, cancelled) for user, item, quantity, cancelled in drawn]
    lines = pd.DataFrame(rows, columns=["user_id", "item_id", "quantity", "cancelled"]).astype({"quantity": "int64", "cancelled": bool})
    taken = loaders._taken_back(lines)
    assert (taken >= 0).tolist() == brute_force_returned(rows)
    assert all(back == -1 or (back > row and rows[back][3] and rows[back][:2] == rows[row][:2]) for row, back in enumerate(taken))


def test_retail_refusals(tmp_path):
    write_retail(tmp_path)
    assert "history is 0, expected a whole number of 1 or more" in refusal(load_online_retail, history=0, folder=tmp_path)
    assert "negatives is -1" in refusal(load_online_retail, negatives=-1, folder=tmp_path)
    assert "max_users is 2.5" in refusal(load_online_retail, max_users=2.5, folder=tmp_path)
    assert "last_events is True" in refusal(load_online_retail, last_events=True, folder=tmp_path)
    pd.read_parquet(tmp_path / "online_retail_2009_2010.parquet").drop(columns="Price").to_parquet(
        tmp_path / "online_retail_2009_2010.parquet"
    )
    assert "column 'Price' is missing" in refusal(online_retail_lines, folder=tmp_path)
    write_retail(tmp_path, first=[(*FIRST[0][:4], "1 May 2010", *FIRST[0][5:])])
    assert "InvoiceDate must be like 2010-12-01 08:26:00; row 0 is '1 May 2010 10:00:00'" in refusal(online_retail_lines, folder=tmp_path)
    for column, value, expected in [
        ("Quantity", 2.5, "Quantity must be a whole number in every row; row 0 has 2.5"),
        ("Quantity", None, "Quantity must be a whole number in every row; row 0 has nan"),
        ("Price", "dear", "Price must be a number in every row; row 0 has 'dear'"),
        ("Price", float("inf"), "Price must be a number in every row; row 0 has inf"),
        ("Customer ID", "Ann", "Customer ID must be a whole number in every row; row 0 has 'Ann'"),
        ("Customer ID", 7.5, "Customer ID must be a whole number in every row; row 0 has 7.5"),
    ]:
        path = write_retail(tmp_path) / "online_retail_2009_2010.parquet"
        table = pd.read_parquet(path)
        table[column] = pd.Series([value, *table[column][1:]], dtype=object).map(lambda x, v=value: str(x) if isinstance(v, str) else x)
        table.to_parquet(path)
        message = refusal(online_retail_lines, folder=tmp_path)
        assert expected in message and str(path) in message
    cut(write_retail(tmp_path) / "online_retail_2010_2011.parquet")
    assert "2010_2011.parquet: not a readable Parquet file" in refusal(online_retail_lines, folder=tmp_path)


@pytest.fixture(scope="module")
def real_lines():
    real("online_retail")
    return online_retail_lines()


def test_real_online_retail_lines(real_lines):
    assert len(real_lines) == 525_461 + 531_282 - 22_130
    assert real_lines["cancelled"].sum() == 10_206
    assert real_lines["user_id"].nunique() == 5942 and "0" not in set(real_lines["user_id"])
    returned = real_lines[real_lines["returned"]]
    assert (returned["quantity"] > 0).all() and not returned["cancelled"].any()
    cancelled = real_lines.loc[real_lines["cancelled"] & real_lines["user_id"].notna()]
    matched = returned.groupby(["user_id", "item_id", "quantity"]).size()
    possible = cancelled.assign(quantity=-cancelled["quantity"]).groupby(["user_id", "item_id", "quantity"]).size()
    assert (matched <= possible.reindex(matched.index)).all()


def test_real_online_retail_samples(real_lines):
    frame = load_online_retail(max_users=50, last_events=4, negatives=2, history=3, seed=1)
    pairs = pd.MultiIndex.from_frame(frame[["user_id", "item_id"]])
    first_bought = real_lines.groupby(["user_id", "item_id"])["timestamp"].min().reindex(pairs).to_numpy()
    assert ((first_bought <= frame["timestamp"].to_numpy()) == ~frame["sampled"]).all()
    assert (first_bought[frame["sampled"]] > frame["timestamp"][frame["sampled"]].to_numpy()).any()  # some are bought later
    sold = real_lines[real_lines["product"] & ~real_lines["cancelled"] & (real_lines["price"] > 0)]
    assert (frame["item_id"].map(sold.groupby("item_id")["timestamp"].min()) <= frame["timestamp"]).all()
    assert frame["user_id"].nunique() == 50 and frame.groupby("user_id")["query_id"].nunique().max() == 4
    assert frame["text_a"].str.count(r" \| ").max() == 2
    assert frame[["text_a", "text_b", "label", "price"]].notna().all(axis=None)


# -------------------------------------------------------------------------------------------------------------------------- OBD


def test_obd_rows_by_hand(tmp_path):
    folder = tmp_path / "bts" / "men"
    folder.mkdir(parents=True)
    features = "user_feature_0,user_feature_1,user_feature_2,user_feature_3"
    (folder / "men.csv").write_text(
        f",timestamp,item_id,position,click,propensity_score,{features},user-item_affinity_0\n"
        "0,2019-11-24 00:00:34.5+00:00,1,3,0,0.25,aaaaaaaa,bbbbbbbb,cccccccc,dddddddd,0.0\n"
        "1,2019-11-24 00:00:35+00:00,0,1,1,0.5,aaaaaaaa,bbbbbbbb,cccccccc,12345678,0.0\n"
    )
    items = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n"
    (folder / "item_context.csv").write_text(items + "0,0,-0.499,eeeeeeee,ffffffff,00000000\n1,1,1.5,11111111,22222222,33333333\n")
    frame = load_obd(policy="bts", campaign="men", folder=tmp_path)
    assert frame["sample_id"].tolist() == ["obd:bts:men:0", "obd:bts:men:1"]
    assert frame["text_a"].tolist() == ["user aaaaaa bbbbbb cccccc dddddd", "user aaaaaa bbbbbb cccccc 123456"]
    assert frame["text_b"].tolist() == ["item 1 value +1.50 111111 222222 333333", "item 0 value -0.50 eeeeee ffffff 000000"]
    assert frame["label"].tolist() == [0.0, 1.0] and frame["clicked"].tolist() == [False, True]
    assert frame["position"].tolist() == [3, 1] and frame["propensity"].tolist() == [0.25, 0.5]
    assert frame["timestamp"].tolist() == [pd.Timestamp("2019-11-24 00:00:34.5"), pd.Timestamp("2019-11-24 00:00:35")]
    assert frame["user_id"].tolist() == ["aaaaaa-bbbbbb-cccccc-dddddd", "aaaaaa-bbbbbb-cccccc-123456"]
    assert frame.attrs == {"highest_grade": None}
    whole = (folder / "men.csv").read_text()
    for old, new, expected in [
        (",1,1,0.5,", ",1,2,0.5,", "click must be 0 or 1; row 1 has 2"),
        (",1,1,0.5,", ",1,yes,0.5,", "click must be a whole number in every row; row 1 has 'yes'"),
        (",0,1,1,0.5,", ",9,1,1,0.5,", "1 values of item_id are not described in the data set's other file, the first is '9'"),
    ]:
        (folder / "men.csv").write_text(whole.replace(old, new))
        message = refusal(load_obd, policy="bts", campaign="men", folder=tmp_path)
        assert expected in message and str(folder / "men.csv") in message
    (folder / "men.csv").write_text(whole)
    (folder / "item_context.csv").write_text(items + "0,0,x,eeeeeeee,ffffffff,00000000\n1,1,1.5,11111111,22222222,33333333\n")
    assert "item_feature_0 must be a number in every row; row 0 has 'x'" in refusal(load_obd, policy="bts", campaign="men", folder=tmp_path)
    (folder / "item_context.csv").write_text(items + "0,0,1,e,f,0\n1,1,1.5,1,2,3\n2,1,1.5,1,2,3\n")
    assert "describes item_id '1' more than once" in refusal(load_obd, policy="bts", campaign="men", folder=tmp_path)
    assert "policy is 'ts', expected one of 'random', 'bts'" in refusal(load_obd, policy="ts", folder=tmp_path)
    assert "campaign is 'kids'" in refusal(load_obd, campaign="kids", folder=tmp_path)


@pytest.mark.parametrize("policy", ["random", "bts"])
@pytest.mark.parametrize("campaign", ["all", "men", "women"])
def test_real_obd(policy, campaign):
    real("obd")
    frame = load_obd(policy=policy, campaign=campaign)
    items = {"all": 80, "men": 34, "women": 46}[campaign]
    assert len(frame) == 10_000 and frame["item_id"].nunique() == items == frame["text_b"].nunique()
    assert set(frame["position"]) == {1, 2, 3} and 0.003 < frame["label"].mean() < 0.008
    if policy == "random":
        np.testing.assert_allclose(frame["propensity"], 1 / items)
    # Six letters of a hash tell all its values apart: the tokens lose nothing.
    raw = pd.read_csv(locate(f"obd/{policy}/{campaign}/{campaign}.csv"))
    features = [f"user_feature_{i}" for i in range(4)]
    assert frame["user_id"].nunique() == len(raw[features].drop_duplicates())


# ---------------------------------------------------------------------------------------------------------------- WANDS and ESCI


def write_wands(folder: Path) -> Path:
    (folder / "query.csv").write_text('query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n1\t"fawkes 36"" vanity"\t\n')
    (folder / "product.csv").write_text(
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features\trating_count\t"
        "average_rating\treview_count\n"
        "7\tarm chair\tChairs|Seats\tFurniture / Chairs\tsoft, grey\tcolor:grey\t5.0\t4.5\t4.0\n"
        "8\tvanity\t\t\t\t\t\t\t\n"
    )
    (folder / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n5\t0\t7\tExact\n6\t0\t8\tIrrelevant\n9\t1\t8\tPartial\n")
    return folder


def test_wands_rows_by_hand(tmp_path):
    frame = load_wands(folder=write_wands(tmp_path))
    assert frame["sample_id"].tolist() == ["wands:5", "wands:6", "wands:9"]
    assert frame["text_a"].tolist() == ["salon chair", "salon chair", 'fawkes 36" vanity']
    assert frame["text_b"].tolist() == ["arm chair", "vanity", "vanity"]
    assert frame["label"].tolist() == [1.0, 0.0, 0.5] and frame["grade"].tolist() == [2, 0, 1]
    assert frame["query_id"].tolist() == ["0", "0", "1"] and frame["item_id"].tolist() == ["7", "8", "8"]
    assert load_wands(folder=tmp_path, text="name and class")["text_b"].tolist() == ["arm chair. Chairs|Seats", "vanity", "vanity"]
    assert load_wands(folder=tmp_path, text="name and description")["text_b"][0] == "arm chair. soft, grey"


def test_wands_refusals(tmp_path):
    write_wands(tmp_path)
    assert "text is 'title'" in refusal(load_wands, text="title", folder=tmp_path)
    label = tmp_path / "label.csv"
    whole = label.read_text()
    label.write_text(whole.replace("Partial", "partial"))
    assert "labels must be Exact, Partial, Irrelevant; row 2 has 'partial'" in refusal(load_wands, folder=tmp_path)
    label.write_text(whole + "10\t1\t99\tExact\n")
    assert "1 values of product_id are not described in the data set's other file, the first is '99'" in refusal(
        load_wands, folder=tmp_path
    )
    label.write_text(whole.replace("\t", ","))
    assert "column 'id', 'query_id', 'product_id', 'label' is missing" in refusal(load_wands, folder=tmp_path)
    label.write_text("")
    assert "label.csv: the file is empty" in refusal(load_wands, folder=tmp_path)


def write_esci(folder: Path) -> Path:
    columns = ["example_id", "query", "query_id", "product_id", "product_locale", "esci_label", "small_version", "large_version", "split"]
    rows = [
        (0, "usb hub", 5, "B1", "us", "E", 1, 1, "train"),
        (1, "usb hub", 5, "B2", "us", "S", 1, 1, "train"),
        (2, "usb hub", 5, "B3", "us", "C", 0, 1, "train"),
        (3, "vase", 6, "B3", "us", "I", 1, 1, "test"),
        (4, "hub usb", 7, "B1", "es", "E", 1, 1, "test"),
    ]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "shopping_queries_dataset_examples.parquet")
    columns = [
        "product_id",
        "product_title",
        "product_description",
        "product_bullet_point",
        "product_brand",
        "product_color",
        "product_locale",
    ]
    rows = [
        ("B1", "Hub", "4 ports", None, "A", None, "us"),
        ("B2", "Cable", None, None, None, None, "us"),
        ("B3", "Vase", "", None, None, None, "us"),
        ("B1", "Concentrador", None, None, "A", None, "es"),
        ("B9", "Never judged", None, None, None, None, "us"),
    ]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "shopping_queries_dataset_products.parquet")
    return folder


def test_esci_rows_by_hand(tmp_path):
    frame = load_esci(folder=write_esci(tmp_path))
    assert frame["sample_id"].tolist() == ["esci:0", "esci:1", "esci:3"]
    assert frame["label"].tolist() == [1.0, 0.1, 0.0] and frame["esci_label"].tolist() == ["E", "S", "I"]
    assert frame["text_a"].tolist() == ["usb hub", "usb hub", "vase"] and frame["text_b"].tolist() == ["Hub", "Cable", "Vase"]
    assert frame["query_id"].tolist() == ["5", "5", "6"] and frame["split"].tolist() == ["train", "train", "test"]
    assert load_esci(folder=tmp_path, version="large")["label"].tolist() == [1.0, 0.1, 0.01, 0.0]
    assert load_esci(folder=tmp_path, locale="es")["text_b"].tolist() == ["Concentrador"]
    assert load_esci(folder=tmp_path, split="test")["sample_id"].tolist() == ["esci:3"]
    assert load_esci(folder=tmp_path, text="title and description")["text_b"].tolist() == ["Hub. 4 ports", "Cable", "Vase"]


def test_frames_say_what_their_labels_are_to_ndcg(tmp_path):
    """ESCI's labels are gains as published; the others' are grades divided by the highest, or 0 and 1."""
    for part in ("chorus", "retail", "wands", "esci"):
        (tmp_path / part).mkdir()
    frames = [
        load_chorus(folder=write_chorus(tmp_path / "chorus")),
        load_wands(folder=write_wands(tmp_path / "wands")),
        load_esci(folder=write_esci(tmp_path / "esci")),
        load_online_retail(folder=write_retail(tmp_path / "retail")),
    ]
    assert [frame.attrs["highest_grade"] for frame in frames] == [3, 2, None, None]
    chorus, wands = frames[:2]
    assert (chorus["label"] * 3 == chorus["grade"]).all() and (wands["label"] * 2 == wands["grade"]).all()
    assert chorus[chorus["query_id"] == "cup"].attrs["highest_grade"] == 3  # a part of a frame still says so


def test_esci_refusals(tmp_path):
    write_esci(tmp_path)
    for option in (dict(locale="de"), dict(version="tiny"), dict(split="valid"), dict(text="brand")):
        (name,) = option
        assert f"{name} is {option[name]!r}, expected one of" in refusal(load_esci, folder=tmp_path, **option)
    assert "esci, locale jp, small version: no rows" in refusal(load_esci, locale="jp", folder=tmp_path)
    products = tmp_path / "shopping_queries_dataset_products.parquet"
    whole = pd.read_parquet(products)
    whole[whole["product_id"] != "B2"].to_parquet(products)
    assert "1 values of product_id are not described in the data set's other file, the first is 'B2'" in refusal(load_esci, folder=tmp_path)
    whole.drop(columns="product_title").to_parquet(products)
    assert "column 'product_title' is missing" in refusal(load_esci, folder=tmp_path)
    cut(products)
    assert "products.parquet: not a readable Parquet file" in refusal(load_esci, folder=tmp_path)
