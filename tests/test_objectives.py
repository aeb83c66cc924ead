"""Per-sample losses against their closed forms and their derivatives."""

import math
import pickle

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_frame, tiny_pair
from torch.nn import functional

from recsys_importance.data.shop import ShopSettings, simulate_shop
from recsys_importance.gradients import gradient_norms, largest_error, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, pair_logits
from recsys_importance.objectives import (
    LOSSES,
    ListCollator,
    ListDataset,
    Objective,
    Objectives,
    click,
    columns_of,
    cross_entropy,
    display,
    display_weights,
    examination,
    examination_curve,
    examined_cross_entropy,
    listnet,
    purchase,
    ranknet,
    relevance,
    squared_error,
)
from recsys_importance.reference import gradient_norms_by_loop, in_dtype, weighted_backward_by_loop
from recsys_importance.scoring import score_dataset

LABELS = [0.0, 1 / 3, 0.5, 2 / 3, 1.0]


class Given(torch.nn.Module):
    """A 'model' whose logits are its parameters."""

    def __init__(self, logits, dtype=torch.float64):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=dtype))

    def forward(self, input_ids):
        return self.logits


def batch_of(labels, dtype=torch.float64) -> dict:
    return {"input_ids": torch.zeros(len(labels), 1, dtype=torch.long), "labels": torch.tensor(labels, dtype=dtype)}


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def closed_form(name: str, z: float, y: float) -> tuple[float, float]:
    """(loss, its derivative by the logit)."""
    p = sigmoid(z)
    if name == "cross_entropy":
        return max(z, 0) - z * y + math.log1p(math.exp(-abs(z))), p - y
    return (y - p) ** 2, 2 * (p - y) * p * (1 - p)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", LABELS)
def test_values_and_slopes_are_the_closed_forms(name, label):
    logits = [-30.0, -8.0, -1.5, -0.1, 0.0, 0.3, 2.0, 9.0, 30.0]
    model = Given(logits)
    losses = LOSSES[name](model, batch_of([label] * len(logits)))
    (slopes,) = torch.autograd.grad(losses.sum(), model.logits)
    values, derivatives = zip(*(closed_form(name, z, label) for z in logits), strict=True)
    assert losses.shape == (len(logits),)
    np.testing.assert_allclose(losses.detach(), values, rtol=1e-10, atol=1e-14)  # of a logit of 30, 1e-14 is rounding
    np.testing.assert_allclose(slopes, derivatives, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_depends_on_its_own_logit_only(name):
    model = Given([0.2, -1.0, 3.0])
    losses = LOSSES[name](model, batch_of([1.0, 0.0, 1 / 3]))
    jacobian = torch.stack([torch.autograd.grad(loss, model.logits, retain_graph=True)[0] for loss in losses])
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal())) and (jacobian.diagonal() != 0).all()


@pytest.mark.parametrize("label", LABELS)
def test_a_soft_label_is_least_costly_at_its_own_probability(label):
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = torch.log(grid / (1 - grid)).tolist()
    for name, loss in LOSSES.items():
        best = float(grid[loss(Given(logits), batch_of([label] * len(logits))).argmin()])
        assert abs(best - min(max(label, 0.001), 0.999)) <= 0.001, name


def test_a_soft_label_costs_the_mixture_of_its_two_ends():
    model, label = Given([-2.0, 0.5, 4.0]), 0.3
    soft, one, zero = (cross_entropy(model, batch_of([value] * 3)) for value in (label, 1.0, 0.0))
    torch.testing.assert_close(soft, label * one + (1 - label) * zero)


def test_confidently_wrong_pulls_hard_or_not_at_all():
    model = Given([-20.0])
    (cross,) = torch.autograd.grad(cross_entropy(model, batch_of([1.0])).sum(), model.logits)
    (square,) = torch.autograd.grad(squared_error(model, batch_of([1.0])).sum(), model.logits)
    assert abs(cross) > 0.999 and abs(square) < 1e-8


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name, logit):
    model = Given([logit], dtype=torch.float32)
    loss = LOSSES[name](model, batch_of([1.0], dtype=torch.float32))
    (slope,) = torch.autograd.grad(loss.sum(), model.logits)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
    assert loss.item() == pytest.approx({("cross_entropy", -1e4): 1e4, ("squared_error", -1e4): 1}.get((name, logit), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_widened_before_the_loss(name, dtype):
    model = Given([3.0, -7.0], dtype=dtype)
    losses = LOSSES[name](model, batch_of([1.0, 1 / 3], dtype=torch.float32))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.detach(), [closed_form(name, 3.0, 1.0)[0], closed_form(name, -7.0, 1 / 3)[0]], rtol=1e-5)


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_losses_of_a_real_batch(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(5)
    frame["label"] = LABELS
    batch = PairCollator(pair)([PairDataset(frame)[i] for i in range(5)])
    with torch.no_grad():
        logits = pair.model(**{name: value for name, value in batch.items() if name not in ("labels", "sample_id")})
        for name, loss in LOSSES.items():
            expected = [closed_form(name, float(z), y)[0] for z, y in zip(logits, LABELS, strict=True)]
            np.testing.assert_allclose(loss(pair.model, batch), expected, rtol=1e-5, atol=1e-7)


def test_losses_by_name():
    assert LOSSES["cross_entropy"] is cross_entropy and LOSSES["squared_error"] is squared_error


# --- clicks and examination -------------------------------------------------------------------------------------------------------------


def examined_exactly(z: float, y: float, e: float) -> tuple[float, float]:
    """(loss, its derivative by the logit) with 500 digits, from the probability of a click as it is defined."""
    with mpmath.workdps(500):
        probability = mpmath.mpf(e) / (1 + mpmath.exp(-mpmath.mpf(z)))
        inner = mpmath.exp(-mpmath.mpf(z)) / (1 + mpmath.exp(-mpmath.mpf(z)))  # d log sigmoid / dz
        loss = -y * mpmath.log(probability) - ((1 - y) * mpmath.log(1 - probability) if y < 1 else 0)
        slope = -y * inner + ((1 - y) * probability * inner / (1 - probability) if y < 1 else 0)
        return float(loss), float(slope)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 2e-14)])
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("e", [1e-6, 0.1, 0.5, 0.9999999, 1.0])
def test_the_loss_of_an_examined_click_has_all_its_digits(y, e, dtype, bound):
    grid = [-1000.0, -300.0, -80.0, -20.0, -3.0, -1e-3, 0.0, 1e-3, 2.0, 20.0, 80.0, 1000.0]
    z, examined = torch.tensor(grid, dtype=dtype, requires_grad=True), torch.full((len(grid),), e, dtype=dtype)
    losses = examined_cross_entropy(z, torch.full_like(examined, y), examined)
    (slopes,) = torch.autograd.grad(losses.sum(), z)
    values, derivatives = zip(
        *(examined_exactly(zi, torch.tensor(y, dtype=dtype).item(), examined[0].item()) for zi in z.tolist()), strict=True
    )
    assert losses.dtype == dtype
    np.testing.assert_allclose(losses.detach(), values, rtol=bound, atol=torch.finfo(dtype).tiny)
    np.testing.assert_allclose(slopes, derivatives, rtol=bound, atol=1e-37)


def test_an_examined_click_of_an_extreme_logit_stays_finite():
    z = torch.tensor([-1e4, 1e4, -1e4, 1e4, 1e4], requires_grad=True)
    losses = examined_cross_entropy(z, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]))
    (slopes,) = torch.autograd.grad(losses.sum(), z)
    np.testing.assert_allclose(losses.detach(), [1e4 + math.log(2), math.log(2), 0, math.log(2), 1e4], rtol=1e-6)
    assert slopes.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]


def test_what_everyone_looks_at_costs_the_cross_entropy():
    z, y = torch.linspace(-40, 40, 81, dtype=torch.float64), torch.linspace(0, 1, 81, dtype=torch.float64)
    expected = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    torch.testing.assert_close(examined_cross_entropy(z, y, torch.ones_like(z)), expected, rtol=1e-13, atol=1e-14)


# --- lists ------------------------------------------------------------------------------------------------------------------------------


def ranknet_by_loop(z, y) -> float:
    pairs = [(a, b) for a in range(len(y)) for b in range(len(y)) if y[a] > y[b]]
    return sum(math.log1p(math.exp(z[b] - z[a])) for a, b in pairs) / len(pairs) if pairs else 0.0


def listnet_by_loop(z, y) -> float:
    there = [k for k in range(len(y)) if not math.isnan(y[k])]
    if len({y[k] for k in there}) < 2:
        return 0.0
    total = sum(math.exp(z[k]) for k in there)
    return -sum(y[k] / sum(y[j] for j in there) * math.log(math.exp(z[k]) / total) for k in there)


LISTWISE = {"pairwise": (ranknet, ranknet_by_loop), "listwise": (listnet, listnet_by_loop)}
LISTS = st.lists(st.tuples(st.floats(-8, 8), st.sampled_from([0.0, 1 / 3, 0.5, 1.0, math.nan])), min_size=1, max_size=6)


@pytest.mark.parametrize("name", LISTWISE)
@settings(max_examples=60, deadline=None)
@given(one=LISTS, other=LISTS)
def test_ranking_losses_are_their_loops_with_gaps_left_out(name, one, other):
    loss, by_loop = LISTWISE[name]
    size = max(len(one), len(other))
    z, y = (torch.tensor([[row[part] for row in rows] + [fill] * (size - len(rows)) for rows in (one, other)], dtype=torch.float64)
            for part, fill in ((0, 99.0), (1, math.nan)))  # fmt: skip
    z.requires_grad_()
    losses = loss(z, y)
    (slopes,) = torch.autograd.grad(losses.sum(), z)
    np.testing.assert_allclose(losses.detach(), [by_loop(*zip(*rows, strict=True)) for rows in (one, other)], rtol=1e-9, atol=1e-12)
    assert torch.isfinite(slopes).all() and (slopes[y.isnan()] == 0).all()
    np.testing.assert_allclose(slopes.sum(1), 0, atol=1e-12)  # a constant added to all logits of a list changes nothing


def test_ranking_slopes_by_hand():
    z, y = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[0.5, 1.0, 0.0]], dtype=torch.float64)
    (pairs,) = torch.autograd.grad(ranknet(z, y).sum(), z)
    wrong = {(1, 0): sigmoid(1), (0, 2): sigmoid(-2), (1, 2): sigmoid(-1)}  # chance that the pair is the other way round
    by_hand = [sum(p * ((k == low) - (k == high)) for (high, low), p in wrong.items()) / 3 for k in range(3)]
    np.testing.assert_allclose(pairs[0], by_hand, rtol=1e-12)
    (whole,) = torch.autograd.grad(listnet(z, y).sum(), z)
    total = math.e + 1 + 1 / math.e
    np.testing.assert_allclose(whole[0], [math.e / total - 1 / 3, 1 / total - 2 / 3, 1 / math.e / total], rtol=1e-12)


@pytest.mark.parametrize("loss", [ranknet, listnet])
def test_ranking_losses_of_extreme_logits_stay_finite(loss):
    z = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    losses = loss(z, torch.tensor([[1.0, 0.0, math.nan], [1.0, 0.0, math.nan]]))
    (slopes,) = torch.autograd.grad(losses.sum(), z)
    assert losses.tolist() == [2e4, 0.0] and slopes.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss", [ranknet, listnet])
def test_nothing_is_nan_on_the_way_through_a_list_without_an_order(loss):
    z = torch.tensor([[0.5, -1.0], [0.5, -1.0], [0.5, -1.0]], requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        losses = loss(z, torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.5, 0.5]]))
        (slopes,) = torch.autograd.grad(losses.sum(), z)
    assert not losses.any() and not slopes.any()


def test_a_negative_label_is_no_share():
    assert listnet(torch.zeros(1, 2), torch.tensor([[-1.0, 2.0]])).isnan().all()


# --- objectives -------------------------------------------------------------------------------------------------------------------------


class GivenTasks(Given):
    """Given logits (B, K), one column a task."""

    tasks = ("relevance", "click", "display")


def test_a_matrix_of_three_objectives_from_one_forward_pass():
    model = GivenTasks([[0.5, -1.0, 2.0], [1.5, 0.0, -3.0]])
    batch = batch_of([1.0, 0.25]) | {
        "clicked": torch.tensor([math.nan, 1.0], dtype=torch.float64),
        "display_weight": torch.tensor([0.5, 3.0], dtype=torch.float64),
    }
    objectives = Objectives(relevance(weight=2.0), click(weight=0.5), display(weight=0.1))
    found = objectives.matrix(model, batch)
    expected = [[closed_form("cross_entropy", 0.5, 1.0)[0], 0, 0],
                [closed_form("cross_entropy", 1.5, 0.25)[0], math.log(2), 3 * closed_form("cross_entropy", -3.0, 1.0)[0]]]  # fmt: skip
    assert found.present.tolist() == [[True, False, False], [True, True, True]]
    np.testing.assert_allclose(found.losses.detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(objectives(model, batch).detach(), np.array(expected) @ [2.0, 0.5, 0.1], rtol=1e-12)
    np.testing.assert_allclose(objectives.only("click")(model, batch).detach(), [0, math.log(2)], rtol=1e-12)
    assert (objectives.names, objectives.weights) == (("relevance", "click", "display"), (2.0, 0.5, 0.1))
    assert objectives.columns == ("clicked", "display_weight") and len(objectives) == 3


class Counting(GivenTasks):
    calls = 0

    def forward(self, input_ids):
        self.calls += 1
        return super().forward(input_ids)


def clicks_of(count: int, dtype=torch.float64) -> dict:
    """A batch of `count` samples with every column that an objective may read."""
    draw = np.random.default_rng(count)
    columns = {"clicked": draw.integers(0, 2, count), "purchased": draw.integers(0, 2, count)}
    columns |= {"display_weight": draw.uniform(0.1, 3, count), "examination": draw.uniform(0.1, 1, count)}
    return batch_of(draw.uniform(0, 1, count).tolist(), dtype) | {name: torch.tensor(x, dtype=dtype) for name, x in columns.items()}


def test_the_model_runs_once_and_tasks_are_found_by_name():
    model, batch = Counting(np.random.default_rng(0).normal(size=(4, 3)).tolist()), clicks_of(4)
    there = Objectives(relevance(), click(), display()).matrix(model, batch).losses
    assert model.calls == 1
    assert torch.equal(Objectives(display(), relevance(), click()).matrix(model, batch).losses, there[:, [2, 0, 1]])
    wrapped = torch.nn.Module()
    wrapped.module, wrapped.forward = model, model.forward  # as DistributedDataParallel does
    assert torch.equal(Objectives(click()).matrix(wrapped, batch).losses, there[:, [1]])


def test_a_model_with_one_task_gives_its_logit_to_all():
    batch = clicks_of(3) | {"clicked": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}
    batch["labels"] = batch["clicked"]
    losses = Objectives(relevance(), click()).matrix(Given([0.1, -2.0, 3.0]), batch).losses
    assert torch.equal(losses[:, 0], losses[:, 1]) and (losses > 0).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_corrections_by_hand(loss):
    z, batch = [-1.2, 0.4, 2.5], clicks_of(3)
    weighted = Objectives(display("propensity", loss=loss)).matrix(Given(z), batch).losses[:, 0]
    examined = Objectives(display("examination", loss=loss)).matrix(Given(z), batch).losses[:, 0]
    for i in range(3):
        y, p = batch["clicked"][i].item(), sigmoid(z[i]) * batch["examination"][i].item()
        assert weighted[i].item() == pytest.approx(batch["display_weight"][i].item() * closed_form(loss, z[i], y)[0], rel=1e-12)
        by_hand = -math.log(p if y else 1 - p) if loss == "cross_entropy" else (y - p) ** 2
        assert examined[i].item() == pytest.approx(by_hand, rel=1e-12)


def test_objectives_as_given_and_alone_are_the_plain_losses():
    model, batch = Given([0.3, -1.1, 4.0]), clicks_of(3)
    for name, loss in LOSSES.items():
        torch.testing.assert_close(Objectives(relevance(name))(model, batch), loss(model, batch), rtol=1e-14, atol=0)


def test_half_precision_logits_give_float32_losses():
    found = Objectives(click(), display("examination")).matrix(Given([3.0, -7.0], dtype=torch.bfloat16), clicks_of(2, torch.float32))
    assert found.losses.dtype == torch.float32 and found.present.dtype == torch.bool


@pytest.mark.parametrize(
    "objectives", [Objectives(relevance(weight=0.7), click(weight=0.3), display()), Objectives(display("examination"))]
)
def test_autocast_does_not_round_the_losses(objectives):
    model, batch = Given([3.1, -7.3], dtype=torch.float32), clicks_of(2, torch.float32)
    expected = objectives(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objectives(model, batch)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_autocast_does_not_round_ranking_losses():
    z, y = torch.tensor([[0.123, -1.7, 2.9]]), torch.tensor([[1.0, 0.0, 0.3]])
    for loss in (ranknet, listnet):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(z, y)
        assert torch.equal(found, loss(z, y))


def test_objectives_pickle_and_print():
    objectives = Objectives(relevance("listwise", weight=2), display("examination", weight=0.25), importance=0.1)
    again = pickle.loads(pickle.dumps(objectives))
    assert (again.objectives, again.importance) == (objectives.objectives, 0.1)
    expected = "2.0 relevance: listwise(labels) + 0.25 display: cross_entropy(clicked, examination)"
    assert again.formula == expected and repr(again) == f"Objectives({expected}; importance 0.1)"


OTHERS = [
    click(weight=0.5),
    click("squared_error"),
    click(label="purchased"),
    display(),
    display("examination"),
    display("examination", weight=0.5),
]


def test_other_settings_are_another_formula():
    assert len({Objectives(objective).formula for objective in (click(), *OTHERS)}) == len(OTHERS) + 1


def test_scores_of_other_weights_are_another_run(tmp_path):
    pair, frame = tiny_pair(), tiny_frame(4)
    dataset = PairDataset(frame, clicked=frame["label"])

    def score(objectives):
        return score_dataset(pair.model, objectives, dataset, PairCollator(pair), tmp_path / "scores", progress=False)

    first = score(Objectives(relevance(), click(weight=0.5)))
    pd.testing.assert_frame_equal(score(Objectives(relevance(), click(weight=0.5))), first)
    with pytest.raises(ValueError, match="scores of another run.*0.5 click.*0.25 click"):
        score(Objectives(relevance(), click(weight=0.25)))


def test_an_objective_alone_has_weight_1():
    objectives = Objectives(relevance(weight=0.0), click(weight=0.3))
    assert objectives.only("relevance").objectives == (relevance(),) and objectives.only("click").weights == (1.0,)


# --- what is missing adds nothing -------------------------------------------------------------------------------------------------------


def logged_frame(count: int = 9) -> pd.DataFrame:
    """A tiny frame with clicks, some of them missing, and what corrections read."""
    draw = np.random.default_rng(1)
    clicked = pd.Series(draw.integers(0, 2, count), dtype="boolean").mask(np.arange(count) % 3 == 0)
    return tiny_frame(count, seed=2).assign(
        clicked=clicked,
        display_weight=draw.uniform(0.2, 3, count),
        examination=pd.Series(draw.uniform(0.1, 1, count)).mask(np.arange(count) == 4),
    )


def logged_batch(pair, objectives, count: int = 9) -> dict:
    frame = logged_frame(count)
    dataset = PairDataset(frame, **columns_of(frame, objectives))
    return PairCollator(pair)([dataset[i] for i in range(count)])


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_a_missing_label_or_correction_has_exactly_no_gradient(architecture):
    objectives = Objectives(relevance(), click(), display("examination"))
    pair = tiny_pair(architecture, tasks=objectives.names)
    batch = logged_batch(pair, objectives)
    present = objectives.matrix(pair.model, batch).present
    gone = np.arange(9) % 3 == 0
    assert present.numpy().T.tolist() == [[True] * 9, (~gone).tolist(), (~gone & (np.arange(9) != 4)).tolist()]
    for k, name in enumerate(objectives.names):
        norms = gradient_norms(pair.model, objectives.only(name), batch)
        assert torch.equal(norms == 0, ~present[:, k]), name
        assert torch.equal(gradient_norms_by_loop(pair.model, objectives.only(name), batch) == 0, ~present[:, k]), name


def test_what_is_known_of_a_sample_is_the_same_whatever_else_is_missing():
    pair = tiny_pair(tasks=("relevance", "click"))
    objectives = Objectives(relevance(weight=0.7), click())
    batch = logged_batch(pair, objectives)
    both = gradient_norms(pair.model, objectives, batch)
    alone = gradient_norms(pair.model, Objectives(relevance(weight=0.7)), batch)
    gone = batch["clicked"].isnan()
    torch.testing.assert_close(both[gone], alone[gone], rtol=1e-5, atol=0)
    assert (both[~gone] != alone[~gone]).all()


def test_a_sample_of_which_nothing_is_known_has_no_gradient_and_no_nan():
    model = Given([0.5, -0.5])
    batch = {"input_ids": torch.zeros(2, 1), "clicked": torch.tensor([math.nan, 1.0], dtype=torch.float64)}
    losses = Objectives(click())(model, batch)
    (slopes,) = torch.autograd.grad(losses.sum(), model.logits)
    assert losses[0] == 0 and slopes[0] == 0 and slopes[1] < 0


# --- lists of texts ---------------------------------------------------------------------------------------------------------------------


def list_batch(pair, frame, size: int = 4, *, seed: int = 0, **columns) -> dict:
    lists = ListDataset(frame, size, seed=seed, **columns)
    return ListCollator(pair)([lists[i] for i in range(len(lists))])


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), queries=st.integers(1, 5), size=st.integers(2, 9), seed=st.integers(0, 99))
def test_every_row_is_in_one_list_of_its_query(count, queries, size, seed):
    frame = tiny_frame(count, queries=queries)
    lists = ListDataset(frame, size, seed=seed, row=np.arange(count))
    samples = [lists[i] for i in range(len(lists))]
    assert sorted(row for sample in samples for row in sample["row"]) == list(range(count))
    assert len({sample["sample_id"] for sample in samples}) == len(lists) == len(lists.lengths())
    for sample in samples:
        own = frame.iloc[sample["row"]]
        assert (sample["candidates"], sample["text_b"]) == (own["sample_id"].tolist(), own["text_b"].tolist())
        assert sample["label"].tolist() == own["label"].tolist() and len(own) <= size
        assert set(own["query_id"]) == {sample["sample_id"].split("#")[0]}
    for _, of_query in frame.groupby("query_id"):
        sizes = [len(sample["row"]) for sample in samples if sample["row"][0] in of_query.index]
        assert len(sizes) == math.ceil(len(of_query) / size) and max(sizes) - min(sizes) <= 1


def test_lists_are_the_seeds():
    frame = tiny_frame(24, queries=2)
    one, same, other = (ListDataset(frame, 4, seed=seed) for seed in (0, 0, 1))
    assert [one[i]["candidates"] for i in range(6)] == [same[i]["candidates"] for i in range(6)]
    assert [one[i]["candidates"] for i in range(6)] != [other[i]["candidates"] for i in range(6)]


def test_the_cost_of_a_list_grows_with_its_longest_pair():
    frame = tiny_frame(4, queries=1).assign(text_a="ab", text_b=["c", "cdefgh", "c", "c"])
    assert ListDataset(frame, 4, seed=0).lengths() == [4 * 8]


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_slots_hold_the_candidates(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(11, queries=3)
    frame["label"] = np.linspace(0, 1, 11)
    lists = ListDataset(frame, 4, seed=0, clicked=1 - frame["label"])
    batch = ListCollator(pair)([lists[i] for i in reversed(range(len(lists)))])
    assert batch["labels"][0].isnan().any(), "a case whose first list is the longest"
    place = frame.set_index("sample_id").index
    with torch.no_grad():
        alone = pair_logits(pair.model, PairCollator(pair)([PairDataset(frame)[i] for i in range(11)]))
        slots = [{name: x[:, k] for name, x in batch.items() if torch.is_tensor(x) and x.ndim == 3} for k in range(4)]
        logits = torch.stack([pair_logits(pair.model, slot) for slot in slots], 1)
    for row, candidates in enumerate(batch["candidates"]):
        rows = place.get_indexer(candidates)
        torch.testing.assert_close(logits[row, : len(rows)], alone[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch["labels"][row, : len(rows)], torch.tensor(frame["label"].to_numpy()[rows], dtype=torch.float32))
        torch.testing.assert_close(batch["clicked"][row, : len(rows)], 1 - batch["labels"][row, : len(rows)])
        assert batch["labels"][row, len(rows) :].isnan().all() and batch["clicked"][row, len(rows) :].isnan().all()
    assert batch["labels"].isnan().any(), "a case without a gap"


def test_lists_carry_numbers_of_their_own():
    pair, frame = tiny_pair(), tiny_frame(10, queries=2)
    lists = ListDataset(frame, 3, seed=0, clicked=frame["label"])
    lists.carry(weight=np.arange(4.0))
    batch = ListCollator(pair)([lists[i] for i in (3, 1)])
    assert batch["weight"].tolist() == [3.0, 1.0] and batch["weight"].dtype == torch.float32
    assert batch["clicked"].shape == (2, 2) and batch["sample_id"] == [lists[3]["sample_id"], lists[1]["sample_id"]]
    for name, values, words in (("weight", [1.0], "1 values for 4 lists"), ("clicked", np.ones(4), "is the candidates' already")):
        with pytest.raises(ValueError, match=words):
            lists.carry(**{name: values})


def test_lists_are_scored_as_samples():
    pair, objectives = tiny_pair(), Objectives(relevance("listwise"))
    lists, collate = ListDataset(tiny_frame(14, queries=3), 4, seed=0), ListCollator(pair)
    scores = score_dataset(pair.model, objectives, lists, collate, batch_size=2, progress=False)
    norms = gradient_norms_by_loop(pair.model, objectives, collate([lists[i] for i in range(len(lists))]))
    assert scores["sample_id"].tolist() == [lists[i]["sample_id"] for i in range(len(lists))]
    np.testing.assert_allclose(scores["score"], norms, rtol=1e-4, atol=1e-7)


def test_objectives_of_lists_are_the_means_and_ranking_losses_of_their_candidates():
    pair, frame = tiny_pair(), logged_frame(14)
    frame["label"] = np.linspace(0, 1, 14)
    pointwise = Objectives(relevance("squared_error"), click(), display("propensity"))
    columns = columns_of(frame, pointwise)
    batch = list_batch(pair, frame, **columns)
    found = pointwise.matrix(pair.model, batch)
    rows = PairCollator(pair)([PairDataset(frame, **columns)[i] for i in range(14)])
    each = pointwise.matrix(pair.model, rows)
    with torch.no_grad():
        logits = pair_logits(pair.model, rows).tolist()
    ranking = [Objectives(relevance(loss)).matrix(pair.model, batch) for loss in LISTWISE]
    for i, candidates in enumerate(batch["candidates"]):
        own = [frame["sample_id"].tolist().index(name) for name in candidates]
        for k in range(3):
            there = [r for r in own if each.present[r, k]]
            assert found.present[i, k] == bool(there)
            expected = sum(each.losses[r, k].item() for r in there) / max(len(there), 1)
            assert found.losses[i, k].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
        for one, (_, by_loop) in zip(ranking, LISTWISE.values(), strict=True):
            assert one.present[i, 0] == (len(own) > 1)
            assert one.losses[i, 0].item() == pytest.approx(by_loop([logits[r] for r in own], [frame["label"][r] for r in own]), rel=1e-4)


def test_a_list_without_two_different_labels_is_missing():
    pair, frame = tiny_pair(), tiny_frame(8, queries=2)
    frame["label"] = [0.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.0]  # of the first query all alike
    for loss in LISTWISE:
        found = Objectives(relevance(loss)).matrix(pair.model, list_batch(pair, frame))
        assert found.present[:, 0].tolist() == [False, True] and found.losses[0, 0] == 0 and found.losses[1, 0] > 0
        norms = gradient_norms(pair.model, Objectives(relevance(loss)), list_batch(pair, frame))
        assert norms[0] == 0 and norms[1] > 0


# --- the engine -------------------------------------------------------------------------------------------------------------------------

OF_LISTS = {
    "pairwise": Objectives(relevance("pairwise")),
    "listwise": Objectives(relevance("listwise", weight=0.3), click("pairwise")),
    "mixed": Objectives(relevance("listwise"), click(), display("examination", weight=2.0)),
}


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", OF_LISTS)
def test_the_engine_is_exact_on_lists(name, tasks, architecture):
    objectives, frame = OF_LISTS[name], logged_frame(11)
    pair = tiny_pair(architecture, tasks=("relevance", "click", "display")[:tasks])
    batch = list_batch(pair, frame, **columns_of(frame, objectives))
    assert not objectives.matrix(pair.model, batch).present.all() and batch["labels"].isnan().any()
    assert largest_error(pair.model, objectives, batch) < 1e-10


@pytest.mark.parametrize("correction", ["propensity", "examination"])
@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_the_engine_is_exact_on_display(correction, architecture):
    objectives = Objectives(relevance("squared_error"), click(weight=0.5), display(correction, weight=0.2))
    for tasks in (("relevance",), objectives.names):
        pair = tiny_pair(architecture, tasks=tasks)
        assert largest_error(pair.model, objectives, logged_batch(pair, objectives), samples=9) < 1e-10


def test_as_many_lists_as_tokens_are_still_told_apart():
    pair, frame = tiny_pair("cross_encoder"), tiny_frame(40, queries=2)
    lists = ListDataset(frame, 2, seed=0)
    tokens = ListCollator(pair)([lists[i] for i in range(len(lists))])["input_ids"].shape[2]
    batch = ListCollator(pair)([lists[i % len(lists)] for i in range(tokens)])
    assert batch["input_ids"].shape == (tokens, 2, tokens)
    assert largest_error(pair.model, Objectives(relevance("pairwise")), batch) < 1e-10


def test_a_weighted_step_on_lists_is_the_loops():
    objectives, frame = OF_LISTS["mixed"], logged_frame(11)
    found, expected = (tiny_pair(tasks=("relevance", "click", "display")).model.double() for _ in range(2))
    batch = in_dtype(list_batch(tiny_pair(), frame, **columns_of(frame, objectives)), torch.float64)
    ours, theirs = (
        weighted_backward(found, objectives, batch, Weighting()),
        weighted_backward_by_loop(expected, objectives, batch, Weighting()),
    )
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-9, atol=0)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=name)


# --- from a log to columns --------------------------------------------------------------------------------------------------------------


def test_display_weights_by_hand():
    np.testing.assert_allclose(display_weights([1.0, 0.5, 0.1], clip=math.inf), np.array([1, 2, 10]) * 3 / 13, rtol=1e-15)
    np.testing.assert_allclose(display_weights([1.0, 0.5, 0.1], clip=4), np.array([1, 2, 4]) * 3 / 7, rtol=1e-15)
    np.testing.assert_allclose(display_weights([1.0, 0.5, 0.1], clip=1), 1, rtol=1e-15)
    found = display_weights(pd.Series([0.25, None, 1.0], dtype="Float64"), clip=math.inf)
    np.testing.assert_allclose(found, [1.6, math.nan, 0.4], rtol=1e-15)


RATES = np.array([[0.8, 0.4, 0.2], [0.4, 0.2, 0.1]])  # P(click) of item 0 and 1 at position 1, 2, 3: examination 1, 1/2, 1/4


def whole_log(shares=((10, 5, 5), (2, 4, 14)), rates=RATES) -> pd.DataFrame:
    """A log that shows item i at position k in shares[i][k] of 20 pages and is clicked exactly as often as its rate says."""
    rows = []
    for item, row in enumerate(shares):
        for k, count in enumerate(row):
            times = 10 * count
            clicks = np.arange(times) < round(times * rates[item, k])
            rows += [(item, k + 1, count / 20, click) for click in clicks]
    return pd.DataFrame(rows, columns=["item", "position", "propensity", "clicked"])


def test_weighted_clicks_are_those_of_uniform_exposure():
    log = whole_log()
    weights = display_weights(log["propensity"], clip=math.inf)
    assert weights.mean() == pytest.approx(1, rel=1e-12)
    for item in (0, 1):
        own = (log["item"] == item).to_numpy()
        assert np.average(log["clicked"][own], weights=weights[own]) == pytest.approx(RATES[item].mean(), rel=1e-12)
        assert weights[own].mean() == pytest.approx(1, rel=1e-12)  # both items get the same exposure
    assert log["clicked"][log["item"] == 0].mean() / log["clicked"][log["item"] == 1].mean() > 2.5  # where the truth is 2


def test_the_examination_curve_does_not_see_which_items_stand_where():
    curve = examination_curve(whole_log())
    assert curve.index.tolist() == [1, 2, 3] and curve.name == "examination"
    np.testing.assert_allclose(curve, [1, 0.5, 0.25], rtol=1e-12)
    naive = whole_log().groupby("position")["clicked"].mean()
    assert naive[3] / naive[1] < 0.2


def test_rows_without_a_position_propensity_or_click_are_left_out_of_the_curve():
    log = whole_log().astype({"position": "Int64", "propensity": "Float64", "clicked": "boolean"})
    gone = pd.concat([log, log.assign(position=pd.NA), log.assign(propensity=pd.NA, position=2), log.assign(clicked=pd.NA, position=3)])
    np.testing.assert_allclose(examination_curve(gone), [1, 0.5, 0.25], rtol=1e-12)


def test_the_highest_examination_is_1_wherever_it_is():
    np.testing.assert_allclose(examination_curve(whole_log(rates=RATES[:, [1, 0, 2]])), [0.5, 1, 0.25], rtol=1e-12)


def test_examination_by_row():
    curve = pd.Series([1.0, 0.5, 0.0], index=[1, 2, 3])
    np.testing.assert_array_equal(examination(pd.Series([2, 1, None], dtype="Int64"), curve), [0.5, 1.0, math.nan])
    for position in (3, 4):
        with pytest.raises(ValueError, match=f"no examination above 0 for position {position};"):
            examination([1, position], curve)


def test_the_curve_and_the_probabilities_of_a_simulated_shop_are_found():
    shop = ShopSettings(queries=40, items=400, candidates=8, sessions_per_query=100)
    log = simulate_shop(shop, seed=3)
    curve = examination_curve(log)
    np.testing.assert_allclose(curve, 1 / np.arange(1, 9), atol=0.07)
    shown = log.assign(examination=examination(log["position"], curve), display_weight=display_weights(log["propensity"], clip=math.inf))
    truth = log.groupby("grade")["relevance_probability"].first().to_numpy()
    found = {}
    for objective in (click(), display("propensity"), display("examination")):
        objectives = Objectives(objective)
        model = ByGrade()
        batch = {"input_ids": torch.tensor(log["grade"].to_numpy())}
        batch |= {name: torch.tensor(values).double() for name, values in columns_of(shown, objectives).items()}
        search = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure(search=search, model=model, objectives=objectives, batch=batch):
            search.zero_grad()
            loss = objectives(model, batch).mean()
            loss.backward()
            return loss

        search.step(closure)
        found[objective.correction] = torch.sigmoid(model.logits.detach()).numpy()
    np.testing.assert_allclose(found["examination"], truth, atol=0.06)
    uniform = truth * np.mean(1 / np.arange(1, 9))
    np.testing.assert_allclose(found["propensity"], uniform, atol=0.03)
    assert found[None][3] / found[None][0] > 1.5 * truth[3] / truth[0]
    # the click objective's optimum is the plain click rate, the propensity objective's the weighted one
    np.testing.assert_allclose(found[None], log.groupby("grade")["clicked"].mean().astype(float), rtol=1e-3)
    of_grade = [shown[shown["grade"] == grade] for grade in range(4)]
    weighted = [np.average(rows["clicked"].astype(float), weights=rows["display_weight"]) for rows in of_grade]
    np.testing.assert_allclose(found["propensity"], weighted, rtol=1e-3)


class ByGrade(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, input_ids):
        return self.logits[input_ids]


def test_columns_are_what_the_objectives_read():
    frame = logged_frame(9)
    found = columns_of(frame, Objectives(relevance(), click(), display("examination")))
    assert list(found) == ["clicked", "examination"] and {values.dtype for values in found.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(np.isnan(found["clicked"]), np.arange(9) % 3 == 0)
    np.testing.assert_allclose(found["examination"], frame["examination"], rtol=1e-7)
    assert columns_of(frame, Objectives(relevance("listwise"))) == {}


# --- errors -----------------------------------------------------------------------------------------------------------------------------

TASKLESS = Given(np.zeros((2, 3)).tolist())
MISTAKES = {
    "loss 'hinge'": (lambda: relevance("hinge"), r"Objective.loss is 'hinge', expected one of cross_entropy, squared_error, pairwise, l"),
    "negative": (lambda: click(weight=-0.1), r"Objective.weight of 'click' is -0.1, expected a finite number, 0 or more"),
    "infinite": (lambda: click(weight=math.inf), r"is inf, expected a finite number"),
    "nan": (lambda: click(weight=math.nan), r"is nan, expected a finite number"),
    "true": (lambda: click(weight=True), r"is True, expected a finite number"),
    "no name": (lambda: Objective(""), r"Objective.name is '', expected a word"),
    "label": (lambda: click(label=None), r"Objective.label is None, expected a word"),
    "correction": (lambda: Objective("x", correction="luck"), r"correction is 'luck', expected None or one of propensity, examination"),
    "display": (lambda: display(None), r"correction is None, expected one of propensity, examination; without"),
    "ranking": (lambda: display(loss="listwise"), r"'propensity' is defined for a loss of one candidate, not for 'listwise'"),
    "none": (lambda: Objectives(), r"expected one or more Objective, such as relevance\(\) and click\(\), got \(\)"),
    "a name": (lambda: Objectives("click"), r"expected one or more Objective.*got \('click',\)"),
    "twice": (lambda: Objectives(display(), display("examination")), r"names of objectives must differ, got display, display"),
    "all 0": (lambda: Objectives(click(weight=0)), r"all objectives \(click\) have weight 0"),
    "delta": (lambda: Objectives(click(), importance=-1.0), r"importance is -1.0, expected a finite number"),
    "only": (lambda: Objectives(click()).only("clicks"), r"no objective 'clicks'; there are click"),
    "column": (
        lambda: Objectives(purchase()).matrix(Given([0.0]), batch_of([1.0])),
        r"objective 'purchase' reads column 'purchased', which the batch does not have \(it has input_ids, labels\)",
    ),
    "tasks": (lambda: Objectives(click()).matrix(TASKLESS, clicks_of(2)), r"gives 3 logits per sample and names 0 tasks"),
    "no task": (
        lambda: Objectives(purchase()).matrix(GivenTasks(np.zeros((2, 3)).tolist()), clicks_of(2)),
        r"no task for objective 'purchase': the model has relevance, click, display; load it with load_pair_model\(tasks=\('purchase',\)\)",
    ),
    "shape": (lambda: Objectives(click()).matrix(Given([0.0]), clicks_of(2)), r"labels of shape \(2,\) for logits of shape \(1,\)"),
    "no list": (lambda: Objectives(relevance("pairwise")).matrix(Given([0.0]), batch_of([1.0])), r"use ListDataset and ListCollator"),
    "clip": (lambda: display_weights([0.5], clip=0.5), r"clip is 0.5, expected the largest inverse propensity to keep, 1 or more"),
    "clip nan": (lambda: display_weights([0.5], clip=math.nan), r"clip is nan"),
    "propensity": (lambda: display_weights([0.5, 0.0], clip=2), r"1 propensities are outside \(0, 1\], the first is 0.0 in row 1"),
    "no propensity": (lambda: display_weights([None, math.nan], clip=2), r"none of the 2 propensities is there"),
    "no clicks": (lambda: examination_curve(whole_log(rates=0 * RATES)), r"none of 400 rows was clicked"),
    "no position": (lambda: examination_curve(whole_log().drop(columns="position")), r"needs column 'position'; the frame has item, p"),
    "no column": (lambda: columns_of(logged_frame(), Objectives(purchase())), r"'purchase' needs column 'purchased'; the frame has"),
    "range": (
        lambda: columns_of(logged_frame().assign(clicked=2), Objectives(click())),
        r"column 'clicked' of objective 'click' must be in \[0, 1\]; 9 of 9 values are not, the first is 2.0 in row 0",
    ),
    "examination 0": (lambda: columns_of(logged_frame().assign(examination=0), Objectives(display("examination"))), r"must be in \(0, 1\]"),
    "weight": (lambda: columns_of(logged_frame().assign(display_weight=-1), Objectives(display())), r"must be finite and 0 or more"),
    "infinite label": (lambda: columns_of(logged_frame().assign(label=math.inf), Objectives(relevance("pairwise"))), r"be finite; 9"),
    "negative label": (lambda: columns_of(logged_frame().assign(label=-1), Objectives(relevance("listwise"))), r"be finite and 0 or"),
    "all missing": (lambda: columns_of(logged_frame().assign(clicked=math.nan), Objectives(click())), r"is missing in all 9 rows"),
    "size": (lambda: ListDataset(tiny_frame(4), 1, seed=0), r"size is 1, expected 2 or more candidates"),
    "query": (lambda: ListDataset(tiny_frame(4).drop(columns="query_id"), 2, seed=0), r"'query_id' has 4 missing"),
    "length": (lambda: ListDataset(tiny_frame(4), 2, seed=0, clicked=[1]), r"column 'clicked' has 1 values for 4 rows"),
    "max_length": (lambda: ListCollator(tiny_pair(), 1000), r"max_length must be from 1 to the encoder's 80 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    mistake, words = MISTAKES[case]
    with pytest.raises(ValueError, match=words):
        mistake()


def test_a_label_of_a_batch_that_is_not_finite_is_not_hidden():
    batch = clicks_of(2) | {"clicked": torch.tensor([math.inf, 1.0], dtype=torch.float64)}
    assert not torch.isfinite(Objectives(click())(Given([0.5, 0.5]), batch)[0])
