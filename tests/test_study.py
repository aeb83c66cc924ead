"""The study runner: strict parameters, results that must say what they are, resuming, reports that stand alone, and the command."""

import datetime
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import recsys_importance
from recsys_importance import study
from recsys_importance.cli import app, find_study, parse_settings

ROOT = Path(__file__).resolve().parent.parent
ROW = {"variant": "uniform", "seed": 0, "ndcg@10": 0.5, "auc": 0.5}


def complete(**changed):
    return {
        "study": "tiny",
        "parameters": {},
        "data": {"name": "typed by hand", "simulated": True, "rows": 1},
        "environment": {},
        "results": [ROW],
        "summary": [ROW],
        "duration_s": 0.1,
    } | changed


def write_notebook(path, *sources, parameters="noise: float = 0.1\nname: str = 'a'\nreport_dir: str = 'reports'", tags=("parameters",)):
    cells = [nbformat.v4.new_markdown_cell("# Tiny & <b>bold</b>"), nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)})]
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells, *map(nbformat.v4.new_code_cell, sources)]), path)
    return path


def test_parameters_are_read_from_the_one_tagged_cell(tmp_path):
    assert study.study_parameters(write_notebook(tmp_path / "a.ipynb")) == {"noise": 0.1, "name": "a", "report_dir": "reports"}
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'; a study has exactly one"):
        study.study_parameters(write_notebook(tmp_path / "b.ipynb", tags=()))
    with pytest.raises(FileNotFoundError, match="no notebook"):
        study.study_parameters(tmp_path / "c.ipynb")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nosie": 0.2}, "no parameter 'nosie'; did you mean 'noise'"),
        ({"zzz": 1}, "it has noise, name, report_dir"),
        ({"noise": "0.2"}, "'noise' of a.ipynb is a float"),
        ({"noise": True}, "'noise' of a.ipynb is a float"),
        ({"name": 3}, "'name' of a.ipynb is a str"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path, given, message):
    notebook = write_notebook(tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match=message):
        study.run_study(notebook, given, folder=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_int_is_a_float_where_one_is_expected(tmp_path):
    checked = study.check_parameters(write_notebook(tmp_path / "a.ipynb"), {"noise": 1})
    assert checked == {"noise": 1.0} and isinstance(checked["noise"], float)


@pytest.mark.parametrize("key", study.REQUIRED_RESULTS)
def test_results_state_everything(tmp_path, key):
    whole = complete()
    with pytest.raises(ValueError, match=f"results lack {key}"):
        study.write_results(tmp_path, {name: value for name, value in whole.items() if name != key})
    assert list(tmp_path.iterdir()) == []


def test_results_without_rows_or_with_nan_are_refused(tmp_path):
    with pytest.raises(ValueError, match="results lack rows"):
        study.write_results(tmp_path, complete(results=[]))
    with pytest.raises(ValueError, match="results lack data.simulated"):
        study.write_results(tmp_path, complete(data={"name": "x", "rows": 1}))
    with pytest.raises(ValueError, match="NaN or infinity"):
        study.write_results(tmp_path, complete(results=[ROW | {"auc": float("nan")}]))
    assert list(tmp_path.iterdir()) == []


def test_results_round_trip_and_end_the_checkpoints(tmp_path):
    study.resumed(tmp_path, "one", {}, lambda: {"value": 1})
    assert (tmp_path / "unfinished" / "one.json").exists()
    path = study.write_results(tmp_path, complete())
    assert json.loads(path.read_text()) == complete() and sorted(p.name for p in tmp_path.iterdir()) == ["results.json"]


def test_resumed_computes_once_per_identity_and_survives_a_broken_checkpoint(tmp_path, capsys):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (1, 2)}

    first = study.resumed(tmp_path, "one", {"seed": 0}, compute)
    assert first == {"pair": [1, 2]}  # as it will come back from the file
    assert study.resumed(tmp_path, "one", {"seed": 0}, compute) == first and len(calls) == 1
    assert "kept from the run that was interrupted" in capsys.readouterr().out
    study.resumed(tmp_path, "one", {"seed": 1}, compute)
    assert len(calls) == 2
    (tmp_path / "unfinished" / "one.json").write_text('{"identity": ')
    study.resumed(tmp_path, "one", {"seed": 1}, compute)
    assert len(calls) == 3


PROCESS = """
import sys
import pandas as pd
from recsys_importance.study import resumed
def kind(x):
    return "known" if x in {"a", "b", "c", "d"} else [y for y in (x, 1.5, None)]
def compute():
    return [kind("a"), sys.argv[2]]
print(resumed(sys.argv[1], "one", {"data": pd.DataFrame({"x": ["a", None]}), "rate": 0.1}, compute)[1])
"""


def test_resumed_recognises_in_another_process_what_it_kept(tmp_path):
    """Other hash seeds order sets otherwise."""
    shown = [
        subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path), word],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for word, seed in (("first", "1"), ("second", "2"), ("third", "3"))
    ]
    assert shown == ["first"] * 3


def in_turn(*values):
    """A computation that gives these values, one a call: its code stays the same."""
    left = list(values)
    return lambda: left.pop(0)


def test_resumed_recomputes_when_the_code_changed(tmp_path, monkeypatch):
    compute = in_turn("by old code", "by new code")
    study.resumed(tmp_path, "one", {}, compute)
    monkeypatch.setattr(study, "_package_code", lambda: "another")
    assert study.resumed(tmp_path, "one", {}, compute) == "by new code"


PAIRS = pd.DataFrame({"text": ["mug", "cup", "jug"], "label": [1.0, 0.0, 1.0]})
MODEL = {"weight": np.arange(4, dtype=np.float32)}


@pytest.mark.parametrize(
    "changed",
    [
        {"data": PAIRS.assign(label=[0.0, 1.0, 1.0])},  # the same rows and the same sum of labels
        {"data": PAIRS.iloc[::-1]},
        {"data": PAIRS.assign(text=["mug", "cup", "Jug"])},
        {"data": PAIRS.astype({"label": "float32"})},
        {"model": {"weight": np.nextafter(MODEL["weight"], np.float32(9))}},
        {"rate": 1},
        {"rate": "1.0"},
    ],
)
def test_resumed_tells_apart_what_differs_in_anything(tmp_path, changed):
    identity = {"data": PAIRS, "model": MODEL, "rate": 1.0}
    for number, given in enumerate([identity, {name: identity[name] for name in reversed(identity)}, identity | changed, identity]):
        found = study.resumed(tmp_path, "one", given, partial(int, number))
        assert found == [0, 0, 2, 3][number]


def test_resumed_recomputes_when_a_library_is_another(tmp_path, monkeypatch):
    compute = in_turn("old torch", "new torch")
    study.resumed(tmp_path, "one", {}, compute)
    real = study.importlib.metadata.version
    monkeypatch.setattr(study.importlib.metadata, "version", lambda package: "9.9" if package == "torch" else real(package))
    assert study.resumed(tmp_path, "one", {}, compute) == "new torch"


CELL = """
from functools import partial
SCALE = 2
def half(x): return x / {divisor}
class Rule:
    def __call__(self, x): return half(x) + {added}
def run(seed):
    return [Rule()(x) for x in (seed, {first}, {second})]
compute = partial(run, 3)
"""


def test_resumed_recomputes_when_the_computation_was_written_anew(tmp_path):
    """As in the cells of a notebook: what the computation calls counts, however deep; a comment and another place in the file do not."""

    def compute(before="", **changed):
        names = {"__name__": "a_notebook"}
        exec(before + CELL.format(**dict(divisor=2, added=1, first=4, second=6) | changed), names)
        return names["compute"]

    assert study.resumed(tmp_path, "one", {}, compute()) == [2.5, 3.0, 4.0]
    path, stamp = tmp_path / "unfinished" / "one.json", None
    for changed, expected in [(dict(divisor=4), 1.75), (dict(added=5), 6.5), (dict(first=6, second=4), 2.5)]:
        assert study.resumed(tmp_path, "one", {}, compute(**changed))[0] == expected
        assert study.resumed(tmp_path, "one", {}, compute()) == [2.5, 3.0, 4.0]
    stamp = path.stat().st_mtime_ns
    assert study.resumed(tmp_path, "one", {}, compute("# a comment\n\n")) == [2.5, 3.0, 4.0] and path.stat().st_mtime_ns == stamp


DAMAGED = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "a number": b"3",
    "no keys": b"{}",
    "cut short": b'{"identity": ',
    "keys missing": b'{"identity": null, "value": 1}',
    "deep": b"[" * 100_000,
    "a zero byte": b"\0",
    "NaN": b"NaN",
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_kept_file_of_any_other_kind_is_computed_anew(tmp_path, kind):
    compute = in_turn(1, 2, 3)
    assert study.resumed(tmp_path, "one", {}, compute) == 1
    (tmp_path / "unfinished" / "one.json").write_bytes(DAMAGED[kind])
    assert [study.resumed(tmp_path, "one", {}, compute) for _ in range(2)] == [2, 2]


def test_a_kept_file_that_was_touched_is_computed_anew(tmp_path):
    compute = in_turn(*({"ndcg@10": value} for value in (0.5, 0.7, 0.7, 0.7, 0.7)))
    study.resumed(tmp_path, "one", {}, compute)
    path = tmp_path / "unfinished" / "one.json"
    kept = json.loads(path.read_text())
    for changed in [kept | {"value": {"ndcg@10": 0.9}}, {"identity": kept["identity"]}, kept | {"more": 1}, kept | {"sha256": None}]:
        path.write_text(json.dumps(changed))
        assert study.resumed(tmp_path, "one", {}, compute) == {"ndcg@10": 0.7}


@pytest.mark.parametrize(
    "value", [None, [], {}, "", 0, False, {"a": None}, [None], float("nan"), [float("inf"), -0.0], "\ud800", 1e-320], ids=ascii
)
def test_whatever_json_holds_comes_back_as_it_was(tmp_path, value):
    compute = in_turn(value, "computed again")
    first, again = [study.resumed(tmp_path, "one", {}, compute) for _ in range(2)]
    assert repr(first) == repr(again) == repr(value) and type(again) is type(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: "a", "1": "b"}, "one: the result has the key 1; JSON holds text keys only"),
        ({"a": [{None: 1}]}, r"the result\['a'\]\[0\] has the key None"),
        ({"a": {1, 2}}, r"the result\['a'\] is a set, which JSON cannot hold"),
        (np.float32(1), "the result is a float32"),
        ([np.arange(2)], r"the result\[0\] is a ndarray"),
        (PAIRS, "the result is a DataFrame"),
        (b"1", "the result is a bytes"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_not_kept(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        study.resumed(tmp_path, "one", {}, lambda: value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../one", "a/b", "/one", "a\\b", "a\0", "x" * 300])
def test_a_name_that_is_no_file_name_is_refused_before_anything_is_computed(tmp_path, name):
    with pytest.raises(ValueError, match="expected a file name"):
        study.resumed(tmp_path / "report", name, {}, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_an_identity_without_contents_and_a_folder_in_the_way_are_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="whose contents cannot be told"):
        study.resumed(tmp_path, "one", {"loss": object()}, pytest.fail)
    (tmp_path / "unfinished" / "one.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder; move it away"):
        study.resumed(tmp_path, "one", {}, pytest.fail)


def test_only_checkpoints_go_when_the_study_is_complete(tmp_path):
    study.resumed(tmp_path, "one", {}, lambda: 1)
    mine = tmp_path / "unfinished" / "mine.json"
    mine.write_text('{"identity": "somebody else\'s"}')
    study.write_results(tmp_path, complete())
    assert sorted(p.name for p in (tmp_path / "unfinished").iterdir()) == ["mine.json"]


def test_nothing_is_kept_of_a_computation_that_failed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        study.resumed(tmp_path, "one", {}, lambda: {"value": 1 / 0})
    assert not (tmp_path / "unfinished").exists()


GOOD = """
from recsys_importance.study import write_results
import pandas as pd, sys
print("progress", file=sys.stderr)
row = {"variant": "uniform", "seed": 0, "ndcg@10": noise, "auc": 0.5}
write_results(report_dir, {"study": "tiny", "parameters": {"noise": noise}, "data": {"name": "typed by hand", "simulated": True, "rows": 1},
                           "environment": {}, "results": [row], "summary": [row], "duration_s": 0.0})
pd.DataFrame({"text": ["<script>alert('x')</script> & $5 <b>mug</b>"]})
"""


def test_a_study_runs_headless_and_its_report_stands_alone(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "tiny.ipynb", GOOD)
    results = study.run_study(notebook, {"noise": 0.25}, folder=tmp_path / "report")
    assert results["results"][0]["ndcg@10"] == 0.25
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["results.json", "tiny.html", "tiny.ipynb"]
    page = (tmp_path / "report" / "tiny.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>mug" not in page
    assert "http://" not in page and "https://" not in page and "import pandas" not in page and "progress" not in page
    assert "<title>Tiny &amp; &lt;b&gt;bold" in page
    assert "progress" in capsys.readouterr().err


ODD = "{noise} {0} }{ {{x}} 100% 'a' \"b\" $HOME ü名 \\n \n end"


def test_any_name_of_a_folder_is_taken_as_it_is(tmp_path):
    """Braces are places to fill in to papermill and to str.format; the rest goes through a parameter's literal and through a kernel."""
    home = tmp_path / f"home of {ODD}"
    home.mkdir()
    notebook = write_notebook(home / "{name} tiny.ipynb", GOOD + "print(name)\nassert __import__('os').getcwd() == name")
    notebook.write_text(notebook.read_text().replace("# Tiny", "# {title} {0} {"))
    folder = tmp_path / ODD
    results = study.run_study(notebook, {"name": str(home)}, folder=folder)
    assert results["study"] == "tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["results.json", "{name} tiny.html", "{name} tiny.ipynb"]
    assert "<title>{title} {0} { &amp; &lt;b&gt;bold" in (folder / "{name} tiny.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([home.name, folder.name])
    assert study.resumed(folder, "{0} }", {"folder": str(folder)}, lambda: 1) == 1


def test_a_study_is_never_written_over_itself(tmp_path):
    notebook = write_notebook(tmp_path / "tiny.ipynb", GOOD)
    before = notebook.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link", tmp_path / "link" / ".." / tmp_path.name):
        with pytest.raises(ValueError, match="where the notebook itself lies"):
            study.run_study(notebook, folder=folder)
    assert notebook.read_bytes() == before


def test_a_cell_that_takes_too_long_and_a_kernel_that_dies_are_one_error(tmp_path):
    cases = [("import time; time.sleep(60)", 1, "a cell ran longer than 1 s"), ("import os; os._exit(9)", 60, "its kernel died")]
    for source, timeout, message in cases:
        with pytest.raises(RuntimeError, match=f"tiny.ipynb failed: {message}"):
            study.run_study(write_notebook(tmp_path / "tiny.ipynb", GOOD, source), folder=tmp_path / "report", timeout=timeout)
        assert not (tmp_path / "report" / "results.json").exists()


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [{"metadata"'])
def test_a_file_that_is_no_notebook_is_one_error(tmp_path, content):
    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(ValueError, match="a.ipynb is not a Jupyter notebook, or was cut short"):
        study.study_parameters(tmp_path / "a.ipynb")


@pytest.mark.parametrize("parameters", ["a = b", "%magic", "a, b = 1, 2", "a.b = 1", "a = max(1, 2)"])
def test_parameters_that_are_no_literals_are_one_error(tmp_path, parameters):
    with pytest.raises(ValueError, match="the parameters of a.ipynb must be lines of the form name = literal"):
        study.study_parameters(write_notebook(tmp_path / "a.ipynb", parameters=parameters))


def test_values_that_papermill_would_turn_into_others_are_refused(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", parameters="options: dict = {}\nnames: list = []")
    for given in ({"options": {1: 2}}, {"options": {"since": datetime.date(2026, 1, 1)}}, {"names": [{1}]}):
        with pytest.raises(ValueError, match="a.ipynb: parameter '(options|names)'.* (has the key 1|is a date|is a set)"):
            study.check_parameters(notebook, given)


@pytest.mark.parametrize(
    ("source", "message"),
    [("raise ValueError('the data ran out')", "tiny.ipynb failed: ValueError: the data ran out"), ("1 + 1", "wrote no results.json")],
)
def test_a_failed_study_leaves_no_result_that_could_be_taken_for_its_own(tmp_path, source, message):
    folder = tmp_path / "report"
    study.run_study(write_notebook(tmp_path / "tiny.ipynb", GOOD), folder=folder)
    with pytest.raises(RuntimeError, match=message):
        study.run_study(write_notebook(tmp_path / "tiny.ipynb", source), folder=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tiny.ipynb"]


def test_the_command_prints_the_table_and_where_the_report_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "tiny.ipynb", GOOD)
    (tmp_path / "full.yaml").write_text("noise: 0.5\nname: from the file\n")
    result = CliRunner().invoke(app, ["study", "tiny.ipynb", "--config", "full.yaml", "--set", "noise=0.75"])
    assert result.exit_code == 0, result.output
    assert "0.7500" in result.output and "SIMULATED" in result.output and "reports/tiny/tiny.html" in result.output
    assert (tmp_path / "reports" / "tiny" / "results.json").exists()


def checkout(root: Path, **studies) -> Path:
    (root / "nbs" / "studies").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    for name, title in studies.items():
        write_notebook(root / "nbs" / "studies" / f"{name}.ipynb", title)
    return root


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A checkout that the package seems to run from."""
    root = checkout(tmp_path / "home", both="1", mine="1")
    monkeypatch.setattr(recsys_importance, "__file__", str(root / "recsys_importance" / "__init__.py"))
    return root


def test_a_stray_study_further_up_is_never_taken(home, tmp_path, monkeypatch):
    checkout(tmp_path / "above", both="stray", stray="stray")
    project = checkout(tmp_path / "above" / "project", own="1")
    (project / "deep" / "nbs" / "studies").mkdir(parents=True)
    for folder in (project, project / "deep"):
        monkeypatch.chdir(folder)
        assert find_study("both") == home / "nbs" / "studies" / "both.ipynb"
        assert find_study("own") == project / "nbs" / "studies" / "own.ipynb"
        with pytest.raises(ValueError, match="no study 'stray'; there are: both, mine, own$"):
            find_study("stray")
    loose = tmp_path / "above" / "loose"  # a project by its .git alone
    (loose / ".git").mkdir(parents=True)
    monkeypatch.chdir(loose)
    with pytest.raises(ValueError, match="there are: both, mine$"):
        find_study("stray")


def test_two_different_studies_of_one_name_are_an_error_and_the_same_one_twice_is_not(home, tmp_path, monkeypatch):
    project = checkout(tmp_path / "project", both="other")
    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match="two different studies are called 'both': .*home.* and .*project.*; give the path of one"):
        find_study("both")
    assert find_study("nbs/studies/both.ipynb") == Path("nbs/studies/both.ipynb")
    (project / "nbs" / "studies" / "both.ipynb").write_bytes((home / "nbs" / "studies" / "both.ipynb").read_bytes())
    assert find_study("both") == home / "nbs" / "studies" / "both.ipynb"
    monkeypatch.chdir(home / "nbs")
    assert find_study("both") == home / "nbs" / "studies" / "both.ipynb"


def test_an_installed_package_has_no_studies_beside_it(home, tmp_path, monkeypatch):
    (home / "pyproject.toml").unlink()  # as in site-packages, where another package may have left a folder nbs
    monkeypatch.chdir(checkout(tmp_path / "project", own="1"))
    with pytest.raises(ValueError, match="no study 'both'; there are: own$"):
        find_study("both")


@pytest.mark.parametrize(
    "name", ["../studies/both", "studies/both", "/both", "both/", "./both", "", "..", "both.ipynb", "a.ipynb/", "both\0"]
)
def test_a_name_that_is_a_path_is_no_study(home, monkeypatch, name):
    monkeypatch.chdir(home / "nbs")
    with pytest.raises(ValueError, match="no notebook|no study"):
        find_study(name)


SHOWN = "noise: float = 0.1\ndata: str = ''\nreport_dir: str = ''"


def test_a_data_set_wins_over_a_file_of_its_name_and_the_command_says_what_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_notebook(
        tmp_path / "tiny.ipynb", GOOD, "assert data == 'shop', data", parameters="noise: float = 0.1\ndata: str = ''\nreport_dir: str = ''"
    )
    (tmp_path / "shop").write_text("in the way")
    result = CliRunner().invoke(app, ["study", "tiny.ipynb", "--data", "shop"])
    assert result.exit_code == 0, result.output
    assert f"study: {tmp_path / 'tiny.ipynb'}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "nothing"], "no study 'nothing'; there are: multi_objective, weighted_bert"),
        (["study", "weighted_bert", "--set", "nosie=0.2"], "did you mean 'noise'"),
        (["study", "weighted_bert", "--set", "noise"], "expected name=value, got 'noise'"),
        (["study", "weighted_bert", "--config", "missing.yaml"], "missing.yaml"),
        (["study", "weighted_bert", "--set", "noise=[0.2"], "noise=[0.2 is not YAML"),
        (["data", "corus"], "no data set 'corus'"),
    ],
)
def test_the_command_fails_with_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_settings_are_yaml_values():
    assert parse_settings(["a=1", "b=0.5", "c=text", "d=[x, y]", "e="]) == {"a": 1, "b": 0.5, "c": "text", "d": ["x", "y"], "e": ""}


def test_the_full_size_grid_has_only_parameters_of_its_study():
    import yaml

    for config in sorted((ROOT / "nbs" / "studies").glob("*.yaml")):
        study.check_parameters(find_study(config.stem), yaml.safe_load(config.read_text()))


def test_a_config_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- noise\n")
    result = CliRunner().invoke(app, ["study", "weighted_bert", "--config", str(tmp_path / "list.yaml")])
    assert result.exit_code == 1 and "must hold parameters as `name: value` lines, got a list" in result.stderr


def without_data_or_network(tmp_path):
    """An environment in which nothing can be found or fetched."""
    kept = {name: value for name, value in os.environ.items() if name != "RECSYS_IMPORTANCE_DATA"}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return kept | nowhere | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MPLBACKEND": "agg"}


QUICK = ["pairs=32", "seeds=1", "epochs=1", "test_pairs=72", "noise=0.25"]


def run_weighted_bert(tmp_path, *arguments, env):
    settings = [part for setting in QUICK for part in ("--set", setting)]
    start = [sys.executable, "-c", "from recsys_importance.cli import app; app()", "study", "weighted_bert"]
    command = [*start, "--folder", str(tmp_path / "report"), *settings, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_the_main_study_runs_on_the_simulated_shop_where_nothing_else_can_be_had(tmp_path):
    run = run_weighted_bert(tmp_path, env=without_data_or_network(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    first = run.stdout.splitlines()[0]
    assert first.startswith("data: shop (SIMULATED: ") and "Chorus cannot be had" in first
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["data"]["name"] == "shop" and results["data"]["simulated"] is True and results["data"]["fallback"]
    assert {(row["noise"], row["variant"], row["seed"]) for row in results["results"]} == {
        (noise, variant, 0) for noise in (0.0, 0.25) for variant in ("uniform", "importance", "inverse")
    }
    page = (tmp_path / "report" / "weighted_bert.html").read_text(encoding="utf-8")
    differences = any(row["low"] is not None for row in results["differences"])  # too few queries have no interval, and no figure of them
    assert "SIMULATED" in page and "<script" not in page and page.count("data:image/png;base64,") >= 4 + differences
    assert not (tmp_path / "report" / "unfinished").exists()


def test_your_own_small_file_is_enough_for_the_main_study(tmp_path):
    """60 rows, awkward texts, an undefined AUC: all pairs there are are used, and nothing is taken for markup."""
    rows = [
        f'"<script>alert({q})</script> $x$ mug {q}","{"red" if c % 2 else "blue"} mug & <b>cup</b> {c}",{c % 2}'
        for q in range(12)
        for c in range(5)
    ]
    (tmp_path / "pairs.csv").write_text("text_a,text_b,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    run = run_weighted_bert(tmp_path, "--data", str(tmp_path / "pairs.csv"), env=without_data_or_network(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["data"]["simulated"] is False and results["data"]["rows"] == 60 and results["data"]["train_pairs"] <= 32
    page = (tmp_path / "report" / "weighted_bert.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>cup" not in page and "&lt;script&gt;" in page


def test_the_main_study_gives_the_same_report_on_tensorflow(tmp_path):
    """The same tables and figures; the ranking of the encoder before training, which both read from one folder, to rounding."""
    settings = ("pairs=16", "noise=0", "test_pairs=36", "warmup_epochs=0", "weightings=[uniform, importance]")
    found, pages = {}, {}
    for backend in ("pytorch", "tensorflow"):
        arguments = [part for setting in (*settings, f"backend={backend}") for part in ("--set", setting)]
        run = run_weighted_bert(tmp_path / backend, "--data", "shop", *arguments, env=without_data_or_network(tmp_path))
        assert run.returncode == 0, run.stderr[-3000:]
        found[backend] = json.loads((tmp_path / backend / "report" / "results.json").read_text())
        pages[backend] = (tmp_path / backend / "report" / "weighted_bert.html").read_text(encoding="utf-8")
    ours, theirs = found["tensorflow"], found["pytorch"]
    assert ours["environment"]["versions"]["tensorflow"] and "tensorflow" not in theirs["environment"]["versions"]
    assert set(ours) == set(theirs)
    for part in ("results", "summary", "baselines", "differences", "weight"):
        assert [list(row) for row in ours[part]] == [list(row) for row in theirs[part]], part
    assert pages["tensorflow"].count("data:image/png;base64,") == pages["pytorch"].count("data:image/png;base64,") >= 2
    for row, other in zip(ours["baselines"], theirs["baselines"], strict=True):
        assert row["ranking"] == other["ranking"] and row["ndcg@10"] == pytest.approx(other["ndcg@10"], rel=1e-6)
    # the norms before training weigh the same samples alike
    for row, other in zip(ours["weight"], theirs["weight"], strict=True):
        assert row["effective"] == pytest.approx(other["effective"], rel=1e-4)
