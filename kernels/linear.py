"""Products for few rows, bound by reading the weight: a step of the sampler has a row for each image.

On a GPU one kernel computes y = W x, with what stands before and after it in a Llama's block:

    y = residual + W x        y = W norm(x)        y = silu(a) b  for  [a | b] = W norm(x)

Bytes: the weight once, 2 N K in 16 bits (GPT-L: 2 to 12 MB, 0.7 to 3.8 us at an H100's 3.0 TB/s); the rows of x, which
every program reads, come from L2. FLOPs: 2 M N K, at 16 rows 16 per byte: bound by memory, and by the microseconds that
a kernel takes to start, to wait for its first bytes and to end. So norm, SwiGLU and residual add have no kernel of
their own. W (g x) / rms(x) = W norm(x) for the norm's weight g: the sum is divided at the end, and g x is rounded once,
where the norm alone rounds twice. rms(x) is known before: a program that adds a residual stores the length (2-norm) of
its part of every row, and the norm adds the squares of all parts. A program has BLOCK_N rows of the weight, whole: no
sum depends on the order of programs. Weights come by asynchronous copies, two or three blocks ahead: 64 programs (of
N = 1,024) have 1.5 MB on their way, about what memory's latency asks for. More than MAX_ROWS rows are left to cuBLAS.

The four warps divide each block's depth, as a batched product, and add up at the end: dividing the tile of y, each
would read all of x, and wait for each tensor-core product before the next. For shared memory without bank conflicts
Triton has to swizzle both tiles by their rows. It swizzles by the dimension next to the depth in the layout that it
chooses: a batch's left operand as it is would be swizzled by part, and 8 rows of x share their banks; one that is
transposed first, by row; one that is used besides the product (for squares), not at all.

On a CPU the weight is laid out once the way oneDNN reads it. In PyTorch's own layout each product costs up to three
times as much: GPT-B's matrices times 8 rows took 45 ms in float32 and 17 in bfloat16, packed 14 and 8 (2 cores of an
AMD EPYC, 27 GB/s). A CPU that has no bfloat16 products emulates them, at twice to four times the time of float32: its
copies of bfloat16 weights are float32. The copy takes as much memory as the weight (or twice that), and a pass over it.
Rows do not influence each other: a row gives the same bits in any batch, but for torch 2.11 on CPUs without AVX-512;
for that, one row is multiplied as two. The two operators are those that Inductor emits for frozen CPU weights.
"""

import platform

import torch
import torch.nn.functional as F

from kernels import add_warps, on_device, tl, triton, use_triton
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.swiglu import swiglu, swiglu_ref

MAX_ROWS = 32
PARTS = tl.constexpr(4)  # of the depth of a block, one for each warp


def skinny_linear_ref(x, weight, norm_weight, eps, residual, gated):
    y = F.linear(x if norm_weight is None else rms_norm_ref(x, norm_weight, eps), weight)
    y = swiglu_ref(y) if gated else y
    return y if residual is None else residual + y


def _one_by_one(x, weight, norm_weight, eps, residual, gated, packed=None):
    """The same by libraries and the other kernels; the residual is overwritten."""
    x = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    if packed is None and not gated and residual is not None:
        return residual.addmm_(x, weight.T)  # in place, one kernel of cuBLAS; apart from it the sum would be another
    y = F.linear(x, weight) if packed is None else packed_linear(x, packed)
    y = swiglu(y) if gated else y
    return y if residual is None else residual.add_(y)


@triton.jit
def _skinny_linear_kernel(
    x_ptr, weight_ptr, norm_ptr, length_ptr, residual_ptr, y_ptr, y_length_ptr, stride_xm, stride_rm, M, N, P, eps,
    K: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):
    """The product with BLOCK_N of the weight's N rows; with GATED rows of its two halves take turns."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, PARTS)[:, None] * (BLOCK_K // PARTS) + tl.arange(0, BLOCK_K // PARTS)[None, :]
    mask_m, mask_n = (offs_m < M)[None, None, :], (offs_n < N)[None, :, None]
    row = offs_n // 2 + offs_n % 2 * (N // 2) if GATED else offs_n
    x_ptrs = x_ptr + offs_k[:, :, None] + offs_m[None, None, :].to(tl.int64) * stride_xm  # PARTS, depth, BLOCK_M
    w_ptrs = weight_ptr + row[None, :, None].to(tl.int64) * K + offs_k[:, None, :]  # PARTS, BLOCK_N, depth
    acc = tl.zeros((PARTS, BLOCK_M, BLOCK_N), tl.float32)
    if NORM:
        offs_p = tl.arange(0, BLOCK_P)[:, None]
        length = tl.load(length_ptr + offs_p * M + offs_m, mask=(offs_p < P) & (offs_m < M), other=0.0)
        norm = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):  # copied by way of shared memory, STAGES - 1 blocks ahead
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs + k, mask=mask_m & mask_k[:, :, None], other=0.0)
        w = tl.load(w_ptrs + k, mask=mask_n & mask_k[:, None, :], other=0.0)
        if NORM:
            x = (x.to(tl.float32) * norm.to(tl.float32)[:, :, None]).to(x.dtype)
            norm_ptr += BLOCK_K  # a block ahead, too, else it might be waited for
            norm = tl.load(norm_ptr + offs_k, mask=offs_k < K - k - BLOCK_K, other=0.0)
        acc = tl.dot(tl.trans(x, 0, 2, 1), tl.trans(w, 0, 2, 1), acc, input_precision="ieee")
    y = add_warps(acc)
    if NORM:
        rstd = tl.rsqrt(tl.sum(length * length, 0) / K + tl.cast(eps, tl.float32))  # not earlier: copies would wait
        y *= rstd[:, None]
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        y = gate * tl.sigmoid(gate) * up
        N //= 2
        offs_n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    offs_m = offs_m.to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if ADD:
        y += tl.load(residual_ptr + offs_m[:, None] * stride_rm + offs_n, mask=mask, other=0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n, y, mask=mask)
    if ADD:
        wide = y.to(tl.float32)  # 0 beyond N
        length = tl.sqrt(tl.sum(wide * wide, 1))
        tl.store(y_length_ptr + tl.program_id(0) * M + offs_m, length, mask=offs_m < M)


def launch_config(M, N, gated, dtype):
    """Constants for M rows of x and N of the weight: two or three blocks of it ahead, 24 or 32 KiB."""
    block_m = 16 if M <= 16 else 32
    block_n = 32 if N >= 8192 or gated else 16
    block_k = 64 if dtype == torch.float32 else 128 if block_m + block_n == 64 else 256
    return dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3 if block_m + block_n == 48 else 4, num_warps=4
    )


@torch.library.custom_op("nanollamagen::skinny_linear", mutates_args=())
def _skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None, eps: float, lengths: torch.Tensor | None,
    residual: torch.Tensor | None, gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    (M, K), N, P = x.shape, len(weight), 1 if norm_weight is None else len(lengths)
    config = launch_config(M, N, gated, x.dtype)
    y, y_lengths = _outputs(x, weight, residual, gated)
    norm, lengths = (x, y_lengths) if norm_weight is None else (norm_weight.contiguous(), lengths.contiguous())
    added = x if residual is None else residual
    if y.numel():
        with on_device(x):
            _skinny_linear_kernel[triton.cdiv(N, config["BLOCK_N"]),](
                x, weight.contiguous(), norm, lengths, added, y, y_lengths, x.stride(0), added.stride(0), M, N, P, eps,
                K=K, NORM=norm_weight is not None, ADD=residual is not None, GATED=gated,
                BLOCK_P=triton.next_power_of_2(P), **config,
            )
    return y, y_lengths


@_skinny_linear.register_fake
def _(x, weight, norm_weight, eps, lengths, residual, gated):
    return _outputs(x, weight, residual, gated)


def _outputs(x, weight, residual, gated):
    """y, and lengths of its rows, which have a part for each program; none without a residual."""
    (M, _), N = x.shape, len(weight)
    parts = 0 if residual is None else -(-N // launch_config(M, N, gated, x.dtype)["BLOCK_N"])
    return x.new_empty(M, N // 2 if gated else N), x.new_empty(parts, M, dtype=torch.float32)


def skinny_linear(x, weight, norm_weight=None, eps=0.0, lengths=None, residual=None, gated=False, packed=None):
    """W norm(x), or swiglu(W norm(x)) if gated, for few rows; without norm_weight W x. With a residual (the sum,
    lengths): pass these on with the sum to the product of its norm, which then need not read all of it first.

    x [B, K] and weight [N, K] of one dtype, norm_weight [K], residual [B, N] (gated: [B, N/2]) -> [B, N] or [B, N/2].
    lengths, float32 [P, B], are the 2-norms of P parts of each row of x, or None: not known. The residual may be
    overwritten. packed: what `pack` made of the weight, for a CPU. Other dtypes than float32 and bfloat16, and more
    than MAX_ROWS rows, take the operations one by one. No gradient. Raises ValueError where the shapes disagree.
    """
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and (not gated or len(weight) % 2 == 0)
    fits = fits and (norm_weight is None or norm_weight.shape == x.shape[1:])
    if lengths is not None:
        fits = fits and norm_weight is not None and lengths.dim() == 2 and len(lengths) and lengths.shape[1] == len(x)
        fits = fits and lengths.dtype == torch.float32
    if not fits or residual is not None and residual.shape != (len(x), N):
        shapes = [None if t is None else tuple(t.shape) for t in (x, weight, norm_weight, lengths, residual)]
        raise ValueError(f"skinny_linear: x, weight, norm_weight, lengths, residual are {shapes}" + ", gated" * gated)
    served = len(x) <= MAX_ROWS and x.dtype in (torch.float32, torch.bfloat16) and x.dtype == weight.dtype
    if served and use_triton(x):
        if norm_weight is not None and lengths is None:
            lengths = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)[None]
        y, lengths = _skinny_linear(x, weight, norm_weight, eps, lengths, residual, gated)
    else:
        y, lengths = _one_by_one(x, weight, norm_weight, eps, residual, gated, packed), None
    return y if residual is None else (y, lengths)


def _multiplies_bfloat16():
    """Whether the CPU has instructions for it."""
    known = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return known and (platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported())


def pack(weight, rows):
    """A copy of weight [N, K] for packed_linear with about `rows` rows, or None where PyTorch's layout has to do."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return None
    emulated = weight.dtype == torch.bfloat16 and not _multiplies_bfloat16()
    weight = weight.detach().float() if emulated else weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, 2))


def packed_linear(x, packed):
    """x [..., K], packed by `pack` from [N, K] -> [..., N] in x's dtype. No gradients."""
    if x.numel() == x.shape[-1]:  # one row takes another path, with other rounding
        return packed_linear(x.expand(2, *x.shape).flatten(0, -2), packed)[:1].view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, None, "none", [], "").to(x.dtype)
