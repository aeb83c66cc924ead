"""Scores of a whole data set are the batches' norms, survive every kind of interruption, and are refused where they would mislead."""

import functools
import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
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


def score_points(folder, dataset=None, *, model=None, loss=residual, **changes):
    return score_dataset(model or perceptron(), loss, Points() if dataset is None else dataset, stack, folder, **SETTINGS | changes)


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
        score_dataset(perceptron(), loss, Points(80), counted, tmp_path, **SETTINGS)
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
    with pytest.raises(ValueError, match="a sample cannot be scored without its batch: .* use running statistics"):
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
    with pytest.raises(ValueError, match="no rule for .*factors"):
        score_points(tmp_path / "refused", model=model)
    scores = score_points(tmp_path, model=model, by_sample="0")
    expected = gradient_norms_by_loop(model, residual, stack([Points()[i] for i in range(22)]))
    np.testing.assert_allclose(scores["score"], expected, rtol=1e-5)
    assert json.loads((tmp_path / "identity.json").read_text())["by_sample"] == ["0"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ("two_tower", "cross_encoder"))
def test_scores_on_a_gpu_are_those_of_the_cpu(architecture, tmp_path):
    pair, on_gpu = tiny_pair(architecture), tiny_pair(architecture, device="cuda").model
    frame = tiny_frame(9)
    arguments = (squared_error, PairDataset(frame), PairCollator(pair))
    scores = [score_dataset(model, *arguments, tmp_path / name, progress=False) for name, model in (("gpu", on_gpu), ("cpu", pair.model))]
    np.testing.assert_allclose(scores[0]["score"], scores[1]["score"], rtol=1e-3)
