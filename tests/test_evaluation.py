"""Metrics against their definitions written as loops, and intervals against a bootstrap written by hand."""

import itertools
import math
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from recsys_importance.evaluation import Interval, evaluate, hypervolume, on_pareto_front, paired_interval

GRADES = [0.0, 1 / 3, 0.5, 2 / 3, 1.0]


def one_query(labels) -> pd.DataFrame:
    return pd.DataFrame({"query_id": ["q"] * len(labels), "label": labels})


def orders(scores):
    """Every ranking that the scores allow: candidates by falling score, ties in every order."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield order


def ndcg_loop(labels, scores, k, highest_grade=3):
    """NDCG by its definition, averaged over every order of the ties; None without a relevant candidate."""
    gains = [2 ** (highest_grade * label) - 1 for label in labels]
    best = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains, reverse=True)[:k]))
    if best == 0:
        return None
    each = [sum(gains[row] / math.log2(place + 2) for place, row in enumerate(order[:k])) for order in orders(scores)]
    return sum(each) / len(each) / best


def auc_by_counting(relevant, scores):
    """Share of (relevant, irrelevant) pairs in the right order, a tie counting half."""
    pairs = list(
        itertools.product(
            [s for s, r in zip(scores, relevant, strict=True) if r], [s for s, r in zip(scores, relevant, strict=True) if not r]
        )
    )
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else None


def reciprocal_ranks(relevant, scores):
    """1 / rank of the first relevant candidate, in every order that the scores allow."""
    return [1 / (1 + next(place for place, row in enumerate(order) if relevant[row])) for order in orders(scores)]


candidates = st.lists(st.tuples(st.sampled_from(GRADES), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=150)
@given(rows=candidates, k=st.sampled_from([1, 2, 3, 10]))
def test_ndcg_is_its_definition_with_ties_in_every_order(rows, k):
    labels, scores = zip(*rows, strict=True)
    found = evaluate(one_query(labels), scores, k=k).per_query[f"ndcg@{k}"].iloc[0]
    expected = ndcg_loop(labels, scores, k)
    assert np.isnan(found) if expected is None else math.isclose(found, expected, rel_tol=1e-12)


def test_ndcg_by_hand():
    found = evaluate(one_query([1, 0, 1 / 3]), [0.9, 0.5, 0.1]).per_query.iloc[0]
    assert math.isclose(found["ndcg@10"], (7 + 1 / 2) / (7 + 1 / math.log2(3)), rel_tol=1e-12)
    worst = evaluate(one_query([1, 0, 1 / 3]), [0.1, 0.9, 0.5], k=1).per_query.iloc[0]
    assert worst["ndcg@1"] == 0
    two_grades = evaluate(one_query([0.5, 1.0]), [2, 1], highest_grade=2).per_query.iloc[0]
    assert math.isclose(two_grades["ndcg@10"], (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), rel_tol=1e-12)


@settings(max_examples=150)
@given(rows=candidates)
def test_auc_counts_pairs(rows):
    labels, scores = zip(*rows, strict=True)
    found = evaluate(one_query(labels), scores).per_query["auc"].iloc[0]
    expected = auc_by_counting([label >= 0.5 for label in labels], scores)
    assert np.isnan(found) if expected is None else math.isclose(found, expected, rel_tol=1e-12)


@settings(max_examples=150)
@given(labels=st.lists(st.sampled_from(GRADES), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_reciprocal_rank_without_ties(labels, order):
    scores = list(range(len(labels)))
    order.shuffle(scores)
    found = evaluate(one_query(labels), scores).per_query["mrr"].iloc[0]
    relevant = [label >= 0.5 for label in labels]
    assert np.isnan(found) if not any(relevant) else math.isclose(found, reciprocal_ranks(relevant, scores)[0], rel_tol=1e-12)


@settings(max_examples=150)
@given(rows=candidates.filter(lambda rows: any(label >= 0.5 for label, _ in rows)))
def test_reciprocal_rank_of_ties_is_one_that_some_order_could_have(rows):
    labels, scores = zip(*rows, strict=True)
    found = evaluate(one_query(labels), scores).per_query["mrr"].iloc[0]
    possible = reciprocal_ranks([label >= 0.5 for label in labels], scores)
    assert min(possible) - 1e-12 <= found <= max(possible) + 1e-12


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_log_loss_is_its_definition(rows):
    labels, probabilities = zip(*rows, strict=True)
    found = evaluate(one_query(labels), probabilities, probabilities=probabilities)
    each = []
    for label, probability in rows:
        p = min(max(probability, 1e-7), 1 - 1e-7)
        each.append(-(label * math.log(p) + (1 - label) * math.log(1 - p)))
    assert math.isclose(found.per_query["log_loss"].iloc[0], sum(each) / len(each), rel_tol=1e-7)
    assert math.isclose(found.summary["log_loss"], sum(each) / len(each), rel_tol=1e-7)


@pytest.fixture
def judged() -> pd.DataFrame:
    """Five queries, shuffled together, with an index of their own: good, all relevant, none relevant, weakly relevant, single."""
    return pd.DataFrame(
        [
            ("good", 1.0, 0.9),
            ("all", 1.0, 0.2),
            ("none", 0.0, 0.7),
            ("weak", 1 / 3, 0.6),
            ("good", 0.0, 0.5),
            ("single", 2 / 3, 0.1),
            ("none", 0.0, 0.4),
            ("weak", 0.0, 0.3),
            ("all", 2 / 3, 0.3),
            ("good", 1 / 3, 0.1),
        ],
        columns=["query_id", "label", "score"],
        index=range(100, 110),
    )


def test_undefined_queries_are_missing_and_counted(judged):
    result = evaluate(judged, judged["score"], probabilities=judged["score"])
    per_query = result.per_query
    assert per_query.index.tolist() == ["all", "good", "none", "single", "weak"] and per_query.index.name == "query_id"
    assert per_query["ndcg@10"].isna().tolist() == [False, False, True, False, False]
    assert per_query["mrr"].isna().tolist() == [False, False, True, False, True]
    assert per_query["auc"].isna().tolist() == [True, False, True, True, True]
    assert per_query["candidates"].tolist() == [2, 3, 2, 1, 2] and per_query["grades"].tolist() == [2, 3, 1, 1, 2]
    assert per_query["log_loss"].notna().all()
    assert result.summary["queries"] == 5 and result.summary["pairs"] == 10
    assert result.summary["queries_with_relevant"] == 4 and result.summary["queries_with_several_grades"] == 3


def test_the_summary_averages_what_is_defined(judged):
    result = evaluate(judged, judged["score"], probabilities=judged["score"])
    groups = [group for _, group in judged.groupby("query_id")]
    ndcg = [ndcg_loop(group["label"].tolist(), group["score"].tolist(), 10) for group in groups]
    defined = [value for value in ndcg if value is not None]
    assert len(defined) == 4 and math.isclose(result.summary["ndcg@10"], sum(defined) / 4, rel_tol=1e-12)
    assert math.isclose(result.summary["mrr"], 1.0)  # the first place of each of the three queries that have a label of one half
    pooled = auc_by_counting((judged["label"] >= 0.5).tolist(), judged["score"].tolist())
    assert math.isclose(result.summary["auc"], pooled, rel_tol=1e-12) and math.isclose(result.summary["auc_per_query"], 1.0)
    p = judged["score"]
    by_pair = -(judged["label"] * np.log(p) + (1 - judged["label"]) * np.log(1 - p)).mean()
    assert math.isclose(result.summary["log_loss"], by_pair, rel_tol=1e-12)
    assert "log_loss" not in evaluate(judged, judged["score"]).summary


def test_rows_may_come_in_any_order(judged):
    shuffled = judged.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(evaluate(shuffled, shuffled["score"]).per_query, evaluate(judged, judged["score"]).per_query)


def test_only_the_order_of_scores_counts(judged):
    plain, stretched = evaluate(judged, judged["score"]), evaluate(judged, np.exp(9 * judged["score"]) - 1e3)
    pd.testing.assert_frame_equal(plain.per_query, stretched.per_query)


def test_nothing_relevant_anywhere_is_missing_everywhere():
    summary = evaluate(one_query([0.0, 0.0]), [1, 2]).summary
    assert all(np.isnan(summary[name]) for name in ("ndcg@10", "mrr", "auc", "auc_per_query")) and summary["queries_with_relevant"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(drop="query_id"), "column 'query_id' is missing; ranking needs a query_id and a label in every row"),
        (dict(drop="label"), "column 'label' is missing"),
        (dict(label=[1.0, np.nan, np.nan]), "column 'label' is empty in 2 rows"),
        (dict(query_id=["a", None, "b"]), "column 'query_id' is empty in 1 rows"),
        (dict(label=[3.0, 0.0, 1.0]), r"labels must be in \[0, 1\], got 0 to 3; divide grades by the highest grade"),
        (dict(scores=[1.0, 2.0]), r"scores have shape \(2,\), the frame has 3 rows; expected one per row"),
        (dict(scores=[[1.0], [2.0], [3.0]]), r"scores have shape \(3, 1\)"),
        (dict(scores=[1.0, np.nan, np.inf]), "2 of 3 scores are NaN or infinite"),
        (dict(probabilities=[0.1, np.nan, 0.2]), "1 of 3 probabilities are NaN or infinite"),
        (dict(probabilities=[0.1, 1.5, -0.2]), r"probabilities must be in \[0, 1\], got -0.2 to 1.5; apply the sigmoid to logits"),
        (dict(probabilities=[0.1]), r"probabilities have shape \(1,\), the frame has 3 rows"),
    ],
)
def test_bad_input_is_refused(change, message):
    frame = pd.DataFrame({"query_id": ["a", "a", "b"], "label": [1.0, 0.0, 1.0]})
    scores, probabilities = change.pop("scores", [0.1, 0.2, 0.3]), change.pop("probabilities", None)
    frame = frame.drop(columns=change.pop("drop", [])).assign(**change)
    with pytest.raises(ValueError, match=message):
        evaluate(frame, scores, probabilities=probabilities)


def test_a_frame_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        evaluate(pd.DataFrame({"query_id": pd.Series(dtype="str"), "label": pd.Series(dtype="float64")}), [])


# --- paired intervals -------------------------------------------------------------------------------------------------------------------


def bootstrap_by_hand(difference: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    return np.quantile(means, (1 - level) / 2), np.quantile(means, (1 + level) / 2)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_interval_is_the_bootstrap_over_queries(level, shape):
    rng = np.random.default_rng(5)
    names = [f"q{i}" for i in range(40)]
    first = pd.Series(rng.uniform(0.4, 0.9, 40), index=names)
    noise = rng.normal(0.02, 0.1, 40) if shape == "normal" else rng.exponential(0.1, 40)
    found = paired_interval(first, first - noise, level=level, resamples=20_000)
    low, high = bootstrap_by_hand(noise, level, 20_000, seed=99)
    error = 0.03 * noise.std() / np.sqrt(40) * 2  # Monte Carlo error of two such quantiles, in units of the standard error
    assert isinstance(found, Interval) and found.queries == 40
    assert math.isclose(found.difference, noise.mean(), rel_tol=1e-12)
    assert abs(found.low - low) < error and abs(found.high - high) < error


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        difference = pd.Series(rng.normal(0.05, 0.2, 50))
        interval = paired_interval(difference, difference * 0, level=0.9, resamples=400)
        covered += interval.low <= 0.05 <= interval.high
    # Binomial(300, 0.9) lies within 3.5 standard deviations of 270, less about 1.5 % because 50 queries are few.
    assert 300 * 0.885 - 3.5 * np.sqrt(27) <= covered <= 270 + 3.5 * np.sqrt(27)


def test_interval_is_near_the_normal_one_for_many_queries():
    difference = pd.Series(np.random.default_rng(1).normal(0, 1, 4000))
    found = paired_interval(difference, difference * 0, resamples=4000)
    half = norm.ppf(0.975) * difference.std() / np.sqrt(4000)
    np.testing.assert_allclose([found.low, found.high], [difference.mean() - half, difference.mean() + half], atol=0.08 * half)


def test_only_queries_that_both_define_count_whatever_their_order():
    first = pd.Series({"a": 0.9, "b": 0.7, "c": np.nan, "d": 0.4})
    second = pd.Series({"e": 0.1, "d": 0.1, "c": 0.2, "b": 0.6, "a": 0.7})
    found = paired_interval(first, second)
    assert found.queries == 3 and math.isclose(found.difference, (0.2 + 0.1 + 0.3) / 3)
    swapped = paired_interval(second, first)
    np.testing.assert_allclose([swapped.low, swapped.high], [-found.high, -found.low], atol=0.02)


def test_same_seed_same_interval_and_other_seed_another():
    rng = np.random.default_rng(2)
    first, second = pd.Series(rng.random(20)), pd.Series(rng.random(20))
    assert paired_interval(first, second, seed=3) == paired_interval(first, second, seed=3)
    assert paired_interval(first, second, seed=3) != paired_interval(first, second, seed=4)


def test_equal_differences_have_no_width():
    first = pd.Series([0.5, 0.75, 1.0])
    assert paired_interval(first, first - 0.25) == (0.25, 0.25, 0.25, 3)
    assert paired_interval(first, first) == (0, 0, 0, 3)


@pytest.mark.parametrize("shared", [0, 1])
def test_fewer_than_two_shared_queries_are_refused(shared):
    first = pd.Series([0.5, 0.6, np.nan], index=["a", "b", "c"])
    second = pd.Series([0.5, 0.6, 0.7][: shared + 1], index=["c", "a", "b"][: shared + 1])
    with pytest.raises(ValueError, match=f"{shared} queries define both metrics; a paired interval needs at least 2"):
        paired_interval(first, second)


def test_a_query_that_comes_twice_is_refused():
    """Seeds that were not averaged would count as further queries, and the interval would come out too narrow."""
    first = pd.Series([0.5, 0.6, 0.7, 0.9], index=["a", "b", "a", "b"])
    with pytest.raises(ValueError, match="twice|repeat|unique"):
        paired_interval(first, first * [0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5, float("nan")])
def test_a_level_outside_0_and_1_is_refused(level):
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="level"):
        paired_interval(pd.Series(rng.random(5)), pd.Series(rng.random(5)), level=level)


def beats(a, b):
    """Point a is at least as good as b everywhere and better somewhere."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


points = st.integers(1, 4).flatmap(lambda k: st.lists(st.tuples(*[st.integers(-2, 4)] * k), min_size=1, max_size=7))


@given(points)
def test_the_front_is_what_no_point_dominates(rows):
    expected = [not any(beats(other, row) for other in rows) for row in rows]
    assert on_pareto_front(rows).tolist() == expected


@given(points)
def test_hypervolume_counts_the_unit_cubes_under_whole_numbered_points(rows):
    cubes = itertools.product(range(-2, 4), repeat=len(rows[0]))  # the cube from c to c + 1 in every objective
    assert hypervolume(rows, -2) == sum(any(all(c + 1 <= x for c, x in zip(cube, row, strict=True)) for row in rows) for cube in cubes)


def test_hypervolume_by_hand_and_what_does_not_exceed_the_reference_adds_nothing():
    assert math.isclose(hypervolume([[0.9, 0.3], [0.5, 0.8]], 0), 0.9 * 0.3 + 0.5 * 0.8 - 0.5 * 0.3)
    assert math.isclose(hypervolume([[0.9, 0.3], [0.5, 0.8]], [0.4, 0.7]), 0.1 * 0.1)
    assert hypervolume([[5.0, -1.0], [-1.0, 5.0], [0.0, 3.0]], 0) == 0


@pytest.mark.parametrize(
    ("rows", "reference", "message"),
    [
        ([0.1, 0.2], 0, r"\(N, K\) for K objectives, got shape \(2,\)"),
        (np.empty((0, 2)), 0, r"got shape \(0, 2\)"),
        ([[0.1, float("nan")]], 0, "finite points"),
        ([[0.1, 0.2]], [0, 0, 0], "one for each of 2 objectives"),
        ([[0.1, 0.2]], float("-inf"), "finite reference"),
    ],
)
def test_points_and_references_that_mean_nothing_are_refused(rows, reference, message):
    with pytest.raises(ValueError, match=message):
        hypervolume(rows, reference)
    if "reference" not in message and "each of" not in message:
        with pytest.raises(ValueError, match=message):
            on_pareto_front(rows)


def test_without_moocore_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ModuleNotFoundError, match=r"recsys_importance\[study\]"):
        hypervolume([[1.0, 1.0]], 0)
