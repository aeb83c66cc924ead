"""Models and losses that could make the engine give a wrong number: each is right, or one clear error."""

import threading
import warnings

import pytest
import torch
from apart import apart
from tiny import Through, perceptron, residual, tiny_pair
from torch import nn
from twins import gradient_in, gradients_of_the_whole_batch, off, pair_batch

from recsys_importance.gradients import RULES, Outer, Whole, certificate, gradient_norms, kernels, rule, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.models import evaluating
from recsys_importance.objectives import cross_entropy
from recsys_importance.reference import gradient_norms_by_loop, in_dtype, weighted_backward_by_loop

WRONG = "checked against autograd, the engine's gradients are wrong"


def norms_of_the_whole_batch(model, loss, batch) -> torch.Tensor:
    return gradients_of_the_whole_batch(model, loss, batch).norm(dim=1)


def assert_right(model, loss, batch):
    """Norms and weighted gradient are those of whole-batch autograd, under the same random numbers."""
    torch.manual_seed(3)
    exact = gradients_of_the_whole_batch(model, loss, batch).double()
    torch.manual_seed(3)
    step = weighted_backward(model, loss, batch, Weighting())
    torch.testing.assert_close(step.norms.double(), exact.norm(dim=1), rtol=1e-4, atol=1e-6 * exact.norm())
    assert off(gradient_in(model), step.weights.double() @ exact / len(exact)) < 1e-4
    torch.manual_seed(3)
    torch.testing.assert_close(gradient_norms(model, loss, batch).double(), exact.norm(dim=1), rtol=1e-4, atol=1e-6 * exact.norm())


# --- a gradient taken inside the loss ---------------------------------------------------------------------------------------------------


def net(*, inputs: int = 6, width: int = 40, seed: int = 0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def rows(count: int = 5, *shape: int, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(count, *(shape or (6,)), generator=generator), "y": torch.randn(count, generator=generator)}


def perturbed(model, batch):
    """FGM: the loss at inputs moved along the gradient, which is a constant."""
    x = batch["x"].clone().requires_grad_()
    clean = (model(x)[:, 0] - batch["y"]) ** 2
    (direction,) = torch.autograd.grad(clean.sum(), x)
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2 + (model(batch["x"] + 0.1 * direction.sign())[:, 0] - batch["y"]) ** 2


def kept_graph(model, batch):
    """The same gradient taken from the very graph that the loss is then computed from."""
    x = batch["x"].clone().requires_grad_()
    output = model(x)[:, 0]
    (saliency,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    return (output - batch["y"]) ** 2 * (1 + saliency.abs().sum(1))


def by_backward(model, batch):
    """A backward() inside, which leaves gradients in .grad, as VAT implementations do."""
    x = batch["x"].clone().requires_grad_()
    model(x).sum().backward()
    model.zero_grad()
    return (model(batch["x"] + 0.3 * x.grad)[:, 0] - batch["y"]) ** 2


def of_a_weight(model, batch):
    """Losses scaled by the size of a weight's own gradient, a constant."""
    output = (model(batch["x"])[:, 0] - batch["y"]) ** 2
    (gradient,) = torch.autograd.grad(output.sum(), model[2].weight, retain_graph=True)
    return output * gradient.norm()


@pytest.fixture(params=["auto", "torch", "onednn"])
def each_kernel(request, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", request.param)


@pytest.mark.parametrize("loss", [perturbed, kept_graph, by_backward, of_a_weight])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_taken_inside_the_loss(loss, training, each_kernel):
    assert_right(net().train(training), loss, rows())


def test_a_gradient_inside_the_loss_under_dropout(each_kernel):
    model = net()
    model.insert(2, nn.Dropout(0.5))
    assert_right(model.train(), perturbed, rows())


def penalised(model, batch):
    x = batch["x"].clone().requires_grad_()
    output = model(x)[:, 0]
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return (output - batch["y"]) ** 2 + slope.square().sum(1)


def one_step_ahead(model, batch):
    """The loss after a step of its own (MAML): second derivatives through the weights."""
    weights = dict(model.named_parameters())
    first = ((model(batch["x"])[:, 0] - batch["y"]) ** 2).sum()
    slopes = torch.autograd.grad(first, list(weights.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), slopes, strict=True)}
    return (torch.func.functional_call(model, moved, batch["x"])[:, 0] - batch["y"]) ** 2


@pytest.mark.parametrize("loss", [penalised, one_step_ahead])
def test_a_loss_that_differentiates_through_a_gradient_is_refused(loss, each_kernel):
    model = net()
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting())):
        with pytest.raises(ValueError, match=r"create_graph=True.*recsys_importance\.reference"):
            action(model, loss, rows())
    assert all(p.grad is None for p in model.parameters())
    assert (gradient_norms_by_loop(model, penalised, rows()) > 0).all()  # the way on that the error names


# --- cancellation -----------------------------------------------------------------------------------------------------------------------


def encoder(width: int = 48):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))


class Ranker(nn.Module):
    """Scores of C candidates of T words each: ids (B, C, T) to (B, C)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(48, 1)

    def forward(self, ids):
        return self.head(self.encoder(ids).mean(2))[..., 0]


def pairwise(model, batch):
    scores = model(batch["ids"])
    return nn.functional.softplus(-(scores[:, 0] - scores[:, 1]))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_near_duplicates_in_a_list(changed, each_kernel):
    """Two texts of which `changed` words of 24 differ by little: products of almost equal rows cancel in float32."""
    model = Ranker()
    with torch.no_grad():
        model.encoder[0].weight[1] = model.encoder[0].weight[0] + 1e-4 * model.encoder[0].weight[2]
    ids = torch.randint(0, 50, (6, 1, 24), generator=torch.Generator().manual_seed(2)).expand(6, 2, 24).clone()
    ids[:, 0, :changed], ids[:, 1, :changed] = 0, 1
    batch = {"ids": ids}
    exact = gradient_norms_by_loop(model.double(), pairwise, batch)
    found = gradient_norms(model.float(), pairwise, batch)
    if changed:
        assert ((found.double() - exact).abs() / exact).max() < 1e-3
    scale = gradient_norms_by_loop(model.double(), lambda m, b: m(b["ids"])[:, 0], batch)
    assert ((found.double() - exact).abs() / scale).max() < 1e-6  # exact duplicates: zero, not NaN


def test_calls_that_cancel():
    """The towers of one encoder pull on its weights in opposite directions: ||a||^2 + 2 <a, b> + ||b||^2 is a small difference."""
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))
    loss = lambda model, batch: (model(batch["x"]) - model(batch["x"] + batch["near"]))[:, 0]  # noqa: E731
    batch = {"x": rows(5, 30)["x"], "near": 1e-3 * rows(5, 30, seed=4)["x"]}
    exact = gradient_norms_by_loop(model.double(), loss, in_dtype(batch, torch.float64))
    found = gradient_norms(model.float(), loss, batch)
    assert ((found.double() - exact).abs() / exact).max() < 1e-3


def test_products_are_mended_only_where_they_cancel(monkeypatch):
    from recsys_importance.gradients import terms

    written = []
    monkeypatch.setattr(terms, "_written_out", lambda *given: written.append(given[1]) or terms._of_sample(given[0][0], *given[1:]))
    x, e = torch.randn(4, 20, 60), torch.randn(4, 20, 60)
    x[2], e[2, 10:] = x[2, :1], -e[2, :10]  # equal rows, opposite pulls
    squares, *_ = terms._squares([Outer(e, x)], torch.Size((60, 60)), terms._Grams())
    assert written == [2]
    torch.testing.assert_close(squares, torch.stack([(e[i].mT @ x[i]).square().sum() for i in range(4)]), rtol=1e-4, atol=1e-5)


# --- samples that move or mix -----------------------------------------------------------------------------------------------------------


def moved(order):
    """Rows put into another order, worked on, and put back."""

    def forward(m, x):
        places = order(x)
        return m.head(torch.tanh(m.body(x[places])))[places.argsort()]

    return Through(forward, body=nn.Linear(6, 6), head=nn.Linear(6, 1))


class SequenceFirst(nn.Module):
    """Positions before samples inside, as torch's own transformer layers have them by default."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.transpose(0, 1))).mean(0))


class Distances(nn.Module):
    """A table of distances of positions, the same for all samples, added to every sample's scores."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 1)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return self.head(x + self.table(places[:, None] - places + 4).mean(1)).mean(1)


class Experts(nn.Module):
    """Two experts, each of which sees the samples that are sent to it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        tokens = x.reshape(-1, 6)
        first = tokens[:, 0] > 0
        out = torch.zeros_like(tokens)
        out[first], out[~first] = self.first(tokens[first]), self.second(tokens[~first])
        return out.reshape(x.shape).sum((1, 2))[:, None]


def tokens_of_experts():
    """Four samples of two tokens, four of which go to either expert."""
    x = torch.randn(4, 2, 6)
    x[..., 0] = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    return {"x": x, "y": torch.randn(4)}


def normalised(**options):
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, **options), nn.Linear(6, 1)).train()


MOVING = {
    "reversed": lambda: (moved(lambda x: torch.arange(len(x)).flip(0)), rows()),
    "sorted by length": lambda: (moved(lambda x: x.sum(1).argsort()), rows()),
    "flip": lambda: (Through(lambda m, x: m.b(torch.tanh(m.a(x.flip(0)))).flip(0), a=nn.Linear(6, 6), b=nn.Linear(6, 1)), rows()),
    "roll": lambda: (Through(lambda m, x: m.b(torch.tanh(m.a(x.roll(1, 0)))).roll(-1, 0), a=nn.Linear(6, 6), b=nn.Linear(6, 1)), rows()),
    "index_select": lambda: (
        Through(
            lambda m, x: m.b(m.a(x.index_select(0, torch.tensor([1, 0, 2, 3, 4]))).index_select(0, torch.tensor([1, 0, 2, 3, 4]))),
            a=nn.Linear(6, 6),
            b=nn.Linear(6, 1),
        ),
        rows(),
    ),
    "the next sample's output added": lambda: (
        Through(lambda m, x: m.b(torch.tanh(m.a(x)) + 0.3 * m.a(x).roll(1, 0)), a=nn.Linear(6, 6), b=nn.Linear(6, 1)),
        rows(),
    ),
    "sequence first, T = B": lambda: (SequenceFirst(), rows(5, 5, 6)),
    "sequence first, T = 1": lambda: (SequenceFirst(), rows(5, 1, 6)),
    "distances, T = B": lambda: (Distances(), rows(5, 5, 6)),
    "an expert that gets B tokens": lambda: (Experts(), tokens_of_experts()),
    "batch norm": lambda: (normalised(), rows()),
    "batch norm without parameters": lambda: (normalised(affine=False), rows()),
    "batch norm without running statistics": lambda: (normalised(affine=False, track_running_stats=False).eval(), rows()),
    "mean over the batch": lambda: (
        Through(lambda m, x: m.b(m.a(x) - m.a(x).mean(0)), a=nn.Linear(6, 6), b=nn.Linear(6, 1)),
        rows(),
    ),
    "attention over samples": lambda: (
        Through(lambda m, x: m.b(torch.softmax(x @ x.mT, 1) @ torch.tanh(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 1)),
        rows(),
    ),
}


@pytest.mark.parametrize("case", MOVING)
def test_samples_that_move_or_mix_are_noticed(case, each_kernel):
    model, batch = MOVING[case]()
    if case in ("sequence first, T = 1", "distances, T = B"):  # told apart by following the operations
        assert_right(model, residual, batch)
        return
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting(exponent=0))):
        with pytest.raises(ValueError):
            action(model, residual, batch)
    assert all(p.grad is None for p in model.parameters())


def test_samples_that_start_to_move_later_are_noticed():
    """The first batch is sorted already."""
    model, sorted_rows = moved(lambda x: x.sum(1).argsort()), rows()
    sorted_rows["x"] = sorted_rows["x"][sorted_rows["x"].sum(1).argsort()]
    torch.testing.assert_close(gradient_norms(model, residual, sorted_rows), norms_of_the_whole_batch(model, residual, sorted_rows))
    with pytest.raises(ValueError, match=WRONG):
        gradient_norms(model, residual, rows(seed=7))


def test_positions_that_are_as_many_as_samples_later_are_noticed():
    """A model that is right at T = 3 and takes positions for samples at T = B."""

    def forward(m, x):
        return m.head(torch.tanh(m.body(x.transpose(0, 1)))).mean(0) if x.shape[1] == len(x) else m.head(torch.tanh(m.body(x))).mean(1)

    model = Through(forward, body=nn.Linear(6, 6), head=nn.Linear(6, 1))
    gradient_norms(model, residual, rows(5, 3, 6))
    with pytest.raises(ValueError, match=WRONG):
        gradient_norms(model, residual, rows(5, 5, 6))


# --- weights that are not what they seem ------------------------------------------------------------------------------------------------


def test_forward_patched_on_one_module_is_no_linear_s():
    model = net()
    plain = model[2].forward
    model[2].forward = lambda x: 2 * plain(x) + x
    assert_right(model, residual, rows())
    exact = gradient_norms_by_loop(model, residual, rows())
    torch.testing.assert_close(gradient_norms(model, residual, rows(), by_sample="2"), exact, rtol=1e-4, atol=0)


def test_forward_patched_on_a_frozen_module_counts():
    model = net().requires_grad_(False)
    model[4].requires_grad_(True)
    plain = model[2].forward
    model[2].forward = lambda x: 2 * plain(x) + x
    assert_right(model, residual, rows())


@pytest.mark.parametrize("swap", ["all", "one"])
def test_functional_call_with_other_parameters_is_refused(swap):
    model = net()
    others = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    others = others if swap == "all" else {"2.weight": others["2.weight"]}
    loss = lambda model, batch: (torch.func.functional_call(model, others, batch["x"])[:, 0] - batch["y"]) ** 2  # noqa: E731
    with pytest.raises(ValueError, match=r"another tensor in the place of its parameter 'weight' \(torch.func.functional_call"):
        gradient_norms(model, loss, rows())


def test_a_frozen_weight_made_of_trained_ones_keeps_its_graph(each_kernel):
    """A hypernetwork: the frozen layer is called with a weight that a trained layer makes, for all samples alike."""
    model = nn.ModuleDict({"made": nn.Linear(3, 36, bias=False), "body": nn.Linear(6, 6).requires_grad_(False), "head": nn.Linear(6, 1)})
    given = torch.ones(1, 3)

    def loss(model, batch):
        weight = model["made"](given).reshape(6, 6)
        hidden = torch.func.functional_call(model["body"], {"weight": weight}, batch["x"])
        return (model["head"](hidden)[:, 0] - batch["y"]) ** 2

    with pytest.raises(ValueError, match=r"module 'made' \(Linear\) was given one row for 5 samples"):
        gradient_norms(model, loss, rows())
    found = gradient_norms_by_loop(model, loss, rows())
    torch.testing.assert_close(found, norms_of_the_whole_batch(model, loss, rows()), rtol=1e-4, atol=0)


def test_a_hook_for_all_modules_is_refused_and_named():
    def tripled(module, inputs, output):
        return 3 * output

    handle = torch.nn.modules.module.register_module_forward_hook(tripled)
    try:
        with pytest.raises(ValueError, match=r"a forward hook for all modules is set \(.*tripled\)"):
            gradient_norms(net(), residual, rows())
    finally:
        handle.remove()
    assert_right(net(), residual, rows())


# --- hooks on gradients -----------------------------------------------------------------------------------------------------------------


def plain_gradient(model, loss, batch, weights) -> torch.Tensor:
    """By an ordinary backward pass, in which hooks run."""
    model.zero_grad()
    (weights * loss(model, batch)).mean().backward()
    found = gradient_in(model).clone()
    model.zero_grad()
    return found


def test_hooks_on_parameters_run_as_in_a_plain_backward_pass():
    model, batch, seen = net(), rows(), []
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    step = weighted_backward(model, residual, batch, Weighting())
    assert len(seen) == 1  # once, though the step was checked
    found = gradient_in(model).clone()
    assert off(found, plain_gradient(model, residual, batch, step.weights)) < 1e-5
    assert abs(seen[0] - seen[1]) < 1e-5 * seen[1]


def test_an_optimiser_in_the_backward_pass_steps_once_per_weighted_step():
    """Post-accumulate hooks that step and let go of the gradient, as memory-saving trainers set them."""
    model, twin, batch = net(), net(), rows()
    for parameter in model.parameters():
        optimiser = torch.optim.SGD([parameter], lr=0.1)

        def take_step(p, optimiser=optimiser):
            optimiser.step()
            optimiser.zero_grad()

        parameter.register_post_accumulate_grad_hook(take_step)
    step = weighted_backward(model, residual, batch, Weighting())
    (step.weights * residual(twin, batch)).mean().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert all(p.grad is None for p in model.parameters())
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_hooks_see_each_micro_batch_as_in_plain_accumulation():
    model, batch, seen = net(), rows(6), []
    model[0].weight.register_hook(lambda gradient: seen.append(1) or gradient * 2)
    pieces = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    step = weighted_backward(model, residual, pieces, Weighting())
    assert len(seen) == 2
    found = gradient_in(model).clone()
    assert off(found, plain_gradient(model, residual, batch, step.weights)) < 1e-5


def test_models_cut_over_devices_are_refused():
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        weighted_backward(nn.DataParallel(net()), residual, rows(), Weighting())


def of_one_process(folder):
    """The errors for weights that fully_shard has cut, and for a communication hook; and the step without one."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    sharded, replicated, errors = net(), DistributedDataParallel(net()), []
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    first = weighted_backward(replicated, residual, rows(), Weighting())
    replicated.register_comm_hook(None, default_hooks.fp16_compress_hook)
    for model in (sharded, replicated):
        try:
            weighted_backward(model, residual, rows(), Weighting())
        except ValueError as error:
            errors.append(str(error))
    torch.distributed.destroy_process_group()
    return first.weights.tolist(), errors


def test_sharded_weights_and_communication_hooks_are_refused(tmp_path):
    weights, errors = apart(of_one_process, tmp_path)
    expected = weighted_backward(net(), residual, rows(), Weighting()).weights
    torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-5, atol=0)
    assert len(errors) == 2
    assert "parameter '0.weight' is sharded over processes" in errors[0] and "communication hook" in errors[1]


# --- several threads --------------------------------------------------------------------------------------------------------------------


def test_threads_that_score_one_model_do_not_disturb_one_another():
    pair, _ = pair_batch("two_tower")
    batches = [pair_batch("two_tower", count, seed=count)[1] for count in (3, 4, 5, 6)]
    expected = [gradient_norms(pair.model, cross_entropy, batch) for batch in batches]
    failures = []

    def score(batch, norms):
        for _ in range(12):
            try:
                found = gradient_norms(pair.model, cross_entropy, batch)
                torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
            except Exception as error:  # whatever it is, it is shown
                failures.append(f"{type(error).__name__}: {str(error)[:200]}")

    threads = [threading.Thread(target=score, args=given) for given in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(10):
            cross_entropy(pair.model, batches[0])  # and someone predicts meanwhile
    for thread in threads:
        thread.join()
    assert failures == []


def test_eval_mode_lasts_until_the_last_thread_is_done():
    model, inside, leave = perceptron(dropout=0.5).train(), threading.Event(), threading.Event()

    def slow():
        with evaluating(model):
            inside.set()
            leave.wait(10)
            modes.append(model[2].training)

    modes = []
    thread = threading.Thread(target=slow)
    with evaluating(model):
        thread.start()
        inside.wait(10)
    assert not model[2].training  # the other is still inside
    leave.set()
    thread.join()
    assert modes == [False] and all(module.training for module in model.modules())


# --- nothing left to learn --------------------------------------------------------------------------------------------------------------


def hinge(model, batch):
    return torch.relu(batch["margin"] - model(batch["x"])[:, 0].square())


@pytest.mark.parametrize("action", [weighted_backward, weighted_backward_by_loop])
@pytest.mark.parametrize("weighting", [Weighting(), Weighting(exponent=0), Weighting(exponent=-1), Weighting(threshold=0.5, clip=2)])
def test_a_batch_of_zero_norms_trains_nothing_and_says_so(action, weighting):
    model, batch = net(), rows() | {"margin": torch.full((5,), -1.0)}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="all 5 gradient norms of a step are zero: it trains nothing"):
        step = action(model, hinge, batch, weighting)
    optimiser.step()
    assert not step.weights.any() and not step.norms.any() and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))  # no decay either


@pytest.mark.parametrize("weighting", [Weighting(), Weighting(clip=2)], ids=["one pass", "two passes"])
def test_micro_batches_of_zero_norms_train_nothing(weighting):
    model, batch = net(), rows() | {"margin": torch.full((5,), -1.0)}
    pieces = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 5))]
    with pytest.warns(UserWarning, match="trains nothing"):
        step = weighted_backward(model, hinge, pieces, weighting)
    assert not step.weights.any() and all(p.grad is None for p in model.parameters())


# --- the certificate itself -------------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.gate


@pytest.fixture
def wrong_rule():
    """Right for the first sample only."""

    @rule(Gate)
    def of_gate(module, inputs, e):
        return {"gate": Whole(e * inputs[0][:1])}

    yield
    del RULES[f"{Gate.__module__}.{Gate.__qualname__}"]


def gated():
    return nn.Sequential(Gate(), nn.Linear(6, 1))


def test_a_wrong_rule_is_noticed_at_the_first_call(wrong_rule):
    with pytest.raises(ValueError, match=rf"{WRONG} for 1 of 3 parameters: 0.gate \(off by"):
        gradient_norms(gated(), residual, rows())


def test_checks_can_be_turned_off_and_asked_for(wrong_rule):
    model = gated()
    gradient_norms(model, residual, rows(), check=False)
    weighted_backward(model, residual, rows(), Weighting(), check=False)
    with pytest.raises(ValueError, match=WRONG):
        gradient_norms(model, residual, rows(), check=True)


def calls_checked(monkeypatch, calls: int, batch_of=lambda call: rows()) -> list[int]:
    """Which of so many calls with one model were checked; the loss is a new function each time."""
    checked, plain, model = [], certificate._certify, net()
    monkeypatch.setattr("recsys_importance.gradients.samples._certify", lambda *given: checked.append(1) or plain(*given))
    found = []
    for call in range(1, calls + 1):
        gradient_norms(model, lambda model, batch: model(batch["x"]).flatten(1).sum(1), batch_of(call))
        found += [call] * len(checked)
        checked.clear()
    return found


def test_checks_become_rare(monkeypatch):
    assert calls_checked(monkeypatch, 120) == [1, 10, 100]


def test_a_batch_that_looks_new_is_checked(monkeypatch):
    sizes = {1: (5, 3, 6), 2: (5, 4, 6), 3: (5, 5, 6), 4: (5, 1, 6), 5: (5, 5, 6)}
    assert calls_checked(monkeypatch, 5, lambda call: rows(*sizes[call])) == [1, 3, 4]


def test_a_checked_step_leaves_what_an_unchecked_one_does():
    """Random numbers, statistics, gradients and weights."""
    outcomes = []
    for check in (True, False):
        torch.manual_seed(0)
        pair = tiny_pair("two_tower", dropout=0.3)
        pair.model.train()
        batch = pair_batch("two_tower")[1]
        torch.manual_seed(1)
        step = weighted_backward(pair.model, cross_entropy, batch, Weighting(), check=check)
        outcomes.append([*step, gradient_in(pair.model), torch.get_rng_state(), *pair.model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_a_loss_that_changes_from_pass_to_pass_is_said_to_be_uncheckable():
    drawn = iter(range(100))
    loss = lambda model, batch: residual(model, batch) * (1 + next(drawn))  # noqa: E731
    with pytest.warns(UserWarning, match="could not be checked: the loss changes from one pass to the next"):
        gradient_norms(net(), loss, rows())


def test_rounding_is_not_taken_for_an_error():
    """A sum of 1e6 and its negative: in float32 neither pass has the gradient right, in float64 both have."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    loss = lambda model, batch: (model(1e6 * batch["x"]) - model(1e6 * batch["x"] + batch["x"]))[:, 0]  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(gradient_norms(model, loss, rows())).all()


def test_a_gradient_that_is_nothing_but_rounding_is_no_error():
    """Cosine of two equal embeddings: its slope is 0, and in float32 noise."""
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 30))
    loss = lambda model, batch: (1 - torch.cosine_similarity(model(batch["x"]), model(batch["x"] + 0.0))) ** 2 + 0.0  # noqa: E731
    cosine = lambda model, batch: 1 - torch.cosine_similarity(model(batch["x"]), model(batch["x"] + 0.0))  # noqa: E731
    for each in (loss, cosine):
        for seed in range(5):
            assert (gradient_norms(model, each, rows(4, seed=seed), check=True) < 1e-5).all()


def test_labels_that_are_nan_are_reported_as_such():
    with warnings.catch_warnings(), pytest.raises(ValueError, match="norms are NaN or infinite"):
        warnings.simplefilter("error")
        gradient_norms(net(), residual, rows() | {"y": torch.full((5,), torch.nan)}, check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes_its_check_and_mixing_does_not(dtype):
    def lowered(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            return residual(model, batch).float()

    gradient_norms(net(), lowered, rows(), check=True)
    with pytest.raises(ValueError, match=WRONG):
        gradient_norms(moved(lambda x: x.sum(1).argsort()), lowered, rows(), check=True)
