"""Every notebook under nbs/ runs from top to bottom in a clean kernel, by papermill, in the folder where a reader would open it."""

from pathlib import Path

import nbformat
import papermill
import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(path.relative_to(NBS).as_posix() for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
CELL_LIMIT_S = 300

# The parameters with which a study is quick enough for a test. Every study has a line; {} means that its defaults are.
QUICK = {}


def files_below(folder):
    return {path for path in folder.rglob("*") if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def refuse_unknown(name, parameters):
    """papermill ignores a parameter that the notebook does not have."""
    unknown = set(parameters) - set(papermill.inspect_notebook(NBS / name))
    assert not unknown, f"{name} has no parameter {sorted(unknown)}"


def test_every_study_has_quick_parameters_and_every_line_is_a_notebook():
    assert set(QUICK) <= set(NOTEBOOKS)
    assert {name for name in NOTEBOOKS if name.startswith("studies/")} <= set(QUICK)


def test_a_parameter_that_a_notebook_does_not_have_is_refused():
    with pytest.raises(AssertionError, match="epohcs"):
        refuse_unknown(NOTEBOOKS[0], {"epohcs": 1})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    parameters = QUICK.get(name, {})
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
