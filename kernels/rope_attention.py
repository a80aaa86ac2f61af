"""Causal attention of a packed projection with rotary positions: o = softmax(R q (R k)^T / sqrt(D)) v.

R turns the channel pairs (2i, 2i+1) of a token by its angles. Bytes per token and head in 16 bits: forward 8 D (q, k,
v, o), backward 16 D (q, k, v, o, do, dq, dk, dv). FLOPs: forward 2 T^2 D H B (the causal half), backward 5 T^2 D H B, 7
with what both of its kernels compute. Bound by memory at T = 256, by tensor cores and exponentials at T = 1024.
Saved: o and the base-2 log-sum-exp of every row, of T rounded up to 16, so that rows are aligned at any T. Backward: dq
by blocks of queries, then dk and dv by blocks of keys, all query heads of a group in one program: no atomics, the same
in every run. Heads are padded to a power of two by masked loads; pairs are split and joined in a thread's registers.
Sources: Dao, "FlashAttention-2" (2023); Su et al., "RoFormer" (2021); Triton tutorial 06.
"""

import functools

import torch
import torch.nn.functional as F

from kernels import architecture, on_device, tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)


# BLOCK_M, BLOCK_N, warps, stages: of what does not spill, the fewest instructions per score; by kernel and padded head,
# and architecture
TILES = {
    ("fwd", 64): {"": (128, 64, 8, 2), "sm_90": (128, 64, 4, 3), "sm_100": (128, 64, 4, 3)},
    ("fwd", 128): {"": (128, 64, 8, 2), "sm_80": (128, 32, 8, 2), "hip": (64, 64, 4, 2)},
    ("dq", 64): {"": (128, 64, 8, 2)},
    ("dq", 128): {"": (64, 32, 4, 2), "sm_90": (64, 64, 4, 2), "sm_100": (128, 64, 8, 1)},
    ("dkv", 64): {"": (64, 128, 8, 2), "hip": (16, 64, 4, 2), "grouped": (32, 64, 4, 2)},
    ("dkv", 128): {"": (64, 64, 8, 1), "sm_90": (32, 128, 8, 1), "grouped sm_90": (16, 128, 8, 1),
                   "hip": (16, 64, 4, 2)},
}


def apply_rope(x, cos, sin):
    """Turn the channel pairs (2i, 2i+1) of x [..., T, D] by cos, sin [T, D/2], in float32 or float64; x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)  # ..., T, D/2
    cos, sin = cos.to(wide), sin.to(wide)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def _heads(qkv, cos, sin, n_head, n_kv_head):
    """Turned q, turned k, and v: B, H or G, T, D."""
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).transpose(1, 2)
    q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def _mask(T, padding):
    """True where query i may see key j, [B, 1, T, T]: j <= i, and j is no padding (j >= padding[b]) or i itself."""
    i = torch.arange(T, device=padding.device)
    return ((i <= i[:, None]) & (i >= padding[:, None, None]) | (i == i[:, None]))[:, None]


def rope_attention_ref(qkv, cos, sin, n_head, n_kv_head=None, padding=None):
    q, k, v = _heads(qkv, cos, sin, n_head, n_kv_head or n_head)
    k, v = (x.repeat_interleave(n_head // x.shape[1], dim=1) for x in (k, v))
    mask = _mask(q.shape[2], torch.zeros_like(qkv[:, 0, 0]) if padding is None else padding)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _rope_attention_sdpa(qkv, cos, sin, n_head, n_kv_head, padding):
    """Builds a mask [B, 1, T, T] of booleans where there is padding; the kernels build none."""
    q, k, v = _heads(qkv, cos, sin, n_head, n_kv_head)
    mask, grouped = None if padding is None else _mask(q.shape[2], padding), n_kv_head < n_head
    with torch.autocast(qkv.device.type, enabled=False):  # the output has the dtype of qkv
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(2)


@triton.jit
def _load(ptr, start, stride_t, T, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start..start+BLOCK-1 of one head; what is beyond T (None: nothing is) or D is 0."""
    offs_t, offs_d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = offs_d < D
    if T is not None:
        mask = (offs_t < T - start) & mask
    return tl.load(ptr + start * stride_t + (offs_t * stride_t + offs_d), mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, start, stride_t, T, D: tl.constexpr):
    offs_t, offs_d = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mask = (offs_t < T - start) & (offs_d < D)
    ptrs = ptr + start * stride_t + (offs_t * stride_t + offs_d)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn(x, cos_ptr, sin_ptr, start, T, SIGN: tl.constexpr, D: tl.constexpr):
    """The channel pairs of x turned by their angles (SIGN 1) or back (-1), in float32."""
    HALF: tl.constexpr = x.shape[1] // 2
    cos = _load(cos_ptr, start, D // 2, T, x.shape[0], D // 2, HALF).to(tl.float32)
    sin = _load(sin_ptr, start, D // 2, T, x.shape[0], D // 2, HALF).to(tl.float32) * SIGN
    a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], HALF, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def _load_turned(
    ptr, cos_ptr, sin_ptr, start, stride_t, T,
    TURN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    x = _load(ptr, start, stride_t, T, BLOCK, D, BLOCK_D)
    return _turn(x, cos_ptr, sin_ptr, start, T, 1, D).to(x.dtype) if TURN else x


@triton.jit
def _seen(x, m, n, padding, DIAGONAL: tl.constexpr, PADDING: tl.constexpr, other: tl.constexpr):
    """x where query m sees key n; off the diagonal every key is earlier than every query."""
    if DIAGONAL:
        x = tl.where(((n <= m) & (n >= padding)) | (n == m) if PADDING else n <= m, x, other)
    elif PADDING:
        x = tl.where(n >= padding, x, other)
    return x


@triton.jit
def _queries(padding_ptr, T, H, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDING: tl.constexpr):
    """Sample, head, first query and first key of this program. A head's blocks run together, to share k and v in L2."""
    blocks, first, padding = tl.cdiv(T, BLOCK_M), 0, 0
    row, start_m = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # longest first
    b, h = (row // H).to(tl.int64), row % H
    if PADDING:
        padding = tl.maximum(tl.load(padding_ptr + b).to(tl.int32), 0)
        first = tl.minimum(padding, start_m) // BLOCK_N * BLOCK_N
    return b, h, start_m, first, padding


@triton.jit
def _rope_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, padding_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, T, H, GROUP,
    D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TURN: tl.constexpr, PADDING: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)  # blocks of keys before the diagonal end there
    b, h, start_m, first, padding = _queries(padding_ptr, T, H, BLOCK_M, BLOCK_N, PADDING)
    rows = tl.cdiv(T, 16) * 16
    k_ptr, v_ptr = k_ptr + b * stride_kb + h // GROUP * D, v_ptr + b * stride_vb + h // GROUP * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load_turned(q_ptr + b * stride_qb + h * D, cos_ptr, sin_ptr, start_m, stride_qt, T, True, BLOCK_M, D, BLOCK_D)
    acc, total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a row of padding gives exp2(-inf), not NaN
    for diagonal in tl.static_range(2):
        last = tl.minimum(start_m + BLOCK_M, T) if diagonal else start_m
        end = T if diagonal else None
        for start_n in range(start_m if diagonal else first, last, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_turned(k_ptr, cos_ptr, sin_ptr, start_n, stride_kt, end, TURN, BLOCK_N, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = _seen(s, offs_m[:, None], offs_n[None, :], padding, diagonal, PADDING, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * (SCALE * LOG2E))
            p = tl.exp2(s * (SCALE * LOG2E) - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total, top = total * shrink + tl.sum(p, 1), new_top
            v = _load(v_ptr, start_n, stride_vt, end, BLOCK_N, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    tl.store(lse_ptr + (b * H + h) * rows + offs_m, top + tl.log2(total), mask=offs_m < rows)
    _store(o_ptr + (b * T * H + h) * D, acc / total[:, None], start_m, H * D, T, D)


@triton.jit
def _rope_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, padding_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_gb, stride_gt, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, T, H, GROUP,
    D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TURN: tl.constexpr, PADDING: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)  # blocks of keys before the diagonal end there
    b, h, start_m, first, padding = _queries(padding_ptr, T, H, BLOCK_M, BLOCK_N, PADDING)
    rows = tl.cdiv(T, 16) * 16
    k_ptr, v_ptr = k_ptr + b * stride_kb + h // GROUP * D, v_ptr + b * stride_vb + h // GROUP * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load_turned(q_ptr + b * stride_qb + h * D, cos_ptr, sin_ptr, start_m, stride_qt, T, TURN, BLOCK_M, D, BLOCK_D)
    do = _load(do_ptr + (b * T * H + h) * D, start_m, H * D, T, BLOCK_M, D, BLOCK_D)
    o = _load(o_ptr + (b * T * H + h) * D, start_m, H * D, T, BLOCK_M, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * rows + offs_m, delta, mask=offs_m < rows)
    lse = tl.load(lse_ptr + (b * H + h) * rows + offs_m, mask=offs_m < rows, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for diagonal in tl.static_range(2):
        last = tl.minimum(start_m + BLOCK_M, T) if diagonal else start_m
        end = T if diagonal else None
        for start_n in tl.range(
            start_m if diagonal else first, last, BLOCK_N,
            num_stages=1 if diagonal and BLOCK_M == BLOCK_N else None,  # a single block: there is nothing to load ahead
        ):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load_turned(k_ptr, cos_ptr, sin_ptr, start_n, stride_kt, end, TURN, BLOCK_N, D, BLOCK_D)
            v = _load(v_ptr, start_n, stride_vt, end, BLOCK_N, D, BLOCK_D)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2E) - lse[:, None])
            p = _seen(p, offs_m[:, None], offs_n[None, :], padding, diagonal, PADDING, 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = _turn(dq * SCALE, cos_ptr, sin_ptr, start_m, T, -1, D)
    _store(dq_ptr + b * stride_gb + h * D, dq, start_m, stride_gt, T, D)


@triton.jit
def _rope_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, padding_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gt, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, T, H, GROUP,
    D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TURN: tl.constexpr, PADDING: tl.constexpr,
):
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    blocks, heads_kv = tl.cdiv(T, BLOCK_N), H // GROUP
    rows = tl.cdiv(T, 16) * 16
    row, start_n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    b, h_kv, padding = (row // heads_kv).to(tl.int64), row % heads_kv, 0
    later = start_n + BLOCK_N
    if PADDING:
        padding = tl.maximum(tl.load(padding_ptr + b).to(tl.int32), 0)
        later = tl.where(padding < later, later, T)  # a block of padding: nothing below the diagonal
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_ptr, v_ptr = k_ptr + b * stride_kb + h_kv * D, v_ptr + b * stride_vb + h_kv * D
    k = _load_turned(k_ptr, cos_ptr, sin_ptr, start_n, stride_kt, T, TURN, BLOCK_N, D, BLOCK_D)
    v = _load(v_ptr, start_n, stride_vt, T, BLOCK_N, D, BLOCK_D)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for h in range(h_kv * GROUP, h_kv * GROUP + GROUP):
        for diagonal in tl.static_range(2):
            last = tl.minimum(start_n + BLOCK_N, T) if diagonal else T
            for start_m in range(start_n if diagonal else later, last, BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                q_h, do_h, row_h = q_ptr + b * stride_qb + h * D, do_ptr + (b * T * H + h) * D, (b * H + h) * rows
                q = _load_turned(q_h, cos_ptr, sin_ptr, start_m, stride_qt, T, TURN, BLOCK_M, D, BLOCK_D)
                do = _load(do_h, start_m, H * D, T, BLOCK_M, D, BLOCK_D)  # 0 beyond T: such queries add nothing
                lse = tl.load(lse_ptr + row_h + offs_m, mask=offs_m < rows, other=0.0)
                delta = tl.load(delta_ptr + row_h + offs_m, mask=offs_m < rows, other=0.0)
                p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * (SCALE * LOG2E) - lse[None, :])
                p = _seen(p, offs_m[None, :], offs_n[:, None], padding, diagonal, PADDING, 0.0)  # keys by queries
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk = _turn(dk * SCALE, cos_ptr, sin_ptr, start_n, T, -1, D)
    _store(dk_ptr + b * stride_gb + h_kv * D, dk, start_n, stride_gt, T, D)
    _store(dv_ptr + b * stride_gb + h_kv * D, dv, start_n, stride_gt, T, D)


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_xb, stride_xt, T, heads,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_T
    for h in range(heads):
        x = _load(x_ptr + b * stride_xb + h * D, start, stride_xt, T, BLOCK_T, D, BLOCK_D)
        y = _turn(x, cos_ptr, sin_ptr, start, T, 1, D)  # the angles stay in registers
        _store(y_ptr + (b * T * heads + h) * D, y, start, heads * D, T, D)


def rotates_inside(T, D, group, masked, arch):
    """Whether the attention kernels turn q and k themselves, or read them turned by one pass before.

    A pass moves 4 D bytes per key: 85 ps on an H100 at D 64. Inside, a key is turned again for every 128 later queries,
    T / 256 + 1/2 times: 179 instructions a thread per 64 keys, 12 ps if only they count, and 8 D bytes of angles from
    L2, 46 ps if nothing hides them. T = 256: 18 to 69 ps, inside wins; T = 1024: 54 to 207 ps. Wider or masked heads
    would spill, and before sm_90 turned keys reach the tensor cores by way of scalar loads: twice the instructions.
    """
    return arch in ("sm_90", "sm_100") and D <= 64 and T <= 512 and group == 1 and not masked


def launch_config(kernel, D, group=1, float32=False, arch="sm_90"):
    tiles = TILES[kernel, 64 if D <= 64 else 128]
    names = [f"grouped {arch}", arch, "grouped", ""] if group > 1 else [arch, ""]
    m, n, warps, stages = next(tiles[name] for name in names if name in tiles)
    if float32:  # products without tensor cores keep whole rows of both operands in registers
        m, n, warps, stages = {"fwd": (32, 16, 8, 1), "dq": (16, 16, 8, 1), "dkv": (16, 32, 8, 1)}[kernel]
    block_d = max(16, triton.next_power_of_2(D))
    return dict(D=D, SCALE=D**-0.5, BLOCK_D=block_d, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)


def _rotate(x, cos, sin, D):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (B, T, W), block_d = x.shape, max(16, triton.next_power_of_2(D))
    _rotate_kernel[triton.cdiv(T, 32) * B,](
        x, cos, sin, y, *x.stride()[:2], T, W // D, D=D, BLOCK_T=32, BLOCK_D=block_d, num_warps=4
    )
    return y


def _plan(qkv, cos, sin, n_head, n_kv_head, padding, backward):
    """Arguments that the kernels share: tensors, numbers and flags; and constants by kernel name."""
    far = qkv.shape[1] * qkv.stride(1) >= 2**31  # offsets within a sample are int32: int64 ones spill
    qkv = qkv.contiguous() if qkv.stride(-1) != 1 or far else qkv
    cos, sin = cos.contiguous(), sin.contiguous()
    T, W, group = *qkv.shape[1:], n_head // n_kv_head
    D = W // (n_head + 2 * n_kv_head)
    arch = architecture(qkv)
    widths = [n_head * D, n_kv_head * D, n_kv_head * D]
    q, k, v = qkv.split(widths, dim=-1)
    inside = rotates_inside(T, D, group, padding is not None, arch)
    if not inside and backward:
        q, k = _rotate(qkv[..., : W - widths[2]], cos, sin, D).split(widths[:2], dim=-1)
    elif not inside:
        k = _rotate(k, cos, sin, D)  # a query is turned once anyway
    tensors = q, k, v, cos, sin, cos if padding is None else padding.contiguous()
    numbers = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], T, n_head, group
    config = functools.partial(launch_config, D=D, group=group, float32=qkv.dtype == torch.float32, arch=arch)
    return tensors, numbers, dict(TURN=inside, PADDING=padding is not None), config


@torch.library.custom_op("nanollamagen::rope_attention", mutates_args=())
def _rope_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_head: int, n_kv_head: int, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = _outputs(qkv, cos, sin, n_head, n_kv_head, padding)
    if o.numel():
        with on_device(qkv):
            tensors, numbers, flags, config = _plan(qkv, cos, sin, n_head, n_kv_head, padding, backward=False)
            constants = config("fwd")
            grid = (triton.cdiv(qkv.shape[1], constants["BLOCK_M"]) * len(qkv) * n_head,)
            _rope_attention_fwd_kernel[grid](*tensors, o, lse, *numbers, **constants, **flags)
    return o, lse


@torch.library.custom_op("nanollamagen::rope_attention_backward", mutates_args=())
def _rope_attention_backward(
    do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    n_head: int, n_kv_head: int, padding: torch.Tensor | None,
) -> torch.Tensor:
    (B, T, W), dqkv = qkv.shape, torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not dqkv.numel():
        return dqkv
    dq, dk, dv = dqkv.split([x * (o.shape[-1] // n_head) for x in (n_head, n_kv_head, n_kv_head)], dim=-1)
    do, o, lse = do.contiguous(), o.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    with on_device(qkv):
        tensors, numbers, flags, config = _plan(qkv, cos, sin, n_head, n_kv_head, padding, backward=True)
        numbers, constants = (T * W, W, *numbers), config("dq")
        grid = (triton.cdiv(T, constants["BLOCK_M"]) * B * n_head,)
        _rope_attention_dq_kernel[grid](*tensors, o, do, lse, delta, dq, *numbers, **constants, **flags)
        constants = config("dkv")
        grid = (triton.cdiv(T, constants["BLOCK_N"]) * B * n_kv_head,)
        _rope_attention_dkv_kernel[grid](*tensors, do, lse, delta, dk, dv, *numbers, **constants, **flags)
    return dqkv


@_rope_attention.register_fake
def _outputs(qkv, cos, sin, n_head, n_kv_head, padding):
    B, T, W = qkv.shape
    o = torch.empty(B, T, W // (n_head + 2 * n_kv_head) * n_head, dtype=qkv.dtype, device=qkv.device)
    return o, torch.empty(B, n_head, -(-T // 16) * 16, dtype=torch.float32, device=qkv.device)


@_rope_attention_backward.register_fake
def _(do, o, lse, qkv, cos, sin, n_head, n_kv_head, padding):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, cos, sin, ctx.n_head, ctx.n_kv_head, padding = inputs
    ctx.save_for_backward(*output, qkv, cos, sin, padding)
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, _):
    if do is None:
        return (None,) * 6
    *saved, padding = ctx.saved_tensors
    return _rope_attention_backward(do, *saved, ctx.n_head, ctx.n_kv_head, padding), None, None, None, None, None


_rope_attention.register_autograd(_autograd, setup_context=_save)


def rope_attention(qkv, cos, sin, n_head, n_kv_head=None, padding=None):
    """Causal attention over T tokens whose q and k are first turned by their positions.

    qkv [B, T, (H + 2 G) D] = heads of q, of k, of v, float32, bfloat16 or float16; cos, sin float32 [T, D/2], for
    channel pairs (2i, 2i+1); n_head = H; n_kv_head = G, a divisor of H (None: H); padding int32 or int64 [B] or None:
    the first padding[b] tokens are padding that no other token sees and that see themselves only. Scale D^-1/2.
    Returns [B, T, H D] in qkv's dtype. Differentiable once, in qkv; where cos or sin want a gradient, PyTorch computes.
    Raises ValueError where the shapes disagree.
    """
    if padding is not None and padding.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rope_attention: padding has to be int32 or int64, not {padding.dtype}")
    n_kv_head = n_kv_head or n_head
    heads = n_head + 2 * n_kv_head
    D, rest = qkv.shape[-1] // heads, qkv.shape[-1] % heads  # torch.compile knows no divmod of a symbolic width
    shapes = [None if x is None else tuple(x.shape) for x in (qkv, cos, sin, padding)]
    fits = qkv.dim() == 3 and shapes[1:] == [(qkv.shape[1], D // 2)] * 2 + [padding if padding is None else (len(qkv),)]
    if not fits or rest or D % 2 or n_head % n_kv_head:
        raise ValueError(f"rope_attention: qkv, cos, sin, padding are {shapes} for {n_head} and {n_kv_head} heads")
    why = "" if D % 4 == 0 and 16 <= D <= 128 else f"a head of {D} channels is no multiple of 4 from 16 to 128"
    if cos.requires_grad or sin.requires_grad:
        why = "the kernel has no gradient of cos and sin"
    if not use_triton(qkv, why):
        return _rope_attention_sdpa(qkv, cos, sin, n_head, n_kv_head, padding)
    return _rope_attention(qkv, cos, sin, n_head, n_kv_head, padding)[0]
