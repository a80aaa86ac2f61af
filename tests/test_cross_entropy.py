"""Loss and gradients against float64: the PyTorch path on the CPU, the kernel on a GPU or under the interpreter."""

import importlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import kernels
from gpt import GPT, GPTConfig
from kernels.cross_entropy import linear_cross_entropy_ref, softmax_loss_ref

cross_entropy = importlib.import_module("kernels.cross_entropy")
GPU = torch.cuda.is_available()
UNIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
paths = pytest.mark.parametrize("device", ["torch", "triton"], indirect=True)
needs_kernel = pytest.mark.parametrize("device", ["triton"], indirect=True)


@pytest.fixture
def device(request):
    """Where the path's tensors are. The kernel finds every torch.empty filled with NaN, so that a gap shows."""
    if request.param == "triton" and not (GPU or kernels.INTERPRETED):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    before = kernels.use(request.param)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(request.param == "triton", warn_only=True)
    yield "cuda" if GPU and request.param == "triton" else "cpu"
    torch.use_deterministic_algorithms(False)
    kernels.use(before)


def both(fn, x, weight, targets, scale=1.0):
    """Loss and gradients of fn, in float64."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    loss = fn(x, weight, targets)
    (scale * loss).backward()
    return [t.double() for t in (loss.detach(), x.grad, weight.grad)]


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("chunk", [1, 7 * 53, 2**25], ids=["one row", "seven rows and a rest", "one chunk"])
@paths
def test_against_float64_and_the_plain_version(chunk, dtype, monkeypatch, device):
    """No further from float64 than twice the plain version of the same dtype, whatever the gradient from above."""
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    monkeypatch.setattr(cross_entropy, "CHUNK_REF", chunk)
    x, weight = (torch.randn(n, 24, device=device).to(dtype) for n in (33, 53))
    targets = torch.randint(53, (33,), device=device)
    exact = both(lambda x, w, t: F.cross_entropy(x @ w.T, t), x.double(), weight.double(), targets, -2.5)
    plain = both(linear_cross_entropy_ref, x, weight, targets, -2.5)
    found = both(kernels.linear_cross_entropy, x, weight, targets, -2.5)
    for mine, theirs, want in zip(found, plain, exact, strict=True):
        assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max() + UNIT[dtype] * want.abs().max()


def exact_softmax_loss(logits, targets):
    """Losses and gradients in float64."""
    p = logits.double().softmax(1)
    return F.cross_entropy(logits.double(), targets, reduction="none"), p - F.one_hot(targets, p.shape[1])


WIDTHS = [(5, 1), (3, 2), (40, 53), (2, 256), (3, 8191), (2, 8193), (3, 16384), (2, 16411), (2, 50257)]


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("rows, V", WIDTHS, ids=str)
@needs_kernel
def test_rows_of_every_width(rows, V, dtype, device):
    """In place and nowhere else, or not at all; the first and the last code as targets; targets with strides."""
    wider = 4 * torch.randn(rows, V + 3, device=device).to(dtype)
    logits, plain, before = wider[:, :V], wider[:, :V].clone(), wider.clone()
    targets = torch.randint(V, (rows, 2), device=device)[:, 0]
    targets[:2] = torch.tensor([0, V - 1])
    losses = cross_entropy.softmax_loss(logits, targets, False)
    assert torch.equal(wider, before) and losses.dtype == torch.float32
    assert torch.equal(cross_entropy.softmax_loss(logits, targets, True), losses)
    assert torch.equal(wider[:, V:], before[:, V:])
    want_loss, want = exact_softmax_loss(plain, targets)
    plain_losses = softmax_loss_ref(plain, targets, True)
    steps = 1 if device == "cuda" else 1 / 2  # a GPU's ex2.approx and division are off by up to a float32 step, too
    for mine, theirs, true in ((losses, plain_losses, want_loss), (logits, plain, want)):
        mine, theirs = (mine - true).abs(), (theirs - true).abs()
        assert mine.max() <= 2 * theirs.max() + steps * torch.finfo(dtype).eps * true.abs().max()


@needs_kernel
def test_extreme_logits(device):
    """Also 8,192 codes of -1e4 before larger ones: the maximum moves between two blocks."""
    V, high = 8200, 1e4
    rows = torch.full((6, V), -high, device=device)
    rows[1], rows[2], rows[3, -1], rows[4, ::2] = high, 0, high, high
    rows[5] = high + torch.rand(V, device=device)  # steps of 1 / 1,024, as large as what rounds a sum's log
    for last in (True, False):
        logits, targets = rows.clone(), torch.full((6,), V - 1 if last else 0, device=device)
        want_loss, want = exact_softmax_loss(rows, targets)
        losses = cross_entropy.softmax_loss(logits, targets, True)
        torch.testing.assert_close(losses.double(), want_loss, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(logits.double(), want, atol=1e-9, rtol=1e-5)
        assert losses[3] == (0 if last else 2 * high)


@needs_kernel
def test_what_is_no_number_shows(device):
    logits = torch.randn(6, 40, device=device)
    logits[4, 3], logits[5, 3] = float("nan"), float("inf")
    targets = torch.tensor([-100, 40, 2**40, 39, 0, 0], device=device)
    gradients = logits.clone()
    losses = cross_entropy.softmax_loss(gradients, targets, True)
    assert losses.isfinite().tolist() == [False, False, False, True, False, False]
    assert gradients.isfinite().all(1).tolist() == losses.isfinite().tolist()
    assert cross_entropy.softmax_loss(logits[:0], targets[:0], True).shape == (0,)


@paths
def test_targets_have_to_fit(device):
    x, weight = torch.randn(5, 3, device=device), torch.randn(7, 3, device=device)
    for shape in ((4,), (6,), (5, 1), (1,)):
        with pytest.raises(ValueError, match=r"targets have to be \[5\] for x \[5, 3\], not "):
            kernels.linear_cross_entropy(x, weight, torch.zeros(shape, dtype=torch.long, device=device))
    targets = torch.zeros(5, dtype=torch.long, device=device)
    for args, message in (((x, weight, targets.int()), "int64, one or more, not torch.int32"),
                          ((x[:0], weight, targets[:0]), "int64, one or more, not torch.int64 .0."),
                          ((x, weight.T, targets), r"weight has to be \[V, 3\], not \[3, 7\]")):
        with pytest.raises(ValueError, match=message):
            kernels.linear_cross_entropy(*args)


@paths
def test_transforms_of_torch_func_and_second_gradients(device):
    """An operator knows no forward derivative, and would give 0."""
    x, weight, targets = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    x, weight, targets = x.to(device), weight.to(device), targets.to(device)
    loss = lambda x: kernels.linear_cross_entropy(x, weight, targets)  # noqa: E731
    plain = lambda x: cross_entropy.linear_cross_entropy_ref(x, weight, targets)  # noqa: E731
    step = torch.randn_like(x)
    got, want = (torch.func.jvp(f, (x,), (step,))[1] for f in (loss, plain))
    torch.testing.assert_close(got, want)
    assert want.abs() > 0.01
    one = lambda x, t: kernels.linear_cross_entropy(x[None], weight, t[None])  # noqa: E731
    each = torch.func.vmap(torch.func.grad(one))(x, targets)
    torch.testing.assert_close(each / 5, torch.func.grad(plain)(x))
    gradient, = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@paths
def test_backward_makes_no_gradients_of_what_nothing_reads(device):
    x, weight = torch.randn(5, 16, device=device, requires_grad=True), torch.randn(40, 16, device=device)
    loss = kernels.linear_cross_entropy(x, weight, torch.randint(40, (5,), device=device))
    with torch.profiler.profile() as profile:
        loss.backward()
    assert not {"aten::zeros", "aten::zero_"} & {event.key for event in profile.key_averages()}


@paths
def test_opcheck(device):
    x, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (5, 40))
    targets, use_kernel = torch.randint(40, (5,), device=device), kernels.mode() == "triton"
    op = torch.ops.nanollamagen.linear_cross_entropy.default
    torch.library.opcheck(op, (x.detach(), weight.detach(), targets, False, use_kernel))
    torch.library.opcheck(op, (x, weight, targets, True, use_kernel))


@paths
def test_large_logits_and_repeated_rows(device):
    x, weight = torch.tensor([[100.0], [100.0]]).to(device), torch.tensor([[10.0], [-10.0], [9.0]]).to(device)
    loss, dx, dw = both(kernels.linear_cross_entropy, x, weight, torch.tensor([1, 0]).to(device))
    assert loss == 1000  # (2000 + 0) / 2
    torch.testing.assert_close(dx.cpu(), torch.tensor([[10.0], [0.0]]).double(), atol=1e-30, rtol=0)
    torch.testing.assert_close(dw.cpu(), torch.tensor([[50.0], [-50.0], [0.0]]).double(), atol=1e-30, rtol=0)


@paths
def test_many_rows_in_float16(device):
    """A row's gradient is two of float16's smallest steps before the upstream one, 1e5, as of a scaled loss."""
    x, weight = torch.randn(500, 4, device=device).half(), torch.randn(3, 4, device=device).half()
    weight, targets = weight * 2**-14, torch.randint(3, (500,), device=device)
    exact = both(lambda x, w, t: F.cross_entropy(x @ w.T, t), x.double(), weight.double(), targets, 1e5)
    found = both(kernels.linear_cross_entropy, x, weight, targets, 1e5)
    for mine, want in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, want, rtol=0.01, atol=0.01 * want.abs().max().item())


@paths
def test_without_gradients_none_are_computed(monkeypatch, device):
    monkeypatch.setattr(torch, "mm", None)
    x, weight = torch.randn(5, 3, device=device), torch.nn.Parameter(torch.randn(7, 3, device=device))
    targets = torch.arange(5, device=device)
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_ref(x, weight, targets).detach())


@paths
def test_autocast(device):
    x, weight, targets = torch.randn(9, 16), torch.randn(20, 16), torch.randint(20, (9,))
    x, weight, targets = x.to(device), weight.to(device), targets.to(device)
    with torch.autocast(device, torch.bfloat16):
        low = both(kernels.linear_cross_entropy, x, weight, targets)
        plain = both(linear_cross_entropy_ref, x, weight, targets)
    for a, b in zip(low, plain, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@paths
def test_compile(backend, device, monkeypatch):
    """Three chunks in one graph, which keeps both gradients for the backward pass, and no logits."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 80)
    monkeypatch.setattr(cross_entropy, "CHUNK_REF", 80)
    x, weight = (torch.randn(n, 16, device=device) for n in (9, 20))
    targets = torch.randint(20, (9,), device=device)
    compiled = torch.compile(kernels.linear_cross_entropy, backend=backend, fullgraph=True)
    plain = both(kernels.linear_cross_entropy, x, weight, targets)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch._inductor.config.patch(force_disable_caches=True), hooks:
        for a, b in zip(both(compiled, x, weight, targets), plain, strict=True):
            torch.testing.assert_close(a, b)
    assert sum(t.numel() for t in kept if t.dim()) <= x.numel() + weight.numel()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, targets).double(), plain[0])


def test_one_graph_for_every_number_of_rows():
    torch._dynamo.reset()
    compiled, weight = torch._dynamo.testing.CompileCounter(), torch.randn(7, 3, requires_grad=True)
    fn = torch.compile(kernels.linear_cross_entropy, backend=compiled, fullgraph=True, dynamic=True)
    for n in (4, 5, 6):
        fn(torch.randn(n, 3, requires_grad=True), weight, torch.zeros(n, dtype=torch.long))
    assert compiled.frame_count == 1


def test_the_model_s_loss_is_that_of_its_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, dim=32, ffn_dim=48, vocab_size=20, num_classes=3, grid=(2, 3), dropout=0,
                          cond_dropout=0))
    model.see_codes(torch.randn(20, 4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens, labels = torch.randint(20, (4, 6)), torch.tensor([0, 1, 2, 3])
    logits, nothing = model(tokens[:, :-1], labels)
    empty, loss = model(tokens[:, :-1], labels, targets=tokens)
    assert nothing is None and empty is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
