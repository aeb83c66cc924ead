"""The worked example at other sizes and seeds: its own assertions hold, and its numbers are those of its formula."""

from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.importance import Weighting, importance

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/tutorials/thousand_samples.ipynb"


def run(out, **parameters):
    papermill.execute_notebook(NOTEBOOK, out, parameters=parameters, cwd=NOTEBOOK.parent, kernel_name="python3", progress_bar=False)
    return shown(nbformat.read(out, as_version=4))


def shown(notebook):
    """All text that the notebook's cells put out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_committed_outputs_show_the_fractions_and_the_article_s_claim():
    text = shown(nbformat.read(NOTEBOOK, as_version=4))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("1-500", "501-1000"))}
    assert rows["1-500"] == ["500", "1", "0.50", "0.0005", "1/550", "1/550"]
    assert rows["501-1000"] == ["500", "1/10", "0.01", "0.0100", "1/5500", "1/5500"]
    assert "10/11" in text and "1/11" in text


def test_another_size_and_seed(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    text = run(tmp_path / "out.ipynb", samples=240, seed=3, steps=30)  # its cells assert what it says
    assert "1/132 " in text and "1/1320 " in text  # 120 + 12
    assert "1/550 " in text  # the article's table is about 1,000 samples whatever is run here


@pytest.mark.parametrize("parameters", [{"samples": 201}, {"samples": 100}, {"steps": 5}])
def test_sizes_that_the_example_cannot_have_are_refused(parameters, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="samples must be even and 200 or more, and steps 30 or more"):
        run(tmp_path / "out.ipynb", **parameters)


@pytest.mark.parametrize("seed", range(3))
def test_targets_give_any_model_the_norms_that_are_wanted(seed):
    """y = z - s / (2 ||dz||), with dz from central differences instead of autograd."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    x, step = torch.randn(6, 3, dtype=torch.float64), 1e-5
    columns = []
    with torch.no_grad():
        for parameter in model.parameters():
            for place in range(parameter.numel()):
                values = []
                for move in (step, -2 * step, step):
                    parameter.view(-1)[place] += move
                    values.append(model(x)[:, 0])
                columns.append((values[0] - values[1]) / (2 * step))
        slopes = torch.stack(columns, dim=1).norm(dim=1)  # (6,)
        wanted = torch.tensor([1.0, 0.1] * 3, dtype=torch.float64)
        batch = {"x": x, "y": model(x)[:, 0] - wanted / (2 * slopes)}
    norms = gradient_norms(model, lambda model, batch: (model(batch["x"])[:, 0] - batch["y"]) ** 2, batch)
    np.testing.assert_allclose(norms.numpy(), wanted.numpy(), rtol=1e-8)


def test_summed_with_sum_one_is_averaged_with_mean_one():
    """sum_i I_i g_i, the article's update with each sample's own gradient, is N times what sum-1 weights give under a mean."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    batch = {"x": torch.randn(7, 4, dtype=torch.float64), "y": torch.randn(7, dtype=torch.float64)}
    own = (2 * (batch["x"] @ model.weight[0] - batch["y"])[:, None] * batch["x"]).detach().numpy()
    article = (importance(np.linalg.norm(own, axis=1))[:, None] * own).sum(0)
    for normalisation, times in [("mean", 1), ("sum", 7)]:
        model.zero_grad()
        weighting = Weighting(normalisation=normalisation)
        weighted_backward(model, lambda model, batch: (model(batch["x"])[:, 0] - batch["y"]) ** 2, batch, weighting)
        np.testing.assert_allclose(model.weight.grad[0].numpy() * times, article, rtol=1e-12)
