"""The tutorial on article B: what its committed outputs say, another size, and what the article's shapes are without Keras."""

import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/tutorials/article_b.ipynb"


def run(out, **parameters):
    papermill.execute_notebook(NOTEBOOK, out, parameters=parameters, cwd=NOTEBOOK.parent, kernel_name="python3", progress_bar=False)
    return nbformat.read(out, as_version=4)


def shown(notebook):
    """All text that the notebook's cells put out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_committed_outputs_show_the_wrong_shapes_the_right_ones_and_what_is_simulated():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = shown(notebook)
    lines = [line.split("  ") for line in text.splitlines()]
    shapes = {line[0].strip(): line[-1].strip() for line in lines if line[-1].strip().startswith("(4,")}
    assert shapes["Dot(axes=1) of the two"] == shapes["softmax"] == "(4, 128, 128)"
    assert (shapes["output"], shapes["labels"]) == ("(4, 128, 1)", "(4,)")
    assert (shapes["attention over the batch"], shapes["output, a logit per pair"]) == ("(4,)", "(4, 1)")
    assert text.count("SIMULATED") >= 2
    figures = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "shares.items()" in cell.source]
    assert len(figures) == 1 and 'f"SIMULATED: ' in figures[0]


def test_the_committed_outputs_hold_what_the_prose_says_of_them():
    rows = [line.rsplit(maxsplit=3) for line in shown(nbformat.read(NOTEBOOK, as_version=4)).splitlines()]
    three = {
        row[0].strip(): [float(x) for x in row[1:]] for row in rows if len(row) == 4 and all(x.lstrip("-")[:2] == "0." for x in row[1:])
    }
    two = {" ".join(row[:2]): [float(x) for x in row[2:]] for row in rows if len(row) == 4 and row[2][:3] == row[3][:3] == "-0."}
    found, aware = three["attention (article B)"], three["attention that sees the label"]
    assert abs(found[0] - 0.5) < 0.1 and found[1] < 0.4 and found[2] > 0.6  # all, label 1, label 0
    assert abs(aware[0] - three["loss"][0]) < 0.02 and min(aware) > 0.7 and three["gradient norm"][0] > 0.7
    assert two["attention (article B)"][0] < -0.2  # against importance by gradients
    assert three["recent popularity"][0] > three["no attention"][0] > three["popularity"][0]
    lines = [line for line in shown(nbformat.read(NOTEBOOK, as_version=4)).splitlines() if "λ = 0.3 against no attention" in line]
    difference, low, high = (
        float(x) for line in (lines[0], lines[2]) for x in re.findall(r"-?\d\.\d{4}", line)[: 2 if line is lines[0] else 1]
    )
    assert low < 0 < high and abs(difference) < 0.1 * three["recent popularity"][0]


def test_the_article_s_product_is_outer_and_its_softmax_knows_no_other_sample():
    """In NumPy: contracting axis 1 of (B, 1, 128) with itself, then a softmax over the last axis."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(3, 1, 128)), rng.normal(size=(3, 1, 128))
    product = np.stack([np.tensordot(a, b, axes=(0, 0)) for a, b in zip(u, v, strict=True)])
    assert product.shape == (3, 128, 128) and np.allclose(product, u[:, 0, :, None] * v[:, 0, None, :])
    shares = np.exp(product) / np.exp(product).sum(-1, keepdims=True)
    assert np.allclose(shares.sum(-1), 1) and not np.allclose(shares.sum(0), 1)  # over coordinates, not over samples


def test_another_size(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    small = dict(queries=250, customers=120, events=20, test_customers=25, seeds=1, epochs=2, scored=1200)
    text = shown(run(tmp_path / "out.ipynb", **small))  # its cells assert what it says
    assert "SIMULATED: 12000 samples" in text and "120 customers, " in text and "25 customers to rank for" in text


def test_settings_that_the_tutorial_cannot_have_are_refused(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="expected seeds and epochs of 1 or more"):
        run(tmp_path / "out.ipynb", noise=0.7)
