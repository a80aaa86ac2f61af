"""Codebook search: the nearest of K codes for each of N vectors, without the N x K matrix; and counts per code.

    l2 (unit vectors):  argmax_k z . e_k            otherwise:  argmin_k |z - e_k|^2 = argmax_k z . e_k - |e_k|^2 / 2

Bytes: z, the indices, and the codes from L2 per 128 vectors. FLOPs: 2 D per pair, 64 as executed at D = 8. Bound by one
maximum per pair (FMNMX, at half rate) beside the tensor cores: 0.44 ms with the two overlapped to 0.78 ms one after the
other, predicted for N = 262,144 and K = 16,384 on an H100.

1. Search on tensor cores: both sides scaled by powers of two and split into float16 hi + lo (22 bits). D <= 8: depth
   32, [hi hi] . [hi lo] + [lo lo] . [hi lo]; wider: hi.hi + hi.lo + lo.hi. A group of 32 codes (fewer for wide ones)
   lies within one thread, so a pair costs its maximum and no index; a slot of groups keeps its three largest maxima
   and the blocks of the first two. sm_90, D = 8: 2.0 instructions per pair (2 HGMMA, 74 FMNMX, 50 others for 64 pairs
   of a thread), 110 registers; float32 would take 8 FFMA per pair, 3xTF32 12 HGMMA + 250 guards per 128 x 64 tile.
2. Rescan in float64 of every group within the error bound of the best: 1.001 groups per vector on random codes. The
   bound takes every addition of the tensor core as truncated to 24 bits, so no winner is missed; a third near-tie in a
   slot (many equal codes) rescans all codes. The result is that of a float64 search, so that of a float32 search
   wherever float32 can tell two codes apart; ties go to the lowest index.
"""

import torch

from kernels import architecture, full_float32, on_device, tl, triton, use_triton

CPU_SCORES, GPU_SCORES = 1 << 20, 1 << 26  # scores per chunk of the PyTorch path: in cache, and 256 MiB


def nearest_code_ref(z, codebook, l2=True):
    z, codebook = z.detach().float(), codebook.detach().float()
    (N, _), K = z.shape, len(codebook)
    rows = max(1, (CPU_SCORES if z.device.type == "cpu" else GPU_SCORES) // K)
    half = codebook.square().sum(1) / -2
    indices, scores = z.new_empty(N, dtype=torch.int64), z.new_empty(min(rows, N), K)
    with full_float32(z.device.type):
        for part, out in zip(z.split(rows), indices.split(rows), strict=True):
            s = scores[: len(part)]
            torch.mm(part, codebook.t(), out=s) if l2 else torch.addmm(half, part, codebook.t(), out=s)
            torch.argmax(s, dim=1, out=out)  # the first of equal maxima, by its documentation
    return indices.masked_fill_(~torch.isfinite(z).all(1), 0)


@triton.jit
def _power_of_two(x):
    """The power of two that brings x > 0 into [2^14, 2^15), the top of float16."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (tl.minimum(268 - exponent, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _pack_kernel(
    code_ptr, norm_ptr, top_ptr, packed_ptr, half_ptr, K, D: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Codes scaled and split into float16 parts [hi | lo] of width PART; half_ptr: |e|^2 / 2, scaled alike."""
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    source = tl.minimum(offs_k, K - 1)  # rows past K repeat the last code: the search needs no mask
    offs_w = tl.arange(0, 2 * PART)[None, :]
    offs_d = offs_w % PART
    scale = _power_of_two(tl.load(top_ptr))
    e = tl.load(code_ptr + source[:, None] * D + offs_d, mask=(source < K)[:, None] & (offs_d < D), other=0.0)
    hi, lo = _split(e.to(tl.float32) * scale)
    tl.store(packed_ptr + offs_k[:, None] * (2 * PART) + offs_w, tl.where(offs_w < PART, hi, lo))
    norm = tl.load(norm_ptr + source, mask=source < K, other=0.0)
    tl.store(half_ptr + offs_k, norm * norm * 0.5 * scale)


@triton.jit
def _insert(t, k0, m1, k1, m2, k2, m3):
    """Adds a block's maximum t to the three largest; k1 and k2 are where the two largest blocks begin."""
    k2 = tl.where(t > m1, k1, tl.where(t > m2, k0, k2))
    m3 = tl.maximum(m3, tl.minimum(m2, t))
    k1 = tl.where(t > m1, k0, k1)
    m2 = tl.maximum(m2, tl.minimum(m1, t))
    return tl.maximum(m1, t), k1, m2, k2, m3


@triton.jit
def _load_z(z_ptr, offs_m, offs_d, mask, D: tl.constexpr):
    return tl.load(z_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _rescan(
    z_ptr, code_ptr, K, offs_m, mask_m, first, best, index, D: tl.constexpr, L2: tl.constexpr,
    GROUP: tl.constexpr, STEP: tl.constexpr, PAIR: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Scores in float64 of the group of codes that begins at first [M]; keeps the best, and its lowest index."""
    for g0 in range(0, GROUP, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        codes = first[:, None] + (g // PAIR * STEP + g % PAIR)[None, :]
        mask_k = mask_m[:, None] & (codes < K)
        s = tl.zeros(codes.shape, tl.float64)
        for d0 in range(0, D, BLOCK_D):
            offs_d = d0 + tl.arange(0, BLOCK_D)
            z = _load_z(z_ptr, offs_m, offs_d, mask_m, D).to(tl.float64)[:, None, :]
            e_ptrs = code_ptr + codes.to(tl.int64)[:, :, None] * D + offs_d[None, None, :]
            e = tl.load(e_ptrs, mask=mask_k[:, :, None] & (offs_d < D)[None, None, :], other=0.0).to(tl.float64)
            s += tl.sum(z * e, axis=2) if L2 else -tl.sum((z - e) * (z - e), axis=2)
        wins = mask_k & ((s > best) | ((s == best) & (codes < index)))
        best, index = tl.where(wins, s, best), tl.where(wins, codes, index)
    return best, index


@triton.jit
def _scales(z_ptr, top_norm, offs_m, mask, D: tl.constexpr, L2: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Per vector: the power of two it is scaled by, its scaled norm, and whether it is to be searched."""
    big = tl.zeros(offs_m.shape, tl.float32)
    for d0 in tl.static_range(0, PART, BLOCK):
        z = tl.abs(_load_z(z_ptr, offs_m, d0 + tl.arange(0, BLOCK), mask, D).to(tl.float32))
        big = tl.maximum(big, tl.max(tl.where(z < float("inf"), z, float("inf")), axis=1))
    live = mask & (big < float("inf")) & ((big > 0) | (not L2))
    scale = _power_of_two(big if L2 else tl.maximum(big, top_norm / 1024))
    square = tl.zeros(offs_m.shape, tl.float32)
    for d0 in tl.static_range(0, PART, BLOCK):
        z = _load_z(z_ptr, offs_m, d0 + tl.arange(0, BLOCK), live, D).to(tl.float32) * scale[:, None]
        square += tl.sum(z * z, axis=1)
    return scale, tl.sqrt(square), live


@triton.jit
def _search(
    z_ptr, packed_ptr, half_ptr, scale, live, offs_m, K_PADDED, D: tl.constexpr, L2: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, PAIR: tl.constexpr,
):
    """Three largest group maxima of every slot [M, SLOTS], and the blocks of the first two."""
    offs_d = tl.arange(0, BLOCK_D)
    z_hi, z_lo = _split(_load_z(z_ptr, offs_m, offs_d % PART, live, D).to(tl.float32) * scale[:, None])
    m1 = tl.full((BLOCK_M, SLOTS), float("-inf"), tl.float32)
    k1 = tl.zeros((BLOCK_M, SLOTS), tl.int32)
    m2, k2, m3 = m1, k1, m1
    for k0 in range(0, K_PADDED, BLOCK_K):  # whole blocks, so nothing is masked
        offs_k = k0 + tl.arange(0, BLOCK_K)
        e_ptrs = packed_ptr + offs_k.to(tl.int64)[None, :] * (2 * PART) + offs_d[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if PART < BLOCK_D:  # one tile holds both parts
            e = tl.load(e_ptrs)
            acc = tl.dot(z_hi, e, tl.dot(z_lo, e, acc))
        else:
            for d0 in range(0, PART, BLOCK_D):
                hi, lo = z_hi, z_lo
                if PART > BLOCK_D:
                    hi, lo = _split(_load_z(z_ptr, offs_m, d0 + offs_d, live, D).to(tl.float32) * scale[:, None])
                e_hi = tl.load(e_ptrs + d0)
                e_lo = tl.load(e_ptrs + PART + d0)
                acc = tl.dot(hi, e_hi, tl.dot(hi, e_lo, tl.dot(lo, e_hi, acc)))
        if not L2:
            acc -= scale[:, None] * tl.load(half_ptr + offs_k)[None, :]
        groups = tl.reshape(acc, (BLOCK_M, BLOCK_K // (SLOTS * PAIR), SLOTS, PAIR))
        m1, k1, m2, k2, m3 = _insert(tl.max(tl.max(groups, axis=3), axis=1), k0, m1, k1, m2, k2, m3)
    return m1, k1, m2, k2, m3


@triton.jit
def _nearest_code_kernel(
    z_ptr, code_ptr, packed_ptr, half_ptr, top_ptr, idx_ptr, N, K, K_PADDED, D: tl.constexpr, L2: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr, PAIR: tl.constexpr, RESCAN_G: tl.constexpr, RESCAN_D: tl.constexpr, MARGIN: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    top_norm = tl.load(top_ptr)
    scale, norm, live = _scales(z_ptr, top_norm, offs_m, offs_m < N, D, L2, PART, min(PART, BLOCK_D))
    m1, k1, m2, k2, m3 = _search(
        z_ptr, packed_ptr, half_ptr, scale, live, offs_m, K_PADDED, D, L2, PART, BLOCK_M, BLOCK_K, BLOCK_D, SLOTS, PAIR
    )
    reach = (norm if L2 else norm + top_norm * scale) * (top_norm * _power_of_two(top_norm))
    floor = tl.where(live, tl.max(m1, axis=1) - reach * MARGIN, float("inf"))
    crowded = tl.max(tl.max((m3 >= floor[:, None]).to(tl.int32), axis=1), axis=0) > 0
    near = (m1 >= floor[:, None]).to(tl.int32) + (m2 >= floor[:, None]).to(tl.int32)
    rounds = tl.where(crowded, K_PADDED // BLOCK_K * SLOTS, tl.max(tl.sum(near, axis=1), axis=0))
    floor = tl.where(crowded, float("-inf"), floor)
    best = tl.full((BLOCK_M, RESCAN_G), float("-inf"), tl.float64)
    index = tl.zeros((BLOCK_M, RESCAN_G), tl.int32)
    slots = tl.arange(0, SLOTS)[None, :]
    for i in range(0, rounds):  # the best group left, or the i-th of all
        top = tl.max(m1, axis=1)
        taken = slots == tl.min(tl.where(m1 == top[:, None], slots, SLOTS), axis=1)[:, None]
        first = tl.sum(tl.where(taken, k1 + slots * PAIR, 0), axis=1)
        first = tl.where(crowded, i // SLOTS * BLOCK_K + i % SLOTS * PAIR, first)
        best, index = _rescan(
            z_ptr, code_ptr, K, offs_m, live & (top >= floor), first, best, index, D, L2,
            BLOCK_K // SLOTS, SLOTS * PAIR, PAIR, RESCAN_G, RESCAN_D,
        )
        m1, k1, m2 = tl.where(taken, m2, m1), tl.where(taken, k2, k1), tl.where(taken, float("-inf"), m2)
    winner = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], index, 2147483647), axis=1)
    tl.store(idx_ptr + offs_m, winner.to(tl.int64), mask=offs_m < N)


def launch_config(D, arch="sm_90"):
    """Constants by code dimension; groups of BLOCK_K / SLOTS codes are smaller where codes are wider to rescan.

    Tensor cores that read shared memory (sm_90, sm_100) leave registers for chunks of depth 32, not 16.
    MARGIN bounds, relative to |z| max|e|, how far apart two scores can be pushed: each by 2^-23 per truncation. A
    product of depth 16 truncates 17 terms (its own and the sum so far) and the result: 18. D <= 8 takes 2 of them,
    wider codes 3 per 16 channels, so 54 / 16 = 27 / 8 per channel; 4 and 8 more are for what the split leaves out.
    """
    config = dict(BLOCK_M=128, BLOCK_K=128, RESCAN_G=4, RESCAN_D=8, num_warps=8)
    if D <= 8:
        return dict(config, PART=8, BLOCK_D=16, SLOTS=4, PAIR=2, MARGIN=40 * 2.0**-22)
    part = max(16, triton.next_power_of_2(D))
    block_d, slots = (part, 8) if part <= 32 else (32 if arch in ("sm_90", "sm_100") else 16, 16)
    return dict(config, PART=part, BLOCK_D=block_d, SLOTS=slots, PAIR=1, MARGIN=(27 * part // 8 + 8) * 2.0**-22)


def _nearest_code_triton(z, codebook, l2):
    N, (K, D) = z.shape[0], codebook.shape
    config = launch_config(D, architecture(z))
    z, codebook, indices = z.contiguous(), codebook.contiguous(), z.new_empty(N, dtype=torch.int64)
    padded, part = triton.cdiv(K, config["BLOCK_K"]) * config["BLOCK_K"], config["PART"]
    norms = torch.linalg.vector_norm(codebook, dim=1, dtype=torch.float32)
    top, half, packed = norms.amax(), norms.new_empty(padded), z.new_empty(padded, 2 * part, dtype=torch.float16)
    block = min(64, 1024 // part)
    with on_device(z):
        _pack_kernel[padded // block,](codebook, norms, top, packed, half, K, D=D, PART=part, BLOCK_K=block)
        _nearest_code_kernel[triton.cdiv(N, config["BLOCK_M"]),](
            z, codebook, packed, half, top, indices, N, K, padded, D=D, L2=l2, **config
        )
    return indices


@torch.library.custom_op("nanollamagen::nearest_code", mutates_args=())
def _nearest_code(z: torch.Tensor, codebook: torch.Tensor, l2: bool, use_kernel: bool) -> torch.Tensor:
    if not len(z):
        return z.new_empty(0, dtype=torch.int64)
    return (_nearest_code_triton if use_kernel else nearest_code_ref)(z, codebook, l2)


_nearest_code.register_fake(lambda z, codebook, l2, use_kernel: z.new_empty(z.shape[0], dtype=torch.int64))


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, l2: bool = True) -> torch.Tensor:
    """Index of the code nearest to every vector, the lowest on ties; no gradient.

    z [N, D], codebook [K, D], each float32, bfloat16 or float16, finite and below 1e15 in magnitude -> int64 [N].
    l2: both hold unit vectors, nearest is the largest dot product. A vector with a NaN or infinity gets index 0.
    Compared in full float32 or better under any autocast and TF32 setting; the PyTorch path expands |z - e|^2 and so
    tells codes apart down to 1e-7 |z| |e|, the kernel without limit. Raises ValueError for other shapes or no codes.
    """
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or not codebook.numel():
        raise ValueError(f"nearest_code needs z [N, D] and codebook [K, D], got {(*z.shape,)} and {(*codebook.shape,)}")
    why = "" if z.shape[1] <= 256 else f"codes of {z.shape[1]} dimensions are wider than 256"
    return _nearest_code(z.detach(), codebook.detach(), l2, use_triton(z, why) and use_triton(codebook))


def code_usage(indices: torch.Tensor, K: int) -> torch.Tensor:
    """Counts int64 [K] of integers in [0, K) of any shape, without the host synchronisation of torch.bincount."""
    indices = indices.reshape(-1).long()
    return indices.new_zeros(K).scatter_add_(0, indices, indices.new_ones(()).expand_as(indices))
