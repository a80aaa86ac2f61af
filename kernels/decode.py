"""Attention of one new token per sample over the keys and values in a cache: y = softmax(R q (R K)^T / sqrt(D)) V.

The pass that attends also turns q and k by the angles of the token's position (R, as in rope_attention) and writes k
and v to the cache. Bytes: K and V of the prefix once, 4 B G t D in 16 bits for t keys; FLOPs: 4 B H t D, one per byte
without groups: bound by memory, for short prefixes by its latency. Predicted for an H100 (3.0 TB/s), 16 rows of GPT-L:
5.6 us of bytes at t = 256, 2.8 us at the mean prefix of a run; with the start and one or two trips to memory about 8 us
and 5 us. A product with the whole cache under a mask would move twice the bytes over a run.

One program per query head and sample: a vector times a matrix has no use for tensor cores. Each of the BLOCK_N rows of
a block has a softmax of its own over the keys that it meets, and these are merged once, after the loop. K and V come by
asynchronous copies, two blocks or 32 KiB at a time: loads into registers would be issued, and waited for, one by one to
save registers. The position is read on the device, and no number of programs depends on it: one captured CUDA graph
serves every step. Where programs are few and the cache is long, each prefix is cut into SPLITS parts, which a second
kernel adds. Where cache rows are multiples of 8 channels, copies take 16 bytes: strides are constants, and the mask
takes in a row's pad, whose values are dropped.
"""

import torch

from kernels import add_warps, on_device, tl, triton, use_triton

LOG2E = tl.constexpr(1.4426950408889634)


def decode_attention_ref(qkv, cos, sin, k_cache, v_cache, position, n_head, n_kv_head, padding):
    """Few operations: on a CPU their overhead counts. There only the prefix is read; on a GPU, where the host does not
    know the position, the whole cache, and it must hold no NaN; nor must padding on a CPU."""
    (B, _, S, _), D = k_cache.shape, 2 * cos.shape[1]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    x = qkv.to(wide)
    x = x.clone(memory_format=torch.contiguous_format) if x.storage_offset() % 2 or not x.is_contiguous() else x
    x = x.view(B, -1, D // 2, 2)  # pairs as complex numbers: one product turns them
    on_cpu = qkv.device.type == "cpu"
    if on_cpu:
        at = position.item()
        if not 0 <= at < S:
            raise ValueError(f"decode_attention: position {at} is not within a cache of {S} tokens")
    angles = [table[at] if on_cpu else table.index_select(0, position) for table in (cos, sin)]
    turned = torch.view_as_complex(x[:, : n_head + n_kv_head]) * torch.complex(*angles)
    turned = torch.view_as_real(turned).view(B, -1, D)
    q, k, v = turned[:, :n_head], turned[:, n_head:], x[:, n_head + n_kv_head :].flatten(2)  # B, H or G, D
    if on_cpu:
        k_cache[:, :, at, :D], v_cache[:, :, at, :D] = k, v
    else:
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[..., :D].index_copy_(2, position, new[:, :, None].to(cache.dtype))
    end = at + 1 if on_cpu else S
    k, v = (cache[:, :, :end, :D].flatten(0, 1).to(wide) for cache in (k_cache, v_cache))  # B G, t, D
    q = q.reshape(len(k), -1, D)  # B G, H/G, D
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=D**-0.5)
    if padding is not None or not on_cpu:
        i = torch.arange(end, device=qkv.device)
        unseen = i > position
        if padding is not None:
            unseen = unseen | (i < torch.minimum(padding, position)[:, None])
        scores.view(B, n_head, end).masked_fill_(unseen.view(-1, 1, end), float("-inf"))
    return torch.bmm(scores.softmax(-1), v).view(B, -1).to(qkv.dtype)


@triton.jit
def _load_head(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)


@triton.jit
def _turn(x, cos, sin):
    a, b = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def _decode_attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, position_ptr, padding_ptr, y_ptr, part_ptr, top_ptr, total_ptr,
    stride_qb, S, H, GROUP, STRIDE_B: tl.constexpr, STRIDE_G: tl.constexpr, STRIDE_S: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    PADDING: tl.constexpr,
):
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    b, h = (row // H).to(tl.int64), row % H
    g, offs_n, offs_d = h // GROUP, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    position = tl.minimum(tl.maximum(tl.load(position_ptr).to(tl.int32), 0), S - 1)  # at worst wrong, never outside
    first, padding = 0, 0
    if PADDING:
        padding = tl.maximum(tl.load(padding_ptr + b).to(tl.int32), 0)
        first = tl.minimum(padding, position) // BLOCK_N * BLOCK_N
    cos = _load_head(cos_ptr + position * (D // 2), D // 2, BLOCK_D // 2)
    sin = _load_head(sin_ptr + position * (D // 2), D // 2, BLOCK_D // 2)
    qkv_ptr += b * stride_qb
    q = _turn(_load_head(qkv_ptr + h * D, D, BLOCK_D), cos, sin) * (SCALE * LOG2E)  # 0 beyond D
    new_k = _turn(_load_head(qkv_ptr + (H + g) * D, D, BLOCK_D), cos, sin).to(k_ptr.dtype.element_ty)
    new_v = _load_head(qkv_ptr + (H + H // GROUP + g) * D, D, BLOCK_D).to(v_ptr.dtype.element_ty)
    k_ptr, v_ptr = k_ptr + b * STRIDE_B + g * STRIDE_G, v_ptr + b * STRIDE_B + g * STRIDE_G
    if (split == 0) & (h % GROUP == 0):
        tl.store(k_ptr + position * STRIDE_S + offs_d, new_k, mask=offs_d < D)
        tl.store(v_ptr + position * STRIDE_S + offs_d, new_v, mask=offs_d < D)
    own = (offs_n == 0) & (split == 0)  # the token sees itself from registers, so no program waits for another's store
    top = tl.where(own, tl.sum(q * new_k.to(tl.float32)), -1e30)  # finite: rows of padding give exp2(-inf), not NaN
    total = tl.where(own, 1.0, 0.0)
    acc = tl.where(own[:, None], new_v.to(tl.float32)[None, :], 0.0)  # BLOCK_N, BLOCK_D
    size = tl.cdiv(tl.cdiv(position - first, BLOCK_N), SPLITS) * BLOCK_N
    first += split * size
    last = tl.minimum(first + size, position)
    for start_n in tl.range(first, last, BLOCK_N, num_stages=3):  # copied by way of shared memory, two blocks ahead
        seen = offs_n < last - start_n
        if PADDING:
            seen &= offs_n >= padding - start_n
        offs = start_n * STRIDE_S + (offs_n[:, None] * STRIDE_S + offs_d[None, :])
        mask = seen[:, None] & (offs_d[None, :] < PADDED) if PADDED < BLOCK_D else seen[:, None]
        k = tl.load(k_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        products = q[None, :] * k.to(tl.float32)
        if PADDED > D:
            products = tl.where(offs_d[None, :] < D, products, 0.0)  # a pad may be NaN
        s = tl.where(seen, tl.sum(products, 1), float("-inf"))
        new_top = tl.maximum(top, s)
        p, shrink = tl.exp2(s - new_top), tl.exp2(top - new_top)
        total, top = total * shrink + p, new_top
        acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
    highest = tl.max(top)
    share = tl.exp2(top - highest)
    total = tl.sum(total * share)
    LANES: tl.constexpr = min(256 // BLOCK_D, BLOCK_N // 4)  # rows side by side in a warp: a thread has 8 channels
    acc = tl.reshape(acc * share[:, None], (BLOCK_N // (4 * LANES), 4, LANES, BLOCK_D))
    acc = add_warps(tl.sum(tl.sum(acc, 0), 1, keep_dims=True)).reshape(BLOCK_D)
    if SPLITS == 1:
        tl.store(y_ptr + row.to(tl.int64) * D + offs_d, (acc / total).to(y_ptr.dtype.element_ty), mask=offs_d < D)
    else:
        part = row * SPLITS + split
        tl.store(part_ptr + part.to(tl.int64) * D + offs_d, acc, mask=offs_d < D)
        tl.store(top_ptr + part, highest)
        tl.store(total_ptr + part, total)


@triton.jit
def _add_parts_kernel(
    part_ptr, top_ptr, total_ptr, y_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):
    row, offs_s, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top, total = tl.load(top_ptr + row * SPLITS + offs_s), tl.load(total_ptr + row * SPLITS + offs_s)
    offs = (row * SPLITS + offs_s[:, None]) * D + offs_d[None, :]
    part = tl.load(part_ptr + offs, mask=offs_d[None, :] < D, other=0.0)
    share = tl.exp2(top - tl.max(top))  # 0 for a part without keys
    y = tl.sum(part * share[:, None], 0) / tl.sum(total * share)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=offs_d < D)


def launch_config(D):
    """32 channels of K and as many of V per thread and block."""
    block_d = max(16, triton.next_power_of_2(D))
    return dict(D=D, SCALE=D**-0.5, BLOCK_N=min(4096 // block_d, 128), BLOCK_D=block_d, num_warps=4)


def count_splits(programs, blocks, multiprocessors):
    """Parts of a prefix, a power of two, from sizes alone: to get two programs per multiprocessor, but a part for no
    fewer than eight of the cache's blocks, which take about as long as the second kernel (predicted, not measured)."""
    return 1 << (max(min(2 * multiprocessors // programs, blocks // 8), 1).bit_length() - 1)


def _decode_attention_triton(qkv, cos, sin, k_cache, v_cache, position, n_head, n_kv_head, padding):
    (B, _, S, padded), D = k_cache.shape, 2 * cos.shape[1]
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    config, rows = launch_config(D), B * n_head
    processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count if qkv.is_cuda else 1
    splits = count_splits(rows, triton.cdiv(S, config["BLOCK_N"]), processors)
    y = torch.empty(B, n_head * D, dtype=qkv.dtype, device=qkv.device)
    part, top, total = y, y, y
    if splits > 1:
        part = torch.empty(rows * splits, D, dtype=torch.float32, device=qkv.device)
        top, total = part.new_empty(2, rows * splits)
    with on_device(qkv):
        _decode_attention_kernel[rows * splits,](
            qkv, cos.contiguous(), sin.contiguous(), k_cache, v_cache, position,
            position if padding is None else padding.contiguous(), y, part, top, total, qkv.stride(0), S, n_head,
            n_head // n_kv_head, *k_cache.stride()[:3], PADDED=padded, SPLITS=splits, PADDING=padding is not None,
            **config,
        )
        if splits > 1:
            _add_parts_kernel[rows,](part, top, total, y, D, config["BLOCK_D"], splits, num_warps=1)
    return y


@torch.library.custom_op("nanollamagen::decode_attention", mutates_args=("k_cache", "v_cache"))
def _decode_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    position: torch.Tensor, n_head: int, n_kv_head: int, padding: torch.Tensor | None, use_kernel: bool,
) -> torch.Tensor:
    if not len(qkv):
        return qkv.new_empty(0, 2 * cos.shape[1] * n_head)
    attend = _decode_attention_triton if use_kernel else decode_attention_ref
    return attend(qkv, cos, sin, k_cache, v_cache, position, n_head, n_kv_head, padding)


@_decode_attention.register_fake
def _(qkv, cos, sin, k_cache, v_cache, position, n_head, n_kv_head, padding, use_kernel):
    return qkv.new_empty(qkv.shape[0], 2 * cos.shape[1] * n_head)


def decode_attention(qkv, cos, sin, k_cache, v_cache, position, n_head, n_kv_head=None, padding=None):
    """Attention of the token at `position` over the cache up to it, into which its turned k and its v are written.

    qkv [B, (H + 2 G) D] = heads of q, of k, of v, float32, bfloat16 or float16; cos, sin float32 [S or more, D/2], for
    channel pairs (2i, 2i+1); k_cache, v_cache [B, G, S, D or more], any strides but the last, written in place at
    [:, :, position, :D]; position int64 [1], below S, on the same device; n_head = H; n_kv_head = G, a divisor of H
    (None: H); padding int32 or int64 [B] or None: the first padding[b] keys are not seen, except that a token
    always sees itself. Scale D^-1/2. Cache rows beyond these, and columns from D on, may hold anything (on the PyTorch
    path: nothing but numbers in rows that it masks). Returns [B, H D] in qkv's dtype. No host synchronisation on a GPU.
    What a row gets does not depend on the others, on a GPU as long as `count_splits` is the same for their number.
    No gradient. Raises ValueError where the shapes disagree, and for a position outside of the cache on a CPU.
    """
    n_kv_head = n_kv_head or n_head
    heads, (*batch, S, padded) = n_head + 2 * n_kv_head, k_cache.shape
    B, D = len(qkv), qkv.shape[-1] // heads
    fits = qkv.dim() == 2 and qkv.shape[1] == D * heads and D % 2 == 0 and n_head % n_kv_head == 0
    fits = fits and batch == [B, n_kv_head] and padded >= D and v_cache.shape == k_cache.shape
    fits = fits and cos.shape == sin.shape and cos.dim() == 2 and cos.shape[1] == D // 2 and len(cos) >= S
    if not fits or position.shape != (1,) or (padding is not None and padding.shape != (B,)):
        tensors = qkv, cos, sin, k_cache, v_cache, position, padding
        names = "qkv, cos, sin, k_cache, v_cache, position, padding"
        shapes = [None if x is None else tuple(x.shape) for x in tensors]
        raise ValueError(f"decode_attention: {names} are {shapes} for {n_head} and {n_kv_head} heads")
    why = "" if D % 4 == 0 and 16 <= D <= 128 else f"a head of {D} channels is no multiple of 4 from 16 to 128"
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        why = why or "the caches have different strides, or rows with gaps"
    args = qkv.detach(), cos, sin, k_cache, v_cache, position, n_head, n_kv_head, padding
    kernel = use_triton(qkv, why)
    if not kernel and B and not torch.compiler.is_compiling():  # an operator takes 50 us on a CPU
        return decode_attention_ref(*args)
    return _decode_attention(*args, kernel)
