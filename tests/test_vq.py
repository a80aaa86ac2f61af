import argparse
import copy
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import distributed
import vq
from common import save_file
from gpt import GPT, GPTConfig
from vq import PRESETS, Quantizer, VQConfig, VQModel, usage_and_perplexity

SMALL = dict(channels=(32, 32, 64), z_channels=16, codebook_size=32, code_dim=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQModel(VQConfig(**SMALL)).eval()


def published(model):
    return dict(model.state_dict(), **{"quantize.codebook_used": torch.zeros(65536)})


def quantizer(**changes):
    torch.manual_seed(0)
    book = Quantizer(VQConfig(**SMALL | changes))
    torch.nn.init.normal_(book.embedding.weight)
    return book


# Sizes and the published arithmetic

@pytest.mark.parametrize("preset, millions, factor", [("vq16", 71.9, 16), ("vq8", 70.1, 8)])
def test_presets_have_the_published_sizes(preset, millions, factor):
    with torch.device("meta"):
        model = VQModel(VQConfig(**PRESETS[preset]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions and model.config.factor == factor


def test_vq16_has_the_published_names():
    with torch.device("meta"):
        model = VQModel(VQConfig(**PRESETS["vq16"]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in {
        "encoder.conv_in.weight": [128, 3, 3, 3], "encoder.conv_blocks.2.res.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.conv_blocks.3.downsample.conv.bias": [256], "encoder.mid.1.norm.bias": [512],
        "encoder.conv_blocks.4.attn.1.proj_out.weight": [512, 512, 1, 1], "encoder.norm_out.bias": [512],
        "encoder.mid.2.conv2.weight": [512, 512, 3, 3], "encoder.conv_out.weight": [256, 512, 3, 3],
        "decoder.conv_blocks.0.attn.2.q.weight": [512, 512, 1, 1], "decoder.mid.0.norm1.weight": [512],
        "decoder.conv_blocks.1.res.0.nin_shortcut.weight": [256, 512, 1, 1], "decoder.conv_out.bias": [3],
        "decoder.conv_blocks.3.upsample.conv.weight": [128, 128, 3, 3], "quantize.embedding.weight": [16384, 8],
        "decoder.conv_blocks.4.res.2.norm2.weight": [128], "quantize.codebook_used": [65536],
        "quant_conv.weight": [8, 256, 1, 1], "post_quant_conv.weight": [256, 8, 1, 1],
    }.items():
        assert shapes[name] == shape, name
    assert "encoder.conv_blocks.4.downsample.conv.weight" not in shapes
    assert "decoder.conv_blocks.4.upsample.conv.weight" not in shapes and len(shapes) == 344


class Direct:
    """Section 1 of LlamaGen in float64, from the tensors of a published file."""

    def __init__(self, weights):
        self.w = {name: tensor.double() for name, tensor in weights.items()}

    def conv(self, name, x, **kwargs):
        return F.conv2d(x, self.w[name + ".weight"], self.w[name + ".bias"], **kwargs)

    def norm(self, name, x):
        groups = x.unflatten(1, (32, -1))
        mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return x * self.w[name + ".weight"].view(-1, 1, 1) + self.w[name + ".bias"].view(-1, 1, 1)

    def norm_swish(self, name, x):
        x = self.norm(name, x)
        return x / (1 + torch.exp(-x))

    def res(self, name, x):
        h = self.conv(f"{name}.conv1", self.norm_swish(f"{name}.norm1", x), padding=1)
        h = self.conv(f"{name}.conv2", self.norm_swish(f"{name}.norm2", h), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attn(self, name, x):
        q, k, v = (self.conv(f"{name}.{c}", self.norm(f"{name}.norm", x)).flatten(2) for c in "qkv")  # B, C, positions
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def run(self, side, x, resample):
        mid = lambda x: self.res(f"{side}.mid.2", self.attn(f"{side}.mid.1", self.res(f"{side}.mid.0", x)))  # noqa: E731
        x = self.conv(f"{side}.conv_in", x, padding=1)
        x = mid(x) if side == "decoder" else x
        for i in range(3):
            level = f"{side}.conv_blocks.{i}"
            for j in range(2 if side == "encoder" else 3):
                x = self.res(f"{level}.res.{j}", x)
                x = self.attn(f"{level}.attn.{j}", x) if i == (2 if side == "encoder" else 0) else x
            x = resample(level, x) if i < 2 else x
        x = mid(x) if side == "encoder" else x
        return self.conv(f"{side}.conv_out", self.norm_swish(f"{side}.norm_out", x), padding=1)

    def encode(self, x):
        down = lambda level, x: self.conv(f"{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)  # noqa: E731
        z = F.normalize(self.conv("quant_conv", self.run("encoder", x.double(), down)), dim=1)
        book = F.normalize(self.w["quantize.embedding.weight"], dim=1)
        distances = (z.unsqueeze(1) - book[None, :, :, None, None]).square().sum(2)  # B, K, h, w
        return z, distances.argmin(1)

    def decode(self, codes):
        up = lambda level, x: self.conv(  # noqa: E731
            f"{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        z = F.normalize(self.w["quantize.embedding.weight"], dim=1)[codes].permute(0, 3, 1, 2)
        return self.run("decoder", self.conv("post_quant_conv", z), up)


def test_encoder_and_decoder_against_a_direct_computation(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 else p[0].numel() ** -0.5)
    images, direct = torch.rand(2, 3, 16, 24) * 2 - 1, Direct(model.state_dict())
    z, codes = direct.encode(images)
    torch.testing.assert_close(model.features(images).double(), z.permute(0, 2, 3, 1).flatten(0, 2), atol=1e-5, rtol=0)
    assert torch.equal(model.encode(images), codes) and len(codes.unique()) > 2
    torch.testing.assert_close(model.decode(codes).double(), direct.decode(codes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", [SMALL, PRESETS["tiny"]], ids=["small", "tiny"])
@pytest.mark.parametrize("size", [(16, 48), (32, 8)], ids=str)
def test_images_need_not_be_square(preset, size):
    torch.manual_seed(0)
    model = VQModel(VQConfig(**preset)).eval()
    images = torch.rand(2, 3, *size) * 2 - 1
    codes, (rec, losses, again) = model.encode(images), model(images)
    assert codes.shape == (2, *(s // model.config.factor for s in size)) and codes.dtype == torch.int64
    assert torch.equal(codes, again) and set(losses) == {"codebook", "commitment"}
    assert model.decode(codes).shape == rec.shape == images.shape
    torch.testing.assert_close(model.decode(codes), rec, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 0, 16), (1, 1, 16, 16), (3, 16, 16)], ids=str)
def test_sides_that_do_not_divide_are_refused(model, shape):
    for method in (model, model.encode):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\] with sides that are multiples of 4"):
            method(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"codes have to be \[B, h, w\]"):
        model.decode(torch.zeros(1, 16, dtype=torch.long))


# The quantizer

@pytest.mark.parametrize("l2_norm", [True, False], ids=["unit", "plain"])
def test_losses_and_straight_through_gradient(l2_norm):
    book = quantizer(l2_norm=l2_norm, beta=0.3)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 5)
    z_q, losses, codes = book(z)
    ((z_q * upstream).sum() + losses["codebook"] + losses["commitment"]).backward()

    z64 = z.detach().double().requires_grad_()
    e64 = book.embedding.weight.detach().double().requires_grad_()
    unit = (lambda x: x / x.norm(dim=1, keepdim=True)) if l2_norm else (lambda x: x)
    u, e = unit(z64), unit(e64)
    nearest = (u.unsqueeze(1) - e[None, :, :, None, None]).square().sum(2).argmin(1)
    chosen = e[nearest].permute(0, 3, 1, 2)
    codebook, commitment = (chosen - u.detach()).square().mean(), 0.3 * (chosen.detach() - u).square().mean()
    ((u * upstream).sum() + codebook + commitment).backward()  # the gradient of z_q, taken as that of u
    assert torch.equal(codes, nearest)
    for mine, direct in ((z_q, chosen), (losses["codebook"], codebook), (losses["commitment"], commitment),
                         (z.grad, z64.grad), (book.embedding.weight.grad, e64.grad)):
        torch.testing.assert_close(mine.double(), direct, atol=1e-6, rtol=1e-5)


def test_new_codes_are_unit_vectors(model):
    """Adam moves an entry by lr whatever its size: a vector of length 1e-4 would point anywhere after one step."""
    torch.testing.assert_close(model.quantize.embedding.weight.norm(dim=1), torch.ones(32))


def test_entropy_loss_against_a_direct_computation():
    z, codes = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in (50, 20))
    loss = vq.entropy_loss(z, codes, temperature=0.3)
    p = torch.softmax(-(z.double()[:, None] - codes.double()[None]).square().sum(-1) / 0.3, dim=1)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(loss.double(), entropy(p).mean() - entropy(p.mean(0)), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.norm() > 0 for x in (z, codes))


def test_entropy_loss_is_computed_only_where_it_counts(monkeypatch):
    monkeypatch.setattr(vq, "entropy_loss", lambda z, codebook: torch.tensor(float(len(z))))
    z = torch.randn(2, 4, 3, 5)
    assert quantizer(entropy_weight=0.5)(z)[1]["entropy"] == 0.5 * 30
    monkeypatch.setattr(vq, "entropy_loss", None)
    assert "entropy" not in quantizer()(z)[1]


def test_search_is_float32_under_autocast(model):
    book, z = quantizer(codebook_size=2048, code_dim=8), torch.randn(1, 8, 40, 50)
    unit = F.normalize(z.permute(0, 2, 3, 1).double(), dim=-1)
    codes = F.normalize(book.embedding.weight.double(), dim=1)
    expected = (unit @ codes.T).argmax(-1)
    bfloat16 = (unit.bfloat16() @ codes.bfloat16().T).argmax(-1)
    assert (bfloat16 != expected).float().mean() > 0.02  # what this test is there to notice
    with torch.autocast("cpu", torch.bfloat16):
        z_q, losses, found = book(z)
        assert torch.equal(found, expected) and z_q.dtype == losses["codebook"].dtype == torch.float32
        images = torch.rand(2, 3, 32, 32)
        features = model.features(images)
        assert features.dtype == torch.float32
        assert torch.equal(model.encode(images), model.quantize.search(features).view(2, 8, 8))


def test_bfloat16_weights_encode_decode_and_reconstruct(model):
    model, images = model.bfloat16(), torch.rand(1, 3, 16, 16).bfloat16()
    rec, _, codes = model(images)
    assert torch.equal(codes, model.encode(images)) and rec.dtype == torch.bfloat16
    assert (rec - model.decode(codes)).abs().mean() < 0.1 * rec.abs().mean()


# k-means, restarts, usage

def distortion(book, z):
    return (book.codebook()[book.search(z)] - z).square().sum(1).mean()


def test_kmeans_lowers_distortion():
    book, z = quantizer(), F.normalize(torch.randn(32, 4).repeat(20, 1) + 0.1 * torch.randn(640, 4), dim=1)
    torch.manual_seed(1)
    book.init_kmeans(z, iterations=0)
    drawn = distortion(book, z)
    torch.manual_seed(1)
    book.init_kmeans(z)
    assert distortion(book, z) < 0.7 * drawn
    torch.testing.assert_close(book.embedding.weight.norm(dim=1), torch.ones(32))
    assert len(book.search(z).unique()) > 28


def test_fewer_vectors_than_codes_give_no_equal_codes():
    book, z = quantizer(usage_window=100), F.normalize(torch.randn(5, 4), dim=1)
    with pytest.raises(ValueError, match="5 for 32"):
        book.init_kmeans(z)
    before = book.embedding.weight.detach().clone()
    book.restart_dead_codes(z)  # all 32 are dead
    assert (book.embedding.weight != before).any(1).sum() == 5
    assert distortion(book, z) < 1e-10 and len(book.embedding.weight.unique(dim=0)) == 32


def test_restart_moves_dead_codes_only():
    book, z = quantizer(usage_window=100), F.normalize(torch.randn(40, 4), dim=1)
    book.remember(torch.tensor([[0, 3, 3], [31, 7, 0]]))
    before = book.embedding.weight.detach().clone()
    book.restart_dead_codes(z)
    alive = torch.zeros(32, dtype=torch.bool)
    alive[[0, 3, 7, 31]] = True
    after = book.embedding.weight.detach()
    assert torch.equal(after[alive], before[alive])
    moved = (after[~alive, None] == z).all(-1)
    assert (moved.sum(1) == 1).all() and moved.any(0).sum() == 28  # each to a vector of its own


def test_usage_window_holds_the_last_positions():
    book, seen = quantizer(usage_window=50).train(), torch.empty(0, dtype=torch.long)
    assert book.window_counts().tolist() == [0] * 32  # nothing seen: code 0 is not used either
    for size in ((1, 4, 2, 3), (2, 4, 4, 4), (1, 4, 9, 20), (1, 4, 1, 1)):  # one of them larger than the window
        seen = torch.cat([seen, book(torch.randn(size))[2].flatten()])
        counts = book.window_counts()
        assert torch.equal(counts, seen[-50:].bincount(minlength=32))
        p = counts[counts > 0].double() / counts.sum()
        usage, perplexity = usage_and_perplexity(counts)
        torch.testing.assert_close(usage.item(), len(p) / 32)
        torch.testing.assert_close(perplexity, torch.exp(-(p * p.log()).sum()))
    book.eval()(torch.randn(1, 4, 9, 20))
    assert torch.equal(book.window_counts(), counts)
    assert usage_and_perplexity(torch.zeros(8, dtype=torch.long)) == (0, 1)


def two_processes(rank, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with distributed.processes("cpu"):
        one_codebook(rank)


def one_codebook(rank):
    torch.manual_seed(rank)
    book = quantizer(usage_window=6)
    torch.manual_seed(10 + rank)
    book.remember(torch.tensor([[1, 2, 2], [5, 6, 7]][rank]))
    counts = book.window_counts()
    assert counts[[1, 2, 5, 6, 7]].tolist() == [1, 2, 1, 1, 1] and counts.sum() == 6
    before = book.embedding.weight.detach().clone()
    weights = []
    for change in (book.restart_dead_codes, book.init_kmeans):
        change(F.normalize(torch.randn(40, 4), dim=1))
        both = [torch.empty_like(before) for _ in range(2)]
        dist.all_gather(both, book.embedding.weight.detach())
        assert torch.equal(*both)
        weights.append(both[0])
    assert torch.equal(weights[0][[1, 2, 5, 6, 7]], before[[1, 2, 5, 6, 7]])
    assert ((weights[0] == before).all(1)).sum() == 5 and not torch.equal(*weights)


def test_usage_and_restarts_over_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, args=(port,), nprocs=2)


# Files

@pytest.mark.parametrize("key", ["model", "ema", "state_dict", "module", None], ids=str)
def test_published_files(model, tmp_path, key):
    weights = published(model)
    other = {"args": argparse.Namespace(vq_model="VQ-16"), "steps": 7, "optimizer": {"state": {}}}
    torch.save(dict(other, **{key: weights}) if key else weights, tmp_path / "vq.pt")
    loaded = VQModel.from_pretrained(tmp_path / "vq.pt")
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    config = loaded.config
    assert (config.channels, config.patch, config.blocks, config.z_channels) == ((32, 32, 64), 1, 2, 16)
    assert (config.codebook_size, config.code_dim, config.l2_norm) == (32, 4, True)
    images = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded(images)[0], model(images)[0])


def test_averaged_weights_come_first(model, tmp_path):
    average = {name: tensor * 2 for name, tensor in published(model).items()}
    torch.save({"model": published(model), "ema": average}, tmp_path / "vq.pt")
    loaded = VQModel.from_pretrained(tmp_path / "vq.pt")
    assert torch.equal(loaded.quant_conv.weight, 2 * model.quant_conv.weight)


def test_the_order_of_memory_in_training_ends_with_it(model, tmp_path):
    """Files keep strides: our tokenizers would run in another order on a GPU than published ones."""
    torch.save(copy.deepcopy(model).to(memory_format=torch.channels_last).checkpoint(), tmp_path / "vq.pt")
    kept = torch.load(tmp_path / "vq.pt")["model"]
    assert not kept["encoder.conv_in.weight"].is_contiguous()
    loaded = VQModel.from_pretrained(tmp_path / "vq.pt")
    assert all(x.is_contiguous() and torch.equal(x, kept[name]) for name, x in loaded.state_dict().items()
               if name != "quantize.codebook_used")


def test_attention_asks_for_channels_side_by_side(monkeypatch):
    """Without that a GPU takes no fused kernel, and holds all pairs of positions."""
    strides, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: strides.extend(x.stride() for x in qkv) or
                        real(*qkv))
    for order in (torch.contiguous_format, torch.channels_last):
        vq.AttnBlock(32)(torch.rand(2, 32, 4, 6).contiguous(memory_format=order))
    assert len(strides) == 6 and {s[-2:] for s in strides} == {(32, 1)}


def test_zeros_of_published_codebook_used_are_not_usage(model, tmp_path):
    torch.save(published(model), tmp_path / "vq.pt")
    loaded = VQModel.from_pretrained(tmp_path / "vq.pt", usage_window=9, beta=0.5, dropout=0.2).train()
    assert loaded.quantize.window_counts().sum() == 0
    loaded(torch.rand(1, 3, 8, 8))
    assert loaded.quantize.window_counts().sum() == 4 and loaded.quantize.codebook_used.shape == (9,)
    assert (loaded.config.beta, loaded.quantize.config.beta, loaded.encoder.mid[0].dropout.p) == (0.5, 0.5, 0.2)


def test_own_files_round_trip(tmp_path):
    torch.manual_seed(0)
    model = VQModel(VQConfig(**PRESETS["tiny"], beta=0.7, l2_norm=False)).eval()
    save_file(tmp_path / "vq.pt", dict(model.checkpoint(), step=3))
    loaded, images = VQModel.from_pretrained(tmp_path / "vq.pt"), torch.rand(1, 3, 16, 32)
    assert loaded.config == model.config and torch.equal(loaded(images)[0], model(images)[0])


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("encoder.mid.1.k.bias"), "missing encoder.mid.1.k.bias"),
    (lambda w: w.pop("encoder.conv_blocks.1.res.0.conv1.weight"), "encoder.conv_blocks.1.res.0.conv1.weight"),
    (lambda w: w.pop("quant_conv.weight"), "holds no quant_conv.weight"),
    (lambda w: w.update(extra=torch.zeros(2)), "unexpected extra"),
    (lambda w: w.update({"decoder.conv_in.bias": torch.zeros(3)}), r"decoder.conv_in.bias is \[3\], expected \[64\]"),
    (lambda w: [w.pop(n) for n in list(w) if n.startswith("decoder")], r"missing decoder\..* and \d+ more"),
], ids=["missing", "missing level", "missing size", "unexpected", "misshapen", "many"])
def test_what_does_not_fit_is_named(model, tmp_path, change, message):
    weights = published(model)
    change(weights)
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=rf"vq.pt.*{message}"):
        VQModel.from_pretrained(tmp_path / "vq.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write, message", [
    (lambda p, m: torch.save(GPT(GPTConfig(n_layer=1, dim=32, n_head=2)).checkpoint(), p), "not an image tokenizer"),
    (lambda p, m: (torch.save(published(m), p), p.write_bytes(p.read_bytes()[:5000])), "not a readable checkpoint"),
    (lambda p, m: p.write_bytes(b""), "not a readable checkpoint"),
    (lambda p, m: p.write_text("<html>Not found</html>"), "not a readable checkpoint"),
    (lambda p, m: torch.save({"model": Malicious(str(p) + ".executed")}, p), "not a readable checkpoint"),
    (lambda p, m: p.write_bytes(pickle.dumps(Malicious(str(p) + ".executed"))), "not a readable checkpoint"),
    (lambda p, m: torch.save([1, 2], p), "holds a list"),
    (lambda p, m: torch.save({"model": 3}, p), "not an image tokenizer"),
    (lambda p, m: torch.save({}, p), "not an image tokenizer"),
], ids=["gpt", "truncated", "empty", "text", "malicious", "malicious pickle", "list", "number", "nothing"])
def test_other_files_are_refused(model, tmp_path, write, message):
    path = tmp_path / "vq.pt"
    write(path, model)
    with pytest.raises(ValueError, match=f"vq.pt.*{message}"):
        VQModel.from_pretrained(path)
    assert [p.name for p in tmp_path.iterdir()] == ["vq.pt"]  # nothing was executed


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="vq.pt: no such file"):
        VQModel.from_pretrained(tmp_path / "vq.pt")
