"""Two processes of torchrun against one with the double batch: the selective step, the trainer, fine-tuning, and going on after an end."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import perceptron, points, residual, tiny_pair
from two_processes import FINE_TUNED, RESUMED, SELECTIVE, STOPS, TASKS, TRAINERS, fine_tuned, trained

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What rank 0 and rank 1 found."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "two_processes.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run([*launch, str(folder)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def as_they_do(monkeypatch):
    monkeypatch.setattr("recsys_importance.selective.fast_bfloat16", lambda device: False)
    gc.freeze()
    yield
    gc.unfreeze()


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def assert_close(found: dict, expected: dict, start: dict) -> None:
    """Weights within 1e-5, having moved by far more. The keys' bias, on which attention does not depend, is moved by rounding alone."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert max((expected[name] - value).abs().max() for name, value in start.items() if name in expected) > 1e-3


@pytest.mark.parametrize("name", SELECTIVE)
def test_a_selective_step_is_that_of_the_joint_batch(name, ranks):
    """Also where one of them keeps nothing: it takes part with a sample of weight 0."""
    own, others, weighting, progress = SELECTIVE[name]
    scores, model = torch.tensor(own + others), perceptron()
    weights = weighting(scores, progress=progress)
    count, halves = len(own), (slice(None, len(own)), slice(len(own), None))
    (weights * residual(model, points(len(scores)))).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for rank, half in enumerate(halves):
        found = ranks[rank]["selective", name]
        torch.testing.assert_close(found["gradient"], expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["weights"], weights[half])
        kept = weights[half].nonzero().flatten().tolist() or [int(scores[half].argmax())]
        assert found["kept"].tolist() == kept and count
    assert torch.equal(*(ranks[rank]["selective", name]["gradient"] for rank in (0, 1)))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_steps_and_logs_as_one_process_with_the_double_batch(name, ranks, tmp_path):
    """The log too is over the samples of both."""
    accumulation, options = TRAINERS[name]
    expected = trained(tmp_path, 8 // accumulation, accumulation, **options)
    first, second = (ranks[rank]["trainer", name] for rank in (0, 1))
    start = dict(tiny_pair("cross_encoder", tasks=options.get("tasks", TASKS[:1])).model.state_dict())
    if name == "all learned":
        assert same(first["end"], start)
    else:
        assert_close(first["end"], expected["end"], start)
    assert same(first["end"], second["end"])
    if expected["moments"] is not None:  # what the head has learned
        torch.testing.assert_close(first["moments"], expected["moments"], rtol=1e-3, atol=1e-3)
        assert torch.equal(first["moments"], second["moments"])
    assert [entry.keys() for entry in first["log"]] == [entry.keys() for entry in expected["log"]]
    for found in (first, second):
        pd.testing.assert_frame_equal(pd.DataFrame(found["log"]), pd.DataFrame(expected["log"]), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_is_that_of_one_process_with_the_double_batch(name, ranks, tmp_path):
    options = dict(batch_size=4) | FINE_TUNED[name]
    expected = fine_tuned(tmp_path, factor=2, **options)
    first, second = (ranks[rank]["fine_tune", name] for rank in (0, 1))
    assert_close(first["end"], expected["end"], tiny_pair(tasks=options.get("tasks", TASKS[:1])).model.state_dict())
    assert same(first["end"], second["end"])
    pd.testing.assert_frame_equal(first["history"], expected["history"], rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(first["history"], second["history"])
    assert first["history"]["step"].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_that_were_interrupted_end_as_if_they_had_not_been(name, ranks):
    """With dropout; interrupted in the middle of the second epoch of four steps."""
    for rank in (0, 1):
        whole, last = ranks[rank]["whole", name], ranks[rank]["resumed", name, 0]
        assert [ranks[rank]["resumed", name, stop]["first"] for stop in STOPS] == [1, 7]
        assert same(whole["end"], last["end"]) and same(whole["end"], ranks[0]["whole", name]["end"])
        pd.testing.assert_frame_equal(last["history"], whole["history"], check_exact=True)


def test_what_is_half_written_is_deleted_by_one_of_them(ranks):
    for rank in (0, 1):
        assert ranks[rank]["half-written"]["first"] == 1
        assert same(ranks[rank]["half-written"]["end"], ranks[rank]["whole", "never"]["end"])


def test_both_refuse_what_one_would(ranks):
    for found in ranks:
        assert found["no folder"] == "2 processes need one folder that all of them see; give fine_tune a folder"
        assert "holds checkpoints of another run (it differs in settings)" in found["another run"]
        assert "wait until that has ended, or choose another folder" in found["in use"]
        assert "two_processes.py: File exists; choose another folder" in found["a file"]


def test_one_of_them_shows_the_progress(ranks):
    runs = len(FINE_TUNED) + len(RESUMED) * (1 + len(STOPS)) + 1
    assert [rank["bars"] for rank in ranks] == [[True] * runs, [False] * runs]
