"""Kernels of the two models behind one switch: Triton on a GPU, plain PyTorch everywhere else.

Every operation has one file with its PyTorch reference beside its Triton kernels; packed products are PyTorch
alone. Which of the two runs is decided per call by `use_triton`: by the mode (`use`, or the environment variable
NANOLLAMAGEN_KERNELS), the device and the dtype.
"""

import contextlib
import functools
import os
import types
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, CPU-only wheels: the kernels below are then never launched
    triton, tl = types.SimpleNamespace(jit=lambda fn: fn), types.SimpleNamespace(constexpr=int)

MODES = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU_RUNS = "sm_90"  # the GPU whose tiles kernels have on a CPU, for tests

_mode = "auto"


def use(mode: str) -> str:
    """Choose the kernels: "auto" (Triton for CUDA tensors that it can serve), "triton" or "torch".

    Returns the mode that was set before. Raises ValueError for another name, and RuntimeError for "triton" on a
    machine without a GPU that Triton serves (unless TRITON_INTERPRET=1, which runs the kernels on CPU tensors).
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"kernels mode must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "triton" and not INTERPRETED:
        nothing = "PyTorch sees no GPU (TRITON_INTERPRET=1 runs them without one, slowly)"
        why = _obstacle("cuda", None) if torch.cuda.is_available() else nothing
        if why:
            raise RuntimeError(f"Triton kernels cannot run: {why}.")
    before, _mode = _mode, mode
    return before


def mode() -> str:
    """The mode in use."""
    return _mode


def use_triton(x: torch.Tensor, why: str = "") -> bool:
    """Whether this call on x runs as a Triton kernel; why: the operation's own reason not to, if it has one.

    In mode "triton" a call that cannot raises RuntimeError.
    """
    if _mode == "torch" or (_mode == "auto" and x.device.type != "cuda"):
        return False
    why = why or ("" if x.dtype in DTYPES else f"{x.dtype} is not supported")
    why = why or _obstacle(x.device.type, x.device.index)
    if why and _mode == "triton":
        raise RuntimeError(f"Triton kernels cannot run: {why}.")
    return not why


def on_device(x: torch.Tensor):
    """Context that makes the device of x current, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def architecture(x: torch.Tensor) -> str:
    """For which GPU the tiles of a kernel on x are: "hip", "sm_100", "sm_90", or "sm_80" for NVIDIA's others, whose
    tensor cores read registers only; on a CPU CPU_RUNS."""
    if not x.is_cuda:
        return CPU_RUNS
    major = torch.cuda.get_device_capability(x.device)[0]
    return "hip" if torch.version.hip else {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@contextlib.contextmanager
def full_float32(device_type: str):
    """Context for float32 matrix products whatever autocast, TF32 or reduced-precision CPU settings say."""
    backend = torch.backends.mkldnn.matmul if device_type == "cpu" else torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        if before not in ("ieee", "none"):
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before not in ("ieee", "none"):
            backend.fp32_precision = before


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [M, W] rows of unit stride, copied only where no view does it."""
    x = x.reshape(-1 if x.numel() else 0, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def add_warps(x):
    """x [4, M, N], a slice of it in each of four warps -> its sum [M, N]. A thread gets all that it adds: tl.sum would
    exchange it through shared memory, too, but with bank conflicts."""
    a, b = tl.split(tl.reshape(tl.trans(x, 1, 2, 0), (x.shape[1], x.shape[2], 2, 2)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def _probe_kernel(n):
    tl.device_assert(n == n)


def _obstacle(device_type: str, index: int | None) -> str:
    return _find_obstacle(device_type, index)


# torch.compiler.assume_constant_result does this, after importing the compiler, which takes a second or two
_obstacle._dynamo_marked_constant = True


@functools.cache
def _find_obstacle(device_type: str, index: int | None) -> str:
    """Why Triton cannot run on a device, or "". A GPU that it cannot serve is warned about, once."""
    if not hasattr(triton, "runtime"):
        why = "the package triton is not installed"
    elif device_type == "cpu":
        why = "" if INTERPRETED else "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there)"
    elif device_type != "cuda":
        why = f"the tensors are on {device_type!r}, not on a CUDA or ROCm GPU"
    elif not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        why = f"{torch.cuda.get_device_name(index)} has a compute capability below 8.0"
    else:
        why = ""
    if not why:
        try:  # a missing C compiler or an old driver shows only when something is launched
            with torch.cuda.device(index) if device_type == "cuda" else contextlib.nullcontext():
                _probe_kernel[(1,)](0)
        except Exception as error:
            why = f"a first kernel failed with {type(error).__name__}: {error}"
    if why and device_type == "cuda":
        warnings.warn(f"kernels fall back to PyTorch: {why}", stacklevel=2)
    return why


from .codebook import code_usage, nearest_code  # noqa: E402 - the operations read the switch above
from .cross_entropy import linear_cross_entropy  # noqa: E402
from .decode import decode_attention  # noqa: E402
from .linear import pack, packed_linear, skinny_linear  # noqa: E402
from .rms_norm import rms_norm  # noqa: E402
from .rope_attention import apply_rope, rope_attention  # noqa: E402
from .sampling import sample_codes  # noqa: E402
from .swiglu import swiglu  # noqa: E402

__all__ = [
    "apply_rope", "code_usage", "decode_attention", "linear_cross_entropy", "mode", "nearest_code", "pack",
    "packed_linear", "rms_norm", "rope_attention", "sample_codes", "skinny_linear", "swiglu", "use", "use_triton",
]

use(os.environ.get("NANOLLAMAGEN_KERNELS") or "auto")
