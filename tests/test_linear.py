"""Products for few rows, with norm, SwiGLU and residual add, against float64: on a GPU, or under the interpreter."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, layout, name, triton_kernels  # noqa: F401 - the fixture serves all tests here

import kernels
from gpt import GPT, GPTConfig

linear_file = importlib.import_module("kernels.linear")
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

# B, K, N (of y), the layout of x and of the residual: a head of GPT-L, tails of every block, one row, the most
SHAPES = [(16, 1024, 64, "plain"), (17, 97, 31, "columns"), (3, 600, 37, "strided"), (1, 136, 70, "plain"),
          (32, 200, 50, "transposed")]
if DEVICE == "cuda":
    SHAPES += [(16, 1024, 3072, "plain"), (32, 3200, 3200, "plain"), (16, 2816, 1024, "plain")]
    SHAPES += [(16, 768, 16384, "plain")]
KINDS = {"product": {}, "norm": dict(norm=True), "add": dict(add=True), "norm gated": dict(norm=True, gated=True),
         "all": dict(norm=True, gated=True, add=True)}


def make(B, K, N, kind, dtype, norm=False, gated=False, add=False):
    """x, in rows of very different lengths, weight, and what is asked for: weight of the norm, residual."""
    scale = torch.logspace(-1, 1, B, device=DEVICE)[:, None]
    x = layout((scale * torch.randn(B, K, device=DEVICE)).to(dtype), kind)
    weight = (torch.randn((1 + gated) * N, K, device=DEVICE) / K**0.5).to(dtype)
    more = dict(gated=gated, eps=1e-5 if norm else 0.0)
    more["norm_weight"] = (torch.rand(2 * K, device=DEVICE) + 0.5).to(dtype)[::2] if norm else None
    more["residual"] = layout(torch.randn(B, N, device=DEVICE).to(dtype), kind) if add else None
    return x, weight, more


def direct(x, weight, norm_weight, eps, residual, gated, dtype=torch.float64, product=F.linear):
    """In the words of the definition."""
    x, weight = x.to(dtype), weight.to(dtype)
    if norm_weight is not None:
        x = x / (x.square().mean(1, keepdim=True) + eps).sqrt() * norm_weight.to(dtype)
    y = product(x, weight)
    if gated:
        gate, up = y.chunk(2, 1)
        y = gate / (1 + (-gate).exp()) * up
    return y if residual is None else residual.to(dtype) + y


def one_after_the_other(x, weight):
    """x W^T with sums as a GPU's thread makes them; libraries of CPUs make better ones, of several shorter sums."""
    y = x.new_zeros(len(x), len(weight))
    for k in range(x.shape[1]):
        y += x[:, k, None] * weight[:, k]
    return y


def run(x, weight, **more):
    """The product, without what the norm of a sum would be told."""
    y = kernels.skinny_linear(x, weight, **more)
    return y if more["residual"] is None else y[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_skinny_linear(shape, dtype, kind):
    """At most twice the error of the same operations one by one, in float32 of sums in one chain if that is larger."""
    x, weight, more = make(*shape, dtype, **KINDS[kind])
    got, exact = run(x, weight, **more), direct(x, weight, **more)
    assert got.dtype == dtype and got.shape == exact.shape
    kernels.use("torch")
    plain = [run(x, weight, **more)]
    if dtype == torch.float32:
        plain.append(direct(x, weight, **more, dtype=dtype, product=one_after_the_other))
    ulp = torch.finfo(dtype).eps * exact.abs().amax(1, keepdim=True)  # of each row, whose lengths differ
    mine, *theirs = ((y - exact) / ulp for y in (got, *plain))
    assert mine.square().mean().sqrt() <= 2 * max(x.square().mean().sqrt() for x in theirs) + 12**-0.5
    assert mine.abs().max() <= 4 * max(x.abs().max() for x in theirs) + 1


def test_logits():
    """Wide enough for another block."""
    x, weight, more = make(2, 16, 8209, "plain", torch.float32, norm=True)
    torch.testing.assert_close(run(x, weight, **more), direct(x, weight, **more).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("gated", [False, True])
def test_lengths(dtype, gated):
    """Those of a sum are of its rows as they were rounded, in parts; its norm needs no others."""
    x, weight, more = make(5, 40, 70, "strided", dtype, norm=gated, gated=gated, add=True)
    s, lengths = kernels.skinny_linear(x, weight, **more)
    assert lengths.dtype == torch.float32 and lengths.shape == (5, 5)  # 70 columns by 16, or gated 140 by 32
    torch.testing.assert_close(lengths.square().sum(0), s.float().square().sum(1))
    x, weight, more = make(5, 70, 40, "plain", dtype, norm=True)
    told, unknown = run(s, weight, lengths=lengths, **more), run(s, weight, **more)
    torch.testing.assert_close(told, unknown)
    assert dtype == torch.float32 or (told != unknown).sum() <= 4  # lengths are float32 either way: few round otherwise
    assert torch.equal(told, run(s, weight, lengths=lengths.T.contiguous().T, **more))
    without_eps = more | dict(eps=0.0)
    twice = run(s, weight, lengths=2 * lengths, **without_eps)  # read they are
    assert torch.equal(2 * twice, run(s, weight, lengths=lengths, **without_eps))
    kernels.use("torch")
    assert torch.equal(run(s, weight, lengths=lengths, **more), run(s, weight, **more))  # not needed


def test_lengths_go_through_a_step(monkeypatch):
    """Those of the embeddings are the only ones that a step has to compute."""
    model = GPT(GPTConfig(n_layer=3, n_head=2, dim=32, vocab_size=40, num_classes=5, grid=(2, 2))).to(DEVICE).eval()
    calls, norm = [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **how: calls.append(args) or norm(*args, **how))
    codes, position = torch.arange(3, device=DEVICE), torch.tensor([1], device=DEVICE)
    with torch.no_grad():
        model.step(codes, position, None, model.new_cache(3))
    assert len(calls) == 1


def test_rows_do_not_depend_on_the_batch():
    """As long as BLOCK_M is the same for their number."""
    x, weight, more = make(16, 300, 40, "plain", torch.bfloat16, norm=True, gated=True)
    whole = run(x, weight, **more)
    for B in (1, 5):
        assert torch.equal(run(x[:B], weight, **more), whole[:B])


def test_weights_in_pieces():
    """Rows and columns of a wider matrix."""
    x, weight, _ = make(4, 24, 10, "plain", torch.float32)
    whole = kernels.skinny_linear(x, weight)
    wide = torch.full((12, 40), torch.nan, device=DEVICE)
    wide[1:11, 8:32] = weight
    assert torch.equal(kernels.skinny_linear(x, wide[1:11, 8:32]), whole)


def test_what_the_kernel_does_not_serve(monkeypatch):
    """Many rows, float16: the operations one by one; no rows: no launch."""
    calls = []
    monkeypatch.setattr(linear_file, "_skinny_linear", lambda *args: calls.append(args))
    for B, dtype in ((33, torch.float32), (4, torch.float16)):
        x, weight, more = make(B, 24, 10, "plain", dtype, norm=True, gated=True, add=True)
        exact, (got, lengths) = direct(x, weight, **more), kernels.skinny_linear(x, weight, **more)
        torch.testing.assert_close(got.double(), exact, rtol=5e-3, atol=2e-2)
        assert lengths is None
    assert not calls
    monkeypatch.undo()
    for mode in ("triton", "torch"):
        kernels.use(mode)
        x, weight, more = make(0, 24, 10, "plain", torch.float32, norm=True, gated=True, add=True)
        assert run(x, weight, **more).shape == (0, 10)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_what_it_refuses(mode):
    kernels.use(mode)
    x, weight, more = make(2, 24, 10, "plain", torch.float32, norm=True, gated=True, add=True)
    says = "skinny_linear: x, weight, norm_weight, lengths, residual are"
    refused = functools.partial(pytest.raises, ValueError, match=says)
    wrong_lengths = [dict(lengths=t) for t in (x[:, 0], x.T[:, :1], x.T[:0], x.T.double())]
    wrong_lengths.append(dict(lengths=x.T, norm_weight=None))
    for changes in (dict(residual=x), dict(norm_weight=x[0, :5]), dict(gated=False), *wrong_lengths):
        with refused():
            kernels.skinny_linear(x, weight, **more | changes)
    for wrong in ((x[0], weight), (x[:, :5], weight), (x, weight[0])):
        with refused():
            kernels.skinny_linear(*wrong)
    with refused():
        kernels.skinny_linear(x, weight[:5], gated=True)


def test_opcheck():
    for kind in KINDS.values():
        x, weight, more = make(3, 24, 10, "plain", torch.float32, **kind)
        lengths = x.norm(dim=1)[None] if "norm" in kind else None
        args = x, weight, more["norm_weight"], more["eps"], lengths, more["residual"], more["gated"]
        torch.library.opcheck(torch.ops.nanollamagen.skinny_linear.default, args)


@pytest.mark.parametrize("backend", ["inductor"] if DEVICE == "cuda" else ["aot_eager"])
def test_compile(backend):
    x, weight, more = make(3, 24, 24, "plain", torch.float32, norm=True, add=True)

    def twice(x):
        return kernels.skinny_linear(2 * run(x, weight, **more), weight)

    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend=backend)(x), twice(x))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph():
    x, weight, more = make(16, 1024, 2816, "plain", torch.bfloat16, norm=True, gated=True)
    kernels.skinny_linear(x, weight, **more)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.skinny_linear(x, weight, **more)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(y, kernels.skinny_linear(x, weight, **more))
