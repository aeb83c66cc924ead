"""Keras gradients against one tape per sample written here: every layer with a rule, KerasHub's BERT, losses, XLA, and what is refused."""

import contextlib
import threading
import warnings

import numpy as np
import pytest

from recsys_importance.importance import Weighting
from recsys_importance.keras.gradients import (
    RULES,
    Outer,
    Rows,
    Whole,
    _Certificate,
    check_norms,
    chosen_variables,
    gradient_norms,
    gradient_norms_by_tape,
    rule,
    sample_gradients,
)
from recsys_importance.keras.start import keras, tf

layers = keras.layers


# The slow twin: a tape for each sample ----------------------------------------------------------------------------------------------------


def part_of(batch, i):
    return keras.tree.map_structure(lambda part: part[i : i + 1], batch)


def gradients_by_hand(model, x, y, loss, variables=None) -> np.ndarray:
    """(B, P) gradients of loss(y_i, prediction_i), one tape each, every variable written out; 0 where the loss does not reach."""
    variables = model.trainable_variables if variables is None else variables
    rows = []
    for i in range(len(keras.tree.flatten(x)[0])):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(part_of(y, i), model(part_of(x, i), training=False)))
        rows.append(flat(tape.gradient(value, [v.value for v in variables]), variables))
    return np.stack(rows)


def flat(gradients, variables) -> np.ndarray:
    """(P,) float64 of gradients of the variables, of which some may be None and some tf.IndexedSlices."""
    pairs = zip(gradients, variables, strict=True)
    parts = [np.zeros(tuple(v.shape)) if g is None else tf.convert_to_tensor(g).numpy() for g, v in pairs]
    assert [part.shape for part in parts] == [tuple(v.shape) for v in variables]
    return np.concatenate([part.astype(np.float64).ravel() for part in parts])


def off(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def agrees(model, x, y, loss, *, by_hand=None, tolerance=1e-10, **options):
    """Norms, losses and a weighted sum are those of the tapes. Returns the tapes' gradients."""
    exact = gradients_by_hand(model, x, y, by_hand or loss)
    assert (np.linalg.norm(exact, axis=1) > 1e-4).all()
    found = sample_gradients(model, x, y, loss=loss, **options)
    np.testing.assert_allclose(found.norms, np.linalg.norm(exact, axis=1), rtol=tolerance)
    weights = np.linspace(-1, 2, len(exact))  # a negative one too, and no two alike
    assert off(flat(found.weighted(weights), model.trainable_variables), weights @ exact) < tolerance
    return exact


def randomised(model, seed=0, scale=0.5):
    """The model with random weights, biases and scales too: what starts as 0 or 1 would hide a missing factor."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=scale, size=variable.shape) + (variable.name == "gamma"))
    return model


def wavy(y, predictions):
    """(B,) losses that tell every component of a sample's predictions from every other."""
    values = tf.reshape(predictions, (tf.shape(predictions)[0], -1))
    place = tf.range(tf.shape(values)[1])
    y = tf.cast(tf.reshape(y, (-1, 1)), values.dtype)
    return tf.reduce_sum(tf.sin(values * tf.cast(1 + place % 5, values.dtype) / 3 + y + tf.cast(place, values.dtype)), 1)


def batch_of(shape, count=3, seed=1, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(dtype), rng.uniform(size=count).astype(dtype)


# Layers -----------------------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = ["linear", "relu", "tanh", "sigmoid", "gelu", "softmax", "swish", tf.math.sin, layers.LeakyReLU(0.2, dtype="float64")]
LAYERS = {
    "dense": (lambda: layers.Dense(4), (5,)),
    "dense, no bias": (lambda: layers.Dense(4, use_bias=False), (5,)),
    "dense, short sequence": (lambda: layers.Dense(4), (2, 5)),  # Gram matrices: 2 (5 + 4) < 2 * 5 * 4
    "dense, long sequence": (lambda: layers.Dense(2), (19, 3)),  # written out: 19 (3 + 2) > 2 * 3 * 2
    "dense, one position": (lambda: layers.Dense(4), (1, 5)),
    "dense, 4-D": (lambda: layers.Dense(3), (2, 3, 4)),
    "dense, one feature": (lambda: layers.Dense(1), (1,)),
    "layer norm": (lambda: layers.LayerNormalization(), (5,)),
    "layer norm of a sequence": (lambda: layers.LayerNormalization(epsilon=0.1), (3, 4)),
    "layer norm, two axes": (lambda: layers.LayerNormalization(axis=[1, 2]), (3, 4)),
    "layer norm, inner axis": (lambda: layers.LayerNormalization(axis=1), (3, 4)),
    "layer norm, axes of which some": (lambda: layers.LayerNormalization(axis=[1, 3]), (3, 2, 4)),
    "layer norm without center": (lambda: layers.LayerNormalization(center=False), (3, 4)),
    "layer norm without scale": (lambda: layers.LayerNormalization(scale=False), (3, 4)),
    "layer norm by the deviation": (lambda: layers.LayerNormalization(rms_scaling=True), (3, 4)),
    "root mean square": (lambda: layers.RMSNormalization(epsilon=0.1), (5,)),
    "root mean square, two axes": (lambda: layers.RMSNormalization(axis=[1, 2]), (3, 4)),
    "root mean square of KerasHub": (lambda: hub().layers.RMSNormalization(4), (3, 4)),
    "group norm": (lambda: layers.GroupNormalization(2), (3, 4)),
    "group norm, inner axis": (lambda: layers.GroupNormalization(2, axis=1, epsilon=0.1), (4, 3)),
    "group norm, each alone": (lambda: layers.GroupNormalization(-1, center=False), (2, 3, 4)),
    "parametric relu": (lambda: layers.PReLU(), (3, 4)),
    "parametric relu, shared": (lambda: layers.PReLU(shared_axes=[1]), (3, 4)),
    "conv 2-D, valid": (lambda: layers.Conv2D(4, (2, 3)), (4, 5, 2)),
    "conv 2-D, same, strides": (lambda: layers.Conv2D(3, 2, strides=2, padding="same", activation="tanh"), (5, 4, 2)),
    "conv 2-D, dilated": (lambda: layers.Conv2D(2, 2, dilation_rate=(1, 2), use_bias=False), (3, 5, 2)),
    "conv, valid": (lambda: layers.Conv1D(4, 3), (7, 2)),
    "conv, same": (lambda: layers.Conv1D(4, 3, padding="same"), (7, 2)),
    "conv, same, even kernel": (lambda: layers.Conv1D(4, 4, padding="same", use_bias=False), (6, 2)),
    "conv, causal": (lambda: layers.Conv1D(4, 3, padding="causal"), (7, 2)),
    "conv, causal, dilated": (lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (9, 2)),
    "conv, strides": (lambda: layers.Conv1D(4, 3, strides=2), (8, 2)),
    "conv, same, strides": (lambda: layers.Conv1D(4, 3, strides=2, padding="same"), (8, 2)),
    "conv, dilated": (lambda: layers.Conv1D(3, 2, dilation_rate=3), (9, 2)),
    "conv, activation": (lambda: layers.Conv1D(3, 2, activation="tanh", padding="same"), (5, 2)),
}
ATTENTIONS = {
    "plain": lambda: layers.MultiHeadAttention(2, 3, value_dim=4),
    "no bias": lambda: layers.MultiHeadAttention(2, 3, use_bias=False),
    "grouped": lambda: layers.GroupQueryAttention(3, 4, 2),
}
EQUATIONS = {
    "queries, keys, values": ("abc,cde->abde", (None, 2, 3), "de", (4, 5)),
    "attention's output": ("abcd,cde->abe", (None, 6), "e", (4, 2, 3)),
    "ellipsis before": ("...x,xy->...y", (4,), "y", (2, 3)),
    "ellipsis before, 4-D": ("...x,xy->...y", (2, 3, 4), "y", (2, 3, 5)),
    "ellipsis after": ("ab...,bc->ac...", (4, 5), "c", (3, 5)),
    "a kernel for each head": ("abc,bcd->abd", (3, 5), "bd", (3, 4)),
    "a kernel for each head, one bias": ("abc,bcd->abd", (3, 5), "d", (3, 4)),
    "output before input": ("ab,cb->ac", (4,), "c", (3,)),
    "output before input, positions": ("atb,cb->atc", (None, 4), "c", (5, 3)),
    "kernel's letters mixed": ("abcd,ced->abe", (None, 5), "e", (2, 3, 4)),
    "summed over positions": ("abc,cd->ad", (4,), "d", (5, 3)),
    "positions made last": ("abc,cd->adb", (4, 5), "d", (5, 3)),
    "bias for each head": ("abc,cde->abde", (None, 2, 3), "d", (4, 5)),
    "bias for each place": ("abc,cd->abd", (4, 3), "b", (4, 5)),
    "bias for place and feature": ("abc,cd->abd", (4, 3), "bd", (4, 5)),
    "no bias": ("abc,cd->abd", (None, 3), None, (4, 5)),
}


@pytest.fixture(autouse=True)
def everything_in_float64():
    """Models, losses and inputs of float64, in which 1e-10 tells right from wrong; tests of other precisions say so."""
    with policy("float64"):
        yield


@contextlib.contextmanager
def policy(name, floatx=None):
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(floatx or name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])


def alone(layer, shape, dtype=None):
    return randomised(keras.Sequential([keras.Input(shape, dtype=dtype), layer]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name):
    make, shape = LAYERS[name]
    tolerance = 1e-6 if name.endswith("KerasHub") else 1e-10  # which computes in float32 under any policy
    agrees(alone(make(), shape), *batch_of(shape), wavy, tolerance=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda given: given if isinstance(given, str) else type(given).__name__)
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_activations(activation, shape):
    agrees(alone(layers.Dense(4, activation=activation), shape), *batch_of(shape), wavy)


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_equations(name, activation):
    equation, made, bias, shape = EQUATIONS[name]
    layer = layers.EinsumDense(equation, made, bias_axes=bias, activation=activation)
    agrees(alone(layer, shape), *batch_of(shape), wavy)


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(make):
    """Queries of one sequence, keys and values of another, longer one."""
    queries, values = keras.Input((3, 4)), keras.Input((5, 4))
    model = randomised(keras.Model([queries, values], make()(queries, values)))
    agrees(model, [batch_of((3, 4))[0], batch_of((5, 4), seed=2)[0]], batch_of(())[1], wavy)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 2)], ids=str)
@pytest.mark.parametrize("low", [0, -4])
@pytest.mark.parametrize("make", [layers.Embedding, layers.ReversibleEmbedding])
def test_tables(make, shape, low):
    """Four tokens, so that they come again; Keras counts negative ones from the end, where they are the same tokens."""
    x = np.random.default_rng(0).integers(low, 4, (3, *shape))
    x[0] = np.where(np.arange(x[0].size).reshape(x[0].shape) % 2, x[0], low % 4)
    agrees(alone(make(4, 3), shape, "int64"), x, batch_of(())[1], wavy)


def test_a_table_whose_mask_reaches_the_pooling():
    ids = keras.Input((6,), dtype="int32")
    pooled = layers.GlobalAveragePooling1D()(layers.Embedding(5, 3, mask_zero=True)(ids))
    model = randomised(keras.Model(ids, layers.Dense(2)(pooled)))
    x = np.array([[1, 1, 2, 0, 0, 0], [3, 4, 3, 3, 1, 1], [2, 0, 0, 0, 0, 0]])
    exact = agrees(model, x, batch_of(())[1], wavy)
    assert (exact[0, :3] == 0).all() and (exact[1, 9:15] != 0).all()  # the padding's row has no gradient


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_read_both_ways(tied):
    """Tied, the rows that the tokens read and the matrix that makes the logits are one variable: their product counts."""
    ids = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(6, 3, tie_weights=tied)
    model = keras.Model(ids, table(layers.Dense(3, activation="tanh")(table(ids)), reverse=True))
    agrees(randomised(model), np.array([[0, 1, 1, 5], [2, 2, 2, 2], [3, 4, 0, 3]]), batch_of(())[1], wavy)


ADAPTED = {
    "dense": (lambda: layers.Dense(4, activation="tanh", lora_rank=2, lora_alpha=3), (3, 5), "float64"),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", lora_rank=2, lora_alpha=1), (4, 5), "float64"),
    "table": (lambda: layers.Embedding(5, 4, lora_rank=2), (6,), "int64"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_layers_with_lora(name):
    """Keras keeps the factors in float32 under any policy."""
    make, shape, dtype = ADAPTED[name]
    model, (x, y) = alone(make(), shape, dtype), batch_of(shape)
    assert {v.name.rpartition("_")[2] for v in model.trainable_variables} >= {"a", "b"}
    x = np.random.default_rng(0).integers(0, 5, (3, *shape)) if dtype == "int64" else x
    agrees(model, x, y, wavy, tolerance=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_for_masked_tokens(tied):
    ids, places = keras.Input((5,), dtype="int32"), keras.Input((2,), dtype="int32")
    table = hub().layers.ReversibleEmbedding(7, 4)
    head = hub().layers.MaskedLMHead(**({"token_embedding": table} if tied else {"vocabulary_size": 7}), activation="softmax")
    model = randomised(keras.Model([ids, places], head(layers.Dense(4, activation="tanh")(table(ids)), mask_positions=places)))
    rng = np.random.default_rng(0)
    agrees(model, [rng.integers(0, 7, (3, 5)), np.array([[0, 3], [4, 1], [2, 2]])], batch_of(())[1], wavy)


# Models -----------------------------------------------------------------------------------------------------------------------------------


def hub():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("keras_hub")


def bert(num_layers=2):
    sizes = dict(vocabulary_size=11, num_layers=num_layers, num_heads=2, hidden_dim=8, intermediate_dim=12, max_sequence_length=10)
    backbone = hub().models.BertBackbone(**sizes, dropout=0.0)
    return randomised(keras.Model(backbone.input, layers.Dense(1, name="head")(backbone.output["pooled_output"])), scale=0.4)


def tokens(count=3, length=6):
    rng = np.random.default_rng(3)
    x = {
        "token_ids": rng.integers(0, 11, (count, length)).astype("int32"),
        "segment_ids": rng.integers(0, 2, (count, length)).astype("int32"),
        "padding_mask": (np.arange(length) < np.linspace(2, length, count)[:, None]).astype("int32"),
    }
    return x, rng.integers(0, 2, count).astype("float64")


def test_bert_with_padding():
    model, (x, y) = bert(), tokens()
    click = keras.losses.BinaryCrossentropy(from_logits=True)
    exact = agrees(model, x, y, click, by_hand=lambda y, p: click(y[:, None], p))
    np.testing.assert_allclose(gradient_norms_by_tape(model, x, y, loss=click), np.linalg.norm(exact, axis=1), rtol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_keras_hub_s_layers(first):
    modeling, ids = hub().layers, keras.Input((5,), dtype="int32")
    table = modeling.TokenAndPositionEmbedding(7, 9, 4)  # a table of 9 places, of which 5 are read
    states = modeling.TransformerEncoder(6, 2, activation="gelu", normalize_first=first)(table(ids))
    model = randomised(keras.Model(ids, layers.Dense(2)(layers.GlobalAveragePooling1D()(states))))
    agrees(model, np.random.default_rng(0).integers(0, 7, (3, 5)), batch_of(())[1], wavy)


def test_positions_of_one_s_own():
    """A table read from a place of its own, and at given places, some of them twice, of one sample or of all."""

    class Placed(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.places = layers.Dense(4), hub().layers.PositionEmbedding(9)

        def call(self, x):
            h = self.first(x)
            h = tf.sin(h + self.places(h, start_index=2)) + self.places(h, positions=tf.constant([0, 3, 3]))
            return tf.sin(h) + self.places(h, start_index=1, positions=tf.constant([[0, 2, 1], [4, 4, 4], [8, 2, 3]])[: len(x)]) * h

    model, (x, y) = Placed(), batch_of((3, 4))
    model(x)
    randomised(model)
    found = sample_gradients(model, x, y, loss=wavy)
    for i in range(3):  # the last places are each sample's own, so the whole batch is run and sample i's loss taken
        with tf.GradientTape() as tape:
            value = wavy(y, model(x))[i]
        exact = flat(tape.gradient(value, [v.value for v in model.trainable_variables]), model.trainable_variables)
        np.testing.assert_allclose(found.norms[i], np.linalg.norm(exact), rtol=1e-10)
        assert off(flat(found.weighted(np.eye(3)[i]), model.trainable_variables), exact) < 1e-10


def test_two_towers_of_different_lengths():
    """A shared encoder, itself a model, called twice: the products of its two uses count."""
    ids = keras.Input((None,), dtype="int32")
    h = layers.LayerNormalization()(layers.Embedding(6, 4)(ids))
    h = layers.Conv1D(4, 2, padding="same", activation="tanh")(h)
    encoder = keras.Model(ids, layers.Dense(3)(layers.GlobalAveragePooling1D()(layers.EinsumDense("btc,cd->btd", (None, 4))(h))))
    a, b = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    model = randomised(keras.Model([a, b], layers.Dense(1)(layers.Multiply()([encoder(a), encoder(b)]))))
    rng = np.random.default_rng(0)
    agrees(model, [rng.integers(0, 6, (3, 4)), rng.integers(0, 6, (3, 7))], batch_of(())[1], wavy)


def test_three_uses_of_every_kind_of_term():
    """A Dense layer on a vector and on two sequences, and a layer whose gradient is written out in one use and factored in another."""

    class Sometimes(layers.Dense):
        def call(self, x):
            return super().call(x)

    @rule(Sometimes)
    def _sometimes(layer, arguments, e):
        x, e = arguments[0], tf.reshape(e, (tf.shape(e)[0], -1, e.shape[-1]))
        kernel = Whole(tf.einsum("bc,btd->bcd", x, e)) if x.shape.rank == 2 else Outer(x, e)
        return {"kernel": kernel, "bias": Whole(tf.reduce_sum(e, 1))}

    try:
        short, long = keras.Input((4,)), keras.Input((5, 4))
        pool, one, two = layers.GlobalAveragePooling1D(), layers.Dense(4, activation="tanh"), Sometimes(3, activation="tanh")
        made = [two(one(short)), pool(two(one(long))), pool(two(one(one(long))))]
        model = randomised(keras.Model([short, long], layers.Concatenate()(made)))
        agrees(model, [batch_of((4,))[0], batch_of((5, 4), seed=2)[0]], batch_of(())[1], wavy)
    finally:
        del RULES[f"{Sometimes.__module__}.{Sometimes.__qualname__}"]


def test_a_table_whose_gradient_is_written_out_in_one_use():
    class Read(layers.Embedding):
        def call(self, ids):
            return super().call(ids)

    @rule(Read)
    def _read(layer, arguments, e):
        one = tf.one_hot(arguments[0], layer.input_dim, dtype=e.dtype)
        rows = Rows(tf.reshape(tf.cast(arguments[0], tf.int32), (tf.shape(e)[0], -1)), tf.reshape(e, (tf.shape(e)[0], -1, e.shape[-1])))
        return {"embeddings": Whole(tf.einsum("btv,btd->bvd", one, e)) if arguments[0].shape[1] == 4 else rows}

    try:
        a, b, pool, table = keras.Input((4,), dtype="int32"), keras.Input((6,), dtype="int32"), layers.GlobalAveragePooling1D(), Read(5, 3)
        model = randomised(keras.Model([a, b], layers.Multiply()([pool(table(a)), pool(table(b))])))
        rng = np.random.default_rng(0)
        agrees(model, [rng.integers(0, 5, (3, 4)), rng.integers(0, 5, (3, 6))], batch_of(())[1], wavy)
    finally:
        del RULES[f"{Read.__module__}.{Read.__qualname__}"]


class Branches(keras.Model):
    """A subclassed model: layers called by keyword, one that the loss does not reach, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = layers.Embedding(5, 4), layers.Dense(4, activation="relu"), layers.Dense(1)
        self.unread, self.uncalled = layers.Dense(2), layers.Dense(3)
        self.uncalled.build((None, 4))

    def call(self, ids):
        h = self.table(inputs=ids)
        self.unread(h)
        return self.last(tf.reduce_max(self.first(inputs=h), 1))


def test_layers_that_the_loss_does_not_reach():
    model, ids = Branches(), np.random.default_rng(0).integers(0, 5, (3, 6))
    model(ids)
    agrees(randomised(model), ids, batch_of(())[1], wavy)
    sums = sample_gradients(model, ids, np.zeros(3), loss=wavy).weighted(np.ones(3))
    idle = [v.path.split("/")[-2] for v, g in zip(model.trainable_variables, sums, strict=True) if g is None]
    assert len(idle) == 4 and set(idle) == {model.unread.name, model.uncalled.name}
    with pytest.raises(ValueError, match="does not depend on any of the chosen variables; choose others by path pattern"):
        gradient_norms(model, ids, np.zeros(3), loss=wavy, variables=f"*{model.unread.name}*")
    with pytest.raises(ValueError, match="does not depend on any of the chosen variables; choose others by path pattern"):
        gradient_norms_by_tape(model, ids, np.zeros(3), loss=wavy, variables=f"*{model.unread.name}*")


def perceptron(*, outputs=1, **options):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="tanh", **options), layers.Dense(outputs)])
    return randomised(model)


def test_frozen_layers_and_variables():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(4), layers.Dense(1)])
    randomised(model)
    model.layers[1].trainable = False  # a layer without a rule is no obstacle once it is frozen
    model.layers[2].trainable = False
    model.layers[3].bias.trainable = False
    assert [v.name for v in model.trainable_variables] == ["kernel", "bias", "kernel"]
    exact = agrees(model, *batch_of((3,)), wavy)
    assert exact.shape == (3, 12 + 4 + 4)


def test_dropout_is_the_same_in_the_norm_and_in_the_gradient():
    """The loss w . m x has the gradient m x, and m is drawn once."""
    model = keras.Sequential([keras.Input((16,)), layers.Dropout(0.5, seed=1), layers.Dense(1, use_bias=False)])
    found = sample_gradients(model, np.ones((4, 16)), np.zeros(4), loss=lambda y, p: p[:, 0], training=True)
    each = np.stack([found.weighted(one)[0].numpy()[:, 0] for one in np.eye(4)])
    assert set(each.ravel()) == {0.0, 2.0} and len({tuple(mask) for mask in each}) == 4
    np.testing.assert_allclose(found.norms, np.linalg.norm(each, axis=1), rtol=1e-14)
    np.testing.assert_allclose(gradient_norms(model, np.ones((4, 16)), np.zeros(4), loss=lambda y, p: p[:, 0]), 4, rtol=1e-14)


# Losses -----------------------------------------------------------------------------------------------------------------------------------


def squared(y, predictions):
    return (predictions[:, 0] - tf.reshape(y, (-1,))) ** 2


LOSSES = {
    "binary, object": (keras.losses.BinaryCrossentropy, {"from_logits": True}, 1),
    "binary, function": (lambda: keras.losses.binary_crossentropy, {}, 1),
    "binary, name": (lambda: "binary_crossentropy", {}, 1),
    "binary, class's name": (lambda: "BinaryCrossentropy", {}, 1),
    "binary, smoothed": (keras.losses.BinaryCrossentropy, {"from_logits": True, "label_smoothing": 0.2, "reduction": "sum"}, 1),
    "squared, object": (keras.losses.MeanSquaredError, {}, 1),
    "squared, name": (lambda: "mse", {}, 1),
    "huber": (keras.losses.Huber, {"delta": 0.3, "reduction": None}, 1),
    "several squared": (keras.losses.MeanSquaredError, {}, 3),
    "categorical": (keras.losses.CategoricalCrossentropy, {"from_logits": True}, 3),
    "sparse": (keras.losses.SparseCategoricalCrossentropy, {"from_logits": True}, 3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("column", [False, True])
def test_losses_of_keras(name, column):
    """Labels (B,) and (B, 1) are the same; the loss's own reduction plays no part."""
    make, options, outputs = LOSSES[name]
    model, (x, y) = perceptron(outputs=outputs), batch_of((3,))
    if "name" in name or "function" in name:
        model = keras.Sequential([model, layers.Activation("sigmoid")])
    if name == "sparse":
        y = np.array([2, 0, 1])[:, None] if column else np.array([2, 0, 1])
    elif outputs == 3:
        y = np.eye(3)[[2, 0, 1]] * 0.8 + 0.1
    else:
        y = y[:, None] if column else y
    given = make(**options)
    plain = keras.losses.get(given) if isinstance(given, str) else given
    own = keras.losses.get({"class_name": type(given).__name__, "config": given.get_config() | {"reduction": "sum"}}) if options else plain
    agrees(model, x, y, given, by_hand=lambda y, p: own(tf.reshape(y, (1, -1)), p))
    if isinstance(given, keras.losses.Loss):
        assert given.reduction == options.get("reduction", "sum_over_batch_size")  # the caller's loss is left as it was


def test_a_loss_of_positions_is_their_mean():
    """Predictions (B, T, 1) under a Keras loss: the sample's loss is the mean over positions, of which Keras's is the mean."""
    model, (x, _) = alone(layers.Dense(2), (4, 3)), batch_of((4, 3))
    y = batch_of((4, 2), seed=5)[0]
    agrees(model, x, y, "mse", by_hand=lambda y, p: tf.reduce_mean((p - y) ** 2))


def kept_by_keras(model, x, y, sample_weight=None):
    """Keras's own gradient of a batch."""
    to_tensors = keras.tree.map_structure
    x, y = to_tensors(tf.convert_to_tensor, x), to_tensors(tf.convert_to_tensor, y)
    with tf.GradientTape() as tape:
        value = model.compute_loss(x, y, model(x, training=True), None if sample_weight is None else tf.convert_to_tensor(sample_weight))
    return flat(tape.gradient(value, [v.value for v in model.trainable_variables]), model.trainable_variables)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_keras_s_own_gradient(weighted):
    model, (x, y) = perceptron(outputs=2), batch_of((3,))
    y = batch_of((2,), seed=4)[0]
    model.compile("sgd", loss="mse", loss_weights=3.0)
    sample_weight = np.array([0.5, 0.0, 2.0]) if weighted else None
    found = sample_gradients(model, x, y, sample_weight)
    assert off(flat(found.weighted(np.full(3, 1 / 3)), model.trainable_variables), kept_by_keras(model, x, y, sample_weight)) < 1e-12
    exact = gradients_by_hand(model, x, y, lambda y, p: 3 * tf.reduce_mean((p - y) ** 2))
    exact *= np.ones((3, 1)) if sample_weight is None else sample_weight[:, None]
    np.testing.assert_allclose(found.norms, np.linalg.norm(exact, axis=1), rtol=1e-10)
    np.testing.assert_allclose(gradient_norms_by_tape(model, x, y, sample_weight), np.linalg.norm(exact, axis=1), rtol=1e-10)


@pytest.mark.parametrize("outputs", ["list", "dictionary"])
@pytest.mark.parametrize("by_name", [True, False])
def test_several_outputs(outputs, by_name):
    """Losses, their weights and labels by name or in order: the mean over samples is what Keras takes."""
    inputs = keras.Input((3,))
    h = layers.Dense(4, activation="tanh")(inputs)
    made = {"click": layers.Dense(1, name="click")(h), "stars": layers.Dense(2, name="stars")(h)}
    model = randomised(keras.Model(inputs, made if outputs == "dictionary" else list(made.values())))
    x, y = batch_of((3,))[0], {"click": np.array([[0.0], [1.0], [1.0]]), "stars": batch_of((2,), seed=3)[0]}
    losses, weights = {"click": keras.losses.BinaryCrossentropy(from_logits=True), "stars": "mse"}, {"click": 2.0, "stars": 0.3}
    given = [part if by_name or outputs == "dictionary" else list(part.values()) for part in (losses, weights, y)]
    model.compile("sgd", loss=given[0], loss_weights=given[1])

    def by_hand(y, predictions):
        click, stars = keras.tree.flatten(predictions)
        y_click, y_stars = keras.tree.flatten(y)
        binary = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(y_click, click.dtype), click)
        return 2 * binary + 0.3 * tf.reduce_mean((stars - y_stars) ** 2)

    agrees(model, x, given[2], None, by_hand=by_hand)
    found = sample_gradients(model, x, given[2]).weighted(np.full(3, 1 / 3))
    assert off(flat(found, model.trainable_variables), kept_by_keras(model, x, given[2])) < 1e-12


def test_an_output_without_a_loss_plays_no_part():
    inputs = keras.Input((3,))
    h = layers.Dense(4, activation="tanh")(inputs)
    model = randomised(keras.Model(inputs, [layers.Dense(1, name="a")(h), layers.Dense(2, name="b")(h)]))
    x, y = batch_of((3,))
    for loss, labels in (([wavy, None], [y, None]), ({"a": wavy, "b": None}, {"a": y}), ({"a": wavy}, {"a": y})):
        exact = gradients_by_hand(model, x, y, lambda y, p: wavy(y, p[0]))
        np.testing.assert_allclose(gradient_norms(model, x, labels, loss=loss), np.linalg.norm(exact, axis=1), rtol=1e-10)


def test_losses_may_be_one_by_name_too():
    model, (x, y) = functional(), batch_of((3,))
    model.compile("sgd", loss={"last": "mse"})
    expected = gradient_norms(model, x, y, loss="mse")
    np.testing.assert_array_equal(gradient_norms(model, x, {"last": y}), expected)
    np.testing.assert_array_equal(gradient_norms(model, x, y, loss=["mse"]), expected)


def test_predictions_of_rank_one():
    inputs = keras.Input((3,))
    model = randomised(keras.Model(inputs, layers.Reshape(())(layers.Dense(1)(inputs))))
    x, y = batch_of((3,))
    for labels in (y, y[:, None]):
        agrees(model, x, labels, lambda y, p: (p - y) ** 2, by_hand=lambda y, p: (p - tf.reshape(y, (-1,))) ** 2)


def test_regularizers_belong_to_no_sample():
    plain, decayed = perceptron(), perceptron(kernel_regularizer="l2", bias_regularizer="l1")
    decayed.set_weights(plain.get_weights())
    x, y = batch_of((3,))
    np.testing.assert_array_equal(gradient_norms(decayed, x, y, loss=squared), gradient_norms(plain, x, y, loss=squared))


# Variables and weights --------------------------------------------------------------------------------------------------------------------


def test_norms_over_some_of_the_variables():
    """The pattern decides what the norm counts, not what the weighted sum holds."""
    model, (x, y) = bert(), tokens()
    loss = lambda y, p: wavy(y, p)  # noqa: E731
    exact = gradients_by_hand(model, x, y, loss)
    sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
    parts = np.split(exact, np.cumsum(sizes)[:-1], axis=1)
    paths = [v.path for v in model.trainable_variables]
    for patterns, count in (("*layer_norm*", 10), (["head/*", "*token_embedding*"], 3), ("*bias", 14), ("head/kernel", 1)):
        chosen = [v.path for v in chosen_variables(model, patterns)]
        assert len(chosen) == count
        squares = sum((parts[paths.index(path)] ** 2).sum(1) for path in chosen)
        found = sample_gradients(model, x, y, loss=loss, variables=patterns)
        np.testing.assert_allclose(found.norms, np.sqrt(squares), rtol=1e-9)
        assert off(flat(found.weighted(np.ones(3)), model.trainable_variables), exact.sum(0)) < 1e-10
    np.testing.assert_allclose(
        gradient_norms_by_tape(model, x, y, loss=loss, variables="head/kernel"), np.linalg.norm(parts[paths.index("head/kernel")], axis=1)
    )


def test_a_table_s_sum_is_sparse_and_the_optimiser_takes_it():
    ids = keras.Input((4,), dtype="int32")
    table = layers.Embedding(50, 3)
    model = randomised(keras.Model(ids, layers.Dense(1)(layers.GlobalAveragePooling1D()(table(ids)))))
    x, y = np.array([[1, 1, 2, 3], [3, 4, 4, 4], [9, 8, 7, 9]]), batch_of(())[1]
    weights = np.array([0.5, -1.0, 2.0])
    exact, before = weights @ gradients_by_hand(model, x, y, wavy), flat(model.get_weights(), model.trainable_variables)
    sums = sample_gradients(model, x, y, loss=wavy).weighted(weights)
    assert isinstance(sums[0], tf.IndexedSlices) and sums[0].values.shape == (12, 3)
    keras.optimizers.SGD(0.1).apply_gradients(zip(sums, model.trainable_variables, strict=True))
    assert off(flat(model.get_weights(), model.trainable_variables), before - 0.1 * exact) < 1e-12


# Graphs and XLA ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["graph", "xla"])
def test_inside_a_function_of_unknown_batch_and_length(run):
    """One signature for every size; the weights are made inside."""
    model, click = bert(num_layers=1), keras.losses.BinaryCrossentropy(from_logits=True)
    signature = [{name: tf.TensorSpec((None, None), tf.int32) for name in tokens()[0]}, tf.TensorSpec((None,), tf.float64)]

    @tf.function(input_signature=signature, jit_compile=run == "xla")
    def step(x, y):
        found = sample_gradients(model, x, y, loss=click)
        check_norms(found.norms)
        return found.losses, found.norms, [tf.convert_to_tensor(g) for g in found.weighted(Weighting()(found.norms))]

    for count, length in ((3, 6), (2, 9)):
        x, y = tokens(count, length)
        losses, norms, sums = step(x, y)
        exact = gradients_by_hand(model, x, y, lambda y, p: click(y[:, None], p))
        np.testing.assert_allclose(norms, np.linalg.norm(exact, axis=1), rtol=1e-9)
        logits = model(x).numpy()[:, 0]
        np.testing.assert_allclose(losses, np.log1p(np.exp(logits)) - y * logits, rtol=1e-10)
        weights = np.linalg.norm(exact, axis=1) / np.linalg.norm(exact, axis=1).mean()
        assert off(flat(sums, model.trainable_variables), weights @ exact) < 1e-9


@pytest.mark.parametrize("run", ["graph", "xla"])
@pytest.mark.parametrize("name", ["conv, same, strides", "conv, causal, dilated", "dense, 4-D", "layer norm, two axes"])
def test_layers_inside_a_function(name, run):
    make, shape = LAYERS[name]
    model, (x, y) = alone(make(), shape), batch_of(shape)
    signature = [tf.TensorSpec((None, *shape), tf.float64), tf.TensorSpec((None,), tf.float64)]

    @tf.function(input_signature=signature, jit_compile=run == "xla")
    def step(x, y):
        found = sample_gradients(model, x, y, loss=wavy)
        return found.norms, found.weighted(tf.cast(tf.range(tf.shape(y)[0]), tf.float64))

    norms, sums = step(x, y)
    exact = gradients_by_hand(model, x, y, wavy)
    np.testing.assert_allclose(norms, np.linalg.norm(exact, axis=1), rtol=1e-10)
    assert off(flat(sums, model.trainable_variables), np.arange(3) @ exact) < 1e-10


# Precision --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e20, 1e35])
def test_errors_whose_squares_leave_float32(scale):
    """The loss's gradient is taken out before anything is squared, and put back afterwards."""
    with policy("float32"):
        model, (x, y) = perceptron(), batch_of((3,), dtype="float32")
        expected = gradient_norms(model, x, y, loss=squared)
        found = gradient_norms(model, x, y, loss=lambda y, p: tf.constant(scale) * squared(y, p))
        assert expected.dtype == found.dtype == tf.float32
        np.testing.assert_allclose(found, expected.numpy().astype(float) * scale, rtol=1e-5)


def test_each_sample_has_its_own_scale():
    with policy("float32"):
        model, (x, y) = perceptron(outputs=3), batch_of((3,), dtype="float32")
        scale = np.array([1e-30, 1.0, 1e30], dtype="float32")
        loss = lambda y, p: tf.reduce_sum((p - y[:, None]) ** 2, 1)  # noqa: E731
        expected = gradient_norms(model, x, y, loss=loss).numpy().astype(float) * scale
        np.testing.assert_allclose(gradient_norms(model, x, y, scale, loss=loss), expected, rtol=1e-5)


def test_a_confident_sample_and_one_without_any_error():
    """At a logit of 60 the error of a click is 9e-27; at the exact prediction it is 0, and so are the norm and the gradient."""
    with policy("float32"):
        linear = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
        linear.set_weights([np.array([[20.0], [10.0]]), np.array([0.0])])
        x, y = np.array([[2.0, 2.0], [-2.0, -2.0]], dtype="float32"), np.array([1.0, 0.0], dtype="float32")
        norms = gradient_norms(linear, x, y, loss=keras.losses.BinaryCrossentropy(from_logits=True))
        np.testing.assert_allclose(norms, 3 * np.exp(-60.0), rtol=1e-5)  # |(2, 2, 1)| = 3
        found = sample_gradients(linear, x, np.array([60.0, 0.0], dtype="float32"), loss=squared)
        np.testing.assert_allclose(found.norms, [0, 360], rtol=1e-6)
        np.testing.assert_array_equal(found.weighted([1.0, 0.0])[0], np.zeros((2, 1)))


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_half_precision(name, scale):
    """Within half precision's rounding of the float64 model of the same weights, errors that underflow in it included."""
    exact_model, (x, y) = bert(), tokens()
    loss = lambda y, p: scale * wavy(y, p)  # noqa: E731
    exact = gradients_by_hand(exact_model, x, y, loss)
    with policy(name, "float32"):
        model = bert()
        model.set_weights(exact_model.get_weights())
        found = sample_gradients(model, x, y, loss=loss)
        sums = flat(found.weighted(np.ones(3, dtype="float32")), model.trainable_variables)
    assert found.norms.dtype == found.losses.dtype == tf.float32 and found.predictions.dtype == name.removeprefix("mixed_")
    tolerance = 0.1 if "bfloat16" in name else 0.015
    np.testing.assert_allclose(found.norms, np.linalg.norm(exact, axis=1), rtol=tolerance)
    assert off(sums, exact.sum(0)) < tolerance


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_a_reversible_table_that_widens_its_logits(name):
    with policy(name, "float32"):
        ids = keras.Input((4,), dtype="int32")
        table = layers.ReversibleEmbedding(6, 3, reverse_dtype="float32")
        model = randomised(keras.Model(ids, table(table(ids), reverse=True)))
        x, y = np.array([[0, 1, 1, 5], [2, 2, 2, 2], [3, 4, 0, 3]]), batch_of((), dtype="float32")[1]
        exact = gradients_by_hand(model, x, y, wavy)
        found = sample_gradients(model, x, y, loss=wavy)
        np.testing.assert_allclose(found.norms, np.linalg.norm(exact, axis=1), rtol=0.02)
        assert off(flat(found.weighted(np.ones(3)), model.trainable_variables), exact.sum(0)) < 0.02


# What is refused --------------------------------------------------------------------------------------------------------------------------


class Scale(layers.Layer):
    """s x with one trained number s."""

    def build(self, shape):
        self.factor = self.add_weight(name="factor", initializer="ones")

    def call(self, x):
        return self.factor * x


class Adds(layers.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_mean(x**2))
        return x


class Positions(keras.Model):
    """Positions of shape (T,) or (1, T), the same for all samples."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.table, self.places, self.last = shape, layers.Embedding(5, 3), layers.Embedding(9, 3), layers.Dense(1)

    def call(self, ids):
        return self.last(tf.reduce_mean(self.table(ids) + self.places(tf.reshape(tf.range(tf.shape(ids)[1]), self.shape)), 1))


class Folded(keras.Model):
    """Rows of a sample as samples of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(4), layers.Dense(1)

    def call(self, x):
        return self.last(tf.reduce_sum(tf.reshape(self.first(tf.reshape(x, (-1, 3))), (-1, 2, 4)), 1))


def with_layers(*given):
    return keras.Sequential([keras.Input((3,)), *given, layers.Dense(1, name="last")])


def functional():
    inputs = keras.Input((3,))
    return randomised(keras.Model(inputs, layers.Dense(1, name="last")(layers.Dense(4, activation="tanh")(inputs))))


REFUSED = {
    "no rule": (lambda: with_layers(Scale(name="scale")), {}, (
        r"no rule for the variables factor of layer '.*scale' \(Scale\)\. Register one with @rule\(Scale\), freeze the layer, or use "
        "gradient_norms_by_tape")),
    "batch norm": (lambda: with_layers(layers.BatchNormalization()), {}, (
        r"no rule for the variables gamma, beta of layer .* \(BatchNormalization\)")),
    "loss of the batch": (lambda: with_layers(), {"loss": lambda y, p: tf.reduce_mean(squared(y, p))}, (
        r"the loss of a batch of 3 has shape \(\); expected one value per sample, not their mean")),
    "loss of pairs": (lambda: with_layers(), {"loss": lambda y, p: (p[:, 0] - y) ** 2}, r"the loss of a batch of 3 has shape \(3, 3\)"),
    "loss of another length": (lambda: with_layers(), {"loss": lambda y, p: tf.repeat(squared(y, p), 2)}, r"of 3 has shape \(6,\)"),
    "no loss": (lambda: with_layers(), {"loss": None}, "the model was not compiled with a loss; compile it, or pass loss="),
    "loss of labels": (lambda: with_layers(), {"loss": lambda y, p: y}, "the loss does not depend on the model's predictions"),
    "added loss": (lambda: with_layers(Adds()), {}, "layers of the model add losses of their own"),
    "activity": (lambda: with_layers(layers.Dense(2, activity_regularizer="l2")), {}, "layers of the model add losses of their own"),
    "added loss next to decay": (lambda: with_layers(layers.Dense(2, kernel_regularizer="l2"), Adds()), {}, "add losses of their own"),
    "added loss next to frozen decay": (lambda: with_layers(layers.Dense(2, kernel_regularizer="l2", trainable=False), Adds()), {}, (
        "add losses of their own")),
    "no match": (lambda: with_layers(), {"variables": ["*norm*", "encoder*"]}, (
        r"no trainable variable matches \['\*norm\*', 'encoder\*'\]; there are 2, such as .*last/kernel, .*last/bias")),
    "an output too many": (lambda: functional(), {"loss": {"first": "mse"}}, r"loss has \['first'\], but the outputs are \['last'\]"),
    "a loss too many": (lambda: functional(), {"loss": ["mse", "mse"]}, r"loss has 2 entries for the 1 outputs \['last'\]"),
    "no loss for any output": (lambda: functional(), {"loss": [None]}, r"expected a loss for an output; there are \['last'\]"),
    "norm with axes in disorder": (lambda: with_layers(layers.Reshape((3, 1)), layers.LayerNormalization(axis=[1, -1])), {}, (
        r"expected a LayerNormalization of axes in their order .*, got \[-1, 1\]")),
    "a call of the instance's own": (lambda: doubled_on_the_instance(), {}, (
        r"no rule for the variables kernel, bias of layer .* \(Dense\) whose call was replaced on the instance")),
    "group norm of the samples": (lambda: with_layers(layers.GroupNormalization(1, axis=0)), {}, (
        "")),
    "rule of a parent whose call is another": (lambda: with_layers(Doubled(2)), {}, "no rule for the variables kernel, bias of layer"),
}  # fmt: skip


def doubled_on_the_instance():
    model = with_layers(layers.Dense(2))
    call = model.layers[0].call
    model.layers[0].call = lambda x: 2 * call(x)
    return model


class Doubled(layers.Dense):
    def call(self, x):
        return 2 * super().call(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        gradient_norms(make(), *batch_of((3,)), **{"loss": squared} | options)


@pytest.mark.parametrize("options", [{"groups": 2}, {"data_format": "channels_first"}])
def test_convolutions_that_have_no_rule_are_refused(options):
    if "data_format" in options and not tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow has no such convolution on a CPU")
    model = keras.Sequential([keras.Input((6, 4)), layers.Conv1D(4, 3, **options, name="conv"), layers.GlobalAveragePooling1D()])
    with pytest.raises(ValueError, match=r"conv' \(Conv1D\): expected a Conv1D with groups=1 and data_format='channels_last'"):
        gradient_norms(model, *batch_of((6, 4)), loss=wavy)


class Only(keras.Model):
    """One layer, built for a known number of samples."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def test_layers_that_mix_samples_are_refused():
    (x, y), turned = batch_of((4,)), Only(layers.EinsumDense("ab,bc->ca", (3,)))
    turned(x)
    with pytest.raises(ValueError, match=r"equation 'ab,bc->ca': expected the samples as first dimension of input and output"):
        gradient_norms(turned, x, y, loss=wavy)
    normed = Only(layers.LayerNormalization(axis=[0, 1]))
    normed(x)
    with pytest.raises(ValueError, match=r"without the samples', got \[0, 1\]"):
        gradient_norms(normed, x, y, loss=wavy)


def test_a_soft_cap_is_refused():
    ids = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(6, 3, logit_soft_cap=0.5)
    with pytest.raises(ValueError, match="expected a ReversibleEmbedding without logit_soft_cap"):
        gradient_norms(keras.Model(ids, table(table(ids), reverse=True)), np.ones((3, 4), dtype=int), np.zeros(3), loss=wavy)


@pytest.mark.parametrize(
    ("make", "x", "shape"),
    [
        (lambda: Positions((1, -1)), np.ones((3, 5), dtype="int32"), r"\(1, 5, 3\) in a batch of 3"),
        (lambda: Positions((1, -1)), np.ones((3, 3), dtype="int32"), r"\(1, 3, 3\) in a batch of 3"),
        (lambda: Positions((-1,)), np.ones((3, 5), dtype="int32"), r"\(5, 3\) in a batch of 3"),
        (Folded, np.ones((3, 2, 3)), r"\(6, 4\) in a batch of 3"),
        (Folded, np.ones((1, 2, 3)), r"\(2, 4\) in a batch of 1"),
    ],
)
def test_a_layer_without_a_row_for_each_sample_is_refused(make, x, shape):
    """Its gradient is the batch's. In a function that learns the sizes as it runs, nothing but an error or NaN comes out."""
    model = make()
    model(x)
    with pytest.raises(ValueError, match=rf"returned shape {shape}; expected the samples as first dimension"):
        gradient_norms(model, x, np.zeros(len(x)), loss=wavy)
    signature = [tf.TensorSpec([None] * x.ndim if x.ndim < 3 else (None, 2, 3), x.dtype), tf.TensorSpec((None,), tf.float64)]

    @tf.function(input_signature=signature)
    def step(x, y):
        found = sample_gradients(model, x, y, loss=wavy, variables="*bias")
        return found.norms, found.weighted(tf.ones_like(y))[-1]

    try:
        norms, last = step(x, np.zeros(len(x)))
    except (tf.errors.InvalidArgumentError, ValueError):
        return
    assert np.isnan(norms).all() and np.isnan(last).all()


def test_a_scalar_loss_is_refused_where_the_batch_is_not_known():
    model = perceptron()

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float64), tf.TensorSpec((None,), tf.float64)])
    def norms(x, y):
        return gradient_norms(model, x, y, loss=lambda y, p: tf.reduce_mean(squared(y, p)))

    with pytest.raises(ValueError, match=r"has shape \(\); expected one value per sample, not their mean"):
        norms(*batch_of((3,)))


def test_masked_predictions_are_refused():
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layers.Dense(1)(layers.Embedding(5, 3, mask_zero=True)(ids)))
    with pytest.raises(ValueError, match="the predictions carry a mask, which Keras would apply to the losses; pool over positions inside"):
        gradient_norms(model, np.ones((3, 4), dtype="int32"), np.zeros((3, 4)), loss="mse")


def test_nan_names_the_first_sample():
    model, (x, y) = perceptron(), batch_of((3,), count=5)
    x[[2, 4], 1] = np.nan
    message = "2 of 5 norms are NaN or infinite, the first for sample 2 of the batch; check its text and label or the learning rate"
    for norms in (gradient_norms, gradient_norms_by_tape):
        with pytest.raises(ValueError, match=message):
            norms(model, x, y, loss=squared)
    with pytest.raises(ValueError, match="the first for sample 'c'"):
        check_norms(sample_gradients(model, x, y, loss=squared).norms, list("abcde"))
    found = tf.function(lambda x, y: gradient_norms(model, x, y, loss=squared))(x, y)
    assert np.isnan(found).tolist() == [False, False, True, False, True]


# The certificate --------------------------------------------------------------------------------------------------------------------------


class TwoLayers(keras.Model):
    """Two Dense layers, between which a subclass does what no engine that reads layers can see."""

    def __init__(self, shape=(3,)):
        super().__init__()
        self.first, self.last = layers.Dense(4, activation="tanh"), layers.Dense(1)
        self(np.ones((2, *shape)))
        randomised(self)

    def call(self, x):
        return self.last(self.first(x))


class Sorting(TwoLayers):
    def call(self, x):
        order = tf.argsort(x[:, 0])
        return tf.gather(self.last(self.first(tf.gather(x, order))), tf.argsort(order))


class Flipping(TwoLayers):
    def call(self, x):
        return tf.reverse(self.last(self.first(tf.reverse(x, [0]))), [0])


class PositionsFirst(TwoLayers):
    def __init__(self):
        super().__init__((5, 3))

    def call(self, x):
        return self.last(tf.reduce_sum(self.first(tf.transpose(x, (1, 0, 2))), 0))


class Outside(TwoLayers):
    def call(self, x):
        return self.last(self.first(x)) + tf.reduce_sum(self.first.kernel.value) * x[:, :1]


class OtherVariables(TwoLayers):
    def call(self, x):
        if not self.first.built:
            self.first.build(x.shape)
        return self.last(self.first.stateless_call([2 * v.value for v in self.first.trainable_variables], [], x)[0])


class OverTheBatch(TwoLayers):
    def __init__(self):
        keras.Model.__init__(self)
        self.norm = layers.BatchNormalization(center=False, scale=False)
        TwoLayers.__init__(self)

    def call(self, x, training=False):
        return self.last(self.norm(self.first(x), training=training))


class SharedPositions(keras.Model):
    """A table of positions that is read once for all samples."""

    def __init__(self):
        super().__init__()
        self.table, self.places, self.last = layers.Embedding(5, 4), layers.Embedding(9, 4), layers.Dense(1)
        self(np.ones((2, 3), dtype="int32"))
        randomised(self)

    def call(self, ids):
        return self.last(tf.reduce_sum(tf.sin(self.table(ids) + self.places(tf.range(tf.shape(ids)[1]))), 1))


def with_penalty(y, predictions):
    """A loss that runs the model once more and differentiates it."""
    model, x = with_penalty.given
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(model(x))
    return squared(y, predictions) + tf.reduce_sum(tape.gradient(value, x) ** 2, 1)


HOSTILE = {
    "sorted and sorted back": (Sorting, (3,), squared),
    "flipped and flipped back": (Flipping, (3,), squared),
    "positions first, as many as samples": (PositionsFirst, (5, 3), squared),
    "a variable outside its layer": (Outside, (3,), squared),
    "a call with other variables": (OtherVariables, (3,), squared),
    "normalised over the batch, nothing trained there": (OverTheBatch, (3,), squared),
    "positions of all samples, as many as samples": (SharedPositions, (5,), squared),
    "a gradient inside the loss": (TwoLayers, (3,), with_penalty),
    "a loss of the batch's mean": (TwoLayers, (3,), lambda y, p: (p[:, 0] - tf.reduce_mean(p) - y[:, 0]) ** 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_layers_do_not_show_is_one_error(name):
    """Five samples; the norms are wrong, and without the check nothing says so."""
    make, shape, loss = HOSTILE[name]
    model, (x, y) = make(), batch_of(shape, count=5)
    x = x if name[:9] != "positions" or len(shape) > 1 else np.random.default_rng(0).integers(0, 5, (5, 5))
    with_penalty.given, options = (model, x), {"training": True} if make is OverTheBatch else {}
    silent = gradient_norms(model, x, y, loss=loss, check=False, **options).numpy()
    for call in (gradient_norms, sample_gradients):
        with pytest.raises(ValueError, match=r"gradient of this batch is not TensorFlow's for \d of \d variables: .* by .*its length"):
            call(model, x, y, loss=loss, check=True, **options)
    assert np.isfinite(silent).all()
    assert np.isnan(tf.function(lambda x, y: gradient_norms(model, x, y, loss=loss, check=True, **options))(x, y)).all()


def test_a_check_names_the_variable_and_how_far_it_is_off():
    """x W + sum(W): the engine has x of the derivative x + 1 of W, at x = 2 two thirds of it."""
    model = Outside.__new__(Outside)
    keras.Model.__init__(model)
    model.first, model.last = layers.Dense(1, use_bias=False, name="inner"), layers.Activation("linear")
    model(np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"for 1 of 1 variables: .*inner/kernel by 0\.5 of its length"):
        gradient_norms(model, np.full((3, 1), 1.0), np.zeros(3), loss=lambda y, p: p[:, 0])  # x[:, :1] is 1, too


def checked(monkeypatch, model, calls):
    """How many of the calls were checked."""
    count, require = [], _Certificate.require
    monkeypatch.setattr(_Certificate, "require", lambda self: (count.append(1), require(self)))
    found = []
    for call in calls:
        before = len(count)
        call(model)
        found.append(len(count) - before)
    return found


def test_the_schedule_of_checks(monkeypatch):
    """The first, the tenth, and when shapes, loss or mode are new; a bool decides otherwise."""
    (x, y), model = batch_of((3,)), perceptron()
    one = lambda model: gradient_norms(model, x, y, loss=squared)  # noqa: E731
    assert checked(monkeypatch, model, [one] * 12) == [1, *[0] * 8, 1, 0, 0]
    more = [
        lambda model: gradient_norms(model, x[:2], y[:2], loss=squared),  # as many samples as nothing else
        lambda model: gradient_norms(model, x[:1], y[:1], loss=squared),
        lambda model: gradient_norms(model, x, y, loss=wavy),
        lambda model: gradient_norms(model, x, y, loss=squared, training=True),
        lambda model: gradient_norms(model, x, y, loss=squared, check=False),
        lambda model: gradient_norms(model, x, y, loss=squared, check=True),
    ]
    assert checked(monkeypatch, perceptron(), [one, *more, more[-1], one]) == [1, 1, 1, 1, 1, 0, 1, 1, 0]


def test_a_tf_function_that_nobody_checked_says_so():
    (x, y), model = batch_of((3,)), perceptron()
    norms = tf.function(lambda x, y: gradient_norms(model, x, y, loss=squared))
    with pytest.warns(UserWarning, match="this tf.function takes gradients of samples unchecked"):
        found = norms(x, y)
    np.testing.assert_allclose(found, gradient_norms(model, x, y, loss=squared))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf.function(lambda x, y: gradient_norms(model, x[:2], y[:2], loss=squared))(x, y)


def test_a_check_leaves_state_as_a_step_without_it_does():
    """Moving averages, and the dropout that comes next."""
    (x, y), ends = batch_of((3,), count=6), []
    for check in (True, False):
        keras.utils.set_random_seed(0)
        model = with_layers(layers.BatchNormalization(trainable=False), layers.Dropout(0.5, seed=1), layers.Dense(4, activation="tanh"))
        norms = [gradient_norms(model, x, y, loss=squared, training=True, check=check).numpy() for _ in range(2)]
        ends.append([*norms, *(np.asarray(v.value) for v in model.variables)])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*ends, strict=True))
    assert not np.array_equal(ends[0][0], ends[0][1])


@pytest.mark.parametrize("name", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_right_model_passes_in_any_precision(name):
    with policy(name, "float32"):
        model, (x, y) = bert(), tokens(count=4)
        for scale in (1.0, 1e-12):
            loss = lambda y, p, scale=scale: scale * wavy(y, p)  # noqa: E731
            gradient_norms(model, x, y.astype("float32"), loss=loss, check=True)
        swapped = Flipping()
        with pytest.raises(ValueError, match="is not TensorFlow's"):
            gradient_norms(swapped, *batch_of((3,), dtype="float32"), loss=squared, check=True)


@pytest.mark.parametrize(("run", "outputs"), [("eager", 6), ("eager", 1), ("graph", 6), ("xla", 6)])
def test_norms_of_what_cancels(run, outputs):
    """Two nearly equal rows of opposite error, in float32: little is left, by products (six outputs) as by matrix products (one)."""
    with policy("float32"):
        model = alone(layers.Dense(outputs, use_bias=False), (2, 8))
        rng = np.random.default_rng(0)
        base, apart = rng.normal(size=(4, 1, 8)), np.array([0, 1e-4, 1e-3, 1.0])[:, None, None] * rng.normal(size=(4, 1, 8))
        x = np.concatenate([base, base + apart], 1).astype("float32")
        loss = lambda y, p: tf.reduce_sum(p[:, 0] - p[:, 1], 1)  # noqa: E731
        norms = lambda x: gradient_norms(model, x, np.zeros(4, "float32"), loss=loss, check=True)  # noqa: E731
        found = (norms if run == "eager" else tf.function(norms, jit_compile=run == "xla"))(x).numpy()
    rows = x.astype(np.float64)
    by_hand = np.linalg.norm(rows[:, 0] - rows[:, 1], axis=1) * np.sqrt(outputs)  # of each output the gradient is x_0 - x_1
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    assert found[0] == 0


def test_norms_of_a_table_that_is_read_twice_and_cancels():
    """The same two words in both places of a sample, in float32: what the one adds to a row the other takes away."""
    with policy("float32"):
        table = alone(layers.Embedding(9, 4), (2,), "int64")
        found = gradient_norms(table, np.array([[3, 3], [3, 4]]), np.zeros(2), loss=lambda y, p: tf.reduce_sum(p[:, 0] - p[:, 1], 1))
    np.testing.assert_allclose(found, [0, np.sqrt(8)], rtol=1e-6)


def test_several_threads_score_one_model():
    """Each thread's norms are those of its own batch; a plain call in between is not noted."""
    model = bert(num_layers=1)
    batches = [tokens(count=3 + k, length=5 + k) for k in range(3)]
    expected = [gradient_norms(model, x, y, loss=wavy).numpy() for x, y in batches]
    found, faults = [[] for _ in batches], []

    def score(k):
        try:
            for _ in range(4):
                found[k].append(gradient_norms(model, *batches[k], loss=wavy).numpy())
                model(batches[k][0])
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=score, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for k, norms in enumerate(found):
        assert len(norms) == 4
        for each in norms:
            np.testing.assert_allclose(each, expected[k], rtol=1e-12)
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


# Rules of one's own -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scale_rule():
    """Scale with the rule that the test puts under "rule"."""
    name = f"{Scale.__module__}.{Scale.__qualname__}"
    yield lambda function: RULES.__setitem__(name, function)
    RULES.pop(name, None)


def test_a_rule_serves_subclasses_that_keep_the_call(scale_rule):
    rule(Scale)(lambda layer, arguments, e: {"factor": Whole(tf.reduce_sum(e * arguments[0], 1))})

    class Renamed(Scale):
        pass

    model = randomised(with_layers(layers.Dense(3, activation="tanh"), Scale(), Renamed()))
    agrees(model, *batch_of((3,)), wavy)


def test_a_rule_by_the_layer_s_dotted_name(scale_rule):
    rule(f"{__name__}.Scale")(lambda layer, arguments, e: {"factor": Whole(tf.reduce_sum(e * arguments[0], 1))})
    agrees(randomised(with_layers(Scale())), *batch_of((3,)), wavy)


def test_a_rule_that_forgets_a_variable_is_named(scale_rule):
    scale_rule(lambda layer, arguments, e: {"scale": Whole(tf.reduce_sum(e * arguments[0], 1))})
    message = r"the rule for layer '.*' \(Scale\) gave no term for its variable 'factor', only for 'scale'"
    with pytest.raises(ValueError, match=message):
        gradient_norms(with_layers(Scale()), *batch_of((3,)), loss=squared)


def test_a_layer_that_uses_its_activation_twice_is_named():
    class Twice(layers.Dense):
        def call(self, x):
            return self.activation(super().call(x))

    rule(Twice)(RULES[f"{layers.Dense.__module__}.Dense"])
    try:
        with pytest.raises(ValueError, match=r"\(Twice\) used its activation 2 times, expected once; register a rule for its class"):
            gradient_norms(with_layers(Twice(2, activation="tanh")), *batch_of((3,)), loss=squared)
    finally:
        del RULES[f"{Twice.__module__}.{Twice.__qualname__}"]


class Interrupted(Exception):
    pass


def interrupt(*_):
    raise Interrupted


@pytest.mark.parametrize("where", ["nowhere", "layer", "activation", "loss", "rule"])
def test_layers_are_left_as_they_were(where, scale_rule):
    fault = {"on": where}
    rule(Scale)(lambda layer, arguments, e: interrupt() if fault["on"] == "rule" else {"factor": Whole(tf.reduce_sum(e * arguments[0], 1))})

    class Passing(layers.Layer):
        def call(self, x):
            return interrupt() if fault["on"] == "layer" else x

    activation = lambda x: interrupt() if fault["on"] == "activation" else tf.tanh(x)  # noqa: E731
    fault["on"] = "nowhere"
    model = randomised(with_layers(layers.Dense(4, activation="relu"), layers.Dense(4, activation=activation), Passing(), Scale()))
    x, y = batch_of((3,))
    loss = lambda y, p: interrupt() if fault["on"] == "loss" else squared(y, p)  # noqa: E731
    state = lambda: [(vars(layer).get("call"), getattr(layer, "activation", None)) for layer in model._flatten_layers()]  # noqa: E731
    before, expected = state(), gradient_norms(model, x, y, loss=loss)
    fault["on"] = where
    with pytest.raises(Interrupted) if where != "nowhere" else contextlib.nullcontext():
        gradient_norms(model, x, y, loss=loss)
    assert state() == before and all(call is None for call, _ in before)
    fault["on"] = "nowhere"
    np.testing.assert_array_equal(gradient_norms(model, x, y, loss=loss), expected)
