"""Every tensor is where the model's are: on a GPU an operation over two devices fails, or reads foreign memory.

Shown without a GPU on the device "meta", whose tensors hold nothing: one on the CPU beside them is a mistake. Our
operators run there as they are, in both modes, forward and backward; only launches of kernels do nothing.
"""

import contextlib
import importlib
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import losses
import sample
from gpt import GPT, GPTConfig
from t5 import T5Config, T5Encoder
from vq import VQConfig, VQModel, usage_and_perplexity

FILES = [importlib.import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
OPERATORS = {op._opoverload: op._init_fn for file in FILES for op in vars(file).values() if hasattr(op, "_init_fn")}
COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default  # from one device to another on purpose


def check_devices(what, values, numbers=True):
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and (numbers or x.dim())]
    assert len({x.device for x in tensors}) < 2, f"{what} over tensors on {[str(x.device) for x in tensors]}"


class OneDevice(TorchDispatchMode):
    """Every operation has its tensors on one device, but for numbers (no dimensions) beside which it writes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in COPIES:
            check_devices(func, (args, kwargs), numbers=func._schema.is_mutable)
        if func not in OPERATORS:
            return func(*args, **kwargs)
        with self:
            return OPERATORS[func](*args, **kwargs)


class Launch:
    """In place of a kernel: looks at what it is launched with."""

    def __init__(self, name, names):
        self.name, self.names = name, names

    def __getitem__(self, grid):
        self.names.add(self.name)
        return lambda *args, **constants: check_devices(self.name, args)


@pytest.fixture(params=["torch", "triton"])
def launched(request, monkeypatch):
    """The names of the kernels that a test has launched."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_mode", request.param)
    monkeypatch.setattr(kernels, "_obstacle", lambda *_: "")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    names = set()
    for file in FILES:
        for name in [name for name in vars(file) if name.endswith("_kernel")]:
            monkeypatch.setattr(file, name, Launch(name, names))
    with OneDevice():
        yield names


def check_launched(launched, *names):
    assert launched.issuperset(names) if kernels.mode() == "triton" else not launched


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(*shape):
    return meta(*shape, dtype=torch.int64)


def make_gpt(kind):
    """A GPT and what it reads, on "meta"."""
    changes, cond = {
        "class": (dict(), (codes(2),)),
        "text": (dict(n_cond=4, text_dim=12), (meta(2, 4, 12), meta(2, 4, dtype=torch.bool))),
        "tokens": (dict(n_cond=4, text_vocab_size=9, caption_loss_weight=0.1), (codes(2, 4),)),
    }[kind]
    sizes = dict(n_layer=1, n_head=4, n_kv_head=2, dim=64, ffn_dim=48, vocab_size=32, grid=(2, 2), num_classes=5)
    model = GPT(GPTConfig(cond=kind, **sizes, **changes)).to("meta")
    for name in ("cos", "sin"):  # set_grid leaves them on the CPU, for weights that are still to be read
        setattr(model, name, getattr(model, name).to("meta"))
    return model, cond


@pytest.mark.parametrize("kind", ["class", "text", "tokens"])
def test_gpt(kind, launched):
    model, cond = make_gpt(kind)
    logits, _ = model.eval()(codes(2, 2), *cond)
    assert logits.is_meta and logits.shape == (2, 3, 32)
    model.see_codes(meta(32, 8))
    for model.activation_checkpointing in (False, True):
        _, loss = model.train()(codes(2, 3), *cond, targets=codes(2, 4))
        loss.backward()
    assert loss.is_meta and all(p.grad.is_meta for p in model.parameters())
    model.fold_code_features()
    model.set_condition(cond="class", n_cond=1, text_vocab_size=0, caption_loss_weight=0)
    assert all(p.is_meta for p in model.parameters())
    check_launched(launched, "_rms_norm_bwd_kernel", "_swiglu_bwd_kernel", "_rope_attention_dkv_kernel",
                   "_softmax_loss_kernel")


@pytest.mark.parametrize("kind, settings", [("class", dict(top_k=7)), ("text", dict(top_k=7, top_p=0.9)),
                                            ("tokens", dict(greedy=True))], ids=str)
def test_generate(kind, settings, launched, monkeypatch):
    monkeypatch.setattr(sample, "check_request", lambda *_: None)  # it reads the labels
    model, cond = make_gpt(kind)
    drawn = sample.generate(model, *cond, **settings, cfg_scale=2.0, cfg_stop=2)
    assert drawn.is_meta and drawn.shape == (2, 2, 2)
    check_launched(launched, "_skinny_linear_kernel", "_decode_attention_kernel", "_sample_codes_kernel")


def test_vq(launched):
    sizes = dict(channels=(8, 8), blocks=1, z_channels=8, codebook_size=16, usage_window=64, entropy_weight=0.1)
    model, disc = VQModel(VQConfig(**sizes)).to("meta").train(), losses.PatchGAN(filters=8, layers=1).to("meta")
    images = meta(2, 3, 16, 16)
    rec, parts, found = model(images)
    real, fake, last = disc(images), disc(rec), model.decoder.conv_out.weight
    d_loss = losses.hinge_d_loss(real, fake.detach()) + losses.non_saturating_d_loss(real, fake.detach())
    g_loss = losses.hinge_g_loss(fake) + losses.non_saturating_g_loss(fake)
    weight = losses.adaptive_weight((rec - images).abs().mean(), g_loss, last)
    (d_loss + weight * g_loss + sum(parts.values())).backward()
    assert all(p.grad.is_meta for p in [*model.parameters(), *disc.parameters()])
    assert rec.shape == images.shape and model.decode(found).is_meta and model.encode(images).shape == found.shape
    z = model.features(images)
    model.quantize.init_kmeans(z, iterations=1)
    model.quantize.restart_dead_codes(z)
    assert all(x.is_meta for x in usage_and_perplexity(model.quantize.window_counts()))
    assert kernels.nearest_code(z, model.quantize.codebook(), l2=False).is_meta
    check_launched(launched, "_nearest_code_kernel")


def test_t5(launched):
    model = T5Encoder(T5Config(d_model=12, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=9)).to("meta")
    assert model(codes(2, 5), meta(2, 5, dtype=torch.bool)).shape == (2, 5, 12)


def test_what_is_caught(launched):
    x = meta(4)
    for mistake in (lambda: x + torch.zeros(4), lambda: x[torch.arange(2)], lambda: torch.zeros(()).add_(x.sum()),
                    lambda: Launch("kernel", set())[1](x, torch.zeros(()))):
        with pytest.raises(AssertionError, match="over tensors on"):
            mistake()
    assert (x + torch.ones(())).is_meta
