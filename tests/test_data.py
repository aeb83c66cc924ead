"""The public face: one way in by name or path, every re-export, and nothing heavy imported."""

import enum
import importlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pooch
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recsys_importance.data as data
from recsys_importance.data import registry


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_is_its_modules_own_object():
    offered = {name for names in data._MODULES.values() for name in names}
    assert set(data.__all__) == {"load", "obtain", "Obtained", *data._all_} and set(data._all_) <= offered
    for module, names in data._MODULES.items():
        home = importlib.import_module(f"recsys_importance.data.{module}")
        for name in names:
            assert getattr(data, name) is getattr(home, name)
    assert set(data.__all__) <= set(dir(data))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        data.nothing  # noqa: B018


def test_import_loads_no_framework_and_no_downloader():
    heavy = "('torch', 'tensorflow', 'transformers', 'obp', 'pooch', 'pandera', 'pandas', 'matplotlib')"
    assert in_a_fresh_interpreter(f"import sys, recsys_importance.data; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_everything_of_data_loads_no_framework():
    heavy = "('torch', 'tensorflow', 'transformers', 'obp')"
    code = f"import sys; from recsys_importance.data import *; print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_interpreter(code) == "[]"


def test_the_frame_module_needs_neither_downloads_nor_loaders():
    code = "import sys, recsys_importance.data.frame; print([m for m in ('pooch', 'recsys_importance.data.loaders') if m in sys.modules])"
    assert in_a_fresh_interpreter(code) == "[]"


def test_every_data_set_of_the_registry_has_its_loader(monkeypatch):
    loaders = importlib.import_module("recsys_importance.data.loaders")
    for name in data.DATASETS:
        if name == "shop":
            continue
        monkeypatch.setattr(loaders, f"load_{name}", lambda _name=name, **options: (_name, options))
        assert data.load(name, some="option") == (name, {"some": "option"})


def test_load_shop_passes_settings_and_seed():
    settings = data.ShopSettings(queries=4, items=200, candidates=10, label_noise=0.25)
    expected = data.simulate_shop(settings, seed=3)
    pd.testing.assert_frame_equal(data.load("shop", queries=4, items=200, candidates=10, label_noise=0.25, seed=3), expected)
    assert len(expected) == 40 and expected["noisy"].sum() == 10
    with pytest.raises(TypeError, match="querys"):
        data.load("shop", querys=4)


def test_a_named_frame_says_what_its_labels_are_and_a_file_of_your_own_does_not(tmp_path):
    shop = data.load("shop", queries=4, items=200, candidates=10)
    assert shop.attrs == {"highest_grade": 3} and (shop["true_label"] * 3 == shop["grade"]).all()
    shop.to_parquet(tmp_path / "mine.parquet")
    assert data.load(tmp_path / "mine.parquet").attrs == {}


def test_load_by_path(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("query,text_b,label\nmug,Mug red,1\n")
    for form in (path, str(path)):
        frame = data.load(form, columns={"text_a": "query"})
        assert frame["sample_id"].tolist() == ["mine:0"] and frame["text_a"].tolist() == ["mug"]


@pytest.mark.parametrize("name", ["chorus", "online_retail"])
def test_a_data_set_wins_over_a_file_of_its_name(tmp_path, monkeypatch, name):
    loaders = importlib.import_module("recsys_importance.data.loaders")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("in the way")
    monkeypatch.setattr(loaders, f"load_{name}", lambda: "the data set")
    assert data.load(name) == "the data set"


def test_unknown_names_and_missing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="no data set is called 'corus'; did you mean 'chorus'. known: chorus, online_retail, obd, wands, esci, shop"
    ):
        data.load("corus")
    with pytest.raises(ValueError, match="chorus.csv: no such file"):
        data.load("chorus.csv")
    with pytest.raises(ValueError, match="no such file"):
        data.load("folder/chorus")
    with pytest.raises(ValueError, match="files that end in '' are not read"):
        (tmp_path / "log").write_text("x")
        data.load("log")
    (tmp_path / "logs").mkdir()
    for path in ("logs", tmp_path / "logs", "logs/"):
        with pytest.raises(ValueError, match="logs: a folder, not a file"):
            data.load(path)


@given(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=10))
def test_any_unknown_word_is_refused_with_the_known_names(word):
    if word not in data.DATASETS:
        with pytest.raises(ValueError, match="known: chorus, online_retail, obd, wands, esci, shop"):
            data.load(word)


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """A machine without cache, override, packages or network."""

    def refuse(self, url, output_file, pooch):
        raise ConnectionError("no network")

    monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(registry, "_in_package", lambda file: None)
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", refuse)
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["chorus", "online_retail", "wands", "esci"])
def test_without_network_each_data_set_says_so_and_leaves_nothing(nothing_here, name):
    with pytest.raises(data.DatasetUnavailable, match=f"^{name}/.*no network.*use the simulated data set 'shop'"):
        data.load(name)
    assert [path for path in nothing_here.rglob("*") if path.is_file()] == []


def test_without_its_package_obd_says_what_to_install(nothing_here):
    with pytest.raises(data.DatasetUnavailable, match="pip install obp==0.4.1$"):
        data.load("obd")


def test_the_shop_needs_nothing(nothing_here):
    assert len(data.load("shop", queries=2, items=200, candidates=8)) == 16


def test_a_prepared_frame_survives_a_file(tmp_path):
    """Shop to CSV and back: what training reads is the same, to the last bit."""
    shop = data.load("shop", queries=3, items=200, candidates=8, label_noise=0.2, seed=1)
    shop.to_csv(tmp_path / "shop.csv", index=False)
    shop.to_parquet(tmp_path / "shop.parquet")
    columns = ["sample_id", "text_a", "text_b", "label", "query_id", "user_id", "item_id", "position", "propensity", "price", "quantity"]
    for ending in ("csv", "parquet"):
        again = data.load(tmp_path / f"shop.{ending}")
        pd.testing.assert_frame_equal(again[[*columns, "clicked", "noisy", "timestamp"]], shop[[*columns, "clicked", "noisy", "timestamp"]])


def test_auto_takes_the_shop_and_says_why_where_chorus_cannot_be_had(monkeypatch, tmp_path):
    from recsys_importance.data import registry

    def no_network(file, target):
        raise ConnectionError("no network")

    monkeypatch.delenv("RECSYS_IMPORTANCE_DATA", raising=False)
    monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(registry, "_download", no_network)
    source = data.obtain("auto")
    assert (source.name, source.simulated) == ("shop", True) and "no network" in source.fallback
    assert source.announcement.startswith("data: shop (SIMULATED: ") and "Chorus cannot be had" in source.announcement
    with pytest.raises(data.DatasetUnavailable):
        data.obtain("chorus")


def test_a_damaged_chorus_file_is_an_error_and_never_a_reason_for_the_shop(monkeypatch, tmp_path):
    folder = tmp_path / "chorus"
    folder.mkdir()
    (folder / "Broad_Query_Set_individual_ratings.csv").write_text("query,docid\n")
    monkeypatch.setenv("RECSYS_IMPORTANCE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="sha256"):
        data.obtain("auto")


def test_a_shop_saved_to_a_file_stays_simulated(tmp_path):
    shop = data.load("shop", queries=12, candidates=8)
    shop.to_parquet(tmp_path / "mine.parquet")
    source = data.obtain(tmp_path / "mine.parquet")
    assert source.simulated and "SIMULATED" in source.announcement
    shop[["text_a", "text_b", "label"]].to_csv(tmp_path / "mine.csv", index=False)
    assert not data.obtain(tmp_path / "mine.csv").simulated


# ------------------------------------------------------------------------------------------------------------------ fingerprint

FRAME = pd.DataFrame(
    {
        "sample_id": ["a", "b", "c"],
        "text_a": ["mug", "mug", None],
        "label": [1.0, 0.0, 1.0],
        "position": pd.array([1, None, 3], dtype="Int64"),
        "clicked": pd.array([True, None, False], dtype="boolean"),
        "timestamp": pd.to_datetime(["2026-01-01", None, "2026-01-02"]),
        "tags": [["x", "y"], [], None],
        "kind": pd.Categorical(["p", "q", "p"]),
    }
)


def altered() -> dict:
    """The frame with one thing changed, for every kind of thing there is."""
    two = FRAME.copy()
    two["tags"] = [["x"], ["y"], None]
    return {
        "labels flipped, same sum": FRAME.assign(label=[0.0, 1.0, 1.0]),
        "label in the last bit": FRAME.assign(label=[1.0, 5e-324, 1.0]),
        "rows in another order": FRAME.iloc[[1, 0, 2]],
        "rows fewer": FRAME.iloc[:2],
        "columns in another order": FRAME[FRAME.columns[::-1]],
        "a column renamed": FRAME.rename(columns={"label": "grade"}),
        "a column less": FRAME.drop(columns="kind"),
        "text": FRAME.assign(text_a=["mug", "Mug", None]),
        "text where it was missing": FRAME.assign(text_a=["mug", "mug", ""]),
        "text moved over a border": FRAME.assign(sample_id=["ab", "", "c"]),
        "missing elsewhere": FRAME.assign(position=pd.array([1, 0, None], dtype="Int64")),
        "0 where it was missing": FRAME.assign(position=pd.array([1, 0, 3], dtype="Int64")),
        "flag": FRAME.assign(clicked=pd.array([True, False, False], dtype="boolean")),
        "time": FRAME.assign(timestamp=FRAME["timestamp"] + pd.Timedelta(1, "ns")),
        "dtype": FRAME.astype({"label": "float32"}),
        "integers for booleans": FRAME.assign(clicked=FRAME["clicked"].astype("Int64")),
        "lists": two,
        "categories nobody has": FRAME.assign(kind=FRAME["kind"].cat.add_categories("r")),
        "object for text": FRAME.assign(text_a=FRAME["text_a"].astype(object)),
    }


def test_a_fingerprint_tells_every_change_of_a_frame_and_nothing_else():
    prints = {name: data.fingerprint(frame) for name, frame in altered().items()} | {"as it is": data.fingerprint(FRAME)}
    assert len(set(prints.values())) == len(prints) and all(len(value) == 64 for value in prints.values())
    assert data.fingerprint(FRAME.copy().set_index(pd.Index([7, 8, 9]))) == prints["as it is"]
    assert data.fingerprint(FRAME.iloc[::2].iloc[::-1]) == data.fingerprint(FRAME.iloc[[2, 0]])  # views and copies alike


def test_a_fingerprint_is_the_same_in_another_process(tmp_path):
    FRAME.to_pickle(tmp_path / "frame.pickle")
    code = f"import pandas as pd, recsys_importance.data as d; x = pd.read_pickle({str(tmp_path / 'frame.pickle')!r}); "
    code += "print(d.fingerprint(x, {'b', } and {'b': 1, 'a': (1.5, None, 'text')}))"
    found = {in_a_fresh_interpreter(code) for _ in range(2)}
    assert found == {data.fingerprint(FRAME, {"a": (1.5, None, "text"), "b": 1})}


def test_a_fingerprint_tells_values_apart_that_look_alike():
    import torch

    class Setting(enum.Enum):
        ONE = 1

    values = [1, 1.0, True, "1", b"1", None, "None", [1], (1,), {"1": 1}, {1: 1}, [[1], []], [[], [1]], [], {}, "", 0.0, -0.0, float("nan")]
    values += [float("inf"), Setting.ONE, np.float32(1), np.array(1.0), np.array([1.0]), np.array([[1.0]]), np.array([1]), np.array(["1"])]
    values += [
        pd.Timestamp("2026-01-01"),
        pd.Timestamp("2026-01-01", tz="UTC"),
        pd.Series([1.0]),
        pd.Series([1.0], index=["a"]),
        pd.Index([1.0]),
    ]
    values += [torch.ones(1), torch.ones(1, 1), torch.ones(1).bfloat16(), torch.ones(1, dtype=torch.int64), torch.tensor(1.0)]
    values += [np.array([1, "1"], dtype=object), np.array(["1", 1], dtype=object)]
    assert len({data.fingerprint(value) for value in values}) == len(values)
    assert len({data.fingerprint(*pair) for pair in [("a", "b"), ("ab", ""), ("", "ab"), ("a",), (["a", "b"],)]}) == 5
    assert data.fingerprint(float("nan")) == data.fingerprint(float("nan"))


def test_a_fingerprint_of_weights_sees_one_bit_of_one_weight():
    import torch

    model = torch.nn.Linear(3, 2)
    before = data.fingerprint(model.state_dict())
    assert data.fingerprint({name: weight.clone() for name, weight in reversed(model.state_dict().items())}) == before
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    assert data.fingerprint(model.state_dict()) != before


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "the value"),
        ({"loss": [1, max]}, r"the value\['loss'\]\[1\]"),
        (pd.DataFrame({"x": [1, object()]}), "the value, column 'x', row 1"),
        ({1, 2}, "the value"),
        (lambda: 1, "the value"),
    ],
)
def test_what_has_no_contents_to_be_known_by_is_refused(value, place):
    with pytest.raises(ValueError, match=f"^{place} is a .*, whose contents cannot be told"):
        data.fingerprint(value)


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(allow_nan=False) | st.none()), min_size=1, max_size=5), st.randoms())
def test_frames_have_one_fingerprint_exactly_if_they_are_equal(rows, random):
    """Against pandas' own slow comparison, value for value."""
    frame = pd.DataFrame(rows, columns=["text", "number"]).astype({"text": "str", "number": "float64"})
    other = frame.copy()
    if random.random() < 0.7:
        row, column = random.randrange(len(frame)), random.randrange(2)
        other.iloc[row, column] = other.iloc[random.randrange(len(frame)), column]
    same = frame.equals(other) and (np.signbit(frame["number"]) == np.signbit(other["number"])).all()
    assert (data.fingerprint(frame) == data.fingerprint(other)) == same
