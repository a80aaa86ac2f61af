"""y = x W^T for few rows of x on a CPU, bound by reading W: the weight is laid out once the way oneDNN reads it.

Both entries of a model's step cost, in PyTorch's own layout, twice to three times the packed product: GPT-B's matrices
times 8 rows took 45 ms in float32 and 17 in bfloat16, packed 14 and 8 (2 cores of an AMD EPYC, 27 GB/s). The copy takes
as much memory as the weight, and a pass over it. Rows do not influence each other: a row gives the same bits in any
batch of two or more, and one row is multiplied as two for that.
The two operators are those that Inductor emits for frozen CPU weights; GPUs have cuBLAS.
"""

import torch


def pack(weight, rows):
    """A copy of weight [N, K] for packed_linear with about `rows` rows, or None where PyTorch's layout has to do."""
    known = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), max(rows, 2))


def packed_linear(x, packed):
    """x [..., K], packed by `pack` from [N, K], of one dtype -> [..., N]. No gradients."""
    if x.numel() == x.shape[-1]:  # one row takes another path, with other rounding
        return packed_linear(x.expand(2, *x.shape).flatten(0, -2), packed)[:1].view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
