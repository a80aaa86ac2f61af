"""RoPE attention against float64, on a GPU, or on the CPU under Triton's interpreter."""

import importlib

import pytest
import torch
from test_kernels import DEVICE, DTYPES, check, name, triton_kernels  # noqa: F401 - the fixture serves all tests here
from torch.utils.checkpoint import checkpoint

import kernels

rope_file = importlib.import_module("kernels.rope_attention")
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

# B, T, H, Hkv, D, and padding: every row of queries has one that sees a single key, where T is 1 or padding is T - 1
SHAPES = [(2, 17, 4, 4, 16, None), (2, 1, 1, 1, 100, (0, 0)), (2, 67, 2, 1, 20, (0, 66)), (1, 257, 1, 1, 64, (140,)),
          (1, 131, 2, 1, 100, (5,)), (1, 256, 1, 1, 128, None), (3, 67, 4, 1, 64, (0, 66, 67)),
          (2, 21, 8, 2, 16, (3, 40))]
if DEVICE == "cuda":
    SHAPES += [(4, 256, 12, 12, 64, None), (2, 1024, 16, 4, 64, (0, 120)), (2, 1024, 8, 8, 100, (0, 1023)),
               (2, 1021, 16, 1, 128, None), (1, 4096, 2, 2, 64, (77,)), (3, 375, 20, 20, 64, (0, 119, 60))]


def make(B, T, H, Hkv, D, padding, dtype, zeros=3):
    """A projection, tables whose first rows turn everything to zero, padding, and an upstream gradient."""
    qkv = torch.randn(B, T, (H + 2 * Hkv) * D, device=DEVICE).to(dtype)
    angles = 7 * torch.randn(T, D // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    cos[:zeros], sin[:zeros] = 0, 0
    padding = None if padding is None else torch.tensor(padding, dtype=torch.int32, device=DEVICE)
    return qkv, cos, sin, padding, torch.randn(B, T, H * D, device=DEVICE).to(dtype)


def grad(fn, qkv, upstream):
    qkv = qkv.detach().requires_grad_()
    return torch.autograd.grad(fn(qkv), qkv, upstream)[0]


@pytest.mark.parametrize("inside", [True, False], ids=["turned inside", "turned before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_rope_attention(shape, dtype, inside, monkeypatch):
    monkeypatch.setattr(rope_file, "rotates_inside", lambda *_: inside)
    (*_, H, Hkv, _, _), (qkv, cos, sin, padding, upstream) = shape, make(*shape, dtype)
    where = cos, sin, H, Hkv, padding

    def ours(x):
        return kernels.rope_attention(x, *where)

    o, dqkv = check(ours, lambda x: rope_file.rope_attention_ref(x, *where), [qkv], [upstream])
    assert dqkv[:, :3, : (H + Hkv) * shape[4]].eq(0).all()  # q and k of rows that the table turns to zero
    if DEVICE == "cuda" or shape[1] < 64:  # the interpreter runs one program after the other: little can differ there
        assert torch.equal(ours(qkv), o) and torch.equal(grad(ours, qkv, upstream), dqkv)


@pytest.mark.parametrize("padding", [None, (0, 9)], ids=name)
@pytest.mark.parametrize("Hkv", [4, 2, 1])
def test_torch_path(Hkv, padding):
    kernels.use("torch")
    for dtype in (torch.float32, torch.bfloat16):
        qkv, cos, sin, padding_, upstream = make(2, 33, 4, Hkv, 20, padding, dtype)
        where = cos, sin, 4, Hkv, padding_
        check(
            lambda x, where=where: kernels.rope_attention(x, *where),
            lambda x, where=where: rope_file.rope_attention_ref(x, *where), [qkv], [upstream],
        )


def test_padding_is_not_seen():
    """Other values in the padding change nothing behind it, and nothing flows back into it from there."""
    for mode in ("triton", "torch"):
        kernels.use(mode)
        qkv, cos, sin, padding, upstream = make(2, 40, 2, 2, 16, (7, 0), torch.float32, zeros=0)
        other = qkv.clone()
        other[0, :7] = torch.randn_like(other[0, :7])
        a, b = (kernels.rope_attention(x, cos, sin, 2, padding=padding) for x in (qkv, other))
        assert torch.equal(a[0, 7:], b[0, 7:]) and torch.equal(a[1], b[1])
        torch.testing.assert_close(a[0, :7], qkv[0, :7, -32:])  # each padded token gets its own v
        upstream[0, :7] = 0
        where = cos, sin, 2, None, padding
        dqkv = grad(lambda x, where=where: kernels.rope_attention(x, *where), qkv, upstream)
        assert dqkv[0, :7].eq(0).all()


def test_layouts_of_tables_and_padding():
    """int64 padding, negative (none) or past the end; tables and padding with strides."""
    qkv, cos, sin, padding, upstream = make(4, 19, 2, 1, 16, (0, 4, 19, 0), torch.float32)
    odd = torch.tensor([[-70, 4, 99, 0]] * 2, device=DEVICE).t()[:, 0]
    cos2, sin2 = (torch.stack([x, x], -1)[..., 0] for x in (cos, sin))
    a = kernels.rope_attention(qkv, cos, sin, 2, 1, padding)
    b = kernels.rope_attention(qkv, cos2, sin2, 2, 1, odd)
    assert a.isfinite().all() and torch.equal(a, b)
    o, lse = torch.ops.nanollamagen.rope_attention(qkv, cos, sin, 2, 1, padding)
    strided = torch.stack([o, o], -1)[..., 0]
    backward = torch.ops.nanollamagen.rope_attention_backward
    grads = [backward(upstream, x, lse, qkv, cos, sin, 2, 1, padding) for x in (o, strided)]
    assert torch.equal(*grads)


def test_where_the_rotation_is_done():
    for T, D, group, masked, arch, inside in (
        (256, 64, 1, False, "sm_90", True), (256, 64, 1, False, "sm_100", True), (256, 64, 1, False, "sm_80", False),
        (1024, 64, 1, False, "sm_90", False), (256, 100, 1, False, "sm_90", False), (256, 64, 2, False, "sm_90", False),
        (256, 64, 1, True, "sm_90", False),
    ):
        assert rope_file.rotates_inside(T, D, group, masked, arch) is inside


def test_tiles_divide_each_other():
    """Blocks of keys before the diagonal are whole, which the kernels rely on."""
    for (kernel, _), tiles in rope_file.TILES.items():
        for m, n, *_ in tiles.values():
            assert (n % m if kernel == "dkv" else m % n) == 0


@pytest.mark.parametrize("kind", ["columns", "sliced batch", "expanded gradient"])
def test_strides(kind):
    qkv, cos, sin, padding, upstream = make(3, 19, 2, 1, 16, (0, 4, 9), torch.float32)
    fn = lambda x: kernels.rope_attention(x, cos, sin, 2, 1, padding)  # noqa: E731
    x, g = qkv, upstream
    if kind == "columns":
        x = torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]]
    elif kind == "sliced batch":
        x = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        g = upstream[:1, :1, :1].expand_as(upstream)
    assert torch.equal(fn(x), fn(qkv)) and torch.equal(grad(fn, x, g), grad(fn, qkv, g.contiguous()))


def test_no_samples():
    qkv, cos, sin, _, upstream = make(0, 5, 2, 2, 16, None, torch.float32)
    assert grad(lambda x: kernels.rope_attention(x, cos, sin, 2), qkv, upstream).shape == qkv.shape


@pytest.mark.parametrize("padding", [None, (0, 4)], ids=name)
def test_opcheck(padding):
    qkv, cos, sin, padding, upstream = make(2, 9, 2, 1, 16, padding, torch.float32)
    ops = torch.ops.nanollamagen
    torch.library.opcheck(ops.rope_attention.default, (qkv.clone().requires_grad_(), cos, sin, 2, 1, padding))
    o, lse = ops.rope_attention(qkv, cos, sin, 2, 1, padding)
    torch.library.opcheck(ops.rope_attention_backward.default, (upstream, o, lse, qkv, cos, sin, 2, 1, padding))


@pytest.mark.parametrize("backend", ["inductor"] if DEVICE == "cuda" else ["aot_eager"])
def test_compile_autocast_checkpoint(backend):
    """The operation between two projections, compiled, under autocast and recomputed, equals the plain call."""
    qkv, cos, sin, padding, _ = make(2, 12, 2, 2, 16, (0, 3), torch.float32)
    x, w = qkv[..., :32].clone().requires_grad_(), torch.randn(96, 32, device=DEVICE, requires_grad=True)

    def block(x, w):
        return kernels.rope_attention(x @ w.t(), cos, sin, 2, padding=padding)

    def step(fn):
        y = fn(x, w)
        return [y, *torch.autograd.grad(y.square().sum(), (x, w))]

    dynamic = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    plain = step(block)
    for fn in (compiled, dynamic, lambda x, w: checkpoint(block, x, w, use_reentrant=False)):
        for a, b in zip(step(fn), plain, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast(DEVICE, torch.float16):
        half = step(block)
        assert half[0].dtype == torch.float16
        for a, b in zip(step(compiled), half, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_gradcheck_of_the_torch_path():
    kernels.use("torch")
    qkv, cos, sin, padding, _ = make(2, 5, 2, 1, 4, (0, 2), torch.float64)
    fn = lambda x: kernels.rope_attention(x, cos, sin, 2, 1, padding)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (qkv.requires_grad_(),))


def test_what_it_refuses():
    qkv, cos, sin, padding, _ = make(2, 5, 2, 1, 16, (0, 2), torch.float32)
    for wrong in (
        (qkv[..., 1:], cos, sin, 2, 1, padding), (qkv, cos[1:], sin, 2, 1, padding),
        (qkv, cos, sin[:, 1:], 2, 1, padding), (qkv, cos, sin, 3, 2, padding), (qkv, cos, sin, 2, 1, padding[:1]),
        (qkv[0], cos, sin, 2, 1, None),
    ):
        with pytest.raises(ValueError, match="rope_attention"):
            kernels.rope_attention(*wrong)
    with pytest.raises(ValueError, match="padding has to be int32 or int64, not torch.float32"):
        kernels.rope_attention(qkv, cos, sin, 2, 1, padding.float())
    with pytest.raises(RuntimeError, match="no gradient of cos and sin"):
        kernels.rope_attention(qkv, cos.clone().requires_grad_(), sin, 2, 1, padding)
    with pytest.raises(RuntimeError, match="132 channels"):
        kernels.rope_attention(torch.zeros(1, 3, 3 * 132, device=DEVICE), *torch.zeros(2, 3, 66, device=DEVICE), 1)
