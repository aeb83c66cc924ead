"""Figures of several objectives show the numbers they were given: points, bars, and the area that is dominated."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from recsys_importance.evaluation import hypervolume
from recsys_importance.plots import objective_norms, pareto_front

POINTS = pd.DataFrame(
    [
        ("a", "fixed", "only x", 0.9, 0.2, -0.1),
        ("a", "fixed", "only x", 0.7, 0.4, -0.3),
        ("b", "fixed", "", 0.4, 0.5, 0.2),
        ("c", "fixed", "", 0.3, 0.1, 0.1),
        ("upgrad", "upgrad", "", 0.6, 0.6, 0.6),
    ],
    columns=["variant", "family", "label", "x", "y", "z"],
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def shaded(axis):
    """Area of the filled polygon, by the shoelace formula."""
    total = 0.0
    for collection in axis.collections:
        for path in collection.get_paths() if len(collection.get_facecolor()) else []:
            x, y = path.vertices.T
            total += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return total


def test_the_shaded_area_of_each_panel_is_the_hypervolume_of_the_fixed_weights_means():
    figure = pareto_front(POINTS, ["x", "y", "z"], unit="gain", title="t")
    means = POINTS[POINTS["family"] == "fixed"].groupby("variant")[["x", "y", "z"]].mean()
    assert [axis.get_xlabel() for axis in figure.axes] == ["x: gain", "x: gain", "y: gain"]
    for axis, pair in zip(figure.axes, (["x", "y"], ["x", "z"], ["y", "z"]), strict=True):
        expected = hypervolume(means[pair], 0)
        assert np.isclose(shaded(axis), expected) and expected > 0


def test_means_over_seeds_are_drawn_with_bars_from_lowest_to_highest():
    axis = pareto_front(POINTS, ["x", "y"], unit="gain", title="t").axes[0]
    fixed, upgrad = axis.containers
    np.testing.assert_allclose(np.array(fixed.lines[0].get_data(), dtype=float), [[0.8, 0.4, 0.3], [0.3, 0.5, 0.1]])
    np.testing.assert_allclose(np.array(upgrad.lines[0].get_data(), dtype=float), [[0.6], [0.6]])
    horizontal = [segment[:, 0].tolist() for segment in fixed.lines[2][0].get_segments()]
    np.testing.assert_allclose(horizontal[0], [0.7, 0.9])
    assert "only x" in [text.get_text() for text in axis.texts]


def test_models_that_all_lost_leave_no_area():
    lost = POINTS.assign(x=-POINTS["x"])
    assert shaded(pareto_front(lost, ["x", "y"], unit="gain", title="t").axes[0]) == 0


def test_norms_of_zero_are_left_out_of_the_panels_of_their_objective():
    norms = pd.DataFrame({"x": [1.0, 2.0, 0.0], "y": [3.0, 4.0, 5.0], "z": [0.0, 6.0, 7.0], "kind": ["a", "b", "a"]})
    figure = objective_norms(norms, ["x", "y", "z"], kind="kind", title="t")
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert drawn == [[[[1, 3]], [[2, 4]]], [[], [[2, 6]]], [[[5, 7]], [[4, 6]]]]


@pytest.mark.parametrize("objectives", [["x"], ["x", "x"]])
def test_fewer_than_two_objectives_are_refused(objectives):
    with pytest.raises(ValueError, match="two or more different objectives"):
        pareto_front(POINTS, objectives, unit="gain", title="t")


def test_a_table_without_the_columns_is_refused():
    with pytest.raises(ValueError, match="expected rows with columns"):
        pareto_front(POINTS.drop(columns="family"), ["x", "y"], unit="gain", title="t")
    with pytest.raises(ValueError, match="expected rows with columns"):
        objective_norms(pd.DataFrame({"x": [1.0]}), ["x", "y"], kind="kind", title="t")
