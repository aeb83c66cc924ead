"""The models, losses and batches that are measured: random weights, a per-sample loss, random or real texts."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

BERT = {
    "bert-base": {},
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),  # for the tests
}
LLAMA = {  # RMSNorm, rotary positions, grouped queries, a gated perceptron
    "llama": dict(  # about the size of bert-base
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048
    ),
    "llama-1b": dict(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192
    ),
    "tiny-llama": dict(
        vocab_size=32000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    ),
}
T5 = {  # the encoder alone
    "t5": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "tiny-t5": dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class T5Classifier(torch.nn.Module):
    """T5's encoder, the mean over a text's tokens, and a linear layer."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.encoder, self.classifier = T5EncoderModel(config), torch.nn.Linear(config.d_model, 2)

    @property
    def config(self) -> T5Config:
        return self.encoder.config

    def set_attn_implementation(self, name: str) -> None:
        self.encoder.set_attn_implementation(name)

    def forward(self, input_ids, attention_mask=None):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, d)
        words = input_ids != self.config.pad_token_id
        shares = (words / words.sum(1, keepdim=True)).to(states.dtype)
        return SequenceClassifierOutput(logits=self.classifier((shares[..., None] * states).sum(1)))


@dataclass(frozen=True)
class Family:
    """How a kind of model is built, what it takes, and the names of its parts."""

    sizes: dict[str, dict]
    build: Callable[[dict], torch.nn.Module]
    parts: dict[str, str]  # name patterns of parameters
    adapted: list[str]  # the linear layers that --lora gives adapters
    inputs: tuple[str, ...]  # beside input_ids
    causal: bool = False  # whether a token sees only those before it


# Without dropout, so that train mode, in which alone Opacus records, computes what eval mode does.
def build_bert(size: dict) -> torch.nn.Module:
    return BertForSequenceClassification(BertConfig(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size))


def build_llama(size: dict) -> torch.nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(num_labels=2, pad_token_id=0, use_cache=False, **size))


def build_t5(size: dict) -> torch.nn.Module:
    return T5Classifier(T5Config(dropout_rate=0.0, use_cache=False, **size))


FAMILIES = (
    Family(
        BERT,
        build_bert,
        {"all": "*", "norms": "*LayerNorm*", "head": "classifier.*"},
        ["query", "value"],
        ("attention_mask", "token_type_ids", "position_ids"),
    ),
    Family(
        LLAMA,
        build_llama,
        {"all": "*", "norms": "*norm*", "head": "score.*"},
        ["q_proj", "v_proj"],
        ("attention_mask",),
        causal=True,
    ),
    Family(T5, build_t5, {"all": "*", "norms": "*layer_norm*", "head": "classifier.*"}, ["q", "v"], ("attention_mask",)),
)
MODELS = {name: family for family in FAMILIES for name in family.sizes}


@dataclass(frozen=True)
class Case:
    """What every method is given: a model in eval mode, its per-sample loss, a batch; and the loss without autocast, to compare with."""

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, dict], torch.Tensor]
    exact_loss: Callable[[torch.nn.Module, dict], torch.Tensor]
    batch: dict
    family: Family

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def peers_batch(self) -> dict:
        """The batch with position and token-type ids of shape (B, T), where the model takes them. Left to itself it looks positions up
        once for all samples, as (1, T), which Opacus takes for a batch of one: https://github.com/meta-pytorch/opacus/issues/841."""
        ids = self.batch["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)  # not expand: Opacus takes a view of it
        batch = {"token_type_ids": torch.zeros_like(ids)} | self.batch | {"position_ids": positions}
        return {name: value for name, value in batch.items() if name in ("input_ids", "labels", *self.family.inputs)}


def build_case(arguments: argparse.Namespace, device: torch.device) -> Case:
    family = MODELS[arguments.model]
    torch.manual_seed(arguments.seed)
    with device:
        model = family.build(family.sizes[arguments.model])
        if arguments.lora:
            add_adapters(model, family, arguments.lora)
    batch = (real_batch if arguments.padding == "real" else random_batch)(arguments.batch, arguments.tokens, arguments.seed)
    batch = {name: value.to(device) for name, value in batch.items() if name in ("input_ids", "labels", *family.inputs)}
    dtype = DTYPES[arguments.dtype]
    exact_loss = partial(cross_entropy, autocast=contextlib.nullcontext)
    loss = exact_loss if dtype == torch.float32 else partial(cross_entropy, autocast=partial(torch.autocast, device.type, dtype=dtype))
    return Case(model.to(device).eval(), loss, exact_loss, batch, family)


def add_adapters(model: torch.nn.Module, family: Family, rank: int) -> None:
    """Low-rank adapters from peft; they and the head alone are trained. Neither factor starts at zero, so that both have gradients."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=family.adapted, init_lora_weights=False)
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(family.parts["head"].removesuffix("*")))


def cross_entropy(model: torch.nn.Module, batch: dict, *, autocast) -> torch.Tensor:
    """Per-sample loss, (B,), in float32 or better; the model runs inside the context that `autocast` makes."""
    with autocast():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def random_batch(count: int, tokens: int, seed: int) -> dict:
    """Random words, all samples of full length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, BertConfig().vocab_size, (count, tokens), generator=generator),
        "labels": torch.randint(2, (count,), generator=generator),
    }


def real_batch(count: int, tokens: int, seed: int) -> dict:
    """Chorus pairs as MiniLM's tokenizer (BERT's vocabulary) cuts them, padded to `tokens`."""
    from transformers import AutoTokenizer

    from recsys_importance.data import load
    from recsys_importance.models import encoder_path

    rows = load("chorus").sample(count, random_state=seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder_path("minilm"))
    options = dict(padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    encoded = tokenizer(rows["text_a"].tolist(), rows["text_b"].tolist(), **options)
    return dict(encoded) | {"labels": torch.tensor((rows["label"] > 0.5).to_numpy(dtype="int64"))}
