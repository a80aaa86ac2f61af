"""The encoder of FLAN-T5 (and T5 v1.1), small to xxl, for the features that LlamaGen's text-conditional models read.

Shapes: B, T, C tokens; H heads of D channels. Parameter names are those of Hugging Face's files, whose folder
is read as it is downloaded. No dropout: the encoder is used frozen, or trained along at a small size.
Sources: Raffel et al. (arXiv 1910.10683), Shazeer (arXiv 2002.05202) for the gated FFN, Chung et al. (arXiv 2210.11416)
"""

import html
import json
import re
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from common import load_weights, make_config, read_file, whole_characters

PAD, EOS = 0, 1
STARTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)  # |key - query| from which buckets 1 to 15 begin
FIXED = dict(model_type="t5", feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
             relative_attention_max_distance=128)


@dataclass
class T5Config:
    """Sizes under the names that config.json gives them; FLAN-T5-XL: 2048, 5120, 24, 32."""

    d_model: int  # C
    d_ff: int
    num_layers: int
    num_heads: int  # H
    d_kv: int = 64  # D; H * D is not C in the small model
    vocab_size: int = 32128
    layer_norm_epsilon: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.d_model)), config.layer_norm_epsilon

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


def linear(c_in, c_out):
    return nn.Linear(c_in, c_out, bias=False)


class AttentionLayer(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.layer_norm, self.head_dim = RMSNorm(config), config.d_kv
        inner = config.num_heads * config.d_kv
        self.SelfAttention = nn.ModuleDict({name: linear(config.d_model, inner) for name in "qkv"})
        self.SelfAttention["o"] = linear(inner, config.d_model)
        if first:  # every block adds it
            self.SelfAttention["relative_attention_bias"] = nn.Embedding(2 * len(STARTS) + 2, config.num_heads)

    def forward(self, x, bias):
        y = self.layer_norm(x)
        q, k, v = (self.SelfAttention[n](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # B, H, T, D; T5 does not scale
        return x + self.SelfAttention["o"](y.transpose(1, 2).flatten(2))  # B, T, C


class FeedForwardLayer(nn.Module):
    """x + wo(gelu(wi_0 y) * wi_1 y) with y = norm(x) and the tanh form of gelu."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm = RMSNorm(config)
        self.DenseReluDense = nn.ModuleDict({name: linear(config.d_model, config.d_ff) for name in ("wi_0", "wi_1")})
        self.DenseReluDense["wo"] = linear(config.d_ff, config.d_model)

    def forward(self, x):
        y, ffn = self.layer_norm(x), self.DenseReluDense
        return x + ffn["wo"](F.gelu(ffn["wi_0"](y), approximate="tanh") * ffn["wi_1"](y))


class Block(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, first), FeedForwardLayer(config)])

    def forward(self, x, bias):
        return self.layer[1](self.layer[0](x, bias))


def relative_buckets(length, device=None):
    """int64 [T, T], row = query: the bucket of |key - query|, plus 16 where the key comes after the query."""
    position = torch.arange(length, device=device)
    distance = position[None] - position[:, None]
    buckets = torch.bucketize(distance.abs(), torch.tensor(STARTS, device=device), right=True)
    return buckets + (len(STARTS) + 1) * (distance > 0)


class T5Encoder(nn.Module):
    def __init__(self, config, tokenizer=None):
        """`tokenizer`, a SentencePieceProcessor whose ids 0 and 1 are padding and end, is needed by encode only."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers))
        self.encoder = nn.ModuleDict(dict(block=blocks, final_layer_norm=RMSNorm(config)))
        self.init_weights()

    def init_weights(self):
        c = self.config
        nn.init.normal_(self.shared.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):  # unit variance out of unit variance
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if name.endswith("SelfAttention.q"):  # and again over D: the product of q and k is not scaled
                    nn.init.normal_(module.weight, std=(c.d_model * c.d_kv) ** -0.5)
            elif name.endswith("relative_attention_bias"):
                nn.init.normal_(module.weight, std=c.d_model**-0.5)

    def forward(self, ids, mask):
        """Token ids int64 [B, T] and mask bool [B, T], True where there is text, on either side of the padding
        -> features [B, T, C] in the dtype of the weights; those of padding mean nothing. Differentiable.

        Raises ValueError for float16, in the weights or by autocast.
        """
        where, dtype = ids.device.type, self.shared.weight.dtype
        dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else dtype
        refuse_float16(dtype)
        table = self.encoder["block"][0].layer[0].SelfAttention["relative_attention_bias"]
        bias = table(relative_buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None].to(dtype)  # 1, H, T, T
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(dtype).min)  # B, H, T, T
        x = self.shared(ids)  # B, T, C
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)

    def tokenize(self, texts, length=120, left_pad=False):
        """Ids int64 [B, T] and mask bool [B, T] on the CPU; T: the longest of the texts, at most `length` with its end.

        The spellings </s>, <pad> and <extra_id_0> are text here, where transformers reads them as tokens.
        """
        texts = [whole_characters(text) for text in texts]
        rows = [ids[: length - 1] + [EOS] for ids in self.tokenizer.encode(texts)]
        width = max(map(len, rows), default=0)
        ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if left_pad else slice(len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), True
        return ids, mask

    @torch.no_grad()
    def encode(self, texts, length=120, left_pad=False):
        """Features [B, length, C] and mask bool [B, length] of a list of texts, zero where there is no text.

        Longer texts are cut; the last token is always the end. LlamaGen wants left_pad=True and `clean_caption` before.
        """
        ids, mask = (tensor.to(self.shared.weight.device) for tensor in self.tokenize(texts, length, left_pad))
        features = self(ids, mask) * mask.unsqueeze(-1)
        rest = length - ids.shape[1]  # positions that are padding in every text are not computed
        before, after = (rest, 0) if left_pad else (0, rest)
        return F.pad(features, (0, 0, before, after)), F.pad(mask, (before, after))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.bfloat16):
        """Read a folder of Hugging Face's (google/flan-t5-xl) in eval mode; the decoder in its files is not read.

        dtype: bfloat16, as LlamaGen computes its features, or float32. Raises FileNotFoundError naming the file that
        is not there, ValueError for float16, another architecture, unreadable files, and naming the tensors that are
        missing, unexpected or misshapen.
        """
        refuse_float16(dtype)
        folder = Path(folder)
        files = find_files(folder)
        fields_here = read_json(folder / "config.json")
        for name, value in FIXED.items():
            if fields_here.get(name, value if name.startswith("relative") else None) != value:
                raise ValueError(f"{folder}: not an encoder of FLAN-T5 or T5 v1.1: {name} has to be {value!r}, not "
                                 f"{fields_here.get(name)!r}")
        sizes = {f.name: fields_here[f.name] for f in fields(T5Config) if f.name in fields_here}
        config = make_config(T5Config, sizes, folder / "config.json")
        weights = {name: tensor.to(device, dtype) for path in files for name, tensor in read_tensors(path)}
        same = weights.pop("encoder.embed_tokens.weight", None)  # files hold either name of the embedding, or both
        if same is not None:
            weights.setdefault("shared.weight", same)
        with torch.device("meta"):
            model = cls(config, read_tokenizer(folder / "spiece.model", config))
        load_weights(model, weights, folder)
        return model.eval()


def refuse_float16(dtype):
    if dtype == torch.float16:
        raise ValueError("FLAN-T5 overflows in float16 (sums in wo reach 66,246 of 65,504): use bfloat16 or float32")


def in_encoder(name):
    return name.startswith(("encoder.", "shared."))


def find_files(folder):
    """The files with the encoder's weights: one, or those shards that the index says hold a part of it."""
    name = folder.name if re.match("flan-t5-|t5-v1_1-", folder.name) else "flan-t5-xl"
    want = (f"google/{name} as downloaded from Hugging Face has config.json, spiece.model and model.safetensors or "
            "pytorch_model.bin, or the index of either (*.index.json) with its shards")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {want}")
    for needed in ("config.json", "spiece.model"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder / needed}: no such file; {want}")
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = Path(f"{whole}.index.json")
        if whole.is_file():
            return [whole]
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            return [folder / shard for shard in sorted({shards[name] for name in shards if in_encoder(name)})]
    raise FileNotFoundError(f"{folder}: no weights; {want}")


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not the fields of a config or an index")
    return content


def read_tensors(path):
    """(name, tensor) of the encoder's part of a file, one after another, mapped rather than read."""
    if path.suffix == ".bin":
        yield from ((name, tensor) for name, tensor in read_file(path).items() if in_encoder(name))
        return
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path}: reading it needs the safetensors package (pip install safetensors)") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys() if in_encoder(name))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def open_sentencepiece(source, **model):
    """The processor of `model`; ValueError, naming `source`, if it is none, or padding and end are other tokens."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(**model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{source}: not a sentencepiece model ({str(error).strip()[:120]})") from None
    if (ends := (tokenizer.pad_id(), tokenizer.eos_id())) != (PAD, EOS):
        raise ValueError(f"{source}: padding and end have to be tokens {PAD} and {EOS}, not {ends}")
    return tokenizer


def read_tokenizer(path, config):
    tokenizer = open_sentencepiece(path, model_file=str(path))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{path}: not the tokenizer of a T5 with {config.vocab_size} tokens: it has {len(tokenizer)}")
    return tokenizer


PLAIN = str.maketrans("‘’“”«»´`‐‑‒–—―−®©™•·", "''\"\"\"\"''-------     ")
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"</?[a-z!][^<>]*>", " "),  # html
    (r"\b(?:https?://|www\.)\S+|(?<!\S)[\w.-]+\.(?:com|org|net|edu|gov|co|ru|it)\b\S*", " "),  # links
    (r"(?<!\S)\S+\.(?:png|jpe?g|gif|bmp|webp|eps|pdf|apk|mp4)\b", " "),  # file names
    (r"@\w+", " "),  # @names
    (r"[\u31c0-\u9fff]+", " "),  # CJK: the published vocabulary has none
    (r"\b(?=(?:[a-z]*\d){3})[a-z\d]{6,}\b", " "),  # ids: jc6640vc, 20240131
    (r"[#@|\\/*~_(){}\[\]]+", " "),
    (r"([^\w\s])\1+", r"\1"),  # !!!
    (r"\s+", " "),
)]


def clean_caption(text):
    """Captions as LlamaGen's models know them: lower case, no links, html, @names, CJK, file names, ids or ornaments.

    LlamaGen's clean-up needs ftfy and bs4. This one does not mend wrong encodings, and keeps advertising ("free
    shipping"), image sizes below six characters and %-escapes. Applying it again changes nothing in ordinary text.
    """
    text = unicodedata.normalize("NFKC", html.unescape(html.unescape(text)).translate(PLAIN)).lower()
    for pattern, new in CLEAN:
        text = pattern.sub(new, text)
    return text.strip(" -,:;'\"")
