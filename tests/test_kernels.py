"""Kernels against float64, on a GPU, or on the CPU under Triton's interpreter."""

import ast
import importlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels

codebook_file, rms_norm_file, swiglu_file = (
    importlib.import_module(f"kernels.{name}") for name in ("codebook", "rms_norm", "swiglu")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = DEVICE == "cuda" or bool(os.environ.get("NANOLLAMAGEN_PTX"))  # then products and sums are fused
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")


def name(value):
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.fixture(autouse=True)
def triton_kernels():
    """Kernels on, and every torch.empty filled with NaN or the largest integer, so that an unwritten output shows."""
    before = kernels.use("triton")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)
    kernels.use(before)


def run(fn, inputs, upstream, dtype=None):
    """Outputs of fn and gradients of its inputs, in one list."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = fn(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    grads = torch.autograd.grad(outputs, inputs, [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)])
    return outputs + list(grads)


def check(kernel, reference, inputs, upstream):
    """RMS error of the kernel <= 2x that of the reference in the same dtype + 1 ulp, both against float64; no element
    is off by more than 4x the reference's worst + 1 ulp: in one draw the worst is luck, and differs between CPUs."""
    exact, got = run(reference, inputs, upstream, torch.float64), run(kernel, inputs, upstream)
    for ours, torchs, true in zip(got, run(reference, inputs, upstream), exact, strict=True):
        assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
        if true.numel():
            ulp = torch.finfo(ours.dtype).eps * true.abs().max()
            mine, theirs = (ours - true).abs(), (torchs - true).abs()
            assert mine.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + ulp / 12**0.5  # evenly in +-ulp/2
            assert mine.max() <= 4 * theirs.max() + ulp, f"{mine.max()} > 4 x {theirs.max()} + {ulp}"
    return got


def layout(x, kind):
    """x with the values it has, differently strided."""
    if kind == "columns":  # a slice of wider rows
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if kind == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if kind == "transposed" else x


ROWS = [((4, 9, 1024), "plain"), ((3, 5, 1280), "columns"), ((7, 768), "strided"), ((5, 3, 97), "transposed"),
        ((131, 7), "plain"), ((3, 1), "plain"), ((2, 8192), "plain"), ((70,), "strided"),
        ((0, 64), "plain"), ((2, 0, 64), "plain")]

PAIRS = [((3, 5, 2 * 2816), "plain"), ((4, 2 * 1031), "columns"), ((6, 2 * 96), "strided"), ((4, 3, 256), "transposed"),
         ((37, 2 * 3), "plain"), ((5, 2), "plain"), ((0, 64), "plain"), ((2, 0, 64), "plain")]


@pytest.mark.parametrize("residual", [None, "same", torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape, kind", ROWS, ids=name)
def test_rms_norm(shape, kind, dtype, residual):
    stream = dtype if residual == "same" else residual
    if residual == dtype:
        pytest.skip("the same as 'same'")
    x = layout(torch.randn(shape, device=DEVICE).to(dtype), kind)
    inputs = [x, torch.rand(shape[-1], device=DEVICE) + 0.5]
    if residual is not None:
        inputs.append(layout(3 * torch.randn(shape, device=DEVICE).to(stream), kind))
    upstream = [torch.randn(shape, device=DEVICE).to(t) for t in (dtype, stream)[: len(inputs) - 1]]

    eps = 0.5 if shape[-1] == 1 else 1e-5  # x / |x| has no gradient: nothing but rounding would be compared

    def call(function):
        return lambda x, weight, *rest: function(x, weight, eps, *rest)

    check(call(kernels.rms_norm), call(rms_norm_file.rms_norm_ref), inputs, upstream)


def dropped(x, weight, residual, share=0.3):
    """The same elements of x are dropped every time."""
    torch.manual_seed(1)
    return kernels.rms_norm(x, weight, 1e-5, residual, share)


@pytest.mark.parametrize("residual", ["same", torch.float32], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape, kind", ROWS, ids=name)
def test_rms_norm_dropout(shape, kind, dtype, residual):
    stream, ones = dtype if residual == "same" else residual, torch.ones(shape, device=DEVICE)
    inputs = [layout(torch.randn(shape, device=DEVICE).to(dtype), kind), torch.rand(shape[-1], device=DEVICE) + 0.5,
              layout(3 * torch.randn(shape, device=DEVICE).to(stream), kind)]
    upstream = [torch.randn(shape, device=DEVICE).to(t) for t in (dtype, stream)]
    factor = dropped(ones, ones.new_ones(shape[-1]), torch.zeros_like(ones))[1]
    torch.testing.assert_close(factor.unique(), factor.unique().where(factor.unique() == 0, 1 / 0.7))

    def reference(x, weight, residual):
        return rms_norm_file.rms_norm_ref(x * factor.to(x.dtype), weight, 1e-5, residual)

    check(dropped, reference, inputs, upstream)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropped_elements_are_random(share):
    """Their share, and how often neighbours, rows and runs agree, are those of independent draws to five sigma."""
    x, weight, runs = torch.ones(256, 96, device=DEVICE), torch.ones(96, device=DEVICE), []
    for seed in range(2):
        torch.manual_seed(seed)
        runs.append(kernels.rms_norm(x, weight, 1e-5, torch.zeros_like(x), share)[1] == 0)
    lost = runs[0]
    pairs = [(lost[:, i:], lost[:, :-i]) for i in range(1, 9)] + [(lost[i:], lost[:-i]) for i in (1, 2, 64)]
    for found, expected in [(lost, share), *((a & b, share**2) for a, b in [*pairs, runs])]:
        sigma = (expected * (1 - expected) / found.numel()) ** 0.5
        assert abs(found.float().mean().item() - expected) < 5 * sigma
    assert (lost.float().mean(0) - share).abs().max() < 5 * (share * (1 - share) / len(lost)) ** 0.5  # every column
    for share, s in ((0.0, x), (1.0, 0 * x)):
        assert torch.equal(kernels.rms_norm(x, weight, 1e-5, torch.zeros_like(x), share)[1], s)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_rms_norm_backward_stores_both_dtypes(dtype):
    """Branch in half precision, stream in float32: one pass, without a cast after it."""
    dy, s, ds = (torch.randn(5, 40, device=DEVICE) for _ in range(3))
    weight, backward = torch.rand(40, device=DEVICE), rms_norm_file._rms_norm_backward
    for add in (None, ds):
        dx, dbranch, dweight = backward(dy.to(dtype), add, s, weight, 1e-5, dtype, 0.0, None)
        assert dx.dtype == s.dtype and dbranch.dtype == dtype and torch.equal(dbranch, dx.to(dtype))
    dx, dbranch, dweight = backward(dy, ds, s, weight, 1e-5, s.dtype, 0.0, None)
    assert dx.shape == s.shape and dbranch.shape == (0,) and dweight.shape == weight.shape


def test_rms_norm_one_output_used():
    x, weight, residual = torch.randn(3, 40), torch.rand(40), torch.randn(3, 40)
    for used in (0, 1):
        inputs = [t.to(DEVICE).requires_grad_() for t in (x, weight, residual)]
        ours, theirs = (
            torch.autograd.grad(fn(inputs[0], inputs[1], 1e-5, inputs[2])[used].sum(), inputs, allow_unused=True)
            for fn in (kernels.rms_norm, rms_norm_file.rms_norm_ref)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape, kind", PAIRS, ids=name)
def test_swiglu(shape, kind, dtype):
    x = layout(2 * torch.randn(shape, device=DEVICE).to(dtype), kind)
    upstream = [torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE).to(dtype)]
    check(kernels.swiglu, swiglu_file.swiglu_ref, [x], upstream)


def exact_scores(z, codes, l2):
    """Float64 scores [N, K]; the largest is the nearest."""
    z, codes = z.double(), codes.double()
    return z @ codes.t() if l2 else -torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist").square()


def unit(*shape):
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1)


SEARCHES = [(300, 1000, 8), (129, 517, 4), (64, 1, 8), (1, 3, 5), (130, 131, 16), (67, 300, 31), (100, 260, 64),
            (40, 130, 100), (50, 140, 256)]


@pytest.mark.parametrize("l2", [True, False], ids=["l2", "euclid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("N, K, D", SEARCHES, ids=name)
def test_nearest_code(N, K, D, dtype, l2):
    make = unit if l2 else lambda *shape: torch.randn(shape, device=DEVICE)
    z, codes = make(N, D).to(dtype), make(K, D).to(dtype)
    scores = exact_scores(z, codes, l2)
    for mode, slack in (("triton", 1e-14), ("torch", 2e-6 * D**0.5)):
        kernels.use(mode)
        index = kernels.nearest_code(z, codes, l2)
        assert index.dtype == torch.int64 and index.shape == (N,)
        gap = scores.amax(1) - scores.gather(1, index[:, None])[:, 0]
        assert (gap <= slack * scores.abs().amax(1)).all(), mode


@pytest.mark.parametrize("scale, shift", [(1e4, 0), (1e-4, 0), (1, 50), (1e-12, 0), (1e12, 0)])
def test_nearest_code_ranges(scale, shift):
    """Far from unit: float16 parts neither overflow nor lose the small, and a common offset does not cancel."""
    z, codes = (scale * (torch.randn(n, 8, device=DEVICE) + shift) for n in (130, 300))
    z[:5] = codes[[7, 7, 290, 0, 150]]
    for l2 in (False, True):
        index = kernels.nearest_code(z, codes, l2)
        assert torch.equal(index, exact_scores(z, codes, l2).argmax(1))


def test_nearest_code_not_contiguous():
    z, codes = unit(8, 150).t(), unit(300, 16)[:, ::2]
    assert torch.equal(kernels.nearest_code(z, codes), exact_scores(z, codes, True).argmax(1))


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("l2", [True, False], ids=["l2", "euclid"])
def test_nearest_code_ties(mode, l2):
    """Equal codes in one group, in two blocks of a slot, and in so many that all codes are rescanned."""
    kernels.use(mode)
    codes = F.normalize(torch.randint(-3, 4, (600, 8), device=DEVICE).float(), dim=-1)
    codes[[5, 6, 133, 300]] = unit(1, 8).expand(4, 8)
    codes[[261, 389, 517]] = codes[133 + 4].expand(3, 8)
    z = codes[[300, 517, 599, 6, 133, 389]]
    expected = torch.stack([(codes == row).all(1).nonzero()[0, 0] for row in z])
    assert torch.equal(kernels.nearest_code(z, codes, l2), expected)
    assert kernels.nearest_code(z, codes[:1].expand(300, 8), l2).eq(0).all()


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("l2", [True, False], ids=["l2", "euclid"])
def test_nearest_code_edges(mode, l2):
    kernels.use(mode)
    z, codes = unit(6, 8), unit(9, 8) * (1 if l2 else torch.arange(9, 0, -1, device=DEVICE)[:, None])
    good = exact_scores(z, codes, l2).argmax(1)
    z[0, 0], z[1, 7], z[2, 3], z[3] = float("nan"), float("inf"), -float("inf"), 0
    index = kernels.nearest_code(z, codes, l2)
    assert index[:3].eq(0).all() and torch.equal(index[4:], good[4:])
    assert index[3] == exact_scores(z[3:4], codes, l2).argmax()
    assert kernels.nearest_code(z[:0], codes, l2).shape == (0,)
    for wrong in (codes[:0], codes[:, :4], codes[0]):
        with pytest.raises(ValueError, match="nearest_code needs"):
            kernels.nearest_code(z, wrong, l2)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_nearest_code_ignores_precision_settings(mode):
    kernels.use(mode)
    z, codes = unit(200, 8), unit(400, 8)
    expected = exact_scores(z, codes, True).argmax(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(kernels.nearest_code(z, codes), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def parts(x, scale):
    """The two float16 parts of x * scale, as float32."""
    hi = (x * scale).half()
    return hi.float(), (x * scale - hi.float()).half().float()


def cut(x):
    """Float64 x cut towards zero to the 24 bits of a float32."""
    return (x.view(torch.int64) & -(1 << 29)).view(torch.float64).float()


def truncated_mma(a, b):
    """a [n, depth] @ b [depth, K] in float32 as tensor cores may do it, 16 deep at a time.

    16 exact products and the sum so far lose what is below the 24 bits of the largest of them, then so does their sum.
    """
    acc = torch.zeros(len(a), b.shape[1])
    for k in range(0, a.shape[1], 16):
        terms = a[:, k : k + 16, None] * b[k : k + 16]  # n, 16, K: products of float16 values, exact
        largest = torch.maximum(torch.maximum(terms.amax(1), -terms.amin(1)), acc.abs()).clamp_(min=1e-20)
        exponent = largest.view(torch.int32) >> 23
        inverse, step = ((n << 23).view(torch.float32) for n in (277 - exponent, exponent - 23))
        total = terms.mul_(inverse[:, None]).trunc_().sum(1, dtype=torch.float64) + (acc * inverse).trunc_()
        acc = cut(total) * step
    return acc


@pytest.mark.parametrize("D, K, share", [(8, 16384, 16), (32, 4096, 8)], ids=["D=8", "D=32"])
def test_nearest_code_arithmetic_at_full_size(D, K, share):
    """K unit vectors against K codes: the search keeps the exact winner's group, always.

    One share-th of the vectors is searched in truncating arithmetic, the others by float32 sums of the same parts.
    """
    generator, config = torch.Generator().manual_seed(1), codebook_file.launch_config(D)
    z, codes = (F.normalize(torch.randn(K, D, generator=generator), dim=-1) for _ in range(2))
    norms, (block, slots, pair) = codes.norm(dim=1), (config[k] for k in ("BLOCK_K", "SLOTS", "PAIR"))
    z_scale = torch.exp2(14 - z.abs().amax(1, keepdim=True).log2().floor())
    scale = torch.exp2(14 - norms.max().log2().floor())
    (z_hi, z_lo), (e_hi, e_lo) = parts(z, z_scale), parts(codes, scale)
    order = [(z_lo, e_hi), (z_lo, e_lo), (z_hi, e_hi), (z_hi, e_lo)] if D <= 8 else [
        (z_lo, e_hi), (z_hi, e_lo), (z_hi, e_hi)]
    a, b = (torch.cat(side, 1) for side in zip(*order, strict=True))
    b, margin = b.t().contiguous(), config["MARGIN"] * (z * z_scale).norm(dim=1) * (norms.max() * scale)

    wrong, groups, crowded, worst, n = 0, 0, 0, 0.0, K // share
    for i, rows in enumerate(torch.arange(K).split(n)):
        exact = z[rows].double() @ codes.double().t()
        if i == 0:  # worst case: the bound holds for truncating hardware
            scores = torch.cat([truncated_mma(part, b) for part in a[rows].split(4)])
            error = (scores - exact * z_scale[rows] * scale.double()).abs().amax(1)
            worst = (error / margin[rows]).max().item()
        else:
            scores = a[rows] @ b
        best = scores.view(n, K // block, -1, slots, pair).amax((2, 4))
        kept = best >= (best.amax((1, 2)) - margin[rows])[:, None, None]
        groups, crowded = groups + kept.sum().item(), crowded + (kept.sum(1) > 2).any(1).sum().item()
        kept = kept[:, :, None, :, None].expand(-1, -1, block // (slots * pair), -1, pair).reshape(n, K)
        index = exact.masked_fill(~kept, -2).argmax(1)
        wrong += (exact.gather(1, index[:, None])[:, 0] < exact.amax(1)).sum().item()
    print(f"groups per vector {groups / K:.4f}, third near-ties {crowded}, truncation / margin {worst:.3f}")
    assert worst <= 0.5 and wrong == 0 and groups < 1.05 * K and crowded <= 2


def test_code_usage():
    for shape in ((300,), (3, 5, 7), (0,)):
        index = torch.randint(0, 50, shape, device=DEVICE)
        usage = kernels.code_usage(index, 64)
        assert usage.dtype == torch.int64 and torch.equal(usage, torch.bincount(index.flatten(), minlength=64))


def test_opcheck():
    x, w, r = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((5, 40), (40,), (5, 40)))
    ops, seed = torch.ops.nanollamagen, torch.tensor([7], device=DEVICE)
    for op, args in (
        (ops.rms_norm, (x, w, 1e-5)), (ops.swiglu, (x,)),
        (ops.add_rms_norm, (x, w, 1e-5, r, 0.0, None)), (ops.add_rms_norm, (x, w, 1e-5, r, 0.5, seed)),
        (ops.rms_norm_backward, (x.detach(), None, r.detach(), w.detach(), 1e-5, torch.float32, 0.0, None)),
        (ops.rms_norm_backward, (x.detach(), r.detach(), r.detach(), w.detach(), 1e-5, torch.float32, 0.5, seed)),
        (ops.rms_norm_backward, (x.detach().half(), r.detach(), r.detach(), w.detach(), 1e-5, torch.half, 0.0, None)),
        (ops.swiglu_backward, (x.detach()[:, :20], x.detach())),
        (ops.nearest_code, (unit(7, 8), unit(9, 8), True, True)),
        (ops.nearest_code, (unit(7, 8), unit(9, 8), False, False)),
    ):
        torch.library.opcheck(op.default, args)


def test_gradcheck_of_the_torch_path():
    kernels.use("torch")
    x, w, r = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (3, 6)))
    assert torch.autograd.gradcheck(lambda *t: kernels.rms_norm(t[0], t[1], 1e-5, t[2]), (x, w, r))
    assert torch.autograd.gradcheck(kernels.swiglu, (x,))


@pytest.mark.parametrize("backend", ["inductor"] if DEVICE == "cuda" else ["aot_eager", "inductor"])
def test_compile_equals_eager(backend):
    """Compiled anew: a cached graph does not know that an operation's backward has changed since."""
    x, w, r = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((6, 32), (32,), (6, 32)))
    codes = unit(40, 8)

    def block(x, w, r):
        y, s = kernels.rms_norm(x, w, 1e-5, r)
        y = kernels.rms_norm(kernels.swiglu(y), w[:16], 1e-5)
        return y, s, kernels.nearest_code(y.view(-1, 8), codes, False)

    def step(fn):
        y, s, index = fn(x, w, r)
        return [y, s, index, *torch.autograd.grad(y.sum() + s.square().sum(), (x, w, r))]

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch._inductor.config.patch(force_disable_caches=True):
        for a, b in zip(step(compiled), step(block), strict=True):
            torch.testing.assert_close(a, b)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert step(compiled)[0].dtype == torch.float32


def test_compiled_dropout():
    """The seed is drawn within the compiled graph: other elements in every call, the same again backward."""
    x, w, r = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((64, 32), (32,), (64, 32)))
    compiled = torch.compile(lambda x, w, r: kernels.rms_norm(x, w, 1e-5, r, 0.5), fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        first, second = compiled(x, w, r)[1], compiled(x, w, r)[1]
        (dx,) = torch.autograd.grad(second.sum(), x)
    assert 0.4 < (second == r).float().mean() < 0.6 and not torch.equal(first == r, second == r)
    assert torch.equal(dx, 2.0 * (second != r))


def test_switch():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="auto, triton, torch"):
        kernels.use("cuda")
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        kernels.swiglu(x.double().to(DEVICE))
    with pytest.raises(RuntimeError, match="wider than 8192"):
        kernels.rms_norm(torch.ones(1, 9000, device=DEVICE), torch.ones(9000, device=DEVICE), 1e-5)
    with pytest.raises(ValueError, match="even"):
        kernels.swiglu(x[:, :3])
    with pytest.raises(ValueError, match="weight"):
        kernels.rms_norm(x, torch.ones(3), 1e-5)
    for residual, share in ((x, 1.1), (x, -0.1), (None, 0.5)):
        with pytest.raises(ValueError, match=f"not {share}"):
            kernels.rms_norm(x, torch.ones(4), 1e-5, residual, share)
    assert kernels.use("auto") == "triton"
    assert not kernels.use_triton(x) and kernels.swiglu(x.double()).dtype == torch.float64


def test_unserved_gpu_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Old GPU")
    kernels._find_obstacle.cache_clear()
    with pytest.warns(UserWarning, match="Old GPU has a compute capability below 8.0"):
        assert kernels._find_obstacle("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels._find_obstacle("cuda", 0)
    kernels._find_obstacle.cache_clear()


@pytest.mark.parametrize("capability, hip, name", [
    ((8, 9), None, "sm_80"), ((9, 0), None, "sm_90"), ((10, 3), None, "sm_100"), ((12, 0), None, "sm_80"),
    ((9, 4), "6.4", "hip"),
])
def test_architecture(capability, hip, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels.architecture(types.SimpleNamespace(is_cuda=True, device="cuda:0")) == name


UNMASKED = {  # a number; whole blocks, to which the packed codes are padded; parts, as many as a block
    "codebook": ["e_ptrs", "e_ptrs + PART + d0", "e_ptrs + d0", "half_ptr + offs_k", "half_ptr + offs_k",
                 "packed_ptr + offs_k[:, None] * (2 * PART) + offs_w", "top_ptr", "top_ptr"],
    "cross_entropy": ["loss_ptr + row", "target_ptr + row"],
    "decode": ["padding_ptr + b", "position_ptr", "top_ptr + part", "top_ptr + row * SPLITS + offs_s",
               "total_ptr + part", "total_ptr + row * SPLITS + offs_s"],
    "rms_norm": ["seed_ptr"], "rope_attention": ["padding_ptr + b", "padding_ptr + b"],
    "sampling": ["code_ptr + B + pid_b", "code_ptr + pid_b", "index_ptr"],
}


def test_every_block_is_read_and_written_under_a_mask():
    """Outside of a tensor there is mostly memory, which tests do not notice."""
    found = {}
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            masked = any(keyword.arg == "mask" for keyword in call.keywords)
            if ast.unparse(call.func) in ("tl.load", "tl.store") and not masked:
                found.setdefault(path.stem, []).append(ast.unparse(call.args[0]))
    assert {name: sorted(places) for name, places in found.items()} == UNMASKED


@pytest.mark.parametrize("code, says", [
    ("import kernels", "RuntimeError: Triton kernels cannot run: PyTorch sees no GPU (TRITON_INTERPRET=1 runs"),
    ("import os, sys; sys.modules['triton'] = None; del os.environ['NANOLLAMAGEN_KERNELS']\n"
     "import kernels, torch; kernels.swiglu(torch.ones(2, 4)); kernels.use('triton')", "RuntimeError: Triton kernels"),
], ids=["asked for by the environment", "without the package triton"])
def test_where_triton_cannot_run(code, says):
    env = {**os.environ, "NANOLLAMAGEN_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert out.returncode and says in out.stderr.splitlines()[-1]
