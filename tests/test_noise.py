"""Label noise: the count is exact, the truth is kept, and each kind follows its stated law."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_importance.data.noise import KINDS, adjacent_transition, inclusion_probabilities, inject_label_noise


def frame_of(labels, items=None) -> pd.DataFrame:
    count = len(labels)
    return pd.DataFrame(
        {
            "sample_id": [f"s{i:05d}" for i in range(count)],
            "label": np.asarray(labels, dtype=float),
            "item_id": items if items is not None else [f"i{i % 7}" for i in range(count)],
        }
    )


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0]), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1),
    rate=st.floats(0, 0.45),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    shuffle=st.randoms(use_true_random=False),
)
def test_count_is_exact_and_truth_is_kept(labels, rate, kind, seed, shuffle):
    frame = frame_of(labels)
    noisy = inject_label_noise(frame, rate, kind=kind, seed=seed)
    assert (noisy["label"] != frame["label"]).sum() == round(rate * len(frame))
    assert (noisy["true_label"] == frame["label"]).all()
    assert (noisy["noisy"] == (noisy["label"] != noisy["true_label"])).all()
    assert set(noisy["label"]) <= set(labels)
    assert noisy["noisy"].dtype == "boolean" and noisy["label"].dtype == "float64"
    order = list(range(len(frame)))
    shuffle.shuffle(order)
    pd.testing.assert_frame_equal(inject_label_noise(frame.iloc[order], rate, kind=kind, seed=seed).sort_index(), noisy)


def test_binary_labels_flip():
    noisy = inject_label_noise(frame_of([0, 1] * 50), 0.3)
    wrong = noisy[noisy["noisy"]]
    assert len(wrong) == 30
    assert (wrong["label"] == 1 - wrong["true_label"]).all()


def test_input_is_left_alone_and_seed_matters():
    frame = frame_of([0, 1] * 50)
    before = frame.copy()
    first, second = inject_label_noise(frame, 0.3, seed=1), inject_label_noise(frame, 0.3, seed=2)
    pd.testing.assert_frame_equal(frame, before)
    assert not first["label"].equals(second["label"])
    assert first["label"].equals(inject_label_noise(frame, 0.3, seed=1)["label"])


def test_symmetric_hits_all_rows_and_other_classes_alike():
    """30,000 rows of four classes at 0.4: each class is hit 0.4 of the time and goes to each other class a third of that."""
    frame = frame_of(np.arange(30_000) % 4)
    noisy = inject_label_noise(frame, 0.4, seed=5)
    share = pd.crosstab(noisy["true_label"], noisy["label"], normalize="index").to_numpy()
    assert np.abs(np.diag(share) - 0.6).max() < 0.02
    assert np.abs(share[~np.eye(4, dtype=bool)] - 0.4 / 3).max() < 0.02


def test_adjacent_transition_by_hand():
    """Row 0 of four grades: moves of 1, 2 and 3 weigh 1/2, 1/4 and 1/8, so 4/7, 2/7 and 1/7 of the half that moves."""
    matrix = adjacent_transition(4)
    np.testing.assert_allclose(matrix[0], [0.5, 2 / 7, 1 / 7, 1 / 14])
    np.testing.assert_allclose(matrix[1], [0.2, 0.5, 0.2, 0.1])
    np.testing.assert_allclose(matrix.sum(1), 1)


def test_class_conditional_counts_by_hand():
    """70 + 70 rows, two classes leave at 0.2 and 0.6 of T: scaled to 28 wrong of 140, they lose 7 and 21."""
    frame = frame_of([0] * 70 + [1] * 70)
    noisy = inject_label_noise(frame, 0.2, kind="class_conditional", transition=[[0.8, 0.2], [0.6, 0.4]])
    assert noisy.groupby("true_label")["noisy"].sum().tolist() == [7, 21]


def test_class_conditional_default_prefers_neighbours():
    frame = frame_of(np.repeat([0, 1, 2, 3], 700))
    noisy = inject_label_noise(frame, 0.25, kind="class_conditional")
    table = pd.crosstab(noisy["true_label"], noisy["label"]).to_numpy()
    assert table[0].tolist() == [525, 100, 50, 25]  # 175 of 700 move: 4/7, 2/7, 1/7
    assert table[3].tolist() == [25, 50, 100, 525]
    assert table[1].tolist() == [70, 525, 70, 35]


def test_one_way_transition():
    """False positives only: with no weight from 1 to 0, every wrong label is a 0 seen as 1."""
    noisy = inject_label_noise(frame_of([0, 1] * 100), 0.25, kind="class_conditional", transition=[[0.5, 0.5], [0, 1]])
    assert noisy.loc[noisy["noisy"], "true_label"].eq(0).all()
    assert noisy["noisy"].sum() == 50


def test_inclusion_probabilities_by_hand():
    """Sizes 1, 1, 2, 16 for two draws: 16 would get 1.6, so it is certain, and one draw is left for 1/4, 1/4, 1/2."""
    np.testing.assert_allclose(inclusion_probabilities(np.array([1.0, 1, 2, 16]), 2), [0.25, 0.25, 0.5, 1])
    np.testing.assert_allclose(inclusion_probabilities(np.ones(5), 2), 0.4)
    np.testing.assert_allclose(inclusion_probabilities(np.array([1.0, 3.0]), 2), 1)
    np.testing.assert_allclose(inclusion_probabilities(np.array([1.0, 3.0]), 0), 0)


@settings(max_examples=60, deadline=None)
@given(size=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30), share=st.floats(0, 1))
def test_inclusion_probabilities_sum_and_stay_proportional(size, share):
    size, total = np.array(size), round(share * len(size))
    probability = inclusion_probabilities(size, total)
    assert np.isclose(probability.sum(), total) and (probability <= 1).all() and (probability >= 0).all()
    below = probability < 1 - 1e-9
    if total and below.any():
        ratio = probability[below] / size[below]
        np.testing.assert_allclose(ratio, ratio[0])
        assert (ratio[0] * size[~below] >= 1 - 1e-6).all()


def test_popularity_biased_hits_rows_at_their_probability():
    """10 rows of one item and 10 items of one row, 10 hits: 10 * 10 c + 10 * c = 10, so 10/11 and 1/11; 600 draws deviate by 0.012."""
    items = ["star"] * 10 + [f"i{i}" for i in range(10)]
    frame = frame_of([0, 1] * 10, items)
    hits = np.mean([inject_label_noise(frame, 0.5, kind="popularity_biased", seed=seed)["noisy"] for seed in range(600)], axis=0)
    np.testing.assert_allclose(hits[:10], 10 / 11, atol=0.06)
    np.testing.assert_allclose(hits[10:], 1 / 11, atol=0.06)
    flat = [inject_label_noise(frame, 0.5, kind="popularity_biased", popularity_exponent=0, seed=seed)["noisy"] for seed in range(300)]
    np.testing.assert_allclose(np.mean(flat, axis=0), 0.5, atol=0.15)


def test_second_injection_keeps_the_first_truth():
    frame = frame_of([0, 1, 2] * 100)
    first = inject_label_noise(frame, 0.3, seed=1)
    second = inject_label_noise(first, 0.3, seed=2)
    assert (second["true_label"] == frame["label"]).all()
    assert (second["label"] != first["label"]).sum() == 90
    assert (second["noisy"] == (second["label"] != frame["label"])).all()
    back = inject_label_noise(inject_label_noise(frame_of([0, 1]), 0.5, seed=0), 0.0)
    assert back["noisy"].sum() == 1


def test_rate_zero_adds_the_columns_only():
    frame = frame_of([0, 1, 1])
    noisy = inject_label_noise(frame, 0)
    pd.testing.assert_frame_equal(noisy[frame.columns.tolist()], frame)
    assert not noisy["noisy"].any()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_must_be_a_share(rate):
    with pytest.raises(ValueError, match=re.escape("expected a share of wrong labels in [0, 1)")):
        inject_label_noise(frame_of([0, 1]), rate)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (frame_of([0, np.nan, 1]), {}, "1 labels are missing or not finite"),
        (frame_of([0, np.inf, 1]), {}, "1 labels are missing or not finite"),
        (frame_of([1, 1]), {}, "labels have 1 distinct value(s) [1.0]"),
        (frame_of(np.arange(21)), {}, "labels have 21 distinct values, expected classes (at most 20)"),
        (frame_of([0, 1]).drop(columns="label"), {}, "['label'] not in ['sample_id', 'item_id']"),
        (frame_of([0, 1]), {"kind": "random"}, "kind is 'random', expected one of symmetric, class_conditional, popularity_biased"),
        (frame_of([0, 1]).drop(columns="item_id"), {"kind": "popularity_biased"}, "2 of 2 rows have none"),
        (frame_of([0, 1], ["i", None]), {"kind": "popularity_biased"}, "1 of 2 rows have none"),
        (frame_of([0, 1]), {"transition": np.eye(2)}, "use kind='class_conditional'"),
        (frame_of([0, 1]), {"kind": "class_conditional", "transition": np.eye(3)}, "transition has shape (3, 3), expected (2, 2)"),
        (frame_of([0, 1]), {"kind": "class_conditional", "transition": [[0.5, 0.4], [0, 1]]}, "rows that sum to 1"),
        (frame_of([0, 1]), {"kind": "class_conditional", "transition": [[1.5, -0.5], [0, 1]]}, "non-negative"),
        (frame_of([0, 1]), {"kind": "class_conditional", "transition": np.eye(2)}, "transition never leaves a class that occurs"),
        (frame_of([0, 1, 1, 1]), {"kind": "class_conditional", "transition": [[0, 1], [0, 1]]}, "need 2.0 rows of class 0, which has 1"),
    ],
)
def test_errors_say_what_is_wrong(frame, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inject_label_noise(frame, 0.5, **options)


@pytest.mark.parametrize("exponent", [-1.0, float("nan"), float("inf")])
def test_popularity_exponent_must_be_a_number_from_zero(exponent):
    with pytest.raises(ValueError, match="popularity_exponent is"):
        inject_label_noise(frame_of([0, 1]), 0.5, kind="popularity_biased", popularity_exponent=exponent)
