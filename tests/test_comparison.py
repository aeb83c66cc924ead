"""A comparison's numbers against loops and sums by hand; a card says what it was given, and a saved model comes back with it."""

import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt
from sklearn.metrics import ndcg_score, roc_auc_score
from tiny import tiny_frame, tiny_pair

from recsys_importance import __version__, comparison
from recsys_importance.comparison import compare, compare_predictions, model_card
from recsys_importance.data import Obtained
from recsys_importance.evaluation import evaluate, paired_interval
from recsys_importance.importance import Weighting
from recsys_importance.models import load_pair_model, predict, save_pair_model
from recsys_importance.objectives import Objective, Objectives, click, display, relevance
from recsys_importance.plots import before_and_after

METRICS = ["ndcg@10", "mrr", "auc_per_query", "log_loss"]


def log(queries: int = 12, candidates: int = 6, *, seed: int = 0) -> pd.DataFrame:
    """A made-up log with clicks, positions, propensities, sessions and users."""
    rng = np.random.default_rng(seed)
    count = queries * candidates
    return pd.DataFrame(
        {
            "sample_id": [f"s{i:04d}" for i in range(count)],
            "text_a": "red mug",
            "text_b": "usb hub",
            "label": rng.integers(0, 4, count) / 3,
            "query_id": np.repeat([f"q{q % (queries // 2)}" for q in range(queries)], candidates),
            "session_id": np.repeat([f"z{q}" for q in range(queries)], candidates),
            "user_id": rng.choice(["ann", "bob", "eve", "joe"], count),
            "clicked": rng.random(count) < 0.3,
            "display_weight": rng.uniform(0.2, 3, count),
            "examination": rng.uniform(0.2, 1, count),
        }
    )


def guesses(frame: pd.DataFrame, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Three made-up models; probabilities rounded, so that some are tied."""
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.05, 0.95, len(frame)).round(1) for name in ("before", "uniform", "weighted")}


def row_of(found, objective, metric, model):
    return found.table.set_index(["objective", "metric", "model"]).loc[(objective, metric, model)]


# --- objectives without a correction --------------------------------------------------------------------------------------------------


def test_by_query_it_is_evaluate_and_paired_interval():
    frame, models = log(30), guesses(log(30))
    found = compare_predictions(models, frame, Objectives(relevance(), click()), reference="uniform", level=0.9)
    assert found.table[["objective", "metric", "model"]].values.tolist() == [
        list(each) for each in itertools.product(("relevance", "click"), METRICS, models)
    ]
    assert (found.unit, found.reference, found.level, found.rows, found.simulated) == ("query_id", "uniform", 0.9, 180, False)
    for objective, labels in (("relevance", frame["label"]), ("click", frame["clicked"].astype(float))):
        of = {name: evaluate(frame.assign(label=labels), p, probabilities=p).per_query for name, p in models.items()}
        for metric, model in itertools.product(METRICS, models):
            row, values = row_of(found, objective, metric, model), of[model][metric]
            assert row["value"] == values.mean() and row["units"] == values.notna().sum()
            assert row["better"] == ("lower" if metric == "log_loss" else "higher")
            if model == "uniform":
                assert row[["difference", "low", "high"]].isna().all()
            else:
                expected = paired_interval(values, of["uniform"][metric], level=0.9)
                assert tuple(row[["difference", "low", "high", "p", "seeds", "over"]]) == (*expected[:3], expected.p, 1, "units")
                assert row["units"] == expected.queries
                assert math.isclose(row["difference"], row["value"] - row_of(found, objective, metric, "uniform")["value"], abs_tol=1e-12)


def test_groups_are_averaged_within_their_unit():
    """Three sessions of one query weigh as much as one session of another."""
    frame = log(4).assign(query_id=np.repeat(["a", "a", "a", "b"], 6))
    models = guesses(frame)
    found = compare_predictions(models, frame, Objectives(relevance()), reference="before", group="session_id", unit="query_id")
    for model, p in models.items():
        of = [ndcg_score([2.0 ** (3 * part["label"]) - 1], [p[part.index]], k=10) for _, part in frame.groupby("session_id")]
        assert math.isclose(row_of(found, "relevance", "ndcg@10", model)["value"], (np.mean(of[:3]) + of[3]) / 2)
    assert found.unit == "query_id" and row_of(found, "relevance", "ndcg@10", "before")["units"] == 2


def test_k_and_the_highest_grade_are_those_of_evaluate():
    frame, models = log(), guesses(log())
    found = compare_predictions(models, frame, Objectives(relevance()), reference="before", k=2, highest_grade=1)
    expected = evaluate(frame, models["uniform"], k=2, highest_grade=1).summary["ndcg@2"]
    assert row_of(found, "relevance", "ndcg@2", "uniform")["value"] == expected


def test_missing_labels_count_for_no_metric():
    frame, models = log(), guesses(log())
    frame["clicked"] = frame["clicked"].astype("boolean").mask(np.arange(len(frame)) % 5 == 0)
    there = frame["clicked"].notna()
    found = compare_predictions(models, frame, Objectives(relevance(), click(), display()), reference="before")
    alone = compare_predictions(
        {name: p[there] for name, p in models.items()}, frame[there], Objectives(click(), display()), reference="before"
    )
    pd.testing.assert_frame_equal(found.table[found.table["objective"] != "relevance"].reset_index(drop=True), alone.table)
    whole = compare_predictions(models, frame, Objectives(relevance()), reference="before")
    pd.testing.assert_frame_equal(found.table[found.table["objective"] == "relevance"], whole.table)


def test_the_value_is_the_mean_over_seeds():
    frame = log()
    first, second, before = guesses(frame).values()
    objectives = Objectives(relevance(), display())
    found = compare_predictions({"before": before, "after": [first, second]}, frame, objectives, reference="before")
    alone = [compare_predictions({"before": before, "after": p}, frame, objectives, reference="before") for p in (first, second)]
    for column in ("value", "difference"):
        np.testing.assert_allclose(found.table[column], (alone[0].table[column] + alone[1].table[column]) / 2, rtol=1e-12)
    pooled = compare_predictions(
        {"before": before, "after": [first, second]}, frame.drop(columns="query_id"), objectives, reference="before"
    )
    aucs = [roc_auc_score(frame["label"] >= 0.5, p) for p in (first, second)]
    assert math.isclose(row_of(pooled, "relevance", "auc", "after")["value"], np.mean(aucs))


# --- display --------------------------------------------------------------------------------------------------------------------------


def ranks_over_orders(scores):
    """Every order of the listings that the scores allow, as ranks from 1."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield np.argsort(order) + 1


def sums_by_hand(frame, p, gain, row, examination):
    """(numerator, denominator) of each display metric: loops over pages, pairs and orders."""
    totals = {metric: np.zeros(2) for metric in METRICS}
    for _, page in frame.groupby("session_id"):
        i, clicked = page.index.to_numpy(), page["clicked"].to_numpy()
        g, scores = gain[i] * clicked, p[i]
        discount = np.mean([1 / np.log2(1 + ranks) for ranks in ranks_over_orders(scores)], axis=0)
        reciprocal = np.mean([1 / ranks for ranks in ranks_over_orders(scores)], axis=0)
        best = max((g / np.log2(1 + np.argsort(order) + 1)).sum() for order in itertools.permutations(range(len(i))))
        totals["ndcg@10"] += (g * discount).sum(), best
        totals["mrr"] += (g * reciprocal).sum(), g.sum()
        for a, b in itertools.product(np.flatnonzero(clicked), np.flatnonzero(~clicked)):
            pair = gain[i[a]] * row[i[b]]
            totals["auc_per_query"] += pair * (1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0), pair
        for j in i:
            chance = examination[j] * p[j]
            totals["log_loss"] += -row[j] * math.log(chance if frame["clicked"][j] else 1 - chance), row[j]
    return {metric: top / bottom for metric, (top, bottom) in totals.items()}


@pytest.mark.parametrize("correction", ["propensity", "examination"])
def test_display_metrics_are_ratios_of_sums_over_the_log(correction):
    frame, models = log(8, 4), guesses(log(8, 4))
    ones = np.ones(len(frame))
    if correction == "propensity":
        given = frame["display_weight"].to_numpy(), frame["display_weight"].to_numpy(), ones
    else:
        given = 1 / frame["examination"].to_numpy(), ones, frame["examination"].to_numpy()
    found = compare_predictions(models, frame, Objectives(display(correction)), reference="before", group="session_id", unit="query_id")
    for model, p in models.items():
        expected = sums_by_hand(frame, p, *given)
        for metric in METRICS:
            assert math.isclose(row_of(found, "display", metric, model)["value"], expected[metric], rel_tol=1e-12)


def test_only_the_first_k_places_count():
    frame, models = log(8, 4), guesses(log(8, 4))
    found = compare_predictions(models, frame, Objectives(display()), reference="before", group="session_id", k=1)
    top = bottom = 0.0
    for _, page in frame.groupby("session_id"):
        gains, p = page["display_weight"] * page["clicked"], models["before"][page.index]
        top, bottom = top + gains[p == p.max()].mean(), bottom + gains.max()
    assert math.isclose(row_of(found, "display", "ndcg@1", "before")["value"], top / bottom)


def test_with_equal_weights_and_one_click_a_page_display_is_click():
    frame = log().assign(clicked=lambda rows: np.arange(len(rows)) % 6 == 2, display_weight=1.0, query_id=lambda rows: rows["session_id"])
    found = compare_predictions(guesses(frame), frame, Objectives(click(), display()), reference="before")
    parts = [found.table[found.table["objective"] == name].reset_index(drop=True) for name in ("click", "display")]
    for column in ("value", "difference"):
        np.testing.assert_allclose(parts[1][column], parts[0][column], rtol=1e-12, atol=1e-12)
    for end in ("low", "high", "p"):
        np.testing.assert_allclose(parts[1][end], parts[0][end], rtol=1e-9, atol=1e-12)
    assert parts[1]["units"].tolist() == parts[0]["units"].tolist() == [12] * 12


def test_the_scale_of_display_weights_does_not_matter():
    frame, models = log(), guesses(log())
    tables = [
        compare_predictions(models, each, Objectives(display()), reference="before").table
        for each in (frame, frame.assign(display_weight=8 * frame["display_weight"]))
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-9)


def test_weighted_clicks_have_the_truth_as_their_mean():
    """The mean over all pages and clicks is that of a log in which every place is as likely for each item, whatever the policy."""
    relevance_, looked, scores = np.array([0.9, 0.4, 0.2]), np.array([1.0, 0.5, 0.1]), np.array([0.1, 0.5, 0.3])
    orders = list(itertools.permutations(range(3)))  # order[i] is the place of item i
    policy = np.array([0.5, 0.05, 0.1, 0.05, 0.2, 0.1])
    chance = np.zeros((3, 3))  # of item i at a place
    for order, probability in zip(orders, policy, strict=True):
        chance[range(3), order] += probability
    mean = np.zeros(2)
    for order, probability in zip(orders, policy, strict=True):
        places = np.array(order)
        weight, rate = 1 / chance[range(3), places], looked[places] * relevance_
        for clicks in itertools.product((0.0, 1.0), repeat=3):
            clicks = np.array(clicks)
            happens = probability * np.prod(np.where(clicks == 1, rate, 1 - rate))
            mean += happens * np.array(comparison._of_page(clicks, weight, weight, scores, 10)["mrr"])
    rank = np.array([3, 1, 2])
    np.testing.assert_allclose(mean, looked.sum() * np.array([(relevance_ / rank).sum(), relevance_.sum()]), rtol=1e-12)


# --- without queries ------------------------------------------------------------------------------------------------------------------


def test_without_queries_the_unit_is_the_user_or_the_row():
    frame, models = log().drop(columns="query_id"), guesses(log())
    by_user = compare_predictions(models, frame, Objectives(relevance(), display()), reference="before")
    by_row = compare_predictions(models, frame.drop(columns="user_id"), Objectives(relevance(), display()), reference="before")
    assert (by_user.unit, by_row.unit) == ("user_id", "sample_id")
    assert set(by_user.table["metric"]) == {"auc", "log_loss"}
    assert set(by_user.table["units"]) == {4} and set(by_row.table["units"]) == {72}
    pd.testing.assert_frame_equal(by_user.table[["metric", "model", "value"]], by_row.table[["metric", "model", "value"]], rtol=1e-12)
    for model, p in models.items():
        labels, weight = frame["label"].to_numpy(), frame["display_weight"].to_numpy()
        losses = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
        assert math.isclose(row_of(by_user, "relevance", "auc", model)["value"], roc_auc_score(labels >= 0.5, p))
        assert math.isclose(row_of(by_user, "relevance", "log_loss", model)["value"], losses.mean())
        weighted = roc_auc_score(frame["clicked"], p, sample_weight=weight)
        assert math.isclose(row_of(by_user, "display", "auc", model)["value"], weighted, rel_tol=1e-9)


def test_the_interval_of_a_mean_of_rows_is_the_paired_interval():
    frame, models = log(40).drop(columns=["query_id", "user_id"]), guesses(log(40))
    found = compare_predictions(models, frame, Objectives(click()), reference="before")
    clicks = frame["clicked"].to_numpy()
    losses = {name: pd.Series(-np.log(np.where(clicks, p, 1 - p))) for name, p in models.items()}
    for model in ("uniform", "weighted"):
        row, expected = row_of(found, "click", "log_loss", model), paired_interval(losses[model], losses["before"])
        np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), expected[:3], rtol=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 2)), min_size=2, max_size=12))
def test_a_pooled_auc_is_the_mean_of_its_units_values(rows):
    labels, scores, weight, unit = (np.array(column) for column in zip(*rows, strict=True))
    unit = np.unique(unit, return_inverse=True)[1]
    values = comparison._pooled_auc(labels.astype(float), weight, weight, scores / 4, unit)
    if labels.any() and not labels.all():
        assert math.isclose(values.mean(), roc_auc_score(labels, scores, sample_weight=weight), rel_tol=1e-9)
    else:
        assert np.isnan(values).all()


@pytest.mark.parametrize("unit", ["user_id", "sample_id"])
@pytest.mark.parametrize("objective", [click(), display()])
def test_a_units_value_is_how_it_moves_the_metric(objective, unit):
    """To first order: the metric is computed anew with one unit's rows weighted a little more, by the loops and by scikit-learn."""
    frame = log(40).drop(columns="query_id").assign(user_id=lambda rows: rows["user_id"] + (np.arange(240) % 5).astype(str))
    p = guesses(frame)["uniform"]
    codes = pd.factorize(frame[unit], sort=True)[0]
    weight = frame["display_weight"].to_numpy() if objective.correction else np.ones(len(frame))
    clicks = frame["clicked"].to_numpy()
    losses = -np.log(np.where(clicks, p, 1 - p))
    parts = comparison._rows_of(objective, frame, {"one": p[None]}, None, unit)
    judged = comparison._by_sums(parts, 10)
    metrics = {"auc": lambda w: roc_auc_score(clicks, p, sample_weight=w), "log_loss": lambda w: (w * losses).sum() / w.sum()}
    step, units = 1e-4, codes.max() + 1
    for moved in range(0, units, 7):
        more = weight * (1 + step * (codes == moved))
        for metric, value in metrics.items():
            found = judged[metric].of["one"][0][moved] - value(weight)
            assert math.isclose(found, units * (value(more) - value(weight)) / step, rel_tol=2e-3, abs_tol=1e-6)


def test_seeds_are_a_level_of_their_own_where_there_are_three():
    """A value per query and seed: with three seeds or more the interval is over both, with one or two over queries only."""
    frame = log(40).assign(query_id=lambda rows: rows["session_id"])
    before = [guesses(frame, seed=seed)["before"] for seed in range(4)]
    after = [guesses(frame, seed=seed)["uniform"] for seed in range(4)]
    per_seed = {
        name: pd.DataFrame({s: evaluate(frame, p, probabilities=p).per_query["log_loss"] for s, p in enumerate(seeds)})
        for name, seeds in (("before", before), ("after", after))
    }
    for count, over in ((1, "queries"), (2, "queries"), (3, "queries and seeds"), (4, "queries and seeds")):
        models = {"before": before[:count], "after": after[:count]}
        row = row_of(compare_predictions(models, frame, Objectives(relevance()), reference="before"), "relevance", "log_loss", "after")
        expected = paired_interval(per_seed["after"].iloc[:, :count], per_seed["before"].iloc[:, :count], over=over)
        np.testing.assert_allclose(row[["difference", "low", "high", "p"]].astype(float), [*expected[:3], expected.p], rtol=1e-9)
        assert row["over"] == over.replace("queries", "units") and row["seeds"] == count
    fixed = compare_predictions({"before": before[0], "after": after}, frame, Objectives(relevance()), reference="before")
    row = row_of(fixed, "relevance", "log_loss", "after")
    expected = paired_interval(per_seed["after"], per_seed["before"][0])
    np.testing.assert_allclose(row[["low", "high"]].astype(float), expected[1:3], rtol=1e-9)
    other = compare_predictions({"before": before[:3], "after": after}, frame, Objectives(relevance()), reference="before")
    row = row_of(other, "relevance", "log_loss", "after")
    expected = paired_interval(per_seed["after"].add_prefix("x"), per_seed["before"].iloc[:, :3])
    np.testing.assert_allclose(row[["low", "high"]].astype(float), expected[1:3], rtol=1e-9)
    assert row["over"] == "units and seeds"


def test_final_gains_reach_the_metric():
    frame, models = log(), guesses(log())
    found = compare_predictions(models, frame, Objectives(relevance()), reference="before", highest_grade=None)
    expected = [ndcg_score([part["label"]], [models["uniform"][part.index]], k=10) for _, part in frame.groupby("query_id")]
    assert math.isclose(row_of(found, "relevance", "ndcg@10", "uniform")["value"], np.mean(expected), rel_tol=1e-12)


# --- what is not defined --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [["query_id"], []])
@pytest.mark.parametrize("objective", [click(), display()])
def test_what_nobody_clicked_is_not_defined_and_counted(objective, columns):
    frame = log().assign(clicked=False)
    frame = frame if columns else frame.drop(columns="query_id")
    found = compare_predictions(guesses(frame), frame, Objectives(objective), reference="before")
    for metric in found.table["metric"].unique():
        row = row_of(found, objective.name, metric, "uniform")
        assert math.isnan(row["value"]) == math.isnan(row["difference"]) == (metric != "log_loss")
        assert (row["units"] > 0) == (metric == "log_loss") and (row["too_few"] == "not defined") == (metric != "log_loss")
        assert math.isnan(row["low"]) or metric == "log_loss"
    assert (found.summary().loc[(objective.name, "auc_per_query" if columns else "auc")] == "not defined").all()


@pytest.mark.parametrize("objective", [click(), display()])
def test_too_few_units_have_a_difference_and_no_interval(objective):
    frame = log(2).assign(query_id=np.repeat(["q0", "q1"], 6), clicked=np.arange(12) == 2)
    found = compare_predictions(guesses(frame), frame, Objectives(objective), reference="before")
    row = row_of(found, objective.name, "mrr", "uniform")
    assert 0 < row["value"] <= 1 and row["units"] == 1 and np.isfinite(row["difference"]) and row[["low", "high", "p"]].isna().all()
    assert row["too_few"] == "too few to say: 1 of at least 10 units"
    assert found.summary().loc[(objective.name, "mrr"), "uniform"].endswith(", too few to say)")
    assert row_of(found, objective.name, "mrr", "before")["too_few"] == ""


def test_simulated_data_is_called_so():
    frame = log().assign(simulated=True)
    found = compare_predictions(guesses(frame), frame, Objectives(relevance()), reference="before")
    assert found.simulated and "SIMULATED" in found.summary().to_string() and "SIMULATED" in found.summary().to_html()
    frame["simulated"] = False
    found = compare_predictions(guesses(frame), frame, Objectives(relevance()), reference="before")
    assert not found.simulated and "SIMULATED" not in found.summary().to_string()


# --- mistakes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reference="plain"), "the reference 'plain' is none of the models: before, uniform, weighted"),
        (dict(level=1.0), "expected 0 < level < 1 and k >= 1, got 1.0 and 10"),
        (dict(k=0), "got 0.95 and 0"),
        (dict(group="page"), "column 'page' is not there"),
        (dict(unit="price"), "column 'price' is missing in 72 rows"),
        (dict(unit="user_id"), r"query_id 'q\d' lies in [2-4] values of 'user_id'; a unit must hold whole groups"),
        (dict(objectives=Objectives(Objective("purchase", label="bought"))), "objective 'purchase' needs column 'bought'"),
        (dict(predictions={"before": np.zeros(5)}), r"predictions of 'before' have shape \(5,\), expected \(72,\) or \(72, 1\)"),
        (dict(predictions={"before": np.zeros((72, 2))}), r"have shape \(72, 2\), expected \(72,\) or \(72, 1\)"),
        (dict(predictions={"before": np.full(72, np.nan)}), r"must be probabilities in \[0, 1\]; NaN, logits"),
        (dict(predictions={"before": np.linspace(-1, 1, 72)}), "must be probabilities"),
        (dict(predictions={"before": []}), "'before' has no predictions"),
    ],
)
def test_mistakes_are_named(change, message):
    frame = log().assign(price=np.nan)
    arguments = dict(predictions=guesses(frame), test=frame, objectives=Objectives(relevance()), reference="before") | change
    with pytest.raises(ValueError, match=message):
        compare_predictions(arguments.pop("predictions"), arguments.pop("test"), arguments.pop("objectives"), **arguments)


def test_rows_that_have_one_but_never_both_are_an_error():
    frame = log()
    frame["clicked"] = frame["clicked"].astype("boolean").mask(np.arange(72) % 2 == 0)
    frame["display_weight"] = frame["display_weight"].mask(np.arange(72) % 2 == 1)
    with pytest.raises(ValueError, match="no row has all that objective 'display' reads: clicked, display_weight"):
        compare_predictions(guesses(frame), frame, Objectives(display()), reference="before")


# --- models ---------------------------------------------------------------------------------------------------------------------------

TASKS = ("click", "relevance")


def differing(pair):
    pair.model.logit.weight.data[1] *= -1  # the tasks disagree
    return pair


def test_models_are_compared_by_their_predictions():
    frame = tiny_frame(24).assign(clicked=lambda rows: rows["label"] < 1)
    one, two, other = tiny_pair(), differing(tiny_pair(tasks=TASKS, seed=1)), tiny_pair("cross_encoder", tasks=TASKS, seed=2)
    objectives = Objectives(relevance(), click())
    found = compare({"one": one, "two": two, "seeds": [other, two]}, frame, objectives, reference="one", max_length=20)
    p = {name: predict(pair, frame, max_length=20) for name, pair in (("one", one), ("two", two), ("other", other))}
    two_, other_ = p["two"][:, ::-1], p["other"][:, ::-1]  # in the objectives' order
    expected = {"one": p["one"], "two": two_, "seeds": [other_, two_]}
    pd.testing.assert_frame_equal(found.table, compare_predictions(expected, frame, objectives, reference="one").table)
    assert row_of(found, "click", "mrr", "two")["value"] != row_of(found, "relevance", "mrr", "two")["value"]


def test_a_model_without_the_task_is_an_error():
    with pytest.raises(ValueError, match="model 'two' has the tasks click, relevance, none for objective display"):
        compare(
            {"two": tiny_pair(tasks=TASKS)},
            tiny_frame(8).assign(clicked=True, display_weight=1.0),
            Objectives(click(), display()),
            reference="two",
        )


# --- to read --------------------------------------------------------------------------------------------------------------------------


def test_the_summary_says_the_numbers_of_the_table():
    frame, models = log(), guesses(log())
    found = compare_predictions(models, frame, Objectives(relevance(), display()), reference="uniform")
    summary = found.summary()
    assert summary.columns.tolist() == list(models)
    assert summary.index.tolist() == list(itertools.product(("relevance", "display"), METRICS))
    for (objective, metric), model in itertools.product(summary.index, models):
        row = row_of(found, objective, metric, model)
        numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", summary.loc[(objective, metric), model])]
        shown = ["value"] if model == "uniform" else ["value", "difference"] if row["too_few"] else ["value", "difference", "low", "high"]
        expected = row[shown]
        np.testing.assert_allclose(numbers, np.array(expected, dtype=float), atol=0.00051)


def test_the_figure_shows_every_difference():
    frame, models = log(), guesses(log())
    found = compare_predictions(models, frame, Objectives(relevance(), click()), reference="before")
    figure = before_and_after(found.table, reference="before", unit="queries", title="Made-up")
    assert [axis.get_title() for axis in figure.axes] == [
        "NDCG@10, higher is better",
        "MRR, higher is better",
        "AUC per query, higher is better",
        "log-loss (nats), lower is better",
    ]
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        points = [line for line in axis.lines if line.get_marker() == "o"]
        rows = found.table[(found.table["metric"] == metric) & (found.table["model"] != "before")]
        np.testing.assert_array_equal([point.get_xdata()[0] for point in points], rows["difference"])
        filled = [point.get_markerfacecolor() != "white" for point in points]
        assert filled == ((rows["low"] > 0) | (rows["high"] < 0)).tolist()
        assert [tick.get_text() for tick in axis.get_yticklabels()] in (["relevance", "click"], [])
    with pytest.raises(ValueError, match="no model has a difference to 'before'"):
        before_and_after(found.table[found.table["model"] == "before"], reference="before", unit="queries", title="")
    plt.close("all")


# --- the card -------------------------------------------------------------------------------------------------------------------------


def card_of(pair, *, simulated: bool = False, name: str = "chorus", **changes) -> str:
    frame = tiny_frame(48, queries=16).assign(**({"simulated": True} if simulated else {}))
    found = compare({"before": tiny_pair(seed=5), "after": pair}, frame, Objectives(relevance()), reference="before")
    arguments = dict(
        title="A tiny model",
        source=Obtained(name, simulated, frame, "", ""),
        parts={"train": frame.head(8), "test": frame.drop(columns="query_id").head(16)},
        settings={"weighting": Weighting(exponent=0.5), "learning rate": 2e-5, "note": "a | b\nc"},
        intended_use="Tests only.",
        limits=["Knows 25 words."],
    )
    return model_card(found, "after", pair, **arguments | changes)


def test_a_card_says_what_it_was_given():
    pair = tiny_pair(seed=6)
    card = card_of(pair)
    assert card == card_of(tiny_pair(seed=6))
    sections = re.findall(r"^## (.*)$", card, re.M)
    assert sections == ["Model", "Data", "Settings", "Before and after", "Intended use", "Limits", "Loading", "Versions"]
    count = sum(p.numel() for p in pair.model.parameters())
    for line in (
        "# A tiny model",
        f"| parameters | {count:,}, of which {count:,} were trainable |",
        "| encoder | bert, 2 layers, hidden size 32 |",
        "| tasks | relevance |",
        "| data | Chorus broad query set (chorus) |",
        "| real or simulated | real |",
        "| train | 8 | 8 |",
        "| test | 16 | none |",
        "| weighting: exponent | 0.5 |",
        "| weighting: clip | None |",
        "| learning rate | 2e-05 |",
        r"| note | a \| b c |",
        "| objective | metric | before | **after** | units |",
        "Tests only.",
        "- Knows 25 words.",
        f"| recsys_importance | {__version__} |",
    ):
        assert line in card.splitlines(), line
    assert "three raters" in card and "SIMULATED" not in card
    frame = tiny_frame(48, queries=16)
    value = evaluate(frame, predict(pair, frame)).summary["ndcg@10"]
    assert re.search(rf"\| relevance \| ndcg@10 \| 0\.\d+ \| {value:.3f} \([-+]0\.\d+, [-+]0\.\d+ to [-+]0\.\d+\) \| \d+ \|", card)
    intervals = len(re.findall(r" to [-+]\d", card))
    assert f"- Of {intervals} intervals, about {0.05 * intervals:.1f} would exclude 0 by chance" in card


def test_a_card_calls_simulated_data_so():
    for card in (card_of(tiny_pair(), simulated=True), card_of(tiny_pair(), simulated=True, name="shop")):
        assert "Trained and tested on SIMULATED data." in card.splitlines()[2]
        assert "| real or simulated | SIMULATED |" in card
        assert "- The data is SIMULATED: the numbers say nothing about real customers." in card.splitlines()


def test_a_card_of_a_file_of_ones_own_shows_no_path():
    card = card_of(tiny_pair(), name="/somewhere/private/shop.parquet")
    assert "| data | shop.parquet, a file of its owner's |" in card and "/somewhere" not in card
    assert "| licence | not known to the registry |" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(parts={}), "a card needs a title, the parts of the data"),
        (dict(title="\n"), "a card needs a title"),
        (dict(intended_use="  "), "what the model is intended for"),
    ],
)
def test_a_card_needs_what_only_a_person_knows(change, message):
    with pytest.raises(ValueError, match=message):
        card_of(tiny_pair(), **change)


def test_a_card_is_of_a_model_that_was_compared():
    found = compare({"before": tiny_pair()}, tiny_frame(8), Objectives(relevance()), reference="before")
    with pytest.raises(ValueError, match="no model 'after' in the comparison; it has before"):
        model_card(found, "after", tiny_pair(), title="", source=None, parts={}, settings={}, intended_use="")


HOSTILE = [
    "a|b\\|c\\",
    "`code` `` ``` |`",
    "<script>alert(1)</script>",
    "<!-- gone",
    "[here](javascript:alert(1)) ![x](http://x.y/z.png)",
    "[x]: http://x.y",
    "**bold** _slanted_ __b__ ~~struck~~ *",
    "# not a heading #",
    "---\nlicense: mit\n---",
    "line\n\n## Limits\n\n- none\r\n| a | b |\n|---|---|\u2028# c",
    "&lt;b&gt; &amp; &#60; $x$",
    "1. one",
    "12) twelve",
    "- - bullet",
    "> quoted",
    "+ plus",
    "=====",
    "    indented",
    "tab\tand \x00 zero \x1b[31m red",
    "safe_name_with_underscores __init__ _x",
    "\\<b\\>\\\\",
    "https://x.y <https://x.y> <a@b.c>",
    "turned \u202egnp.exe",
]


def shown(tokens) -> str:
    """The text of inline tokens, code included."""
    return "".join("\n" if token.type == "softbreak" else token.content for token in tokens)


def visible(text: str) -> str:
    line = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", line)


def read_back(word: str, pair):
    """The blocks, the kinds of inline content and the texts that another Markdown parser finds in a card in which `word` is everywhere."""
    frame = tiny_frame(8)
    p = np.linspace(0.1, 0.9, 8)
    card = model_card(
        compare_predictions({"before": p, word: p[::-1]}, frame, Objectives(relevance()), reference="before"),
        word,
        pair,
        title=word,
        source=Obtained(f"/somewhere/{word.replace('/', '')}", False, frame, "", ""),
        parts={word: frame},
        settings={word: word, "nested": {"note": word}},
        intended_use=word.replace("\n\n", "\n") + "\n\nAnother paragraph.",
        limits=[word, f"Last: {word}"],
    )
    assert card.startswith("# ") and "\x00" not in card
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(card)
    inline = [token.children for token in tokens if token.type == "inline"]
    return [(token.type, token.tag) for token in tokens], {child.type for each in inline for child in each}, list(map(shown, inline))


@pytest.fixture(scope="module")
def small_pair():
    return tiny_pair(seed=6)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_card_quotes_stays_text(text, small_pair):
    """The same blocks as with a harmless word, no markup of its own, and every word is there as it was given."""
    blocks, kinds, texts = read_back(text, small_pair)
    plain_blocks, plain_kinds, _ = read_back("word", small_pair)
    assert blocks == plain_blocks
    assert kinds <= plain_kinds | {"text_special"} == {"text", "text_special", "code_inline", "strong_open", "strong_close"}
    for quoted in (visible(text), f"Last: {visible(text)}"):
        assert quoted in texts
    assert texts[0] == visible(text) and any(each.startswith(f"{visible(text)}, a two-tower model") for each in texts)
    assert texts.count(visible(text)) == 7  # title, part, setting and its value, column of the model, intended use, limit


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_a_saved_model_comes_back_with_its_card(architecture, tmp_path):
    pair, frame = tiny_pair(architecture, seed=3), tiny_frame(16)
    card = card_of(pair)
    again = load_pair_model(save_pair_model(pair, tmp_path / "model", card=card), device="cpu")
    np.testing.assert_array_equal(predict(again, frame), predict(pair, frame))
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == card == card_of(again)
    assert json.loads((tmp_path / "model" / "pair.json").read_text())["architecture"] == architecture
