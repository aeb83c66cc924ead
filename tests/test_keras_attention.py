"""Keras attention against the PyTorch module, compiled and not, under mixed precision, masks, fit by hand, files and two replicas."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from recsys_importance import attention as in_torch
from recsys_importance.importance import importance
from recsys_importance.keras.attention import AttentionModel, SampleAttention, attention_loss, attention_scores
from recsys_importance.keras.start import keras, tf

KEPT = np.array([True, True, False, True])


def example(count=4, width=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)).astype("float32"), rng.uniform(size=count).astype("float32")


def pair_of_layers(weight, **settings):
    layer, module = SampleAttention(**settings), in_torch.SampleAttention(len(weight), temperature=settings.get("temperature", 1.0))
    layer.build((None, len(weight)))
    layer.weight.assign(np.asarray(weight, dtype="float32"))
    module.weight.data = torch.tensor(weight, dtype=torch.float32)
    return layer, module


def network(dropout=0.0):
    inputs = keras.Input((3,))
    h = keras.layers.Dense(4, activation="tanh", name="h")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, name="out")(keras.layers.Dropout(dropout)(h)))


def compiled(dropout=0.0, regularisation=0.5, **options):
    keras.utils.set_random_seed(3)
    model = AttentionModel(network(dropout), representation="h", regularisation=regularisation)
    model.attention.weight.assign([0.5, -1.0, 0.3, 0.8])
    model.compile(keras.optimizers.SGD(0.5), keras.losses.MeanSquaredError(reduction=None), **options)
    return model


# The layer and the loss -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("mask", [None, KEPT])
@pytest.mark.parametrize("run", ["eager", "graph", "xla"])
def test_attention_loss_and_gradients_are_those_of_pytorch(temperature, mask, run):
    h, losses = example()
    layer, module = pair_of_layers([0.7, -1.3, 0.4], temperature=temperature)

    def step(h, losses):
        with tf.GradientTape() as tape:
            tape.watch(h)
            a = layer(h, mask=mask)
            loss = attention_loss(losses, a, regularisation=0.3, mask=mask)
        return a, loss, *tape.gradient(loss, [h, layer.weight.value])

    step = step if run == "eager" else tf.function(step, jit_compile=run == "xla")
    found = [x.numpy() for x in step(tf.constant(h), tf.constant(losses))]
    at, kept = torch.tensor(h, requires_grad=True), None if mask is None else torch.tensor(mask)
    a = module(at, kept)
    loss = in_torch.attention_loss(torch.tensor(losses), a, regularisation=0.3, mask=kept)
    loss.backward()
    for here, there in zip(found, (a.detach(), loss.detach(), at.grad, module.weight.grad), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-7)


def test_by_hand():
    layer, _ = pair_of_layers([math.log(2), math.log(5)])
    h = np.array([[1, 0], [0, 1], [0, 0]], dtype="float32")
    np.testing.assert_allclose(layer(h), np.array([2, 5, 1]) / 8, rtol=1e-6)
    np.testing.assert_allclose(layer(h, mask=np.array([True, False, True])), np.array([2, 0, 1]) / 3, rtol=1e-6)
    assert np.array_equal(SampleAttention()(h), np.full(3, 1 / 3, dtype="float32"))


def test_mixed_precision_computes_in_float32():
    h, _ = example(6, 16)
    before = keras.config.dtype_policy()
    try:
        for policy in ("mixed_float16", "mixed_bfloat16"):
            keras.config.set_dtype_policy(policy)
            for layer in (SampleAttention(), SampleAttention(dtype=policy)):
                layer.build(h.shape)
                layer.weight.assign(np.linspace(-1, 1, 16))
                half = tf.cast(h, "float16")
                logits = half.numpy().astype("float64") @ np.linspace(-1, 1, 16)
                found = layer.call(half)
                assert found.dtype == tf.float32 and layer.weight.dtype == "float32"
                np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    finally:
        keras.config.set_dtype_policy(before)
    double = SampleAttention(dtype="float64")
    assert double(h.astype("float64")).dtype == tf.float64


def test_large_logits_do_not_overflow_and_a_masked_row_may_hold_anything():
    layer, _ = pair_of_layers([1.0])
    assert layer(np.array([[1e30], [-1e30]], dtype="float32")).numpy().tolist() == [1, 0]
    h, losses = np.array([[0.0], [math.nan], [0.0]], dtype="float32"), np.array([1.0, math.nan, 2.0], dtype="float32")
    mask = np.array([True, False, True])
    with tf.GradientTape() as tape:
        loss = attention_loss(losses, layer(h, mask=mask), regularisation=0.3, mask=mask)
    assert float(loss) == 1.5 and float(tape.gradient(loss, layer.weight.value)[0]) == 0


def test_what_is_wrong_is_refused_eagerly_and_turns_to_nan_in_a_graph():
    layer, _ = pair_of_layers([1.0])
    nan, none = np.array([[0.0], [math.nan]], dtype="float32"), np.zeros(2, dtype=bool)
    with pytest.raises(ValueError, match="the logits of some samples are NaN"):
        layer(nan)
    with pytest.raises(ValueError, match="all samples are left out"):
        layer(np.zeros((2, 1), dtype="float32"), mask=none)
    in_graph = tf.function(layer)
    assert np.isnan(in_graph(nan)).all() and np.isnan(in_graph(np.zeros((2, 1), dtype="float32"), mask=none)).all()
    third = np.full(3, 1 / 3, dtype="float32")
    with pytest.raises(ValueError, match="the losses of some samples are NaN"):
        attention_loss(np.array([0, math.nan, 0], dtype="float32"), third, regularisation=0)
    with pytest.raises(ValueError, match="must be shares"):
        attention_loss(np.zeros(3, dtype="float32"), third / 2, regularisation=0)
    with pytest.raises(ValueError, match=r"expected \(B,\) for both"):
        attention_loss(np.zeros((3, 1), dtype="float32"), third, regularisation=0)
    for value in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="regularisation must be a finite number"):
            attention_loss(np.zeros(3, dtype="float32"), third, regularisation=value)
        with pytest.raises(ValueError, match="regularisation must be a finite number"):
            AttentionModel(network(), representation="h", regularisation=value)
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            SampleAttention(temperature=value)
    with pytest.raises(ValueError, match="pool or flatten"):
        SampleAttention()(np.zeros((2, 3, 4), dtype="float32"))
    for mask in (np.ones(2), np.ones(3, dtype=bool), np.ones((2, 1), dtype=bool)):
        with pytest.raises(ValueError, match="the mask has shape"):
            layer(np.zeros((2, 1), dtype="float32"), mask=mask)


# The model ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("mask", [None, KEPT])
def test_one_step_of_fit_is_the_step_by_hand(jit_compile, mask):
    """Weights after one step of SGD from sum_i a_i g_i, h cut, and dL/dw = sum_i a_i (l_i + lambda log(n a_i) - L) h_i."""
    model, (x, y) = compiled(jit_compile=jit_compile), example()
    before = [v.numpy() for v in model.trainable_variables]
    rows = range(4) if mask is None else np.flatnonzero(mask)
    h, own, losses = [], [], []
    for i in rows:
        with tf.GradientTape() as tape:
            loss = (model.network(x[i : i + 1])[0, 0] - y[i]) ** 2
        own.append([g.numpy() for g in tape.gradient(loss, model.network.trainable_variables)])
        losses.append(float(loss))
        h.append(model.network.get_layer("h")(x[i : i + 1])[0].numpy().astype("float64"))
    h, losses, w = np.array(h), np.array(losses), np.array([0.5, -1.0, 0.3, 0.8])
    a = np.exp(h @ w) / np.exp(h @ w).sum()
    total = (a * (losses + 0.5 * np.log(len(a) * a))).sum()
    expected = [sum(share * g[k] for share, g in zip(a, own, strict=True)) for k in range(4)]
    expected.append(((a * (losses + 0.5 * np.log(len(a) * a) - total))[:, None] * h).sum(0))
    history = model.fit(x, y[:, None], batch_size=4, epochs=1, verbose=0, shuffle=False, sample_weight=mask)
    names = [v.path.split("/")[-2:] for v in model.trainable_variables]
    assert names[-1] == ["attention", "weight"] and len(names) == 5
    for variable, start, gradient in zip(model.trainable_variables, before, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), start - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    assert history.history["loss"][0] == pytest.approx(total, rel=1e-5)
    evaluated = model.evaluate(x, y[:, None], sample_weight=mask, verbose=0)
    assert evaluated == pytest.approx(np.mean([(model.network(x[i : i + 1])[0, 0] - y[i]) ** 2 for i in rows]), rel=1e-5)


def test_dropout_is_on_in_fit_and_off_elsewhere_and_rows_are_alone_in_predictions_and_scores():
    model, (x, y) = compiled(dropout=0.5, metrics=[keras.metrics.MeanAbsoluteError(name="error")]), example(8)
    first = model.predict(x, verbose=0)
    assert np.array_equal(first, model.predict(x, verbose=0)) and len(np.unique(model._both(x, training=True)[0])) > 1
    assert not np.array_equal(model._both(x, training=True)[0], model._both(x, training=True)[0])
    np.testing.assert_allclose(np.concatenate([model.predict(x[i : i + 1], verbose=0) for i in range(8)]), first, rtol=1e-5)
    one_by_one = np.concatenate([attention_scores(model, x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(one_by_one, attention_scores(model, x), rtol=1e-6)
    h = model.network.get_layer("h")(x)
    np.testing.assert_allclose(importance(one_by_one), model.attention(h), rtol=1e-5)
    np.testing.assert_allclose(attention_scores(model, x, shift=1.0) * math.e, one_by_one, rtol=1e-6)
    history = model.fit(x, y[:, None], verbose=0)
    assert set(history.history) == {"loss", "error"}
    assert dict(zip(["loss", "error"], model.evaluate(x, y[:, None], verbose=0), strict=True))["error"] == pytest.approx(
        np.abs(model.predict(x, verbose=0)[:, 0] - y).mean(), rel=1e-5
    )


def test_mixed_precision_fits_and_keeps_the_attention_in_float32():
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model, (x, y) = compiled(), example(8)
    finally:
        keras.config.set_dtype_policy(before)
    history = model.fit(tf.data.Dataset.from_tensor_slices((x, y[:, None])).batch(4), epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all() and history.history["loss"][-1] < history.history["loss"][0]
    assert model._both(x)[1].dtype == tf.bfloat16 and model.attention.weight.dtype == "float32"


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_nan_in_training_stops_the_run(jit_compile):
    model, (x, y) = compiled(jit_compile=jit_compile), example(8)
    x[5, 0] = math.nan
    history = model.fit(x, y[:, None], batch_size=4, epochs=3, verbose=0, shuffle=False, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(history.epoch) <= 1 and not np.isfinite(history.history.get("loss", [math.nan])).all()


def test_files_keep_everything(tmp_path):
    model, (x, y) = compiled(regularisation=0.7), example(8)
    model.fit(x, y[:, None], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.regularisation == 0.7 and loaded.representation == "h" and loaded.attention.temperature == 1.0
    np.testing.assert_array_equal(loaded.attention.weight, model.attention.weight)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    loaded.fit(x, y[:, None], verbose=0)
    alone = keras.Sequential([keras.Input((3,)), SampleAttention(temperature=2.5)])
    alone.save(tmp_path / "layer.keras")
    assert keras.saving.load_model(tmp_path / "layer.keras").layers[-1].temperature == 2.5


def test_wrong_models_losses_weights_and_overflow_are_refused():
    (x, y), model = example(), compiled()
    with pytest.raises(ValueError, match="the network has no layer 'hidden'; it has .*h, "):
        AttentionModel(network(), representation="hidden", regularisation=1.0)
    with pytest.raises(ValueError, match="sample_weight has dtype float32; attention takes the place of weights"):
        model.fit(x, y[:, None], sample_weight=np.ones(4), verbose=0)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"the loss has shape \(\), expected \(B,\)"):
        model.fit(x, y[:, None], verbose=0)
    model.attention.weight.assign([1e4] * 4)
    with pytest.raises(ValueError, match="does not fit float64"):
        attention_scores(model, np.full((1, 3), 5.0, dtype="float32") * np.sign(model.network.get_layer("h").kernel.numpy().sum(1)))
    x[1] = math.nan
    with pytest.raises(ValueError, match="the logits of some samples are NaN"):
        attention_scores(model, x)


TWO_REPLICAS = """
import json, sys
from recsys_importance.keras.start import keras, tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import numpy as np
sys.path.insert(0, {tests!r})
from test_keras_attention import compiled, example
from recsys_importance.keras.attention import attention_loss
x, y = example(8)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = compiled(jit_compile=False)
before = [v.numpy() for v in model.trainable_variables]
alone = compiled(jit_compile=False)
with tf.GradientTape() as tape:
    loss = 0.0
    for half in (slice(0, 4), slice(4, 8)):
        prediction, h = alone(x[half], training=True)
        losses = (prediction[:, 0] - y[half]) ** 2
        loss += attention_loss(losses, alone.attention(tf.stop_gradient(h)), regularisation=0.5) / 2
gradients = tape.gradient(loss, alone.trainable_variables)
expected = [start - 0.5 * g.numpy() for start, g in zip(before, gradients)]
history = model.fit(tf.data.Dataset.from_tensor_slices((x, y[:, None])).batch(8), epochs=1, verbose=0)
far = max(float(np.abs(v.numpy() - e).max()) for v, e in zip(model.trainable_variables, expected))
moved = max(float(np.abs(v.numpy() - b).max()) for v, b in zip(model.trainable_variables, before))
print(json.dumps([far, moved, history.history["loss"][0], float(loss)]))
"""


def test_two_replicas_average_the_losses_of_their_own_attention(tmp_path):
    code = TWO_REPLICAS.format(tests=os.path.dirname(__file__))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    far, moved, fitted, by_hand = json.loads(run.stdout.splitlines()[-1])
    assert far < 1e-6 < 1e-2 < moved and fitted == pytest.approx(by_hand, rel=1e-5)
