import argparse
import math
from dataclasses import asdict

import pytest
import torch

import kernels
from common import save_file
from gpt import GPT, PRESETS, GPTConfig, infer_config, rope_table
from sample import generate
from vq import VQConfig, VQModel

SMALL = dict(n_layer=2, n_head=4, dim=32, ffn_dim=48, vocab_size=20, num_classes=5, grid=(3, 4), dropout=0.0,
             cond_dropout=0.0)
TEXT = dict(cond="text", n_cond=5, text_dim=12)
CASES = {
    "class": {}, "zero": dict(cond_rope="zero"), "gqa": dict(n_kv_head=2, grid=(2, 5)),
    "one kv head": dict(n_kv_head=1), "column": dict(grid=(5, 1)),
    "head dim 100": dict(n_head=2, dim=200, n_layer=1, grid=(2, 3)),
    "text": TEXT, "text zero": dict(TEXT, cond_rope="zero", n_kv_head=2),
    "padding": dict(TEXT, padding=(0, 2, 5), n_kv_head=2),
    "padding zero": dict(TEXT, padding=(1, 4, 3), cond_rope="zero"),
}


def randomize(model):
    """Weights at which every part of the model counts: `output` begins at zero, and the rest small."""
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2 if p.dim() == 1 else p.shape[1] ** -0.5)
    return model


def small(**changes):
    torch.manual_seed(0)
    return randomize(GPT(GPTConfig(**SMALL | changes))).eval()


def case(name, **changes):
    """Model, tokens [3, h*w], condition, mask of a CASE."""
    settings = CASES[name] | changes
    padding = settings.pop("padding", None)
    model = small(**settings)
    c = model.config
    tokens = torch.randint(20, (3, c.grid[0] * c.grid[1]))
    cond, mask = torch.tensor([0, 4, 5]), None
    if c.cond == "text":
        cond = torch.randn(3, c.n_cond, c.text_dim)
    if padding:
        mask = torch.arange(c.n_cond)[None] >= torch.tensor(padding)[:, None]
        cond = cond * mask.unsqueeze(-1)
    return model, tokens, cond, mask


# Sizes

@pytest.mark.parametrize("preset, millions", [
    ("B", 110.9), ("L", 342.9), ("XL", 774.7), ("XXL", 1411), ("3B", 3097)], ids=str)
def test_presets_have_the_published_sizes(preset, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[preset]))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1 if millions < 1000 else None) == millions
    ffn, head = {"B": (2048, 64), "L": (2816, 64), "XL": (3584, 64), "XXL": (4096, 64), "3B": (8704, 100)}[preset]
    assert (model.config.ffn_dim, model.config.head_dim) == (ffn, head)


@pytest.mark.parametrize("preset, sizes", [("1B", (22, 2048, 32)), ("XXXL", (48, 2560, 40)), ("7B", (32, 4096, 32))])
def test_other_presets(preset, sizes):
    config = GPTConfig(**PRESETS[preset])
    assert (config.n_layer, config.dim, config.n_head) == sizes


@pytest.mark.parametrize("change, message", [
    (dict(n_head=3), "32 over 3 heads"), (dict(dim=24), "multiple of 4"), (dict(n_kv_head=3), "no multiple of n_kv"),
    (dict(grid=(4,)), "rows, columns"), (dict(grid=(0, 4)), "rows, columns"), (dict(cond="image"), "cond has to be"),
    (dict(cond_rope="none"), "cond_rope has to be"), (dict(n_cond=2), "one condition token")], ids=str)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | change)


# The published arithmetic, from the published tensors, in float64

def direct_logits(model, tokens, cond, mask):
    """Section 2 of LlamaGen, one query and one head at a time; a plain pre-norm residual block."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    silu = lambda x: x / (1 + torch.exp(-x))  # noqa: E731

    def rms(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turn(x, position):
        return direct_rope(x, position - c.n_cond, c)

    def attention(name, x, padding):
        heads = (x @ w[name + "wqkv.weight"].T).unflatten(-1, (-1, c.head_dim))  # T, H + 2G, D
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        q, k = (torch.stack([torch.stack([turn(u, i) for u in row]) for i, row in enumerate(rows)]) for rows in (q, k))
        out = torch.zeros_like(q)
        for i in range(len(x)):
            keys = [j for j in range(i + 1) if j >= padding or j == i]
            for h in range(c.n_head):
                g = h * c.n_kv_head // c.n_head
                scores = torch.stack([q[i, h] @ k[j, g] for j in keys]) / c.head_dim**0.5
                out[i, h] = scores.softmax(0) @ v[keys, g]
        return out.flatten(1) @ w[name + "wo.weight"].T

    logits = []
    for b in range(len(tokens)):
        if c.cond == "class":
            prefix = w["cls_embedding.embedding_table.weight"][cond[b]][None]
        else:
            u = cond[b].double() @ w["cls_embedding.cap_proj.fc1.weight"].T
            u = 0.5 * u * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u**3)))
            prefix = u @ w["cls_embedding.cap_proj.fc2.weight"].T
        x = torch.cat([prefix, w["tok_embeddings.weight"][tokens[b]]])
        padding = 0 if mask is None else int((~mask[b]).sum())
        for layer in range(c.n_layer):
            name = f"layers.{layer}."
            x = x + attention(name + "attention.", rms(name + "attention_norm.weight", x), padding)
            y, ffn = rms(name + "ffn_norm.weight", x), name + "feed_forward."
            gate = silu(y @ w[ffn + "w1.weight"].T) * (y @ w[ffn + "w3.weight"].T)
            x = x + gate @ w[ffn + "w2.weight"].T
        logits.append(rms("norm.weight", x[c.n_cond - 1 :]) @ w["output.weight"].T)
    return torch.stack(logits)


def direct_rope(x, index, config):
    """The head x [D] of image token `index` (negative: condition) as complex numbers, turned."""
    if index < 0:
        return x if config.cond_rope == "identity" else torch.zeros_like(x)
    row, column = divmod(index, config.grid[1])
    h = config.head_dim // 2
    pairs = [torch.complex(x[2 * k], x[2 * k + 1]) for k in range(h)]
    for k in range(h):
        position, i = (row, k) if k < h // 2 else (column, k - h // 2)
        angle = torch.tensor(position * 10000 ** (-2 * i / h), dtype=torch.double)
        pairs[k] = pairs[k] * torch.polar(torch.ones((), dtype=torch.double), angle)
    return torch.stack([part for z in pairs for part in (z.real, z.imag)])


@pytest.mark.parametrize("name", CASES)
def test_logits_against_a_direct_computation(name):
    model, tokens, cond, mask = case(name)
    logits = model(tokens[:, :-1], cond, mask)[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), direct_logits(model, tokens[:, :-1], cond, mask), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("cond_rope", ["identity", "zero"])
@pytest.mark.parametrize("head_dim", [8, 100])
def test_rope_against_complex_numbers(head_dim, cond_rope):
    config = GPTConfig(**SMALL | dict(TEXT, n_head=1, dim=head_dim, grid=(7, 30), cond_rope=cond_rope))
    cos, sin = rope_table(config, config.grid)
    assert cos.shape == sin.shape == (5 + 210, head_dim // 2)
    x = torch.randn(1, 1, 215, head_dim)
    turned = kernels.apply_rope(x, cos, sin)[0, 0].double()
    for position in (0, 4, 5, 6, 34, 35, 99, 214):
        direct = direct_rope(x[0, 0, position].double(), position - 5, config)
        torch.testing.assert_close(turned[position], direct, atol=1e-5, rtol=1e-5)
    assert kernels.apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_a_preset_more_of_a_width_changes_no_published_file(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "half", dict(n_layer=1, n_head=6, dim=768))
    sizes = dict(n_layer=1, n_head=12, dim=768, ffn_dim=32, vocab_size=32, num_classes=3)
    save_file(tmp_path / "gpt.pt", GPT(GPTConfig(**sizes)).state_dict())
    assert GPT.from_pretrained(tmp_path / "gpt.pt", grid=(2, 2)).config.n_head == 12


def test_shares_that_cannot_be():
    for change in (dict(dropout=1.5), dict(cond_dropout=-0.1), dict(dropout=math.nan)):
        with pytest.raises(ValueError, match=r"have to be in \[0, 1\]"):
            GPTConfig(**SMALL | change)


def test_parametrizations_have_names_of_their_own():
    model = small()
    layer = model.layers[0].feed_forward.w13
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    assert "layers.0.feed_forward.w13.parametrizations.weight.original" in model.state_dict()


# Lengths, caches, modes

@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_cache_equals_the_full_forward(name):
    model, tokens, cond, mask = case(name)
    full = model(tokens[:, :-1], cond, mask)[0]
    cache = model.new_cache(3).fill_(torch.nan)  # what was not written is not read
    logits, padding = model.prefill(cond, mask, cache)
    positions = (torch.arange(tokens.shape[1] - 1) + model.config.n_cond).split(1)
    steps = [logits] + [model.step(tokens[:, i], at, padding, cache) for i, at in enumerate(positions)]
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=1e-5)
    d = model.config.head_dim
    assert cache.shape[3] == model.config.n_kv_head and cache.shape[5] == -(-d // 8) * 8
    assert not cache[0, ..., :d].isnan().any()  # every key was written


@torch.no_grad()
@pytest.mark.parametrize("name", ["class", "padding"])
def test_logits_depend_on_the_past_only_and_not_on_the_mode(name):
    model, tokens, cond, mask = case(name)
    full = model(tokens[:, :-1], cond, mask)[0]
    for t in (0, 1, 5, 11):
        for training in (False, True):
            logits, loss = model.train(training)(tokens[:, :t], cond, mask)
            assert logits.shape == (3, t + 1, 20) and loss is None
            torch.testing.assert_close(logits, full[:, : t + 1], atol=1e-5, rtol=1e-5)
    loss = model(tokens[:, :-1], cond, mask, targets=tokens)[1]
    direct = -full.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).mean()
    torch.testing.assert_close(loss.double(), direct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, sizes", [("zero", dict(dim=64)), ("padding", dict(dim=64)), ("head dim 100", {})])
def test_training_by_kernels(name, sizes, kernels_mode):
    """Loss and gradients under bfloat16 autocast, as a GPU computes them, are as near to float32 as PyTorch's."""
    model, tokens, cond, mask = case(name, **sizes)

    def run(mode, low):
        kernels_mode(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(tokens[:, :-1], cond, mask, targets=tokens)[1]
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def error(found):
        return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(found, exact, strict=True)])

    exact, theirs, ours = run("torch", False), run("torch", True), run("triton", True)
    assert error(theirs).max() < 0.1 and (error(ours) <= 2 * error(theirs) + 1e-3).all()


@pytest.mark.parametrize("tokens", [torch.zeros(2, 12, dtype=torch.long), torch.zeros(11, dtype=torch.long)],
                         ids=["too many", "no batch"])
def test_tokens_that_do_not_fit_are_refused(tokens):
    with pytest.raises(ValueError, match=r"do not fit the grid \(3, 4\)"):
        small()(tokens, torch.zeros(2, dtype=torch.long))


def test_another_grid_is_another_table():
    model, (tokens, cond) = small(), (torch.randint(20, (1, 17)), torch.tensor([1]))
    model.set_grid((3, 6))
    wide = model(tokens, cond)[0]
    torch.testing.assert_close(wide, small(grid=(3, 6))(tokens, cond)[0])
    model.set_grid((6, 3))
    assert (model(tokens, cond)[0] - wide).abs().max() > 0.01


# Padding

@torch.no_grad()
@pytest.mark.parametrize("cond_rope", ["identity", "zero"])
def test_logits_do_not_depend_on_padding(cond_rope):
    settings = dict(TEXT, cond_rope=cond_rope)
    model, tokens, text = small(**settings), torch.randint(20, (2, 7)), torch.randn(2, 3, 12)

    def logits(model, n_cond, filling):
        cond = torch.cat([torch.full((2, n_cond - 3, 12), filling), text], dim=1)
        return model(tokens, cond, torch.arange(n_cond).expand(2, -1) >= n_cond - 3)[0]

    expected = logits(model, 5, 0.0)
    torch.testing.assert_close(logits(model, 5, 9.0), expected, atol=1e-5, rtol=1e-5)
    for n_cond in (3, 8):
        other = small(**settings | dict(n_cond=n_cond))
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "uncond" not in k}, strict=False)
        torch.testing.assert_close(logits(other, n_cond, 0.0), expected, atol=1e-5, rtol=1e-5)
    shown = model(tokens, torch.cat([torch.zeros(2, 2, 12), text], dim=1))[0]
    assert (shown - expected).abs().max() > 0.01


def test_conditions_that_do_not_fit_are_refused():
    model, tokens, cond, mask = case("padding")
    with pytest.raises(RuntimeError, match="padding has to stand left"):
        model(tokens[:, :-1], cond, mask.flip(1))
    with pytest.raises(ValueError, match=r"text features have to be \[B, 5, 12\]"):
        model(tokens[:, :-1], cond[:, :4], mask)
    with pytest.raises(ValueError, match=r"cond_mask has to be \[3, 5\]"):
        model(tokens[:, :-1], cond, mask[:, :4])


# Training

@pytest.mark.parametrize("kind", [{}, TEXT], ids=["class", "text"])
def test_conditions_are_dropped_in_training_only(kind):
    model, n = small(cond_dropout=0.3, **kind), 20_000
    cond = torch.randint(5, (n,)) if not kind else torch.randn(n, 5, 12)
    kept, nothing = (model.cls_embedding(c) for c in (cond, model.cls_embedding.null(cond)))
    same = lambda a, b: torch.isclose(a, b, atol=1e-5).flatten(1).all(1)  # noqa: E731
    assert same(model.eval().embed_condition(cond, None)[0], kept).all()
    torch.manual_seed(1)
    drawn = model.train().embed_condition(cond, None)[0]
    dropped = same(drawn, nothing)
    assert torch.equal(dropped, ~same(drawn, kept))
    assert abs(dropped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


def test_null_conditions():
    model, text = small(), small(**TEXT)
    assert model.cls_embedding.null(torch.tensor([0, 3])).tolist() == [5, 5]
    assert model.cls_embedding.embedding_table.weight.shape == (6, 32)
    null = text.cls_embedding.null(torch.zeros(2, 5, 12))
    assert torch.equal(null[1], text.cls_embedding.uncond_embedding)
    assert "cls_embedding.uncond_embedding" not in dict(text.named_parameters())


def test_dropout_is_on_embeddings_attention_and_ffn_outputs(monkeypatch):
    model, calls, dropout = small(dropout=0.5).train(), [], torch.nn.functional.dropout

    def spy(x, p, training=True, *_):
        calls.append((x, dropout(x, p, training)))
        return calls[-1][1]

    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    batch = torch.randint(20, (2, 11)), torch.tensor([0, 1])
    model(*batch)
    assert len(calls) == 1 + 2 * 2 and all(x.shape == (2, 12, 32) for x, _ in calls)
    assert all(0.3 < (y == 0).float().mean() < 0.7 for _, y in calls)
    calls.clear()
    model.eval()(*batch)
    assert all(torch.equal(x, y) for x, y in calls)


def test_first_loss_is_the_log_of_the_vocabulary():
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(**SMALL)), torch.randint(20, (4, 12))
    loss = model(tokens[:, :-1], torch.arange(4), targets=tokens)[1]
    torch.testing.assert_close(loss, torch.tensor(math.log(20)))
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert all(abs(w.std() - 0.02) < 0.003 for w in weights if w is not model.output.weight)


@pytest.mark.parametrize("name", ["class", "padding"])
def test_one_batch_overfits(name):
    settings = dict(CASES[name])
    settings.pop("padding", None)
    torch.manual_seed(0)
    (_, tokens, cond, mask), model = case(name), GPT(GPTConfig(**SMALL | settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens[:, :-1], cond, mask, targets=tokens)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


# Files

def test_files_keep_w1_and_w3_apart():
    model = small()
    state = model.state_dict()
    names = {name.removeprefix("layers.0.") for name in state if name.startswith("layers.0.")}
    assert names == {"attention.wqkv.weight", "attention.wo.weight", "feed_forward.w1.weight", "feed_forward.w2.weight",
                     "feed_forward.w3.weight", "attention_norm.weight", "ffn_norm.weight"}
    assert {n for n in state if "layers" not in n} == {
        "cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"}
    w13 = model.layers[1].feed_forward.w13.weight
    assert torch.equal(torch.cat([state[f"layers.1.feed_forward.{n}.weight"] for n in ("w1", "w3")]), w13)
    before = list(state)
    other = GPT(GPTConfig(**SMALL))
    other.load_state_dict(state)
    assert list(state) == before and torch.equal(other.layers[1].feed_forward.w13.weight, w13)
    state.pop("layers.1.feed_forward.w3.weight")
    with pytest.raises(RuntimeError, match="layers.1.feed_forward.w13.weight"):
        other.load_state_dict(state)


PUBLISHED = {
    "class": dict(n_head=12, dim=768, cond_rope="zero"),
    "gqa": dict(n_head=12, dim=768, n_kv_head=4, cond_rope="zero"),
    "text": dict(TEXT, n_head=16, dim=1024, cond_rope="zero"),
}


@torch.no_grad()
@pytest.mark.parametrize("key", ["model", "module", "state_dict", None], ids=str)
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files(tmp_path, kind, key):
    model = small(**PUBLISHED[kind] | dict(n_layer=1, ffn_dim=64, grid=(2, 3)))
    content = {key: model.state_dict(), "args": argparse.Namespace(gpt_model="GPT-B")} if key else model.state_dict()
    torch.save(content, tmp_path / "gpt.pt")
    loaded = GPT.from_pretrained(tmp_path / "gpt.pt", grid=(2, 3))
    default = {name: getattr(GPTConfig(), name) for name in ("dropout", "cond_dropout")}
    classes = 1000 if kind == "text" else 5  # a text file tells no number of classes
    expected = GPTConfig(**asdict(model.config) | default | dict(num_classes=classes))
    assert loaded.config == expected and not loaded.training
    tokens, cond = torch.randint(20, (2, 5)), torch.tensor([0, 5]) if kind != "text" else torch.randn(2, 5, 12)
    assert torch.equal(loaded(tokens, cond)[0], model(tokens, cond)[0])


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "tiny"])
def test_width_tells_the_heads(preset):
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[preset] | dict(n_layer=1)))
    config = infer_config(model.state_dict(), "x.pt")
    assert config == GPTConfig(**PRESETS[preset] | dict(n_layer=1, cond_rope="zero"))


def test_own_files_round_trip(tmp_path):
    model = small(dim=40, n_head=5, cond_rope="identity")
    save_file(tmp_path / "gpt.pt", dict(model.checkpoint(), step=3))
    loaded = GPT.from_pretrained(tmp_path / "gpt.pt", dropout=0.4)
    assert loaded.config == GPTConfig(**SMALL | dict(dim=40, n_head=5, dropout=0.4)) and loaded.dropout.p == 0.4
    tokens, cond = torch.randint(20, (2, 11)), torch.tensor([0, 5])
    assert torch.equal(loaded(tokens, cond)[0], model(tokens, cond)[0])
    assert GPT.from_pretrained(tmp_path / "gpt.pt", grid=(5, 5)).cos.shape[0] == 26


def remove(*names):
    return lambda model: {k: v for k, v in model.state_dict().items() if k not in names}


@pytest.mark.parametrize("weights, message", [
    (remove("layers.1.feed_forward.w3.weight"), "missing layers.1.feed_forward.w3.weight"),
    (remove("layers.0.feed_forward.w1.weight"), "layers.0.feed_forward.w1.weight"),
    (remove("norm.weight"), "missing norm.weight"),
    (remove("cls_embedding.embedding_table.weight"), "holds no cls_embedding.embedding_table.weight"),
    (lambda m: dict(m.state_dict(), freqs_cis=torch.zeros(1)), "unexpected freqs_cis"),
    (lambda m: dict(m.state_dict(), **{"norm.weight": torch.ones(3)}), r"norm.weight is \[3\], expected \[128\]"),
    (lambda m: small(dim=36, n_head=3).state_dict(), "no preset is 36 wide"),
    (lambda m: VQModel(VQConfig(channels=(32, 32))).state_dict(), "not a GPT"),
    (lambda m: {}, "not a GPT"),
], ids=["w3", "w1", "norm", "condition", "unexpected", "misshapen", "width", "tokenizer", "nothing"])
def test_what_does_not_fit_is_named(tmp_path, weights, message):
    torch.save({"model": weights(small(dim=128))}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=f"gpt.pt.*{message}"):
        GPT.from_pretrained(tmp_path / "gpt.pt", grid=(3, 4))


def test_published_files_do_not_tell_their_grid(tmp_path):
    torch.save(small(dim=128).state_dict(), tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=r"does not tell its grid.*\(16, 16\) for 256 pixels"):
        GPT.from_pretrained(tmp_path / "gpt.pt")


def test_rotation_stays_float32_in_bfloat16_models():
    model = GPT(GPTConfig(**PRESETS["tiny"], vocab_size=16, num_classes=2, grid=(3, 5)))
    cos, sin = model.cos.clone(), model.sin.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.cos, cos) and torch.equal(model.sin, sin)
    tokens = torch.randint(16, (2, 7))
    assert model(tokens, torch.tensor([0, 1]))[0].isfinite().all()


@torch.no_grad()
def test_a_published_text_model_generates_what_float64_says(tmp_path):
    """A t2i file written from the published names alone; guided greedy codes under left padding."""
    generator = torch.Generator().manual_seed(0)
    block = {"attention.wqkv": (2304, 768), "attention.wo": (768, 768), "feed_forward.w1": (64, 768),
             "feed_forward.w2": (768, 64), "feed_forward.w3": (64, 768), "attention_norm": (768,), "ffn_norm": (768,)}
    shapes = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"tok_embeddings.weight": (20, 768), "norm.weight": (768,), "output.weight": (20, 768),
               "cls_embedding.cap_proj.fc1.weight": (768, 12), "cls_embedding.cap_proj.fc2.weight": (768, 768),
               "cls_embedding.uncond_embedding": (5, 12)}
    scale = {"norm.weight": 1.0, "tok_embeddings.weight": 1.0, "cls_embedding.cap_proj.fc1.weight": 0.3}
    weights = {name: torch.randn(shape, generator=generator) * scale.get(name, 0.05) for name, shape in shapes.items()}
    for name in (n for n in weights if n.endswith("norm.weight")):
        weights[name] = 1 + 0.1 * weights[name]
    torch.save({"model": weights, "args": argparse.Namespace(gpt_model="GPT-XL", cls_token_num=5)}, tmp_path / "t2i.pt")
    model = GPT.from_pretrained(tmp_path / "t2i.pt", grid=(2, 3))
    assert (model.config.cond, model.config.n_head, model.config.cond_rope) == ("text", 12, "zero")

    cond, mask = torch.randn(3, 5, 12, generator=generator), torch.arange(5) >= torch.tensor([0, 2, 4])[:, None]
    cond *= mask[..., None]
    null, codes, margin = weights["cls_embedding.uncond_embedding"].expand(3, -1, -1), torch.zeros(3, 0, dtype=int), []
    for _ in range(6):
        guided, free = (direct_logits(model, codes, c, mask)[:, -1] for c in (cond, null))
        logits = free + 7.5 * (guided - free)
        margin.append(logits.topk(2).values.diff().abs().min())
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], 1)
    assert min(margin) > 1e-3  # float32 cannot mistake them
    drawn = generate(model, cond, mask, cfg_scale=7.5, greedy=True)
    assert torch.equal(drawn.flatten(1), codes)
    assert not torch.equal(drawn, generate(model, cond, cfg_scale=7.5, greedy=True))  # padding matters


def test_operations_of_an_image():
    """As PyTorch's own counter has it, which sees neither into the operator of the loss nor attention's masked half."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(n_layer=2, n_head=2, dim=32, ffn_dim=48, vocab_size=64, grid=(3, 4), **TEXT)
    model, t = GPT(config).train(), 5 + 12 - 1
    with FlopCounterMode(display=False) as counter:
        cond = torch.randn(1, 5, 12)
        model(torch.zeros(1, 11, dtype=torch.long), cond, targets=torch.zeros(1, 12, dtype=torch.long))[1].backward()
    projection = 6 * 5 * (12 * 32 + 32 * 32) - 2 * 5 * 12 * 32  # of the features, which get no gradient themselves
    products = model.flops_per_image() - 3 * 2 * 2 * 2 * 32 * t * (t + 1) // 2 - 3 * 2 * 12 * 64 * 32
    attention = {name: n for name, n in counter.get_flop_counts()["Global"].items() if "attention" in str(name)}
    assert counter.get_total_flops() - sum(attention.values()) == products + projection
