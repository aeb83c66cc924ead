"""Fine-tuning against a training loop written by hand; what it keeps, refuses and leaves behind; and runs that are interrupted."""

import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from apart import start
from safetensors.torch import load_file
from tiny import tiny_frame, tiny_pair

from recsys_importance import training
from recsys_importance.data.frame import fingerprint
from recsys_importance.evaluation import evaluate
from recsys_importance.folders import locked
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, add_lora, predict
from recsys_importance.objectives import LOSSES, Objectives, click, cross_entropy, relevance
from recsys_importance.trainer import EpochSampler
from recsys_importance.training import TrainingSettings, fine_tune, sample_weights

ARCHITECTURES = ("two_tower", "cross_encoder")
SETTINGS = dict(epochs=2, batch_size=8, learning_rate=1e-3, max_length=32)
TWO = Objectives(relevance(weight=0.7), click(weight=0.3))
TASKS = ("relevance", "click")


@pytest.fixture(scope="module", autouse=True)
def less_overhead():
    """The Trainer collects rubbish when a run starts, which takes longer than a tiny run: leave out what is imported already. Nor need
    scikit-learn check its parameters."""
    gc.collect()
    gc.freeze()
    with sklearn.config_context(skip_parameter_validation=True):
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_scores_everywhere(monkeypatch):
    """Forward scores in float32 also on a processor that is faster in bfloat16."""
    monkeypatch.setattr("recsys_importance.selective.fast_bfloat16", lambda device: False)


def clicked(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with clicks, missing in every fifth row."""
    clicks = np.random.default_rng(1).integers(0, 2, size=len(frame)).astype(float)
    return frame.assign(clicked=np.where(np.arange(len(frame)) % 5 == 0, np.nan, clicks))


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return clicked(tiny_frame(30, seed=3))


@pytest.fixture(scope="module")
def validation() -> pd.DataFrame:
    return clicked(tiny_frame(14, seed=4, queries=2, prefix="v"))


@pytest.fixture(scope="module")
def scores(train) -> pd.Series:
    return pd.Series(np.random.default_rng(0).lognormal(size=len(train)), index=train["sample_id"], name="score")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def trained(train, validation, *, architecture="two_tower", tasks=("relevance",), dropout=0.1, **given):
    """(weights after fine-tuning a fresh tiny model, what fine_tune returned); given: arguments of fine_tune, or settings."""
    arguments = {name: given.pop(name) for name in ("scores", "weighting", "objectives", "folder", "description") if name in given}
    pair = tiny_pair(architecture, tasks=tasks, dropout=dropout)
    result = fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | given), **arguments)
    return weights_of(pair.model), result


# --- against a loop written by hand -----------------------------------------------------------------------------------------------------


def rate_at(step: int, total: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, 0 for the first, as a fraction of the peak."""
    warm = math.ceil(settings.warmup * total)
    if step < warm:
        return step / warm
    gone = (step - warm) / (total - warm)
    return {
        "linear": 1 - gone,
        "cosine": (1 + math.cos(math.pi * gone)) / 2,
        "exponential": settings.final_rate**gone,
        "constant": 1.0,
    }[settings.schedule]


def trained_by_hand(pair, train, validation, settings, weights, weighting) -> tuple[dict, list[float], list[float]]:
    """Weights with the best log-loss on validation, and loss and gradient norm of every step: biases and layer norms do not decay."""
    dataset, model = PairDataset(train), pair.model.train()
    collate = PairCollator(pair, settings.max_length)
    plain = [name.endswith("bias") or "LayerNorm" in name for name, _ in model.named_parameters()]
    groups = [
        dict(params=[p for p, is_plain in zip(model.parameters(), plain, strict=True) if is_plain is here], weight_decay=decay)
        for here, decay in ((False, settings.weight_decay), (True, 0.0))
    ]
    rate = settings.learning_rate
    optimiser = torch.optim.AdamW(groups, rate) if settings.optimizer == "adamw" else torch.optim.SGD(groups, rate, settings.momentum)
    size = settings.batch_size * settings.accumulation
    sampler = EpochSampler(len(train), seed=settings.seed, batch=size, lengths=dataset.lengths())
    per_epoch = math.ceil(len(train) / size)
    total = per_epoch * settings.epochs
    every = max(1, per_epoch // settings.evaluations_per_epoch)
    step, losses, norms, best, kept = 0, [], [], math.inf, None
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            share = weighting.share(step / total)
            w = torch.tensor([1 + share * (weights[i] - 1) for i in rows], dtype=torch.float32)
            loss = (w * cross_entropy(model, collate([dataset[i] for i in rows]))).mean()
            model.zero_grad()
            loss.backward()
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)))
            if 0 < settings.max_gradient_norm < norms[-1]:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= settings.max_gradient_norm / norms[-1]
            for group in optimiser.param_groups:
                group["lr"] = rate * rate_at(step, total, settings)
            optimiser.step()
            losses.append(loss.item())
            step += 1
            if step % every == 0 or step == total:
                predicted = predict(pair, validation).astype(np.float64)
                y = validation["label"].to_numpy()
                found = -(y * np.log(predicted) + (1 - y) * np.log(1 - predicted)).mean()
                if found < best:
                    best, kept = found, weights_of(model)
    return kept, losses, norms


RUNS = {
    "uniform": dict(),
    "annealed cross-encoder": dict(weighting=Weighting(exponent=-1, clip=2, anneal=(0.25, 0.75)), architecture="cross_encoder"),
    "accumulation, cosine": dict(weighting=Weighting(), accumulation=2, batch_size=5, schedule="cosine"),
    "decay, constant": dict(weight_decay=20.0, schedule="constant", warmup=0.3),
    "no warm-up, no clipping": dict(warmup=0.0, max_gradient_norm=0.0),
    "momentum, exponential": dict(
        optimizer="sgd", schedule="exponential", final_rate=0.05, weighting=Weighting(clip=3), learning_rate=0.02
    ),
    "plain SGD, decay, hard clipping": dict(optimizer="sgd", momentum=0.0, weight_decay=2.0, max_gradient_norm=0.2, learning_rate=0.05),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_fine_tuning_is_the_loop_written_by_hand(run, train, validation, scores):
    run = run.copy()
    architecture, rule = run.pop("architecture", "two_tower"), run.pop("weighting", None)
    settings = TrainingSettings(**SETTINGS | dict(patience=100, evaluations_per_epoch=3, metric="log_loss") | run)
    weights = np.ones(len(train)) if rule is None else rule(scores.to_numpy())
    pair = tiny_pair(architecture, dropout=0.0)
    before = weights_of(pair.model)
    expected, losses, norms = trained_by_hand(pair, train, validation, settings, weights, rule or Weighting())
    pair = tiny_pair(architecture, dropout=0.0)
    result = fine_tune(pair, train, validation, settings, scores=None if rule is None else scores, weighting=rule)
    found = weights_of(pair.model)
    # The softmax of attention does not depend on the keys' bias: its gradient is rounding, which Adam makes into steps of full size.
    names = [name for name in expected if not name.endswith("key.bias")]
    moved = math.sqrt(sum((expected[name] - before[name]).square().sum().item() for name in names))
    apart = math.sqrt(sum((expected[name] - found[name]).square().sum().item() for name in names))
    assert moved > 0.02 and apart < 5e-5 * moved
    history, total = result.history, len(losses)
    steps = history["step"].tolist()
    every = max(1, total // settings.epochs // 3)
    assert steps == sorted({*range(0, total + 1, every), total}) and np.isnan(history["loss"][0])
    by_row = [np.mean(losses[first:last]) for first, last in zip(steps, steps[1:], strict=False)]
    np.testing.assert_allclose(history["loss"][1:], by_row, rtol=1e-4)
    np.testing.assert_allclose(history["train/grad_norm"][1:], [norms[step - 1] for step in steps[1:]], rtol=1e-3)
    rates = [settings.learning_rate * rate_at(step - 1, total, settings) for step in steps[1:]]
    np.testing.assert_allclose(history["train/learning_rate"][1:], rates, rtol=1e-6)


def test_equal_scores_train_exactly_as_no_scores(train, validation):
    plain, plain_result = trained(train, validation)
    equal = pd.Series(0.37, index=train["sample_id"])
    weighted, weighted_result = trained(train, validation, scores=equal)
    assert same(plain, weighted)
    pd.testing.assert_frame_equal(plain_result.history, weighted_result.history)
    assert not same(plain, weights_of(tiny_pair().model))


def test_the_same_seed_gives_the_same_model_whatever_came_before(train, validation, scores):
    first, first_result = trained(train, validation, scores=scores)
    torch.manual_seed(1234), np.random.seed(99), torch.rand(7)  # noqa: NPY002
    second, second_result = trained(train, validation, scores=scores)
    assert same(first, second)
    pd.testing.assert_frame_equal(first_result.history, second_result.history)
    assert not same(first, trained(train, validation, scores=scores, seed=1)[0])


def test_scores_change_the_model_and_find_their_rows_by_name(train, validation, scores):
    uniform, weighted = (trained(train, validation, scores=given)[0] for given in (None, scores))
    assert not same(uniform, weighted)
    assert same(weighted, trained(train, validation, scores=scores.sample(frac=1, random_state=0))[0])


def test_a_sample_of_weight_zero_has_no_influence(train, validation, scores):
    weighting = Weighting(threshold=0.3, threshold_on="quantile")
    weights = pd.Series(sample_weights(train, scores, weighting), index=train.index)
    dropped, heaviest = weights[weights == 0].index[0], weights.idxmax()
    assert (weights == 0).sum() == 9

    def with_other_text_and_label(row):
        changed = train.copy()
        words = train.loc[row, "text_b"].split()
        # Of the same length in letters and words, so that batches and padding stay as they are.
        swap = {"mug": "cup", "usb": "hub", "red": "tea", "blue": "lamp", "wool": "sock", "desk": "hat", "set": "for"}
        swap |= {new: old for old, new in swap.items()} | {
            "of": "of",
            "steel": "glass",
            "glass": "steel",
            "green": "small",
            "small": "green",
        }
        changed.loc[row, "text_b"] = " ".join(swap.get(word, word) for word in words)
        changed.loc[row, "label"] = 1 - train.loc[row, "label"]
        return changed

    arguments = dict(scores=scores, weighting=weighting)
    plain = trained(train, validation, **arguments)[0]
    assert same(plain, trained(with_other_text_and_label(dropped), validation, **arguments)[0])
    assert not same(plain, trained(with_other_text_and_label(heaviest), validation, **arguments)[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_what_it_is_shown(loss, train):
    """Fitted to thirty pairs, which also validate: the pairs with label 1 end up above the others."""
    pair = tiny_pair("cross_encoder" if loss == "squared_error" else "two_tower", dropout=0.0)
    before = evaluate(train, predict(pair, train)).summary["auc"]
    settings = TrainingSettings(epochs=8, batch_size=6, learning_rate=5e-3, loss=loss, evaluations_per_epoch=1, patience=100)
    fine_tune(pair, train, train, settings)
    after = evaluate(train, predict(pair, train)).summary["auc"]
    assert after > 0.9 > before
    assert not any(module.training for module in pair.model.modules())


def test_in_bf16_it_stays_close_to_float32(train, validation, scores):
    start = weights_of(tiny_pair().model)
    plain, mixed = (trained(train, validation, dropout=0.0, scores=scores, precision=name)[0] for name in ("float32", "bf16"))
    moved = math.sqrt(sum((plain[name] - start[name]).square().sum().item() for name in start))
    apart = math.sqrt(sum((plain[name] - mixed[name]).square().sum().item() for name in start))
    assert 0 < apart < 0.3 * moved  # AdamW makes steps of one size of gradients of any, rounding included
    assert same(plain, trained(train, validation, dropout=0.0, scores=scores)[0])  # "auto" on a processor


# --- importance while training ----------------------------------------------------------------------------------------------------------


def test_forward_keeps_half_of_each_batch_and_says_so(train, validation):
    half = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")
    seen = []

    def watched(model, batch):
        if model.training:
            seen.append(len(batch["sample_id"]))
        return cross_entropy(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "cross_entropy", watched)
        _, result = trained(train, validation, recompute="forward", weighting=half)
    assert sorted(seen) == [3] * 2 + [4] * 6  # of 30 rows: three batches of 8 and one of 6, twice
    rows = result.history.iloc[1:]
    assert rows["train/trained_share"].tolist() == rows["train/effective_share"].tolist() == [0.5] * 4
    assert rows["train/largest_weight"].tolist() == [2.0] * 4


@pytest.mark.parametrize("mode", ["epoch", "step"])
def test_annealed_weights_begin_uniform(mode, train, validation):
    _, result = trained(train, validation, recompute=mode, weighting=Weighting(anneal=(0.5, 1.0)))
    shares = result.history["train/effective_share"].iloc[1:].tolist()
    assert shares[:2] == pytest.approx([1, 1]) and shares[3] < shares[2] < 1


def test_the_head_that_was_trained_is_returned(train, validation):
    """delta, the weight of L_i, makes one of ridge 1 / delta; one that is given learns itself; and none is made without being asked for."""
    run = dict(recompute="step", epochs=1, metric="loss")
    _, made = trained(train, validation, objectives=Objectives(relevance(), importance=0.25), **run)
    assert made.head.ridge == 4 and made.head.samples > 16 and made.history["train/loss/importance"].iloc[1:].gt(0).all()
    pair = tiny_pair()
    head = ImportanceHead(pair.model, ridge=7.0)
    objectives = Objectives(relevance(), importance=0.25)
    result = fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | run), objectives=objectives, head=head)
    assert result.head is head and head.ridge == 7 and head.samples == made.head.samples
    _, none = trained(train, validation, objectives=Objectives(relevance()), **run)
    assert none.head is None and "train/loss/importance" not in none.history


# --- several objectives -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "balance"), [("never", "upgrad"), ("step", "fixed")])
def test_several_objectives_are_trained_logged_and_evaluated_each_on_its_own(mode, balance, train, validation):
    before = predict(tiny_pair(tasks=TASKS), validation)
    metric = "click/log_loss"
    _, result = trained(train, validation, tasks=TASKS, objectives=TWO, recompute=mode, balance=balance, metric=metric, patience=9)
    history = result.history
    metrics = [f"{task}/{name}" for task in TASKS for name in ("ndcg@10", "mrr", "auc", "log_loss")]
    logged = [f"train/{name}" for name in ("loss/relevance", "loss/click", "effective_share", "trained_share", "largest_weight")]
    coefficients = [f"train/coefficient/{task}" for task in TASKS] if balance == "upgrad" else []
    expected = {"step", "epoch", "loss", "validation_loss", "loss/relevance", "loss/click", "train/learning_rate", "train/grad_norm"}
    assert set(history) == expected | {*metrics, *logged, *coefficients}
    assert not history.iloc[1:].isna().any().any() and history.loc[0, metrics].notna().all()
    # the first row by hand: missing clicks count neither for the loss nor for the metrics
    y, c = validation["label"].to_numpy(), validation["clicked"].to_numpy()
    there = np.isfinite(c)
    assert 0 < there.sum() < 14
    p = before.astype(np.float64)
    losses = [-(t * np.log(q) + (1 - t) * np.log(1 - q)) for t, q in ((y, p[:, 0]), (c, p[:, 1]))]
    first = history.iloc[0]
    assert first["loss/relevance"] == pytest.approx(losses[0].mean(), rel=1e-4)
    assert first["loss/click"] == pytest.approx(losses[1][there].mean(), rel=1e-4)
    assert first["validation_loss"] == pytest.approx((0.7 * losses[0] + 0.3 * np.where(there, losses[1], 0)).mean(), rel=1e-4)
    summary = evaluate(validation[there].assign(label=c[there]), before[there, 1], probabilities=before[there, 1]).summary
    assert {name: first[f"click/{name}"] for name in summary if f"click/{name}" in first} == pytest.approx(
        {name: value for name, value in summary.items() if f"click/{name}" in first}, rel=1e-6
    )
    assert result.best == history[metric].iloc[1:].min()


def test_one_logit_can_serve_several_objectives(train, validation):
    _, result = trained(train, validation, objectives=TWO, metric="loss")
    history = result.history
    assert {"loss/relevance", "loss/click", "train/loss/relevance", "train/loss/click", "ndcg@10", "log_loss"} <= set(history)
    assert "click/ndcg@10" not in history and result.best == history["validation_loss"].iloc[1:].min()
    assert history.loc[0, "loss/relevance"] == pytest.approx(history.loc[0, "log_loss"], rel=1e-4)


def test_a_missing_label_has_no_influence(train, validation):
    """Where only clicks count, another relevance of the rows without a click changes nothing; a click in their place does."""
    gaps = train["clicked"].isna()
    run = dict(tasks=TASKS, objectives=Objectives(relevance(weight=0), click()), metric="loss")
    plain = trained(train, validation, **run)[0]
    others = train.assign(label=train["label"].where(~gaps, 1 - train["label"]))
    assert same(plain, trained(others, validation, **run)[0])
    filled = train.assign(clicked=train["clicked"].fillna(1.0))
    assert not same(plain, trained(filled, validation, **run)[0])


# --- what is kept, and when it stops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "best", "given"),
    [
        ("ndcg@10", "max", {}),
        ("log_loss", "min", {}),
        ("loss", "min", dict(objectives=TWO)),
        ("loss/click", "min", dict(objectives=TWO)),
        ("relevance/auc", "max", dict(objectives=TWO, tasks=TASKS)),
        ("click/log_loss", "min", dict(objectives=TWO, tasks=TASKS)),
    ],
)
def test_the_best_weights_are_kept(metric, best, given, train, validation):
    """A rate so high that the last weights are not the best."""
    tasks = given.get("tasks", ("relevance",))
    pair = tiny_pair("cross_encoder", tasks=tasks)
    settings = TrainingSettings(epochs=3, batch_size=8, learning_rate=3e-2, patience=20, metric=metric, max_length=32)
    result = fine_tune(pair, train, validation, settings, objectives=given.get("objectives"))
    column = "validation_loss" if metric == "loss" else metric
    values = result.history[column][1:]
    assert result.best == getattr(values, best)() != values.iloc[-1] and not result.stopped_early
    again = training._validation(pair, validation, given.get("objectives"), settings)(pair.model)
    row = result.history.loc[getattr(values, f"idx{best}")()]
    assert again[metric] == pytest.approx(result.best, rel=1e-6)
    assert all(again[name] == pytest.approx(row[name], rel=1e-6) for name in again if name in row and name != "loss")


def test_training_stops_when_nothing_improves(train, validation):
    settings = dict(epochs=5, learning_rate=1e-12, evaluations_per_epoch=2)
    for patience in (1, 3):
        _, result = trained(train, validation, patience=patience, **settings)
        assert result.stopped_early and result.history["step"].iloc[-1] == 2 * (1 + patience)
    _, result = trained(train, validation, patience=50, **settings)
    assert not result.stopped_early and result.history["step"].iloc[-1] == 20


def test_it_stops_by_the_metric_that_was_chosen(train, validation):
    """Steps so small that no rank changes, while log-loss falls a little each time: NDCG stops, log-loss goes on."""
    settings = dict(epochs=3, learning_rate=1e-6, patience=1, evaluations_per_epoch=2, schedule="constant")
    _, by_rank = trained(train, train, dropout=0.0, **settings)
    _, by_loss = trained(train, train, dropout=0.0, metric="log_loss", **settings)
    assert by_rank.stopped_early and by_rank.history["step"].iloc[-1] == 4
    assert not by_loss.stopped_early and by_loss.history["step"].iloc[-1] == 12
    assert by_loss.best == by_loss.history["log_loss"].iloc[-1] == by_loss.history["log_loss"].min()


def test_the_history_has_a_row_per_evaluation(train, validation):
    _, result = trained(train, validation, epochs=3)
    history = result.history
    trainer_log = ["train/grad_norm", "train/learning_rate", "train/effective_share", "train/trained_share", "train/largest_weight"]
    assert history.columns.tolist() == ["step", "epoch", "loss", "ndcg@10", "log_loss", "auc", "mrr", *sorted(trainer_log)]
    assert history["step"].tolist() == [0, 2, 4, 6, 8, 10, 12] and history["epoch"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    start = predict(tiny_pair(), validation)
    before = evaluate(validation, start, probabilities=start).summary
    for name in ("ndcg@10", "log_loss", "mrr", "auc"):
        assert history.loc[0, name] == pytest.approx(before[name], rel=1e-6)
    assert history.loc[0, ["loss", *trainer_log]].isna().all() and not history.iloc[1:].isna().any().any()


def test_the_last_step_is_evaluated_and_logged_also_off_the_beat(train, validation):
    """Five steps, evaluated every two: the fifth too, with the loss of the one step since the fourth."""
    _, result = trained(train, validation, epochs=1, batch_size=6)
    assert result.history["step"].tolist() == [0, 2, 4, 5] and not result.history.iloc[1:].isna().any().any()


# --- low-rank adapters ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_low_rank_adapters_train_and_the_encoder_stays(architecture, train, validation):
    pair = tiny_pair(architecture)
    before, classes = weights_of(pair.model), type(pair.model)
    fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | dict(lora_rank=2, recompute="step")))
    after = weights_of(pair.model)
    assert type(pair.model) is classes
    trainable = {name for name, parameter in pair.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in after if "lora_" in name or name.startswith(("logit.", "classifier.classifier."))}
    base = {name: after[name.replace("query.", "query.base_layer.").replace("value.", "value.base_layer.")] for name in before}
    changed = {name for name in base if not torch.equal(base[name], before[name])}
    assert changed == {name for name in before if name.startswith(("logit.", "classifier.classifier."))}
    adapters = [name for name in after if "lora_B" in name]
    assert len(adapters) == 4 and all(after[name].abs().max() > 0 for name in adapters)  # they start at 0; two layers, query and value


def test_the_seed_draws_the_adapters(train, validation):
    settings = dict(lora_rank=2, learning_rate=1e-12, epochs=1)
    first, second, other = (trained(train, validation, seed=seed, **settings)[0] for seed in (0, 0, 1))
    assert same(first, second) and not same(first, other)


def test_an_error_before_the_start_leaves_a_model_without_adapters(train, validation, monkeypatch):
    pair = tiny_pair()
    before = weights_of(pair.model)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    for settings, error in ((dict(lora_rank=2), OSError), (dict(lora_rank=2, balance="sum"), ValueError)):
        with pytest.raises(error):
            fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | settings))
        assert same(before, weights_of(pair.model)) and all(p.requires_grad for p in pair.model.parameters())
        monkeypatch.undo()


# --- what is left behind ----------------------------------------------------------------------------------------------------------------


def test_no_files_are_left_behind_and_standard_output_is_quiet(train, validation, tmp_path, monkeypatch, capfd):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir(), temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    fine_tune(tiny_pair(), train, validation, TrainingSettings(**SETTINGS), description="a tiny run")
    assert not list(here.iterdir()) and not list(temporary.iterdir())
    out, err = capfd.readouterr()
    assert out == "" and "a tiny run" in err and "8/8" in err and "ndcg@10" in err


def test_frames_and_scores_are_left_alone(train, validation, scores):
    frames = [train.copy(), validation.copy(), scores.copy()]
    trained(train, validation, scores=scores)
    pd.testing.assert_frame_equal(train, frames[0])
    pd.testing.assert_frame_equal(validation, frames[1])
    pd.testing.assert_series_equal(scores, frames[2])


def test_checkpoints_stay_where_they_are_asked_for(train, validation, tmp_path):
    folder = tmp_path / "new" / "folder"
    weights, result = trained(train, validation, folder=folder)
    found = sorted(path.name for path in folder.iterdir())
    best = result.history["step"][1:][result.history["ndcg@10"][1:] == result.best].iloc[0]
    assert found == [f"checkpoint-{best}", "importance_checkpoints.json", "run.json"]
    assert same(load_file(folder / f"checkpoint-{best}" / "model.safetensors"), weights)


# --- interrupted runs -------------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@contextlib.contextmanager
def interrupted(event: str, when):
    """Inside, training ends with Interrupted at this event of the progress bar's callback if when(state)."""
    before = getattr(training._Progress, event)

    def stop(self, args, state, control, **kwargs):
        before(self, args, state, control, **kwargs)
        if when(state):
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Progress, event, stop)
        with pytest.raises(Interrupted):
            yield


def at_step(number: int):
    return interrupted("on_step_end", lambda state: state.global_step == number)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")
RESUMED = {
    "never": dict(scores=True, weighting=Weighting(clip=3, anneal=(0.0, 0.8)), schedule="exponential"),
    "epoch": dict(recompute="epoch", weighting=Weighting(clip=3), architecture="cross_encoder"),
    "step": dict(recompute="step", weighting=Weighting(clip=3, anneal=(0.2, 0.6)), batch_size=2, accumulation=2, schedule="cosine"),
    "forward": dict(recompute="forward", weighting=HALF, batch_size=2, accumulation=2),
    "momentum, bf16": dict(optimizer="sgd", learning_rate=0.02, precision="bf16"),
    "adapters": dict(lora_rank=2, recompute="epoch"),
    "objectives": dict(objectives=TWO, tasks=TASKS, balance="upgrad", metric="click/log_loss"),
    "head": dict(
        objectives=Objectives(relevance(), click(), importance=0.5), recompute="forward", weighting=HALF, exact_every=3, metric="loss"
    ),
    "pcgrad": dict(objectives=Objectives(relevance(), click()), balance="pcgrad", recompute="step", metric="loss"),
}


@pytest.fixture(scope="module")
def sixteen(train) -> pd.DataFrame:
    return train.iloc[:16]


@pytest.mark.parametrize("run", RESUMED.values(), ids=RESUMED)
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, sixteen, validation, scores, tmp_path):
    """Two epochs of four steps with dropout, a checkpoint every two. Interrupted in steps 3, 5 and 7 it goes on from the middle of the
    first epoch, from its end and from the middle of the second."""
    run = dict(batch_size=4, patience=100) | run | (dict(scores=scores[:16]) if run.get("scores") else {})
    expected, result = trained(sixteen, validation, **run)
    for step in (3, 5, 7):
        with at_step(step):
            trained(sixteen, validation, folder=tmp_path, **run)
        assert max(checkpoints(tmp_path)) == step - 1
    found, resumed = trained(sixteen, validation, folder=tmp_path, **run)
    assert same(expected, found)
    pd.testing.assert_frame_equal(resumed.history, result.history, check_exact=True)
    assert (resumed.best, resumed.stopped_early) == (result.best, result.stopped_early) == (result.best, False)
    assert result.history["step"].tolist() == [0, 2, 4, 6, 8]
    assert (result.head is None) is (resumed.head is None)
    assert result.head is None or same(result.head.state_dict(), resumed.head.state_dict())


def test_patience_is_counted_across_an_interruption(sixteen, validation, tmp_path):
    """Nothing improves after the first evaluation: with patience 3 the fourth ends the run, whatever lies between."""
    run = dict(batch_size=4, learning_rate=1e-12, epochs=5, patience=3)
    expected, result = trained(sixteen, validation, **run)
    assert result.stopped_early and result.history["step"].tolist() == [0, 2, 4, 6, 8]
    for step in (5, 7):
        with at_step(step):
            trained(sixteen, validation, folder=tmp_path, **run)
    found, resumed = trained(sixteen, validation, folder=tmp_path, **run)
    assert same(expected, found) and resumed.stopped_early
    pd.testing.assert_frame_equal(resumed.history, result.history, check_exact=True)


@pytest.mark.parametrize("run", [dict(learning_rate=1e-12, epochs=5, patience=1), dict()], ids=["stopped early", "ended"])
def test_a_run_that_was_over_when_it_was_interrupted_is_not_trained_on(run, sixteen, validation, tmp_path):
    """Interrupted after its last checkpoint, before the best weights were loaded."""
    run = dict(batch_size=4) | run
    expected, result = trained(sixteen, validation, **run)
    with interrupted("on_train_end", lambda state: True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ImportanceTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Interrupted))
        trained(sixteen, validation, folder=tmp_path, **run)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ImportanceTrainer, "training_step", lambda self, *rest: steps.append(rest))
        found, resumed = trained(sixteen, validation, folder=tmp_path, **run)
    assert steps == [] and same(expected, found) and resumed.stopped_early is result.stopped_early is bool("patience" in run)
    pd.testing.assert_frame_equal(resumed.history, result.history, check_exact=True)


def test_a_run_that_ended_gives_the_same_again(sixteen, validation, tmp_path):
    first, one = trained(sixteen, validation, folder=tmp_path, batch_size=4)
    second, two = trained(sixteen, validation, folder=tmp_path, batch_size=4)
    assert same(first, second)
    pd.testing.assert_frame_equal(one.history, two.history, check_exact=True)


@pytest.mark.parametrize("fault", ["truncated state", "no optimiser"])
def test_a_half_written_checkpoint_is_thrown_away(fault, sixteen, validation, tmp_path):
    """Started anew from what is whole, the run ends as it would have."""
    run = dict(batch_size=4, learning_rate=3e-3)
    expected, result = trained(sixteen, validation, **run)
    with at_step(7):
        trained(sixteen, validation, folder=tmp_path, **run)
    newest = tmp_path / "checkpoint-6"
    if fault == "no optimiser":
        (newest / "optimizer.pt").unlink()
    else:
        os.truncate(newest / "trainer_state.json", 100)
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Progress, "on_epoch_begin", lambda self, args, state, control, **rest: begun.append(state.global_step))
        found, resumed = trained(sixteen, validation, folder=tmp_path, **run)
    assert begun[0] < 6 and same(expected, found)
    pd.testing.assert_frame_equal(resumed.history, result.history, check_exact=True)


def test_a_folder_that_was_moved_still_has_its_best_weights(sixteen, validation, tmp_path):
    """Best is the first evaluation; the run is over but for loading it when its folder gets another name."""
    run = dict(batch_size=4, learning_rate=1e-12, patience=100)
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ImportanceTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            trained(sixteen, validation, folder=first, **run)
    assert checkpoints(first) == [2, 8]
    first.rename(second)
    expected = load_file(second / "checkpoint-2" / "model.safetensors")
    assert not same(expected, load_file(second / "checkpoint-8" / "model.safetensors"))
    assert same(expected, trained(sixteen, validation, folder=second, **run)[0])


def test_the_progress_bar_goes_on_where_the_run_does(sixteen, validation, tmp_path, monkeypatch):
    bars = []

    class Bar(training.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((self, kwargs["total"], kwargs["initial"], kwargs["desc"], kwargs["disable"]))

    monkeypatch.setattr(training, "tqdm", Bar)
    with at_step(5):
        trained(sixteen, validation, folder=tmp_path, batch_size=4, description="mine")
    trained(sixteen, validation, folder=tmp_path, batch_size=4, description="mine")
    assert [bar[1:] for bar in bars] == [(8, 0, "mine", False), (8, 4, "mine", False)]
    assert [bar[0].n for bar in bars] == [5, 8] and "ndcg@10=" in bars[1][0].postfix


def test_tensorboard_follows_a_run_across_an_interruption(sixteen, validation, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = dict(batch_size=4, tracking=("tensorboard",), folder=tmp_path)
    with at_step(5):
        trained(sixteen, validation, **run)
    _, result = trained(sixteen, validation, **run)
    files = sorted((tmp_path / "tensorboard").glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    steps = [[event.step for event in EventAccumulator(str(path)).Reload().Scalars("eval/ndcg@10")] for path in files]
    assert steps == [[0, 2, 4], [6, 8]]
    values = [event.value for path in files for event in EventAccumulator(str(path)).Reload().Scalars("eval/log_loss")]
    assert values == pytest.approx(result.history["log_loss"].tolist(), rel=1e-6)


# --- killed -----------------------------------------------------------------------------------------------------------------------------


def to_its_end(folder: str) -> str:
    """Run or go on with one fixed training in this folder; the sha256 of its weights."""
    frame, validation = tiny_frame(16, seed=3), tiny_frame(12, seed=4, prefix="v")
    settings = TrainingSettings(**SETTINGS | dict(batch_size=4, epochs=3, recompute="epoch", evaluations_per_epoch=4, patience=100))
    pair = tiny_pair()
    fine_tune(pair, frame, validation, settings, folder=folder, weighting=Weighting(clip=3))
    return training._sha256(dict(pair.model.state_dict()))


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    """SIGKILL a moment after a new checkpoint has begun to appear, at each attempt another moment, until the run is through."""
    moments = np.random.default_rng(0).uniform(0, 0.06, size=30)
    kills, first_steps = 0, []
    while True:
        process, outcome = start(to_its_end, str(tmp_path))
        there = set(tmp_path.glob("checkpoint-*"))
        first_steps.append(max(checkpoints(tmp_path), default=0))
        deadline = time.monotonic() + 120
        while process.is_alive() and not outcome.poll() and kills < 4 and set(tmp_path.glob("checkpoint-*")) <= there:
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.002)
        if kills == 4 or outcome.poll():
            break
        time.sleep(moments[kills])
        process.kill()
        process.join()
        assert process.exitcode == -9
        kills += 1
    assert outcome.poll(120)
    digest, error = outcome.recv()
    process.join(10)
    assert error is None, error
    assert kills >= 2 and first_steps == sorted(first_steps) and first_steps[-1] > 0  # it went on, further each time
    assert digest == to_its_end(str(tmp_path / "whole"))


# --- folders that cannot be used --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_step(monkeypatch):
    """A training step is a failure."""
    monkeypatch.setattr(training.ImportanceTrainer, "training_step", lambda self, *rest: pytest.fail("a step was taken"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(learning_rate=2e-3), "settings"),
        (dict(weighting=Weighting(clip=2)), "weighting"),
        (dict(scores=True), "scores"),
        (dict(objectives=TWO), "objectives"),
        (dict(dropout=0.5, architecture="cross_encoder"), "model"),
        (dict(train=0.5), "train"),
        (dict(validation="other"), "validation"),
        (dict(lora_rank=2, train=0.5), "settings, train"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_of_another_run_is_refused(changed, named, sixteen, validation, scores, tmp_path_factory, no_step, folder_of_a_run):
    changed = changed.copy()
    train = sixteen.assign(label=changed.pop("train", sixteen["label"]))
    other = validation.iloc[::-1] if changed.pop("validation", None) else validation
    changed |= dict(scores=scores[:16]) if changed.get("scores") else {}
    there = checkpoints(folder_of_a_run)
    assert 4 in there
    message = rf"{folder_of_a_run} holds checkpoints of another run \(it differs in {named}\); choose another folder or delete it"
    with pytest.raises(ValueError, match=message):
        trained(train, other, folder=folder_of_a_run, **dict(batch_size=4) | changed)
    assert checkpoints(folder_of_a_run) == there


@pytest.fixture(scope="module")
def folder_of_a_run(train, validation, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with at_step(5):
        trained(train.iloc[:16], validation, folder=folder, batch_size=4)
    return folder


def test_what_a_folder_belongs_to_are_values_names_and_the_index_of_scores():
    frame = pd.DataFrame({"clicked": [0.0, 1.0], "bought": [1.0, 0.0]})
    series = pd.Series([1.0, 2.0], index=["a", "b"])
    others = [frame.rename(columns={"clicked": "bought", "bought": "clicked"}), frame[::-1], frame.assign(clicked=0.0), frame[["bought"]]]
    others += [series, series[::-1], series.rename({"a": "c"}), series + 1]
    assert len({fingerprint(frame), *map(fingerprint, others)}) == 9
    assert fingerprint(frame.set_index(pd.Index([7, 8]))) == fingerprint(frame)


def test_checkpoints_that_no_run_has_claimed_are_refused(sixteen, validation, tmp_path, no_step):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        trained(sixteen, validation, folder=tmp_path)
    assert checkpoints(tmp_path) == [3]


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("there", [{"trainer_state.json": "{"}, {"model.safetensors": "weights"}, {}], ids=["half", "model only", "empty"])
def test_checkpoints_of_another_program_among_the_runs_own_are_refused_and_stay(there, sixteen, validation, tmp_path):
    run = dict(batch_size=4, folder=tmp_path)
    with at_step(5):
        trained(sixteen, validation, **run)
    (tmp_path / "checkpoint-99").mkdir()
    for name, text in there.items():
        (tmp_path / "checkpoint-99" / name).write_text(text)
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds checkpoints that this run did not write \(checkpoint-99\)"):
        trained(sixteen, validation, **run)
    assert files_below(tmp_path) == before and (tmp_path / "checkpoint-99").is_dir()


def test_what_the_run_itself_left_half_written_is_cleaned(sixteen, validation, tmp_path):
    """Its newest checkpoint, also where the rotation that removed it was cut short."""
    expected, _ = trained(sixteen, validation, batch_size=4)
    with at_step(7):
        trained(sixteen, validation, batch_size=4, folder=tmp_path)
    newest = tmp_path / f"checkpoint-{max(checkpoints(tmp_path))}"
    (newest / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()  # someone's own
    assert same(expected, trained(sixteen, validation, batch_size=4, folder=tmp_path)[0])
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"wandb_version": 1}'])
def test_a_run_json_of_another_program_is_not_written_over(text, sixteen, validation, tmp_path, no_step):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/run.json was written by another program; choose another folder"):
        trained(sixteen, validation, folder=tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def held(folder: str, marker: str) -> None:
    """Hold the folder as a run does, until the process is killed."""
    with locked(Path(folder)):
        Path(marker).write_text("held")
        time.sleep(120)


def test_a_second_process_in_the_folder_is_refused_until_the_first_has_ended_in_any_way(sixteen, validation, tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    folder.mkdir()
    process, _ = start(held, str(folder), str(marker))
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{folder} is in use by process .*; wait until that has ended, or choose another folder"):
            trained(sixteen, validation, folder=folder, batch_size=4)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    process.kill()
    process.join()
    trained(sixteen, validation, folder=folder, batch_size=4, epochs=1)
    assert checkpoints(folder)
    with locked(folder):  # free again after a run, and after a refusal in the same process
        pass


def test_a_folder_without_checkpoints_is_free(sixteen, validation, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"settings": "another run's"}))
    (tmp_path / "notes.txt").write_text("mine")
    trained(sixteen, validation, folder=tmp_path, batch_size=4, epochs=1)
    assert (tmp_path / "notes.txt").read_text() == "mine" and checkpoints(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["batch_size"] == 4


def test_a_file_in_the_folders_place_is_one_clear_error(sixteen, validation, tmp_path, no_step):
    (tmp_path / "file").write_text("here already")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(OSError, match=f"checkpoints cannot be written to {folder}: {reason}; choose another folder"):
            trained(sixteen, validation, folder=folder)
    assert (tmp_path / "file").read_text() == "here already"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system has no user ids")
def test_a_read_only_folder_is_one_clear_error(sixteen, validation, no_step):
    """Root, who may write everywhere, tries as the user nobody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match=f"checkpoints cannot be written to {folder}: Permission denied; choose another folder"):
            trained(sixteen, validation, folder=folder)
        assert not list(folder.iterdir())
    finally:
        os.seteuid(before)
        folder.rmdir()


def test_a_folder_that_refuses_files_is_one_clear_error(sixteen, validation, tmp_path, no_step, monkeypatch):
    """As a read-only disk does, which also root cannot write to."""

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(training.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(OSError, match=f"checkpoints cannot be written to {tmp_path}: Read-only file system; choose another folder"):
        trained(sixteen, validation, folder=tmp_path)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))


@pytest.mark.parametrize(
    ("settings", "kept", "copies"),
    [
        (dict(), True, 3),  # the weights and AdamW's two averages
        (dict(optimizer="sgd"), True, 2),  # and one of momentum
        (dict(), False, 1),
        (dict(optimizer="sgd"), False, 1),
    ],
)
def test_a_disk_that_is_too_small_is_one_clear_error(settings, kept, copies, sixteen, validation, tmp_path, monkeypatch, no_step):
    size = 4 * sum(p.numel() for p in tiny_pair().model.parameters()) + 8 * 80  # and the position numbers
    need = 3 * copies * size
    sizes = {"free": need}
    monkeypatch.setattr(training.shutil, "disk_usage", lambda folder: SimpleNamespace(**sizes))
    run = settings | (dict(folder=tmp_path) if kept else {})
    with pytest.raises(pytest.fail.Exception, match="a step was taken"):
        trained(sixteen, validation, **run)
    sizes["free"] = int(0.99 * need)
    message = r"checkpoints need 0\.\d\d MB in .*, which has 0\.\d\d MB free; free some space or choose another folder"
    with pytest.raises(OSError, match=message):
        trained(sixteen, validation, **run)
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("settings", [dict(), dict(optimizer="sgd"), dict(lora_rank=2), dict(optimizer="sgd", lora_rank=2)])
def test_the_space_asked_for_is_what_checkpoints_take(settings, sixteen, validation, tmp_path):
    """Random state, schedule and log, which do not grow with the model, come on top: some 60 kB."""
    pair, settings = tiny_pair(), TrainingSettings(**SETTINGS | settings)
    asked = training._checkpoint_bytes(pair.model, settings, keeps=True)
    with at_step(2):
        fine_tune(pair, sixteen, validation, settings, folder=tmp_path)
    assert checkpoints(tmp_path) == [1] and asked - 5e3 < bytes_of(tmp_path) < asked + 1e5


def test_a_run_can_go_on_where_its_own_checkpoints_fill_the_disk(sixteen, validation, tmp_path, monkeypatch):
    """Room for three checkpoints when it began; the two that are there are not asked for again."""
    run = dict(batch_size=4, learning_rate=1e-12, patience=100, folder=tmp_path)
    with at_step(7):
        trained(sixteen, validation, **run)
    assert checkpoints(tmp_path) == [2, 6]
    one = training._checkpoint_bytes(tiny_pair().model, TrainingSettings(**SETTINGS), keeps=True)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda folder: SimpleNamespace(free=one))
    trained(sixteen, validation, **run)


def test_a_small_disk_is_noticed_before_the_first_step(sixteen, validation, tmp_path, no_step):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"a disk of 256 kB cannot be mounted here: {done.stderr.strip() if shutil.which('mount') else 'no mount'}")
    try:
        with pytest.raises(OSError, match=r"checkpoints need \d\.\d\d MB in .*, which has 0\.2\d MB free; free some space"):
            trained(sixteen, validation, folder=disk)
        assert not list(disk.iterdir())
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match=f"checkpoints cannot be written to {disk}: No space left on device; choose another folder"):
            trained(sixteen, validation, folder=disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("train", dict(text_b=" "), "'text_b' has 0 missing and 30 invalid of 30 rows"),
        ("train", dict(label=float("nan")), "'label' has 30 missing"),
        ("train", dict(label=3.0), r"train: labels must be in \[0, 1\], got 3 to 3; divide grades by the highest grade"),
        ("validation", dict(text_a=None), "'text_a' has 14 missing"),
        ("validation", dict(label=3.0), r"validation: labels must be in \[0, 1\], got 3 to 3"),
        ("validation", dict(label=0.0), r"validation has no relevant candidate \(every label is 0\), so NDCG@10 cannot choose the best"),
        ("validation", dict(query_id=None), "'query_id'"),
    ],
)
def test_frames_that_cannot_be_trained_on_are_refused(which, change, message, train, validation):
    """A validation without any relevant candidate has no NDCG: nothing could be kept as best."""
    frames = dict(train=train, validation=validation)
    frames[which] = frames[which].assign(**change)
    pair = tiny_pair()
    before = weights_of(pair.model)
    with pytest.raises(ValueError, match=message):
        fine_tune(pair, frames["train"], frames["validation"], TrainingSettings(**SETTINGS))
    assert same(before, weights_of(pair.model))


def test_without_a_relevant_candidate_another_metric_can_choose(train, validation):
    _, result = trained(train, validation.assign(label=0.0), metric="log_loss", epochs=1)
    assert result.best == result.history["log_loss"].iloc[1:].min() and "ndcg@10" not in result.history


def test_weights_are_those_of_the_weighting_in_the_order_of_the_frame(train, scores):
    weighting = Weighting(exponent=0.5, clip=3)
    shuffled = train.sample(frac=1, random_state=1)
    weights = sample_weights(shuffled, scores, weighting)
    raw = np.sqrt(scores.loc[shuffled["sample_id"]].to_numpy())
    assert (raw / raw.mean()).max() < 3  # nothing to clip here
    np.testing.assert_allclose(weights, raw / raw.mean(), rtol=1e-12)
    assert weights.dtype == np.float64 and weights.mean() == pytest.approx(1)
    more = pd.concat([scores, pd.Series({"another data set's": 1e9})])
    np.testing.assert_array_equal(sample_weights(shuffled, more, weighting), weights)
    np.testing.assert_array_equal(sample_weights(train, None, weighting), np.ones(30))


@pytest.mark.parametrize(
    ("change", "weighting", "message"),
    [
        (lambda scores: scores.drop(["s0004", "s0007"]), Weighting(), "2 of 30 samples have no score, the first is 's0004'"),
        (lambda scores: scores.where(scores.index != "s0002"), Weighting(), "1 of 30 samples have no score, the first is 's0002'"),
        (lambda scores: pd.concat([scores, scores[:1]]), Weighting(), "scores repeat a sample_id; pass one score per sample"),
        (lambda scores: scores.reset_index(drop=True), Weighting(), "30 of 30 samples have no score"),
        (lambda scores: scores.to_frame(), Weighting(), "scores must be a pandas Series indexed by sample_id, got DataFrame"),
        (lambda scores: -scores, Weighting(), "30 of 30 scores are negative"),
        (lambda scores: scores * 0, Weighting(), "all scores are zero"),
        (lambda scores: scores, Weighting(normalisation="sum"), "training needs mean-1 weights, got normalisation='sum'"),
        (lambda scores: None, Weighting(normalisation="sum"), "training needs mean-1 weights"),
    ],
)
def test_scores_that_give_no_weights_are_refused(change, weighting, message, train, validation, scores):
    with pytest.raises(ValueError, match=message):
        sample_weights(train, change(scores), weighting)
    with pytest.raises(ValueError, match=message):
        fine_tune(tiny_pair(), train, validation, scores=change(scores), weighting=weighting)


COUNTS = ("epochs", "batch_size", "accumulation", "max_length", "exact_every", "evaluations_per_epoch", "patience")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({name: 0}, f"{name} must be 1 or more, got 0") for name in COUNTS],
        *[({name: -1}, f"{name} must be 0 \\(none\\) or more, got -1") for name in ("max_gradient_norm", "lora_rank")],
        (dict(max_gradient_norm=float("nan")), r"max_gradient_norm must be 0 \(none\) or more, got nan"),
        (dict(learning_rate=0.0), "expected learning_rate > 0, 0 <= warmup < 1 and weight_decay >= 0, got 0.0, 0.1 and 0.01"),
        (dict(learning_rate=float("nan")), "expected learning_rate > 0"),
        (dict(learning_rate=float("inf")), "learning_rate"),
        (dict(warmup=1.0), "0 <= warmup < 1"),
        (dict(warmup=-0.1), "0 <= warmup < 1"),
        (dict(warmup=float("nan")), "0 <= warmup < 1"),
        (dict(weight_decay=-0.1), "weight_decay >= 0"),
        (dict(weight_decay=float("nan")), "weight_decay >= 0"),
        (dict(final_rate=0.0), "expected 0 < final_rate <= 1 and 0 <= momentum < 1, got 0.0 and 0.9"),
        (dict(final_rate=1.1), "0 < final_rate <= 1"),
        (dict(final_rate=float("nan")), "0 < final_rate <= 1"),
        (dict(momentum=1.0), "0 <= momentum < 1"),
        (dict(momentum=-0.1), "0 <= momentum < 1"),
        (dict(optimizer="adam"), "optimizer must be one of adamw, sgd, got 'adam'"),
        (dict(schedule="step"), "schedule must be one of linear, cosine, exponential, constant, got 'step'"),
        (dict(precision="fp8"), "precision must be one of auto, float32, bf16, fp16, got 'fp8'"),
        (dict(recompute="batch"), "recompute must be one of never, epoch, step, forward, got 'batch'"),
        (dict(balance="nash"), "balance must be one of fixed, sum, mgda, upgrad, pcgrad, got 'nash'"),
        (dict(loss="hinge"), "loss must be one of cross_entropy, squared_error, got 'hinge'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(recompute="step", scores=True), "scores are given, and recompute='step' makes its own; leave one of them out"),
        (dict(balance="upgrad"), "balance='upgrad' combines several objectives; give Objectives as the loss"),
        (dict(balance="sum", recompute="forward", objectives=TWO), "balance='sum' with recompute='forward' is not supported"),
        (
            dict(objectives=Objectives(relevance(), importance=1.0), metric="loss"),
            "an importance head learns from exact norms of each step",
        ),
        (dict(metric="accuracy"), "metric 'accuracy' is not defined on the validation data; there are ndcg@10, mrr, auc, log_loss"),
        (dict(metric="loss"), "metric 'loss' is not defined on the validation data"),
        (dict(tracking=("tensorboard",)), "tracking with tensorboard writes beside the checkpoints; give fine_tune a folder"),
        (dict(tracking=("mlflow",), folder=True), "tracking knows tensorboard, wandb, got 'mlflow'"),
        (dict(precision="fp16"), "fp16 needs a GPU; a processor would train in float32 without saying so: use bf16 or float32"),
        (dict(objectives=Objectives(click(label="bought"))), "objective 'click' needs column 'bought'"),
        (dict(objectives=TWO, tasks=("relevance", "sale")), "no task for objective 'click'"),
        (dict(max_length=81), "max_length must be from 1 to the encoder's 80 positions, got 81"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_step(given, message, train, validation, scores, tmp_path, no_step):
    given = given.copy()
    given |= dict(scores=scores) if given.pop("scores", None) else {}
    given |= dict(folder=tmp_path) if given.pop("folder", None) else {}
    with pytest.raises(ValueError, match=message):
        trained(train, validation, **given)
    assert not checkpoints(tmp_path)


def test_several_processes_need_a_folder(train, validation, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes need one folder that all of them see; give fine_tune a folder"):
        fine_tune(tiny_pair(), train, validation)


def test_another_gpu_than_the_first_is_refused(train, validation):
    parameter = SimpleNamespace(device=torch.device("cuda:1"))
    pair = SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([parameter])))
    message = "training runs on the first visible GPU, the model is on cuda:1; choose the GPU with CUDA_VISIBLE_DEVICES"
    with pytest.raises(ValueError, match=message):
        fine_tune(pair, train, validation)


def test_adapters_twice_are_refused(train, validation, no_step):
    pair = add_lora(tiny_pair(), 2)
    with pytest.raises(ValueError, match="the model has low-rank adapters already"):
        fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | dict(lora_rank=2)))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_nothing(train, validation, monkeypatch, tmp_path):
    def poisoned(model, batch):
        return cross_entropy(model, batch) / torch.tensor([float(name != "s0007") for name in batch["sample_id"]])

    monkeypatch.setitem(LOSSES, "cross_entropy", poisoned)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for mode, message in {"never": r"the loss is inf at step \d \(samples \['s0007'\]\)", "step": "the first for sample 's0007'"}.items():
        with pytest.raises(ValueError, match=message):
            trained(train, validation, recompute=mode)
        assert not list(tmp_path.iterdir())


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_a_gpu_in_bfloat16_it_agrees_with_the_cpu(architecture, train, validation, scores):
    predictions, seen = {}, set()

    def watched(model, batch):
        logits = model(**{name: value for name, value in batch.items() if name.endswith(("input_ids", "attention_mask", "token_type_ids"))})
        seen.add((logits.device.type, torch.is_autocast_enabled("cuda")))
        return cross_entropy(model, batch)

    for device in ("cpu", "cuda"):
        pair = tiny_pair(architecture, dropout=0.0, device=device)
        settings = TrainingSettings(**SETTINGS | dict(learning_rate=3e-4, evaluations_per_epoch=1, patience=10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LOSSES, "cross_entropy", watched)
            result = fine_tune(pair, train, validation, settings, scores=scores, weighting=Weighting(clip=3))
        assert {parameter.dtype for parameter in pair.model.parameters()} == {torch.float32}
        assert next(pair.model.parameters()).device.type == device and np.isfinite(result.history["loss"][1:]).all()
        predictions[device] = predict(pair, validation)
    assert seen == {("cpu", False), ("cuda", torch.cuda.is_bf16_supported())}
    np.testing.assert_allclose(predictions["cuda"], predictions["cpu"], atol=0.05)
