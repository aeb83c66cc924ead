"""What a batch brings with it: weights that change between epochs in spite of workers, a weight column, collators and data sets of one's
own; steps in which nothing is left to learn; and arguments of Hugging Face's Trainer that would have no effect."""

import math
import multiprocessing
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from test_trainer import TASKS, TWO, arguments, clicked_frame, exact_scores, less_rubbish, logs_of, orders, parameters_of, trainer  # noqa: F401
from tiny import tiny_config, tiny_frame, tiny_pair
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from recsys_importance import trainer as module
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, pair_logits
from recsys_importance.objectives import Objectives, cross_entropy
from recsys_importance.reference import WeightedBackward, gradient_norms_by_loop
from recsys_importance.trainer import ImportanceTrainer

HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")


class Watching(TrainerCallback):
    """Parameters before the first step and after each, and what the trainer saw."""

    def __init__(self, ours):
        self.ours, self.parameters, self.seen = ours, [parameters_of(ours.model)], []
        ours.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.parameters.append(parameters_of(self.ours.model))
        self.seen.append(self.ours.seen)


# --- workers ----------------------------------------------------------------------------------------------------------------------------

PERSISTENT = dict(dataloader_num_workers=2, dataloader_persistent_workers=True, dataloader_prefetch_factor=2)


def close(ours) -> None:
    """End the workers, which otherwise wait for the rubbish to be collected."""
    ours.callback_handler.train_dataloader._iterator._shutdown_workers()


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_persistent_workers_do_not_hold_on_to_the_first_epochs_weights(context, tmp_path):
    """Three epochs of three steps, the same as without workers to the bit; also with workers that get the data set by pickle."""
    if context == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(["recsys_importance.training"])
    options = dict(count=10, recompute="epoch", weighting=Weighting(clip=3), num_train_epochs=3)
    plain = Watching(trainer(tmp_path / "plain", **options))
    plain.ours.train()
    workers = dict(PERSISTENT, dataloader_num_workers=1) if context != "fork" else PERSISTENT
    apart = Watching(trainer(tmp_path / "workers", **options, **workers, dataloader_multiprocessing_context=context))
    apart.ours.train()
    close(apart.ours)
    assert all(torch.equal(*pair) for pair in zip(plain.parameters, apart.parameters, strict=True))
    weights = [sorted(torch.cat([step.weights for step in apart.seen[k : k + 3]]).tolist()) for k in (0, 3, 6)]
    assert len(set(map(tuple, weights))) == 3  # they do change


class Stopping(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            control.should_training_stop = True


@pytest.mark.parametrize("skip", [True, False], ids=["data skipped", "from the epoch's first batch"])
def test_a_run_resumed_in_mid_epoch_with_workers_has_that_epochs_weights_and_then_new_ones(skip, tmp_path):
    """Stopped after step 5, the middle of the second of three epochs of three steps."""
    options = dict(count=10, recompute="epoch", weighting=Weighting(clip=3), num_train_epochs=3, **PERSISTENT)
    whole = Watching(trainer(tmp_path / "whole", **options))
    whole.ours.train()
    close(whole.ours)
    first = trainer(tmp_path / "run", save_strategy="steps", save_steps=1, **options)
    first.add_callback(Stopping())
    first.train()
    close(first)
    weights = first.weights
    second = Watching(trainer(tmp_path / "run", ignore_data_skip=not skip, **options))
    scored, before = [], ImportanceTrainer.score_all

    def score_all(self):
        scored.append((self.state.global_step, self.weights.copy()))
        before(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImportanceTrainer, "score_all", score_all)
        second.ours.train(resume_from_checkpoint=True)
    close(second.ours)
    assert [step for step, _ in scored] == [6 if skip else 8] and np.array_equal(scored[0][1], weights)
    if skip:
        assert torch.equal(second.parameters[-1], whole.parameters[-1])


class Dated(PairDataset):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_state_of_the_data_set_that_persistent_workers_would_not_see_is_refused(tmp_path):
    ours = trainer(tmp_path, count=8, num_train_epochs=2, **PERSISTENT)
    ours.train_dataset = Dated(tiny_frame(8))
    with pytest.raises(ValueError, match="persistent workers hold a copy of the data set, which set_epoch does not reach"):
        ours.train()
    ours = trainer(tmp_path, count=8, num_train_epochs=2)
    ours.train_dataset = Dated(tiny_frame(8))
    ours.train()
    assert ours.train_dataset.epoch == 1


# --- nothing left to learn --------------------------------------------------------------------------------------------------------------


class Learned(Objectives):
    """Objectives of which every loss is 0, with a gradient of 0, for the samples of these names."""

    def __init__(self, *objectives, names):
        super().__init__(*objectives)
        object.__setattr__(self, "learned", frozenset(names))

    def matrix(self, model, batch):
        found = super().matrix(model, batch)
        return found._replace(losses=found.losses * torch.tensor([float(name not in self.learned) for name in batch["sample_id"]])[:, None])


def learned(names):
    """Cross-entropy, but 0 with a gradient of 0 for the samples of these names, as a hinge loss has behind the margin."""

    def loss(model, batch):
        return cross_entropy(model, batch) * torch.tensor([float(name not in names) for name in batch["sample_id"]])

    return loss


ALL = {f"s{row:04d}" for row in range(16)}
STEP = dict(optim="adamw_torch", weight_decay=0.5, learning_rate=1e-2)  # which moves parameters under a gradient of zeros


def in_engine(names):
    """weighted_backward as it is where norms are not all 0; where they are it adds nothing and weighs nothing."""
    before = module.weighted_backward

    def backward(model, loss, batches, weighting, **options):
        if all(name in names for batch in batches for name in batch["sample_id"]):
            zeros = torch.zeros(sum(len(batch["sample_id"]) for batch in batches))
            return WeightedBackward(zeros, zeros, zeros)
        return before(model, loss, batches, weighting, **options)

    return backward


IDLE = {
    "step": dict(recompute="step"),
    "epoch": dict(recompute="epoch", num_train_epochs=2),
    "forward": dict(recompute="forward", weighting=HALF),
    "step, balanced": dict(recompute="step", balance="upgrad", loss="objectives"),
    "epoch, balanced": dict(recompute="epoch", balance="mgda", loss="objectives"),
    "step, head": dict(recompute="step", head=True, balance="sum", loss="objectives"),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", IDLE)
def test_where_every_sample_is_learned_no_parameter_moves_and_the_log_stays_finite(mode, accumulation, tmp_path, monkeypatch):
    options = IDLE[mode] | dict(gradient_accumulation_steps=accumulation)
    monkeypatch.setattr(module, "weighted_backward", in_engine(ALL))
    options["loss"] = Learned(*TWO.objectives, names=ALL) if options.pop("loss", None) else learned(ALL)
    tasks = dict(tasks=TASKS, frame=clicked_frame(16)) if isinstance(options["loss"], Objectives) else dict(count=16)
    watching = Watching(trainer(tmp_path, **STEP, **tasks, **options))
    with pytest.warns(UserWarning) as caught:
        watching.ours.train()
    said = [str(one.message) for one in caught if "every sample weighs 0" in str(one.message)]
    assert said == ["in step 0 every sample weighs 0, so nothing was trained; this is said once in a run"]
    assert all(torch.equal(watching.parameters[0], later) for later in watching.parameters)
    log = logs_of(watching.ours)
    assert len(log) == watching.ours.state.global_step == len(watching.seen) > 1
    for entry in log:
        assert all(math.isfinite(value) for value in entry.values())
        assert [entry[name] for name in ("loss", "effective_share", "trained_share", "largest_weight", "grad_norm")] == [0] * 5


@pytest.mark.parametrize("mode", ["step", "epoch", "forward", "never"])
def test_a_step_without_anything_to_learn_lies_between_steps_that_train(mode, tmp_path, monkeypatch):
    """The second of four steps; AdamW's averages and decay leave the parameters alone in it."""
    order = orders([0], size=16, seed=3)[0]
    names = {f"s{row:04d}" for row in order[4:8]}
    monkeypatch.setattr(module, "weighted_backward", in_engine(names))
    weights = np.ones(16) * 16 / 12
    weights[order[4:8]] = 0
    given = dict(weights=weights) if mode == "never" else {}
    watching = Watching(trainer(tmp_path, count=16, loss=learned(names), recompute=mode, **STEP, **given))
    with pytest.warns(UserWarning, match="in step 1 every sample weighs 0"):
        watching.ours.train()
    moved = [not torch.equal(*pair) for pair in zip(watching.parameters, watching.parameters[1:], strict=False)]
    assert moved == [True, False, True, True]


def test_a_micro_batch_without_anything_to_learn_is_left_out_of_the_step(tmp_path):
    """Of a step of two micro-batches of 4 the first, or the last, is learned: the gradient is that of the other's half, over all 8."""
    order = orders([0], size=8, seed=3)[0]
    for idle in (order[:4], order[4:]):
        names = {f"s{row:04d}" for row in idle}
        ours = trainer(tmp_path, count=8, gradient_accumulation_steps=2, recompute="forward", weighting=HALF, loss=learned(names))
        ours.train()
        pair, dataset = tiny_pair("cross_encoder", dropout=0.0), PairDataset(tiny_frame(8))
        batch = PairCollator(pair)([dataset[row] for row in order if row not in idle])
        scores = (torch.sigmoid(pair_logits(pair.model, batch)) - batch["labels"]).abs().detach()
        value = (HALF(scores) * cross_entropy(pair.model, batch)).sum() / 8
        value.backward()
        with torch.no_grad():
            for parameter in pair.model.parameters():
                parameter -= 0.1 * (parameter.grad if parameter.grad is not None else 0)
        torch.testing.assert_close(parameters_of(ours.model), parameters_of(pair.model), rtol=0, atol=1e-6)
        assert ours.seen.loss.item() == pytest.approx(value.item(), rel=1e-5) and len(ours.seen.losses) == 2
        assert sorted(ours.seen.weights.tolist()) == [0] * 6 + [2, 2]


def test_in_fp16_the_scaler_goes_on_after_a_step_without_a_gradient(tmp_path, monkeypatch):
    from accelerate import Accelerator

    start = Accelerator.__init__

    def pretending(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=256.0)

    monkeypatch.setattr(Accelerator, "__init__", pretending)
    order = orders([0], size=16, seed=3)[0]
    weights = np.ones(16) * 16 / 12
    weights[order[4:8]] = 0
    watching = Watching(trainer(tmp_path, count=16, recompute="never", weights=weights, fp16=True, max_grad_norm=1.0, **STEP))
    with pytest.warns(UserWarning, match="in step 1 every sample weighs 0"):
        watching.ours.train()
    moved = [not torch.equal(*pair) for pair in zip(watching.parameters, watching.parameters[1:], strict=False)]
    assert moved == [True, False, True, True]


def test_before_they_are_annealed_in_scores_of_zero_leave_weights_uniform(tmp_path):
    """Two epochs of two steps, annealed over the second: 1 - share of the way, in the order 1, 1, 1, 1/2."""
    weighting = Weighting(anneal=(0.5, 1.0))
    ours = Watching(trainer(tmp_path, count=8, loss=learned(ALL), recompute="epoch", weighting=weighting, num_train_epochs=2))
    ours.ours.train()
    assert [step.weights.unique().tolist() for step in ours.seen] == [[1], [1], [1], [0.5]]


# --- a weight column --------------------------------------------------------------------------------------------------------------------

GIVEN = np.array([0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.0, 1.5, 0.0, 4.0, 1.0, 1.0, 0.75, 2.5])
RULES = {
    "never": Weighting(anneal=(0.25, 0.75)),  # importance has nothing to anneal there, and given weights are not annealed
    "epoch": Weighting(exponent=0.5),
    "step": Weighting(exponent=-0.5, clip=2),
    "forward": HALF,
}


def importance_by_hand(mode, model, batches, rows, weighting, of_epoch) -> torch.Tensor:
    """Importance weights of a step's samples, of the losses without the given weights."""
    if mode == "never":
        return torch.ones(sum(map(len, rows)))
    if mode == "epoch":
        return torch.tensor([of_epoch[row] for part in rows for row in part])
    if mode == "step":
        return weighting(torch.cat([gradient_norms_by_loop(model, cross_entropy, batch) for batch in batches]))
    with torch.no_grad():
        scores = [(torch.sigmoid(pair_logits(model, batch)) - batch["labels"]).abs() for batch in batches]
    return torch.cat([weighting(part) for part in scores])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", module.RECOMPUTE)
def test_a_weight_column_multiplies_losses_as_in_a_loop_written_by_hand(mode, accumulation, tmp_path):
    """mean_i(v_i w_i l_i), v as given and w of the loss alone; 14 samples in batches of 4, the last of 2."""
    weighting = RULES[mode]
    ours = trainer(tmp_path, count=14, recompute=mode, weighting=weighting, gradient_accumulation_steps=accumulation)
    ours.train_dataset = PairDataset(tiny_frame(14), weight=GIVEN)
    ours.train()
    pair, dataset, (order,) = tiny_pair("cross_encoder", dropout=0.0), PairDataset(tiny_frame(14)), orders([0], size=14, seed=3).values()
    model, collate, logged = pair.model, PairCollator(pair), []
    of_epoch = weighting(gradient_norms_by_loop(model, cross_entropy, collate([dataset[row] for row in range(14)])).numpy())
    parts = [order[start : start + 4] for start in range(0, 14, 4)]
    for first in range(0, 4, accumulation):
        rows = parts[first : first + accumulation]
        batches = [collate([dataset[row] for row in part]) for part in rows]
        weights = importance_by_hand(mode, model, batches, rows, weighting, of_epoch)
        weights = weights * torch.tensor([GIVEN[row] for part in rows for row in part])
        losses = torch.cat([cross_entropy(model, batch) for batch in batches])
        value = (weights * losses).mean()
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.1 * gradient
        logged.append(value.item())
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    assert (parameters_of(ours.model) - parameters_of(tiny_pair("cross_encoder").model)).abs().max() > 1e-3
    np.testing.assert_allclose([entry["loss"] for entry in logs_of(ours)], logged, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(ours.seen.weights.double(), weights.double(), rtol=2e-3, atol=2e-4)


def test_a_column_of_ones_is_no_column(tmp_path):
    ends = []
    for number, column in enumerate(({}, dict(weight=np.ones(10)))):
        ours = trainer(tmp_path / str(number), count=10, recompute="never")
        ours.train_dataset = PairDataset(tiny_frame(10), **column)
        ours.train()
        ends.append(parameters_of(ours.model))
    assert torch.equal(*ends)


def test_balanced_objectives_take_a_weight_column_too(tmp_path):
    """As the same weights given by row, which these are: mean 1."""
    ends, frame = [], clicked_frame(14)
    v = GIVEN / GIVEN.mean()
    for number, options in enumerate((dict(weights=v), {})):
        ours = trainer(tmp_path / str(number), loss=TWO, tasks=TASKS, frame=frame, balance="upgrad", recompute="never", **options)
        if not options:
            ours.train_dataset = PairDataset(frame, clicked=frame["clicked"], weight=v)
        ours.train()
        ends.append(parameters_of(ours.model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


# --- datasets.Dataset and collators of one's own ----------------------------------------------------------------------------------------


def classifier():
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(tiny_config(dropout=0.0, num_labels=2))


def classified(model, batch) -> torch.Tensor:
    """Cross-entropy over two classes per sample; the model gets what a stock Trainer would give it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.nn.functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def rows_of_tokens(count: int = 12) -> dict:
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(4, 25, size=(count, 6)).tolist(),
        "attention_mask": np.ones((count, 6), dtype=int).tolist(),
        "label": rng.integers(0, 2, size=count).tolist(),
        "weight": rng.integers(0, 4, size=count).astype(float).tolist(),
        "text": [f"text {row}" for row in range(count)],
    }


def hugging_face(folder, dataset, model=None, **options):
    """A trainer as one has it without this library's pair models: every argument that need not be given is Hugging Face's default."""
    mine = {
        name: options.pop(name) for name in ("recompute", "weighting", "weights", "data_collator", "loss", "lengths") if name in options
    }
    plain = dict(output_dir=str(folder), learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True)
    plain |= dict(per_device_train_batch_size=4, num_train_epochs=1, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1)
    args = TrainingArguments(**plain | dict(seed=3) | options)
    ours = ImportanceTrainer(model=model or classifier(), args=args, train_dataset=dataset, **dict(loss=classified) | mine)
    ours.remove_callback(PrinterCallback)
    return ours


@pytest.mark.parametrize("mode", module.RECOMPUTE)
def test_a_datasets_dataset_with_the_default_collator_and_a_weight_column(mode, tmp_path, capsys):
    """Rows with a text that the model does not take and no sample_id; every mode as the loop by hand."""
    datasets = pytest.importorskip("datasets")
    rows, weighting = rows_of_tokens(), RULES[mode]
    ours = hugging_face(tmp_path, datasets.Dataset.from_dict(rows), recompute=mode, weighting=weighting)
    ours.train()
    model = classifier()
    everything = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor(rows["label"])}
    v = torch.tensor(rows["weight"])
    of_epoch = weighting(gradient_norms_by_loop(model.eval(), classified, everything).numpy())
    for start in range(0, 12, 4):
        part = orders([0], size=12, seed=3)[0][start : start + 4]
        batch = {name: value[part] for name, value in everything.items()}
        if mode == "step":
            weights = weighting(gradient_norms_by_loop(model, classified, batch))
        elif mode == "forward":
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
            errors = torch.softmax(logits, 1) - torch.nn.functional.one_hot(batch["labels"], 2)
            weights = weighting(errors.norm(dim=1))
        else:
            weights = torch.tensor(of_epoch[part]) if mode == "epoch" else torch.ones(4)
        model.zero_grad()
        (weights * v[part] * classified(model, batch)).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (parameter.grad if parameter.grad is not None else 0)
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    assert (parameters_of(model) - parameters_of(classifier())).abs().max() > 1e-3


def test_scoring_before_each_epoch_takes_a_datasets_dataset_with_workers(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {name: values for name, values in rows_of_tokens().items() if name != "weight"}
    ends = []
    for workers in ({}, PERSISTENT):
        ours = hugging_face(tmp_path, datasets.Dataset.from_dict(rows), recompute="epoch", num_train_epochs=2, **workers)
        ours.train()
        ends.append(parameters_of(ours.model))
    close(ours)
    assert torch.equal(*ends)


def test_evaluation_is_unweighted_and_does_not_see_the_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = rows_of_tokens()
    model = classifier().eval()
    everything = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor(rows["label"])}
    expected = classified(model, everything).mean().item()
    kinds = [datasets.Dataset.from_dict(rows), [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]]
    for removed in (True, False):
        for test in kinds:
            ours = hugging_face(tmp_path, kinds[0], recompute="never", remove_unused_columns=removed)
            assert ours.evaluate(test)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    ours = hugging_face(tmp_path, kinds[0], recompute="never")
    found = ours.evaluate({"first": kinds[0], "second": kinds[1]})
    assert [found[f"eval_{name}_loss"] for name in ("first", "second")] == pytest.approx([expected] * 2, rel=1e-5)


def only_tensors(samples: list[dict]) -> dict:
    """A user's collator, which knows its three columns."""
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "label"}
    return {name: torch.tensor([sample[column] for sample in samples]) for name, column in names.items()}


@pytest.mark.parametrize("mode", ["never", "epoch"])
def test_a_collator_of_ones_own_needs_to_know_neither_weight_nor_sample_id(mode, tmp_path):
    samples = [dict(zip(rows_of_tokens(), values, strict=True)) for values in zip(*rows_of_tokens().values(), strict=True)]
    ends = []
    for collate in (None, only_tensors):
        options = dict(weights=np.linspace(0, 2, 12)) if mode == "never" else {}
        plain = [{name: value for name, value in sample.items() if name != "weight"} for sample in samples] if options else samples
        ours = hugging_face(tmp_path, plain, recompute=mode, data_collator=collate, **options)
        ours.train()
        ends.append(parameters_of(ours.model))
    assert torch.equal(*ends)


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def reads(name):
    def loss(model, batch):
        return classified(model, {column: batch[column] for column in ("input_ids", "attention_mask", "labels")}) * len(batch[name])

    return loss


@pytest.mark.parametrize("mode", module.RECOMPUTE)
@pytest.mark.parametrize("name", ["labels", "sample_id", "weight", "clicked"])
def test_a_column_that_the_loss_misses_is_named_with_the_collator(name, mode, tmp_path):
    collate = only_tensors if name != "labels" else lambda samples: {key: x for key, x in only_tensors(samples).items() if key != "labels"}
    samples = [dict(zip(rows_of_tokens(), values, strict=True)) for values in zip(*rows_of_tokens().values(), strict=True)]
    ours = hugging_face(tmp_path, samples, recompute=mode, data_collator=collate, loss=reads(name))
    way = (
        "the trainer takes it out of the samples"
        if name == "weight"
        else "let the collator pass it on, and set remove_unused_columns=False"
    )
    who = "<lambda>" if name == "labels" else "only_tensors"
    with pytest.raises(ValueError, match=f"the loss found no '{name}' in a batch of the collator {who}, which has input_ids.*; {way}"):
        ours.train()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.r_[-1.0, np.ones(11)], r"weights must be finite and 0 or more; 1 of 12 are not, the first that of row 0: -1.0"),
        (np.r_[np.ones(10), np.nan, np.inf], "2 of 12 are not, the first that of row 10: nan"),
        (np.zeros(12), "all weights are 0, so that nothing would be trained"),
        (np.full(12, 2.0), "weights must have mean 1, which keeps the size of a step, got mean 2; divide them by it"),
        (
            pd.Series(np.ones(12), index=range(12, 0, -1)),
            "weights are taken in the order of the rows, and these have an index of their own",
        ),
        (np.ones(11), "expected one weight per training sample, got 11 for 12"),
        (np.ones((12, 1)), r"expected one weight per training sample, got shape \(12, 1\) for 12"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, count=12, recompute="never", weights=weights)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, [1.0, 2.0], "heavy"])
@pytest.mark.parametrize("kind", ["samples", "datasets.Dataset"])
def test_a_weight_column_that_is_none_is_refused_before_the_first_step(kind, value, tmp_path):
    rows = rows_of_tokens(4)
    rows["weight"] = [value] * 4 if isinstance(value, (list, str)) else [1.0, 1.0, value, 1.0]
    dataset = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if kind == "datasets.Dataset":
        dataset = pytest.importorskip("datasets").Dataset.from_dict(rows)
    ours = hugging_face(tmp_path, dataset, recompute="step")
    with pytest.raises(ValueError, match="a sample's 'weight' must be one finite number, 0 or more; [14] of 4 are not, the first that of"):
        ours.train()
    assert ours.state.global_step == 0


def test_weights_that_contradict_each_other_are_refused(tmp_path):
    rows = rows_of_tokens(4)
    samples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    both = "the samples have a 'weight', and weights= are given; leave one of them out"
    with pytest.raises(ValueError, match=both):
        hugging_face(tmp_path, samples, recompute="never", weights=np.ones(4)).train()
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=both):
        hugging_face(tmp_path, datasets.Dataset.from_dict(rows), recompute="never", weights=np.ones(4))
    with pytest.raises(ValueError, match="every value of the column 'weight' is 0"):
        hugging_face(tmp_path, datasets.Dataset.from_dict(rows | {"weight": [0.0] * 4})).train()
    del samples[2]["weight"]
    with pytest.raises(ValueError, match="3 of 4 samples of a batch have a 'weight'; give every sample one, or none"):
        hugging_face(tmp_path, samples, recompute="never").train()


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda samples: only_tensors(samples[1:]), "the collator made a batch of 3 from 4 samples, so that weights cannot find theirs"),
        (lambda samples: tuple(only_tensors(samples).values()), "the collator returned tuple, expected a dict of tensors and lists"),
    ],
)
def test_a_collator_that_loses_samples_is_refused_where_weights_belong_to_them(collate, message, tmp_path):
    samples = [dict(zip(rows_of_tokens(), values, strict=True)) for values in zip(*rows_of_tokens().values(), strict=True)]
    with pytest.raises(ValueError, match=message):
        hugging_face(tmp_path, samples, recompute="never", data_collator=collate).train()


@pytest.mark.parametrize("options", [dict(recompute="never", weights=np.ones(8)), dict(recompute="epoch"), dict(weight=np.ones(8))])
def test_a_collator_that_sorts_samples_is_refused_where_weights_belong_to_them(options, tmp_path):
    columns = {"weight": options.pop("weight")} if "weight" in options else {}
    ours = trainer(tmp_path, count=8, **options)
    ours.train_dataset, collate = PairDataset(tiny_frame(8), **columns), ours.data_collator
    ours.data_collator = lambda samples: collate(samples[::-1])
    with pytest.raises(ValueError, match="the collator lost samples or changed their order, so that weights cannot find theirs"):
        ours.train()
    assert ours.state.global_step == 0
    trainer(tmp_path, count=8).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor is not supported: it belongs to Hugging Face's own loss"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size is not supported: a step's weights depend on its samples"),
        (dict(use_liger_kernel=True), "use_liger_kernel is not supported"),
        (
            dict(optim="galore_adamw_layerwise"),
            "optim='galore_adamw_layerwise' is not supported: it changes parameters inside the backward",
        ),
        (dict(optim="lomo"), "optim='lomo' is not supported"),
        (dict(train_sampling_strategy="batch_rebalance"), "train_sampling_strategy='batch_rebalance' is not supported; use 'random'"),
        (dict(train_sampling_strategy="sequential", lengths=[1] * 22), "lengths group samples of like length"),
        (dict(final_rate=0.1), "final_rate is a schedule of its own, and lr_scheduler_type='constant'; leave it out"),
        (dict(final_rate=0.0, lr_scheduler_type="constant_with_warmup"), "expected 0 < final_rate <= 1, got 0.0"),
        (dict(bf16_full_eval=True, validate=len), "fp16_full_eval and bf16_full_eval are not supported with validate"),
        (dict(weighting=Weighting(normalisation="sum")), "training needs mean-1 weights, got normalisation='sum'"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_that_would_not_be_called_are_refused(name, tmp_path):
    pair = tiny_pair("cross_encoder")
    for place in (dict(args=arguments(tmp_path)), {}):
        with pytest.raises(ValueError, match=f"{name} is not supported: "):
            ImportanceTrainer(model=pair.model, loss=cross_entropy, **{name: len}, **place)


def test_a_head_of_a_model_that_is_made_anew_is_refused(tmp_path):
    pair = tiny_pair("cross_encoder")
    with pytest.raises(ValueError, match="model_init makes another model for each run, of which a head knows nothing"):
        ImportanceTrainer(model_init=lambda: pair.model, args=arguments(tmp_path), loss=cross_entropy, head=ImportanceHead(pair.model))


def test_predictions_and_another_data_set_for_validate_are_refused(tmp_path):
    ours = trainer(tmp_path, count=8, validate=lambda model: {"answer": 42.0})
    with pytest.raises(ValueError, match="a loss gives no predictions"):
        ours.predict(ours.train_dataset)
    with pytest.raises(ValueError, match="validate, a function of the model, is what this trainer evaluates"):
        ours.evaluate(ours.train_dataset)
    assert ours.evaluate()["eval_answer"] == 42


# --- Hugging Face's other arguments -----------------------------------------------------------------------------------------------------


def order_of(ours) -> list[str]:
    """The names of the samples in the order in which they were trained."""
    seen = []
    loss = ours._recorder.loss
    ours._recorder.loss = lambda model, batch: (seen.extend(batch["sample_id"]), loss(model, batch))[1]
    ours.train()
    return seen


def test_samples_keep_their_order_if_asked(tmp_path):
    ours = trainer(tmp_path, count=10, recompute="never", train_sampling_strategy="sequential", num_train_epochs=2)
    assert order_of(ours) == [f"s{row:04d}" for row in range(10)] * 2


def test_samples_are_grouped_by_a_column_of_lengths_or_need_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = rows_of_tokens(12) | {"length": [3 * row % 11 for row in range(12)]}
    ours = hugging_face(tmp_path, datasets.Dataset.from_dict(rows), train_sampling_strategy="group_by_length")
    assert list(ours._get_train_sampler()) == orders([0], size=12, seed=3, batch=4, lengths=rows["length"])[0]
    with pytest.raises(ValueError, match="grouping by length needs lengths=, one per training sample, or a datasets.Dataset with column"):
        trainer(tmp_path, train_sampling_strategy="group_by_length").train()
    with pytest.raises(ValueError, match="expected one length per training sample, got 3 for 22"):
        trainer(tmp_path, lengths=[1, 2, 3]).train()


def test_an_optimiser_of_ones_own_is_used(tmp_path):
    pair, frame = tiny_pair("cross_encoder", dropout=0.0), tiny_frame(8)
    optimiser = torch.optim.SGD(pair.model.parameters(), lr=0.1)
    given = dict(data_collator=PairCollator(pair), train_dataset=PairDataset(frame), optimizers=(optimiser, None), loss=cross_entropy)
    ImportanceTrainer(model=pair.model, args=arguments(tmp_path, learning_rate=1e-9), **given).train()
    ours = trainer(tmp_path, count=8)
    ours.train()
    torch.testing.assert_close(parameters_of(pair.model), parameters_of(ours.model), rtol=0, atol=1e-6)


def test_a_model_that_is_made_anew_trains_as_one_that_is_given(tmp_path):
    ends = []
    for name in ("model", "model_init"):
        pair = tiny_pair("cross_encoder", dropout=0.0)
        given = dict(
            args=arguments(tmp_path), data_collator=PairCollator(pair), train_dataset=PairDataset(tiny_frame(8)), loss=cross_entropy
        )
        given[name] = pair.model if name == "model" else lambda: tiny_pair("cross_encoder", dropout=0.0).model
        ours = ImportanceTrainer(**given)
        ours.train()
        ends.append(parameters_of(ours.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_noise_on_the_embeddings_is_that_of_plain_training(accumulation, tmp_path):
    """Weights of 1 from exact norms, exponent 0, follow the plain gradient under the same noise; with a clip there is a second pass."""
    samples = [dict(zip(rows_of_tokens(), values, strict=True)) for values in zip(*rows_of_tokens().values(), strict=True)]
    samples = [{name: value for name, value in sample.items() if name != "weight"} for sample in samples]
    ends = []
    for options in (dict(), dict(weighting=Weighting(exponent=0)), dict(weighting=Weighting(exponent=0, clip=2)), dict(alpha=None)):
        alpha = options.pop("alpha", 5.0)
        options |= dict(recompute="step" if options else "never", neftune_noise_alpha=alpha, gradient_accumulation_steps=accumulation)
        ours = hugging_face(tmp_path, samples, **options)
        ours.train()
        ends.append(parameters_of(ours.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-6)
    assert (ends[3] - ends[0]).abs().max() > 1e-4


def test_the_cache_is_emptied_as_often_as_asked(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr(module, "clear_device_cache", lambda: emptied.append(1))
    trainer(tmp_path, count=16, torch_empty_cache_steps=2).train()
    assert len(emptied) == 2


# --- data sets without a length ---------------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """The rows of a frame, without a length."""

    def __init__(self, frame, **columns):
        self.dataset = PairDataset(frame, **columns)

    def __iter__(self):
        return (self.dataset[row] for row in range(len(self.dataset)))


@pytest.mark.parametrize("mode", ["step", "forward", "never"])
@pytest.mark.parametrize("column", [{}, dict(weight=GIVEN[:12])], ids=["no weights", "a weight column"])
def test_a_stream_trains_as_the_same_samples_in_order(mode, column, tmp_path):
    options = dict(recompute=mode, weighting=RULES[mode], count=12, train_sampling_strategy="sequential")
    ends = []
    for kind in (PairDataset, Stream):
        ours = trainer(tmp_path, **options, max_steps=5)
        ours.train_dataset = kind(tiny_frame(12), **column)
        ours.train()
        assert ours.state.global_step == 5  # into a second epoch
        ends.append(parameters_of(ours.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_goes_on_where_it_was(accumulation, tmp_path):
    """Eight steps over a stream of five batches; again from the middle of the first pass, its end, and later ones."""
    ends, options = [], dict(count=20, max_steps=8, gradient_accumulation_steps=accumulation)
    for start in (None, 2, 5, 6, 7):
        ours = trainer(tmp_path, **options, save_strategy="no" if start else "steps", save_steps=1)
        ours.train_dataset = Stream(tiny_frame(20))
        ours.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}") if start else None)
        assert ours.state.global_step == 8
        ends.append(parameters_of(ours.model))
    assert all(torch.equal(ends[0], other) for other in ends[1:])
    ours = trainer(tmp_path, **options)
    (tmp_path / "checkpoint-2" / "importance.safetensors").unlink()
    ours.train_dataset = Stream(tiny_frame(20))
    with pytest.raises(ValueError, match="checkpoint-2 has no importance.safetensors: it was written by another kind of run"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recompute="epoch"), "recompute='epoch' scores every row before each epoch, and a Stream has no length or no rows"),
        (dict(recompute="never", weights=np.ones(12)), "weights are one per row, and a Stream has no length or no rows"),
        (dict(recompute="step", lengths=[1] * 12), "lengths are one per row, and a Stream has no length or no rows"),
    ],
)
def test_a_stream_is_refused_where_rows_are_needed(options, message, tmp_path):
    pair = tiny_pair("cross_encoder")
    args = arguments(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match=message):
        ImportanceTrainer(model=pair.model, args=args, train_dataset=Stream(tiny_frame(12)), loss=cross_entropy, **options)


def test_nothing_is_warned_of_in_an_ordinary_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, count=8, recompute="epoch").train()
