"""Encoders, decoders and recommenders that people bring, tiny and random, against the loop over samples, with no option given."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from test_certificate import PADDING, certify, certify_each_parameter, label_loss, numbers, readout, shaken, tied
from tiny import Through
from torch import nn
from torch.nn import functional

from recsys_importance.gradients import gradient_norms

VOCABULARY, WIDTH = 29, 12
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
NAMED = dict(SIZES, max_position_embeddings=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DECODER = dict(NAMED, num_key_value_heads=1, head_dim=6)


def transformers_model(kind: str, task: str, **options):
    """<kind><task> with its <kind>Config, from transformers."""
    library = importlib.import_module("transformers")
    return getattr(library, f"{kind}{task}")(getattr(library, f"{kind}Config")(**options))


def classifier(kind: str, **options):
    return transformers_model(kind, "ForSequenceClassification", **options, num_labels=3)


def deberta(**options):
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_relative_positions=16)
    relative |= dict(position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0)
    return classifier("DebertaV2", **NAMED | relative | options)


def bart():
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, scale_embedding=True)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=24)
    return classifier("Bart", **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)


T5 = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=20, num_layers=2, num_heads=2, relative_attention_num_buckets=8)
T5 |= dict(relative_attention_max_distance=12, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)


class MeanPooled(nn.Module):
    """An encoder, the mean of its tokens, and a head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden)
        return SimpleNamespace(logits=self.head((hidden * mask).sum(1) / mask.sum(1)))


MODELS = {
    "xlm-r": lambda: classifier("XLMRoberta", **NAMED | dict(pad_token_id=1, type_vocab_size=1)),
    "mpnet": lambda: classifier("MPNet", **NAMED),
    "mpnet, mean": lambda: MeanPooled(transformers_model("MPNet", "Model", **NAMED, add_pooling_layer=False)),
    "deberta": deberta,
    "deberta, content to position": lambda: deberta(pos_att_type=["c2p"], share_att_key=False),
    "deberta, position to content": lambda: deberta(pos_att_type=["p2c"], share_att_key=False, norm_rel_ebd="none"),
    "deberta, projections of their own": lambda: deberta(share_att_key=False, position_buckets=-1, max_relative_positions=5),
    "deberta, convolution": lambda: deberta(conv_kernel_size=3, conv_act="gelu", position_biased_input=True),
    "t5, encoder": lambda: MeanPooled(transformers_model("T5", "EncoderModel", **T5)),
    "t5, gated": lambda: MeanPooled(transformers_model("T5", "EncoderModel", **T5, feed_forward_proj="gated-gelu")),
    "t5": lambda: classifier("T5", **T5 | dict(num_layers=1), num_decoder_layers=1),
    "bart": bart,
    "llama": lambda: classifier("Llama", **DECODER),
    "llama, biased": lambda: classifier("Llama", **DECODER, attention_bias=True, mlp_bias=True),
    "mistral": lambda: classifier("Mistral", **DECODER, sliding_window=4),
    "qwen2": lambda: classifier("Qwen2", **DECODER),
    "qwen3": lambda: classifier("Qwen3", **DECODER),
    "gemma": lambda: classifier("Gemma", **DECODER),
    "gemma2": lambda: classifier("Gemma2", **DECODER, query_pre_attn_scalar=6, sliding_window=4),
    "phi3": lambda: classifier("Phi3", **NAMED, num_key_value_heads=2),
}
LANGUAGE = {
    "llama": lambda: transformers_model("Llama", "ForCausalLM", **DECODER),
    "llama, tied": lambda: transformers_model("Llama", "ForCausalLM", **DECODER, tie_word_embeddings=True),
    "qwen2, tied": lambda: transformers_model("Qwen2", "ForCausalLM", **DECODER, tie_word_embeddings=True),
    "gemma2": lambda: transformers_model("Gemma2", "ForCausalLM", **DECODER, query_pre_attn_scalar=6, tie_word_embeddings=True),
}


@pytest.fixture
def in_double(monkeypatch):
    """For the float64 comparison: models that compute parts in float32 whatever they are given stay in float64."""
    float32, to, softmax = torch.Tensor.float, torch.Tensor.to, functional.softmax

    def kept(x, *given, **options):
        of_a_model = sys._getframe(1).f_globals["__name__"].startswith("transformers.models")
        narrows = x.dtype == torch.float64 and torch.float32 in (*given, *options.values())
        return x if of_a_model and narrows else to(x, *given, **options)

    def wide(x, dim=None, dtype=None, **options):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else float32(x))
    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(functional, "softmax", wide)


def tokens(padding: str, name: str) -> dict:
    """A batch of made-up tokens of the lengths that PADDING gives, each ending in the end-of-text token 2."""
    lengths = torch.tensor(PADDING[padding])[:, None]
    count, longest = len(lengths), int(lengths.max())
    generator, place = torch.Generator().manual_seed(len(padding)), torch.arange(longest)[None]
    mask, last = (place < lengths).long(), lengths - 1
    if padding == "left":
        mask, last = (place >= longest - lengths).long(), torch.full_like(lengths, longest - 1)
    ids = torch.randint(3, 5 if padding == "repeated tokens" else VOCABULARY, (count, longest), generator=generator)
    ids = torch.where(place == last, 2, ids) * mask
    if name.startswith("xlm-r"):
        ids = torch.where(mask == 1, torch.where(ids == 1, 4, ids), 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (count,), generator=generator)}


def built(table: dict, name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(table[name]())


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, padding, in_double):
    if name == "deberta, convolution" and padding == "sequence of one":
        padding = "none"  # there, the model changes the convolution's output in place, which is refused
    engines = ("float64", "float32", "torch") if padding in ("right", "as many as samples") else ("float64",)
    certify(built(MODELS, name), label_loss, tokens(padding, name), engines=engines)


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter(name, in_double):
    certify_each_parameter(built(MODELS, name), label_loss, tokens("right", name))


def next_tokens(model, batch):
    """Mean cross-entropy of a sample's next tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = batch["attention_mask"][:, 1:].to(logits)
    losses = functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("padding", ["right", "left", "as many as samples", "batch of one"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name, padding, in_double):
    certify(built(LANGUAGE, name), next_tokens, tokens(padding, name), engines=("float64",))


TARGETS = {
    **dict.fromkeys(["mpnet"], ["q", "v", "o"]),
    **dict.fromkeys(["deberta", "deberta, projections of their own"], ["query_proj", "value_proj", "pos_key_proj", "pos_query_proj"]),
    **dict.fromkeys(["t5, encoder", "t5"], ["q", "v"]),
    **dict.fromkeys(["xlm-r"], ["query", "value"]),
    **dict.fromkeys(["bart", "llama", "mistral", "qwen2", "qwen3", "gemma2"], ["q_proj", "v_proj"]),
}


def adapted(model, targets, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, **options))


@pytest.mark.parametrize("padding", ["right", "as many as samples"])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters(name, padding, in_double):
    kind = {} if name == "t5, encoder" else {"task_type": "SEQ_CLS"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(adapted(MODELS[name](), TARGETS[name], **kind))
    certify(model, label_loss, tokens(padding, name), engines=("float64",))
    assert 0 < sum(p.requires_grad for p in model.parameters()) < sum(1 for _ in model.parameters())


# --- pictures ---------------------------------------------------------------------------------------------------------------------------

PICTURE = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4)


def vit():
    return transformers_model("ViT", "ForImageClassification", **PICTURE, num_labels=3)


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = NAMED | dict(projection_dim=6)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=PICTURE | dict(projection_dim=6), projection_dim=6))


def pictures(count: int = 4) -> dict:
    batch = tokens("right" if count == 4 else "as many as samples", "clip")
    generator = torch.Generator().manual_seed(1)
    batch = {name: x[:count] for name, x in batch.items()}
    return batch | {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}


def picture_loss(model, batch):
    return functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


def pooled(features) -> torch.Tensor:
    return features if torch.is_tensor(features) else features.pooler_output


def text_loss(model, batch):
    features = pooled(model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
    return readout(lambda x: x, {"x": features})


def image_loss(model, batch):
    return readout(lambda x: x, {"x": pooled(model.get_image_features(pixel_values=batch["pixel_values"]))})


def pair_loss(model, batch):
    """The two towers' contrast on given pairs: how far the temperature times the cosine is from the label."""
    text = pooled(model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
    image = pooled(model.get_image_features(pixel_values=batch["pixel_values"]))
    logits = functional.cosine_similarity(text, image) * model.logit_scale.exp()
    return functional.binary_cross_entropy_with_logits(logits, (batch["labels"] > 0).to(logits), reduction="none")


PICTURES = {
    "vit": (vit, picture_loss),
    "clip, text": (clip, text_loss),
    "clip, image": (clip, image_loss),
    "clip, pairs": (clip, pair_loss),
    "vit with lora": (lambda: adapted(vit(), ["query", "value", "q_proj", "v_proj"], modules_to_save=["classifier"]), picture_loss),
    "clip, pairs, with lora": (lambda: adapted(clip(), ["q_proj", "v_proj"]), pair_loss),
}


@pytest.mark.parametrize("count", [4, 5, 2, 1])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, count, in_double):
    """With five patches and the class, as many samples as positions too."""
    build, loss = PICTURES[name]
    batch = pictures(4) if count > 4 else pictures(count)
    if count > 4:
        batch = {key: torch.cat([x, x[:1].flip(-1)]) for key, x in batch.items()}
    certify(built({name: build}, name), loss, batch, engines=("float64",))


# --- recommenders -----------------------------------------------------------------------------------------------------------------------


def ids_batch(count: int, fields: int = 2, below: int = 9) -> dict:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(1, below, (count, fields), generator=generator)
    return {"x": x, "y": torch.linspace(-1, 1, count), "dense": torch.randn(count, 4, generator=generator)}


def rating_loss(model, batch):
    return functional.softplus(model(batch["x"]).reshape(len(batch["x"]), -1).sum(1) - batch["y"])


def factors(ids):
    """Matrix factorisation with biases; ids: x -> (users, items)."""

    def forward(m, x):
        user, item = ids(x)
        return (m.user(user) * m.item(item)).sum(-1) + m.user_bias(user)[:, 0] + m.item_bias(item)[:, 0] + m.mean

    model = Through(forward, user=nn.Embedding(9, 4), item=nn.Embedding(9, 4), user_bias=nn.Embedding(9, 1), item_bias=nn.Embedding(9, 1))
    model.mean = nn.Parameter(torch.tensor(0.3))
    return model


class Sasrec(nn.Module):
    """Self-attention over a user's items, which are scored against the same table."""

    def __init__(self, score):
        super().__init__()
        self.items, self.places, self.norm, self.score = nn.Embedding(12, 6, padding_idx=0), nn.Embedding(10, 6), nn.LayerNorm(6), score
        self.query, self.key, self.value, self.feed = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = self.items(x) * 6**0.5 + self.places(torch.arange(x.shape[1]))
        hidden = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        attention = (self.query(h) @ self.key(h).mT).masked_fill(hidden, -1e9).softmax(-1)
        h = self.norm(h + self.feed(torch.relu(attention @ self.value(h))))
        return self.score(self, h[:, :-1], x[:, 1:])


def cross_entropy_of(scores, following):
    return functional.cross_entropy(scores.mT, following, ignore_index=0, reduction="none")


def against_a_negative(m, h, following):
    negative = (following * 5 + 1) % 12
    positive, negative = (h * m.items.weight[following]).sum(-1), (h * functional.embedding(negative, m.items.weight)).sum(-1)
    return functional.softplus(negative - positive)


SCORES = {
    "linear": lambda m, h, following: cross_entropy_of(functional.linear(h, m.items.weight), following),
    "matmul": lambda m, h, following: cross_entropy_of(h @ m.items.weight.T, following),
    "matmul, transposed": lambda m, h, following: cross_entropy_of(torch.matmul(h, m.items.weight.transpose(0, 1)), following),
    "matmul, items only": lambda m, h, following: cross_entropy_of(h @ m.items.weight[1:].T, following - 1),
    "rows": against_a_negative,
    "the module": lambda m, h, following: (h * m.items(following)).sum(-1),
    "normalised": lambda m, h, following: cross_entropy_of(functional.linear(h, functional.normalize(m.items.weight, dim=1)), following),
    "last, against all": lambda m, h, following: cross_entropy_of((h[:, -1] @ m.items.weight.T)[:, None], following[:, -1:]),
    "all items by their places": lambda m, h, following: cross_entropy_of(h @ m.items(torch.arange(12)).T, following),
}


def dlrm(m, x):
    """Tables of their own for each field, a bag of places, and the dot products of all pairs."""
    dense = torch.relu(m.bottom(x.to(m.bottom.weight) / 9))
    vectors = [dense, m.a(x[:, 0]), m.b(x[:, 1] % 4), m.bag(x[:, 1:])]
    t = torch.stack(vectors, 1)
    products = (t @ t.mT)[:, *torch.tril_indices(4, 4, -1)]
    return m.top(torch.cat([dense, products], 1))


def dlrm_model():
    return Through(
        dlrm,
        bottom=nn.Linear(3, 4),
        a=nn.Embedding(9, 4),
        b=nn.Embedding(4, 4),
        bag=nn.EmbeddingBag(9, 4, mode="sum"),
        top=nn.Linear(10, 1),
    )


class Fields(nn.Module):
    """A factorisation machine over one table for all fields, places hashed and offset by field."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.bias = nn.Embedding(12, 4), nn.Embedding(12, 1), nn.Parameter(torch.zeros(1))
        self.register_buffer("offsets", torch.tensor([0, 4, 8]))

    def forward(self, x):
        places = (x * 2654435761 % 2**32) % 4 + self.offsets
        v = self.table(places)
        return self.bias + self.linear(places).sum(1)[:, 0] + (v.sum(1).square() - v.square().sum(1)).sum(1) / 2


RECOMMENDERS = {
    "slices": (lambda: factors(lambda x: (x[:, 0], x[:, 1])), 2),
    "unbind": (lambda: factors(lambda x: x.unbind(1)), 2),
    "split": (lambda: factors(lambda x: [part.squeeze(1) for part in x.split(1, dim=1)]), 2),
    "transposed": (lambda: factors(lambda x: x.T), 2),
    "selected": (lambda: factors(lambda x: (x.select(1, 0), x[..., 1])), 2),
    "hashed": (lambda: factors(lambda x: (x[:, 0] * 31 % 9, (x[:, 0] * 7 + x[:, 1]) % 9)), 2),
    "through numpy": (lambda: factors(lambda x: torch.as_tensor(x.numpy().T.copy())), 2),
    "one table": (lambda: tied(factors(lambda x: (x[:, 0], x[:, 1])), "user", "item"), 2),
    "dlrm": (dlrm_model, 3),
    "factorisation machine": (Fields, 3),
    "rows of a raw table": (
        lambda: Through(
            lambda m, x: m.head(m.table.weight[x[:, 0]] * m.table.weight[x[:, 1]]), table=nn.Embedding(9, 4), head=nn.Linear(4, 1)
        ),
        2,
    ),
    "user, scored against all items": (
        lambda: Through(
            lambda m, x: functional.log_softmax(m.user(x[:, 0]) @ m.item.weight.T, 1).gather(1, x[:, 1:]),
            user=nn.Embedding(9, 4),
            item=nn.Embedding(9, 4),
        ),
        2,
    ),
}


@pytest.mark.parametrize("count", [5, 2, 1, 4])
@pytest.mark.parametrize("name", RECOMMENDERS)
def test_recommenders(name, count):
    build, fields = RECOMMENDERS[name]
    batch = ids_batch(count, fields)
    certify(shaken(build()), rating_loss, batch)
    certify_each_parameter(shaken(build()), rating_loss, batch)


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (6, 5), (1, 4), (3, 2)])
@pytest.mark.parametrize("score", SCORES)
def test_next_items(score, shape):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(1, 12, shape, generator=generator)
    x[0, :1] = 0

    def loss(model, batch):
        return model(batch["x"]).reshape(len(batch["x"]), -1).sum(1) + 0.0

    certify(shaken(Sasrec(SCORES[score])), loss, {"x": x})


# --- torch's own attention and parameters used directly ---------------------------------------------------------------------------------


class Learned(nn.Module):
    """Raw parameters as people write them: a class vector, positions, a temperature, a mask vector."""

    def __init__(self, tokens: int):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, 6))
        self.places = nn.Parameter(torch.zeros(1, tokens + 1, 6))
        self.missing, self.scale, self.head = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(())), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.where(x[..., :1] > 0, x, self.missing)
        h = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places[:, : x.shape[1] + 1]
        return self.head(torch.tanh(h).cumsum(1)) * self.scale.exp()


class Pooled(nn.Module):
    """Attention by a learned query, the same for all samples."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Parameter(torch.zeros(1, 6)), nn.Linear(6, 6)

    def forward(self, x):
        query = self.query.repeat(len(x), 1, 1)
        return functional.scaled_dot_product_attention(query, self.key(x), x) * self.key(query)


def torch_transformer(**options):
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **options)


class Crossing(nn.Module):
    """torch's attention between two inputs, of another width, samples second."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(x).transpose(0, 1)
        key = x[: 1 + len(x) // 2] if self.attention.kdim == 6 else torch.cat([x, x[..., :2]], 2)
        hidden, weights = self.attention(x, key, key)
        return torch.cat([self.head(hidden.transpose(0, 1)).flatten(1), weights.flatten(1)], 1)


class Biased(nn.Module):
    """A table of distances, added to scores in several ways."""

    def __init__(self, add):
        super().__init__()
        self.table, self.linear, self.add = nn.Embedding(19, 2), nn.Linear(6, 6), add

    def forward(self, x):
        length = torch.arange(x.shape[1])
        bias = self.table(length[:, None] - length[None] + 9).permute(2, 0, 1)
        y = self.linear(x)
        scores = torch.stack([y @ x.mT, x @ y.mT], 1)
        return (self.add(scores, bias).softmax(-1) @ x[:, None]).sum(1) + self.linear(x)


def with_mask(scores, bias):
    mask = (scores.detach() < -3).to(scores) * -9.0
    return scores + (bias + mask)


RAW = {
    "class vector, positions, temperature": lambda length: Learned(length),
    "learned query": lambda length: Pooled(),
    "vector times": lambda length: Through(lambda m, x: x * m.linear(torch.ones(6).to(x)), linear=nn.Linear(6, 6)),
    "samples and positions in one dimension": lambda length: Through(
        lambda m, x: m.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]), linear=nn.Linear(6, 3)
    ),
    "a penalty on a weight": lambda length: Through(lambda m, x: m.linear(x) * m.linear.weight.norm(), linear=nn.Linear(6, 3)),
    "a weight used twice": lambda length: Through(lambda m, x: m.linear(functional.linear(x, m.linear.weight)), linear=nn.Linear(6, 6)),
    "a table read as a whole": lambda length: Through(
        lambda m, x: m.linear(x + m.table.weight[: x.shape[1]]), table=nn.Embedding(9, 6), linear=nn.Linear(6, 3)
    ),
    "positions (T,)": lambda length: Through(
        lambda m, x: m.linear(torch.tanh(x + m.table(torch.arange(x.shape[1])))), table=nn.Embedding(9, 6), linear=nn.Linear(6, 3)
    ),
    "positions (T,) through layers": lambda length: Through(
        lambda m, x: m.linear(torch.tanh(x + m.norm(m.linear(m.table(torch.arange(x.shape[1])))))),
        table=nn.Embedding(9, 6),
        linear=nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
    ),
    "biases of distances": lambda length: Biased(lambda scores, bias: scores + bias),
    "biases of distances, one row": lambda length: Biased(lambda scores, bias: scores + bias[None]),
    "biases of distances, in place": lambda length: Biased(lambda scores, bias: (scores * 1).add_(bias)),
    "biases of distances, expanded": lambda length: Biased(lambda scores, bias: scores + bias.expand(len(scores), -1, -1, -1)),
    "biases of distances, repeated": lambda length: Biased(lambda scores, bias: scores + bias.repeat(len(scores), 1, 1, 1) / 2),
    "biases of distances, with a mask": lambda length: Biased(with_mask),
    "biases of distances, added before": lambda length: Biased(lambda scores, bias: bias + scores),
    "torch's transformer": lambda length: torch_transformer(),
    "torch's transformer, norm first": lambda length: torch_transformer(norm_first=True, bias=False),
    "torch's attention": lambda length: Crossing(),
    "torch's attention, another width": lambda length: Crossing(kdim=8, vdim=8, bias=False),
    "a norm's weights by function": lambda length: Through(
        lambda m, x: functional.layer_norm(m.linear(x), (6,), m.norm.weight, m.norm.bias), linear=nn.Linear(6, 6), norm=nn.LayerNorm(6)
    ),
}


@pytest.mark.parametrize("shape", [(4, 5), (5, 5), (4, 1), (1, 5), (1, 1), (2, 2), (5, 4)])
@pytest.mark.parametrize("name", RAW)
def test_parameters_used_directly(name, shape):
    batch = numbers(*shape, 6)
    certify(shaken(RAW[name](shape[1])), readout, batch)
    certify_each_parameter(shaken(RAW[name](shape[1])), readout, batch)


# --- recurrent layers, sample by sample -------------------------------------------------------------------------------------------------


def recurrent(kind, **options):
    """All of a recurrent layer's outputs and last states, with an embedding of numbers before it."""

    def forward(m, x):
        h = torch.tanh(m.linear(x))
        states, last = m.rnn(h if m.rnn.batch_first else h.transpose(0, 1))
        last = torch.cat([part.transpose(0, 1).flatten(1) for part in (last if isinstance(last, tuple) else (last,))], 1)
        states = states if m.rnn.batch_first else states.transpose(0, 1)
        return torch.cat([states.flatten(1), last], 1)

    return Through(forward, linear=nn.Linear(6, 5), rnn=kind(5, 3, **options))


RECURRENT = {
    "lstm": dict(kind=nn.LSTM, batch_first=True),
    "lstm, sequence first": dict(kind=nn.LSTM),
    "lstm, two ways, two layers": dict(kind=nn.LSTM, batch_first=True, num_layers=2, bidirectional=True),
    "lstm, projected": dict(kind=nn.LSTM, batch_first=True, proj_size=2),
    "gru": dict(kind=nn.GRU, batch_first=True),
    "gru, sequence first, two ways": dict(kind=nn.GRU, bidirectional=True, num_layers=2, bias=False),
    "rnn": dict(kind=nn.RNN, batch_first=True),
    "rnn, sequence first": dict(kind=nn.RNN),
}


@pytest.mark.parametrize("shape", [(4, 5), (3, 3), (1, 5), (4, 1)])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, shape):
    certify(shaken(recurrent(**RECURRENT[name])), readout, numbers(*shape, 6), by_sample="rnn", engines=("float64", "float32"))


def test_a_recurrent_layer_given_a_state():
    model = Through(lambda m, x: m.rnn(x, m.start(x.mean(1)).unflatten(1, (2, 3)).transpose(0, 1).contiguous())[0], start=nn.Linear(6, 6))
    model.rnn = nn.GRU(6, 3, num_layers=2, batch_first=True)
    for shape in ((4, 5), (2, 5)):
        certify(shaken(model), readout, numbers(*shape, 6), by_sample="rnn")
        certify_each_parameter(shaken(model), readout, numbers(*shape, 6), by_sample="rnn")


def test_packed_sequences_are_refused():
    def forward(m, x):
        lengths = torch.full((len(x),), x.shape[1])
        return m.rnn(nn.utils.rnn.pack_padded_sequence(m.linear(x), lengths, batch_first=True))[1][-1]

    model = Through(forward, linear=nn.Linear(6, 6), rnn=nn.GRU(6, 3, batch_first=True))
    with pytest.raises(ValueError, match=r"module 'rnn' \(GRU\) is given a packed sequence.*give it the padded one"):
        gradient_norms(model, readout, numbers(4, 5, 6), by_sample="rnn")
    with pytest.raises(ValueError, match=r"no rule for the parameters weight_ih_l0.*by_sample='rnn'"):
        gradient_norms(model, readout, numbers(4, 5, 6))
