"""One step of sampling: guidance, temperature, top-k, top-p and the draw, one program per image, nothing sorted.

    x = uncond + (cond - uncond) cfg_scale   w = exp((x - max x) / temperature)    code: sum_{j<=code} w_j > u sum_j w_j

Bytes: the logits once, B V or 2 B V elements, and 8 per code. FLOPs: about 3 V for every one of at most 32 steps of a
bisection, one each for top-k and top-p. Bound by these, not by memory: a step is one reduction over the row, for top-k
138 instructions of each of 16 warps on one multiprocessor (V = 16,384), for top-p 202. A row of random logits takes 22
and 24 steps: 17 us for top-k, 40 for both, predicted for an H100.

Thresholds: the largest t for which the codes with x >= t are at least k, or hold at least the mass p. The bits of a
float32, mapped to an integer of the same order, leave no value between two steps, so the codes kept are those that
sorting keeps, ties included. Masses are integers, w in units of 2^-38 (V = 16,384), so every sum is exact in any order
(< 2^53: also in the float64 of the PyTorch path), and images do not depend on the batch, nor codes on how sums are cut
into blocks. What is rounded is w: exp in float32 and its cut to units, at most about 1e-6 of the mass, so the last code
kept by top-p, or the code drawn, is another than in float64 only where p, or u, is that close to the edge.
"""

import math

import numpy as np
import torch

from kernels import on_device, rows_of, tl, triton, use_triton

MAX_CODES = 16384  # a row in the registers of one program
LARGEST = torch.finfo(torch.float32).max


def _unit(V):
    """How many units of mass the likeliest code gets: V of them stay below 2^53."""
    return 2.0 ** (53 - V.bit_length())


def _inverse(temperature):
    """1 / temperature, within what float32 tells from 0 and infinity."""
    return min(max(1 / temperature, 1e-38), 1e38)


def _sort(x):
    """Rows in ascending order; NumPy's vectorized sort takes a twentieth of PyTorch's time on a CPU."""
    return torch.from_numpy(np.sort(x.numpy(), axis=1)) if x.device.type == "cpu" else x.sort(1).values


def _kth_largest(x, k):
    if x.device.type == "cpu":
        return torch.from_numpy(np.partition(x.numpy(), x.shape[1] - k, axis=1)[:, -k, None])
    return x.topk(k, 1, sorted=False).values.amin(1, keepdim=True)


def _masses(x, top, inverse, bottom=None):
    """Integers in float32: the mass of every code of logit bottom or more, zero for the others."""
    w = (x - top).mul_(inverse).clamp_(min=-64)  # no mass there, and exp slows down at denormal numbers
    w = w.exp_().mul_(_unit(x.shape[1])).trunc_()
    return w if bottom is None else w.mul_(torch.ge(x, bottom, out=torch.empty_like(x)))


def sample_codes_ref(
    logits, noise, index, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, greedy=False, guided=False
):
    x, V, bottom = logits.float(), logits.shape[1], None
    if guided:
        cond, uncond = x.chunk(2)
        x = (cond - uncond).mul_(cfg_scale).add_(uncond)
    x = x.nan_to_num(nan=-math.inf, posinf=LARGEST, neginf=-math.inf)
    if greedy:
        codes = x.argmax(1)
        return torch.cat([codes, codes]) if guided else codes
    top, inverse = x.amax(1, keepdim=True).clamp_(min=-LARGEST), _inverse(temperature)
    if top_p < 1:
        ordered = _sort(x)
        bottom = ordered[:, V - top_k, None] if 0 < top_k < V else None
        cdf = _masses(ordered, top, inverse, bottom).cumsum(1, dtype=torch.float64)
        total = cdf[:, -1:]
        rest = total - (total * float(np.float32(top_p))).ceil_()  # what may be dropped
        first = torch.searchsorted(cdf, rest, right=True).clamp_(max=V - 1)
        bottom = ordered.gather(1, first)
    elif 0 < top_k < V:
        bottom = _kth_largest(x, top_k)
    cdf = _masses(x, top, inverse, bottom).cumsum(1, dtype=torch.float64)
    goal = noise.index_select(1, index).double() * cdf[:, -1:]
    goal = torch.minimum(goal, cdf[:, -1:] - 1)  # below the total whatever u is rounded to; -1 where nothing has mass
    codes = torch.searchsorted(cdf, goal, right=True).squeeze(1)
    return torch.cat([codes, codes]) if guided else codes


@triton.jit
def _flip(bits):
    """Bits of a float32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(x, mass, enough, low, high):
    """The largest t in [low, high] for which the codes with x >= t have a mass of `enough`, or one that keeps as many.

    The codes with x >= low have it.
    """
    low, high = _flip(low.to(tl.int32, bitcast=True)), _flip(high.to(tl.int32, bitcast=True))
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        kept = tl.sum(tl.where(x >= _flip(middle).to(tl.float32, bitcast=True), mass, 0))
        low = tl.where(kept >= enough, middle, low)
        high = tl.where(kept > enough, high, tl.where(kept == enough, middle, middle - 1))
    return _flip(low).to(tl.float32, bitcast=True)


@triton.jit
def _invert(mass, u, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first code at which the sum of mass [ROWS, COLS] exceeds u of the total; 0 where nothing has mass."""
    offs_r = tl.arange(0, ROWS)
    rows = tl.sum(mass, axis=1)
    total = tl.sum(rows)
    goal = (total.to(tl.float64) * u.to(tl.float64)).to(tl.int64)
    goal = tl.minimum(tl.maximum(goal, 0), total - 1)
    row = tl.sum((tl.cumsum(rows, 0) <= goal).to(tl.int32))
    goal -= tl.sum(tl.where(offs_r < row, rows, 0))
    inside = (offs_r[:, None] == row) & (tl.cumsum(mass, 1) <= goal)
    return row * COLS + tl.sum(inside.to(tl.int32))


@triton.jit
def _sample_codes_kernel(
    logits_ptr, noise_ptr, index_ptr, code_ptr, stride_lb, stride_nb, B, L, V, cfg_scale, inverse, top_k, top_p,
    UNIT: tl.constexpr, LARGEST: tl.constexpr, GUIDED: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    mask = offs_v < V
    x = tl.load(logits_ptr + pid_b * stride_lb + offs_v, mask=mask, other=float("-inf")).to(tl.float32)
    if GUIDED:
        uncond = tl.load(logits_ptr + (pid_b + B) * stride_lb + offs_v, mask=mask, other=0.0).to(tl.float32)
        x = uncond + (x - uncond) * tl.cast(cfg_scale, tl.float32)
    x = tl.where(mask & (x == x), tl.minimum(x, LARGEST), float("-inf"))
    top = tl.max(x)
    if GREEDY:
        code = tl.min(tl.where(x == top, offs_v, V))
    else:
        bottom = tl.full((), float("-inf"), tl.float32)
        if TOP_K:
            bottom = _threshold(x, tl.full((ROWS, COLS), 1, tl.int32), top_k, bottom, top)
        w = tl.exp((x - tl.maximum(top, -LARGEST)) * tl.cast(inverse, tl.float32)) * UNIT
        mass = tl.where(x >= bottom, w, 0.0).to(tl.int64)
        if TOP_P:
            enough = tl.ceil(tl.sum(mass).to(tl.float64) * tl.cast(top_p, tl.float32).to(tl.float64)).to(tl.int64)
            mass = tl.where(x >= _threshold(x, mass, enough, bottom, top), mass, 0)
        index = tl.load(index_ptr)
        u = tl.load(noise_ptr + pid_b * stride_nb + index, mask=(index >= 0) & (index < L), other=0.0)
        code = _invert(mass, u, ROWS, COLS)
    tl.store(code_ptr + pid_b, code.to(tl.int64))
    if GUIDED:
        tl.store(code_ptr + B + pid_b, code.to(tl.int64))


def launch_config(V):
    """The row as ROWS x COLS, up to 32 elements per thread. Unfused, guidance rounds as PyTorch does: the same ties."""
    block = triton.next_power_of_2(V)
    config = dict(ROWS=max(block // 128, 1), COLS=min(block, 128), num_warps=min(max(block // 1024, 1), 16))
    return dict(config, UNIT=_unit(V), LARGEST=LARGEST, enable_fp_fusion=False)


def _sample_codes_triton(logits, noise, index, cfg_scale, temperature, top_k, top_p, greedy, guided):
    logits, (R, V), inverse = rows_of(logits), logits.shape, 1.0 if greedy else _inverse(temperature)
    codes, B = torch.empty(R, dtype=torch.int64, device=logits.device), R // 2 if guided else R
    noise, index = (logits, codes) if greedy else (rows_of(noise), index)  # greedy: neither is read
    with on_device(logits):
        _sample_codes_kernel[B,](
            logits, noise, index, codes, logits.stride(0), noise.stride(0), B, noise.shape[1], V, cfg_scale, inverse,
            top_k, top_p, GUIDED=guided, GREEDY=greedy, TOP_K=not greedy and 0 < top_k < V,
            TOP_P=not greedy and top_p < 1, **launch_config(V),
        )
    return codes


@torch.library.custom_op("nanollamagen::sample_codes", mutates_args=())
def _sample_codes(
    logits: torch.Tensor, noise: torch.Tensor | None, index: torch.Tensor | None, cfg_scale: float, temperature: float,
    top_k: int, top_p: float, greedy: bool, guided: bool, use_kernel: bool,
) -> torch.Tensor:
    if not len(logits):
        return logits.new_empty(0, dtype=torch.int64)
    draw = _sample_codes_triton if use_kernel else sample_codes_ref
    return draw(logits, noise, index, cfg_scale, temperature, top_k, top_p, greedy, guided)


@_sample_codes.register_fake
def _(logits, noise, index, cfg_scale, temperature, top_k, top_p, greedy, guided, use_kernel):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def check_settings(temperature, top_k, top_p, greedy):
    """ValueError for those that cannot be sampled with."""
    if not greedy and not 0 < temperature < math.inf:
        raise ValueError(f"temperature has to be above 0, not {temperature} (greedy=True takes the likeliest code)")
    if not (top_k >= 0 and top_k % 1 == 0):
        raise ValueError(f"top_k has to be 0 (all codes) or a larger whole number, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p has to be in (0, 1], not {top_p}")


def sample_codes(logits, noise, index, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, greedy=False, guided=False):
    """Draw a code per image: top-k, then top-p, then the cumulative distribution of what they keep inverted at u.

    logits [R, V] float32, bfloat16 or float16; noise [B, L] float in [0, 1), whose column index, int64 [1] on the same
    device, is the u of this step -> int64 [R]. guided: R = 2 B, conditional rows before unconditional ones, and the
    codes are given twice, as the next step takes them; else R = B, and cfg_scale is not read.
    top_k keeps the k largest logits (0: all), top_p the fewest of the largest whose mass reaches p (1: all), masses
    being those of softmax(logits / temperature) after top-k; codes that tie with the last one kept are kept as well.
    greedy: the largest logit, the lowest code on ties; noise and index may be None.
    A NaN counts as -inf, +inf as the largest float32; a row of nothing but these -inf gives code 0. No host
    synchronisation on a GPU, and the same codes whatever the other rows are. No gradient. Raises ValueError for
    shapes and settings that cannot be. Source: LlamaGen; Holtzman et al. (2020) for top-p.
    """
    if logits.dim() != 2 or not logits.shape[1] or (guided and logits.shape[0] % 2):
        rows = "[2 B, V]" if guided else "[B, V]"
        raise ValueError(f"sample_codes needs logits {rows}, V above 0, got {(*logits.shape,)}")
    (R, V), B = logits.shape, logits.shape[0] // (2 if guided else 1)
    if not greedy and (noise is None or index is None):
        raise ValueError("sample_codes needs noise and index unless greedy")
    if not greedy and (noise.dim() != 2 or len(noise) != B or not noise.shape[1] or index.shape != (1,)):
        got = f"{(*noise.shape,)} and {(*index.shape,)}"
        raise ValueError(f"sample_codes needs noise [{B}, L] and index [1] for logits [{R}, {V}], got {got}")
    check_settings(temperature, top_k, top_p, greedy)
    why = "" if V <= MAX_CODES else f"rows of {V} codes are wider than {MAX_CODES}"
    noise, index = (None, None) if greedy else (noise, index)
    args = logits.detach(), noise, index, float(cfg_scale), float(temperature), int(top_k), float(top_p), greedy, guided
    kernel = use_triton(logits, why)
    if not kernel and R and not torch.compiler.is_compiling():  # without the 50 us that an operator takes on a CPU
        return sample_codes_ref(*args)
    return _sample_codes(*args, kernel)
