"""The T5 encoder against transformers', on random weights, and a tokenizer that is trained here."""

import copy
import json
import os
import sys

import pytest
import sentencepiece
import torch

import t5
from common import save_file
from t5 import T5Config, T5Encoder, clean_caption, relative_buckets

TINY = dict(d_model=48, d_ff=80, num_layers=3, num_heads=4, d_kv=16, vocab_size=160)
WORDS = ["a red heart left of a blue cat", "two dogs play in the snow", "the number seven, in green", "quick brown fox",
         "émile's café: 12 pictures!", "the cat and the heart"]
DIFFICULT = ["", " ", "a cat", "A Cat  with   spaces", "cat\tdog\nheart", "x" * 700, "red heart " * 60, "émile e\u0301",
             "🐱 cat 🐱", "猫 and 犬", "12,000.5%", "fox\u200bfox", "¿qué?"]


@pytest.fixture(scope="session")
def transformers():
    """The package, imported as if there was no torchvision: PyPI's does not load beside a CPU's torch."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}
    sys.modules["torchvision"] = None
    try:
        package = pytest.importorskip("transformers", reason="the reference encoder needs the package transformers")
        package.T5EncoderModel, package.T5Tokenizer  # noqa: B018 - imported when they are named
    finally:
        del sys.modules["torchvision"]
        sys.modules.update(before)
    return package


def reference_config(transformers, **changes):
    sizes = dict(TINY, feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False)
    return transformers.T5Config(**sizes | changes)


def reference_encoder(transformers, **changes):
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(reference_config(transformers, **changes)).eval()
    for p in model.parameters():  # its own start leaves biases and norms too small or too even to show a mistake
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3 if p.dim() == 1 else 0.5 * p.shape[-1] ** -0.25)
    return model


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A sentencepiece model whose first ids are T5's: padding, end, unknown."""
    path = tmp_path_factory.mktemp("spiece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20), model_prefix=str(path), vocab_size=60, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )
    return path.with_suffix(".model")


def write_folder(folder, model, spiece, **how):
    """As it is downloaded."""
    model.save_pretrained(folder, **how)
    (folder / "spiece.model").write_bytes(spiece.read_bytes())
    return folder


@pytest.fixture(scope="session")
def published(transformers, spiece, tmp_path_factory):
    model = reference_encoder(transformers)
    return model, write_folder(tmp_path_factory.mktemp("t5") / "flan-t5-small", model, spiece)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


# The encoder

def test_buckets():
    """Of |key - query| by the published formula: half of them exact, the others logarithmic up to 128."""
    buckets = relative_buckets(300)
    for query, key in ((0, 0), (5, 5), (0, 3), (3, 0), (0, 7), (0, 8), (20, 0), (0, 40), (299, 200), (0, 299)):
        distance = abs(key - query)
        far = min(15, 8 + int(torch.log(torch.tensor(max(distance, 1) / 8)) / torch.log(torch.tensor(16.0)) * 8 + 1e-6))
        assert buckets[query, key] == (distance if distance < 8 else far) + 16 * (key > query)
    assert buckets.max() == 31 and buckets.min() == 0


def test_buckets_against_transformers(transformers):
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(400)
    theirs = T5Attention._relative_position_bucket(position[None] - position[:, None], True, 32, 128)
    assert torch.equal(relative_buckets(400), theirs)


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("length", [1, 7, 140])
def test_features_equal_transformers(published, side, length):
    model, folder = published
    ours = T5Encoder.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 160, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, length, dtype=torch.bool)
    if side != "none":
        for i, words in enumerate((length, max(length // 2, 1), 1)):
            mask[i, slice(words, None) if side == "right" else slice(0, length - words)] = False
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert difference(ours(ids, mask)[mask], expected[mask]) < 1e-5
        low = T5Encoder.from_pretrained(folder)(ids, mask)
        their_low = copy.deepcopy(model).bfloat16()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    errors = [(x.float() - expected)[mask].square().mean().sqrt() for x in (low, their_low)]
    assert low.dtype == torch.bfloat16 and errors[0] <= 1.3 * errors[1]  # it rounds as much as theirs


@pytest.mark.parametrize("sizes", [
    dict(d_model=512, d_ff=1024, num_layers=8, num_heads=6, d_kv=64, vocab_size=32128),  # small: heads of 384 in all
    dict(d_model=2048, d_ff=5120, num_layers=2, num_heads=32, d_kv=64, vocab_size=256),  # two layers of xl
], ids=["small", "xl"])
def test_published_sizes(transformers, sizes):
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(reference_config(transformers, **sizes)).eval()
    with torch.device("meta"):
        ours = T5Encoder(T5Config(**sizes))
    weights = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    t5.load_weights(ours, weights, "random")
    ids, mask = torch.randint(3, 256, (2, 120)), torch.arange(120) < torch.tensor([[120], [31]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert difference(ours(ids, mask)[mask], expected[mask]) < 1e-5


def test_training_moves_every_weight(spiece):
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(**TINY))
    ids, mask = torch.randint(3, 160, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    encoder(ids, mask).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert 0.5 < encoder(ids, mask).std() < 2


# Text

@pytest.mark.parametrize("length", [120, 9])
def test_token_ids_equal_transformers(transformers, spiece, published, length):
    encoder = T5Encoder.from_pretrained(published[1])
    theirs = transformers.T5Tokenizer.from_pretrained(published[1], extra_ids=0, legacy=True)
    ids, mask = encoder.tokenize(DIFFICULT, length)
    expected = theirs(DIFFICULT, max_length=length, truncation=True, padding="longest", return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask.long(), expected["attention_mask"])


def test_token_ids(published):
    encoder = T5Encoder.from_pretrained(published[1])
    pieces = encoder.tokenizer.encode("red heart")
    ids, mask = encoder.tokenize(["red heart", ""], 20)
    assert ids.tolist() == [[*pieces, 1], [1] + [0] * len(pieces)]
    assert mask.tolist() == [[True] * (len(pieces) + 1), [True] + [False] * len(pieces)]
    left, left_mask = encoder.tokenize(["red heart", ""], 20, left_pad=True)
    assert left.tolist() == [[*pieces, 1], [0] * len(pieces) + [1]] and torch.equal(left_mask, mask.flip(1))
    cut, _ = encoder.tokenize(["red heart"], 3)
    assert cut.tolist() == [[*pieces[:2], 1]]
    assert encoder.tokenize([])[0].shape == (0, 0)
    assert torch.equal(encoder.tokenize(["cat \ud83d"])[0], encoder.tokenize(["cat "])[0])  # half an emoji


@pytest.mark.parametrize("left_pad", [False, True])
def test_encode(published, left_pad):
    """Padded to the length, zeros in the padding; a text's features do not depend on its neighbours or on length."""
    encoder = T5Encoder.from_pretrained(published[1], dtype=torch.float32)
    texts = ["a red heart", "two dogs play in the snow in the snow in the snow", ""]
    features, mask = encoder.encode(texts, 40, left_pad)
    ids, tight = encoder.tokenize(texts, 40)
    assert features.shape == (3, 40, 48) and mask.shape == (3, 40) and not features.requires_grad
    assert features[~mask].eq(0).all() and torch.equal(mask.sum(1), tight.sum(1))
    assert (mask[:, 1:] >= mask[:, :-1]).all() if left_pad else (mask[:, 1:] <= mask[:, :-1]).all()
    for i, text in enumerate(texts):
        alone, alone_mask = encoder.encode([text], 60, left_pad)
        torch.testing.assert_close(alone[alone_mask], features[i][mask[i]], atol=1e-5, rtol=1e-5)
        direct = encoder(ids[i : i + 1, : tight[i].sum()], tight[i : i + 1, : tight[i].sum()])[0]
        torch.testing.assert_close(features[i][mask[i]], direct, atol=1e-5, rtol=1e-5)


def test_clean_caption():
    for text, clean in {
        "A Red  Heart": "a red heart", "see https://a.com/b?c=1 now": "see now", "<b>bold</b> cat": "bold cat",
        "by @someone, a cat": "by , a cat", "猫 cat": "cat", "wow!!!": "wow!", "img_0001.jpg cat": "cat",
        "cat jc6640vc": "cat", "cat &amp;amp; dog": "cat & dog", "“cat” – dog": "cat\" - dog", "": "",
    }.items():
        assert clean_caption(text) == clean and clean_caption(clean) == clean, text


# Files

def same_features(folder, model):
    ids, mask = torch.arange(3, 12)[None], torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        return difference(T5Encoder.from_pretrained(folder, dtype=torch.float32)(ids, mask), expected) < 1e-5


def test_shards(published, spiece, tmp_path):
    model, _ = published
    write_folder(tmp_path, model, spiece, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    assert same_features(tmp_path, model)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+.safetensors: no such file"):
        T5Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_of_the_whole_model(transformers, published, spiece, tmp_path, shards):
    """With a decoder, which is not read, and with the embedding under either name, or both."""
    model, folder = published
    for name in ("config.json", "spiece.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3), "lm_head.weight": torch.zeros(2)}
    for dropped in ("shared.weight", "encoder.embed_tokens.weight", "none"):
        part = {k: v for k, v in weights.items() if k != dropped}
        if shards == 1:
            save_file(tmp_path / "pytorch_model.bin", part)
        else:
            where = {k: f"pytorch_model-{1 + i % 2:05}-of-00003.bin" for i, k in enumerate(sorted(part))}
            where["lm_head.weight"] = "pytorch_model-00003-of-00003.bin"  # not there, and not needed
            for name in set(where.values()) - {where["lm_head.weight"]}:
                save_file(tmp_path / name, {k: part[k] for k in part if where[k] == name})
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        assert same_features(tmp_path, model)


def test_folders_that_are_refused(published, spiece, tmp_path):
    model, good = published
    with pytest.raises(FileNotFoundError, match=r"flan-t5-base: no such folder; google/flan-t5-base as downloaded .* "
                       r"has config.json, spiece.model and model.safetensors"):
        T5Encoder.from_pretrained(tmp_path / "flan-t5-base")

    def changed(name, content):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in good.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    config = json.loads((good / "config.json").read_text())
    for name, content, message in (
        ("config.json", None, "config.json: no such file; google/flan-t5-xl"), ("spiece.model", None, "model: no"),
        ("model.safetensors", None, "no weights; google/flan-t5-xl"), ("config.json", b"{", "not readable JSON"),
        ("config.json", b"[]", "holds a list"), ("spiece.model", b"no", "not a sentencepiece model"),
        ("model.safetensors", b"no", "not a readable safetensors file"),
        ("config.json", dict(config, feed_forward_proj="relu"), "feed_forward_proj has to be 'gated-gelu', not 'relu'"),
        ("config.json", dict(config, model_type="mt5"), "model_type has to be 't5', not 'mt5'"),
        ("config.json", dict(config, relative_attention_num_buckets=16), "relative_attention_num_buckets"),
        ("config.json", dict(config, num_layers=4), "missing encoder.block.3.layer.0"),
        ("config.json", dict(config, num_layers=2), "unexpected encoder.block.2.layer.0"),
        ("config.json", dict(config, d_ff=81), r"wi_0.weight is \[80, 48\], expected \[81, 48\]"),
        ("config.json", dict(config, vocab_size=20), "not the tokenizer of a T5 with 20 tokens"),
        ("config.json", {k: v for k, v in config.items() if k != "d_ff"}, "config.json: its config is not one"),
    ):
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            T5Encoder.from_pretrained(changed(name, content))


def test_float16_is_refused(published):
    _, folder = published
    with pytest.raises(ValueError, match="overflows in float16"):
        T5Encoder.from_pretrained(folder, dtype=torch.float16)
    encoder = T5Encoder.from_pretrained(folder, dtype=torch.float32)
    ids, mask = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="overflows in float16"), torch.autocast("cpu", torch.float16):
        encoder(ids, mask)
    with pytest.raises(ValueError, match="overflows in float16"):
        encoder.half()(ids, mask)
