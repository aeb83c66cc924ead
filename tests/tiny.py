"""Tiny models for the tests: a perceptron on points, and pair models of two layers, hidden size 32, with a vocabulary written here."""

import numpy as np
import pandas as pd
import torch

from recsys_importance.models import CrossEncoder, PairModel, TwoTower

# With two layers of 32, threads only wait for one another; one thread also adds up in one order.
torch.set_num_threads(1)

WORDS = [
    "red", "blue", "green", "mug", "cup", "tea", "pot", "usb", "hub", "cable", "printer", "lamp", "desk",
    "chair", "wool", "sock", "hat", "glass", "steel", "small", "large", "set", "of", "with", "for",
]  # fmt: skip


def tiny_tokenizer(names=("input_ids", "token_type_ids", "attention_mask")):
    """A word tokenizer that joins and pads as BERT's does; `names` are the inputs that the model takes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=list(names),
    )


def tiny_config(*, dropout: float = 0.1, **changes):
    from transformers import BertConfig

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=80)
    options = dict(vocab_size=len(WORDS) + 4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2)
    return BertConfig(**sizes | options | changes)


def tiny_pair(
    architecture: str = "two_tower", *, tasks=("relevance",), seed: int = 0, dropout: float = 0.1, device: str = "cpu"
) -> PairModel:
    """A random pair model in eval mode."""
    from transformers import BertForSequenceClassification, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "two_tower":
            model = TwoTower(BertModel(tiny_config(dropout=dropout), add_pooling_layer=False), tasks=tasks)
        else:
            model = CrossEncoder(BertForSequenceClassification(tiny_config(dropout=dropout, num_labels=len(tasks))), tasks=tasks)
    return PairModel(model.to(device).eval(), tiny_tokenizer())


def tiny_frame(count: int, *, seed: int = 0, queries: int = 4, prefix: str = "s") -> pd.DataFrame:
    """Pairs of made-up texts of 1 to 9 words; a pair is relevant if the texts share a word."""
    rng = np.random.default_rng(seed)
    text = [" ".join(rng.choice(WORDS, rng.integers(1, 4), replace=False)) for _ in range(queries)]
    rows = []
    for number in range(count):
        candidate = " ".join(rng.choice(WORDS, rng.integers(1, 10), replace=False))
        shared = len(set(text[number % queries].split()) & set(candidate.split()))
        rows.append((f"{prefix}{number:04d}", text[number % queries], candidate, min(shared, 1) * 1.0, f"q{number % queries}"))
    return pd.DataFrame(rows, columns=["sample_id", "text_a", "text_b", "label", "query_id"])


def residual(model, batch):
    """(prediction - y)^2 per sample."""
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2


def perceptron(*, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)).eval()


def points(count: int = 6, seed: int = 0, dtype=torch.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {"x": torch.tensor(rng.normal(size=(count, 3)), dtype=dtype), "y": torch.tensor(rng.normal(size=count), dtype=dtype)}


class Through(torch.nn.Module):
    """Named modules and a forward given as a function of the model and x."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.formula = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.formula(self, x)
