"""What each of two processes does for test_two_processes: a list of runs, their outcomes written to a file. Started by torchrun."""

import contextlib
import gc
import os
import sys
from pathlib import Path

import torch
from tiny import perceptron, points, residual, tiny_frame, tiny_pair
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from recsys_importance import selective as selective_module
from recsys_importance import training
from recsys_importance.folders import locked
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset
from recsys_importance.objectives import Objectives, click, columns_of, cross_entropy, relevance
from recsys_importance.selective import samples_of, selective_backward
from recsys_importance.trainer import EpochSampler, ImportanceTrainer
from recsys_importance.training import TrainingSettings, fine_tune

HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")
TWO = Objectives(relevance(weight=0.7), click(weight=0.3))
TASKS = ("relevance", "click")

# --- a selective step -------------------------------------------------------------------------------------------------------------------

SELECTIVE = {  # scores of rank 0 and of rank 1, weighting, progress
    "both keep some": ([4.0, 1.0, 3.0, 0.5], [2.0, 6.0, 0.2, 5.0], HALF, 1.0),
    "rank 0 keeps nothing": ([0.4, 0.1, 0.3, 0.2], [2.0, 6.0, 3.0, 5.0], HALF, 1.0),
    "rank 1 keeps nothing": ([2.0, 6.0, 3.0, 5.0], [0.4, 0.1, 0.3, 0.2], Weighting(threshold=0.5, threshold_on="quantile"), 1.0),
    "batches of two sizes": ([4.0, 1.0, 3.0, 0.5, 2.5], [2.0, 6.0, 0.2], HALF, 1.0),
    "half annealed": ([0.4, 0.1, 0.3, 0.2], [2.0, 6.0, 3.0, 5.0], Weighting(threshold=0.5, threshold_on="quantile", anneal=(0, 1)), 0.5),
}


def selective(name: str, rank: int) -> dict:
    own, others, weighting, progress = SELECTIVE[name]
    scores = torch.tensor(own + others)
    rows = range(len(own)) if rank == 0 else range(len(own), len(scores))
    batch = samples_of(points(len(scores)) | {"score": scores}, rows)
    model = DistributedDataParallel(perceptron())
    step = selective_backward(model, residual, batch, weighting, score=lambda model, loss, batch: batch["score"], progress=progress)
    return {"weights": step.weights, "kept": step.kept, "gradient": torch.cat([p.grad.flatten() for p in model.parameters()])}


# --- the trainer ------------------------------------------------------------------------------------------------------------------------

WEIGHTS = [0.0, 2.0, 0.5, 1.5] * 4
GIVEN = [0.0, 3.0, 0.5, 1.0] * 4
TRAINERS = {  # micro-batches per step, options
    "never": (1, dict(recompute="never", weights=WEIGHTS)),
    "epoch": (1, dict(recompute="epoch", weighting=Weighting(clip=2))),
    "epoch, workers": (2, dict(recompute="epoch", weighting=Weighting(clip=2), workers=1)),
    "weight column": (2, dict(recompute="step", weighting=Weighting(clip=2), given=GIVEN)),
    "never, a step of weight 0": (1, dict(recompute="never", weights="first step")),
    "all learned but a half": (1, dict(recompute="forward", weighting=HALF, learned=8)),
    "all learned": (2, dict(recompute="forward", weighting=HALF, learned=16)),
    "step": (2, dict(recompute="step", weighting=Weighting(exponent=1, clip=1.5))),
    "forward": (1, dict(recompute="forward", weighting=HALF)),
    "forward, accumulated": (2, dict(recompute="forward", weighting=HALF)),
    "head": (2, dict(recompute="step", head=True, weighting=Weighting(clip=2))),
    "forward, head": (1, dict(recompute="forward", head=True, weighting=HALF, exact_every=2)),
    "balanced": (2, dict(recompute="step", balance="upgrad", loss=TWO, tasks=TASKS)),
    "never, balanced": (1, dict(recompute="never", weights=WEIGHTS, balance="sum", loss=TWO, tasks=TASKS)),
}


def clicked(frame):
    """The frame with clicks, missing in every fifth row."""
    return frame.assign(clicked=[float("nan") if number % 5 == 0 else float(number % 3 == 0) for number in range(len(frame))])


def learned_up_to(count: int):
    """Cross-entropy, but 0 with a gradient of 0 for the first samples."""

    def loss(model, batch):
        return cross_entropy(model, batch) * torch.tensor([float(int(name[1:]) >= count) for name in batch["sample_id"]])

    return loss


def trained(
    folder: Path,
    batch: int,
    accumulation: int,
    *,
    loss=cross_entropy,
    tasks=("relevance",),
    weights=None,
    given=None,
    learned=0,
    workers=0,
    **options,
) -> dict:
    """Weights and log of two epochs of plain SGD on sixteen samples."""
    from transformers import TrainingArguments

    pair, frame = tiny_pair("cross_encoder", tasks=tasks, dropout=0.0), clicked(tiny_frame(16))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    columns = columns_of(frame, loss) if isinstance(loss, Objectives) else {}
    columns |= {} if given is None else {"weight": given}
    loss = learned_up_to(learned) if learned else loss
    dataset = PairDataset(frame, **columns)
    if weights == "first step":  # of 8 samples: those of the second weigh nothing
        first = list(EpochSampler(16, seed=3, batch=8, lengths=dataset.lengths()))[:8]
        weights = [2.0 * (row in first) for row in range(16)]
    options = options | ({} if weights is None else {"weights": torch.tensor(weights, dtype=torch.float64).numpy()})
    options |= {"head": ImportanceHead(pair.model)} if options.get("head") else {}
    ours = ImportanceTrainer(
        model=pair.model,
        args=arguments,
        data_collator=PairCollator(pair),
        train_dataset=dataset,
        loss=loss,
        lengths=dataset.lengths(),
        **options,
    )
    ours.train()
    if workers:
        ours.callback_handler.train_dataloader._iterator._shutdown_workers()
    log = [entry for entry in ours.state.log_history if "loss" in entry]
    moments = None if ours.head is None else ours.head.moments
    return {"end": {name: value.clone() for name, value in pair.model.state_dict().items()}, "log": log, "moments": moments}


# --- fine_tune --------------------------------------------------------------------------------------------------------------------------

FINE_TUNED = {
    "never": dict(optimizer="sgd", learning_rate=0.02),
    "epoch, adapters": dict(optimizer="sgd", learning_rate=0.05, recompute="epoch", weighting=Weighting(clip=3), lora_rank=2),
    "step": dict(recompute="step", weighting=Weighting(clip=3), schedule="cosine"),
    "forward, objectives": dict(
        optimizer="sgd", learning_rate=0.02, recompute="forward", weighting=HALF, objectives=TWO, tasks=TASKS, metric="loss"
    ),
}
RESUMED = {
    "never": dict(),
    "epoch": dict(recompute="epoch", weighting=Weighting(clip=3)),
    "step, accumulated": dict(recompute="step", accumulation=2, batch_size=2),
}
STOPS = (7, 0)  # the step in which each attempt ends: in the middle of the second epoch of four, and not before the end


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def fine_tuned(folder: Path, *, batch_size: int, factor: int = 1, dropout: float = 0.0, stop: int = 0, **given) -> dict:
    """Weights, history and steps taken of two epochs on 32 samples; interrupted in step `stop`."""
    arguments = {name: given.pop(name) for name in ("weighting", "objectives") if name in given}
    pair = tiny_pair(tasks=given.pop("tasks", ("relevance",)), dropout=dropout)
    frame, validation = clicked(tiny_frame(32, seed=3)), clicked(tiny_frame(12, seed=4, prefix="v"))
    settings = dict(epochs=2, learning_rate=1e-3, max_length=32, patience=100) | given | dict(batch_size=batch_size * factor)
    first_steps, before = [], training._Progress.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        if state.global_step == stop:
            raise Interrupted
        before(self, args, state, control, **kwargs)

    training._Progress.on_step_end = on_step_end
    try:
        history = fine_tune(pair, frame, validation, TrainingSettings(**settings), folder=folder, **arguments).history
    except Interrupted:
        history = None
    finally:
        training._Progress.on_step_end = before
    end = {name: value.clone() for name, value in pair.model.state_dict().items()}
    return {"end": end, "history": history, "first": first_steps[0] if first_steps else None}


class Bar(training.tqdm):
    """A progress bar that remembers whether it was shown."""

    shown: list[bool] = []

    def __init__(self, *arguments, disable: bool, **options):
        self.shown.append(not disable)
        super().__init__(*arguments, disable=True, **options)


def refusal(action, *arguments, **options) -> str:
    try:
        action(*arguments, **options)
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"


def outcomes(rank: int, folder: Path) -> dict:
    training.tqdm = Bar
    found = {("selective", name): selective(name, rank) for name in SELECTIVE}
    for name, (accumulation, options) in TRAINERS.items():
        found["trainer", name] = trained(folder / "trainer", 4 // accumulation, accumulation, **options)
    for name, options in FINE_TUNED.items():
        found["fine_tune", name] = fine_tuned(folder / name, **dict(batch_size=4) | options)
    for name, options in RESUMED.items():
        options = dict(batch_size=4, dropout=0.1) | options
        found["whole", name] = fine_tuned(folder / f"{name} whole", **options)
        for stop in STOPS:
            found["resumed", name, stop] = fine_tuned(folder / f"{name} resumed", stop=stop, **options)
    if rank == 0:  # what a killed process leaves
        (folder / "half-written" / "checkpoint-99").mkdir(parents=True)
        (folder / "half-written" / "checkpoint-99" / "trainer_state.json").write_text("{")
        (folder / "half-written" / "run.json").write_bytes((folder / "never whole" / "run.json").read_bytes())
        (folder / "half-written" / "importance_checkpoints.json").write_text('["checkpoint-99"]')
    distributed.barrier()
    found["half-written"] = fine_tuned(folder / "half-written", batch_size=4, dropout=0.1)
    found["no folder"] = refusal(fine_tuned, None, batch_size=4)
    found["another run"] = refusal(fine_tuned, folder / "never whole", batch_size=4, dropout=0.1, learning_rate=5e-4)
    with locked(folder / "never whole") if rank == 0 else contextlib.nullcontext():  # as another torchrun would
        found["in use"] = refusal(fine_tuned, folder / "never whole", batch_size=4, dropout=0.1)
    found["a file"] = refusal(fine_tuned, Path(__file__), batch_size=4)
    return found | {"bars": Bar.shown}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    selective_module.fast_bfloat16 = lambda device: False  # two batches of 4 score as one of 8 in float32 only
    gc.freeze()  # the Trainer collects rubbish when a run starts: leave out what is imported already
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.save(outcomes(rank, folder), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
