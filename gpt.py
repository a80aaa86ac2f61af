"""The Llama that predicts image codes in raster order (LlamaGen, arXiv 2406.06525, section 2.2).

Shapes: B, T, C tokens; T = n_cond condition tokens, then image tokens; H query heads, G key and value heads of D
channels; V codes; L layers; S positions in a cache. `padding`, int64 [B]: how many condition tokens at the left are
padding, which no other token sees (None: none are). Parameter names are those of LlamaGen's published files, which
`GPT.from_pretrained` reads.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from common import check_kind, load_weights, make_config, read_weights

PRESETS = {
    "tiny": dict(n_layer=4, n_head=4, dim=128, ffn_dim=384),
    "B": dict(n_layer=12, n_head=12, dim=768),
    "L": dict(n_layer=24, n_head=16, dim=1024),
    "XL": dict(n_layer=36, n_head=20, dim=1280),
    "XXL": dict(n_layer=48, n_head=24, dim=1536),
    "3B": dict(n_layer=24, n_head=32, dim=3200),
    "1B": dict(n_layer=22, n_head=32, dim=2048),
    "XXXL": dict(n_layer=48, n_head=40, dim=2560),
    "7B": dict(n_layer=32, n_head=32, dim=4096),
}

PAD, END = 0, 1  # caption tokens, as in T5: padding, and the end, after which the image begins
CODE_FEATURES = 32  # rank of what code vectors add to the logits


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12  # H
    dim: int = 768  # C
    n_kv_head: int | None = None  # G; fewer than n_head is grouped-query attention
    ffn_dim: int | None = None  # 8/3 dim, rounded up to a multiple of 256
    vocab_size: int = 16384  # V
    cond: str = "class"  # "class": one label; "text": n_cond T5 features; "tokens": n_cond tokens of a caption
    num_classes: int = 1000
    n_cond: int = 1
    text_dim: int = 2048  # channels of a text feature (FLAN-T5-XL)
    text_vocab_size: int = 0  # caption tokens
    code_dim: int = 0  # channels of the tokenizer's code vectors if the GPT sees them, as in `CodeFeatures`
    grid: tuple = (16, 16)  # image tokens: rows, columns
    cond_rope: str = "identity"  # rotation of condition tokens: "identity", or "zero" as in the published weights
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1  # on token embeddings, attention output and FFN output
    cond_dropout: float = 0.1  # share of samples that train without their condition, for guidance
    caption_loss_weight: float = 0.0  # of the caption tokens' cross-entropy, so that the model reads, too

    def __post_init__(self):
        self.grid = tuple(self.grid) if hasattr(self.grid, "__iter__") else (self.grid,)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_dim = self.ffn_dim or -(-int(8 * self.dim / 3) // 256) * 256
        self.head_dim = self.dim // self.n_head  # D
        if self.dim % self.n_head or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} over {self.n_head} heads gives no head width that is a multiple of 4")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid has to be (rows, columns), not {self.grid}")
        if not (0 <= self.dropout <= 1 and 0 <= self.cond_dropout <= 1):
            raise ValueError(f"dropout {self.dropout} and cond_dropout {self.cond_dropout} have to be in [0, 1]")
        for name, known in (("cond", CONDITIONS), ("cond_rope", ("identity", "zero"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} has to be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.cond == "class" and self.n_cond != 1:
            raise ValueError(f"a class is one condition token, not {self.n_cond}")
        if (self.text_vocab_size > END) != (self.cond == "tokens"):
            raise ValueError(f'cond "tokens" goes with a text_vocab_size, {self.cond!r} has {self.text_vocab_size}')
        if self.caption_loss_weight < 0 or self.caption_loss_weight and self.cond != "tokens":
            given = f"{self.caption_loss_weight} with {self.cond!r}"
            raise ValueError(f'caption_loss_weight is 0 or more, and goes with cond "tokens": not {given}')


def rope_table(config, grid):
    """cos, sin float32 [n_cond + h*w, D/2] of 2D RoPE: the first D/4 angles turn with the row, the others with the
    column, each by base^(-4i/D), i = 0..D/4-1 (llama's rotation per axis; Su et al. 2021, eq. 15).

    Row and column are those of the code that is read. Condition tokens have angle 0, as the code at (0, 0) has, or for
    the published weights cos = sin = 0: their keys and queries are 0 then.
    """
    rows, columns = grid
    d = config.head_dim // 2
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, d, 2, device="cpu").float() / d)  # D/4
    along_rows = torch.outer(torch.arange(rows, device="cpu").float(), frequencies)
    along_columns = torch.outer(torch.arange(columns, device="cpu").float(), frequencies)
    angles = torch.cat(
        [along_rows[:, None].expand(-1, columns, -1), along_columns[None].expand(rows, -1, -1)], dim=-1
    ).flatten(0, 1)  # h*w, D/2
    cos, sin = angles.cos(), angles.sin()
    cond_cos = torch.full((config.n_cond, d), 1.0 if config.cond_rope == "identity" else 0.0, device="cpu")
    return torch.cat([cond_cos, cos]), torch.cat([torch.zeros_like(cond_cos), sin])


class Linear(nn.Linear):
    """Without bias. Inside `GPT.packed` it multiplies by a copy of its weight in the layout of CPU kernels."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.copy = None

    def forward(self, x):
        return super().forward(x) if self.copy is None else kernels.packed_linear(x, self.copy)

    def step(self, x, norm=None, lengths=None, residual=None, gated=False):
        """Of one token a row, x [B, inputs]: this product of its norm, its SwiGLU, added to a residual, all in one, as
        `kernels.skinny_linear` has it. It reads the weight: hooks, and layers wrapped around this, are not called."""
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return kernels.skinny_linear(x, self.weight, weight, eps, lengths, residual, gated, self.copy)


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.eps, self.dropout = config.norm_eps, config.dropout

    def forward(self, x, residual=None):
        """s = x, or residual + dropout(x) in the same pass -> (the norm of s, s)."""
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps), x
        return kernels.rms_norm(x, self.weight, self.eps, residual, self.dropout if self.training else 0.0)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.wqkv = Linear(config.dim, (config.n_head + 2 * config.n_kv_head) * config.head_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x, cos, sin, padding=None, cache=None):
        """Causal attention over x [B, T, C]; fills `cache`, keys and values [2, B, G, S, D], if given."""
        qkv = self.wqkv(x)
        if cache is not None:
            t, d = x.shape[1], self.head_dim
            k, v = qkv.unflatten(-1, (-1, d)).transpose(1, 2)[:, self.n_head :].chunk(2, dim=1)  # B, G, T, D
            cache[0, :, :, :t, :d], cache[1, :, :, :t, :d] = kernels.apply_rope(k, cos, sin), v
        return self.wo(kernels.rope_attention(qkv, cos, sin, self.n_head, self.n_kv_head, padding))  # B, T, C


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), with w1 and w3 as one product; files keep them apart, as published."""

    def __init__(self, config):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._fuse)

    def forward(self, x):
        return self.w2(kernels.swiglu(self.w13(x)))

    @staticmethod
    def _split(module, state, prefix, _metadata):
        if (both := state.pop(prefix + "w13.weight", None)) is not None:  # a parametrization (LoRA) has other names
            state[prefix + "w1.weight"], state[prefix + "w3.weight"] = both.chunk(2)

    @staticmethod
    def _fuse(module, state, prefix, *_):
        halves = [state.pop(prefix + name, None) for name in ("w1.weight", "w3.weight")]
        if None not in halves:  # a missing half is reported by the strict check
            state[prefix + "w13.weight"] = torch.cat(halves)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config), RMSNorm(config)

    def forward(self, x, residual, *where):
        """h = s + attention(norm(s)); s = h + ffn(norm(h)), with each residual add left to the next norm, which fuses
        it: x, here and in what is returned, is a branch's output still to be added, s = residual + dropout(x)."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.ffn_norm(self.attention(x, *where), residual)
        return self.feed_forward(x), residual

    def step(self, s, lengths, cos, sin, padding, cache, position):
        """The same of one token a row, s [B, C], at `position` int64 [1]: it reads the cache, and extends it. With s
        goes what its next norm has to know of it (`kernels.skinny_linear`)."""
        a, f = self.attention, self.feed_forward
        qkv = a.wqkv.step(s, self.attention_norm, lengths)
        y = kernels.decode_attention(qkv, cos, sin, *cache, position, a.n_head, a.n_kv_head, padding)
        s, lengths = a.wo.step(y, residual=s)
        return f.w2.step(f.w13.step(s, self.ffn_norm, lengths, gated=True), residual=s)


class ClassEmbedder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)  # the last row is "no class"

    def null(self, labels):
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)

    def forward(self, labels):
        return self.embedding_table(labels).unsqueeze(1)  # B, 1, C


class CaptionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.text_dim, config.dim)
        self.fc2 = Linear(config.dim, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TextEmbedder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.cap_proj = CaptionMLP(config)
        nothing = torch.randn(config.n_cond, config.text_dim) / config.text_dim**0.5
        self.register_buffer("uncond_embedding", nothing)  # "no text": fixed, not trained, as published

    def null(self, features):
        return self.uncond_embedding.to(features.dtype).expand_as(features)

    def forward(self, features):
        return self.cap_proj(features.to(self.cap_proj.fc1.weight.dtype))  # B, n_cond, C


class CaptionEmbedder(nn.Module):
    """Caption tokens, left-padded, in the stream itself (as in DALL-E, arXiv 2102.12092), with learned 1D positions."""

    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.text_vocab_size, config.dim)
        self.pos_embeddings = nn.Embedding(config.n_cond, config.dim)

    def null(self, ids):
        """No caption: the end alone."""
        return F.pad(torch.full_like(ids[:, :1], END), (ids.shape[1] - 1, 0), value=PAD)

    def forward(self, ids):
        padding = (ids == PAD).sum(1, keepdim=True)
        position = torch.arange(ids.shape[1], device=ids.device) - padding  # a token's place in its caption
        return self.tok_embeddings(ids) + self.pos_embeddings(position.clamp(min=0))  # B, n_cond, C


class CodeFeatures(nn.Module):
    """What the tokenizer's code vectors add to embeddings and logits, so that codes that look alike are alike.

    `vectors` [V, code_dim] are the codes as its decoder reads them, times sqrt(code_dim), fixed. Embedding of code i:
    + W v_i; logit of code i: + (A x) . (B v_i), of rank 32. W and B begin at zero.
    """

    def __init__(self, config):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(config.vocab_size, config.code_dim))
        self.embed = Linear(config.code_dim, config.dim)
        self.query = Linear(config.dim, CODE_FEATURES)
        self.key = Linear(config.code_dim, CODE_FEATURES)

    def embedding(self, codes):
        return self.embed(self.vectors[codes])


CONDITIONS = {"class": ClassEmbedder, "text": TextEmbedder, "tokens": CaptionEmbedder}


class GPT(nn.Module):
    """Condition tokens, then codes; each sees itself and what stands before it.

    The last condition token predicts the first code, every code the next; the last code of an image is never read.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = CONDITIONS[config.cond](config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config)
        self.output = Linear(config.dim, config.vocab_size)
        self.code_features = CodeFeatures(config) if config.code_dim else None
        self.activation_checkpointing = False  # compute blocks again in the backward pass instead of keeping all
        self.set_grid(config.grid)
        self.init_weights(self)

    def init_weights(self, part):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        zero = [self.output]  # the first loss is exactly ln V
        if f := self.code_features:  # and code vectors change nothing at first
            zero += [f.embed, f.key]
        for module in set(zero) & set(part.modules()):
            nn.init.zeros_(module.weight)

    def set_grid(self, grid):
        """Generate h x w codes from now on: the same weights, another rotation table."""
        self.config = replace(self.config, grid=grid)
        device = self.tok_embeddings.weight.device
        device = "cpu" if device.type == "meta" else device
        for name, table in zip(("cos", "sin"), rope_table(self.config, self.config.grid), strict=True):
            self.register_buffer(name, table.to(device), persistent=False)

    def set_condition(self, **changes):
        """Read another kind of condition from now on (fields of the config): the same blocks, a fresh embedding."""
        self.config = replace(self.config, **changes)
        self.cls_embedding = CONDITIONS[self.config.cond](self.config).to(self.output.weight.device)
        self.init_weights(self.cls_embedding)
        self.set_grid(self.config.grid)

    def see_codes(self, vectors):
        """Attach CodeFeatures of `vectors` [V, code_dim], the codes as the decoder reads them.

        Outputs are unchanged at first; what was learnt of other vectors is merged into the weights before.
        """
        vectors = vectors.detach() * vectors.shape[1] ** 0.5
        if self.code_features and torch.equal(self.code_features.vectors, vectors):
            return
        self.fold_code_features()
        self.config = replace(self.config, code_dim=vectors.shape[1])
        self.code_features = CodeFeatures(self.config).to(self.output.weight.device)
        self.init_weights(self.code_features)
        self.code_features.vectors.copy_(vectors)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.set_grid(self.config.grid)  # half() and bfloat16() leave the rotation in float32
        return self

    def embed_condition(self, cond, cond_mask):
        """Condition tokens [B, n_cond, C], how many of them are padding, int64 [B] (None: none are), and the condition
        itself, of which training has dropped some."""
        c = self.config
        shape = dict(text=(c.n_cond, c.text_dim), tokens=(c.n_cond,)).get(c.cond, ())
        if cond.shape[1:] != shape:
            what = "text features" if c.cond == "text" else "conditions"
            raise ValueError(f"{what} have to be {['B', *shape]}, not {list(cond.shape)}".replace("'", ""))
        if self.training and c.cond_dropout:
            drop = torch.rand(len(cond), device=cond.device) < c.cond_dropout
            cond = torch.where(drop.view(-1, *[1] * (cond.dim() - 1)), self.cls_embedding.null(cond), cond)
        if c.cond == "tokens":
            if cond_mask is not None:
                raise ValueError("caption tokens need no cond_mask: their padding is token 0")
            cond_mask = cond != PAD
        if cond_mask is None:
            return self.cls_embedding(cond), None, cond
        if cond_mask.shape != cond.shape[:2]:
            raise ValueError(f"cond_mask has to be {list(cond.shape[:2])}, not {list(cond_mask.shape)}")
        cond_mask = cond_mask.bool()
        torch._assert_async((cond_mask[:, 1:] >= cond_mask[:, :-1]).all(), "padding has to stand left of the text")
        return self.cls_embedding(cond), (~cond_mask).sum(1), cond

    def embed_codes(self, codes):
        x = self.tok_embeddings(codes)
        return x + self.code_features.embedding(codes) if self.code_features else x  # ..., C

    def output_product(self, x):
        """Hidden states [..., C] -> (y, w) with logits y @ w.T [..., V]: what code vectors add is part of both."""
        if not (f := self.code_features):
            return x, self.output.weight
        return torch.cat([x, f.query(x)], -1), torch.cat([self.output.weight, f.key(f.vectors)], 1)

    def logits(self, x):
        """Hidden states [..., C] -> logits [..., V]."""
        return F.linear(*self.output_product(x)) if self.code_features else self.output(x)

    def caption_loss(self, x, ids):
        """Mean cross-entropy in nats of caption tokens ids [B, n_cond] after their first, from the hidden states
        x [B, n_cond, C] and the embeddings' own table."""
        logits = (x[:, :-1] @ self.cls_embedding.tok_embeddings.weight.T.to(x.dtype)).float()
        targets = ids[:, 1:].where(ids[:, :-1] != PAD, -100)  # -100: not counted
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return losses / (targets >= 0).sum().clamp(min=1)

    def transform(self, x, padding=None, cache=None):
        """The blocks over x [B, T, C] from the first position on."""
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        x, residual = self.dropout(x), None
        for i, block in enumerate(self.layers):
            past = None if cache is None else cache[:, i, : len(x)]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, cos, sin, padding, use_reentrant=False)
            else:
                x, residual = block(x, residual, cos, sin, padding, past)
        return self.norm(x, residual)[0]

    def forward(self, tokens, cond, cond_mask=None, targets=None):
        """Teacher-forced logits; the same in training and evaluation but for dropout.

        tokens int64 [B, t], the first t codes of each image, 0 <= t < h*w; cond int64 [B] labels (num_classes: none),
        features [B, n_cond, text_dim] with cond_mask bool [B, n_cond], True where there is text, or caption tokens
        int64 [B, n_cond]; padding stands left of the text; targets int64 [B, t+1]. Returns (logits float32 [B, t+1, V],
        None), logits[:, i] for code i; with targets (None, loss), since logits would fill the memory: the mean
        cross-entropy in nats per code, plus in training caption_loss_weight times that of the caption's tokens. Raises
        ValueError where shapes do not fit.
        """
        if tokens.dim() != 2 or tokens.shape[1] >= self.config.grid[0] * self.config.grid[1]:
            raise ValueError(f"tokens {list(tokens.shape)} do not fit the grid {self.config.grid}: [B, t < h*w]")
        if len(tokens) != len(cond):
            raise ValueError(f"tokens of {len(tokens)} images do not fit conditions of {len(cond)}")
        prefix, padding, cond = self.embed_condition(cond, cond_mask)
        x = torch.cat([prefix, self.embed_codes(tokens).to(prefix.dtype)], dim=1)  # B, n_cond + t, C
        x = self.transform(x, padding)
        y = x[:, self.config.n_cond - 1 :]  # B, t + 1, C
        if targets is None:
            return self.logits(y).float(), None  # B, t + 1, V
        y, weight = self.output_product(y.flatten(0, 1))
        loss = kernels.linear_cross_entropy(y, weight, targets.flatten())
        if self.training and self.config.caption_loss_weight:
            loss = loss + self.config.caption_loss_weight * self.caption_loss(x[:, : self.config.n_cond], cond)
        return None, loss

    def prefill(self, cond, cond_mask, cache, codes=None):
        """Condition and the first codes [B, t], if given -> logits [B, V] of the next, and the padding for `step`."""
        x, padding, _ = self.embed_condition(cond, cond_mask)
        if codes is not None:
            x = torch.cat([x, self.embed_codes(codes).to(x.dtype)], dim=1)  # B, n_cond + t, C
        x = self.transform(x, padding, cache)
        return self.logits(x[:, -1]), padding

    def step(self, codes, position, padding, cache):
        """Codes int64 [B] at `position` of the sequence, int64 [1] on their device -> logits [B, V] of the next."""
        s, lengths = self.embed_codes(codes), None
        for i, block in enumerate(self.layers):
            s, lengths = block.step(s, lengths, self.cos, self.sin, padding, cache[:, i, : len(s)], position)
        return self.logits(self.norm(s)[0]) if self.code_features else self.output.step(s, self.norm, lengths)

    def flops_per_image(self):
        """FLOPs of one image in training, 2 per multiply-add, without recomputation: matmuls of blocks and output and
        causal attention forward, twice as much backward (PaLM, arXiv 2204.02311, appendix B)."""
        c, codes = self.config, self.config.grid[0] * self.config.grid[1]
        t = c.n_cond + codes - 1  # tokens in the blocks
        blocks = t * sum(p.numel() for p in self.layers.parameters() if p.dim() == 2)
        attention = c.n_layer * 2 * c.dim * t * (t + 1) // 2  # queries by keys, and by values, half of the pairs
        return 3 * 2 * (blocks + attention + codes * c.vocab_size * c.dim)

    def new_cache(self, batch):
        """Keys and values of all layers [2, L, B, G, S, D], D padded to a multiple of 8; on a CPU float32, which its
        attention over few queries reads twice as fast as bfloat16."""
        c, weight = self.config, self.output.weight
        length = c.n_cond + c.grid[0] * c.grid[1] - 1  # the last code drawn is never read
        shape = (2, c.n_layer, batch, c.n_kv_head, length, -(-c.head_dim // 8) * 8)
        return weight.new_zeros(shape, dtype=torch.float32 if weight.device.type == "cpu" else weight.dtype)

    @contextmanager
    def packed(self, rows):
        """On a CPU, inside this context, linear layers use copies of their weights packed for about `rows` rows."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        try:
            for linear in linears:
                linear.copy = kernels.pack(linear.weight, rows)
            yield
        finally:
            for linear in linears:
                linear.copy = None

    @torch.no_grad()
    def fold_code_features(self):
        """Merge CodeFeatures into the embedding and the output weights: the same logits from the published
        architecture, nothing more to compute in sampling. Further training would not know which codes are alike."""
        if f := self.code_features:
            self.tok_embeddings.weight += f.embed(f.vectors)
            self.output.weight += f.key(f.vectors) @ f.query.weight
            self.config, self.code_features = replace(self.config, code_dim=0), None
        return self

    @classmethod
    def from_pretrained(cls, path, grid=None, **changes):
        """Read LlamaGen's files or ours, in eval mode; sizes are found in the file, head counts follow from the width.

        `grid` (rows, columns) is needed for published files, which do not tell it; for ours it replaces the
        recorded one.
        `changes` replaces fields of the config that no shape depends on (dropout, cond_dropout), for fine-tuning.
        Raises FileNotFoundError, or ValueError naming tensors that are missing, unexpected or misshapen.
        """
        weights, config = read_weights(path)
        check_kind(weights, path, "a GPT")
        if config is None and grid is None:
            raise ValueError(f"{path} does not tell its grid: give one, (16, 16) for 256 pixels, (24, 24) for 384 "
                             "(--grid 16x16)")
        config = make_config(GPTConfig, config, path) if config else infer_config(weights, path)
        config = replace(config, grid=tuple(grid or config.grid), **changes)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, weights, path)
        return model.float().eval()

    def checkpoint(self):
        """What from_pretrained reads: {"model": weights under the published names, "config": sizes}."""
        return {"model": self.state_dict(), "config": asdict(self.config)}


def infer_config(weights, path):
    """The sizes of a published GPT from the shapes of its tensors."""
    vocab_size, dim = weights["tok_embeddings.weight"].shape
    heads = {sizes["dim"]: sizes["n_head"] for sizes in reversed(PRESETS.values())}  # of two of a width the first
    try:
        n_head = heads[dim]
        qkv, ffn = weights["layers.0.attention.wqkv.weight"], weights["layers.0.feed_forward.w1.weight"]
        if "cls_embedding.uncond_embedding" in weights:
            n_cond, text_dim = weights["cls_embedding.uncond_embedding"].shape
            cond = dict(cond="text", n_cond=n_cond, text_dim=text_dim)
        else:
            cond = dict(num_classes=weights["cls_embedding.embedding_table.weight"].shape[0] - 1)
    except KeyError as error:
        what = f"no preset is {dim} wide" if error.args[0] == dim else f"it holds no {error.args[0]}"
        raise ValueError(f"{path}: not a published GPT ({what})") from None
    n_kv_head = (qkv.shape[0] // (dim // n_head) - n_head) // 2
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    return GPTConfig(
        n_layer=n_layer, n_head=n_head, dim=dim, n_kv_head=n_kv_head, ffn_dim=ffn.shape[0], vocab_size=vocab_size,
        cond_rope="zero", **cond,
    )


if __name__ == "__main__":
    columns = "layers", "dim", "heads", "parameters", "TFLOP to train", "to sample", "GiB to train", "to sample"
    print("preset" + "".join(f"{name:>{8 if i < 3 else 16}}" for i, name in enumerate(columns)))
    for preset, sizes in PRESETS.items():
        flops, gib = [], []
        for side in (16, 24):
            with torch.device("meta"):
                model = GPT(GPTConfig(**sizes, grid=(side, side)))
            c, n, cache = model.config, sum(p.numel() for p in model.parameters()), model.new_cache(16)
            flops.append(model.flops_per_image() / 1e12)
            gib.append(2 * (n + cache.numel()) / 2**30)
        row = f"{n / 1e6:.1f}M", *("{:.2f} / {:.2f}".format(*(part * x for x in flops)) for part in (1, 2 / 3))
        row += f"{16 * n / 2**30:.1f}", "{:.1f} / {:.1f}".format(*gib)
        print(f"{preset:6}{c.n_layer:8}{c.dim:8}{c.n_head:8}" + "".join(f"{cell:>16}" for cell in row))
    print("""
Pairs: 256 / 384 pixels, which are 256 / 576 codes of VQ-16. TFLOP per image, 2 per multiply-add: training is a forward
and a backward pass, sampling a forward pass of two rows, with and without condition. GiB to train: weights, gradients
and AdamW's two moments in float32, without activations; to sample: weights and KV cache of 16 rows (8 images with
guidance) in bfloat16, without the tokenizer. A tokenizer of fewer than 16,384 codes makes a smaller GPT.""")
