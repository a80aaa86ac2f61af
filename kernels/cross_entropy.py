"""Output product and cross-entropy in chunks of rows: the logits [N, V] never stand in memory whole.

Matrix products in plain PyTorch, which libraries do best. The gradients are computed in the forward pass, where a
chunk's logits are at hand, in place of them: products for N V C each: logits, dx, dw; nothing is computed twice.
Memory: a few times CHUNK logits and a float32 dw, where the plain version keeps N x V twice.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989, section 3.2).
"""

import torch
import torch.nn.functional as F

CHUNK = 2**25  # logits at a time: 128 MiB


def linear_cross_entropy_ref(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float(), targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        n, rows = len(x), max(1, CHUNK // len(weight))
        loss = torch.zeros((), device=x.device)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        for first in range(0, n, rows):
            part, index = x[first : first + rows], targets[first : first + rows, None]
            logits = (part @ weight.T).float()  # rows, V
            norms = logits.logsumexp(1, keepdim=True)
            loss += (norms - logits.gather(1, index)).sum()
            if with_gradients:
                p = logits.sub_(norms).exp_()
                p = p.scatter_add_(1, index, torch.full_like(norms, -1.0)).to(x.dtype)  # softmax - one-hot
                torch.mm(p, weight, out=dx[first : first + rows])
                dw += p.T @ part
        if with_gradients:
            ctx.save_for_backward(dx, dw)
            ctx.dtype, ctx.n = weight.dtype, n
        return loss / n

    @staticmethod
    def backward(ctx, d_loss):
        dx, dw = ctx.saved_tensors
        scale = d_loss / ctx.n  # float32, and here: 1 / N would underflow in float16 products
        return dx * scale, (dw * scale).to(ctx.dtype), None, None


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy, nats, of logits x @ weight.T: x [N, C], weight [V, C], targets int64 [N] -> float32 scalar.

    Under autocast the products are in its dtype; sums and softmax are float32 always. No targets are left out.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight.to(x.dtype), targets, with_gradients)
