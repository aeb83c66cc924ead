"""User value: each part against a hand count, ranks against a slow definition, and every exclusion counted."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_importance.data.value import customer_value, quintile, value_scores


def lines_of(*rows) -> pd.DataFrame:
    """Rows (invoice, user, quantity, price, day); an invoice that starts with C is a cancellation."""
    frame = pd.DataFrame(rows, columns=["invoice", "user_id", "quantity", "price", "timestamp"])
    frame["cancelled"] = frame["invoice"].str.startswith("C")
    return frame.astype({"timestamp": "datetime64[ns]", "price": "float64"})


FIVE = lines_of(
    ("1", "a", 1, 10, "2011-01-01 09:00"),
    ("2", "b", 1, 20, "2011-01-02 23:59"),
    ("3", "b", 2, 5, "2011-01-03 00:01"),
    ("3", "b", 1, 1, "2011-01-03 00:01"),
    ("C4", "b", -1, 5, "2011-01-08"),
    ("5", "c", 3, 100, "2011-01-05"),
    ("6", "d", 1, 40, "2011-01-07"),
    ("7", "d", 1, 0, "2011-01-08"),
    ("8", "e", 10, 5, "2011-01-10 12:00"),
)


def test_parts_by_hand():
    value = customer_value(FIVE)
    assert value.index.tolist() == list("abcde") and value.index.name == "user_id"
    assert value["recency_days"].tolist() == [9, 7, 5, 2, 0]  # calendar days before 10 January; b's cancellation is no purchase
    assert value["frequency"].tolist() == [1, 2, 1, 2, 1]
    assert value["monetary"].tolist() == [10.0, 26.0, 300.0, 40.0, 50.0]  # b: 20 + 10 + 1 - 5
    assert value["r"].tolist() == [1, 2, 3, 4, 5]
    assert value["f"].tolist() == [2, 5, 2, 5, 2]  # three at rank 2 of 5, two at rank 4.5
    assert value["m"].tolist() == [1, 2, 5, 3, 4]
    np.testing.assert_allclose(value["score"], [1 / 12, 6 / 12, 7 / 12, 9 / 12, 8 / 12])  # (r + f + m - 3) / 12
    assert value.dtypes.astype(str).tolist() == ["int64", "int64", "float64", "int64", "int64", "int64", "float64"]


def test_as_of_cuts_the_future():
    value = customer_value(FIVE, as_of="2011-01-05")
    assert value.index.tolist() == ["a", "b", "c"]
    assert value["recency_days"].tolist() == [4, 2, 0]
    assert value.loc["b", "monetary"] == 31.0  # the cancellation is later
    assert value.attrs["lines_after"] == 4 and value.attrs["lines"] == 5 and value.attrs["as_of"] == "2011-01-05T00:00:00"
    past_only = FIVE[FIVE["timestamp"] <= "2011-01-05"]
    pd.testing.assert_frame_equal(customer_value(past_only, as_of="2011-01-05"), value)


def test_who_and_what_is_left_out_is_counted():
    lines = pd.concat(
        [FIVE, lines_of(("9", None, 5, 5, "2011-01-09"), ("10", None, 1, 1, "2011-01-09"), ("C11", "f", -1, 5, "2011-01-09"))]
    )
    value = customer_value(lines.reset_index(drop=True))
    assert value.attrs == {
        "as_of": "2011-01-10T12:00:00",
        "lines": 10,
        "lines_after": 0,
        "lines_without_customer": 2,
        "customers_without_purchase": 1,
    }
    assert "f" not in value.index
    pd.testing.assert_frame_equal(value, customer_value(FIVE), check_flags=False)


def test_a_customer_who_took_everything_back_has_net_nothing():
    value = customer_value(lines_of(("1", "a", 3, 0.1, "2011-01-01"), ("C2", "a", -3, 0.1, "2011-01-02"), ("3", "b", 1, 1, "2011-01-02")))
    assert value.loc["a", "monetary"] == 0.0
    assert value.loc["a", "frequency"] == 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40))
def test_quintile_is_its_definition(numbers):
    """Mean rank = (values below) + (equals + 1) / 2, in exact integers: ceil(5 * (2 * below + equal + 1) / (2 * N))."""
    expected = [math.ceil(5 * (2 * sum(x < y for x in numbers) + sum(x == y for x in numbers) + 1) / (2 * len(numbers))) for y in numbers]
    assert quintile(pd.Series(numbers)).tolist() == expected


def test_quintiles_of_distinct_values_are_equal_in_size():
    assert quintile(pd.Series(np.random.default_rng(0).permutation(100))).value_counts().sort_index().tolist() == [20] * 5
    assert quintile(pd.Series([7.0])).tolist() == [5]
    assert quintile(pd.Series([3.0] * 10)).tolist() == [3] * 10
    with pytest.raises(ValueError, match="1 of 2 are not"):
        quintile(pd.Series([1.0, np.nan]))


LINES = st.lists(
    st.tuples(
        st.sampled_from(["1", "2", "3", "C4", "C5"]),
        st.sampled_from(["a", "b", "c", None]),
        st.integers(1, 9),
        st.integers(0, 500),
        st.integers(1, 28),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(rows=LINES, shuffle=st.randoms(use_true_random=False))
def test_value_matches_a_loop_and_ignores_row_order(rows, shuffle):
    rows = [(i, u, -q if i[0] == "C" else q, p / 100, f"2011-02-{d:02d} 10:00") for i, u, q, p, d in rows]
    lines = lines_of(*rows)
    buyers = {u for i, u, *_ in rows if u and i[0] != "C"}
    if not buyers:
        with pytest.raises(ValueError, match="no customer has bought by"):
            customer_value(lines)
        return
    value = customer_value(lines)
    assert set(value.index) == buyers
    last_day = max(int(day[8:10]) for *_, day in rows)
    for user, got in value.iterrows():
        mine = [row for row in rows if row[1] == user]
        bought = [row for row in mine if row[0][0] != "C"]
        assert got["frequency"] == len({row[0] for row in bought})
        assert got["recency_days"] == last_day - max(int(row[4][8:10]) for row in bought)
        assert got["monetary"] == pytest.approx(sum(row[2] * row[3] for row in mine), abs=1e-6)
    assert value["score"].between(0, 1).all()
    assert value.attrs["lines"] + value.attrs["lines_without_customer"] == len(rows)
    order = list(range(len(lines)))
    shuffle.shuffle(order)
    pd.testing.assert_frame_equal(customer_value(lines.iloc[order]), value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("column", ["invoice", "quantity", "price", "timestamp", "cancelled"])
def test_gaps_and_missing_columns_are_named(column):
    with pytest.raises(ValueError, match=re.escape(f"['{column}'] are not in")):
        customer_value(FIVE.drop(columns=column))
    with pytest.raises(ValueError, match=f"'{column}' is missing or infinite in 1 of 9 lines .first: row 3."):
        customer_value(FIVE.assign(**{column: FIVE[column].astype("object").where(FIVE.index != 3)}))


def test_other_errors():
    with pytest.raises(ValueError, match="'price' is missing or infinite in 1 of 9"):
        customer_value(FIVE.assign(price=FIVE["price"].where(FIVE.index != 3, np.inf)))
    with pytest.raises(ValueError, match="no lines"):
        customer_value(FIVE.head(0))
    with pytest.raises(ValueError, match="no customer has bought by 2010-01-01"):
        customer_value(FIVE, as_of="2010-01-01")
    with pytest.raises(ValueError, match="expected a moment"):
        customer_value(FIVE, as_of=pd.NaT)


def test_value_scores_follow_the_rows():
    value = customer_value(FIVE)
    frame = pd.DataFrame({"user_id": ["e", "a", "e"]}, index=[5, 3, 1])
    scores = value_scores(frame, value)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [8 / 12, 1 / 12, 8 / 12])
    np.testing.assert_allclose(value_scores(frame, value["score"]), scores)
    np.testing.assert_allclose(value_scores(pd.DataFrame({"user_id": ["z", None, "a"]}), value, default=0.25), [0.25, 0.25, 1 / 12])


def test_value_scores_errors():
    value = customer_value(FIVE)
    frame = pd.DataFrame({"user_id": ["a", "y", "z", "y"]})
    with pytest.raises(ValueError, match="3 of 4 samples have a user without a score: 'y', 'z'; value them or give default="):
        value_scores(frame, value)
    with pytest.raises(ValueError, match="need the column 'user_id'"):
        value_scores(frame.rename(columns={"user_id": "user"}), value)
    with pytest.raises(ValueError, match="default is 1.5"):
        value_scores(frame, value, default=1.5)
    with pytest.raises(ValueError, match="user 'a' more than once"):
        value_scores(frame, pd.Series([0.1, 0.2], index=["a", "a"]))
    with pytest.raises(ValueError, match="user 'a' has nan"):
        value_scores(frame, pd.Series([np.nan], index=["a"]))
    with pytest.raises(ValueError, match="user 'a' has 2.0"):
        value_scores(frame, pd.Series([2.0], index=["a"]))
