"""The study runner: strict parameters, results that must say what they are, resuming, reports that stand alone, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

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


def test_resumed_recomputes_when_the_code_changed(tmp_path, monkeypatch):
    study.resumed(tmp_path, "one", {}, lambda: {"by": "old code"})
    monkeypatch.setattr(study, "_code", lambda: "another")
    assert study.resumed(tmp_path, "one", {}, lambda: {"by": "new code"}) == {"by": "new code"}


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
    assert "SIMULATED" in page and "<script" not in page and page.count("data:image/png;base64,") >= 5
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
