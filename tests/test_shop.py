"""The simulated shop: its rule, its policy, its click model and its truths, each against an independent route."""

import re
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recsys_importance.data.frame import validate
from recsys_importance.data.shop import (
    _BRANDS,
    _COLOURS,
    _FAMILIES,
    _MATERIALS,
    _SIZES,
    RELATIONS,
    ShopSettings,
    _catalogue,
    _queries,
    simulate_shop,
)

SMALL = ShopSettings(queries=20, items=400, users=30, candidates=10)


@pytest.fixture(scope="module")
def shop():
    return simulate_shop()


@pytest.fixture(scope="module")
def one_query():
    """One query searched 6,000 times on a page of eight: enough to count where each listing stood."""
    return simulate_shop(ShopSettings(queries=1, items=200, candidates=8, sessions_per_query=6000, duplicate_share=0.125), seed=3)


def test_default_size_and_schema(shop):
    assert len(shop) == 125 * 24
    assert shop["query_id"].nunique() == 125 and shop["text_a"].nunique() == 125
    assert (shop.groupby("query_id").size() == 24).all()
    assert shop["simulated"].all() and not shop["noisy"].any()
    pd.testing.assert_frame_equal(validate(shop), shop)
    assert shop["text_b"].str.len().between(20, 200).all()


def test_same_seed_same_frame_and_other_seed_other_texts(shop):
    pd.testing.assert_frame_equal(simulate_shop(), shop)
    assert len(set(simulate_shop(seed=1)["text_a"]) & set(shop["text_a"])) < 60


def test_click_and_noise_settings_leave_texts_and_truth_alone(shop):
    other = simulate_shop(ShopSettings(click_noise=0.5, label_noise=0.3, position_bias=0.2, price_sensitivity=0.0))
    same = ["sample_id", "text_a", "text_b", "grade", "position", "propensity", "user_id", "price"]
    pd.testing.assert_frame_equal(other[same], shop[same])
    assert (other["clicked"] != shop["clicked"]).any()


def test_every_query_has_answers_and_irrelevant_listings():
    for settings in (ShopSettings(), SMALL, ShopSettings(queries=60, items=200, candidates=8, duplicate_share=0.5)):
        grade = simulate_shop(settings, seed=5).groupby("query_id")["grade"]
        assert (grade.max() == 3).all()
        assert (grade.min() == 0).all()


def test_random_order_scores_far_below_the_ideal(shop):
    """NDCG@10 with gain 2^g - 1, by its definition; expectation over uniformly random orders is exact."""
    discount = 1 / np.log2(np.arange(2, 12))
    scores = []
    for _, grade in shop.groupby("query_id")["grade"]:
        gain = 2.0 ** grade.to_numpy() - 1
        scores.append(gain.mean() * discount.sum() / (np.sort(gain)[::-1][:10] @ discount))
    assert 0.2 < np.mean(scores) < 0.6


def test_words_find_answers_but_not_perfectly(shop):
    """Within a query, matches share more words with it than partial matches; accessories share words too, other products hardly any."""
    words = [len(set(a.split()) & set(re.findall(r"[\w.-]+", b.lower()))) for a, b in zip(shop["text_a"], shop["text_b"], strict=True)]
    shared = shop.assign(words=words).pivot_table(index="query_id", columns="relation", values="words")
    both = shared[["match", "partial"]].dropna()
    assert len(both) > 60
    assert (both["match"] > both["partial"]).mean() > 0.7
    assert shared["accessory"].mean() > 3 * shared["other"].mean()


def test_grade_is_the_stated_function_of_the_relation(shop):
    table = {"match": 3, "partial": 2, "mismatch": 1, "substitute": 1, "accessory": 0, "complement": 0, "other": 0}
    assert tuple(table) == RELATIONS
    assert (shop["relation"].map(table) == shop["grade"]).all()
    assert (shop["label"] == shop["grade"] / 3).all()
    assert set(shop["relation"]) == set(RELATIONS)


def test_grade_follows_from_the_words_of_the_texts(shop):
    """Read colours and price limits back from the texts: they must agree with the grade."""
    colours = ["black", "white", "grey", "blue", "red", "green", "beige", "brown"]
    checked = 0
    for row in shop[shop["relation"].isin(["match", "mismatch"])].itertuples():
        title = set(re.findall(r"[a-z]+", row.text_b.lower()))
        for colour in colours:
            if colour in row.text_a.split():
                assert (colour in title) == (row.relation == "match"), (row.text_a, row.text_b)
                checked += 1
        limit = re.search(r"under (\d+)$", row.text_a)
        if limit:
            assert (row.price <= float(limit[1])) == (row.relation == "match"), (row.text_a, row.text_b)
            assert f"{row.price:.2f} EUR" in row.text_b
            checked += 1
    assert checked > 150


def test_propensities_are_a_doubly_stochastic_matrix(one_query):
    """Within a query, the known probabilities of (listing, position) sum to 1 over positions and over listings."""
    table = one_query.groupby(["item_id", "position"])["propensity"].agg(["first", "nunique"])
    assert (table["nunique"] == 1).all()
    matrix = table["first"].unstack()
    assert matrix.shape == (8, 8) and matrix.notna().all(axis=None)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


def test_propensity_is_how_often_the_policy_shows_it(one_query):
    """Chi-square of the counted places of every listing against 6,000 times its propensity; 8 tests at 0.001 in all."""
    for _, rows in one_query.groupby("item_id"):
        counted = rows.groupby("position").size()
        expected = 6000 * rows.groupby("position")["propensity"].first()
        assert stats.chisquare(counted, expected).pvalue > 0.001 / 8


def test_every_page_is_a_permutation(shop, one_query):
    for frame, size in ((shop, 24), (one_query, 8)):
        assert (frame["position"].to_numpy().reshape(-1, size) == np.arange(1, size + 1)).all()
        assert frame.groupby("session_id")["item_id"].nunique().eq(size).all()
        assert frame["timestamp"].is_monotonic_increasing


def test_click_model_is_the_stated_formula():
    frame = simulate_shop(replace(SMALL, position_bias=0.5, click_noise=0.2))
    np.testing.assert_allclose(frame["examination"], 1 / np.sqrt(frame["position"].astype(float)))
    attraction = {0: 0.2, 1: 0.2 + 0.8 / 7, 2: 0.2 + 0.8 * 3 / 7, 3: 1.0}
    np.testing.assert_allclose(frame["relevance_probability"], frame["grade"].map(attraction))
    np.testing.assert_allclose(frame["click_probability"], frame["examination"] * frame["relevance_probability"])


def test_clicks_and_purchases_happen_at_their_probabilities(one_query):
    """Counts of 48,000 rows within four standard deviations of the sum of their probabilities."""
    clicked = one_query["clicked"].to_numpy(dtype=float)
    probability = one_query["click_probability"].to_numpy()
    assert abs(clicked.sum() - probability.sum()) < 4 * np.sqrt((probability * (1 - probability)).sum())
    buyers = one_query[one_query["clicked"]]
    probability = buyers["purchase_probability"].to_numpy()
    assert abs(buyers["purchased"].sum() - probability.sum()) < 4 * np.sqrt((probability * (1 - probability)).sum())
    assert not one_query.loc[~one_query["clicked"], "purchased"].any()
    assert ((one_query["quantity"] > 0) == one_query["purchased"]).all()


def test_propensity_weighting_recovers_examination():
    frame = simulate_shop(ShopSettings(queries=40, items=400, candidates=8, sessions_per_query=300, position_bias=1.0), seed=2)
    weighted = (frame["clicked"].astype(float) / frame["propensity"]).groupby(frame["position"]).mean()
    naive = frame["clicked"].astype(float).groupby(frame["position"]).mean()
    truth = 1 / np.arange(1, 9)
    assert np.abs(weighted / weighted.loc[1] - truth).max() < 0.05
    assert np.abs(naive / naive.loc[1] - truth).max() > 0.1


def test_exploration_one_is_uniform_and_sensitivity_zero_ignores_price():
    frame = simulate_shop(replace(SMALL, exploration=1.0, popular_first=0.0, price_sensitivity=0.0))
    np.testing.assert_allclose(frame["propensity"], 0.1)
    np.testing.assert_allclose(frame["purchase_probability"], 1 / (1 + np.exp(2.5 - frame["grade"])))


def test_purchase_falls_with_price_and_rises_with_grade(shop):
    same_user = shop.groupby("session_id")
    for _, rows in list(same_user)[:20]:
        for _, grade in rows.groupby("grade"):
            order = grade.sort_values("relative_price")
            assert (np.diff(order["purchase_probability"]) <= 1e-12).all()


def test_near_copies_are_counted_exact_and_have_the_same_truth(shop):
    copies = shop.dropna(subset="duplicate_of")
    assert len(copies) == 125 * 2  # round(0.1 * 24) = 2 on each of 125 pages
    first = shop.set_index("sample_id").loc[copies["duplicate_of"]]
    for column in ("query_id", "session_id", "grade", "price", "relation"):
        assert (first[column].to_numpy() == copies[column].to_numpy()).all()
    assert (first["item_id"].to_numpy() != copies["item_id"].to_numpy()).all()
    assert (first["text_b"].to_numpy() != copies["text_b"].to_numpy()).all()
    strip = lambda text: re.sub(r"[^a-z0-9.]+", " ", text.lower().replace("(new)", "").replace("new ", "")).strip()  # noqa: E731
    assert [strip(t) for t in first["text_b"]] == [strip(t) for t in copies["text_b"]]
    assert simulate_shop(replace(SMALL, duplicate_share=0.0))["duplicate_of"].isna().all()


def test_repeated_sessions_point_to_the_first_row_of_the_product(one_query):
    assert one_query["duplicate_of"].isna().sum() == 7  # eight listings, one of them a relisting
    first = one_query.set_index("sample_id").loc[one_query["duplicate_of"].dropna().unique()]
    assert first["duplicate_of"].isna().all()


def test_label_noise_is_exact_and_leaves_the_truth():
    frame = simulate_shop(replace(SMALL, label_noise=0.15))
    assert frame["noisy"].sum() == 30  # 0.15 of 200
    assert (frame["true_label"] == frame["grade"] / 3).all()
    assert ((frame["label"] != frame["true_label"]) == frame["noisy"]).all()


def test_a_thousand_users_and_ten_thousand_items():
    started = time.perf_counter()
    frame = simulate_shop(ShopSettings(users=1000, items=10_000, queries=400))
    assert time.perf_counter() - started < 20
    assert len(frame) == 400 * 24
    assert int(frame["item_id"].str[1:7].max()) > 9000


def test_queries_are_short_and_some_are_misspelt():
    """Every word of a clean query is a word of the catalogue; with misspelling_share = 1 most queries have one that is not."""
    vocabulary = {word.lower() for group in (_BRANDS, _COLOURS, _MATERIALS, _SIZES) for text in group for word in text.split()}
    vocabulary |= {word for family in _FAMILIES.values() for noun in family.nouns for word in noun.split()} | {"under"}
    unknown = {}
    for share in (0.0, 1.0):
        texts = simulate_shop(replace(SMALL, misspelling_share=share, queries=100))["text_a"].unique()
        assert max(len(text.split()) for text in texts) <= 9
        unknown[share] = [sum(word not in vocabulary and not word.isdigit() for word in text.split()) for text in texts]
    assert max(unknown[0.0]) == 0
    assert max(unknown[1.0]) == 1 and np.mean(unknown[1.0]) > 0.85


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries is 0, expected 1 to"),
        ({"items": 10.5}, "items is 10.5, expected a whole number"),
        ({"users": True}, "users is True, expected a whole number"),
        ({"candidates": 4}, "candidates is 4, expected 8 to 200"),
        ({"candidates": 50, "items": 400}, "400 items can fill pages of 40"),
        ({"exploration": 0.0}, "exploration must be above 0"),
        ({"exploration": 0.7, "popular_first": 0.4}, "sum to at most 1"),
        ({"click_noise": float("nan")}, "click_noise is nan"),
        ({"position_bias": "1"}, "position_bias is '1', expected a number"),
        ({"duplicate_share": 0.6}, "duplicate_share is 0.6, expected 0.0 to 0.5"),
        ({"label_noise": 1.0}, "label_noise is 1.0"),
        ({"queries": 2001, "items": 200, "candidates": 8}, "200 items are asked for in 2000 ways at most"),
        ({"start": "soon"}, "start is 'soon'"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShopSettings(**change)


def test_too_many_queries_for_the_catalogue():
    items = _catalogue(ShopSettings(items=200, candidates=8), np.random.default_rng(0))
    with pytest.raises(ValueError, match="1 products gave only .* different queries; raise items"):
        _queries(items[~items["accessory"]].head(1), ShopSettings(queries=2000, items=200, candidates=8), np.random.default_rng(0))
