import pytest
import torch
import torch.nn.functional as F

import kernels
from gpt import GPT, GPTConfig
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy_ref


def both(fn, x, weight, targets, scale=1.0):
    """Loss and gradients of fn, in float64."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    loss = fn(x, weight, targets)
    (scale * loss).backward()
    return [t.double() for t in (loss.detach(), x.grad, weight.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 7 * 53, 2**25], ids=["one row", "seven rows and a rest", "one chunk"])
def test_against_float64_and_the_plain_version(chunk, dtype, monkeypatch):
    """No further from float64 than twice the plain version of the same dtype, whatever the gradient from above."""
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(33, 24, dtype=dtype), torch.randn(53, 24, dtype=dtype), torch.randint(53, (33,))
    exact = both(lambda x, w, t: F.cross_entropy(x @ w.T, t), x.double(), weight.double(), targets, -2.5)
    plain = both(linear_cross_entropy_ref, x, weight, targets, -2.5)
    found = both(kernels.linear_cross_entropy, x, weight, targets, -2.5)
    for mine, theirs, want in zip(found, plain, exact, strict=True):
        unit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max() + unit * want.abs().max()


def test_large_logits_and_repeated_rows():
    x, weight = torch.tensor([[100.0], [100.0]]), torch.tensor([[10.0], [-10.0], [9.0]])
    loss, dx, dw = both(kernels.linear_cross_entropy, x, weight, torch.tensor([1, 0]))
    assert loss == 1000  # (2000 + 0) / 2
    torch.testing.assert_close(dx, torch.tensor([[10.0], [0.0]]).double(), atol=1e-30, rtol=0)
    torch.testing.assert_close(dw, torch.tensor([[50.0], [-50.0], [0.0]]).double(), atol=1e-30, rtol=0)


def test_without_gradients_none_are_computed(monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    x, weight = torch.randn(5, 3), torch.nn.Parameter(torch.randn(7, 3))
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(x, weight, torch.arange(5))
    torch.testing.assert_close(loss, linear_cross_entropy_ref(x, weight, torch.arange(5)).detach())


def test_autocast_and_compile():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(9, 16), torch.randn(20, 16), torch.randint(20, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        low = both(kernels.linear_cross_entropy, x, weight, targets)
        plain = both(linear_cross_entropy_ref, x, weight, targets)
    for a, b in zip(low, plain, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)  # bfloat16 keeps 8 bits
    compiled = torch.compile(kernels.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    plain = both(kernels.linear_cross_entropy, x, weight, targets)
    for a, b in zip(both(compiled, x, weight, targets), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_s_loss_is_that_of_its_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, dim=32, ffn_dim=48, vocab_size=20, num_classes=3, grid=(2, 3), dropout=0,
                          cond_dropout=0))  # fmt: skip
    model.see_codes(torch.randn(20, 4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens, labels = torch.randint(20, (4, 6)), torch.tensor([0, 1, 2, 3])
    logits, nothing = model(tokens[:, :-1], labels)
    empty, loss = model(tokens[:, :-1], labels, targets=tokens)
    assert nothing is None and empty is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
