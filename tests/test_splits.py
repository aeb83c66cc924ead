"""Splits: nothing leaks, nothing is lost, row order does not matter; leaks are named."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_importance.data.splits import (
    Split,
    check_no_leakage,
    normalised,
    shared_pairs,
    split_by_query,
    split_by_time,
    split_by_user,
)

FRACTIONS = st.sampled_from([(0.7, 0.1, 0.2), (1.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.0, 0.3, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.98, 0.01, 0.01)])
ROWS = st.lists(st.tuples(st.integers(0, 8), st.sampled_from(list("abcdef")), st.integers(0, 12)), min_size=1, max_size=40)


def frame_of(rows) -> pd.DataFrame:
    """Rows (query number, text letter, hour) with the text written in one of four ways that mean the same."""
    ways = ["{} sofa", "{}  SOFA", " {} Sofa ", "{}\tsofa"]
    return pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(len(rows))],
            "text_a": [ways[i % 4].format(letter) for i, (_, letter, _) in enumerate(rows)],
            "text_b": [f"item {hour}" for _, _, hour in rows],
            "label": 0.0,
            "query_id": [f"q{query}" for query, _, _ in rows],
            "user_id": [f"u{query}" for query, _, _ in rows],
            "timestamp": pd.Timestamp("2025-01-01") + pd.to_timedelta([hour for _, _, hour in rows], unit="h"),
        }
    )


def names_of(split: Split) -> list[set]:
    return [set(part["sample_id"]) for part in split]


def groups_of(rows) -> int:
    """Queries linked by id or text, counted by joining sets until nothing changes."""
    groups = [{("id", query), ("text", letter)} for query, letter, _ in rows]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                if groups[i] & groups[j]:
                    groups[i] |= groups.pop(j)
                    merged = True
                    break
            if merged:
                break
    return len(groups)


def split_or_message(action, count, fractions):
    """The split, or None where there are too few units and the error says so."""
    if count < sum(fraction > 0 for fraction in fractions):
        with pytest.raises(ValueError, match=f"^{count} different .* cannot fill {sum(f > 0 for f in fractions)} parts"):
            action()
        return None
    return action()


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, fractions=FRACTIONS, seed=st.integers(0, 1000), shuffle=st.randoms(use_true_random=False))
def test_split_by_query_never_leaks(rows, fractions, seed, shuffle):
    frame = frame_of(rows)
    split = split_or_message(lambda: split_by_query(frame, fractions=fractions, seed=seed), groups_of(rows), fractions)
    if split is None:
        return
    assert sorted(pd.concat(split)["sample_id"]) == sorted(frame["sample_id"])
    for column in ("query_id", "text_a"):
        values = [set(normalised(part[column])) for part in split]
        assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
        check_no_leakage(split, by=column)
    assert [len(part) > 0 for part in split] == [fraction > 0 for fraction in fractions]
    order = list(range(len(frame)))
    shuffle.shuffle(order)
    assert names_of(split_by_query(frame.iloc[order], fractions=fractions, seed=seed)) == names_of(split)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, fractions=FRACTIONS, seed=st.integers(0, 1000))
def test_split_by_user_never_leaks(rows, fractions, seed):
    frame = frame_of(rows)
    split = split_or_message(lambda: split_by_user(frame, fractions=fractions, seed=seed), frame["user_id"].nunique(), fractions)
    if split is None:
        return
    assert sorted(pd.concat(split)["sample_id"]) == sorted(frame["sample_id"])
    check_no_leakage(split, by="user_id")
    assert names_of(split_by_user(frame.iloc[::-1], fractions=fractions, seed=seed)) == names_of(split)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, fractions=FRACTIONS)
def test_split_by_time_is_ordered_and_never_straddles(rows, fractions):
    frame = frame_of(rows)
    split = split_or_message(lambda: split_by_time(frame, fractions=fractions), frame["timestamp"].nunique(), fractions)
    if split is None:
        return
    assert sorted(pd.concat(split)["sample_id"]) == sorted(frame["sample_id"])
    filled = [part["timestamp"] for part in split if len(part)]
    assert all(left.max() < right.min() for left, right in zip(filled, filled[1:], strict=False))
    check_no_leakage(split, by="timestamp")
    assert [len(part) > 0 for part in split] == [fraction > 0 for fraction in fractions]
    assert names_of(split_by_time(frame.iloc[::-1], fractions=fractions)) == names_of(split)


def test_fractions_are_shares_of_queries_by_largest_remainder():
    """11 queries at 0.7/0.1/0.2 are 7.7, 1.1 and 2.2: floors 7, 1, 2, and the spare one goes to the remainder 0.7."""
    frame = frame_of([(0, "a", 0)] * 11).assign(query_id=[f"q{i}" for i in range(11)], text_a=[f"text {i}" for i in range(11)])
    assert [len(part) for part in split_by_query(frame)] == [8, 1, 2]
    assert [len(part) for part in split_by_query(frame.head(3))] == [1, 1, 1]
    assert [len(part) for part in split_by_query(frame.head(4), fractions=(0.98, 0.01, 0.01))] == [2, 1, 1]


def test_seed_changes_the_parts_and_every_query_can_be_in_any():
    frame = frame_of([(0, "a", 0)] * 10).assign(query_id=[f"q{i}" for i in range(10)], text_a=[f"text {i}" for i in range(10)])
    counts = pd.Series(0, index=frame["sample_id"])
    for seed in range(400):
        counts[split_by_query(frame, fractions=(0.5, 0.2, 0.3), seed=seed).test["sample_id"]] += 1
    assert counts.between(120 - 46, 120 + 46).all()  # 400 * 0.3 = 120, five standard deviations of sqrt(400 * 0.3 * 0.7) = 9.2


def test_time_boundaries_are_nearest_to_the_asked_share():
    """Ten rows, cumulative 4, 7, 8, 9, 10 by hour: targets 7 and 8 are met exactly, and 4 is nearest to 5."""
    hours = [0, 0, 0, 0, 1, 1, 1, 2, 3, 4]
    frame = frame_of([(i, "a", hour) for i, hour in enumerate(hours)])
    assert [len(part) for part in split_by_time(frame)] == [7, 1, 2]
    assert [len(part) for part in split_by_time(frame, fractions=(0.5, 0.0, 0.5))] == [4, 0, 6]
    tied = frame_of([(i, "a", hour) for i, hour in enumerate([0, 0, 1, 1, 2, 2])])
    assert [len(part) for part in split_by_time(tied, fractions=(0.5, 0.0, 0.5))] == [2, 0, 4]  # 2 and 4 are equally near to 3: the earlier


def test_same_words_go_together_through_a_third_id():
    """q0 and q1 share a text, q1 and q2 share another: the three are one group, q3 and q4 are two more."""
    frame = pd.DataFrame(
        {
            "sample_id": list("abcdef"),
            "query_id": ["q0", "q1", "q1", "q2", "q3", "q4"],
            "text_a": ["Red  Mug", "red mug", "mug red", "MUG RED ", "lamp", "sofa"],
        }
    )
    for seed in range(10):
        split = split_by_query(frame, fractions=(0.4, 0.3, 0.3), seed=seed)
        assert sorted(map(len, split)) == [1, 1, 4]


def test_rows_keep_index_order_and_columns():
    frame = frame_of([(i % 7, "abcdefg"[i % 7], i) for i in range(30)]).set_index(pd.RangeIndex(100, 130))
    for split in (split_by_query(frame), split_by_user(frame), split_by_time(frame)):
        for part in split:
            pd.testing.assert_frame_equal(part, frame.loc[sorted(part.index)])


def test_normalised_texts():
    texts = pd.Series(["  Grey\u00a0 SOFA\t", "STRASSE", "straße", "\uff27rey"])
    assert normalised(texts).tolist() == ["grey sofa", "strasse", "strasse", "grey"]


def test_leaks_are_named():
    frame = frame_of([(i, "a", i) for i in range(9)])
    train, validation, test = frame.iloc[:4], frame.iloc[4:6], frame.iloc[6:]
    check_no_leakage(Split(train, validation, test), by="query_id")
    with pytest.raises(ValueError, match=re.escape("leakage by 'query_id': 2 in both train and test: 'q1', 'q3'")):
        check_no_leakage(Split(train, validation, test.assign(query_id=["q3", "q7", "q1"])), by="query_id")
    with pytest.raises(ValueError, match=re.escape("1 in both train and validation: 'a sofa'")):
        check_no_leakage(Split(train, validation, test), by="text_a")
    with pytest.raises(ValueError, match="leakage by 'sample_id': 9 in both train and test: .* and 4 more"):
        check_no_leakage(Split(frame, frame.head(0), frame), by="sample_id")
    with pytest.raises(ValueError, match="validation reaches 2025-01-01 05:00:00 but test starts at 2025-01-01 05:00:00"):
        check_no_leakage(Split(train, validation, frame.iloc[5:]), by="timestamp")


def test_leakage_test_refuses_what_it_cannot_see():
    frame = frame_of([(i, "a", i) for i in range(6)])
    split = Split(frame.head(2), frame.head(0), frame.tail(2))
    with pytest.raises(ValueError, match="column 'item_id' is missing in the train part"):
        check_no_leakage(split, by="item_id")
    gap = frame.tail(2).assign(user_id=["u4", None])
    with pytest.raises(ValueError, match="column 'user_id' has 1 gaps in the test part"):
        check_no_leakage(split._replace(test=gap), by="user_id")


def test_shared_pairs_counts_rows_per_part():
    frame = pd.DataFrame({"text_a": ["Mug", "mug ", "mug", "lamp", "sofa"], "text_b": ["red", "RED", "red", "blue", "grey"]})
    shared = shared_pairs(Split(frame.iloc[[0, 1, 3]], frame.iloc[[4]], frame.iloc[[2]]))
    assert shared.to_dict("records") == [{"text_a": "mug", "text_b": "red", "train": 2, "validation": 0, "test": 1}]
    assert shared_pairs(Split(frame.iloc[[0, 1, 2]], frame.iloc[[3]], frame.iloc[[4]])).empty
    assert shared_pairs(Split(frame, frame.head(0), frame.head(0))).columns.tolist() == ["text_a", "text_b", "train", "validation", "test"]


@pytest.mark.parametrize("split", [split_by_query, split_by_user, split_by_time])
@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (0.8, 0.2), (1.2, -0.1, -0.1), (np.nan, 0.5, 0.5), (0.0, 0.0, 0.0)])
def test_fractions_must_divide(split, fractions):
    with pytest.raises(ValueError, match="expected three shares"):
        split(frame_of([(i, "a", i) for i in range(6)]), fractions=fractions)


@pytest.mark.parametrize(
    ("split", "column"),
    [(split_by_query, "query_id"), (split_by_query, "text_a"), (split_by_user, "user_id"), (split_by_time, "timestamp")],
)
def test_missing_column_and_gaps_are_named(split, column):
    frame = frame_of([(i, "a", i) for i in range(6)])
    with pytest.raises(ValueError, match=f"column '{column}' is missing .columns found: "):
        split(frame.drop(columns=column))
    with pytest.raises(ValueError, match=f"column '{column}' is missing in 2 of 6 rows .first: row 1."):
        split(frame.assign(**{column: frame[column].where(~frame.index.isin([1, 4]))}))
