"""Keras training: weighted steps against tapes and NumPy, `fit` against Keras's own, two replicas, scores, schedules, fine-tuning."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny import tiny_config, tiny_frame, tiny_pair

from recsys_importance.importance import Weighting, effective_sample_size
from recsys_importance.keras.gradients import gradient_norms
from recsys_importance.keras.models import load_pair_model, pair_dataset, predict
from recsys_importance.keras.start import keras, tf
from recsys_importance.keras.training import ImportanceModel, Warmup, _optimizer, fine_tune, pair_loss, score_dataset
from recsys_importance.models import save_pair_model
from recsys_importance.training import TrainingSettings

LOSS = keras.losses.BinaryCrossentropy(from_logits=True)
RUNS = {"xla": {"jit_compile": True}, "graph": {"jit_compile": False}, "eager": {"jit_compile": False, "run_eagerly": True}}
GRAPH = RUNS["graph"]


@pytest.fixture(autouse=True)
def quiet():
    """Keras warns that it will not shuffle a tf.data.Dataset, which nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shuffle=True.* was passed")
        yield


# A small model, its data, and the slow twin of a step ------------------------------------------------------------------------------------


def network(*, decay=0.0, dropout=0.0):
    keras.utils.set_random_seed(3)
    regularizer = keras.regularizers.L2(decay) if decay else None
    inputs = keras.Input((3,))
    h = keras.layers.Dense(5, activation="tanh", kernel_regularizer=regularizer, name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, name="out")(keras.layers.Dropout(dropout)(h)))


def points(count=22, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3)).astype("float32")
    return x, (x.sum(1, keepdims=True) + rng.normal(size=(count, 1)) > 0).astype("float32")


def weighted(weighting=None, *, optimizer=None, run=GRAPH, loss=LOSS, plain=None, metrics=None, **options):
    plain = plain or network()
    model = ImportanceModel(plain.inputs, plain.outputs, weighting=weighting, **options)
    model.compile(optimizer or keras.optimizers.SGD(0.5), loss, metrics=metrics, **run)
    return model


def batches_of(x, y, size=8):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def step_by_hand(plain, batch, weighting, *, rate=0.5, decay=0.0, progress=1.0, sample_weight=None, over=""):
    """(next variables, weights) after one step of plain gradient descent, by a tape per sample and NumPy in float64."""
    x, y = batch
    variables, rows = plain.trainable_variables, []
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            loss = tf.nn.sigmoid_cross_entropy_with_logits(y[i : i + 1], plain(x[i : i + 1]))[0, 0]
        factor = 1.0 if sample_weight is None else sample_weight[i]
        rows.append([factor * g.numpy().astype(np.float64) for g in tape.gradient(loss, [v.value for v in variables])])
    counted = [k for k, v in enumerate(variables) if v.path.startswith(over)]
    norms = np.array([np.sqrt(sum((row[k] ** 2).sum() for k in counted)) for row in rows])
    weights = weighting(norms, progress=progress)
    after = []
    for k, v in enumerate(variables):
        gradient = sum(w * row[k] for w, row in zip(weights, rows, strict=True)) / len(rows)
        penalty = 2 * decay * v.numpy() if v.path == "hidden/kernel" else 0
        after.append(v.numpy() - rate * (gradient + penalty))
    return after, weights


def set_to(plain, values):
    for variable, value in zip(plain.trainable_variables, values, strict=True):
        variable.assign(value.astype("float32"))


def assert_same(model, expected, tolerance=2e-6):
    for variable, value in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=0, atol=tolerance, err_msg=variable.path)


def moved(model, start) -> float:
    return max(float(np.abs(v.numpy() - s).max()) for v, s in zip(model.trainable_variables, start, strict=True))


# One step --------------------------------------------------------------------------------------------------------------------------------

WEIGHTINGS = {
    "uniform": Weighting(exponent=0),
    "article A": Weighting(),
    "inverse, clipped": Weighting(exponent=-1, clip=1.5),
    "threshold": Weighting(threshold=0.4, threshold_on="quantile"),
}


@pytest.mark.parametrize(("name", "run"), [*((name, "graph") for name in WEIGHTINGS), ("article A", "xla"), ("article A", "eager")])
def test_a_step_is_that_of_tapes_and_numpy(name, run):
    """Norms of each sample's tape, weights of NumPy, regularizers unweighted."""
    plain, batch = network(decay=0.05), points(8)
    expected, weights = step_by_hand(plain, batch, WEIGHTINGS[name], decay=0.05)
    start = [v.numpy() for v in plain.trainable_variables]
    logs = weighted(WEIGHTINGS[name], plain=plain, run=RUNS[run]).fit(*batch, batch_size=8, verbose=0).history
    assert_same(plain, expected)
    assert moved(plain, start) > 0.01
    np.testing.assert_allclose(logs["effective_share"], effective_sample_size(weights) / 8, rtol=1e-5)
    np.testing.assert_allclose(logs["largest_weight"], weights.max(), rtol=1e-5)


def test_a_step_over_chosen_variables_and_with_weights_of_the_samples():
    """Norms are taken over the head alone; a sample_weight multiplies the loss, and so the norm; all variables are trained."""
    plain, batch, given = network(), points(8), np.linspace(0.5, 2, 8).astype("float32")
    expected, weights = step_by_hand(plain, batch, Weighting(), sample_weight=given, over="out")
    _, of_all = step_by_hand(plain, batch, Weighting(), sample_weight=given)
    assert np.abs(weights - of_all).max() > 0.01
    weighted(Weighting(), plain=plain, over="out/*").fit(*batch, sample_weight=given, batch_size=8, verbose=0)
    assert_same(plain, expected)


def test_every_batch_has_its_own_weights_also_a_smaller_last_one():
    plain, (x, y) = network(), points(22)
    start = [v.numpy() for v in plain.trainable_variables]
    for batch in batches_of(x, y):  # 8, 8 and 6
        set_to(plain, step_by_hand(plain, batch, Weighting())[0])
    expected = [v.numpy() for v in plain.trainable_variables]
    for data in ((x, y), (tf.data.Dataset.from_tensor_slices((x, y)).batch(8),)):
        set_to(plain, start)
        size = {"batch_size": 8} if len(data) == 2 else {}
        weighted(plain=plain).fit(*data, shuffle=False, verbose=0, **size)
        assert_same(plain, expected)


def test_inputs_as_arrays_dictionaries_and_data_sets_agree():
    (x, y), given, found = points(16), np.linspace(1, 2, 16).astype("float32"), []
    inputs = {"point": keras.Input((3,), name="point")}
    for data in (
        lambda: dict(x={"point": x}, y=y, sample_weight=given, batch_size=8),
        lambda: dict(x=tf.data.Dataset.from_tensor_slices(({"point": x}, y, given)).batch(8)),
        lambda: dict(x=tf.data.Dataset.from_tensor_slices(({"point": x}, y[:, 0], given)).batch(8)),  # labels (B,) for logits (B, 1)
    ):
        plain = keras.Model(inputs, network()(inputs["point"]))
        weighted(plain=plain).fit(**data(), shuffle=False, verbose=0, epochs=2)
        found.append([v.numpy() for v in plain.trainable_variables])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


# The fit that is Keras's own -------------------------------------------------------------------------------------------------------------


def fitted(make, optimizer, tmp_path, **options):
    """(variables, history, events, files) of a fit with everything around it."""
    plain, (x, y), events = network(dropout=0.3), points(22), []
    model = make(plain)
    model.compile(optimizer(), LOSS, metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)], **options)
    begins = ("on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_test_begin")
    ends = ("on_train_batch_end", "on_epoch_end", "on_train_end")

    def note(name):
        return lambda *place, logs=None: events.append((name, *(k for k in place if isinstance(k, int))))

    callbacks = [
        keras.callbacks.LambdaCallback(**{name: note(name) for name in (*begins, *ends)}),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, min_delta=0.02, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
    ]
    keras.utils.set_random_seed(5)  # order and dropout
    history = model.fit(x, y, batch_size=8, epochs=12, verbose=0, validation_data=points(10, seed=1), callbacks=callbacks).history
    return [v.numpy() for v in plain.trainable_variables], history, events, sorted(path.name for path in tmp_path.iterdir())


OPTIMIZERS = {"adam": lambda: keras.optimizers.Adam(0.05), "sgd": lambda: keras.optimizers.SGD(0.5, momentum=0.9)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_uniform_weights_are_keras_own_fit(optimizer, tmp_path):
    """The same order of samples and dropout, metrics, events, files, and the epoch at which early stopping ends it."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    theirs = fitted(lambda plain: plain, optimizer, tmp_path / "a", **GRAPH)
    ours = fitted(lambda p: ImportanceModel(p.inputs, p.outputs, weighting=Weighting(exponent=0)), optimizer, tmp_path / "b", **GRAPH)
    for a, b in zip(theirs[0], ours[0], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    assert set(ours[1]) - set(theirs[1]) == {"effective_share", "largest_weight"}
    for name, values in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], values, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(ours[1]["largest_weight"], 1, rtol=1e-6)
    assert 1 < len(ours[1]["loss"]) < 12  # early stopping did something
    assert ours[2] == theirs[2] and ours[3] == theirs[3] and len(ours[3]) == len(ours[1]["loss"])


def test_weights_change_the_training_but_not_what_the_loss_means():
    """At a learning rate of 0 the loss is the plain mean over samples, whatever the weights."""
    (x, y), plain = points(22), network()
    expected = float(tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, plain(x))))
    history = weighted(Weighting(exponent=2), plain=plain, optimizer=keras.optimizers.SGD(0.0)).fit(x, y, batch_size=8, verbose=0).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("run", [name for name in RUNS if name != "graph"])
def test_compiled_by_xla_or_run_eagerly(run):
    ends = []
    for options in (RUNS["graph"], RUNS[run]):
        model = weighted(Weighting(clip=2), run=options, optimizer=keras.optimizers.Adam(0.05))
        model.fit(*points(16), batch_size=8, epochs=2, shuffle=False, verbose=0)
        ends.append([v.numpy() for v in model.trainable_variables])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_several_steps_per_execution():
    ends = []
    for count in (1, 2):
        model = weighted(run=GRAPH | {"steps_per_execution": count})
        history = model.fit(*points(22), batch_size=8, epochs=2, shuffle=False, verbose=0).history
        ends.append(([v.numpy() for v in model.trainable_variables], history["loss"]))
    for a, b in zip(*(end[0] for end in ends), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)


@pytest.mark.parametrize("given", ["arrays", "data set", "unknown length"])
def test_annealing_follows_the_fraction_of_the_training_done(given):
    """(epoch + batch / batches) / epochs before each step; where the number of batches is not known, only the epochs count."""
    weighting, (x, y), seen = Weighting(anneal=(0.2, 0.8)), points(22), []
    plain = network()
    start = [v.numpy() for v in plain.trainable_variables]
    places = [(0 if given == "unknown length" else place) for epoch in range(2) for place in range(3)]
    progress = [(epoch + place / 3) / 2 for (epoch, place) in zip([0, 0, 0, 1, 1, 1], places, strict=True)]
    for share, batch in zip(progress, batches_of(x, y) * 2, strict=True):
        set_to(plain, step_by_hand(plain, batch, weighting, progress=share)[0])
    expected = [v.numpy() for v in plain.trainable_variables]
    set_to(plain, start)
    model = weighted(weighting, plain=plain)
    rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    unknown = rows.filter(lambda x, y: True)  # for all that tf.data knows, some are left out
    data = {"arrays": dict(x=x, y=y, batch_size=8), "data set": dict(x=rows), "unknown length": dict(x=unknown)}[given]
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(float(model._done)))
    model.fit(**data, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    np.testing.assert_allclose(seen, progress)
    assert_same(plain, expected, 5e-6)
    assert float(model._done) == 1.0


def test_gradient_accumulation_of_the_optimiser():
    """Two batches' weighted gradients, averaged, make one step."""
    plain, (x, y) = network(), points(16)
    start = [v.numpy() for v in plain.trainable_variables]
    ends = [step_by_hand(plain, batch, Weighting())[0] for batch in batches_of(x, y)]  # each from the start
    model = weighted(plain=plain, optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(plain, [(a + b) / 2 for a, b in zip(*ends, strict=True)])
    assert moved(plain, start) > 0.01


TABLES = {"adam": lambda: keras.optimizers.Adam(0.05), "clipped": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.1)}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
def test_rows_that_come_several_times_are_summed_first(make):
    """4 words in texts of 6: Adam's squares and the clipped norm are those of the table's whole gradient; in Keras's own step not."""
    keras.utils.set_random_seed(4)
    words = np.random.default_rng(0).integers(0, 4, (8, 6))
    y = np.array([[k % 2] for k in range(8)], "float32")
    inputs = keras.Input((6,), dtype="int32")
    h = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(4, 3, embeddings_initializer="normal")(inputs))
    plain = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer=keras.initializers.RandomNormal(stddev=5))(h))
    start, by_hand, variables = plain.get_weights(), make(), plain.trainable_variables
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, plain(words)))
        by_hand.apply([tf.convert_to_tensor(g) for g in tape.gradient(loss, [v.value for v in variables])], variables)
    expected = plain.get_weights()
    ends = []
    for model in (weighted(Weighting(exponent=0), plain=plain, optimizer=make()), plain):
        plain.set_weights(start)
        model.compile(make(), LOSS, **GRAPH)
        model.fit(words, y, batch_size=8, epochs=3, verbose=0)
        ends.append(max(float(np.abs(a - b).max()) for a, b in zip(plain.get_weights(), expected, strict=True)))
    assert ends[0] < 2e-6 < 1e-4 < ends[1]


# Half precision --------------------------------------------------------------------------------------------------------------------------


def in_precision(policy, make_optimizer=lambda: keras.optimizers.SGD(0.5)):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = weighted(optimizer=make_optimizer())
    finally:
        keras.config.set_dtype_policy(before)
    return model


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_comes_near_float32(policy):
    x, y = points(8)
    expected, weights = step_by_hand(network(), (x, y), Weighting())
    model = in_precision(policy)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert model.layers[1].compute_dtype == policy.removeprefix("mixed_")
    history = model.fit(x, y, batch_size=8, verbose=0).history
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert_same(model, expected, 0.02)
    assert moved(model, expected) > 1e-6  # half precision was on
    np.testing.assert_allclose(history["largest_weight"], weights.max(), rtol=0.02)


def test_a_loss_scale_that_overflows_is_halved_and_its_step_left_out():
    scaled = lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=2.0**127)  # noqa: E731
    model, (x, y) = in_precision("mixed_float16", scaled), points(8)
    start = [v.numpy() for v in model.trainable_variables]
    model.fit(x, y, batch_size=8, verbose=0)
    scale = float(model.optimizer.dynamic_scale)
    assert (scale == 2.0**126) == (moved(model, start) == 0)
    model.optimizer.dynamic_scale.assign(1024.0)
    model.fit(x, y, batch_size=8, verbose=0)
    assert moved(model, start) > 0.01 and all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)


# What is not finite, and what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_a_step_that_is_not_finite_is_not_taken(run):
    """The steps before it count; after it variables and optimiser are bit for bit what they were."""
    (x, y), model = points(16), weighted(optimizer=keras.optimizers.Adam(0.05), run=RUNS[run])
    model.fit(x[:8], y[:8], batch_size=8, verbose=0)
    before = [v.numpy() for v in (*model.trainable_variables, *model.optimizer.variables)]
    broken = x.copy()
    broken[3, 0] = math.nan
    with pytest.raises(ValueError, match="a loss, norm or weight of epoch 1, up to step 1, is NaN or infinite, so its step was not taken"):
        model.fit(broken, y, batch_size=8, shuffle=False, verbose=0)
    with pytest.raises(ValueError, match="a loss, norm or weight of this batch is NaN"):
        model.train_on_batch(broken[:8], y[:8])
    for old, new in zip(before, (*model.trainable_variables, *model.optimizer.variables), strict=True):
        assert np.asarray(old).tobytes() == new.numpy().tobytes()
    with pytest.raises(ValueError, match="of epoch 2, up to step 2, is NaN"):
        data = [(x[:8], y[:8])] * 3 + [(broken[:8], y[:8])]
        rows = tf.data.Dataset.from_generator(lambda: data, output_signature=(tf.TensorSpec((8, 3)), tf.TensorSpec((8, 1))))
        model.fit(rows, epochs=2, steps_per_epoch=2, verbose=0)
    model.train_on_batch(x[:8], y[:8])


@pytest.mark.parametrize("run", ["graph", "eager"])
def test_a_batch_without_any_gradient_trains_nothing(run):
    """A hinge that the second batch is beyond: variables, moments and decay stay bit for bit; it is said once, and training goes on."""
    (x, y), plain = points(24), network(decay=0.05)
    y = 2 * y - 1
    y[8:16] = 0  # a hinge of 0 has no slope
    hinge = lambda y, p: tf.abs(y[:, 0]) * tf.nn.softplus(-y[:, 0] * p[:, 0])  # noqa: E731
    model = weighted(plain=plain, loss=hinge, run=RUNS[run], optimizer=keras.optimizers.AdamW(0.05, weight_decay=0.1))
    state = lambda: [v.numpy() for v in (*model.trainable_variables, *model.optimizer.variables)]  # noqa: E731
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((state(), dict(logs))))
    with pytest.warns(UserWarning, match="all norms of a batch of epoch 1, up to step 2, are zero") as told:
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[note])
    assert sum("all norms" in str(warning.message) for warning in told) == 1
    for before, after in ((0, 1), (3, 4)):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(seen[before][0], seen[after][0], strict=True))
        assert seen[after][1]["largest_weight"] == seen[after][1]["effective_share"] == 0
    assert all(max(np.abs(a - b).max() for a, b in zip(seen[k][0], seen[k + 1][0], strict=True)) > 1e-3 for k in (1, 2, 4))
    assert all(np.isfinite(logs["loss"]) for _, logs in seen)


def test_what_is_refused():
    plain = network()
    with pytest.raises(ValueError, match="training needs mean-1 weights, got normalisation='sum'"):
        ImportanceModel(plain.inputs, plain.outputs, weighting=Weighting(normalisation="sum"))
    normalised = keras.Model(plain.inputs, keras.layers.BatchNormalization(name="over_the_batch")(plain.outputs[0]))
    with pytest.raises(ValueError, match=r"no rule for the variables gamma, beta of layer 'over_the_batch' \(BatchNormalization\)"):
        weighted(plain=normalised).fit(*points(8), verbose=0)
    with pytest.raises(ValueError, match="no trainable variable matches"):
        weighted(over="head/*").fit(*points(8), verbose=0)
    model = weighted()
    with pytest.raises(ValueError, match="give fit a list of callbacks"):
        model.fit(*points(8), callbacks=keras.callbacks.CallbackList([]), verbose=0)
    with pytest.raises(ValueError, match="one value per sample"):
        weighted(loss=lambda y, p: tf.reduce_mean((y - p) ** 2)).fit(*points(8), verbose=0)


def test_the_plain_model_is_trained_along_and_is_what_one_saves(tmp_path):
    plain, (x, y) = network(), points(16)
    model = weighted(plain=plain)
    model.fit(x, y, verbose=0)
    model.fit(x, y, verbose=0, callbacks=keras.callbacks.ModelCheckpoint(tmp_path / "w.weights.h5", save_weights_only=True))  # one, no list
    plain.save(tmp_path / "plain.keras")
    opened = keras.saving.load_model(tmp_path / "plain.keras")
    assert type(opened) is type(plain) and not isinstance(opened, ImportanceModel)
    np.testing.assert_array_equal(opened.predict(x, verbose=0), model.predict(x, verbose=0))
    again = weighted(plain=network())
    again.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


# Two replicas ----------------------------------------------------------------------------------------------------------------------------

REPLICAS = """
import json, math, sys, warnings
warnings.simplefilter("ignore")
from recsys_importance.keras.start import keras, tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import numpy as np
sys.path.insert(0, {tests!r})
from test_keras_training import LOSS, GRAPH, network, points, moved
from recsys_importance.importance import Weighting
from recsys_importance.keras.training import ImportanceModel

strategy, alone = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()


def run(strategy, make, count, weighting, broken=None, given=False, check=False):
    x, y = points(count)
    if broken is not None:
        x[broken] = math.nan
    with strategy.scope():
        plain = network(decay=0.05)
        model = ImportanceModel(plain.inputs, plain.outputs, weighting=weighting, check=check)
        model.compile(make(), LOSS, metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)], **GRAPH)
    start = [v.numpy() for v in plain.trainable_variables]
    parts = (x, y, np.linspace(0.5, 2, count).astype("float32")) if given else (x, y)
    rows = tf.data.Dataset.from_tensor_slices(parts).batch(8)
    error, history = "", {{}}
    try:
        history = model.fit(rows, epochs=2, verbose=0).history
    except ValueError as raised:
        error = str(raised)
    return [v.numpy() for v in plain.trainable_variables], history, error, moved(plain, start)


cases = {{
    "even": (lambda: keras.optimizers.Adam(0.05), 16, Weighting(clip=2, anneal=(0.2, 0.8)), None, True, None),
    "last of 5": (lambda: keras.optimizers.SGD(0.5, momentum=0.9), 21, Weighting(exponent=-1, clip=3)),
    "last of 1": (lambda: keras.optimizers.SGD(0.5), 17, Weighting()),
}}
found = {{}}
for name, case in cases.items():
    one, two = run(alone, *case), run(strategy, *case)
    far = max(float(np.abs(a - b).max()) for a, b in zip(one[0], two[0]))
    found[name] = dict(far=far, moved=one[3], errors=[one[2], two[2]], history=[one[1], two[1]])
_, _, error, gone = run(strategy, lambda: keras.optimizers.SGD(0.5), 8, Weighting(), 6)
found["broken"] = dict(error=error, moved=gone)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What a fresh process with two virtual CPUs found; devices are set before TensorFlow starts."""
    code = REPLICAS.format(tests=os.path.dirname(__file__))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path_factory.mktemp("replicas"), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["even", "last of 5", "last of 1"])
def test_two_replicas_are_one_device_on_the_same_batches(replicas, case):
    """Weights come from the norms of all replicas; also where a replica gets fewer samples, or none."""
    found = replicas[case]
    assert found["errors"] == ["", ""]
    assert found["far"] < 1e-6 < 1e-2 < found["moved"]
    one, two = found["history"]
    assert set(one) == set(two)
    if case == "even":  # else Keras averages the metrics of replicas, however many samples each of them had
        for name, values in one.items():
            np.testing.assert_allclose(two[name], values, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(two["largest_weight"], one["largest_weight"], rtol=1e-5)
    np.testing.assert_allclose(two["effective_share"], one["effective_share"], rtol=1e-5)


def test_two_replicas_do_not_move_at_a_step_that_is_not_finite(replicas):
    assert "is NaN or infinite, so its step was not taken" in replicas["broken"]["error"]
    assert replicas["broken"]["moved"] == 0


# Scores of a data set --------------------------------------------------------------------------------------------------------------------


def rows_of(x, y, size=8):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def scored(plain, data, *args, **options):
    return score_dataset(plain, data, *args, **dict(loss=LOSS, jit_compile=False, progress=False) | options)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_scores_are_the_norms_in_order(jit_compile):
    plain, (x, y) = network(dropout=0.5), points(22)
    names = [f"pair-{k}" for k in range(22)]
    found = scored(plain, rows_of(x, y), names, jit_compile=jit_compile)
    expected = gradient_norms(plain, x, y, loss=LOSS).numpy()
    assert found["sample_id"].tolist() == names and found["score"].dtype == np.float32
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5)
    assert scored(plain, rows_of(x, y))["sample_id"].tolist() == [str(k) for k in range(22)]
    head = scored(plain, rows_of(x, y), variables="out/*")["score"]
    np.testing.assert_allclose(head, gradient_norms(plain, x, y, loss=LOSS, variables="out/*").numpy(), rtol=1e-5)
    given = np.linspace(0, 2, 22).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y, given)).batch(8)
    np.testing.assert_allclose(scored(plain, data)["score"], expected * given, rtol=1e-5, atol=1e-9)


def test_a_folder_goes_on_where_it_was_interrupted(tmp_path):
    plain, (x, y) = network(), points(40)
    whole = scored(plain, rows_of(x, y), None, tmp_path, shard_size=10)  # whole batches: 16, 16 and 8
    shards = sorted(tmp_path.glob("scores-*.parquet"))
    assert [len(pd.read_parquet(shard)) for shard in shards] == [16, 16, 8]
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    shards[-1].unlink()
    again = scored(plain, rows_of(x, y), None, tmp_path, shard_size=10)
    pd.testing.assert_frame_equal(again, whole)
    assert [shard.stat().st_mtime_ns for shard in shards[:-1]] == stamps[:-1] and shards[-1].exists()
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("change", ["label", "weights", "loss", "variables", "shard_size", "samples"])
def test_a_folder_of_another_run_is_refused(tmp_path, change):
    plain, (x, y) = network(), points(24)
    scored(plain, rows_of(x, y), None, tmp_path)
    options = {"loss": {"loss": "mse"}, "variables": {"variables": "out/*"}, "shard_size": {"shard_size": 16}}.get(change, {})
    if change == "label":
        y[20] = 1 - y[20]
    elif change == "samples":
        x, y = x[:-1], y[:-1]
    elif change == "weights":
        plain.trainable_variables[0].assign_add(np.full((3, 5), 1e-6, "float32"))
    with pytest.raises(ValueError, match="shard 0 had other samples" if change == "label" else "scores of another run"):
        scored(plain, rows_of(x, y), None, tmp_path, **options)


def test_scoring_refuses_what_it_cannot_name_or_order():
    plain, (x, y) = network(), points(24)
    with pytest.raises(ValueError, match="there are 3 ids for 24 samples"):
        scored(plain, rows_of(x, y), ["a", "b", "c"])
    with pytest.raises(ValueError, match="comes in another order each time; score it before it is shuffled"):
        scored(plain, tf.data.Dataset.from_tensor_slices((x, y)).shuffle(24, seed=1).batch(8))
    with pytest.raises(ValueError, match="has no samples"):
        scored(plain, rows_of(x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"expected batches \(x, y\)"):
        scored(plain, tf.data.Dataset.from_tensor_slices(x).batch(8))
    x[17] = math.nan
    with pytest.raises(ValueError, match="'17'"):
        scored(plain, rows_of(x, y))


def test_scoring_refuses_samples_that_influence_one_another():
    """A loss in which each sample's term depends on the batch's mean prediction."""
    plain, (x, y) = network(), points(8)
    with pytest.raises(ValueError, match="the samples of a batch influence one another"):
        scored(plain, rows_of(x, y), loss=lambda y, p: tf.square(p - tf.reduce_mean(p) - y))


# Learning rates --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(schedule, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 3e-4)
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    theirs = make(optimizer, warmup, **({} if schedule == "constant" else {"num_training_steps": 30}))
    ours = Warmup(3e-4, 30, warmup=warmup, schedule=schedule)
    for step in range(31):
        assert float(ours(tf.constant(step, tf.int64))) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=3e-11), step
        optimizer.step()
        theirs.step()


def test_schedules_in_closed_form():
    rates = Warmup(2.0, 20, warmup=4, schedule="exponential", final_rate=0.01)
    assert [float(rates(step)) for step in (0, 1, 4, 12, 20, 25)] == pytest.approx([0, 0.5, 2, 0.2, 0.02, 0.02], rel=1e-5)
    assert float(Warmup(2.0, 20, schedule="cosine")(10)) == pytest.approx(1.0, rel=1e-5)
    opened = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(rates))
    assert opened.get_config() == rates.get_config() and float(opened(12)) == float(rates(12))


def test_losses_on_logits():
    y, logits = np.array([[1.0], [0.0], [0.3]], "float32"), np.array([[-1.0], [2.0], [0.5]], "float32")
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    crossed = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert float(pair_loss("cross_entropy")(y, logits)) == pytest.approx(crossed, rel=1e-6)
    np.testing.assert_allclose(pair_loss("squared_error")(y, logits), ((y - p) ** 2)[:, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="loss must be 'cross_entropy' or 'squared_error', got 'hinge'"):
        pair_loss("hinge")


# Fine-tuning -----------------------------------------------------------------------------------------------------------------------------

QUICK = TrainingSettings(epochs=2, batch_size=8, learning_rate=3e-3, max_length=16, evaluations_per_epoch=2, warmup=0.0, patience=99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny two-tower BERT, hidden size 16, written by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny.tiny_config", lambda **options: tiny_config(**options | {"hidden_size": 16, "num_hidden_layers": 1}))
        return save_pair_model(tiny_pair(dropout=0.0), tmp_path_factory.mktemp("tiny") / "pair")


@pytest.fixture
def pair(folder):
    return load_pair_model(folder)


TRAIN, VALIDATION = tiny_frame(20), tiny_frame(24, seed=1, prefix="v")


def tune(pair, settings=QUICK, train=TRAIN, **options):
    return fine_tune(pair, train, VALIDATION, settings, **options)


def changed(settings=QUICK, **fields):
    return TrainingSettings(**{name: getattr(settings, name) for name in settings.__dataclass_fields__} | fields)


def test_fine_tuning_keeps_the_best_weights_and_tells_its_history(pair):
    tuned = tune(pair)
    history = tuned.history
    assert list(history.columns) == ["step", "epoch", "loss", "ndcg@10", "log_loss", "mrr", "auc"]
    assert history["step"].tolist() == [0, 1, 2, 3, 4, 5, 6] and history["epoch"].tolist() == pytest.approx([k / 3 for k in range(7)])
    assert math.isnan(history["loss"][0]) and history["loss"][1:].notna().all() and not tuned.stopped_early
    assert tuned.best == history["ndcg@10"][1:].max() and tuned.head is None
    probabilities = predict(pair, VALIDATION, max_length=16)
    labels, best = VALIDATION["label"].to_numpy(), history.loc[history["ndcg@10"][1:].idxmax()]
    crossed = -(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)).mean()
    assert crossed == pytest.approx(best["log_loss"], rel=1e-5)  # the model is the best row's
    assert history["log_loss"].nunique() == 7


def test_a_lower_log_loss_is_better_and_patience_ends_the_run(pair):
    """At a learning rate that spoils the model, the first validation stays the best."""
    tuned = tune(pair, changed(metric="log_loss", patience=2, epochs=6, learning_rate=0.3, schedule="constant"))
    values = tuned.history["log_loss"][1:]
    assert tuned.best == values.min() and tuned.stopped_early
    after_best = tuned.history["step"].iloc[-1] - tuned.history["step"][values.idxmin()]
    assert after_best == 2 and tuned.history["step"].iloc[-1] < 18


def far(a, b) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


PLAIN = changed(epochs=1, evaluations_per_epoch=1, optimizer="sgd", learning_rate=0.3)
SCORES = pd.Series(np.linspace(1, 9, len(TRAIN)), TRAIN["sample_id"])


def values(pair):
    return [v.numpy() for v in pair.model.trainable_variables]


@pytest.fixture(scope="module")
def of_one_start(folder):
    """Runs from one start: settings and options of fine_tune -> the variables after it."""
    pair = load_pair_model(folder)
    start = pair.model.get_weights()

    def run(settings=PLAIN, **options):
        pair.model.set_weights(start)
        tune(pair, settings, **options)
        return values(pair)

    return run, run()


def test_scores_become_the_weights_of_the_samples(of_one_start, pair):
    """Found by name, in any order; the run is Keras's own on a data set with the weights in it."""
    run, uniform = of_one_start
    found = run(changed(PLAIN, max_gradient_norm=0.0), scores=SCORES.sample(frac=1, random_state=0))
    assert far(found, uniform) > 1e-4
    optimizer = keras.optimizers.SGD(Warmup(0.3, 3), momentum=0.9)
    pair.model.compile(optimizer, LOSS, jit_compile=False)
    weights = (SCORES / SCORES.mean()).to_numpy()
    pair.model.fit(pair_dataset(pair, TRAIN, weights=weights, batch_size=8, max_length=16, shuffle_seed=0), verbose=0)
    assert far(found, values(pair)) < 2e-6


def test_given_weights_are_annealed(of_one_start):
    """To an end that the run does not reach they stay uniform; on the way, with one end at the last step, they get only as far."""
    run, uniform = of_one_start
    assert far(run(scores=SCORES, weighting=Weighting(anneal=(0.9, 1))), uniform) < 2e-6
    assert far(run(scores=SCORES, weighting=Weighting(anneal=(0, 1))), uniform) > 1e-4


def test_a_run_is_the_same_whatever_seed_was_set_before(of_one_start):
    run, uniform = of_one_start
    keras.utils.set_random_seed(17)
    assert far(run(), uniform) < 2e-6


def test_importance_of_each_step(of_one_start):
    """recompute="step": with uniform weights the same run as without; else every step has weights of its own, no larger than the clip."""
    (run, uniform), seen = of_one_start, []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(dict(logs)))
    stepwise = run(changed(PLAIN, recompute="step"), weighting=Weighting(clip=1.2), callbacks=[note])
    assert len(seen) == 3 and all(1 < logs["largest_weight"] <= 1.2001 and 0 < logs["effective_share"] < 1 for logs in seen)
    assert far(uniform, run(changed(PLAIN, recompute="step"), weighting=Weighting(exponent=0))) < 2e-6 < 1e-4 < far(uniform, stepwise)


def test_decay_leaves_biases_and_layer_norms_alone(pair):
    """A step of AdamW without any gradient: kernels and tables shrink by the rate times the decay, the rest stays."""
    optimizer = _optimizer(changed(weight_decay=0.5, learning_rate=0.1, schedule="constant"), 10)
    before = {v.path: v.numpy() for v in pair.model.trainable_variables}
    optimizer.apply([tf.zeros(v.shape) for v in pair.model.trainable_variables], pair.model.trainable_variables)
    kept = {v.path for v in pair.model.trainable_variables if np.array_equal(v.numpy(), before[v.path]) and before[v.path].any()}
    assert {path.rpartition("/")[2] for path in kept} == {"bias", "gamma"}  # betas start at 0
    for v in pair.model.trainable_variables:
        if v.path not in kept:
            np.testing.assert_allclose(v.numpy(), before[v.path] * 0.95, rtol=1e-5, err_msg=v.path)


def test_a_schedule_counts_steps_of_several_batches(pair):
    """With accumulation the rate is that of the step, as in PyTorch: 6 batches in twos are 3 steps, at 1, 2/3 and 1/3 of the rate."""
    rates = []
    note = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: rates.append(float(note.model.optimizer.learning_rate)))
    tune(pair, changed(accumulation=2, learning_rate=3e-4), callbacks=[note])
    assert rates == pytest.approx([3e-4, 3e-4, 2e-4, 2e-4, 1e-4, 1e-4], rel=1e-5)


def test_what_fine_tuning_refuses(pair):
    start = pair.model.get_weights()
    for field, value in {
        "recompute": "epoch",
        "balance": "upgrad",
        "precision": "bf16",
        "lora_rank": 4,
        "tracking": ("tensorboard",),
    }.items():
        with pytest.raises(ValueError, match=f"{field}=.*is not there on TensorFlow; expected"):
            tune(pair, changed(**{field: value}))
    names = TRAIN["sample_id"]
    with pytest.raises(ValueError, match="1 of 20 samples have no score, the first is 's0000'"):
        tune(pair, scores=pd.Series(1.0, names[1:]))
    with pytest.raises(ValueError, match="scores are given, and recompute='step' makes its own"):
        tune(pair, changed(recompute="step"), scores=pd.Series(1.0, names))
    with pytest.raises(ValueError, match="accumulation=2 with recompute='step'"):
        tune(pair, changed(recompute="step", accumulation=2))
    with pytest.raises(ValueError, match="mean-1 weights"):
        tune(pair, scores=pd.Series(1.0, names), weighting=Weighting(normalisation="sum"))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\]"):
        tune(pair, train=TRAIN.assign(label=3.0))
    with pytest.raises(ValueError, match="metric 'spearman' is not defined on the validation data; there are ndcg@10"):
        tune(pair, changed(metric="spearman"))
    for a, b in zip(start, pair.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Checks in the run itself ----------------------------------------------------------------------------------------------------------------


def over_the_batch():
    """A network that normalises over the batch while it trains, with nothing trained in the normalisation."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    h = keras.layers.BatchNormalization(center=False, scale=False)(keras.layers.Dense(5, activation="tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.2, seed=1)(h)))


def everything(model):
    return [np.asarray(v.value) for v in model.variables]


@pytest.mark.parametrize("run", ["graph", "eager"])
@pytest.mark.parametrize("data", ["arrays", "data set", "one batch"])
def test_fit_refuses_samples_that_mix_before_anything_moves(run, data):
    plain, (x, y) = over_the_batch(), points(16)
    before, model = everything(plain), weighted(plain=plain, run=RUNS[run])
    with pytest.raises(ValueError, match="the engine's gradient of this batch is not TensorFlow's for .*mixes or moves the samples"):
        if data == "one batch":
            model.train_on_batch(x, y)
        else:
            model.fit(*((x, y) if data == "arrays" else (rows_of(x, y),)), verbose=0)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, everything(plain), strict=True))
    if run == "graph" and data == "arrays":
        silent = weighted(plain=plain, check=False)
        silent.fit(x, y, verbose=0)  # what the check is for
        assert any(a.tobytes() != b.tobytes() for a, b in zip(before, everything(plain), strict=True))


def test_checks_come_at_the_first_and_tenth_step_and_change_nothing(monkeypatch):
    """With dropout: variables, seeds and the order of batches end bit for bit as without checks."""
    from recsys_importance.keras import training

    steps, ends, of_one_pass = [], [], training._one_pass
    monkeypatch.setattr(training, "_one_pass", lambda *args, **options: (steps.append(1), of_one_pass(*args, **options))[1])
    x, y = points(48)
    for check, count in ((None, 2), (False, 0)):
        steps.clear()
        model = weighted(plain=network(dropout=0.3), check=check, optimizer=keras.optimizers.Adam(0.05))
        rows = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(48, seed=1).batch(8)
        keras.utils.set_random_seed(5)
        model.fit(rows, epochs=2, verbose=0)
        assert len(steps) == count
        ends.append(everything(model))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*ends, strict=True))


def test_scoring_checks_batches_in_their_own_function(monkeypatch):
    """A loss of the batch's mean passes for the first two samples where their batch is theirs alone, and is caught in a larger one."""
    plain, (x, y) = network(), points(24)
    mixing = lambda y, p: tf.square(p[:, 0] - tf.reduce_mean(p) - y[:, 0])  # noqa: E731
    monkeypatch.setattr("recsys_importance.keras.training._check_alone", lambda *_: None)
    with pytest.raises(ValueError, match="the engine's gradient of this batch is not TensorFlow's"):
        scored(plain, rows_of(x, y), loss=mixing)
    assert np.isfinite(scored(plain, rows_of(x, y), loss=mixing, check=False)["score"]).all()
    otherwise = lambda y, p: (2.0 if tf.executing_eagerly() else 1.0) * tf.square(p[:, 0] - y[:, 0])  # noqa: E731
    with pytest.raises(ValueError, match="the norm of sample '.*' is .* compiled and .* run eagerly"):
        scored(plain, rows_of(x, y), loss=otherwise)


STRENGTH = 1.0


def test_a_folder_is_bound_to_all_that_a_loss_reads(tmp_path):
    """Closure, defaults, globals, arguments, a teacher, a variable; the same code made anew goes on."""
    plain, (x, y), teacher = network(), points(8), network()
    own = tf.Variable(1.0)

    def loss_of(t=1.0, strength=1.0, factor=None):
        globals()["STRENGTH"] = strength
        return lambda y, p, scale=t: STRENGTH * tf.math.square(p[:, 0] - teacher(y * tf.ones((1, 3)))[:, 0] * own) / (factor or scale)

    scored(plain, rows_of(x, y), None, tmp_path, loss=loss_of())
    scored(plain, rows_of(x, y), None, tmp_path, loss=loss_of())
    for other in (dict(t=2.0), dict(strength=2.0), dict(factor=3.0)):
        with pytest.raises(ValueError, match="scores of another run"):
            scored(plain, rows_of(x, y), None, tmp_path, loss=loss_of(**other))
    for variable in (own, teacher.trainable_variables[0]):
        kept = np.asarray(variable)
        variable.assign(kept + 1)
        with pytest.raises(ValueError, match="scores of another run"):
            scored(plain, rows_of(x, y), None, tmp_path, loss=loss_of())
        variable.assign(kept)
    scored(plain, rows_of(x, y), None, tmp_path, loss=loss_of())


class Scaled(keras.layers.Layer):
    """x over a number that is no weight and not in the configuration."""

    def __init__(self, **options):
        super().__init__(**options)
        self._over = 1.0

    def call(self, x):
        return x / self._over


def test_a_folder_is_bound_to_what_the_layers_are_set_to(tmp_path):
    plain, (x, y) = network(), points(8)
    scaled, relu = Scaled(), keras.layers.LeakyReLU(0.1)
    model = keras.Model(plain.inputs, relu(scaled(plain.outputs[0])))
    scored(model, rows_of(x, y), None, tmp_path)
    model.compile("sgd", "mse")  # is none of it
    scored(model, rows_of(x, y), None, tmp_path)
    for layer, name in ((scaled, "_over"), (relu, "negative_slope")):
        kept = getattr(layer, name)
        setattr(layer, name, 0.5)
        with pytest.raises(ValueError, match="scores of another run"):
            scored(model, rows_of(x, y), None, tmp_path)
        setattr(layer, name, kept)
    scored(model, rows_of(x, y), None, tmp_path)
