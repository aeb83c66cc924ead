"""Every notebook under nbs/ runs from top to bottom in a clean kernel, by papermill, in the folder where a reader would open it."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(path.relative_to(NBS).as_posix() for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
CELL_LIMIT_S = 300

# The parameters with which a study is quick enough for a test. Every study has a line; {} means that its defaults are.
QUICK = {
    "studies/weighted_bert.ipynb": {"pairs": 32, "seeds": 1, "epochs": 1, "test_pairs": 60},
    "studies/multi_objective.ipynb": {
        "objectives": ["relevance", "click"],
        "grid": 1,
        "balances": ["sum", "upgrad"],
        "pairs": 48,
        "test_pairs": 72,
        "clicked": 8,
        "unclicked": 1,
        "importance_pairs": 8,
    },
}


# What takes minutes at its own size, and shows the same at a smaller one.
SMALLER = {"tutorials/article_a.ipynb": {"pairs": 32, "held_out_pairs": 120, "epochs": 1, "seeds": 1}}


def files_below(folder):
    return {path for path in folder.rglob("*") if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def refuse_unknown(name, parameters):
    """papermill ignores a parameter that the notebook does not have."""
    unknown = set(parameters) - set(papermill.inspect_notebook(NBS / name))
    assert not unknown, f"{name} has no parameter {sorted(unknown)}"


def test_every_study_has_quick_parameters_and_every_line_is_a_notebook():
    assert set(QUICK) | set(SMALLER) <= set(NOTEBOOKS)
    assert {name for name in NOTEBOOKS if name.startswith("studies/")} <= set(QUICK)


def test_a_parameter_that_a_notebook_does_not_have_is_refused():
    with pytest.raises(AssertionError, match="epohcs"):
        refuse_unknown(NOTEBOOKS[0], {"epohcs": 1})


def check_results(name, parameters, results, shown):
    """What every study's results.json has to say, and that its notebook says which data it ran on."""
    assert results["study"] == Path(name).stem
    assert {key: results["parameters"][key] for key in parameters if key != "report_dir"} == QUICK[name]
    sources = results["data"].get("sources", [results["data"]])
    for source in sources:
        assert source["rows"] > 0 and source["simulated"] is (source["name"] == "shop")
    assert results["data"]["rows"] == sum(source["rows"] for source in sources)
    assert ("SIMULATED" in shown) is results["data"]["simulated"] is any(source["simulated"] for source in sources)
    assert results["environment"]["versions"]["torch"] and results["environment"]["device"]
    assert results["duration_s"] > 0
    keys = [(row.get("data"), row.get("noise"), row["variant"], row["seed"]) for row in results["results"]]
    assert len(set(keys)) == len(keys) and {seed for *_, seed in keys} == set(range(results["parameters"]["seeds"]))
    for row in results["results"]:
        metrics = {key: value for key, value in row.items() if key.startswith(("ndcg@10", "auc")) and value is not None}
        assert metrics and all(0 <= value <= 1 for value in metrics.values())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    parameters = QUICK.get(name, SMALLER.get(name, {}))
    if name in QUICK:
        parameters = parameters | {"report_dir": str(tmp_path / "report")}
    refuse_unknown(name, parameters)
    monkeypatch.delenv("MPLBACKEND")  # conftest.py sets it for the tests themselves; a kernel draws inline
    before = files_below(NBS)
    out = tmp_path / Path(name).name
    papermill.execute_notebook(
        NBS / name,
        out,
        parameters=parameters,
        cwd=(NBS / name).parent,
        kernel_name="python3",
        start_timeout=120,
        execution_timeout=CELL_LIMIT_S,
        progress_bar=False,
    )
    ran = nbformat.read(out, as_version=4)
    cells = [cell for cell in ran.cells if cell.cell_type == "code" and cell.source.strip()]
    assert cells
    assert all(cell.execution_count for cell in cells)
    assert [output.ename for cell in cells for output in cell.outputs if output.output_type == "error"] == []
    assert files_below(NBS) == before
    if name in QUICK:
        results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
        check_results(name, parameters, results, "".join(str(cell.outputs) for cell in cells))
