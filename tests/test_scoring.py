"""Scores of a whole data set are the batches' norms, survive every kind of interruption, and are refused where they would mislead."""

import errno
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from tiny import perceptron, points, residual, tiny_frame, tiny_pair

from recsys_importance import scoring
from recsys_importance.gradients import gradient_norms
from recsys_importance.models import PairCollator, PairDataset
from recsys_importance.objectives import cross_entropy, squared_error
from recsys_importance.reference import gradient_norms_by_loop, one_sample
from recsys_importance.scoring import read_scores, score_dataset, write_scores


def absolute(model, batch):
    """|prediction - y| per sample."""
    return (model(batch["x"])[:, 0] - batch["y"]).abs()


class Points:
    """The samples of `points` as a data set; reading `fails_at` raises."""

    def __init__(self, count: int = 22, *, fails_at: int | None = None, **columns):
        self.columns = points(count, seed=5) | {"sample_id": [f"s{i:03d}" for i in range(count)]} | columns
        self.fails_at = fails_at

    def __len__(self):
        return len(self.columns["sample_id"])

    def __getitem__(self, row):
        if row == self.fails_at:
            raise InterruptedError
        return {name: values[row] for name, values in self.columns.items()}


def stack(rows):
    return {name: [row[name] for row in rows] if name == "sample_id" else torch.stack([row[name] for row in rows]) for name in rows[0]}


SETTINGS = dict(batch_size=3, shard_size=8, progress=False)


def score_points(folder, dataset=None, *, model=None, loss=residual, collate=stack, **changes):
    return score_dataset(model or perceptron(), loss, Points() if dataset is None else dataset, collate, folder, **SETTINGS | changes)


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    score_points(folder)
    return contents(folder)


def test_scores_are_the_norms_of_the_batches(tmp_path):
    dataset, model = Points(), perceptron()
    scores = score_points(tmp_path, dataset)
    expected = []
    for start, stop in [(0, 8), (8, 16), (16, 22)]:
        for first in range(start, stop, 3):
            expected.append(gradient_norms(model, residual, stack([dataset[i] for i in range(first, min(first + 3, stop))])))
    assert scores.columns.tolist() == ["sample_id", "score"] and scores["sample_id"].tolist() == dataset.columns["sample_id"]
    assert scores["score"].dtype == np.float32 and scores["sample_id"].dtype == "str" and scores.index.tolist() == list(range(22))
    np.testing.assert_array_equal(scores["score"], torch.cat(expected))
    pd.testing.assert_frame_equal(read_scores(tmp_path), scores)


def test_pairs_are_scored_with_dropout_off_and_modes_come_back(tmp_path):
    pair, frame = tiny_pair(dropout=0.5), tiny_frame(7)
    expected = gradient_norms(pair.model, cross_entropy, PairCollator(pair)([PairDataset(frame)[i] for i in range(7)]))
    pair.model.train()
    pair.model.encoder.embeddings.eval()
    modes = [module.training for module in pair.model.modules()]
    for name, dtype, tolerance in (("narrow", None, 1e-4), ("wide", torch.float64, 1e-4)):
        arguments = (pair.model, cross_entropy, PairDataset(frame), PairCollator(pair), tmp_path / name)
        scores = score_dataset(*arguments, dtype=dtype, batch_size=2, shard_size=3, progress=False)
        np.testing.assert_allclose(scores["score"], expected, rtol=tolerance)
        assert scores["score"].dtype == (np.float32 if dtype is None else np.float64)
    assert [module.training for module in pair.model.modules()] == modes
    assert all(parameter.grad is None for parameter in pair.model.parameters())


def test_the_layout_of_the_shards(tmp_path):
    score_points(tmp_path)
    assert sorted(contents(tmp_path)) == ["identity.json", "scores-00000.parquet", "scores-00001.parquet", "scores-00002.parquet"]
    sizes = [len(pd.read_parquet(tmp_path / f"scores-{shard:05d}.parquet")) for shard in range(3)]
    assert sizes == [8, 8, 6]
    identity = json.loads((tmp_path / "identity.json").read_text())
    assert identity["samples"] == 22 and identity["loss"].startswith("residual ") and identity["parameters"] == ["*"]


@pytest.mark.parametrize("fails_at", [2, 8, 12, 20])
def test_a_run_that_fails_continues_to_the_same_bytes(fails_at, tmp_path, uninterrupted):
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=fails_at))
    assert len(list(tmp_path.glob("*.parquet"))) == fails_at // 8 and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(
        ValueError, match=f"holds {fails_at // 8 * 8} of 22 scores; run score_dataset again with the same arguments to finish it"
    ):
        read_scores(tmp_path)
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_a_finished_run_is_read_and_not_computed_again(tmp_path, uninterrupted, monkeypatch):
    scores = score_points(tmp_path)
    monkeypatch.setattr(scoring, "gradient_norms", lambda *args, **kwargs: pytest.fail("a finished run was scored again"))
    pd.testing.assert_frame_equal(score_points(tmp_path), scores)
    assert contents(tmp_path) == uninterrupted


def test_losses_of_one_name_but_other_code_or_arguments_are_other_losses(tmp_path):
    score_points(tmp_path / "code", loss=lambda model, batch: residual(model, batch))
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "code", loss=lambda model, batch: residual(model, batch) ** 2)
    score_points(tmp_path / "constant", loss=lambda model, batch: residual(model, batch) * 2)
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "constant", loss=lambda model, batch: residual(model, batch) * 3)
    score_points(tmp_path / "arguments", loss=functools.partial(scaled, factor=1.0))
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "arguments", loss=functools.partial(scaled, factor=2.0))


def scaled(model, batch, factor):
    return factor * residual(model, batch)


def test_a_shard_that_is_lost_is_computed_again(tmp_path, uninterrupted):
    score_points(tmp_path)
    (tmp_path / "scores-00001.parquet").unlink()
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_scoring import Points, score_points

class Slow(Points):
    def __getitem__(self, row):
        time.sleep(0.05 if row else 0)
        return super().__getitem__(row)

score_points({folder!r}, Slow())
"""


def test_a_run_that_is_killed_continues_to_the_same_bytes(tmp_path, repository, uninterrupted):
    folder, first = tmp_path / "scores", tmp_path / "scores" / "scores-00000.parquet"
    code = KILLED.format(tests=str(repository / "tests"), folder=str(folder))
    run = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not first.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        errors = run.communicate()[1].decode()
    assert run.returncode == -signal.SIGKILL, errors
    assert first.exists() and not (folder / "scores-00002.parquet").exists()
    score_points(folder)
    assert contents(folder) == uninterrupted


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from test_scoring import score_pairs, tiny_pair

tiny_pair("cross_encoder")  # what it imports, the processes below have

def in_a_process(folder, seconds=None):
    child = os.fork()
    if not child:
        score_pairs(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

moments = random.Random({seed})
start = time.monotonic()
assert in_a_process({folder!r} + "/whole") == 0
duration = time.monotonic() - start
for name in ("/first", "/second", "/third"):
    print([in_a_process({folder!r} + name, moments.uniform(0, 0.7 * duration)) for _ in range(2)])
    assert in_a_process({folder!r} + name) == 0
"""


def score_pairs(folder):
    """A small BERT on 60 pairs in 10 shards."""
    pair = tiny_pair("cross_encoder")
    arguments = (pair.model, cross_entropy, PairDataset(tiny_frame(60)), PairCollator(pair), folder)
    return score_dataset(*arguments, batch_size=3, shard_size=6, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_do_not_change_a_byte(tmp_path, repository):
    seed = time.time_ns()
    code = KILLED_AT_RANDOM.format(tests=str(repository / "tests"), folder=str(tmp_path), seed=seed)
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert str(-signal.SIGKILL) in run.stdout, f"no run was killed: {run.stdout}"
    whole = contents(tmp_path / "whole")
    assert len(whole) == 11
    for name in ("first", "second", "third"):
        assert contents(tmp_path / name) == whole, f"seed {seed}: {run.stdout}"


def test_leftovers_of_a_kill_in_the_middle_of_writing_do_no_harm(tmp_path, uninterrupted):
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=8))
    (tmp_path / "scores-00001.parquet.tmp").write_bytes(b"PAR1 half a shard")
    with pytest.raises(ValueError, match="holds 8 of 22 scores"):
        read_scores(tmp_path)
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_leftovers_of_a_kill_before_the_first_shard_do_no_harm(tmp_path, uninterrupted):
    (tmp_path / "identity.json.tmp").write_text('{"samples": ')
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model", dict(model=perceptron(seed=1))),
        ("loss", dict(loss=absolute)),
        ("parameters", dict(parameters="3.*")),
        ("dtype", dict(dtype=torch.float64)),
        ("by_sample", dict(by_sample="3")),
        ("batch_size", dict(batch_size=4)),
        ("shard_size", dict(shard_size=9)),
        ("samples", dict(dataset=Points(21))),
    ],
)
def test_another_run_is_refused_the_folder(key, change, tmp_path):
    score_points(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=f"holds scores of another run .*{key} .* there, .* now.*; choose another folder or delete this one"
    ):
        score_points(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_folder_without_a_finished_shard_is_free(tmp_path, uninterrupted):
    with pytest.raises(ValueError, match="influence one another"):
        score_points(tmp_path, loss=from_the_mean)
    assert sorted(contents(tmp_path)) == ["identity.json"]
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_samples_of_another_name_are_refused_the_folder(tmp_path):
    score_points(tmp_path)
    with pytest.raises(ValueError, match="holds scores of another run: samples 0 to 7 had other contents"):
        score_points(tmp_path, Points(sample_id=[f"t{i:03d}" for i in range(22)]))


@pytest.mark.parametrize("column", ["x", "y"])
def test_the_same_samples_with_other_contents_are_refused_the_folder(column, tmp_path):
    """Labels with noise in them keep their sample_id: the scores of the clean ones must not pass for theirs."""
    clean = Points()
    score_points(tmp_path, clean)
    changed = clean.columns[column].clone()
    changed[4:9] += 1
    with pytest.raises(ValueError, match="another run"):
        score_points(tmp_path, Points(**{column: changed}))


@pytest.mark.parametrize(("first", "second"), [(1, 3), (1, 20)], ids=["in one shard", "in two shards"])
def test_a_sample_id_that_occurs_twice_is_refused(first, second, tmp_path):
    names = [f"s{i:03d}" for i in range(22)]
    names[second] = names[first]
    for _ in range(2):
        with pytest.raises(ValueError, match="sample_id 's001' occurs twice; scores are keyed by sample_id, so it must be unique"):
            score_points(tmp_path, Points(sample_id=names))


def test_a_score_that_is_not_finite_is_refused_and_its_shard_not_written(tmp_path):
    labels = Points().columns["y"].clone()
    labels[10] = float("inf")
    with pytest.raises(ValueError, match="norms are NaN or infinite, the first for sample 's010'"):
        score_points(tmp_path, Points(y=labels))
    assert sorted(contents(tmp_path)) == ["identity.json", "scores-00000.parquet"]
    with pytest.raises(ValueError, match="2 scores are NaN or infinite, the first for sample 's001'"):
        scorer = lambda batch: torch.tensor([1.0, float("nan"), float("inf")])  # noqa: E731
        write_scores(scorer, Points(3), stack, tmp_path / "other", identity={}, progress=False)
    assert sorted(contents(tmp_path / "other")) == ["identity.json"]


def test_an_empty_data_set_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="the data set has no samples to score"):
        score_dataset(perceptron(), residual, [], stack, tmp_path / "scores", **SETTINGS)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("change", [dict(batch_size=0), dict(shard_size=0), dict(batch_size=-1)])
def test_sizes_below_one_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="batch_size and shard_size must be 1 or more, got"):
        score_points(tmp_path / "scores", **change)
    assert not (tmp_path / "scores").exists()


def test_a_folder_without_scores(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no scores \(no identity.json\); run score_dataset first"):
        read_scores(tmp_path)


def test_any_scorer_writes_scores(tmp_path):
    scores = write_scores(lambda batch: batch["x"].norm(dim=1), Points(), stack, tmp_path, identity={"score": "length"}, **SETTINGS)
    np.testing.assert_allclose(scores["score"], Points().columns["x"].norm(dim=1), rtol=1e-6)
    with pytest.raises(ValueError, match="score 'length' there, 'other' now"):
        write_scores(lambda batch: batch["x"].norm(dim=1), Points(), stack, tmp_path, identity={"score": "other"}, **SETTINGS)


def test_a_scorer_that_gives_another_number_of_scores_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_scores(lambda batch: batch["x"].norm(dim=1)[:2], Points(), stack, tmp_path, identity={}, **SETTINGS)
    assert not list(tmp_path.glob("*.parquet"))


def test_the_next_batch_is_read_while_one_is_scored(tmp_path):
    read = [threading.Event() for _ in range(3)]  # one shard of three batches

    def counted(rows):
        read[int(rows[0]["sample_id"][1:]) // 3].set()
        return stack(rows)

    def score(batch):
        following = int(batch["sample_id"][0][1:]) // 3 + 1
        assert following == 3 or read[following].wait(20)
        assert not any(event.is_set() for event in read[following + 1 :])  # one ahead, not all
        return batch["x"].norm(dim=1)

    write_scores(score, Points(9), counted, tmp_path, identity={}, **SETTINGS | dict(shard_size=9))


def test_memory_holds_two_batches_and_the_graph_of_one(tmp_path):
    """Without the garbage collector, which would hide that something is kept until it comes by."""
    batches, graphs, most = weakref.WeakSet(), weakref.WeakSet(), []

    class Batch(dict):
        """A batch that can be counted."""

        __hash__ = object.__hash__

    def counted(rows):
        batch = Batch(stack(rows))
        batches.add(batch)
        return batch

    def loss(model, batch):
        hidden = torch.tanh(model[0](batch["x"]))
        graphs.add(hidden)
        most.append((len(batches), len(graphs)))
        return residual(model[3], batch | {"x": hidden})

    gc.disable()
    try:
        score_dataset(perceptron(), loss, Points(80), counted, tmp_path, check=False, **SETTINGS)
    finally:
        gc.enable()
    assert len(most) == 32  # 10 shards of 8 in batches of 3, and two samples alone
    assert max(count for count, _ in most) <= 2  # one at work and one waiting
    assert max(count for _, count in most) == 1


def test_progress_goes_to_standard_error(tmp_path, capfd):
    score_points(tmp_path / "first", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "scoring" in err and "22/22" in err
    score_points(tmp_path / "first", progress=True)
    assert "22/22" in capfd.readouterr().err
    score_points(tmp_path / "second")
    assert capfd.readouterr() == ("", "")


# --- what scores depend on ----------------------------------------------------------------------------------------------------------------


def tempered(t):
    """((m(x) - y) / t)^2, t in a closure."""
    return lambda model, batch: ((model(batch["x"])[:, 0] - batch["y"]) / t) ** 2


class Tempered:
    """The same with t as a tensor of a callable object."""

    def __init__(self, t):
        self.t = torch.tensor(float(t))

    def __call__(self, model, batch):
        return tempered(self.t)(model, batch)


def by_global(model, batch):
    return tempered(TEMPERATURE)(model, batch)


TEMPERATURE = 1


def by_attribute_of_the_model(model, batch):
    return tempered(model.temperature)(model, batch)


def perceptron_with(change):
    model = perceptron()
    change(model)
    return model


def collator_that_multiplies(factor):
    return lambda rows: stack(rows) | {"y": factor * torch.stack([row["y"] for row in rows])}


OTHER_NUMBERS = {  # the key that the error names -> the run as a function of t
    "loss: t (closure)": lambda t: dict(loss=tempered(t)),
    "loss: t": lambda t: dict(loss=Tempered(t)),
    "loss: its arguments": lambda t: dict(loss=functools.partial(lambda t, *given: tempered(t)(*given), t)),
    "collate: factor (closure)": lambda t: dict(collate=collator_that_multiplies(t)),
    "modules: temperature": lambda t: dict(
        model=perceptron_with(lambda model: setattr(model, "temperature", t)), loss=by_attribute_of_the_model
    ),
    "modules: temperature (buffer)": lambda t: dict(
        model=perceptron_with(lambda model: model.register_buffer("temperature", torch.tensor(float(t)), persistent=False)),
        loss=by_attribute_of_the_model,
    ),
    "modules: _forward_hooks": lambda t: dict(
        model=perceptron_with(lambda model: model.register_forward_hook(lambda module, given, output: output / t))
    ),
    "modules: 0 (layer)": lambda t: dict(model=perceptron_with(lambda model: model[0].weight.requires_grad_(t == 1))),
}


@pytest.mark.parametrize("key", OTHER_NUMBERS)
def test_a_run_of_other_numbers_is_refused_the_folder_and_the_same_one_goes_on(key, tmp_path):
    run = OTHER_NUMBERS[key]
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=12), **run(1))
    with pytest.raises(ValueError, match=f"holds scores of another run .*{re.escape(key)} .* there, .* now"):
        score_points(tmp_path, **run(10))
    scores = score_points(tmp_path, **run(1))
    pd.testing.assert_frame_equal(scores, score_points(None, **run(1)))
    other = score_points(None, **run(10))
    assert not np.allclose(scores["score"], other["score"], rtol=1e-3)


def test_a_global_of_the_loss_is_part_of_the_run(tmp_path, monkeypatch):
    score_points(tmp_path, loss=by_global)
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 10)
    with pytest.raises(ValueError, match="another run .*loss: TEMPERATURE '1' there, '10' now"):
        score_points(tmp_path, loss=by_global)


def test_what_torch_does_otherwise_is_part_of_the_run(tmp_path):
    score_points(tmp_path)
    with (
        torch.nn.modules.module.register_module_forward_hook(lambda module, given, output: output),
        pytest.raises(ValueError, match="torch"),
    ):
        score_points(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast 'off' there, 'torch.bfloat16' now"):
        score_points(tmp_path)


class NoState:
    """A loss that holds what cannot be read."""

    def __init__(self, t=1.0):
        self.t, self.stream = t, (k for k in range(3))

    def __call__(self, model, batch):
        return tempered(self.t)(model, batch)


def test_what_has_no_identity_needs_a_name_for_a_folder_and_none_without(tmp_path):
    expected = score_points(None, loss=NoState())
    way_on = r"^loss.stream: an object of class builtins.generator has no state .* Give identity=\{'loss': a text that you change whenever"
    with pytest.raises(ValueError, match=way_on):
        score_points(tmp_path / "scores", loss=NoState())
    assert not (tmp_path / "scores").exists()
    scores = score_points(tmp_path / "scores", loss=NoState(), identity={"loss": "first"})
    pd.testing.assert_frame_equal(scores, expected)
    pd.testing.assert_frame_equal(score_points(tmp_path / "scores", loss=NoState(), identity={"loss": "first"}), expected)
    with pytest.raises(ValueError, match="another run .*loss 'first' there, 'second' now"):
        score_points(tmp_path / "scores", loss=NoState(2.0), identity={"loss": "second"})
    with pytest.raises(ValueError, match="identity is 'first', expected a dict"):
        score_points(tmp_path / "scores", loss=NoState(), identity="first")


def test_a_scorer_without_an_identity_given_is_known_by_what_it_reads(tmp_path):
    def scorer(t):
        return lambda batch: batch["x"].norm(dim=1) / t

    for _ in range(2):
        write_scores(scorer(1), Points(), stack, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"scorer: t \(closure\) '1' there, '2' now"):
        write_scores(scorer(2), Points(), stack, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="another run .*collate"):
        write_scores(scorer(1), Points(), collator_that_multiplies(2), tmp_path, **SETTINGS)


def test_an_identity_that_is_given(tmp_path):
    identity = {"nan": float("nan"), "pair": (1, 2)}
    for _ in range(2):  # NaN is the same run's NaN, and a tuple comes back from JSON as a list
        write_scores(lambda batch: batch["x"].norm(dim=1), Points(), stack, tmp_path, identity=identity, **SETTINGS)
    with pytest.raises(ValueError, match="the identity must be a dict of texts, numbers and lists of these, got .*tensor"):
        write_scores(lambda batch: batch["x"], Points(), stack, tmp_path, identity={"t": torch.ones(1)}, **SETTINGS)


# --- samples ------------------------------------------------------------------------------------------------------------------------------


class Listed:
    """Samples by number, and nothing else."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def rows_of(dataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


def count_scored(folder, dataset, **options) -> int:
    """How many batches were scored before the error that is expected."""
    scored = []

    def score(batch):
        scored.append(batch)
        return batch["x"].norm(dim=1)

    with pytest.raises(ValueError, match="sample_id '.*' occurs twice; scores are keyed by sample_id"):
        write_scores(score, dataset, stack, folder, **dict(identity={}) | SETTINGS | options)
    return len(scored)


def test_a_sample_id_that_occurs_twice_is_known_before_the_scoring_where_it_can_be(tmp_path):
    names = [f"s{i:03d}" for i in range(22)]
    names[20] = names[1]
    twice = Points(sample_id=names)
    shown = {
        "columns": twice,
        "list": rows_of(twice),
        "subset": torch.utils.data.Subset(Points(), [*range(20), 3]),
        "concatenation": torch.utils.data.ConcatDataset([rows_of(Points()), rows_of(Points())]),
        "datasets": pytest.importorskip("datasets").Dataset.from_dict({"sample_id": names}),
    }
    for name, dataset in shown.items():
        assert count_scored(tmp_path / name, dataset) == 0
        assert not (tmp_path / name).exists()
    assert count_scored(tmp_path / "hidden", Listed(rows_of(twice))) == 8  # all three shards
    assert len(list((tmp_path / "hidden").glob("*.parquet"))) == 2  # but the one with the second occurrence is not written


def test_a_lost_shard_may_not_repeat_what_a_later_one_holds(tmp_path):
    rows = rows_of(Points())
    write_scores(lambda batch: batch["x"].norm(dim=1), Listed(rows), stack, tmp_path, identity={}, **SETTINGS)
    (tmp_path / "scores-00000.parquet").unlink()
    rows[1] = rows[1] | {"sample_id": "s021"}
    assert count_scored(tmp_path, Listed(rows)) == 3
    assert not (tmp_path / "scores-00000.parquet").exists()


def test_columns_that_are_not_the_samples_names_are_no_reason_to_refuse(tmp_path):
    class Renamed(Points):
        def __getitem__(self, row):
            return super().__getitem__(row) | {"sample_id": f"r{row}"}

    assert score_points(tmp_path, Renamed(sample_id=["one"] * 22))["sample_id"].tolist() == [f"r{row}" for row in range(22)]


def test_samples_that_are_no_dicts_take_their_names_from_the_collator(tmp_path):
    class Tuples(Points):
        def __getitem__(self, row):
            return tuple(self.columns[name][row] for name in ("x", "y"))

    dataset, started = Tuples(sample_id=["one"] * 22), iter(range(10**6))

    def collate(rows):
        return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows]), "sample_id": [next(started) for _ in rows]}

    scores = score_points(tmp_path, dataset, collate=collate, identity={"collate": "counts"})
    assert scores["sample_id"].tolist() == [str(row) for row in range(22)]
    np.testing.assert_array_equal(scores["score"], score_points(None)["score"])


@pytest.mark.parametrize("sample_id", [None, float("nan"), object(), [1]], ids=["none", "nan", "object", "list"])
def test_what_names_no_sample_is_refused(sample_id, tmp_path):
    rows = rows_of(Points())
    rows[5] = rows[5] | {"sample_id": sample_id}
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="sample_id is .*, expected a text or a whole number that names the sample"):
            score_points(folder, Listed(rows))


def test_whole_numbers_name_samples(tmp_path):
    for kind in (int, np.int64, torch.tensor):
        rows = [row | {"sample_id": kind(i)} for i, row in enumerate(rows_of(Points()))]
        assert score_points(tmp_path / kind.__name__, rows)["sample_id"].tolist() == [str(i) for i in range(22)]


COLLATORS = {
    "lost 's001'": lambda rows: stack(rows[:1] + rows[2:]),
    "added 'new'": lambda rows: stack([*rows, rows[0] | {"sample_id": "new"}]),
    "changed the order or number of samples": lambda rows: stack(rows[::-1]),
    "changed the order": lambda rows: stack([*rows, rows[0]]),
}


@pytest.mark.parametrize("what", COLLATORS)
def test_a_collator_that_loses_adds_or_moves_samples_is_refused(what, tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(
            ValueError, match=f"the collator was given 3 samples and gave a batch of .*: it {what}.* keep all samples in their"
        ):
            score_points(folder, collate=COLLATORS[what])
    assert not list(tmp_path.glob("*.parquet"))


def test_a_collator_that_loses_the_names_is_refused():
    for collate in (lambda rows: {"x": torch.ones(3)}, lambda rows: torch.ones(3)):
        with pytest.raises(ValueError, match='the collator gave a batch without "sample_id"'):
            score_points(None, collate=collate)


def test_a_collator_may_change_what_it_is_given(tmp_path, uninterrupted):
    def emptied(rows):
        batch = stack(rows)
        for row in rows:
            row.clear()
        return batch

    for _ in range(2):
        score_points(tmp_path, collate=emptied)
    assert [name for name, data in contents(tmp_path).items() if data != uninterrupted[name]] == ["identity.json"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_samples_of_any_dtype_bind_the_folder(dtype, tmp_path):
    rows = [row | {"extra": {"deep": [torch.tensor(1.0 + i).to(dtype)]}} for i, row in enumerate(rows_of(Points()))]

    def collate(rows):
        return stack([{name: row[name] for name in ("sample_id", "x", "y")} for row in rows])

    for _ in range(2):
        score_points(tmp_path, rows, collate=collate)
    rows[3]["extra"]["deep"][0] = torch.tensor(9.0).to(dtype)
    with pytest.raises(ValueError, match="samples 0 to 7 had other contents"):
        score_points(tmp_path, rows, collate=collate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.float64])
def test_scores_of_any_dtype(dtype, tmp_path):
    scores = write_scores(lambda batch: (batch["x"].norm(dim=1) * 8).to(dtype), Points(), stack, tmp_path, identity={}, **SETTINGS)
    expected = (Points().columns["x"].norm(dim=1) * 8).to(dtype).double()
    np.testing.assert_array_equal(scores["score"], expected)


class WithAddress:
    """An object whose repr holds its address."""

    def __init__(self, value):
        self.value = value


def test_samples_that_print_their_address_or_cannot_be_read(tmp_path):
    def collate(rows):
        return stack([{name: row[name] for name in ("sample_id", "x", "y")} for row in rows])

    def rows(value):
        return [row | {"held": value(i)} for i, row in enumerate(rows_of(Points()))]

    for _ in range(2):
        score_points(tmp_path / "address", rows(WithAddress), collate=collate)
    with pytest.raises(ValueError, match="had other contents"):
        score_points(tmp_path / "address", rows(lambda i: WithAddress(i + 1)), collate=collate)
    unread = rows(lambda i: (k for k in range(i)))
    with pytest.raises(ValueError, match=r"^sample\['held'\]: .*generator .*identity=\{'contents'"):
        score_points(tmp_path / "generator", unread, collate=collate)
    assert not list((tmp_path / "generator").glob("*.parquet"))
    for _ in range(2):
        score_points(tmp_path / "generator", unread, collate=collate, identity={"contents": "first"})
    with pytest.raises(ValueError, match="another run .*contents 'first' there, 'second' now"):
        score_points(tmp_path / "generator", unread, collate=collate, identity={"contents": "second"})


def test_a_dataset_of_datasets_gives_the_scores_of_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {name: value if name == "sample_id" else value.tolist() for name, value in Points().columns.items()}

    def collate(rows):
        return {name: [row[name] for row in rows] if name == "sample_id" else torch.tensor([row[name] for row in rows]) for name in columns}

    expected = score_points(None)
    plain = datasets.Dataset.from_dict(columns)
    score_points(tmp_path, plain, collate=collate)
    assert [type(value) for value in plain[0].values()] == [list, float, str]
    pd.testing.assert_frame_equal(score_points(tmp_path, datasets.Dataset.from_dict(columns), collate=collate), expected)
    with pytest.raises(ValueError, match="had other contents"):
        score_points(tmp_path, plain.map(lambda row: {"y": row["y"] + 1}), collate=collate)
    as_tensors = plain.with_format("torch", columns=["x", "y"], output_all_columns=True)
    pd.testing.assert_frame_equal(score_points(tmp_path / "tensors", as_tensors, collate=stack), expected)
    with pytest.raises(ValueError, match="dataset is a IterableDataset, expected samples by number, with len"):
        score_points(None, plain.to_iterable_dataset(), collate=collate)
    with pytest.raises(ValueError, match="dataset is a DataFrame, expected samples by number.*PairDataset"):
        score_points(None, tiny_frame(3))


def test_samples_are_read_at_once_where_the_data_set_can(tmp_path):
    asked = []

    class AtOnce(Points):
        def __getitem__(self, row):
            raise AssertionError("one by one")

        def __getitems__(self, rows):
            asked.append(len(rows))
            return [Points.__getitem__(self, row) for row in rows]

    pd.testing.assert_frame_equal(score_points(tmp_path, AtOnce()), score_points(None))
    assert asked == [3, 3, 2, 3, 3, 2, 3, 3]


# --- folders ------------------------------------------------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_the_folder(tmp_path):
    scoring_now, go_on = threading.Event(), threading.Event()

    def slowly(model, batch):
        scoring_now.set()
        assert go_on.wait(20)
        return residual(model, batch)

    options = dict(loss=slowly, identity={"loss": "slow"})
    first = threading.Thread(target=score_points, args=[tmp_path], kwargs=options)
    first.start()
    try:
        assert scoring_now.wait(20)
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on .*; wait until that has ended, or choose another"):
            score_points(tmp_path, **options)
    finally:
        go_on.set()
        first.join()
    pd.testing.assert_frame_equal(read_scores(tmp_path), score_points(None))
    assert ".lock" not in contents(tmp_path)


def test_a_finished_run_is_read_without_a_lock(tmp_path, monkeypatch):
    expected = score_points(tmp_path)
    monkeypatch.setattr(scoring, "locked", lambda folder: pytest.fail("a folder that nothing is written to was locked"))
    pd.testing.assert_frame_equal(score_points(tmp_path), expected)


def test_more_than_99_999_shards_stay_in_order(tmp_path, monkeypatch):
    path_of = scoring._shard_path
    monkeypatch.setattr(scoring, "_shard_path", lambda folder, shard: path_of(folder, shard + 99_998))
    for _ in range(2):
        scores = score_points(tmp_path, shard_size=6)
        assert scores["sample_id"].tolist() == [f"s{i:03d}" for i in range(22)]
    names = [f"scores-{shard}.parquet" for shard in (100000, 100001, 99998, 99999)]
    assert sorted(contents(tmp_path)) == ["identity.json", *names]


def test_a_folder_that_cannot_be_written_to_is_known_before_the_scoring(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    loss = lambda model, batch: pytest.fail("scored")  # noqa: E731
    with pytest.raises(ValueError, match="cannot be written to .*; choose another folder"):
        score_points(tmp_path / "file" / "scores", loss=loss)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(ValueError, match=r"a disk with 0.0 MB free, and up to .* MB are to be written there; make room"):
        score_points(tmp_path / "scores", loss=loss)


def test_a_disk_that_fills_up_leaves_whole_shards_only(tmp_path, monkeypatch, uninterrupted):
    write = pq.write_table

    def full(table, path):
        if "00001" in path.name:
            path.write_bytes(b"PAR1 half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        score_points(tmp_path)
    assert sorted(contents(tmp_path)) == ["identity.json", "scores-00000.parquet"]
    monkeypatch.undo()
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_damaged_and_foreign_files_are_one_error(tmp_path):
    score_points(tmp_path)
    shard, identity = tmp_path / "scores-00001.parquet", tmp_path / "identity.json"
    whole, text = shard.read_bytes(), identity.read_text()
    for data, message in (
        (whole[:-20], "scores-00001.parquet cannot be read .*; delete this file, and score_dataset computes it again"),
        (b"", "scores-00001.parquet cannot be read"),
        (None, "scores-00001.parquet holds a, not sample_id and score: it is not a shard of scores"),
    ):
        pd.DataFrame({"a": [1]}).to_parquet(shard) if data is None else shard.write_bytes(data)
        for action in (read_scores, score_points):
            with pytest.raises(ValueError, match=message):
                action(tmp_path)
    shard.unlink()
    score_points(tmp_path)
    assert shard.read_bytes() == whole
    for data, message in (
        ('{"samples": ', "identity.json cannot be read"),
        ("[1]", "not that of a score run"),
        ('{"a": 1}', "no number of"),
    ):
        identity.write_text(data)
        for action in (read_scores, score_points):
            with pytest.raises(ValueError, match=message):
                action(tmp_path)
    identity.write_text(text)
    shard.rename(tmp_path / "scores-00007.parquet")
    with pytest.raises(ValueError, match="holds scores-00007.parquet, one of 3 shards: some were renamed, so that their order is lost"):
        read_scores(tmp_path)


def test_a_file_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "identity.json").write_text('{"name": "Ada"}')
    with pytest.raises(ValueError, match="identity.json is not that of a score run"):
        score_points(tmp_path)
    assert (tmp_path / "identity.json").read_text() == '{"name": "Ada"}'


def test_scores_of_an_earlier_version_are_read_but_not_continued(tmp_path):
    expected = score_points(tmp_path)
    earlier = json.loads((tmp_path / "identity.json").read_text())
    del earlier["format"], earlier["modules"], earlier["collate"]
    (tmp_path / "identity.json").write_text(json.dumps(earlier))
    pd.testing.assert_frame_equal(read_scores(tmp_path), expected)
    with pytest.raises(ValueError, match="another run, of a version that did not record all .*: choose another folder"):
        score_points(tmp_path)


def test_the_bar_says_what_is_done(tmp_path, capfd):
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=12))
    capfd.readouterr()
    score_points(tmp_path, progress=True)
    err = capfd.readouterr().err
    assert err.index("checking finished samples") < err.index("scoring") and "22/22" in err


# --- a sample and its batch -------------------------------------------------------------------------------------------------------------


def from_the_mean(model, batch):
    """Squared distance of each prediction from the batch's mean prediction: no sample's own."""
    predictions = model(batch["x"])[:, 0]
    return (predictions - predictions.mean().detach()) ** 2


class Centred(torch.nn.Module):
    """A linear model of what is left when the batch's mean input is taken off."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x - x.mean(0))


@pytest.mark.parametrize(("model", "loss"), [(perceptron(), from_the_mean), (Centred(), residual)], ids=["loss", "model"])
def test_samples_that_influence_one_another_are_refused(model, loss, tmp_path):
    dataset = Points()
    batch = stack([dataset[i] for i in range(3)])
    together, alone = (gradient_norms(model, loss, part)[0].item() for part in (batch, one_sample(batch, 0)))
    words = "the norm of sample 's000' is (.+) in its batch and (.+) alone: the samples of a batch influence one another. Give a loss"
    with pytest.raises(ValueError, match=words) as refused:
        score_points(tmp_path, dataset, model=model, loss=loss)
    numbers = [float(number) for number in re.match(words, str(refused.value)).groups()]
    assert numbers == pytest.approx([together, alone], rel=2e-5)
    assert sorted(contents(tmp_path)) == ["identity.json"]


def test_the_second_sample_is_looked_at_too(tmp_path):
    """A loss in which each sample but the first borrows from the one before it."""

    def borrowed(model, batch):
        losses = residual(model, batch)
        return torch.cat([losses[:1], losses[1:] * losses[:-1].detach()])

    with pytest.raises(ValueError, match="the norm of sample 's001' is"):
        score_points(tmp_path, loss=borrowed)


def normalised(**options) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8, **options), torch.nn.Linear(8, 1))


def test_batch_normalisation_by_the_batch_is_refused_and_by_running_statistics_is_not(tmp_path):
    by_the_batch = normalised(affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match="takes the batch's own mean and variance, .* put it in eval mode"):
        score_points(tmp_path / "batch", model=by_the_batch)
    running = normalised().train()
    running(points(50, seed=1)["x"])
    scores = score_points(tmp_path / "running", model=running, by_sample="1")
    whole = stack([Points()[i] for i in range(22)])
    np.testing.assert_allclose(scores["score"], gradient_norms_by_loop(running.eval(), residual, whole), rtol=1e-5)


def test_two_samples_are_computed_twice_once_a_run(tmp_path, monkeypatch):
    sizes = []

    def counted(*args, **kwargs):
        sizes.append(len(args[2]["y"]))
        return gradient_norms(*args, **kwargs)

    monkeypatch.setattr(scoring, "gradient_norms", counted)
    score_points(tmp_path)
    assert sizes == [3, 1, 1, 3, 2, 3, 3, 2, 3, 3]
    sizes.clear()
    (tmp_path / "scores-00002.parquet").unlink()
    score_points(tmp_path)
    assert sizes == [3, 1, 1, 3]
    sizes.clear()
    score_points(tmp_path / "single", loss=from_the_mean, batch_size=1)  # alone, every sample is at the mean
    assert sizes == [1] * 22


def test_a_difference_that_is_rounding_is_settled_in_float64(tmp_path):
    """A loss whose float32 value is off by 1 % in company, as a rounded one may be, and one that is off in float64 too."""

    def rounded(model, batch, dtypes):
        off = len(batch["y"]) > 1 and batch["y"].dtype in dtypes
        return residual(model, batch) * (1.01 if off else 1)

    scores = score_points(tmp_path / "one", loss=functools.partial(rounded, dtypes=(torch.float32,)))
    np.testing.assert_allclose(scores["score"], 1.01 * score_points(tmp_path / "exact")["score"], rtol=1e-5)
    with pytest.raises(ValueError, match="influence one another"):
        score_points(tmp_path / "both", loss=functools.partial(rounded, dtypes=(torch.float32, torch.float64)))


def test_gradients_of_zero_are_no_difference(tmp_path):
    scores = score_points(tmp_path, loss=lambda model, batch: 0 * residual(model, batch))
    assert (scores["score"] == 0).all()


class Scaled(torch.nn.Module):
    """A module that the engine has no rule for."""

    def __init__(self):
        super().__init__()
        self.factors = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, x):
        return self.factors * x


def test_a_module_without_a_rule_is_scored_by_sample(tmp_path):
    model = torch.nn.Sequential(Scaled(), perceptron())
    expected = gradient_norms_by_loop(model, residual, stack([Points()[i] for i in range(22)]))
    for folder, by_sample in (("followed", ()), ("by sample", "0")):
        scores = score_points(tmp_path / folder, model=model, by_sample=by_sample)
        np.testing.assert_allclose(scores["score"], expected, rtol=1e-5)
        assert json.loads((tmp_path / folder / "identity.json").read_text())["by_sample"] == list(by_sample)


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ("two_tower", "cross_encoder"))
def test_scores_on_a_gpu_are_those_of_the_cpu(architecture, tmp_path):
    pair, on_gpu = tiny_pair(architecture), tiny_pair(architecture, device="cuda").model
    frame = tiny_frame(9)
    arguments = (squared_error, PairDataset(frame), PairCollator(pair))
    scores = [score_dataset(model, *arguments, tmp_path / name, progress=False) for name, model in (("gpu", on_gpu), ("cpu", pair.model))]
    np.testing.assert_allclose(scores[0]["score"], scores[1]["score"], rtol=1e-3)
