"""RMSNorm, and in the same pass what comes before it in training: s = residual + dropout(x), y = s / sqrt(mean(s^2) +
eps) * weight.

Bytes per element in training, x in bfloat16 and the stream in float32: forward 12 (read x 2 and residual 4, write s 4
and y 2), backward 16 (read dy 2, s 4 and ds 4, write the gradient in both dtypes, 4 + 2), 12 at the final norm, which
has no ds. In one dtype, tensors moved: forward 2 (x, y), 4 with the residual; backward 3 (dy, s, dx), 4 with ds.
Dropout adds no bytes: which elements are kept follows from a seed, in the backward once more.
FLOPs: about 4 forward and 10 backward per element, and 20 to 30 instructions for dropout: bound by memory.
Statistics are float32 and the cast to the input dtype comes before the weight, as the published weights expect.
The sum has the residual's dtype, whatever the branch x was computed in: a float32 stream under autocast stays float32
through all blocks. y has the dtype of x. The statistics are those of the rounded sum, which the backward reads again.
Weight gradient: one float32 row per program, then one sum: no atomics, so it is the same in every run.
Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Llama; random numbers: Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3" (2011), Philox-4x32-7.
"""

import torch
import torch.nn.functional as F

from kernels import on_device, rows_of, tl, triton, use_triton

TILE = 4096  # elements per program, 2 to 4 rows of width 768 to 1536
MAX_WIDTH = 8192


def rms_norm_ref(x, weight, eps, residual=None, dropout=0.0):
    s = x if residual is None else (residual + F.dropout(x, dropout)).to(residual.dtype)
    wide = s if s.dtype == torch.float64 else s.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y.to(x.dtype) * weight.to(x.dtype)
    return y if residual is None else (y, s)


@triton.jit
def _drop(x, seed_ptr, offs_m, dropped, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Dropout of rows offs_m: a share of dropped / 2^32 of their elements is 0, the others grow."""
    offs = offs_m * (BLOCK_W // 4) + tl.arange(0, BLOCK_W // 4)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), offs, 7)  # the fewest rounds that pass its authors' tests
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_M, BLOCK_W)).to(tl.uint32)
    return tl.where(bits >= dropped, x * (4294967296.0 / (4294967296.0 - dropped)), 0.0)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, seed_ptr, y_ptr, s_ptr, stride_xm, stride_rm, M, W, eps, dropped,
    ADD: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    mask_w = offs_w < W
    mask = (offs_m < M) & mask_w
    weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_w, mask=mask, other=0.0)
    s = x.to(tl.float32)
    if DROP:
        s = _drop(s, seed_ptr, offs_m, dropped, BLOCK_M, BLOCK_W)
    if ADD:
        s += tl.load(residual_ptr + offs_m * stride_rm + offs_w, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offs_m * W + offs_w, rounded, mask=mask)
        s = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / W + tl.cast(eps, tl.float32))
    normed = (s * rstd).to(x.dtype).to(tl.float32)
    y = normed * weight.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + offs_m * W + offs_w, y.to(x.dtype), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, seed_ptr, dx_ptr, dbranch_ptr, dweight_ptr, stride_dym, stride_dsm, stride_sm,
    M, W, eps, dropped,
    ADD: tl.constexpr, BOTH: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """dx in the dtype of the stream; BOTH: also that of the branch, in its dtype and after dropout."""
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    mask_w = offs_w < W
    if BLOCK_M > 1:
        weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(dy_ptr.dtype.element_ty).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        mask = (offs_m < M) & mask_w
        dy = tl.load(dy_ptr + offs_m * stride_dym + offs_w, mask=mask, other=0.0)
        s = tl.load(s_ptr + offs_m * stride_sm + offs_w, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / W + tl.cast(eps, tl.float32))
        normed = s * rstd
        dweight += dy.to(tl.float32) * normed.to(dy.dtype).to(tl.float32)
        if BLOCK_M == 1:  # a wide row takes too many registers to keep it
            weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(dy.dtype).to(tl.float32)
        dnormed = dy.to(tl.float32) * weight
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=1, keep_dims=True) / W))
        if ADD:
            dx += tl.load(ds_ptr + offs_m * stride_dsm + offs_w, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs_m * W + offs_w, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if DROP:
            dx = _drop(dx, seed_ptr, offs_m, dropped, BLOCK_M, BLOCK_W)
        if BOTH:
            tl.store(dbranch_ptr + offs_m * W + offs_w, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    dweight_ptrs = dweight_ptr + tl.program_id(0).to(tl.int64) * W + offs_w
    tl.store(dweight_ptrs, tl.sum(dweight, axis=0, keep_dims=True), mask=mask_w)


def launch_config(W, backward):
    """Constants for rows of width W. The backward has smaller tiles: it keeps dweight in registers."""
    block_w, tile = max(triton.next_power_of_2(W), 4), TILE // 2 if backward else TILE
    warps = max(4, block_w // (512 if backward else 1024))
    return dict(BLOCK_M=min(max(tile // block_w, 1), 64), BLOCK_W=block_w, num_warps=warps)


def _dropped(dropout):
    return round(dropout * 2**32)


def _forward(x, weight, eps, residual=None, dropout=0.0, seed=None):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = torch.empty(x.shape, dtype=residual.dtype, device=x.device) if residual is not None else y
    if x.numel():
        config, xs, weight = launch_config(x.shape[-1], backward=False), rows_of(x), weight.contiguous()
        rs = xs if residual is None else rows_of(residual)
        M, W = xs.shape
        with on_device(x):
            _rms_norm_fwd_kernel[triton.cdiv(M, config["BLOCK_M"]),](
                xs, rs, weight, weight if seed is None else seed, y, s, xs.stride(0), rs.stride(0), M, W, eps,
                _dropped(dropout), ADD=residual is not None, DROP=seed is not None, **config,
            )
    return y, s


@torch.library.custom_op("nanollamagen::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _forward(x, weight, eps)[0]


@torch.library.custom_op("nanollamagen::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, dropout: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, weight, eps, residual, dropout, seed)


@torch.library.custom_op("nanollamagen::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor, ds: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor, eps: float, x_dtype: torch.dtype,
    dropout: float, seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the sum in its dtype, that of x (empty where they are the same), that of the weight."""
    both = x_dtype != s.dtype or seed is not None
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dbranch = torch.empty(s.shape if both else 0, dtype=x_dtype, device=s.device)
    if not s.numel():
        return dx, dbranch, torch.zeros_like(weight)
    config, dys, rows = launch_config(s.shape[-1], backward=True), rows_of(dy), rows_of(s)
    dss = dys if ds is None else rows_of(ds)
    M, W = rows.shape
    # What stays resident on a multiprocessor: 16 warps at up to 128 registers (4 programs up to a width of 2048, 1 at
    # 8192), 24 at up to 80, which is what 16 bits take without dropout
    resident = (24 if s.element_size() == 2 and seed is None else 16) // config["num_warps"]
    most = resident * torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else 2
    programs = min(triton.cdiv(M, config["BLOCK_M"]), most)
    partial = torch.empty(programs, W, dtype=torch.float32, device=s.device)
    with on_device(s):
        _rms_norm_bwd_kernel[programs,](
            dys, dss, rows, weight.contiguous(), weight if seed is None else seed, dx, dbranch if both else dx, partial,
            dys.stride(0), dss.stride(0), rows.stride(0), M, W, eps, _dropped(dropout), ADD=ds is not None, BOTH=both,
            DROP=seed is not None, **config,
        )
    return dx, dbranch, partial.sum(0).to(weight.dtype)


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@_add_rms_norm.register_fake
def _(x, weight, eps, residual, dropout, seed):
    return x.new_empty(x.shape), residual.new_empty(x.shape)


@_rms_norm_backward.register_fake
def _(dy, ds, s, weight, eps, x_dtype, dropout, seed):
    dbranch = s.new_empty(0 if x_dtype == s.dtype and seed is None else s.shape, dtype=x_dtype)
    return s.new_empty(s.shape), dbranch, weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.eps, _, ctx.dropout, seed = (*inputs, None, 0.0, None)[:6]
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if isinstance(output, torch.Tensor) else output[1], weight, seed)
    ctx.set_materialize_grads(False)  # the sum of the last block has no gradient: a pass over zeros saved


def _rms_norm_autograd(ctx, dy, ds=None):
    s, weight, seed = ctx.saved_tensors
    dy = torch.zeros_like(s, dtype=ctx.x_dtype) if dy is None else dy
    dx, dbranch, dweight = _rms_norm_backward(dy, ds, s, weight, ctx.eps, ctx.x_dtype, ctx.dropout, seed)
    return dbranch if dbranch.shape == dx.shape else dx, dweight, None, dx, None, None


_rms_norm.register_autograd(lambda ctx, dy: _rms_norm_autograd(ctx, dy)[:3], setup_context=_save)
_add_rms_norm.register_autograd(_rms_norm_autograd, setup_context=_save)


def rms_norm(x, weight, eps, residual=None, dropout=0.0):
    """RMSNorm of x, or of s = residual + dropout(x), over the last dimension.

    x [..., W] float32, bfloat16 or float16, any strides; weight [W]; residual of x's shape, of any of these dtypes;
    dropout: the share of x's elements that are 0 in the sum, others grow by 1 / (1 - dropout); its random numbers
    follow from PyTorch's generator of the device. Returns y in the dtype of x, with a residual (y, s) with s in the
    dtype of the residual. Differentiable once. Raises ValueError where the shapes disagree, or for dropout that is no
    share or has no residual. Source: Zhang and Sennrich (2019).
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"rms_norm: {shapes}, residual {None if residual is None else tuple(residual.shape)}")
    if not 0 <= dropout <= 1 or dropout and residual is None:
        raise ValueError(f"rms_norm: dropout is a share of what is added to a residual, not {dropout}")
    why = "" if x.shape[-1] <= MAX_WIDTH else f"rows of {x.shape[-1]} are wider than {MAX_WIDTH}"
    if not use_triton(x, why) or (residual is not None and not use_triton(residual)):
        return rms_norm_ref(x, weight, eps, residual, dropout)
    if residual is None:
        return _rms_norm(x, weight, eps)
    seed = torch.randint(2**31, (1,), device=x.device) if dropout else None
    return _add_rms_norm(x, weight, eps, residual, dropout, seed)
