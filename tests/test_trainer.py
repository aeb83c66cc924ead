"""The trainer's steps, order, schedule and log against loops written by hand; which checkpoints count; what trackers receive."""

import gc
import json
import math
import shutil
import socket
import struct
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock, PropertyMock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from apart import apart
from tiny import tiny_config, tiny_frame, tiny_pair
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from recsys_importance import trainer as module
from recsys_importance.balance import BALANCES, balanced_backward
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, pair_logits
from recsys_importance.objectives import Objectives, click, columns_of, cross_entropy, relevance
from recsys_importance.reference import gradient_norms_by_loop
from recsys_importance.trainer import EpochSampler, ImportanceTrainer, last_checkpoint, track

HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")


@pytest.fixture(scope="module", autouse=True)
def less_rubbish():
    """The Trainer collects rubbish when a run starts, which takes longer than a tiny run: leave out what is imported already."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def exact_scores(monkeypatch):
    """Forward scores in float32 also on a processor that is faster in bfloat16."""
    monkeypatch.setattr("recsys_importance.selective.fast_bfloat16", lambda device: False)


def arguments(folder, **changes) -> TrainingArguments:
    """Plain SGD at a constant rate, no clipping, one epoch."""
    options = dict(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        data_seed=3,
    )
    return TrainingArguments(**options | changes)


OURS = {
    *("weighting", "recompute", "weights", "balance", "head", "exact_every", "lengths", "final_rate"),
    *("validate", "eval_dataset", "compute_metrics"),
}


def trainer(folder, *, count: int = 22, tasks=("relevance",), dropout: float = 0.0, loss=cross_entropy, frame=None, **changes):
    """A trainer of a tiny cross-encoder on tiny_frame(count); changes are its own options or Hugging Face's arguments, head=True a new
    head."""
    pair = tiny_pair("cross_encoder", tasks=tasks, dropout=dropout)
    changes |= {"head": ImportanceHead(pair.model)} if changes.get("head") else {}
    frame = tiny_frame(count) if frame is None else frame
    columns = columns_of(frame, loss) if isinstance(loss, Objectives) else {}
    ours = ImportanceTrainer(
        model=pair.model,
        args=arguments(folder, **{name: value for name, value in changes.items() if name not in OURS}),
        data_collator=PairCollator(pair),
        train_dataset=PairDataset(frame, **columns),
        loss=loss,
        **{name: value for name, value in changes.items() if name in OURS},
    )
    ours.remove_callback(PrinterCallback)
    return ours


def parameters_of(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def logs_of(ours) -> list[dict]:
    return [entry for entry in ours.state.log_history if "loss" in entry]


# --- the order of samples ---------------------------------------------------------------------------------------------------------------


def orders(epochs, **options):
    sampler, found = EpochSampler(**dict(size=40, seed=1, batch=4) | options), {}
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found[epoch] = list(sampler)
    return found


@pytest.mark.parametrize("lengths", [None, [3 * i % 17 for i in range(40)]], ids=["any length", "by length"])
def test_the_order_depends_on_seed_and_epoch_alone(lengths):
    forwards, backwards = orders(range(5), lengths=lengths), orders(reversed(range(5)), lengths=lengths)
    assert forwards == backwards and all(sorted(order) == list(range(40)) for order in forwards.values())
    assert len({tuple(order) for order in forwards.values()}) == 5
    others = orders(range(5), lengths=lengths, seed=2)
    assert not {tuple(order) for order in forwards.values()} & {tuple(order) for order in others.values()}
    sampler = EpochSampler(40, seed=1, batch=4, lengths=lengths)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert len(sampler) == 40 and list(sampler) == list(sampler) == forwards[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, size=400)

    def padding(order) -> int:
        batches = np.array(order).reshape(-1, 4)
        return int((lengths[batches].max(1, keepdims=True) - lengths[batches]).sum())

    grouped = orders([0], size=400, lengths=lengths.tolist())[0]
    assert padding(grouped) < 0.2 * padding(orders([0], size=400)[0])
    assert lengths[grouped[0]] == lengths.max()  # the longest first: what does not fit into memory fails at once


def test_the_trainer_takes_this_order_anew_in_each_epoch(tmp_path):
    seen = []

    def watched(model, batch):
        seen.append(batch["sample_id"])
        return cross_entropy(model, batch)

    ours = trainer(tmp_path, count=10, loss=watched, recompute="never", num_train_epochs=3, data_seed=7, lengths=[*range(10)])
    ours.train()
    names = [f"s{i:04d}" for order in orders(range(3), size=10, seed=7, lengths=[*range(10)]).values() for i in order]
    assert sum(seen, []) == names and [len(batch) for batch in seen] == [4, 4, 2] * 3


# --- steps ------------------------------------------------------------------------------------------------------------------------------

FINAL = np.random.default_rng(0).lognormal(size=14)
FINAL[[3, 11]] = 0
FINAL /= FINAL.mean()
RULES = {
    "never": Weighting(anneal=(0.25, 0.75)),
    "epoch": Weighting(exponent=0.5, threshold=0.2, threshold_on="quantile"),
    "step": Weighting(exponent=-0.5, clip=2, anneal=(0.0, 1.0)),
    "forward": HALF,
}


def group_weights(mode: str, model, batches: list[dict], rows: list[list[int]], weighting, of_epoch, progress: float) -> torch.Tensor:
    """Weights of a step's samples, from sample-by-sample gradients or from |sigmoid(z) - y|."""
    if mode in ("never", "epoch"):
        final = torch.tensor([of_epoch[i] for part in rows for i in part], dtype=torch.float32)
        return 1 + weighting.share(progress) * (final - 1)
    if mode == "step":
        norms = torch.cat([gradient_norms_by_loop(model, cross_entropy, batch) for batch in batches])
        return weighting(norms, progress=progress)
    with torch.no_grad():
        scores = [(torch.sigmoid(pair_logits(model, batch)) - batch["labels"]).abs() for batch in batches]
    return torch.cat([weighting(part, progress=progress) for part in scores])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", module.RECOMPUTE)
def test_it_trains_as_a_loop_written_by_hand(mode, accumulation, tmp_path):
    """Two epochs of 14 samples in batches of 4, the last of 2, so that the last step of an epoch is smaller than the others."""
    weighting = RULES[mode]
    options = dict(weighting=weighting, recompute=mode, weights=FINAL if mode == "never" else None)
    ours = trainer(tmp_path, count=14, num_train_epochs=2, gradient_accumulation_steps=accumulation, **options)
    ours.train()
    pair, dataset = tiny_pair("cross_encoder", dropout=0.0), PairDataset(tiny_frame(14))
    model, collate = pair.model, PairCollator(pair)
    steps_per_epoch = math.ceil(4 / accumulation)
    step, logged = 0, []
    for order in orders(range(2), size=14, seed=3).values():
        everything = collate([dataset[i] for i in range(14)])
        of_epoch = FINAL if mode == "never" else weighting(gradient_norms_by_loop(model, cross_entropy, everything).numpy())
        parts = [order[start : start + 4] for start in range(0, 14, 4)]
        for first in range(0, 4, accumulation):
            rows = parts[first : first + accumulation]
            batches = [collate([dataset[i] for i in part]) for part in rows]
            weights = group_weights(mode, model, batches, rows, weighting, of_epoch, step / (2 * steps_per_epoch))
            losses = torch.cat([cross_entropy(model, batch) for batch in batches])
            value = (weights * losses).mean()
            gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    if gradient is not None:
                        parameter -= 0.1 * gradient
            step += 1
            logged.append((value.item(), (weights.sum() ** 2 / weights.square().sum() / len(weights)).item(), weights.max().item()))
    assert step == ours.state.global_step == 2 * steps_per_epoch
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    assert (parameters_of(ours.model) - parameters_of(tiny_pair("cross_encoder").model)).abs().max() > 1e-3
    found = [(entry["loss"], entry["effective_share"], entry["largest_weight"]) for entry in logs_of(ours)]
    np.testing.assert_allclose(found, logged, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(ours.seen.weights, weights, rtol=2e-3, atol=2e-4)
    trained = losses if mode != "forward" else losses[weights > 0]
    torch.testing.assert_close(ours.seen.losses, trained.detach(), rtol=2e-3, atol=2e-4)
    assert ours.seen.exact is (mode == "step") and (ours.seen.scores is None) is (mode in ("never", "epoch"))
    assert ours.seen.loss.item() == pytest.approx(value.item(), rel=2e-3, abs=2e-4)


def test_no_weights_are_uniform_weights(tmp_path):
    ends = []
    for number, weights in enumerate((None, np.ones(10))):
        ours = trainer(tmp_path / str(number), count=10, recompute="never", weights=weights)
        ours.train()
        ends.append(parameters_of(ours.model))
        assert [entry["effective_share"] for entry in logs_of(ours)] == [1, 1, 1]
    assert torch.equal(*ends)


def test_each_epoch_is_scored_once_also_under_max_steps(tmp_path, monkeypatch):
    """Eight steps of three an epoch: three epochs are begun, whatever num_train_epochs says."""
    counted = []
    monkeypatch.setattr(ImportanceTrainer, "score_all", lambda self: counted.append(self.state.global_step))
    trainer(tmp_path, count=10, recompute="epoch", max_steps=8).train()
    assert counted == [0, 3, 6]


def test_a_sample_alone_in_its_step_has_weight_one(tmp_path):
    ours = trainer(tmp_path, count=5, recompute="step")
    ours.train()
    assert ours.seen.weights.tolist() == [1] and ours.seen.losses.shape == (1,)


# --- an importance head -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["step", "forward"])
def test_a_head_learns_and_decides_as_in_a_loop_written_by_hand(mode, tmp_path):
    """Seven steps of two micro-batches. "forward" is exact in the first three and every third from there, 3 and 6; else the head scores."""
    weighting = HALF if mode == "forward" else Weighting(clip=2)
    options = dict(count=26, per_device_train_batch_size=2, gradient_accumulation_steps=2, exact_every=3)
    ours = trainer(tmp_path, head=True, recompute=mode, weighting=weighting, **options)
    exact = []

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            exact.append(ours.seen.exact)

    ours.add_callback(Watching())
    ours.train()
    pair, dataset, (order,) = tiny_pair("cross_encoder", dropout=0.0), PairDataset(tiny_frame(26)), orders([0], size=26, seed=3).values()
    model, collate = pair.model, PairCollator(pair)
    head, lessons = ImportanceHead(model), []
    for step, start in enumerate(range(0, 26, 4)):
        rows = [order[start : start + 2], order[start + 2 : start + 4]]
        batches = [collate([dataset[i] for i in part]) for part in rows if part]
        if mode == "step" or step < 3 or step % 3 == 0:
            watched = head.watch(cross_entropy)
            losses = torch.cat([watched(model, batch) for batch in batches])
            norms = torch.cat([gradient_norms_by_loop(model, cross_entropy, batch) for batch in batches])
            weights = weighting(norms)
            lessons.append(head.learn(norms))
        else:
            losses = torch.cat([cross_entropy(model, batch) for batch in batches])
            weights = torch.cat([weighting(head.scores(model, cross_entropy, batch)) for batch in batches])
            lessons.append(None)
        gradients = torch.autograd.grad((weights * losses).mean(), list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.1 * gradient
    assert exact == ([True] * 7 if mode == "step" else [True, True, True, True, False, False, True])
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.head.moments, head.moments, rtol=1e-3, atol=1e-3)
    expected = [None if lesson is None else pytest.approx(lesson, rel=5e-3, abs=1e-4) for lesson in lessons]
    assert [entry.get("loss/importance") for entry in logs_of(ours)] == expected


@pytest.mark.parametrize("balance", ["fixed", "upgrad"])
def test_a_head_that_learns_along_changes_neither_model_nor_log(balance, tmp_path):
    ends, logs = [], []
    for number, head in enumerate((None, True)):
        options = dict(loss=TWO, tasks=TASKS, frame=clicked_frame(), balance=balance, dropout=0.1, gradient_accumulation_steps=2)
        ours = trainer(tmp_path / str(number), head=head, **options)
        ours.train()
        ends.append(parameters_of(ours.model))
        logs.append([{name: value for name, value in entry.items() if name != "loss/importance"} for entry in logs_of(ours)])
    assert torch.equal(*ends) and logs[0] == logs[1]
    assert round(ours.head.samples) > 8 and all("loss/importance" in entry for entry in logs_of(ours))


def test_a_head_learns_nothing_from_a_step_that_overflows(tmp_path, fp16_on_a_processor):
    """Two steps of four samples, the first of which overflows."""
    ours = trainer(tmp_path, count=8, head=True, recompute="step", fp16=True)
    ours.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    ours.train()
    assert torch.isfinite(ours.head.moments).all() and ours.head.samples == pytest.approx(4)


@pytest.mark.parametrize("mode", ["never", "epoch"])
def test_a_head_has_nothing_to_learn_without_exact_norms(mode, tmp_path):
    message = f"an importance head learns from exact norms of each step, which recompute='{mode}' does not have; use recompute='step'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, head=True, recompute=mode)


# --- several objectives -----------------------------------------------------------------------------------------------------------------


def clicked_frame(count: int = 14):
    """Clicks of every row but each fifth, where they are missing."""
    frame = tiny_frame(count)
    frame["clicked"] = np.random.default_rng(1).integers(0, 2, size=count).astype(float)
    frame.loc[frame.index % 5 == 0, "clicked"] = np.nan
    return frame


TWO = Objectives(relevance(weight=0.7), click(weight=0.2))
TASKS = ("relevance", "click")


@pytest.mark.parametrize(
    ("mode", "balance"), [*(("never", balance) for balance in BALANCES), ("epoch", "mgda"), ("step", "upgrad"), ("step", "fixed")]
)
def test_a_balanced_step_is_balanced_backward(balance, mode, tmp_path):
    """One epoch of two steps of two micro-batches; the weights from the gradients of the weighted sum, sample by sample."""
    frame, weighting = clicked_frame(), Weighting(clip=2)
    options = dict(weights=FINAL if mode == "never" else None, gradient_accumulation_steps=2, weighting=weighting)
    ours = trainer(tmp_path, loss=TWO, tasks=TASKS, frame=frame, balance=balance, recompute=mode, **options)
    ours.train()
    pair, dataset = tiny_pair("cross_encoder", tasks=TASKS, dropout=0.0), PairDataset(frame, **columns_of(frame, TWO))
    model, collate, (order,) = pair.model, PairCollator(pair), orders([0], size=14, seed=3).values()
    of_all = FINAL
    if mode == "epoch":
        of_all = weighting(gradient_norms_by_loop(model, TWO, collate([dataset[i] for i in range(14)])).numpy())
    for start in range(0, 14, 8):
        rows = [order[start : start + 4], order[start + 4 : start + 8]]
        batches = [collate([dataset[i] for i in part]) for part in rows if part]
        weights = torch.tensor([of_all[i] for part in rows for i in part], dtype=torch.float32)
        if mode == "step":
            weights = weighting(torch.cat([gradient_norms_by_loop(model, TWO, batch) for batch in batches]))
        model.zero_grad()
        found = balanced_backward(model, TWO, batches, balance, sample_weights=weights)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    last = logs_of(ours)[-1]
    torch.testing.assert_close(ours.seen.weights, weights, rtol=1e-3, atol=1e-4)
    if balance == "fixed":
        assert ours.seen.coefficients is None and "coefficient/click" not in last
        return
    np.testing.assert_allclose([last[f"coefficient/{name}"] for name in TASKS], found.coefficients, rtol=1e-3)
    losses = found.losses @ found.coefficients.float()
    assert last["loss"] == pytest.approx((weights * losses).mean().item(), rel=1e-3)
    assert ours.seen.exact is (mode == "step")


def test_the_log_has_each_objective_over_the_samples_that_have_its_label(tmp_path):
    """One step of all 12 samples: means by hand; and over two logged steps of 6, the mean over 12."""
    frame = clicked_frame(12)
    pair = tiny_pair("cross_encoder", tasks=TASKS, dropout=0.0)
    dataset = PairDataset(frame, **columns_of(frame, TWO))
    batch = PairCollator(pair)([dataset[i] for i in range(12)])
    with torch.no_grad():
        logits = pair_logits(pair.model, batch)
    p = torch.sigmoid(logits.double()).numpy()
    y, c = frame["label"].to_numpy(), frame["clicked"].to_numpy()
    expected = {"loss/relevance": -(y * np.log(p[:, 0]) + (1 - y) * np.log(1 - p[:, 0])).mean()}
    there = np.isfinite(c)
    assert there.sum() == 9
    expected["loss/click"] = -(c * np.log(p[:, 1]) + (1 - c) * np.log(1 - p[:, 1]))[there].mean()
    for mode in ("never", "step", "forward"):
        for size in (12, 6):
            options = dict(per_device_train_batch_size=size, logging_steps=12 // size, learning_rate=1e-12, recompute=mode)
            ours = trainer(tmp_path / f"{mode}{size}", loss=TWO, tasks=TASKS, frame=frame, weighting=Weighting(exponent=0), **options)
            ours.train()
            (log,) = logs_of(ours)
            assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-5)
            assert log["loss"] == pytest.approx(0.7 * expected["loss/relevance"] + 0.2 * expected["loss/click"] * 9 / 12, rel=1e-5)


# --- the log ----------------------------------------------------------------------------------------------------------------------------


def test_the_log_says_what_the_weights_did(tmp_path):
    """Two logs of two steps each; the last batch is one whose samples all weigh nothing. The weights have mean 1: 34 / 16 of these."""
    order = orders([0], size=16, seed=3)[0]
    weights = np.zeros(16)
    weights[order[:12]] = [1, 2, 3, 4, 0, 0, 0, 4, 5, 5, 5, 5]
    weights *= 16 / 34
    ours = trainer(tmp_path, count=16, recompute="never", weights=weights, logging_steps=2)
    ours.train()
    first, second = logs_of(ours)
    assert first["effective_share"] == pytest.approx(14**2 / 46 / 8) and first["trained_share"] == 5 / 8
    assert second["effective_share"] == pytest.approx(1 / 2) and second["trained_share"] == 1 / 2
    assert [first["largest_weight"], second["largest_weight"]] == pytest.approx([4 * 16 / 34, 5 * 16 / 34])
    ours = trainer(tmp_path, count=16, recompute="never", weights=weights, logging_steps=1)
    ours.train()
    last = logs_of(ours)[-1]
    assert (last["effective_share"], last["trained_share"], last["largest_weight"], last["loss"]) == (0, 0, 0, 0)


def test_without_a_log_the_steps_are_not_kept_for_ever(tmp_path):
    ours = trainer(tmp_path, count=8, logging_strategy="no")
    ours.train()
    assert ours.window.maxlen is not None and len(ours.window) == 2


def test_the_rate_decays_exponentially(tmp_path):
    """Ten steps, four of them warm-up, to a hundredth: r_t = 0.01 ** ((t - 4) / 6)."""
    options = dict(lr_scheduler_type="constant_with_warmup", warmup_steps=4, final_rate=0.01, learning_rate=1.0, optim="adamw_torch")
    ours = trainer(tmp_path, count=40, recompute="never", **options)
    ours.train()
    expected = [t / 4 if t < 4 else 0.01 ** ((t - 4) / 6) for t in range(10)]
    assert [entry["learning_rate"] for entry in logs_of(ours)] == pytest.approx(expected)
    assert ours.lr_scheduler.get_last_lr() == pytest.approx([0.01] * 2)  # two groups: biases and layer norms do not decay


def test_an_exponential_schedule_without_warm_up_or_with_nothing_else():
    assert [module._Exponential(0, 4, 0.1)(step) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.1**0.5, 0.1, 0.1])
    assert [module._Exponential(3, 3, 0.1)(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


# --- precision, dropout, evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_on_a_processor(monkeypatch):
    """What accelerate sets up for fp16 on a GPU: autocast to float16 and a gradient scaler."""
    start = Accelerator.__init__

    def pretending(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=256.0)

    monkeypatch.setattr(Accelerator, "__init__", pretending)


MIXED = {mode: dict(recompute=mode, weighting=HALF if mode == "forward" else Weighting(clip=3)) for mode in module.RECOMPUTE}
MIXED["balanced"] = dict(loss=TWO, tasks=TASKS, frame=clicked_frame(14), balance="upgrad", recompute="never")


@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_mixed_precision_stays_close_to_float32(options, tmp_path, fp16_on_a_processor):
    """Two micro-batches a step, clipped at a norm that binds."""
    ends = {}
    for precision in ("float32", "bf16", "fp16"):
        mixed = {} if precision == "float32" else {precision: True}
        ours = trainer(tmp_path / precision, **dict(count=14, gradient_accumulation_steps=2, max_grad_norm=0.5) | options | mixed)
        start = parameters_of(ours.model)
        ours.train()
        ends[precision] = parameters_of(ours.model)
        assert logs_of(ours)[0]["grad_norm"] > 0.5 and (ours.accelerator.scaler is not None) is (precision == "fp16")
    for precision in ("bf16", "fp16"):
        assert 0 < (ends[precision] - ends["float32"]).norm() < 0.1 * (ends["float32"] - start).norm()


@pytest.mark.parametrize("mode", module.RECOMPUTE)
def test_a_step_that_overflows_in_fp16_is_left_out(mode, tmp_path, fp16_on_a_processor):
    """The scaler's first scale is too large for the first of two steps: it is skipped, and the scale halved."""
    ours = trainer(tmp_path, count=8, recompute=mode, fp16=True)
    ours.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    before, seen = parameters_of(ours.model), []

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(parameters_of(model))

    ours.add_callback(Watching())
    ours.train()
    assert torch.equal(seen[0], before) and not torch.equal(seen[1], before) and torch.isfinite(seen[1]).all()


def test_fp16_without_a_gpu_is_refused(tmp_path):
    """Accelerate would train in float32 and not say so."""
    with pytest.raises(ValueError, match="fp16 needs a GPU; a processor would train in float32 without saying so: use bf16 or float32"):
        trainer(tmp_path, fp16=True)


@pytest.mark.parametrize("mode", module.RECOMPUTE)
def test_dropout_is_on_while_training_and_repeats_with_the_seed(mode, tmp_path):
    ends = []
    for number, seed in enumerate((3, 3, 4)):
        ours = trainer(tmp_path / str(number), count=8, dropout=0.3, seed=seed, recompute=mode)
        ours.train()
        ends.append(parameters_of(ours.model))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])  # the order has a seed of its own


def test_an_evaluation_is_the_mean_loss_of_all_samples_unweighted(tmp_path):
    """Without `validate`, as any Trainer: three batches of 8, 8 and 3."""
    pair = tiny_pair("cross_encoder", dropout=0.0)
    test = PairDataset(tiny_frame(19, seed=5))
    ours = trainer(tmp_path, count=8, recompute="never", weights=np.arange(8) / 3.5, eval_dataset=test, learning_rate=1e-12)
    ours.train()
    with torch.no_grad():
        expected = cross_entropy(pair.model, PairCollator(pair)([test[i] for i in range(19)])).mean().item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_is_what_validate_says(tmp_path):
    ours = trainer(tmp_path, count=8, recompute="never", validate=lambda model: {"size": float(sum(p.numel() for p in model.parameters()))})
    ours.train()
    assert ours.evaluate()["eval_size"] == ours.state.log_history[-1]["eval_size"] == parameters_of(ours.model).numel()


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recompute="never"), r"the loss is inf at step \d \(samples \['s0007'\]\); lower the learning rate or check these samples"),
        (dict(recompute="epoch"), "NaN or infinite, the first for sample 's0007'"),
        (dict(recompute="step"), "NaN or infinite, the first for sample 's0007'"),
        (dict(recompute="forward"), "NaN or infinite, the first for sample 's0007'"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_sample(options, message, tmp_path):
    def broken(model, batch):
        return cross_entropy(model, batch) / torch.tensor([float(name != "s0007") for name in batch["sample_id"]])

    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, loss=broken, **options).train()


def test_an_objective_that_is_not_finite_is_named_with_the_sample(tmp_path):
    frame = clicked_frame(8)
    frame.loc[3, "clicked"] = 0.5

    class Broken(Objectives):
        def matrix(self, model, batch):
            found = super().matrix(model, batch)
            return found._replace(losses=found.losses / torch.where(batch["clicked"] == 0.5, 0.0, 1.0)[:, None])

    for balance in ("sum", "upgrad"):
        ours = trainer(tmp_path, loss=Broken(*TWO.objectives), tasks=TASKS, frame=frame, balance=balance, recompute="never")
        with pytest.raises(ValueError, match="that of objective 'relevance' for sample 's0003'"):
            ours.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recompute="batch"), "recompute must be one of never, epoch, step, forward, got 'batch'"),
        (dict(balance="nash"), "balance must be one of fixed, sum, mgda, upgrad, pcgrad, got 'nash'"),
        (dict(recompute="step", weights=np.ones(22)), "weights are given, and recompute='step' makes its own; leave one of them out"),
        (dict(recompute="epoch", weights=np.ones(22)), "weights are given, and recompute='epoch' makes its own"),
        (dict(recompute="never", weights=np.ones(21)), "expected one weight per training sample, got 21 for 22"),
        (dict(balance="sum"), "balance='sum' combines several objectives; give Objectives as the loss, got <function cross_entropy"),
        (
            dict(balance="mgda", loss=TWO, tasks=TASKS, frame=clicked_frame(), recompute="forward"),
            "balance='mgda' with recompute='forward' is not supported; use recompute='step', 'epoch' or 'never'",
        ),
        (
            dict(compute_metrics=len),
            "compute_metrics is not supported: it needs predictions, which a loss does not give; use validate, a function of the model",
        ),
        (dict(exact_every=0), "exact_every must be 1 or more, got 0"),
        (dict(torch_compile=True), "torch_compile does not keep samples apart; start one process per GPU with torchrun"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("attribute", "name"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP"), ("n_gpu", "DataParallel over several GPUs")]
)
def test_what_does_not_keep_samples_apart_is_refused(attribute, name, tmp_path, monkeypatch):
    if attribute == "n_gpu":
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    else:
        start = module.Trainer.__init__

        def pretending(self, *args, **kwargs):
            start(self, *args, **kwargs)
            setattr(self, attribute, True)

        monkeypatch.setattr(module.Trainer, "__init__", pretending)
    with pytest.raises(ValueError, match=f"{name} does not keep samples apart; start one process per GPU with torchrun"):
        trainer(tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, count=12, recompute="epoch", save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def test_the_newest_checkpoint_is_found(copied):
    before = tree(copied)
    (copied / "checkpoint-best").mkdir()  # someone's own
    assert last_checkpoint(copied) == copied / "checkpoint-3"
    (copied / "checkpoint-3").rename(copied / "checkpoint-10")
    assert last_checkpoint(str(copied)) == copied / "checkpoint-10"  # by number: 10 comes after 2
    (copied / "checkpoint-10").rename(copied / "checkpoint-3")
    assert tree(copied) == before
    assert last_checkpoint(copied / "nothing") is None


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LACKS = {
    "trainer_state.json": "no complete trainer_state.json",
    "model.safetensors": "no complete model",
    "optimizer.pt": "no complete optimizer.pt",
    "scheduler.pt": "no complete scheduler.pt",
    "rng_state.pth": "random state",
}


@pytest.mark.parametrize("name", LACKS)
@pytest.mark.parametrize("fault", [Path.unlink, truncated], ids=["missing", "truncated"])
def test_what_is_half_written_is_passed_over_and_stays(name, fault, copied):
    fault(copied / "checkpoint-3" / name)
    fault(copied / "checkpoint-2" / name)
    before = tree(copied)
    with pytest.warns(UserWarning, match=rf"training cannot go on from checkpoint-3 \(.*{LACKS[name]}.*\), checkpoint-2 \(.*in {copied};"):
        assert last_checkpoint(copied) == copied / "checkpoint-1"
    fault(copied / "checkpoint-1" / name)
    (copied / "checkpoint-1" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="passed over and left as it is"):
        assert last_checkpoint(copied) is None
    assert files_in(copied) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "importance_checkpoints.json"]
    assert {name for name in before if name.startswith(("checkpoint-2", "checkpoint-3"))} <= tree(copied).keys()


def test_older_checkpoints_are_not_looked_at(copied):
    truncated(copied / "checkpoint-1" / "trainer_state.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_checkpoint(copied) == copied / "checkpoint-3"


def test_every_process_has_left_its_random_state(copied):
    state = copied / "checkpoint-3" / "rng_state.pth"
    (copied / "checkpoint-3" / "rng_state_1.pth").write_bytes(state.read_bytes())
    state.rename(state.with_name("rng_state_0.pth"))
    assert last_checkpoint(copied, ranks=2) == copied / "checkpoint-3"
    with pytest.warns(UserWarning, match=r"checkpoint-3 \(random states of 2 processes, not of 1\) in"):
        assert last_checkpoint(copied) == copied / "checkpoint-2"
    (copied / "checkpoint-3" / "rng_state_1.pth").unlink()
    with pytest.warns(UserWarning, match="random states of 1 processes, not of 2"):
        assert last_checkpoint(copied, ranks=2) is None


def test_a_checkpoint_of_another_kind_of_run_is_refused(copied):
    """Without the epoch's weights a run would go on with uniform ones."""
    (copied / "checkpoint-2" / "importance.safetensors").unlink()
    ours = trainer(copied, count=12, recompute="epoch")
    with pytest.raises(ValueError, match="checkpoint-2 has no importance.safetensors: it was written by another kind of run"):
        ours.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    trainer(copied, count=12, recompute="step").train(resume_from_checkpoint=str(copied / "checkpoint-2"))  # needs none


def stock(folder: Path, *, model=None, **changes):
    """Hugging Face's own Trainer on a tiny classifier, with a checkpoint every step of three."""
    from transformers import BertForSequenceClassification, Trainer

    model = BertForSequenceClassification(tiny_config(dropout=0.0, num_labels=2)) if model is None else model
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "label": row % 2} for row in range(12)]
    options = dict(save_strategy="steps", save_steps=1, remove_unused_columns=True) | changes
    Trainer(model=model, args=arguments(folder, **options), train_dataset=rows).train()
    return model


def test_checkpoints_of_a_stock_trainer_are_found_whole_sharded_and_as_adapters(tmp_path):
    model = stock(tmp_path / "whole")
    assert last_checkpoint(tmp_path / "whole") == tmp_path / "whole" / "checkpoint-3"
    newest = Path(shutil.copytree(tmp_path / "whole", tmp_path / "sharded")) / "checkpoint-3"
    (newest / "model.safetensors").unlink()
    model.save_pretrained(newest, max_shard_size="20KB")
    shards = sorted(newest.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and last_checkpoint(tmp_path / "sharded") == newest
    truncated(shards[1])
    with pytest.warns(UserWarning, match=r"checkpoint-3 \(no complete model\)"):
        assert last_checkpoint(tmp_path / "sharded") == tmp_path / "sharded" / "checkpoint-2"
    peft = pytest.importorskip("peft")
    stock(tmp_path / "adapters", model=peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])))
    newest = tmp_path / "adapters" / "checkpoint-3"
    assert (newest / "adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    assert last_checkpoint(tmp_path / "adapters") == newest


def test_a_checkpoint_of_the_model_alone_is_passed_over_and_cannot_be_resumed(tmp_path):
    stock(tmp_path, save_only_model=True)
    before = tree(tmp_path)
    with pytest.warns(
        UserWarning, match=r"checkpoint-3 \(no complete optimizer.pt: save_only_model leaves it out\), checkpoint-2 \(no comp"
    ):
        assert last_checkpoint(tmp_path) is None
    for path in (tmp_path / "checkpoint-3", str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match=rf"training cannot go on from {path} \(no complete optimizer.pt"):
            trainer(tmp_path, count=12).train(resume_from_checkpoint=path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no checkpoint from which training can go on"):
        trainer(tmp_path, count=12).train(resume_from_checkpoint=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("limit", [None, 1])
def test_a_run_does_not_begin_where_it_could_write_over_or_remove_what_it_did_not_write(limit, tmp_path):
    stock(tmp_path)
    before = tree(tmp_path)
    ours = trainer(tmp_path, count=12, save_strategy="steps", save_steps=1, save_total_limit=limit)
    message = r"holds checkpoints that this run did not write \(checkpoint-1, checkpoint-2, checkpoint-3\), and would write over"
    for given in (None, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match=message):
            ours.train(resume_from_checkpoint=given)
    assert tree(tmp_path) == before and ours.state.global_step == 0
    trainer(tmp_path, count=12).train()  # which writes nothing
    assert tree(tmp_path) == before


def test_a_folder_of_an_earlier_run_is_for_going_on_or_refused(saved, copied):
    options = dict(count=12, recompute="epoch", save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="holds checkpoints that this run did not write"):
        trainer(copied, **options).train()
    ours = trainer(copied, **options)
    ours.train(resume_from_checkpoint=True)
    assert tree(copied).keys() == tree(saved).keys()
    ours = trainer(copied / "below", **options)
    ours.train()
    ours.train()  # the same run once more may write over its own


def test_two_trainers_do_not_write_to_one_folder_at_a_time(tmp_path):
    refused = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match=f"{tmp_path} is in use by process .*; wait until that has ended, or choose another"):
                trainer(tmp_path, count=12, save_strategy="epoch").train()
            refused.append(state.global_step)

    ours = trainer(tmp_path, count=12, save_strategy="epoch")
    ours.add_callback(Second())
    ours.train()
    assert refused == [1, 2, 3] and last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_removes_only_what_the_run_wrote(limit, best, tmp_path):
    """As Hugging Face's does with a folder of its own; another program's checkpoint, which appears meanwhile, stays."""

    class AnotherProgram(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (tmp_path / "checkpoint-1000").mkdir()
                (tmp_path / "checkpoint-1000" / "model.safetensors").write_text("another's")

    values = iter([5.0, 1.0, 2.0, 3.0, 4.0])  # the first evaluation is the best
    evaluated = dict(eval_strategy="steps", eval_steps=1, validate=lambda model: {"score": next(values)}, eval_dataset=[0])
    evaluated |= dict(load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True) if best else {}
    ours = trainer(tmp_path, count=20, save_strategy="steps", save_steps=1, save_total_limit=limit, **evaluated)
    ours.add_callback(AnotherProgram())
    ours.train()
    kept = {(1, False): {5}, (2, False): {4, 5}, (1, True): {1}, (2, True): {1, 5}}[limit, best]
    names = {f"checkpoint-{step}" for step in kept}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == names | {"checkpoint-1000"}
    assert (tmp_path / "checkpoint-1000" / "model.safetensors").read_text() == "another's"
    assert ours.args.save_total_limit == limit


def test_a_run_of_other_weights_does_not_go_on(tmp_path):
    options = dict(count=12, recompute="never", save_strategy="steps", save_steps=1)
    weights = np.linspace(0, 2, 12)
    trainer(tmp_path, weights=weights, **options).train()
    for other in (weights[::-1], None):
        with pytest.raises(ValueError, match="was written by a run of other weights than are given now; give the same, or begin anew"):
            trainer(tmp_path, weights=other, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(tmp_path, weights=weights, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- trackers ---------------------------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frame = clicked_frame(16)
    options = dict(loss=TWO, tasks=TASKS, frame=frame, balance="upgrad", logging_steps=2, num_train_epochs=2)
    evaluation = dict(validate=lambda model: {"answer": 42.0}, eval_strategy="steps", eval_steps=3, eval_dataset=frame)
    ours = trainer(tmp_path, **evaluation, **options)
    track(ours, ["tensorboard"])
    ours.train()
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    assert path.parent == tmp_path / "tensorboard"
    events = EventAccumulator(str(path.parent), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    shares = ("effective_share", "trained_share", "largest_weight")
    for name in ("loss", "loss/relevance", "loss/click", "coefficient/relevance", "coefficient/click", "learning_rate", *shares):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logs_of(ours)]
        assert [step for step, _ in found] == [2, 4, 6, 8]
    assert [(event.step, event.value) for event in events.Scalars("eval/answer")] == [(3, 42), (6, 42), (8, 42)]
    for name in ("importance/weights", "importance/log10_scores"):
        found = events.Histograms(name)
        assert [event.step for event in found] == [2, 4, 6, 8]
        assert [event.histogram_value.num for event in found] == [8] * 4  # two steps of four samples
    weights = events.Histograms("importance/weights")
    assert [event.histogram_value.sum for event in weights] == pytest.approx([8] * 4)  # mean 1
    assert [event.histogram_value.max for event in weights] == [pytest.approx(e["largest_weight"], rel=1e-6) for e in logs_of(ours)]


def test_scores_of_zero_are_no_logarithm(tmp_path):
    ours = trainer(tmp_path, count=8, recompute="never")
    none, scores = torch.zeros(0), torch.tensor([0.0, 10.0, 0.001])
    assert module._histograms(ours) == {}
    ours.window.append(module.Step(none, torch.tensor([1.0, 1.0]), None, False, none))
    assert list(module._histograms(ours)) == ["importance/weights"]
    ours.window.append(module.Step(none, torch.tensor([0.0, 2.0, 1.0]), scores, True, none))
    found = module._histograms(ours)
    assert found["importance/weights"].tolist() == [1, 1, 0, 2, 1] and found["importance/log10_scores"].tolist() == pytest.approx([1, -3])


def followed(folder: str, tool: str) -> list[str]:
    """Train four steps under a tracker; the modules of TensorFlow that are loaded then."""
    ours = trainer(folder, count=16, logging_steps=2, recompute="forward", weighting=HALF)
    track(ours, [tool])
    ours.train()
    return [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]


def test_tensorboard_does_not_bring_tensorflow(tmp_path):
    assert apart(followed, str(tmp_path), "tensorboard") == []
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def records(path: Path) -> list:
    """The records of a Weights & Biases file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(part))
            part = b""
    return found


def test_weights_and_biases_stays_offline_in_the_folder_of_the_run(tmp_path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
        apart(followed, str(tmp_path), "wandb", WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40, **proxies)
        with pytest.raises(BlockingIOError):
            listening.accept()  # nobody has called
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (path,) = run.glob("*.wandb")
    logged = {}
    for record in records(path):
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            logged.setdefault(name, {})[items.get("train/global_step")] = value
    assert set(logged["train/loss"]) == set(logged["train/effective_share"]) == {2, 4}
    for name in ("importance/weights", "importance/log10_scores"):
        assert {step: sum(counts) for step, counts in logged[f"{name}.values"].items()} == {2: 8, 4: 8}
    weights = logged["importance/weights.values"][4]
    assert (weights[0], weights[-1]) == (4, 4) and logged["importance/weights.bins"][4][-1] == 2  # half are dropped, half count double


def test_weights_and_biases_goes_online_only_if_asked(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    ours = trainer(tmp_path, count=8)
    given = []
    for variables in ({}, {"WANDB_MODE": "online", "WANDB_PROJECT": "shop"}):
        for name in ("WANDB_MODE", "WANDB_PROJECT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        follower = module._WeightsAndBiases(ours)
        follower._wandb = MagicMock()
        type(follower._wandb).run = PropertyMock(side_effect=[None, *[MagicMock()] * 9])
        follower.setup(ours.args, ours.state, ours.model)
        given.append(follower._wandb.init.call_args.kwargs)
    assert [(options["mode"], options["project"]) for options in given] == [("offline", "recsys_importance"), ("online", "shop")]
    assert [options["dir"] for options in given] == [str(tmp_path)] * 2


@pytest.mark.parametrize("tool", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_clear_error(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tool, None)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{tool}_available", lambda: False)
    message = f"tracking with {tool} needs the extra 'tracking': pip install recsys_importance\\[tracking\\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        track(trainer(tmp_path, count=8), [tool])
    with pytest.raises(ValueError, match="tracking knows tensorboard, wandb, got 'mlflow'"):
        track(trainer(tmp_path, count=8), ["mlflow"])
