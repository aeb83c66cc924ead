"""Weighted fine-tuning against a training loop written by hand, and what it keeps, refuses and leaves behind."""

import math
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_frame, tiny_pair
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from recsys_importance.evaluation import evaluate
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, predict
from recsys_importance.objectives import LOSSES, cross_entropy
from recsys_importance.training import TrainingSettings, WeightedTrainer, fine_tune, sample_weights

ARCHITECTURES = ("two_tower", "cross_encoder")
SETTINGS = dict(epochs=2, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return tiny_frame(30, seed=3)


@pytest.fixture(scope="module")
def validation() -> pd.DataFrame:
    return tiny_frame(40, seed=4, prefix="v")


@pytest.fixture(scope="module")
def scores(train) -> pd.Series:
    return pd.Series(np.random.default_rng(0).lognormal(size=len(train)), index=train["sample_id"], name="score")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def trained(train, validation, *, architecture="two_tower", dropout=0.1, scores=None, weighting=None, **changes):
    """(weights after fine-tuning a fresh tiny model, what fine_tune returned)."""
    pair = tiny_pair(architecture, dropout=dropout)
    result = fine_tune(pair, train, validation, TrainingSettings(**SETTINGS | changes), scores=scores, weighting=weighting)
    return weights_of(pair.model), result


def trained_by_hand(pair, train, validation, settings, weights, weighting) -> tuple[dict, list[float]]:
    """Weights with the best validation NDCG@10 and the training loss of every step, by a plain loop: AdamW without decay of biases and
    layer norms, linear warm-up and decay, gradients clipped at norm 1. Batches come from the sampler that the Trainer uses."""
    dataset, model = PairDataset(train), pair.model.train()
    collate = PairCollator(pair, settings.max_length)
    undecayed = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    groups = [dict(params=decayed, weight_decay=settings.weight_decay), dict(params=undecayed, weight_decay=0.0)]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    sampler = LengthGroupedSampler(settings.batch_size, lengths=dataset.lengths(), generator=torch.Generator().manual_seed(settings.seed))
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = per_epoch * settings.epochs
    warm = math.ceil(settings.warmup * total)
    every = max(1, per_epoch // settings.evaluations_per_epoch)
    step, losses, best, kept = 0, [], -1.0, None
    for _ in range(settings.epochs):
        order = list(sampler)
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            share = weighting.share(step / total)
            w = torch.tensor([1 + share * (weights[i] - 1) for i in rows], dtype=torch.float32)
            loss = (w * cross_entropy(model, collate([dataset[i] for i in rows]))).mean()
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = step / warm if step < warm else (total - step) / (total - warm)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * rate
            optimiser.step()
            losses.append(loss.item())
            step += 1
            if step % every == 0:
                ndcg = evaluate(validation, predict(pair, validation)).summary["ndcg@10"]
                if ndcg > best:
                    best, kept = ndcg, weights_of(model)
    return kept, losses


# --- the loss ---------------------------------------------------------------------------------------------------------------------------


def trainer_of(pair, train, weights, weighting, folder, **options) -> WeightedTrainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True)
    return WeightedTrainer(
        model=pair.model,
        args=arguments,
        train_dataset=PairDataset(train, weight=weights),
        data_collator=PairCollator(pair),
        **dict(loss=cross_entropy, weighting=weighting) | options,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_that_of_the_weighted_mean(architecture, train, tmp_path):
    pair, weights = tiny_pair(architecture), np.array([0.0, 0.5, 1.0, 2.5])
    trainer = trainer_of(pair, train[:4], weights, Weighting(), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    parameters = list(pair.model.parameters())
    expected = 0.0
    for weight, loss in zip(weights, cross_entropy(pair.model, batch), strict=True):
        expected = expected + weight * loss / 4
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    value = trainer.compute_loss(pair.model, batch)
    found = torch.autograd.grad(value, parameters)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    assert "weight" in batch  # the caller's batch is left as it was


def test_annealing_moves_the_weights_with_the_progress(train, tmp_path):
    pair, weights = tiny_pair(), np.array([0.0, 0.5, 1.0, 2.5])
    trainer = trainer_of(pair, train[:4], weights, Weighting(anneal=(0.2, 0.6)), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    losses = cross_entropy(pair.model, batch).detach().numpy()
    trainer.state.max_steps = 10
    for step, share in {0: 0, 2: 0, 3: 0.25, 4: 0.5, 5: 0.75, 6: 1, 9: 1, 10: 1}.items():
        trainer.state.global_step = step
        assert trainer.compute_loss(pair.model, batch).item() == pytest.approx(((1 + share * (weights - 1)) * losses).mean(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(train, tmp_path):
    def poisoned(model, batch):
        faults = torch.tensor([float("nan") if name in ("s0001", "s0003") else 0.0 for name in batch["sample_id"]])
        return cross_entropy(model, batch) + faults

    trainer = trainer_of(tiny_pair(), train[:4], np.ones(4), Weighting(), tmp_path, loss=poisoned)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 \(samples \['s0001', 's0003'\]\); lower the learning rate or check"):
        trainer.compute_loss(trainer.model, batch)


def test_fine_tuning_stops_at_such_a_loss(train, validation, monkeypatch, tmp_path):
    def poisoned(model, batch):
        return cross_entropy(model, batch) / torch.tensor([float(name != "s0007") for name in batch["sample_id"]])

    monkeypatch.setitem(LOSSES, "cross_entropy", poisoned)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"the loss is inf at step \d \(samples \['s0007'\]\)"):
        trained(train, validation)
    assert not list(tmp_path.iterdir())


# --- the whole training -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [None, Weighting(), Weighting(exponent=-1, clip=2, anneal=(0.25, 0.75))], ids=["uniform", "article", "annealed"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fine_tuning_is_the_loop_written_by_hand(architecture, rule, train, validation, scores):
    settings = TrainingSettings(**SETTINGS)
    given = None if rule is None else scores
    weights = np.ones(len(train)) if rule is None else rule(scores.to_numpy())
    pair = tiny_pair(architecture, dropout=0.0)
    expected, losses = trained_by_hand(pair, train, validation, settings, weights, rule or Weighting())
    found, result = trained(train, validation, architecture=architecture, dropout=0.0, scores=given, weighting=rule)
    before = weights_of(tiny_pair(architecture).model)
    # The softmax of attention does not depend on the keys' bias: its gradient is rounding, which Adam makes into steps of full size.
    names = [name for name in expected if not name.endswith("key.bias")]
    moved = math.sqrt(sum((expected[name] - before[name]).square().sum().item() for name in names))
    apart = math.sqrt(sum((expected[name] - found[name]).square().sum().item() for name in names))
    assert moved > 0.05 and apart < 2e-5 * moved
    steps = result.history["step"].tolist()
    assert steps == [0, 2, 4, 6, 8] and np.isnan(result.history["loss"][0])
    by_row = [np.mean(losses[first:last]) for first, last in zip(steps, steps[1:], strict=False)]
    np.testing.assert_allclose(result.history["loss"][1:], by_row, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_scores_train_exactly_as_no_scores(architecture, train, validation):
    plain, plain_result = trained(train, validation, architecture=architecture)
    equal = pd.Series(0.37, index=train["sample_id"])
    weighted, weighted_result = trained(train, validation, architecture=architecture, scores=equal)
    assert same(plain, weighted)
    pd.testing.assert_frame_equal(plain_result.history, weighted_result.history)
    assert not same(plain, weights_of(tiny_pair(architecture).model))


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_best_weights_are_kept(architecture, train, validation):
    pair = tiny_pair(architecture)
    result = fine_tune(pair, train, validation, TrainingSettings(epochs=4, batch_size=8, learning_rate=3e-2, patience=20))
    ndcg = result.history["ndcg@10"][1:]
    assert result.best == ndcg.max() and ndcg.iloc[-1] < result.best - 1e-6  # so the last weights are not the best ones
    kept = evaluate(validation, predict(pair, validation), probabilities=predict(pair, validation)).summary
    assert kept["ndcg@10"] == pytest.approx(result.best, abs=1e-9)
    row = result.history.loc[ndcg.idxmax()]
    assert kept["log_loss"] == pytest.approx(row["log_loss"], rel=1e-6)
    assert not result.stopped_early


def test_training_stops_when_nothing_improves(train, validation):
    settings = dict(epochs=5, learning_rate=1e-12, evaluations_per_epoch=2)
    for patience in (1, 3):
        _, result = trained(train, validation, patience=patience, **settings)
        assert result.stopped_early and result.history["step"].iloc[-1] == 2 * (1 + patience)
    _, result = trained(train, validation, patience=50, **settings)
    assert not result.stopped_early and result.history["step"].iloc[-1] == 20


def test_the_history_has_a_row_per_evaluation(train, validation):
    _, result = trained(train, validation, epochs=3)
    history = result.history
    assert history.columns.tolist() == ["step", "epoch", "loss", "ndcg@10", "log_loss"]
    assert history["step"].tolist() == [0, 2, 4, 6, 8, 10, 12] and history["epoch"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    start = predict(tiny_pair(), validation)
    before = evaluate(validation, start, probabilities=start).summary
    assert history.loc[0, "ndcg@10"] == pytest.approx(before["ndcg@10"], abs=1e-9)
    assert history.loc[0, "log_loss"] == pytest.approx(before["log_loss"], rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_what_it_is_shown(architecture, loss, train):
    """Fitted to thirty pairs, which also validate: the pairs with label 1 end up above the others."""
    pair = tiny_pair(architecture, dropout=0.0)
    before = evaluate(train, predict(pair, train)).summary["auc"]
    fine_tune(
        pair, train, train, TrainingSettings(epochs=15, batch_size=8, learning_rate=3e-3, loss=loss, evaluations_per_epoch=1, patience=100)
    )
    after = evaluate(train, predict(pair, train)).summary["auc"]
    assert after > 0.9 > before
    assert not any(module.training for module in pair.model.modules())


# --- what is left behind ----------------------------------------------------------------------------------------------------------------


def test_no_files_are_left_behind_and_standard_output_is_quiet(train, validation, tmp_path, monkeypatch, capfd):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir(), temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    pair = tiny_pair()
    fine_tune(pair, train, validation, TrainingSettings(**SETTINGS), description="a tiny run")
    assert not list(here.iterdir()) and not list(temporary.iterdir())
    out, err = capfd.readouterr()
    assert out == "" and "a tiny run" in err and "8/8" in err and "ndcg@10" in err


def test_checkpoints_stay_where_they_are_asked_for(train, validation, tmp_path):
    pair = tiny_pair()
    result = fine_tune(pair, train, validation, TrainingSettings(**SETTINGS), folder=tmp_path)
    assert 1 <= len(list(tmp_path.glob("checkpoint-*"))) <= 2
    best = result.history["step"][1:][result.history["ndcg@10"][1:] == result.best].iloc[0]
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"), weights_of(pair.model))


def test_frames_and_scores_are_left_alone(train, validation, scores):
    frames = [train.copy(), validation.copy(), scores.copy()]
    trained(train, validation, scores=scores)
    pd.testing.assert_frame_equal(train, frames[0])
    pd.testing.assert_frame_equal(validation, frames[1])
    pd.testing.assert_series_equal(scores, frames[2])


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("train", dict(text_b=" "), "'text_b' has 0 missing and 30 invalid of 30 rows"),
        ("train", dict(label=float("nan")), "'label' has 30 missing"),
        ("train", dict(label=3.0), r"labels? .*\[0, 1\]"),
        ("validation", dict(text_a=None), "'text_a' has 40 missing"),
        ("validation", dict(label=3.0), r"labels must be in \[0, 1\]"),
        ("validation", dict(label=0.0), "relevant"),
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


def test_weights_are_those_of_the_weighting_in_the_order_of_the_frame(train, scores):
    weighting = Weighting(exponent=0.5, clip=3)
    shuffled = train.sample(frac=1, random_state=1)
    weights = sample_weights(shuffled, scores, weighting)
    raw = np.minimum(np.sqrt(scores.loc[shuffled["sample_id"]].to_numpy()), np.inf)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({name: 0}, f"{name} must be 1 or more, got 0")
            for name in ("epochs", "batch_size", "max_length", "evaluations_per_epoch", "patience")
        ],
        (dict(learning_rate=0.0), "expected learning_rate > 0"),
        (dict(learning_rate=float("nan")), "expected learning_rate > 0"),
        (dict(learning_rate=float("inf")), "learning_rate"),
        (dict(warmup=1.0), "0 <= warmup < 1"),
        (dict(warmup=-0.1), "0 <= warmup < 1"),
        (dict(warmup=float("nan")), "0 <= warmup < 1"),
        (dict(weight_decay=-0.1), "weight_decay >= 0"),
        (dict(weight_decay=float("nan")), "weight_decay >= 0"),
        (dict(loss="hinge"), "loss must be one of cross_entropy, squared_error, got 'hinge'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**change)


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
