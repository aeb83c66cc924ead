"""sentence-transformers: values of its losses per row, scores and training, all against the library's own code on one row at a time."""

import gc
import inspect
import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.cross_encoder import losses as pair_losses
from sentence_transformers.sentence_transformer import losses as tower_losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny import tiny_config, tiny_tokenizer
from transformers import BertForSequenceClassification, BertModel, TrainerCallback

import recsys_importance.sentence_transformers as importance
from recsys_importance.gradients import largest_error, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.sentence_transformers import SampleLosses, importance_trainer, score

QUERIES = ["red mug", "usb cable hub", "wool hat", "blue lamp of steel"]
FIRST = ["a red cup", "printer", "warm hat with glass", "small lamp"]
SECOND = ["desk", "usb cable", "red", "large"]
THIRD = ["green", "tea", "tea pot", "sock"]
DOCUMENTS = [["red cup", "tea"], ["printer"], ["hat", "sock", "desk", "usb"], ["lamp", "lamp set"]]
GRADES = [torch.tensor([1.0, 0.0]), torch.tensor([1.0]), torch.tensor([0.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0])]
SIMILAR = torch.tensor([1.0, 0.0, 0.5, 1.0])
CLASSES = torch.tensor([0, 2, 1, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    gc.freeze()  # the trainer collects garbage after each run; what the imports left need not be looked through
    yield tmp_path_factory.mktemp("models")
    gc.unfreeze()


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def saved(make, folder):
    """The folder of a random model, written at the first call."""
    if not folder.exists():
        seeded(make).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def ranker(folder, classes=1, dropout=0.0):
    config = tiny_config(dropout=dropout, num_labels=classes)
    return CrossEncoder(saved(lambda: BertForSequenceClassification(config), folder / f"ranker{classes}{dropout}"), device="cpu")


def towers(folder):
    encoder = Transformer(saved(lambda: BertModel(tiny_config(dropout=0.0)), folder / "towers"))
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cpu")


def drawn(*shape):
    return torch.tensor(np.random.default_rng(0).normal(size=shape), dtype=torch.float32)


# name: (loss of a model, text columns, labels); `r` ranks pairs, `c` has three classes, `t` are two towers.
PAIRS = {
    "BinaryCrossEntropyLoss": ("r", pair_losses.BinaryCrossEntropyLoss, [QUERIES, FIRST], SIMILAR),
    "BinaryCrossEntropyLoss, positives count three times": (
        "r",
        lambda model: pair_losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(3.0)),
        [QUERIES, FIRST],
        SIMILAR,
    ),
    "CrossEntropyLoss": ("c", pair_losses.CrossEntropyLoss, [QUERIES, FIRST], CLASSES),
    "CrossEntropyLoss, smoothed": ("c", lambda m: pair_losses.CrossEntropyLoss(m, label_smoothing=0.1), [QUERIES, FIRST], CLASSES),
    "MSELoss": ("r", pair_losses.MSELoss, [QUERIES, FIRST], SIMILAR),
    "MarginMSELoss": ("r", pair_losses.MarginMSELoss, [QUERIES, FIRST, SECOND], SIMILAR),
    "MarginMSELoss, two negatives": ("r", pair_losses.MarginMSELoss, [QUERIES, FIRST, SECOND, THIRD], list(drawn(4, 3))),
    "ListNetLoss": ("r", pair_losses.ListNetLoss, [QUERIES, DOCUMENTS], GRADES),
    "ListMLELoss": ("r", pair_losses.ListMLELoss, [QUERIES, DOCUMENTS], GRADES),
    "PListMLELoss": ("r", lambda m: pair_losses.PListMLELoss(m, respect_input_order=False), [QUERIES, DOCUMENTS], GRADES),
    "ADRMSELoss, lists of one length": (
        "r",
        pair_losses.ADRMSELoss,
        [QUERIES, [list(pair) for pair in zip(FIRST, SECOND, strict=True)]],
        list(drawn(4, 2)),
    ),
}
TOWERS = {
    "CosineSimilarityLoss": ("t", tower_losses.CosineSimilarityLoss, [QUERIES, FIRST], SIMILAR),
    "ContrastiveLoss": ("t", tower_losses.ContrastiveLoss, [QUERIES, FIRST], torch.tensor([1, 0, 0, 1])),
    "TripletLoss": ("t", tower_losses.TripletLoss, [QUERIES, FIRST, SECOND], None),
    "MarginMSELoss of towers": ("t", tower_losses.MarginMSELoss, [QUERIES, FIRST, SECOND], SIMILAR),
    "MarginMSELoss of towers, two negatives": ("t", tower_losses.MarginMSELoss, [QUERIES, FIRST, SECOND, THIRD], drawn(4, 3)),
    "MSELoss of towers": ("t", tower_losses.MSELoss, [QUERIES], drawn(4, 32)),
    "EmbedDistillLoss": ("t", tower_losses.EmbedDistillLoss, [QUERIES, FIRST], drawn(4, 2, 32)),
    "DistillKLDivLoss": ("t", tower_losses.DistillKLDivLoss, [QUERIES, FIRST, SECOND], drawn(4, 2)),
    "SoftmaxLoss": ("t", lambda m: seeded(lambda: tower_losses.SoftmaxLoss(m, 32, 3)), [QUERIES, FIRST], CLASSES),
    "MatryoshkaLoss": (
        "t",
        lambda model: tower_losses.MatryoshkaLoss(model, tower_losses.CosineSimilarityLoss(model), [32, 16, 8]),
        [QUERIES, FIRST],
        SIMILAR,
    ),
    "MatryoshkaLoss of embeddings": (
        "t",
        lambda model: tower_losses.MatryoshkaLoss(model, tower_losses.MSELoss(model), [32, 8]),
        [QUERIES],
        drawn(4, 32),
    ),
}


def made(folder, kind, make):
    model = {"r": lambda: ranker(folder), "c": lambda: ranker(folder, classes=3), "t": lambda: towers(folder)}[kind]()
    return model, make(model)


def library_value(loss, columns, labels):
    """The library's own loss of these rows, as its trainer calls it."""
    if isinstance(loss.model, CrossEncoder):
        return loss([list(column) for column in columns], labels)
    return loss([loss.model.preprocess(column) for column in columns], labels)


def gradient_of(value, parameters):
    """The gradient of a scalar by autograd, as one vector."""
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)])


def library_rows(loss, columns, labels):
    """The same for each row alone."""
    rows = [slice(i, i + 1) for i in range(len(columns[0]))]
    return torch.stack([library_value(loss, [c[row] for c in columns], None if labels is None else labels[row]) for row in rows])


@pytest.mark.parametrize("name", [*PAIRS, *TOWERS])
def test_rows_and_their_mean_are_the_librarys_and_the_engine_is_exact(name, folder):
    kind, make, columns, labels = (PAIRS | TOWERS)[name]
    model, loss = made(folder, kind, make)
    losses = SampleLosses(loss)
    batch = losses.from_texts(columns, labels)
    rows = losses(losses.model, batch)
    torch.testing.assert_close(rows, library_rows(loss, columns, labels), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.mean(), library_value(loss, columns, labels), rtol=1e-6, atol=1e-6)
    assert largest_error(losses.model, losses, batch) < 1e-10


@pytest.mark.parametrize("name", [*PAIRS, *TOWERS])
def test_the_weighted_step_is_autograds_of_the_librarys_rows(name, folder):
    kind, make, columns, labels = (PAIRS | TOWERS)[name]
    model, loss = made(folder, kind, make)
    losses = SampleLosses(loss)
    losses.model.train()
    found = weighted_backward(losses.model, losses, losses.from_texts(columns, labels), Weighting())
    parameters = [p for p in losses.model.parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    expected = gradient_of((found.weights * library_rows(loss, columns, labels)).mean(), parameters)
    assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max()


def test_negatives_that_are_given_are_a_softmax_over_the_row(folder):
    model = towers(folder)
    losses = SampleLosses(tower_losses.MultipleNegativesRankingLoss(model, scale=5.0), given_negatives=True)
    batch = losses.from_texts([QUERIES, FIRST, SECOND, THIRD])
    texts = (QUERIES, FIRST, SECOND, THIRD)
    query, *others = [torch.nn.functional.normalize(model(model.preprocess(x))["sentence_embedding"]) for x in texts]
    logits = 5 * torch.stack([(query * other).sum(1) for other in others], 1)
    torch.testing.assert_close(losses(model, batch), -logits.log_softmax(1)[:, 0])
    assert largest_error(model, losses, batch) < 1e-10

    model = ranker(folder)
    losses = SampleLosses(pair_losses.MultipleNegativesRankingLoss(model), given_negatives=True)
    batch = losses.from_texts([QUERIES, FIRST, SECOND])
    logits = torch.cat([model(model.preprocess(list(zip(QUERIES, x, strict=True))))["scores"] for x in (FIRST, SECOND)], 1)
    torch.testing.assert_close(losses(model, batch), -(10 * logits.sigmoid()).log_softmax(1)[:, 0])
    assert largest_error(model, losses, batch) < 1e-10
    with pytest.raises(ValueError, match="needs a column of negatives"):
        losses(model, losses.from_texts([QUERIES, FIRST]))


def test_a_head_kept_in_float32_and_a_square_batch_of_tokens_are_exact(folder):
    model = ranker(folder)
    model.set_keep_in_fp32_modules(["0.model.classifier"])
    losses = SampleLosses(pair_losses.BinaryCrossEntropyLoss(model))
    batch = losses.from_texts([["red mug"] * 6, ["tea"] * 6], torch.linspace(0, 1, 6))
    assert batch["0.input_ids"].shape == (6, 6)
    assert largest_error(model, losses, batch) < 1e-6  # the head rounds to float32


# What is refused ------------------------------------------------------------------------------------------------------------------------


def classes_of(losses):
    for name in losses.__all__:
        kind = getattr(losses, name)
        if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and "Loss" in name and not name.endswith("Scheme"):
            yield kind


ALL = [*classes_of(pair_losses), *classes_of(tower_losses)]


def test_every_loss_of_the_library_is_told_to_be_per_row_or_not():
    names = {kind.__name__ for kind in ALL}
    assert names == importance._BY_ROW | set(importance._COUPLED)
    assert not importance._BY_ROW & set(importance._COUPLED)
    tested = {name.split(",")[0].split(" of ")[0] for name in (*PAIRS, *TOWERS)}
    assert tested == importance._BY_ROW


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.__name__ in importance._COUPLED], ids=lambda kind: kind.__name__)
def test_a_loss_that_couples_rows_is_refused_with_the_way_round(kind, folder):
    loss = kind.__new__(kind)
    torch.nn.Module.__init__(loss)
    loss.model = towers(folder)
    with pytest.raises(ValueError, match=rf"{kind.__name__} has no value per row: it .*\. Instead, "):
        SampleLosses(loss)
    inside = tower_losses.MatryoshkaLoss(loss.model, loss, [8])
    with pytest.raises(ValueError, match=kind.__name__):
        SampleLosses(inside)


@pytest.mark.parametrize(
    "kind, make, setting",
    [
        ("r", lambda m: pair_losses.BinaryCrossEntropyLoss(m, reduction="sum"), "reduction='sum'"),
        ("r", lambda m: pair_losses.BinaryCrossEntropyLoss(m, weight=torch.ones(4)), "weight"),
        ("r", lambda m: pair_losses.MSELoss(m, reduction="none"), "reduction='none'"),
        ("c", lambda m: pair_losses.CrossEntropyLoss(m, weight=torch.tensor([1.0, 2.0, 3.0])), "weight"),
        ("t", lambda m: tower_losses.ContrastiveLoss(m, size_average=False), "size_average=False"),
        ("t", lambda m: tower_losses.CosineSimilarityLoss(m, loss_fct=torch.nn.MSELoss(reduction="sum")), "reduction='sum'"),
        ("t", lambda m: tower_losses.MatryoshkaLoss(m, tower_losses.TripletLoss(m), [16, 8], n_dims_per_step=1), "n_dims_per_step"),
    ],
)
def test_a_setting_that_couples_rows_is_refused(kind, make, setting, folder):
    with pytest.raises(ValueError, match=f"with {setting} is not the mean"):
        SampleLosses(made(folder, kind, make)[1])


def test_a_batch_whose_value_is_no_mean_is_refused(folder):
    model = ranker(folder)
    losses = SampleLosses(pair_losses.ADRMSELoss(model))
    with pytest.raises(ValueError, match="ADRMSELoss is .* it couples the rows"):
        losses(model, losses.from_texts([QUERIES, DOCUMENTS], GRADES))


class Custom(torch.nn.Module):
    """A user's loss: the cross-entropies of pairs, made one number by `reduce`."""

    def __init__(self, model, reduce):
        super().__init__()
        self.model, self.reduce = model, reduce

    def forward(self, inputs, labels):
        scores = self.model(self.model.preprocess(list(zip(*inputs, strict=True))))["scores"].view(-1)
        return self.reduce(torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="none"))


class Subclass(pair_losses.LambdaLoss):
    """Another name does not help."""


@pytest.mark.parametrize(
    "reduce, message",
    [
        (torch.max, "it couples the rows"),
        (torch.sum, "it couples the rows"),
        (lambda x: x.mean() + x.max() - x.max().detach(), "gradient"),  # the value of a mean, another gradient
        (lambda x: x.mean() + 1e-9 * x.std(correction=0).log(), "it couples the rows"),  # no value for one row
        (lambda x: {"a": x.mean(), "b": x.max()}, "returned dict"),
    ],
)
def test_an_unknown_loss_that_couples_rows_is_refused_when_it_runs(reduce, message, folder):
    model = ranker(folder)
    losses = SampleLosses(Custom(model, reduce))
    with pytest.raises(ValueError, match=message):
        losses(model, losses.from_texts([QUERIES, FIRST], SIMILAR))


def test_an_unknown_loss_that_is_a_mean_over_rows_is_taken(folder):
    model = ranker(folder)
    loss = Custom(model, torch.mean)
    losses = SampleLosses(loss)
    batch = losses.from_texts([QUERIES, FIRST], SIMILAR)
    torch.testing.assert_close(losses(model, batch), library_rows(loss, [QUERIES, FIRST], SIMILAR))
    assert largest_error(model, losses, batch) < 1e-10
    with pytest.raises(ValueError, match="document pairs"):
        SampleLosses(Subclass(model))


def test_what_is_no_loss_of_these_models_is_one_error(folder):
    model = towers(folder)
    with pytest.raises(ValueError, match="CrossEncoder or SentenceTransformer, got Linear with NoneType"):
        SampleLosses(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="parameters of its own"):
        SampleLosses(tower_losses.EmbedDistillLoss(model, projection_dim=8))
    with pytest.raises(ValueError, match="is for MultipleNegativesRankingLoss"):
        SampleLosses(tower_losses.TripletLoss(model), given_negatives=True)
    losses = SampleLosses(tower_losses.TripletLoss(model))
    packed = {"input_ids": torch.zeros(1, 12, dtype=torch.int64), "lengths": torch.tensor([3, 4, 5])}
    with pytest.raises(ValueError, match="a row per sample"):
        losses.from_features([packed])
    pairs = SampleLosses(pair_losses.ListNetLoss(ranker(folder)))
    with pytest.raises(ValueError, match="'usb cable hub' has no documents"):
        pairs.from_texts([QUERIES, [["tea"], [], ["hat"], ["lamp"]]], GRADES)


# Scores ---------------------------------------------------------------------------------------------------------------------------------


def rows_of(count=6, name="label"):
    words = ["red mug", "usb cable", "wool hat", "steel lamp", "tea pot", "glass desk"]
    pairs = itertools.islice(itertools.product(words, words), count)
    return [{"query": a, "title": f"set of {b}", name: float(a == b)} for a, b in pairs]


def norms_by_library(loss, rows):
    """The norm of each row's gradient by autograd through the library's own loss."""
    loss.model.eval()
    found = []
    for row in rows:
        value = library_value(loss, [[row["query"]], [row["title"]]], torch.tensor([row["label"]]))
        found.append(float(gradient_of(value, list(loss.model.parameters())).double().norm()))
    return found


@pytest.mark.parametrize(
    "make", [lambda f: pair_losses.BinaryCrossEntropyLoss(ranker(f, dropout=0.1)), lambda f: tower_losses.CosineSimilarityLoss(towers(f))]
)
def test_scores_are_the_norms_of_the_librarys_rows_whatever_holds_them(make, folder):
    loss, rows = make(folder), rows_of()
    loss.model.train()
    dataset = Dataset.from_list(rows)
    scores = score(loss.model, loss, dataset, batch_size=4, progress=False)
    assert loss.model.training and list(scores.columns) == ["sample_id", "score"]
    assert scores["sample_id"].tolist() == [str(i) for i in range(6)]
    for same in (rows, pd.DataFrame(rows), dataset.rename_column("label", "score")):
        pd.testing.assert_frame_equal(scores, score(loss.model, loss, same, batch_size=4, progress=False))
    np.testing.assert_allclose(scores["score"], norms_by_library(loss, rows), rtol=1e-4)


def test_rows_are_named_and_columns_chosen(folder):
    loss = pair_losses.BinaryCrossEntropyLoss(ranker(folder))
    frame = pd.DataFrame(rows_of()).assign(sample_id=list("abcdef"), shop="x", query_id=range(6))
    options = dict(progress=False, batch_size=4)
    scores = score(loss.model, loss, frame, columns=["query", "title"], **options)
    assert scores["sample_id"].tolist() == list("abcdef")
    by_query = score(loss.model, loss, frame, columns=["query", "title"], sample_id="query_id", **options)
    assert by_query["sample_id"].tolist() == list("012345")
    swapped = score(loss.model, loss, frame, columns=["title", "query"], **options)
    assert not np.allclose(swapped["score"], scores["score"])
    with pytest.raises(ValueError, match="'query_id' looks like an identifier"):
        score(loss.model, loss, frame.drop(columns="shop"), **options)
    with pytest.raises(ValueError, match="no column 'text'"):
        score(loss.model, loss, frame, columns=["text"], **options)


def test_lists_of_documents_and_prompts_are_scored(folder):
    model = ranker(folder)
    rows = [{"query": q, "docs": d, "labels": g.tolist()} for q, d, g in zip(QUERIES, DOCUMENTS, GRADES, strict=True)]
    loss = pair_losses.ListNetLoss(model)
    scores = score(model, loss, Dataset.from_list(rows), progress=False)["score"]
    assert scores[1] == 0 and (scores[[0, 2, 3]] > 0).all()  # one document has no order
    model.eval()
    expected = gradient_of(library_value(loss, [QUERIES[2:3], DOCUMENTS[2:3]], GRADES[2:3]), list(model.parameters())).norm()
    assert scores[2] == pytest.approx(float(expected), rel=1e-4)

    model = towers(folder)
    loss, plain = tower_losses.CosineSimilarityLoss(model), rows_of()
    prompted = [row | {"query": "red " + row["query"]} for row in plain]
    by_prompt = score(model, loss, plain, prompts={"query": "red "}, progress=False)["score"]
    np.testing.assert_allclose(by_prompt, score(model, loss, prompted, progress=False)["score"], rtol=1e-4)
    with pytest.raises(ValueError, match="prompts by column"):
        score(model, loss, plain, prompts={"text": "red "}, progress=False)


def test_a_classifier_of_the_loss_is_counted(folder):
    loss = tower_losses.SoftmaxLoss(towers(folder), 32, 3)
    rows = [row | {"label": i % 3} for i, row in enumerate(rows_of())]
    every = score(loss.model, loss, rows, progress=False)["score"]
    encoder = score(loss.model, loss, rows, progress=False, parameters="model.*")["score"]
    head = score(loss.model, loss, rows, progress=False, parameters="classifier.*")["score"]
    np.testing.assert_allclose(every**2, encoder**2 + head**2, rtol=1e-4)
    assert (head > 0).all()


def test_a_folder_of_scores_belongs_to_the_losss_settings(folder, tmp_path):
    model, rows = towers(folder), rows_of()
    once = score(model, tower_losses.ContrastiveLoss(model), rows, tmp_path / "scores", progress=False)
    again = score(model, tower_losses.ContrastiveLoss(model), rows, tmp_path / "scores", progress=False)
    pd.testing.assert_frame_equal(once, again)
    metric = tower_losses.SiameseDistanceMetric.EUCLIDEAN  # a lambda, as the default is
    for other in (dict(margin=0.4), dict(distance_metric=metric)):
        with pytest.raises(ValueError, match="another run"):
            score(model, tower_losses.ContrastiveLoss(model, **other), rows, tmp_path / "scores", progress=False)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"train": rows_of()}, "one after the other"),
        (IterableDataset.from_generator(lambda: iter(rows_of())), "no length"),
        ([*rows_of(2), {"query": None, "title": "hat", "label": 0.0}], "sample '2' has None in column 'query'"),
        ([*rows_of(2), {"query": "hat", "title": "hat", "label": float("nan")}], "NaN"),
        ([], "no samples"),
    ],
)
def test_rows_that_cannot_be_scored_are_one_error(rows, message, folder):
    loss = pair_losses.BinaryCrossEntropyLoss(ranker(folder))
    with pytest.raises(ValueError, match=message):
        score(loss.model, loss, rows, progress=False)


def test_a_loss_of_another_model_is_refused(folder):
    with pytest.raises(ValueError, match="made for another model"):
        score(ranker(folder), pair_losses.BinaryCrossEntropyLoss(ranker(folder)), rows_of())


# Training -------------------------------------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Counts steps."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def train(kind, model, loss, dataset, folder, *, arguments=None, stock=False, **options):
    """Train with the library's trainer or with ours; returns the trainer."""
    arguments = dict(per_device_train_batch_size=4, max_steps=3, optim="sgd", learning_rate=0.5, max_grad_norm=0.0) | (arguments or {})
    plain = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, seed=1, lr_scheduler_type="constant")
    trainer, settings = {
        "pairs": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
        "towers": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    }[kind]
    trainer = trainer if stock else importance_trainer(trainer)
    run = trainer(model=model, args=settings(str(folder), **plain | arguments), train_dataset=dataset, loss=loss, **options)
    run.train()
    return run


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def model_and_loss(kind, folder):
    if kind == "pairs":
        model = ranker(folder)
        return model, pair_losses.BinaryCrossEntropyLoss(model)
    model = towers(folder)
    return model, tower_losses.CosineSimilarityLoss(model)


@pytest.mark.parametrize("kind", ["pairs", "towers"])
@pytest.mark.parametrize("uniform", [dict(weighting=Weighting(exponent=0)), dict(weights=np.ones(12))])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_uniform_weights_train_what_the_librarys_trainer_trains(kind, uniform, micro_batches, folder, tmp_path):
    dataset = Dataset.from_list(rows_of(12))
    arguments = dict(per_device_train_batch_size=2 if micro_batches > 1 else 4, gradient_accumulation_steps=micro_batches)
    (plain, loss), (ours, same) = model_and_loss(kind, folder), model_and_loss(kind, folder)
    before = weights_of(plain)
    stock = train(kind, plain, loss, dataset, tmp_path, arguments=arguments, stock=True)
    run = train(kind, ours, same, dataset, tmp_path, arguments=arguments, **uniform)
    moved = (weights_of(plain) - before).abs().max()
    assert moved > 1e-3 and (weights_of(plain) - weights_of(ours)).abs().max() < 1e-4 * moved
    logged = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (stock, run)]
    np.testing.assert_allclose(*logged, rtol=1e-3)
    assert [entry["effective_share"] for entry in run.state.log_history if "loss" in entry] == pytest.approx([1, 1, 1])


def test_a_step_is_weighted_by_the_norms_of_its_rows(folder, tmp_path):
    model, loss = model_and_loss("pairs", folder)
    rows = rows_of(4)
    norms = np.array(norms_by_library(loss, rows))
    before = weights_of(model)
    columns = [[row["query"] for row in rows], [row["title"] for row in rows]]
    values = library_rows(loss, columns, torch.tensor([row["label"] for row in rows]))
    mean = (torch.tensor(norms / norms.mean(), dtype=torch.float32) * values).mean()
    expected = before - 0.5 * gradient_of(mean, list(model.parameters()))
    run = train("pairs", model, loss, Dataset.from_list(rows), tmp_path, arguments=dict(max_steps=1), weighting=Weighting())
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sorted(run.seen.weights.numpy()), sorted(norms / norms.mean()), rtol=1e-3)
    assert run.seen.exact and float(run.seen.loss) == pytest.approx(float(mean.detach()), rel=1e-4)


@pytest.mark.parametrize("given", ["array", "column"])
def test_given_weights_go_with_their_rows(given, folder, tmp_path):
    rows = rows_of(4)
    weights = np.array([0.0, 1.0, 2.0, 1.0])
    dataset, kept = Dataset.from_list(rows), Dataset.from_list([rows[1], rows[2], rows[2], rows[3]])
    (ours, loss), (plain, same) = model_and_loss("towers", folder), model_and_loss("towers", folder)
    options = dict(weights=weights)
    if given == "column":
        dataset, options = dataset.add_column("trust", weights), dict(weights="trust", eval_dataset=dataset.add_column("trust", weights))
    run = train("towers", ours, loss, dataset, tmp_path, arguments=dict(max_steps=1), **options)
    train("towers", plain, same, kept, tmp_path, arguments=dict(max_steps=1), stock=True)
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=1e-4, atol=1e-6)
    if given == "column":
        assert run.evaluate()["eval_loss"] > 0


def test_several_data_sets_each_with_its_loss(folder, tmp_path):
    def parts():
        rows = rows_of(8)
        triples = [{"anchor": r["query"], "positive": r["title"], "negative": "red sock"} for r in rows]
        return {"graded": Dataset.from_list(rows), "triples": Dataset.from_list(triples)}

    def losses(model):
        return {"graded": tower_losses.CosineSimilarityLoss(model), "triples": tower_losses.TripletLoss(model)}

    plain, ours, weighted = towers(folder), towers(folder), towers(folder)
    train("towers", plain, losses(plain), parts(), tmp_path, stock=True)
    train("towers", ours, losses(ours), parts(), tmp_path, weighting=Weighting(exponent=0))
    ones = {"graded": np.ones(8), "triples": np.ones(8)}
    train("towers", weighted, losses(weighted), parts(), tmp_path, weights=ones)
    for model in (ours, weighted):
        torch.testing.assert_close(weights_of(plain), weights_of(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a dictionary with the same names: graded, triples"):
        train("towers", weighted, losses(weighted), parts(), tmp_path, weights=np.ones(16))


def test_samplers_evaluators_callbacks_and_prompts_stay_the_librarys(folder, tmp_path):
    grades = [*SIMILAR.tolist(), 0, 1, 0, 0.5]
    rows = [{"sentence1": q, "sentence2": d, "score": s} for q, d, s in zip(QUERIES * 2, FIRST + SECOND, grades, strict=True)]
    evaluator = EmbeddingSimilarityEvaluator(QUERIES, FIRST, SIMILAR.tolist(), name="toy")
    arguments = dict(eval_strategy="steps", eval_steps=1, max_steps=2)
    arguments |= dict(batch_sampler=BatchSamplers.NO_DUPLICATES, prompts={"sentence1": "red "})
    models = []
    for options in (dict(stock=True), dict(weights=np.ones(8)), dict(weighting=Weighting(exponent=0))):
        model, steps = towers(folder), Steps()
        options |= dict(arguments=arguments, evaluator=evaluator, callbacks=[steps])
        run = train("towers", model, tower_losses.CosineSimilarityLoss(model), Dataset.from_list(rows), tmp_path, **options)
        assert steps.seen == [1, 2] and sum("eval_toy_spearman_cosine" in entry for entry in run.state.log_history) == 2
        models.append(weights_of(model))
    for other in models[1:]:
        torch.testing.assert_close(models[0], other, rtol=1e-4, atol=1e-5)


def test_dropout_bfloat16_and_a_loss_with_a_classifier(folder, tmp_path):
    model = ranker(folder, dropout=0.1)
    loss = pair_losses.BinaryCrossEntropyLoss(model)
    run = train("pairs", model, loss, Dataset.from_list(rows_of(12)), tmp_path, arguments=dict(bf16=True))
    assert torch.isfinite(weights_of(model)).all() and abs(float(run.seen.weights.mean()) - 1) < 1e-3
    model = towers(folder)
    loss = seeded(lambda: tower_losses.SoftmaxLoss(model, 32, 3))
    before = loss.classifier.weight.detach().clone()
    rows = [row | {"label": i % 3} for i, row in enumerate(rows_of(12))]
    train("towers", model, loss, Dataset.from_list(rows), tmp_path, weighting=Weighting())
    assert (loss.classifier.weight - before).abs().max() > 1e-4


def test_lists_of_documents_train(folder, tmp_path):
    rows = [{"query": q, "docs": d, "labels": g.tolist()} for q, d, g in zip(QUERIES, DOCUMENTS, GRADES, strict=True)]
    plain, ours = ranker(folder), ranker(folder)
    train("pairs", plain, pair_losses.ListMLELoss(plain), Dataset.from_list(rows), tmp_path, stock=True)
    train("pairs", ours, pair_losses.ListMLELoss(ours), Dataset.from_list(rows), tmp_path, weighting=Weighting(exponent=0))
    torch.testing.assert_close(weights_of(plain), weights_of(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weights=np.ones(3)), r"one weight per row of the training data .*, 12, got shape \(3,\)"),
        (dict(weights=[1.0] * 11 + [-1.0]), "0 or more, got -1.0 for row 11"),
        (dict(weights=[float("nan")] * 12), "0 or more, got nan for row 0"),
        (dict(weights="trust"), "no column 'trust'"),
        (dict(weights=np.ones(12), weighting=Weighting()), "not both"),
        (dict(loss=None), "CoSENTLoss has no value per row"),
        (dict(arguments=dict(torch_compile=True)), "one process and one device"),
    ],
)
def test_settings_that_do_not_fit_are_one_error_before_training(options, message, folder, tmp_path):
    model, loss = model_and_loss("towers", folder)
    with pytest.raises(ValueError, match=message):
        train("towers", model, options.pop("loss", loss), Dataset.from_list(rows_of(12)), tmp_path, **options)


# The extra ------------------------------------------------------------------------------------------------------------------------------


def test_the_classes_have_names_and_the_extra_is_asked_for(monkeypatch):
    from recsys_importance.sentence_transformers import ImportanceCrossEncoderTrainer, ImportanceSentenceTransformerTrainer

    assert issubclass(ImportanceCrossEncoderTrainer, CrossEncoderTrainer)
    assert ImportanceCrossEncoderTrainer.__name__ == "ImportanceCrossEncoderTrainer"
    assert ImportanceSentenceTransformerTrainer is importance_trainer(SentenceTransformerTrainer)
    with pytest.raises(ImportError):
        from recsys_importance.sentence_transformers import ImportanceTrainer  # noqa: F401
    with pytest.raises(ValueError, match="a trainer class of sentence-transformers"):
        importance_trainer(torch.nn.Linear)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"recsys_importance\[sentence\]"):
        importance._library()
