"""y = x W^T for few rows of x on a CPU, bound by reading W: the weight is laid out once the way oneDNN reads it.

In PyTorch's own layout each product costs up to three times as much: GPT-B's matrices times 8 rows took 45 ms in
float32 and 17 in bfloat16, packed 14 and 8 (2 cores of an AMD EPYC, 27 GB/s). A CPU that has no bfloat16 products
emulates them, at twice to four times the time of float32: its copies of bfloat16 weights are float32.
The copy takes as much memory as the weight (or twice that), and a pass over it. Rows do not influence each other: a row
gives the same bits in any batch, but for torch 2.11 on CPUs without AVX-512; for that, one row is multiplied as two.
The two operators are those that Inductor emits for frozen CPU weights; GPUs have cuBLAS.
"""

import platform

import torch


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
