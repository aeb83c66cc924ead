"""What a result depends on gets into its hash, what changes no number stays out, and the hash is the same in every process."""

import collections
import contextlib
import dataclasses
import enum
import functools
import importlib
import json
import logging
import math
import operator
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import settings_of_the_loss
import settings_of_the_loss as aliased
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from recsys_importance import identity
from recsys_importance.identity import NoIdentity, fingerprint, fingerprint_rows, identity_of, torch_state

# --- losses that depend on one number, t, each in another way -----------------------------------------------------------------------------

SCALE, TENSOR, TABLE, HOLDER, CHOSEN = 1.0, torch.tensor(1.0), {"deep": [{"t": 1.0}]}, types.SimpleNamespace(t=1.0), abs


def by_global(x):
    return x / SCALE


def by_global_tensor(x):
    return x / TENSOR


def by_nested_global(x):
    return x / TABLE["deep"][0]["t"]


def by_attribute_of_a_global(x):
    return x / HOLDER.t


def by_module_attribute(x):
    return x / settings_of_the_loss.T


def by_function_of_a_module(x):
    return aliased.again(x)


def by_name_of_an_attribute(x):
    return x / getattr(settings_of_the_loss, "T")  # noqa: B009


def by_local_alias(x):
    module = settings_of_the_loss
    return x / module.T


def by_import_inside(x):
    import settings_of_the_loss as inside

    return x / inside.T


def by_import_of_a_name(x):
    from settings_of_the_loss import T

    return x / T


def by_environment(x):
    return x / float(os.environ.get("LOSS_T", "1"))


def by_nested_function(x):
    return [(lambda y: y / SCALE)(part) for part in x]


def by_recursion(x, depth=3):
    return x / SCALE if depth == 0 else by_recursion(x, depth - 1)


def by_function_attribute(x):
    return x / by_function_attribute.t


by_function_attribute.t = 1.0


def by_chosen_function(x):
    return CHOSEN(x)


class ByClassAttribute:
    t = 1.0

    def __call__(self, x):
        return x / self.t


def by_class(x):
    return ByClassAttribute()(x)


def wrapped(function):
    @functools.wraps(function)
    def outer(*args):
        return function(*args)

    return outer


@contextlib.contextmanager
def changed(holder, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(holder, name, value) if hasattr(holder, "keys") else patch.setattr(holder, name, value)
        yield


HERE = sys.modules[__name__]
READ = {  # the function, and what gets another value
    "global": (by_global, HERE, "SCALE", 10.0),
    "global int for float": (by_global, HERE, "SCALE", 1),
    "global tensor": (by_global_tensor, HERE, "TENSOR", torch.tensor(10.0)),
    "nested global": (by_nested_global, TABLE["deep"][0], "t", 10.0),
    "attribute of a global": (by_attribute_of_a_global, HOLDER, "t", 10.0),
    "module attribute": (by_module_attribute, settings_of_the_loss, "T", 10.0),
    "function of a function of a module": (by_function_of_a_module, settings_of_the_loss, "T", 10.0),
    "function of a module": (by_function_of_a_module, settings_of_the_loss, "divided", lambda x: x / 10),
    "getattr": (by_name_of_an_attribute, settings_of_the_loss, "T", 10.0),
    "local alias": (by_local_alias, settings_of_the_loss, "T", 10.0),
    "import inside": (by_import_inside, settings_of_the_loss, "T", 10.0),
    "import of a name": (by_import_of_a_name, settings_of_the_loss, "T", 10.0),
    "environment": (by_environment, os.environ, "LOSS_T", "10"),
    "nested function": (by_nested_function, HERE, "SCALE", 10.0),
    "recursion": (by_recursion, HERE, "SCALE", 10.0),
    "function attribute": (by_function_attribute, by_function_attribute, "t", 10.0),
    "chosen function": (by_chosen_function, HERE, "CHOSEN", math.sqrt),
    "class attribute": (by_class, ByClassAttribute, "t", 10.0),
    "method": (by_class, ByClassAttribute, "__call__", lambda self, x: x / 10),
    "wrapped": (wrapped(by_global), HERE, "SCALE", 10.0),
    "partial": (functools.partial(by_global), HERE, "SCALE", 10.0),
    "lru_cache": (functools.lru_cache(by_global), HERE, "SCALE", 10.0),
    "no_grad": (torch.no_grad()(by_global), HERE, "SCALE", 10.0),
    "function of torch": (lambda x: functional.gelu(x), functional, "gelu", lambda x: x),
    "constant of numpy": (lambda x: x * np.pi, np, "pi", 3.0),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_function_reads_is_part_of_it(name):
    function, holder, key, value = READ[name]
    before = fingerprint(function)
    assert before == fingerprint(function)
    with changed(holder, key, value):
        assert fingerprint(function) != before
    assert fingerprint(function) == before


def closing_over(t):
    return lambda x: x / t


def with_default(t):
    def loss(x, t=t):
        return x / t

    return loss


def with_keyword_default(t):
    def loss(x, *, t=t):
        return x / t

    return loss


def through_a_closed_function(t):
    inner = closing_over(t)
    return lambda x: inner(x)


class Callable_:
    def __init__(self, **state):
        self.__dict__ |= state

    def __call__(self, x):
        return x

    def method(self, x):
        return x


class Slots:
    __slots__ = ("t",)

    def __init__(self, t):
        self.t = t


@dataclasses.dataclass(frozen=True)
class Data:
    t: object
    inner: object = None


class Level(enum.Enum):
    LOW = 1
    HIGH = 10


class Network(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.fill_(1)
            self.linear.bias.fill_(0)
        self.t = t

    def forward(self, x):
        return self.linear(x) / self.t


def network(change):
    made = Network(1.0)
    change(made)
    return made


def circle(t):
    first, second = Callable_(t=t), Callable_()
    first.other, second.other = second, first
    return first


def class_made_with(t):
    class Made:
        def __call__(self, x):
            return x / t

    return Made()


def deep(t, depth=3000):
    """A chain of closures, far longer than Python's stack."""
    loss = closing_over(t)
    for _ in range(depth):
        loss = (lambda inner: lambda x: inner(x))(loss)
    return loss


MADE = {
    "closure": closing_over,
    "closure over a tensor": lambda t: closing_over(torch.tensor([1.0, t])),
    "closure over bfloat16": lambda t: closing_over(torch.tensor(t, dtype=torch.bfloat16)),
    "closure over an array": lambda t: closing_over(np.array([1.0, t])),
    "closure over objects": lambda t: closing_over(np.array([None, {"t": t}], dtype=object)),
    "closure over a network": lambda t: closing_over(network(lambda made: made.linear.weight.data.fill_(t))),
    "closed function": through_a_closed_function,
    "default": with_default,
    "keyword default": with_keyword_default,
    "constant": lambda t: (lambda x: x / 1.0) if t == 1 else (lambda x: x / 10.0),
    "constant in a tuple": lambda t: (lambda x: x in (1, (2, 1.0))) if t == 1 else (lambda x: x in (1, (2, 10.0))),
    "operation": lambda t: (lambda x: x + t) if t == 1 else (lambda x: x - t),
    "comparison": lambda t: (lambda x: x < 3) if t == 1 else (lambda x: x <= 3),
    "attribute read": lambda t: (lambda x: x.real) if t == 1 else (lambda x: x.imag),
    "partial": lambda t: functools.partial(by_global, t),
    "partial keyword": lambda t: functools.partial(by_global, t=t),
    "nested partial": lambda t: functools.partial(functools.partial(by_global, [t])),
    "names of arguments": lambda t: (lambda m, t, s: t - s) if t == 1 else (lambda m, s, t: s - t),
    "bound method": lambda t: Callable_(t=t).method,
    "bound method of a builtin": lambda t: [t].__contains__,
    "tensor of a callable": lambda t: Callable_(scale=torch.tensor(t)),
    "nested tensor": lambda t: Callable_(scales={"a": [(torch.tensor(t),)]}),
    "set": lambda t: Callable_(names={"a", "b", "c", str(t)}),
    "set of objects": lambda t: Callable_(names={("a", Level.LOW), ("b", t)}),
    "slots": Slots,
    "dataclass": Data,
    "nested dataclass": lambda t: Data(1, Data({"t": torch.tensor(t)})),
    "named tuple": lambda t: collections.namedtuple("Named", "t")(t),
    "ordered dict": lambda t: collections.OrderedDict(t=t),
    "default dict": lambda t: collections.defaultdict(list, {3: t}),
    "deque": lambda t: collections.deque([t]),
    "enum": lambda t: Level.LOW if t == 1 else Level.HIGH,
    "dtype": lambda t: torch.float32 if t == 1 else torch.float64,
    "device": lambda t: torch.device("cpu") if t == 1 else torch.device("meta"),
    "itemgetter": operator.itemgetter,
    "frame": lambda t: pd.DataFrame({"t": [t], "name": ["a"]}),
    "index of a frame": lambda t: pd.DataFrame({"x": [1]}, index=[t]),
    "series": lambda t: pd.Series([t, 2.0]),
    "generator of random numbers": lambda t: torch.Generator().manual_seed(int(t)),
    "random numbers of numpy": lambda t: np.random.default_rng(int(t)),
    "weak reference": lambda t: (lambda held: Callable_(held=held, weak=weakref.ref(held)))(Callable_(t=t)),
    "property": lambda t: type("WithProperty", (), {"t": property(closing_over(t))})(),
    "class body": class_made_with,
    "metaclass-less type": lambda t: type("Made", (), {"t": t}),
    "circle": circle,
    "deep": deep,
    "module": lambda t: nn.Dropout(t / 100),
    "module's attribute": lambda t: network(lambda made: setattr(made, "t", t)),
    "module's weight": lambda t: network(lambda made: made.linear.weight.data.fill_(t)),
    "module's buffer": lambda t: network(lambda made: made.register_buffer("b", torch.tensor(t), persistent=False)),
    "module's eps": lambda t: nn.LayerNorm(2, eps=t),
    "module's activation": lambda t: nn.Sequential(nn.GELU("none" if t == 1 else "tanh")),
    "module's forward": lambda t: network(lambda made: setattr(made, "forward", closing_over(t))),
    "layer's forward": lambda t: network(lambda made: setattr(made.linear, "forward", closing_over(t))),
    "module's hook": lambda t: network(lambda made: made.register_forward_hook(with_default(t))),
    "layer's pre-hook": lambda t: network(lambda made: made.linear.register_forward_pre_hook(with_default(t))),
    "module's frozen weight": lambda t: network(lambda made: made.linear.weight.requires_grad_(t == 1)),
    "weight's hook": lambda t: network(lambda made: made.linear.weight.register_hook(closing_over(t))),
    "layer more": lambda t: nn.Sequential(*[nn.Tanh()] * int(t)),
    "parametrised": lambda t: nn.utils.parametrize.register_parametrization(
        network(lambda made: made).linear, "weight", network(lambda made: setattr(made, "t", t))
    ),
    "text": str,
    "number": float,
    "type of a number": lambda t: 1 if t == 1 else True,
    "minus zero": lambda t: 0.0 if t == 1 else -0.0,
    "shape": lambda t: np.zeros((2, 3) if t == 1 else (3, 2)),
    "array's type": lambda t: np.zeros(2, np.float32 if t == 1 else np.int32),
    "array or its bytes": lambda t: np.zeros(1) if t == 1 else bytes(8),
    "list or tuple": lambda t: [torch.ones(1)] if t == 1 else (torch.ones(1),),
    "sparse tensor": lambda t: torch.tensor([0.0, t]).to_sparse(),
    "view of a tensor": lambda t: torch.arange(20.0)[int(t) :: 2][:3],
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_thing_holds_is_part_of_it(name):
    make = MADE[name]
    assert fingerprint(make(1.0)) == fingerprint(make(1.0)) != fingerprint(make(10.0))
    assert fingerprint([make(1.0)]) == fingerprint([make(1.0)]) != fingerprint([make(10.0)])


def all_fingerprints():
    return {name: fingerprint(READ[name][0]) for name in READ} | {f"made: {name}": fingerprint(MADE[name](1.0)) for name in MADE}


def test_hashes_are_the_same_in_every_process():
    """Other hashes of texts, other addresses, another count of hooks, another folder."""
    code = (
        "import json, torch; rubbish = [torch.nn.Linear(2, 2).register_forward_hook(print) for _ in range(7)]; "
        "import test_identity; print(json.dumps(test_identity.all_fingerprints()))"
    )
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    there, here = json.loads(run.stdout.splitlines()[-1]), all_fingerprints()
    assert [name for name in here if here[name] != there[name]] == []


def test_an_installed_package_counts_by_its_files(tmp_path, monkeypatch):
    """In a folder of libraries: one constant in another file changed, and the same version."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(identity, "_library_folders", lambda: (f"{tmp_path}/",))
    package, found = tmp_path / "ranking_losses", []
    package.mkdir()
    (package / "__init__.py").write_text("from .settings import T\n\ndef loss(x):\n    return x / T\n")
    for t in ("1", "2", "2"):
        (package / "settings.py").write_text(f"T = {t}\n")
        for name in [name for name in sys.modules if name.startswith("ranking_losses")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        identity._version.cache_clear()
        found.append(fingerprint(importlib.import_module("ranking_losses").loss))
    assert found[0] != found[1] == found[2]


def test_functions_and_classes_of_torch_that_were_replaced(monkeypatch):
    made = nn.Sequential(nn.Linear(2, 2))
    state, before = torch_state(), fingerprint(made)
    assert not any(state.values())
    monkeypatch.setattr(functional, "gelu", lambda x: x)
    assert [name for name, value in torch_state().items() if value] == ["torch.nn.functional.gelu"]
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert fingerprint(nn.Sequential(nn.Linear(2, 2))) != before
    with nn.modules.module.register_module_forward_hook(lambda module, given, output: output):
        assert torch_state()["_global_forward_hooks"]


# --- what changes no number ---------------------------------------------------------------------------------------------------------------


def compiled(text):
    scope = {}
    exec(text, scope)
    return scope["loss"]


def test_comments_docstrings_lines_and_names_of_variables_do_not_matter():
    plain = compiled("def loss(model, batch):\n    y = model(batch['x'])\n    return (y - 1) ** 2\n")
    written = (
        "\n\ndef loss(model: object, batch: dict) -> float:\n    'Squared.'\n    #\n    z = model(batch['x'])\n\n    return (z - 1) ** 2\n"
    )
    assert fingerprint(plain) == fingerprint(compiled(written))
    assert fingerprint(plain) != fingerprint(compiled(written.replace("- 1", "- 2")))


def test_what_cannot_change_a_number_does_not_matter():
    first = Callable_(t=1, lock=threading.Lock(), bar=tqdm(total=3, disable=True), log=logging.getLogger("a"), out=sys.stderr)
    bar = tqdm(total=3, disable=True)
    bar.update(2)
    second = Callable_(t=1, lock=threading.Lock(), bar=bar, log=logging.getLogger("b"), out=sys.stderr)
    second.lock.acquire()
    assert fingerprint(first) == fingerprint(second)


def test_use_changes_nothing():
    layers = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LSTM(4, 2, batch_first=True))
    cached = functools.lru_cache(abs)

    class Lazily:
        @functools.cached_property
        def squares(self):
            return [k * k for k in range(9)]

    lazily = Lazily()
    single = functools.singledispatch(lambda x: x)
    before = [fingerprint(value) for value in (layers, cached, lazily, single)]
    layers(torch.ones(2, 5, 3))[0].sum().backward()
    cached(-1), lazily.squares, single(3)
    assert before == [fingerprint(value) for value in (layers, cached, lazily, single)]


def test_modes_count_where_they_are_asked_for():
    layers = nn.Sequential(nn.Dropout())
    assert fingerprint(layers) != fingerprint(nn.Sequential(nn.Dropout()).eval())
    assert fingerprint(layers, modes=False) == fingerprint(nn.Sequential(nn.Dropout()).eval(), modes=False)


def test_what_is_known_is_not_looked_into():
    first, second = network(lambda made: made), network(lambda made: setattr(made, "t", 10.0))
    losses = [closing_over(made) for made in (first, second)]
    assert fingerprint(losses[0]) != fingerprint(losses[1])
    known = [{id(made): "the model"} for made in (first, second)]
    assert fingerprint(losses[0], known=known[0]) == fingerprint(losses[1], known=known[1])


# --- what has no identity -----------------------------------------------------------------------------------------------------------------


class Unreadable:
    def __reduce_ex__(self, protocol):
        raise TypeError("not today")


def endless():
    inner = []
    inner.append(inner)
    for _ in range(100_000):
        inner = [inner]
    return inner


NONE = {
    "generator": lambda: closing_over(k for k in range(3)),
    "open file": lambda: closing_over(open(__file__)),  # noqa: SIM115
    "unreadable": lambda: closing_over(Unreadable()),
    "eval": lambda: lambda x: eval("x / SCALE"),
    "globals": lambda: lambda x: x / globals()["SCALE"],
    "modules": lambda: lambda x: x / sys.modules["settings_of_the_loss"].T,
    "import by name": lambda: lambda x: __import__("settings_of_the_loss").T,
    "tensor without values": lambda: closing_over(torch.ones(2, device="meta")),
    "deep": endless,
}


@pytest.mark.parametrize("name", NONE)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_what_has_no_identity_is_an_error_that_names_it(name):
    with pytest.raises(NoIdentity, match="^loss"):
        fingerprint(NONE[name](), name="loss")


def test_the_error_names_the_way_to_the_part():
    with pytest.raises(
        ValueError, match=r"^loss\.scales\['b'\]\.t: an object of class test_identity.Unreadable has no state that can be read"
    ):
        fingerprint(Callable_(scales={"a": 1, "b": Data(1), "b": Data(Unreadable())}), name="loss")  # noqa: F601


# --- parts, and rows ----------------------------------------------------------------------------------------------------------------------


def test_parts_by_name():
    one, ten = (identity_of(closing_over(t), name="loss") for t in (1.0, 10.0))
    assert one.keys() == ten.keys() == {"loss", "loss: its code", "loss: t (closure)"}
    assert {key for key in one if one[key] != ten[key]} == {"loss", "loss: t (closure)"}
    assert (one["loss: t (closure)"], ten["loss: t (closure)"]) == ("1.0", "10.0")
    assert one["loss"].startswith("closing_over.<locals>.<lambda> ")
    assert identity_of(functools.partial(by_global, t=3), name="loss")["loss: t"] == "3"


@dataclasses.dataclass
class Row:
    x: object


ROWS = {
    "texts": lambda k: {"id": f"s{k}", "text": "a" * k},
    "numbers": lambda k: {"id": k, "x": k / 3, "y": None, "z": k > 2},
    "lists": lambda k: {"id": k, "tokens": list(range(k))},
    "tensors": lambda k: {"id": k, "x": torch.full((3,), float(k)), "y": torch.tensor(k)},
    "bfloat16": lambda k: {"x": torch.full((3,), float(k), dtype=torch.bfloat16)},
    "other dtypes": lambda k: {"x": [torch.tensor(k, dtype=t) for t in (torch.float16, torch.complex64, torch.bool, torch.float8_e4m3fn)]},
    "ragged tensors": lambda k: {"x": torch.ones(k + 1)},
    "arrays": lambda k: {"x": np.full(3, k), "y": np.float32(k), "when": np.datetime64("2026-01-01") + k},
    "arrays of objects": lambda k: {"x": np.array([str(k), None], dtype=object)},
    "nested": lambda k: {"x": {"a": {"b": torch.tensor(float(k))}, "c": [torch.ones(2), (k,)]}},
    "dataclasses": lambda k: {"x": Row(torch.tensor(float(k)))},
    "objects": lambda k: {"x": Callable_(t=k)},
    "tuples": lambda k: (torch.tensor(k), k),
    "dataclass rows": lambda k: Row([k]),
    "sets": lambda k: {"x": {"a", "b", str(k)}},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_count_by_their_contents_and_order(name):
    make = ROWS[name]
    rows = [make(k) for k in range(4)]
    assert fingerprint_rows(rows) == fingerprint_rows([make(k) for k in range(4)])
    assert fingerprint_rows(rows) != fingerprint_rows([make(0), make(1), make(2), make(4)])
    assert fingerprint_rows(rows) != fingerprint_rows([make(1), make(0), make(2), make(3)])
    assert fingerprint_rows(rows) != fingerprint_rows(rows[:3])
    if isinstance(rows[0], dict):
        assert fingerprint_rows(rows) == fingerprint_rows([dict(reversed(row.items())) for row in rows])
        assert fingerprint_rows(rows) != fingerprint_rows([*rows[:3], rows[3] | {"more": 0}])


def test_values_do_not_move_between_columns_or_rows():
    assert fingerprint_rows([{"a": "xy", "b": ""}]) != fingerprint_rows([{"a": "x", "b": "y"}])
    assert fingerprint_rows([{"a": [1, 2]}, {"a": []}]) != fingerprint_rows([{"a": [1]}, {"a": [2]}])
    assert fingerprint_rows([{"a": torch.ones(2, 1)}]) != fingerprint_rows([{"a": torch.ones(1, 2)}])
    assert fingerprint_rows([{"a": torch.tensor(1)}]) != fingerprint_rows([{"a": np.array(1)}])
    assert fingerprint_rows([{"a": 1}]) != fingerprint_rows([{"a": True}]) != fingerprint_rows([{"a": 1.0}])


# --- the models that people bring ---------------------------------------------------------------------------------------------------------


def bert():
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def llama():
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0)
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))


@pytest.mark.parametrize("make", [bert, llama])
def test_a_network_of_transformers(make):
    first, second = make(), make()
    assert fingerprint(first) == fingerprint(second)
    first(torch.ones(2, 3, dtype=torch.int64)).logits.sum().backward()
    assert fingerprint(first) == fingerprint(second)
    second.config.hidden_act = "relu"
    assert fingerprint(first) != fingerprint(second)


def test_a_tokenizer_and_what_it_was_last_asked():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(*words, **options):
        fast = Tokenizer(models.WordLevel({word: k for k, word in enumerate(("[UNK]", "[PAD]", *words))}, unk_token="[UNK]"))
        fast.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", **options)

    first, second = tokenizer("a", "b"), tokenizer("a", "b")
    first(["a b a", "b"], padding=True, truncation=True, max_length=2)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(tokenizer("b", "a"))
    assert fingerprint(first) != fingerprint(tokenizer("a", "b", padding_side="left"))
