"""SwiGLU: y = silu(gate) * up, both halves read from one fused projection x = [gate | up].

Elements per token: forward reads 2H and writes H, backward reads 3H and writes 2H (only x is kept, silu is recomputed).
FLOPs: about 5 per output forward, 12 backward, one exp2 each: bound by memory on every GPU.
The gradient does not overwrite x: a second backward (retain_graph) or a CUDA graph would read it again.
Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

import torch
import torch.nn.functional as F

from kernels import on_device, rows_of, tl, triton, use_triton

TILE = 2048  # elements per program: 16 per thread, two 128-bit loads of 16-bit values


def swiglu_ref(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _offsets(M, H, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    blocks_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    offs_m = (pid // blocks_h).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = pid % blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    return offs_m[:, None], offs_h[None, :], (offs_m < M)[:, None] & (offs_h < H)[None, :]


@triton.jit
def _swiglu_fwd_kernel(x_ptr, y_ptr, stride_xm, M, H, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    offs_m, offs_h, mask = _offsets(M, H, BLOCK_M, BLOCK_H)
    x_ptrs = x_ptr + offs_m * stride_xm + offs_h
    gate = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + H, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m * H + offs_h, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, stride_dym, stride_xm, M, H, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    offs_m, offs_h, mask = _offsets(M, H, BLOCK_M, BLOCK_H)
    x_ptrs = x_ptr + offs_m * stride_xm + offs_h
    gate = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + H, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs_m * stride_dym + offs_h, mask=mask, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    silu = gate * sig
    dx_ptrs = dx_ptr + offs_m * (2 * H) + offs_h
    tl.store(dx_ptrs, dy * up * (sig + silu * (1 - sig)), mask=mask)  # silu' = sig + silu (1 - sig)
    tl.store(dx_ptrs + H, dy * silu, mask=mask)


def launch_config(H):
    """Constants: tiles of TILE elements, several rows where H is narrow."""
    block_h = min(1024, triton.next_power_of_2(H))
    return dict(BLOCK_M=TILE // block_h, BLOCK_H=block_h, num_warps=4)


def _grid(M, H, config):
    return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(H, config["BLOCK_H"]),)


@torch.library.custom_op("nanollamagen::swiglu", mutates_args=())
def _swiglu(x: torch.Tensor) -> torch.Tensor:
    rows, H = rows_of(x), x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], H, dtype=x.dtype, device=x.device)
    if y.numel():
        M, config = len(rows), launch_config(H)
        with on_device(x):
            _swiglu_fwd_kernel[_grid(M, H, config)](rows, y, rows.stride(0), M, H, **config)
    return y


@torch.library.custom_op("nanollamagen::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows, dy, H = rows_of(x), rows_of(dy), x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        M, config = len(rows), launch_config(H)
        with on_device(x):
            _swiglu_bwd_kernel[_grid(M, H, config)](dy, rows, dx, dy.stride(0), rows.stride(0), M, H, **config)
    return dx


@_swiglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _save_x(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors), setup_context=_save_x)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate | up].

    x [..., 2H] float32, bfloat16 or float16, any strides -> [..., H] of the same dtype; differentiable once.
    Raises ValueError for an odd last dimension. Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu needs an even last dimension [gate | up], got {x.shape[-1]}")
    return _swiglu(x) if use_triton(x) else swiglu_ref(x)
