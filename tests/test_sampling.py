"""Drawing codes against a float64 reference that sorts: the PyTorch path, and the kernel on a GPU or interpreted."""

import importlib

import numpy as np
import pytest
import torch
from test_kernels import DEVICE, DTYPES, name, triton_kernels  # noqa: F401 - the fixture serves all tests here

import kernels

sampling_file = importlib.import_module("kernels.sampling")
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

V, LAST = 96, float(np.nextafter(np.float32(1), np.float32(0)))
SETTINGS = [dict(), dict(top_k=7), dict(top_p=0.8), dict(top_k=20, top_p=0.6, temperature=0.7), dict(top_p=0.3),
            dict(temperature=3.0, top_k=1), dict(top_k=V + 5, top_p=0.999)]
INDEX = torch.zeros(1, dtype=torch.long, device=DEVICE)


def make_rows(n, width=V):
    """float32 [n, width]: random ones, rounded to bfloat16, in steps of 1/2, half -inf, one code, uniform, huge."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=g) * torch.rand(n, 1, generator=g).mul(5)
    x[1::7] = x[1::7].bfloat16().float()
    x[2::7] = x[2::7].mul(2).round().div(2)
    x[3::7] = x[3::7].masked_fill(torch.rand(x[3::7].shape, generator=g) < 0.5, -torch.inf)
    only = torch.randint(width, (len(x[4::7]), 1), generator=g)
    x[4::7] = torch.full_like(x[4::7], -torch.inf).scatter(1, only, 1.5)
    x[5::7] = x[5::7, :1].clone()
    x[6::7] *= 1e4
    x[::7, ::3] = torch.where(torch.rand(x[::7, ::3].shape, generator=g) < 0.5, -0.0, 0.0)  # zeros of both signs tie
    return x.to(DEVICE)


def kept_mass(row, temperature=1.0, top_k=0, top_p=1.0):
    """float64 probabilities of the codes that are kept, and whether rounding may move the edge of top-p.

    Written over the distinct values from the largest down, with their counts.
    """
    row = row.double().cpu().numpy()
    values, counts = np.unique(row + 0.0, return_counts=True)
    values, counts = values[::-1], counts[::-1]
    if 0 < top_k < len(row):
        values = values[: np.searchsorted(np.cumsum(counts), top_k) + 1]
    with np.errstate(invalid="ignore"):
        w = np.where(row >= values[-1], np.exp((row - values[0]) / temperature), 0.0)
    mass = np.array([w[row == value].sum() for value in values]) / w.sum()
    cumulative = np.cumsum(mass)
    edge = min(np.searchsorted(cumulative, top_p), len(values) - 1) if top_p < 1 else len(values) - 1
    close = top_p < 1 and bool((np.abs(cumulative - top_p)[:-1] < 2e-6).any())
    p = np.where(row >= values[edge], w, 0.0)
    return p / p.sum(), close


def draw(rows, u, **settings):
    return kernels.sample_codes(rows, u[:, None].float().to(DEVICE), INDEX, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torch_path_keeps_and_draws_what_sorting_does(settings):
    """1,000 rows; u in the middle of every kept code's share: what is kept and in which order decides all."""
    kernels.use("torch")
    rows, which, u, expected, skipped = make_rows(1000), [], [], [], 0
    for i, row in enumerate(rows):
        p, close = kept_mass(row, **settings)
        if close:
            skipped += 1
            continue
        cdf = np.cumsum(p)
        codes = np.flatnonzero(p > 1e-5)
        which += [i] * len(codes)
        u += list(cdf[codes] - p[codes] / 2)
        expected += codes.tolist()
    assert skipped <= 10
    got = draw(rows[which], torch.tensor(u), **settings)
    assert got.dtype == torch.int64 and torch.equal(got.cpu(), torch.tensor(expected))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kernel_keeps_and_draws_what_sorting_does(settings):
    """The codes at both ends of the order and of the kept set; a GPU does 1,000 rows, the interpreter, slow, 14."""
    rows = make_rows(1000 if DEVICE == "cuda" else 14)
    for ends in (0, 1):
        u, expected, allowed = [], [], []
        for row in rows:
            p, close = kept_mass(row, **settings)
            codes, cdf = np.flatnonzero(p > 1e-5), np.cumsum(p)
            least = codes[p[codes].argmin()]  # the first that a wrong edge would lose
            code = (least, codes[-1])[ends]
            u.append(cdf[code] - p[code] / 2)
            expected.append(code)
            allowed.append(close)
        got = draw(rows, torch.tensor(u), **settings).cpu()
        assert ((got == torch.tensor(expected)) | torch.tensor(allowed)).all()
        assert sum(allowed) <= (10 if DEVICE == "cuda" else 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", [1, 2, 7, 1000, 16384])
def test_kernel_and_torch_path_agree(width, dtype):
    rows = make_rows(8, width).nan_to_num(neginf=-6e4).clamp(-6e4, 6e4).to(dtype)
    u = torch.tensor([0.0, LAST, 0.3, 0.9])
    settings = dict(cfg_scale=1.7, top_k=width // 2, top_p=0.9, temperature=0.9, guided=True)
    kernels.use("torch")
    expected = draw(rows, u, **settings)
    kernels.use("triton")
    got = draw(rows, u, **settings)
    assert torch.equal(got, expected) and torch.equal(got[:4], got[4:])
    greedy = kernels.sample_codes(rows, None, None, 1.7, greedy=True, guided=True)
    assert torch.equal(greedy[4:], (rows[4:].float() + 1.7 * (rows[:4].float() - rows[4:].float())).argmax(1))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 3.0, -1.0])
def test_guidance(mode, scale):
    """uncond + s (cond - uncond), in float32 also for 16-bit logits."""
    kernels.use(mode)
    cond, uncond = torch.randn(2, 6, V, device=DEVICE).half()
    both = (uncond.float() + (cond.float() - uncond.float()) * scale).double()
    codes = kernels.sample_codes(torch.cat([cond, uncond]), None, None, scale, greedy=True, guided=True)
    assert torch.equal(codes, both.argmax(1).repeat(2))
    p = both.softmax(1)
    middle = (p.cumsum(1) - p / 2).gather(1, codes[:6, None])[:, 0]
    assert torch.equal(draw(torch.cat([cond, uncond]), middle, cfg_scale=scale, guided=True), codes)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_ends_of_the_interval(mode):
    """u = 0 takes the first code with mass, the largest u the last: never one that is not kept."""
    kernels.use(mode)
    row = torch.full((1, 1000), -torch.inf, device=DEVICE)
    row[0, 5:900] = torch.randn(895) * 3
    row[0, [5, 899]] = 9.0  # more than the step of u, 2^-24
    ends = torch.tensor([0.0, LAST])
    assert draw(row.expand(2, -1), ends).tolist() == [5, 899]
    kept = torch.zeros(1, 1000, device=DEVICE)
    kept[0, [17, 400]] = 9.0
    assert draw(kept.expand(2, -1), ends, top_k=2).tolist() == [17, 400]
    assert draw(kept.expand(2, -1), ends, top_p=1e-30).tolist() == [17, 400]
    assert draw(kept.expand(2, -1), ends, temperature=1e-30).tolist() == [17, 400]
    assert draw(kept.expand(2, -1), ends, temperature=1e30).tolist() == [0, 999]


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_rows_that_are_not_finite(mode):
    """A NaN is never drawn, +inf is the largest number, and a row of neither gives code 0."""
    kernels.use(mode)
    rows = torch.full((6, 20), -torch.inf, device=DEVICE)
    rows[0, 3:5], rows[1], rows[3, 7], rows[4] = torch.nan, torch.nan, torch.inf, 1.0
    rows[0, 9], rows[4, 4], rows[5, 11:13] = 0.0, torch.nan, torch.inf
    expected = torch.tensor([9, 0, 0, 7, 0, 11], device=DEVICE)
    assert torch.equal(kernels.sample_codes(rows, None, None, greedy=True), expected)
    for settings in (dict(), dict(top_k=3), dict(top_p=0.5), dict(top_k=2, top_p=0.5)):
        assert torch.equal(draw(rows, torch.zeros(6), **settings), expected)
    u = (torch.arange(19) + 0.5) / 19  # over the row of ones but for a NaN at 4
    codes = draw(rows[4:5].expand(19, -1), u)
    assert codes.tolist() == [*range(4), *range(5, 20)]


def test_distribution():
    kernels.use("torch")
    logits = torch.randn(30, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) * 1.5
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    for settings, freedom in ((dict(), 29), (dict(top_k=8), 7), (dict(top_p=0.8, temperature=1.3), None)):
        p = torch.from_numpy(kept_mass(logits, **settings)[0])
        counts = draw(logits.expand(len(u), -1), u, **settings).cpu().bincount(minlength=30)
        assert counts[p == 0].sum() == 0
        chi_square = float(((counts - p * len(u)) ** 2 / (p * len(u)))[p > 0].sum())
        degrees = int((p > 0).sum()) - 1
        assert freedom in (None, degrees)
        assert chi_square < {29: 58.3, 7: 24.3}.get(degrees, 2.5 * degrees + 15)  # 1 in 1000, or rarer


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_noise_of_the_step_and_neighbours(mode):
    """`index` picks the column; a row draws the same alone, and from rows with strides."""
    kernels.use(mode)
    rows, noise = make_rows(4), torch.rand(4, 9, device=DEVICE)
    index, settings = torch.tensor([5], device=DEVICE), dict(top_p=0.9)
    codes = kernels.sample_codes(rows, noise, index, **settings)
    assert torch.equal(codes, kernels.sample_codes(rows, noise[:, 5:6], INDEX, **settings))
    for i in range(4):
        assert torch.equal(codes[i : i + 1], kernels.sample_codes(rows[i : i + 1], noise[i : i + 1], index, **settings))
    wide = torch.cat([rows, rows], 1)[:, :V]
    turned = torch.stack([rows, rows], 2)[..., 0]
    assert wide.stride(0) == 2 * V and turned.stride(1) == 2
    for x in (wide, turned):
        assert torch.equal(codes, kernels.sample_codes(x, noise.t().contiguous().t(), index, **settings))
    before = rows.clone()
    kernels.sample_codes(rows, noise, index, top_k=3)
    assert torch.equal(before.nan_to_num(), rows.nan_to_num())
    assert kernels.sample_codes(rows[:0], noise[:0], index).shape == (0,)


@pytest.mark.parametrize("settings, message", [
    (dict(logits=torch.zeros(4)), "logits"), (dict(logits=torch.zeros(3, V), guided=True), r"logits \[2 B, V\]"),
    (dict(logits=torch.zeros(3, 0)), "V above 0"), (dict(noise=torch.zeros(2, 1)), r"noise \[3, L\]"),
    (dict(noise=torch.zeros(3, 0)), "noise"), (dict(index=torch.zeros(2, dtype=torch.long)), r"index \[1\]"),
    (dict(temperature=0.0), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=float("inf")), "temperature"), (dict(top_k=-1), "top_k"), (dict(top_p=0.0), "top_p"),
    (dict(top_p=1.5), "top_p"), (dict(top_p=float("nan")), "top_p"),
], ids=lambda x: "" if isinstance(x, str) else next(iter(x)))
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kernels.sample_codes(**dict(logits=torch.zeros(3, V), noise=torch.zeros(3, 1), index=INDEX.cpu()) | settings)


def test_wide_rows_take_the_torch_path():
    """Wider than a program's registers: "auto" falls back, "triton" refuses."""
    rows, u = torch.randn(2, sampling_file.MAX_CODES + 1, device=DEVICE), torch.tensor([0.2, 0.8])
    with pytest.raises(RuntimeError, match="wider than 16384"):
        draw(rows, u)
    kernels.use("auto")
    p = rows.double().softmax(1).cumsum(1)
    assert torch.equal(draw(rows, u), torch.searchsorted(p, u.double()[:, None].to(DEVICE))[:, 0])


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_operator_and_compile(mode):
    kernels.use(mode)
    rows, noise = make_rows(4), torch.rand(2, 3, device=DEVICE)
    args = (rows, noise, INDEX, 2.0, 1.0, 5, 0.9, False, True, mode == "triton")
    torch.library.opcheck(torch.ops.nanollamagen.sample_codes, args)
    fn = lambda x, n, i: kernels.sample_codes(x, n, i, 2.0, top_k=5, top_p=0.9, guided=True) + 1  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, noise, INDEX), fn(rows, noise, INDEX))
