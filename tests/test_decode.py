"""Attention of one token over a cache against float64, on a GPU, or under Triton's interpreter."""

import importlib

import pytest
import torch
from test_kernels import COMPILED, DEVICE, DTYPES, name, triton_kernels  # noqa: F401 - the fixture serves all tests here

import kernels

decode_file, rope_file = (importlib.import_module(f"kernels.{name}") for name in ("decode", "rope_attention"))
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

# B, S, H, G, D, and padding, more of it than keys, too
SHAPES = [(2, 150, 2, 2, 64, None), (2, 150, 4, 2, 64, (70, 0)), (3, 70, 2, 2, 100, (0, 33, 90)),
          (1, 70, 2, 1, 100, None), (3, 261, 2, 2, 16, (1, 200, 999)), (1, 1, 3, 1, 20, None)]
if DEVICE == "cuda":
    SHAPES += [(16, 256, 16, 16, 64, None), (2, 695, 32, 32, 100, (0, 119)), (3, 4096, 8, 2, 128, (0, 0, 4000))]


def make(B, S, H, G, D, padding, dtype, cache_dtype=None):
    """A projection, tables longer than the cache, a cache of more samples and layers, and padding."""
    qkv = torch.randn(B, (H + 2 * G) * D, device=DEVICE).to(dtype)
    angles = 7 * torch.randn(S + 3, D // 2, device=DEVICE)
    caches = torch.randn(2, 2, B + 2, G, S, -(-D // 8) * 8, device=DEVICE).to(cache_dtype or dtype)
    padding = None if padding is None else torch.tensor(padding, device=DEVICE)
    return qkv, angles.cos(), angles.sin(), *caches, padding


def at(position):
    return torch.tensor([position], device=DEVICE)


def exact(qkv, cos, sin, k_cache, v_cache, position, H, G, padding):
    """In float64, sample by sample and head by head: y, and the new rows of k and v in float32."""
    B, D = len(qkv), 2 * cos.shape[1]
    x = qkv.float().view(B, H + 2 * G, D)
    a, b, c, s = x[..., 0::2], x[..., 1::2], cos[position], sin[position]
    turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(2)
    k_new, v_new = turned[:, H : H + G], x[:, H + G :]
    y = torch.empty(B, H, D, dtype=torch.float64, device=DEVICE)
    for i in range(B):
        first = 0 if padding is None else min(int(padding[i]), position)
        for h in range(H):
            g = h // (H // G)
            k = torch.cat([k_cache[i, g, first:position, :D], k_new[i, g, None].to(k_cache.dtype)]).double()
            v = torch.cat([v_cache[i, g, first:position, :D], v_new[i, g, None].to(v_cache.dtype)]).double()
            y[i, h] = (k @ turned[i, h].double() / D**0.5).softmax(0) @ v
    return y.flatten(1), k_new.to(k_cache.dtype), v_new.to(v_cache.dtype)


def poison(caches, B, D, position, padding, skipped):
    """NaN wherever nothing is to be read: other samples, later rows, the pad of rows, and padding that is skipped."""
    for cache in caches:
        cache[:, B:], cache[:, :B, :, position:], cache[..., D:] = float("nan"), float("nan"), float("nan")
        for i in range(B if skipped and padding is not None else 0):
            cache[1, i, :, : min(int(padding[i]), position)] = float("nan")


def check(shape, dtype, position, cache_dtype=None):
    """One call over the first samples of a bigger cache, of which layer 1 is used, and what it leaves there."""
    B, _, H, G, D, _ = shape
    qkv, cos, sin, *caches, padding = make(*shape, dtype, cache_dtype)
    poison(caches, B, D, position, padding, skipped=kernels.mode() == "triton")
    before, layer = [x.clone() for x in caches], [x[1, :B] for x in caches]
    y, *new = exact(qkv, cos, sin, *layer, position, H, G, padding)
    got = kernels.decode_attention(qkv, cos, sin, *layer, at(position), H, G, padding)
    assert got.dtype == dtype and got.shape == y.shape
    error, eps = (got - y).abs().max(), torch.finfo(dtype).eps
    assert error <= eps * y.abs().max() + 1e-5, f"{error} at {position}"  # rounding of y, and of float32 sums
    for cache, old, rows in zip(caches, before, new, strict=True):
        fused = COMPILED or kernels.mode() == "torch"  # the products of the rotation, in a complex product too
        ulp = torch.finfo(cache.dtype).eps if fused else 0
        torch.testing.assert_close(cache[1, :B, :, position, :D], rows, rtol=ulp, atol=4 * ulp)
        cache[1, :B, :, position, :D] = old[1, :B, :, position, :D]
        assert torch.equal(cache.nan_to_num(7), old.nan_to_num(7))  # nothing else was written


def positions(shape):
    return sorted({0, min(1, shape[1] - 1), shape[1] // 2, shape[1] - 1})


RUNS = [*((dtype, 1) for dtype in DTYPES), (torch.float32, 2), (torch.bfloat16, 4)]


@pytest.mark.parametrize("dtype, splits", RUNS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_decode_attention(shape, dtype, splits, monkeypatch):
    monkeypatch.setattr(decode_file, "count_splits", lambda *_: splits)
    for position in positions(shape):
        check(shape, dtype, position)
    if dtype == torch.float32 and splits == 1:  # what the token sees of itself is rounded as it is in the cache
        check(shape, dtype, shape[1] - 1, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_torch_path(shape, dtype):
    """On a CPU, where the cache of a half-precision model is float32; on a GPU it reads all of a cache without NaN."""
    kernels.use("torch")
    if DEVICE == "cpu":
        for position in positions(shape):
            check(shape, dtype, position)
            check(shape, dtype, position, torch.float32)
        return
    B, S, H, G, _, _ = shape
    qkv, cos, sin, *caches, padding = make(*shape, dtype)
    layer = [x[1, :B] for x in caches]
    y, *_ = exact(qkv, cos, sin, *layer, S // 2, H, G, padding)
    got = kernels.decode_attention(qkv, cos, sin, *layer, at(S // 2), H, G, padding)
    torch.testing.assert_close(got.double(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("padding", [None, (0, 3)], ids=name)
def test_steps_equal_the_whole_sequence(padding, mode):
    kernels.use(mode)
    B, T, H, G, D = 2, 9, 4, 2, 16
    qkv, table, caches = torch.randn(B, T, (H + 2 * G) * D), torch.randn(2, T, D // 2), torch.zeros(2, B, G, T, D)
    qkv, cos, sin, k, v = (x.to(DEVICE) for x in (qkv, *table, *caches))
    padding = None if padding is None else torch.tensor(padding, dtype=torch.int32, device=DEVICE)
    whole = kernels.rope_attention(qkv, cos, sin, H, G, padding)
    steps = [kernels.decode_attention(qkv[:, t], cos, sin, k, v, at(t), H, G, padding) for t in range(T)]
    torch.testing.assert_close(torch.stack(steps, 1), whole)


def check_same(a, b, mode, strides=False):
    """Bit for bit, but for the PyTorch path on a GPU: cuBLAS picks its kernels, and with them the order of sums, by the
    number of products and by strides; and for kernels where strides differ, which are compiled for them."""
    near = DEVICE == "cuda" if mode == "torch" else COMPILED and strides
    torch.testing.assert_close(a, b, rtol=1e-5 * near, atol=1e-5 * near)


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("G, padding", [(4, None), (2, (5, 0, 9, 0, 2, 0, 0, 1))], ids=["plain", "grouped, padded"])
def test_rows_do_not_depend_on_the_batch(G, padding, mode, monkeypatch):
    kernels.use(mode)
    monkeypatch.setattr(decode_file, "count_splits", lambda *_: 1)
    qkv, cos, sin, *caches, padding = make(8, 40, 4, G, 64, padding, torch.float32)
    for position in (12, 37) if mode == "torch" else (37,):
        results = []
        for B in (1, 3, 8):
            layer, part = [x[0, :B] for x in caches], None if padding is None else padding[:B]
            results.append(kernels.decode_attention(qkv[:B], cos, sin, *layer, at(position), 4, G, part))
        for y in results:
            check_same(y, results[-1][: len(y)], mode)


def test_layouts():
    """Columns of wider rows, an odd offset in memory, rows of the cache apart, int32 padding below 0."""
    qkv, cos, sin, k, v, _ = make(3, 11, 2, 1, 16, None, torch.float32)
    padding = torch.tensor([-3, 4, 0], dtype=torch.int32, device=DEVICE)
    for mode in ("triton", "torch"):
        kernels.use(mode)
        results = []
        for x in (qkv, torch.cat([qkv, qkv], 1)[:, : qkv.shape[1]], torch.cat([qkv[:, :1], qkv], 1)[:, 1:],
                  torch.stack([qkv, qkv], 2)[..., 0]):
            apart = [x[0, :3].repeat(1, 1, 2, 1)[:, :, :11] for x in (k, v)]
            turned = [x[0, :3].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
            for caches in ([k[0, :3], v[0, :3]], apart, turned):
                y = kernels.decode_attention(x, cos, sin, *caches, at(7), 2, 1, padding)
                assert caches[0][:, :, 7].eq(k[0, :3, :, 7]).all()
                results.append(y)
        for y in results:
            check_same(y, results[0], mode, strides=True)


def test_caches_that_the_kernel_does_not_serve():
    qkv, cos, sin, k, v, _ = make(2, 5, 2, 2, 16, None, torch.float32)
    other = v[0, :2].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(RuntimeError, match="different strides"):
        kernels.decode_attention(qkv, cos, sin, k[0, :2], other, at(1), 2)
    kernels.use("torch")
    y = kernels.decode_attention(qkv, cos, sin, k[0, :2], other, at(1), 2)
    torch.testing.assert_close(y, kernels.decode_attention(qkv, cos, sin, k[0, :2], v[0, :2], at(1), 2))


def test_no_samples():
    for mode in ("triton", "torch"):
        kernels.use(mode)
        qkv, cos, sin, k, v, _ = make(0, 5, 2, 2, 16, None, torch.float32)
        assert kernels.decode_attention(qkv, cos, sin, k[0, :0], v[0, :0], at(1), 2).shape == (0, 32)


def test_count_splits():
    """Enough programs for every multiprocessor, a part never below eight blocks, always a power of two."""
    for programs, blocks, splits in ((256, 64, 1), (88, 64, 2), (32, 64, 8), (32, 9, 1), (32, 16, 2), (1, 10000, 256)):
        assert decode_file.count_splits(programs, blocks, 132) == splits


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_opcheck(mode):
    qkv, cos, sin, k, v, padding = make(2, 5, 2, 1, 16, (0, 2), torch.float32)
    args = qkv, cos, sin, k[0, :2].clone(), v[0, :2].clone(), at(3), 2, 1, padding, mode == "triton"
    torch.library.opcheck(torch.ops.nanollamagen.decode_attention.default, args)


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("backend", ["inductor"] if DEVICE == "cuda" else ["aot_eager"])
def test_compile(backend, mode):
    """Compiled between two projections, over one layer of a cache, it equals the plain call, in what it writes too."""
    kernels.use(mode)
    qkv, cos, sin, k, v, _ = make(2, 6, 2, 2, 16, None, torch.float32)
    w = torch.randn(32, 32, device=DEVICE)

    def step(x, k, v, position):
        y = kernels.decode_attention(x * 2, cos, sin, k[1, :2], v[1, :2], position, 2)
        return y @ w

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    k2, v2 = k.clone(), v.clone()
    with torch.no_grad():
        for position in (3, 4):
            plain, ours = step(qkv, k, v, at(position)), compiled(qkv, k2, v2, at(position))
            torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(k2, k)
    torch.testing.assert_close(v2, v)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("S", [256, 4096])  # in one part, and in several
def test_cuda_graph(S):
    """Captured once, replayed at every position."""
    qkv, cos, sin, k, v, _ = make(2, S, 2, 2, 64, None, torch.bfloat16)
    k, v, position = k[0, :2], v[0, :2], at(0)
    kernels.decode_attention(qkv, cos, sin, k, v, position, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.decode_attention(qkv, cos, sin, k, v, position, 2)
    for t in (0, 5, S // 2, S - 1):
        position.fill_(t)
        graph.replay()
        assert torch.equal(y, kernels.decode_attention(qkv, cos, sin, k, v, at(t), 2))


def test_what_it_refuses():
    qkv, cos, sin, k, v, padding = make(2, 5, 2, 1, 16, (0, 2), torch.float32)
    k, v, here = k[0, :2], v[0, :2], at(2)
    for wrong in (
        (qkv[:, 1:], cos, sin, k, v, here, 2, 1, padding), (qkv, cos[4:], sin[4:], k, v, here, 2, 1, padding),
        (qkv, cos, sin[:, 1:], k, v, here, 2, 1, padding), (qkv, cos, sin, k[:1], v[:1], here, 2, 1, padding),
        (qkv, cos, sin, k[..., :8], v[..., :8], here, 2, 1, padding), (qkv, cos, sin, k, v[:1], here, 2, 1, padding),
        (qkv, cos, sin, k, v, here[0], 2, 1, padding), (qkv, cos, sin, k, v, here, 2, 1, padding[:1]),
        (qkv, cos, sin, k, v, here, 3, 2, padding), (qkv[0], cos, sin, k, v, here, 2, 1, None),
    ):
        with pytest.raises(ValueError, match="decode_attention"):
            kernels.decode_attention(*wrong)
    wide = torch.zeros(2, 1, 1, 3, 136, device=DEVICE)
    with pytest.raises(RuntimeError, match="132 channels"):
        kernels.decode_attention(torch.zeros(1, 3 * 132, device=DEVICE), *wide[:, 0, 0, :, :66], *wide, at(0), 1)
    kernels.use("torch")
    for position in (-1, 5) if DEVICE == "cpu" else ():
        with pytest.raises(ValueError, match=f"position {position} "):
            kernels.decode_attention(qkv, cos, sin, k, v, at(position), 2, 1)
