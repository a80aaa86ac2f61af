"""Output product and cross-entropy in chunks of rows: the logits [N, V] never stand in memory whole.

    l = x W^T    loss = log(sum_j exp(l_j - max l)) + max l - l_target    dl_j = exp(l_j - max l) / sum - [j = target]

Products by the libraries, three of N V C: logits, dx, dw. Between them one kernel turns a chunk's logits into their
gradients in place, in the forward pass where they are at hand: nothing is computed twice.
Bytes: the kernel reads and writes each logit once, 4 bytes in bfloat16, as long as the second read of a row (32 KiB at
V = 16,384) finds it in L1 or L2; passes of PyTorch move 38. Adding a chunk's dw in float32 moves 12 V C. About 20
instructions per logit on sm_90, 0.7 ms of issue for the rows below, 1.3 where nothing overlaps the two exponentials,
beside 1.4 ms of bytes: bound by memory.
Predicted for an H100, 65,536 x 1,024 x 16,384: 8.2 ms of products at full speed, 9.7 at 85%, and 2.2 for all bytes.
Memory: one chunk of logits, dw in float32 and once more in x's dtype; the plain version keeps N x V twice. Of 2^25,
2^26, 2^27, 2^28 logits a chunk has 64, 128, 256, 512 MiB, and adding dw takes 2.1, 1.1, 0.5, 0.3 ms of the above.
A chunk's dw is rounded to x's dtype before it is added, as their sum is in the end: libraries that add the product to
a float32 matrix themselves do so on some GPUs and versions only.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989, section 3.2).
"""

import torch
import torch.nn.functional as F

from kernels import on_device, tl, triton, use_triton

CHUNK, CHUNK_REF = 2**27, 2**25  # logits at a time: 256 MiB in bfloat16 for the kernel, 128 in float32 without it
MAX_BLOCK = 8192
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp guards against denormal numbers, too


def linear_cross_entropy_ref(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float(), targets)


def softmax_loss_ref(logits, targets, gradient):
    wide, index = logits.float(), targets[:, None]
    norms = wide.logsumexp(1, keepdim=True)
    losses = norms - wide.gather(1, index)
    if gradient:
        p = wide.sub_(norms).exp_()
        logits.copy_(p.scatter_add_(1, index, torch.full_like(norms, -1.0)))
    return losses.squeeze(1)


@triton.jit
def _softmax_loss_kernel(
    logits_ptr, target_ptr, loss_ptr, stride_lm, V, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row. Differences to its maximum, not to the log of the sum, which would be rounded to the maximum's ulp."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, offs_v = logits_ptr + row * stride_lm, tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < V)
    logit = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    target = target.to(tl.int32)  # compared with every offset
    top, total = tl.full((), -3.4e38, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, V, BLOCK_V):
        x = tl.load(row_ptr + first + offs_v, mask=first + offs_v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((x - higher) * LOG2E))
        top = higher
    tl.store(loss_ptr + row, tl.log(total) + (top - logit))
    if GRADIENT:
        share = tl.where(inside, 1 / total, float("nan"))  # gradients without a number are skipped, and counted
        for first in range(0, V, BLOCK_V):
            mask = first + offs_v < V
            x = tl.load(row_ptr + first + offs_v, mask=mask, other=float("-inf")).to(tl.float32)
            p = tl.exp2((x - top) * LOG2E) * share
            p = tl.where(first + offs_v == target, p - 1, p)
            tl.store(row_ptr + first + offs_v, p.to(logits_ptr.dtype.element_ty), mask=mask)


def launch_config(V):
    """Constants for rows of V logits: up to 32 of a block per thread."""
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    return dict(BLOCK_V=block, num_warps=max(block // 1024, 1))


def softmax_loss(logits, targets, gradient):
    """Losses float32 [rows] of logits [rows, V], rows of unit stride; these become their gradients where asked for."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    V = logits.shape[1]
    if logits.numel():
        with on_device(logits):
            _softmax_loss_kernel[len(logits),](
                logits, targets.contiguous(), losses, logits.stride(0), V, GRADIENT=gradient, **launch_config(V)
            )
    return losses


@torch.library.custom_op("nanollamagen::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: bool, use_kernel: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, N dx, N dw in float32 (both empty without gradient). All chunks in one operator: torch.compile would else
    move the products of dw to the backward pass, and keep every chunk until then."""
    n, rows = len(x), max(1, (CHUNK if use_kernel else CHUNK_REF) // len(weight))
    loss = torch.zeros((), device=x.device)
    dx = x.new_empty(x.shape if gradient else 0)
    dw = torch.zeros(weight.shape if gradient else 0, device=x.device)
    for first in range(0, n, rows):
        part, index = x[first : first + rows], targets[first : first + rows]
        p = part @ weight.T  # rows, V: logits, then softmax - one-hot
        loss += (softmax_loss if use_kernel else softmax_loss_ref)(p, index, gradient).sum()
        if gradient:
            torch.mm(p, weight, out=dx[first : first + rows])
            dw += p.T @ part
        del p  # or two chunks would be in memory
    return loss / n, dx, dw


@_linear_cross_entropy.register_fake
def _(x, weight, targets, gradient, use_kernel):
    shapes = (x.shape, weight.shape) if gradient else (0, 0)
    wide = dict(dtype=torch.float32)
    return x.new_empty((), **wide), x.new_empty(shapes[0]), x.new_empty(shapes[1], **wide)


def _save(ctx, inputs, output):
    x, weight = inputs[:2]
    ctx.dtype, ctx.n = weight.dtype, x.shape[0]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # of dx and dw, which nothing reads


def _linear_cross_entropy_autograd(ctx, d_loss, *nothing):
    if d_loss is None:
        raise RuntimeError("linear_cross_entropy is differentiable once")
    dx, dw = ctx.saved_tensors
    scale = d_loss / ctx.n  # float32, and here: 1 / N would underflow in float16 products
    return dx * scale, (dw * scale).to(ctx.dtype), None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_autograd, setup_context=_save)


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy, nats, of logits x @ weight.T: x [N, C], weight [V, C], targets int64 [N] -> float32 scalar.

    Under autocast the products are in its dtype; sums and softmax are float32 always. No targets are left out: one that
    is no row of weight makes loss and gradients NaN (on the PyTorch path: raises). Differentiable once; under
    torch.func (jvp, vmap) the PyTorch version over whole logits. ValueError for shapes that do not fit: the kernel
    would read past the end of targets.
    """
    if x.dim() != 2 or targets.shape != x.shape[:1]:
        raise ValueError(f"targets have to be {list(x.shape[:1])} for x {list(x.shape)}, not {list(targets.shape)}")
    if not len(x) or targets.dtype != torch.int64:
        raise ValueError(f"targets have to be int64, one or more, not {targets.dtype} {list(targets.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has to be [V, {x.shape[1]}], not {list(weight.shape)}")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return linear_cross_entropy_ref(x, weight, targets)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return _linear_cross_entropy(x, weight.to(x.dtype), targets, gradient, use_triton(x))[0]
