"""ImportanceTrainer against training loops written by hand, and two processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_frame, tiny_pair
from transformers import TrainingArguments

from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset
from recsys_importance.objectives import cross_entropy
from recsys_importance.reference import gradient_norms_by_loop
from recsys_importance.training import ImportanceTrainer


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


def trainer(folder, *, count: int = 22, weighting: Weighting | None = None, dropout: float = 0.0, loss=cross_entropy, **changes):
    pair = tiny_pair("cross_encoder", dropout=dropout)
    return ImportanceTrainer(
        model=pair.model,
        args=arguments(folder, **changes),
        data_collator=PairCollator(pair),
        train_dataset=PairDataset(tiny_frame(count)),
        loss=loss,
        weighting=weighting,
    )


def parameters_of(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "weighting", [Weighting(), Weighting(exponent=-0.5, clip=2), Weighting(anneal=(0.0, 1.0))], ids=["article", "inverse", "annealed"]
)
def test_it_trains_as_a_loop_written_by_hand(weighting, tmp_path):
    """Six batches of 4, in groups of two micro-batches, the last group with 2 samples in its second: weights over the whole group."""
    ours = trainer(tmp_path, weighting=weighting, gradient_accumulation_steps=2)
    model = tiny_pair("cross_encoder", dropout=0.0).model
    batches = list(ours.get_train_dataloader())
    ours.train()
    ids = []
    for step in range(3):
        group = batches[2 * step : 2 * step + 2]
        ids += [name for batch in group for name in batch["sample_id"]]
        norms = torch.cat([gradient_norms_by_loop(model, cross_entropy, batch) for batch in group])
        weights = weighting(norms, progress=step / 3)
        losses = torch.cat([cross_entropy(model, batch) for batch in group])
        gradients = torch.autograd.grad((weights * losses).mean(), list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.1 * gradient
    assert len(set(ids)) == 22
    torch.testing.assert_close(parameters_of(ours.model), parameters_of(model), rtol=0, atol=2e-5)
    assert (parameters_of(ours.model) - parameters_of(tiny_pair("cross_encoder").model)).abs().max() > 1e-3
    torch.testing.assert_close(ours.seen.weights, weights, rtol=1e-3, atol=1e-4)


def test_the_logged_loss_is_the_weighted_mean(tmp_path):
    ours = trainer(tmp_path, count=8, per_device_train_batch_size=8)
    ours.train()
    logged = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(float((ours.seen.weights * ours.seen.losses).mean()), abs=1e-4)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_float32(precision, tmp_path):
    plain, mixed = trainer(tmp_path / "a"), trainer(tmp_path / "b", **{precision: True})
    start = parameters_of(plain.model)
    plain.train(), mixed.train()
    moved, difference = parameters_of(plain.model) - start, parameters_of(mixed.model) - parameters_of(plain.model)
    assert difference.norm() < 0.1 * moved.norm()


def test_dropout_is_on_while_training_and_repeats_with_the_seed(tmp_path):
    ends = []
    for number, seed in enumerate((3, 3, 4)):
        ours = trainer(tmp_path / str(number), dropout=0.3, seed=seed)
        ours.train()
        ends.append(parameters_of(ours.model))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path):
    def broken(model, batch):
        return cross_entropy(model, batch) / torch.tensor([float(name != "s0007") for name in batch["sample_id"]])

    with pytest.raises(ValueError, match="NaN or infinite, the first for sample 's0007'"):
        trainer(tmp_path, loss=broken).train()


def test_what_does_not_keep_samples_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile does not keep samples apart"):
        trainer(tmp_path, torch_compile=True)


RUN = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
from recsys_importance.importance import Weighting
from test_importance_trainer import parameters_of, trainer
ours = trainer(sys.argv[1], count=16, weighting=Weighting(exponent=1, clip=1.5), per_device_train_batch_size=int(sys.argv[2]))
ours.train()
if ours.args.process_index == 0:
    torch.save(parameters_of(ours.model), sys.argv[1] + "/end.pt")
ours.accelerator.wait_for_everyone()
ours.accelerator.end_training()
"""


def test_two_processes_train_as_one(tmp_path):
    """Two ranks with batches of 4 see in each step the 8 samples that one process sees, and weight them as one batch."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ends = {}
    for name, command, size in (("one", [sys.executable], 8), ("two", launch, 4)):
        folder = tmp_path / name
        folder.mkdir()
        run = [*command, str(script), str(folder), str(size), str(Path(__file__).parent)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        ends[name] = torch.load(folder / "end.pt")
    start = parameters_of(tiny_pair("cross_encoder", dropout=0.0).model)
    assert (ends["one"] - start).norm() > 0.1
    np.testing.assert_allclose(ends["two"], ends["one"], rtol=0, atol=1e-5)
