"""Without a GPU the Triton kernels run under the interpreter, which must be asked for before triton is imported, or,
with NANOLLAMAGEN_PTX=sm_90, as they are compiled (ptx.py).

One thread: the small tensors of the tests gain little from a second, and wait for it where cores are busy.
"""

import importlib.metadata
import importlib.util
import os

import numpy as np
import pytest
import torch

if os.environ.get("NANOLLAMAGEN_PTX"):
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def triton_is_old():
    try:
        return importlib.metadata.version("triton").startswith("3.6")
    except importlib.metadata.PackageNotFoundError:
        return False


def pytest_configure():
    if target := os.environ.get("NANOLLAMAGEN_PTX"):
        import ptx

        import kernels

        if target not in ("sm_80", "sm_90"):
            raise pytest.UsageError(f"NANOLLAMAGEN_PTX is {target}, and can be sm_80 or sm_90")
        if torch.cuda.is_available():
            raise pytest.UsageError("NANOLLAMAGEN_PTX is for machines without a GPU: CUDA_VISIBLE_DEVICES= hides it")
        ptx.install(target)
        kernels.INTERPRETED, kernels.CPU_RUNS = True, target
        return
    new = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        if new and triton_is_old():
            raise pytest.UsageError("the interpreter of Triton 3.6 needs NumPy below 2.4: pip install 'numpy<2.4'")
        teach_bfloat16()


def teach_bfloat16():
    """Triton's interpreter cuts bfloat16 off where GPUs round to nearest, and computes with its bits as integers.

    Casts and dot are mended; other arithmetic on bfloat16, of which the kernels have none, is refused.
    """
    try:
        from triton import language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    cast, dot, binary = (getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_dot", "binary_op"))

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((np.asarray(x.data).astype(np.uint32) << 16).view(np.float32), tl.float32)

    def exact_cast(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return cast(self, widen(x), dtype)
        wide = torch.from_numpy(np.ascontiguousarray(x.data, dtype=np.float32)).view(np.shape(x.data))
        return TensorHandle(wide.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def refuse(self, a, b, op):
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar), f"{op.__name__} of bfloat16: cast to float32 first"
        return binary(self, a, b, op)

    InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op = exact_cast, refuse
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)


@pytest.fixture
def kernels_mode():
    """`kernels.use`, for whole models by Triton kernels on a CPU."""
    import kernels

    pytest.importorskip("triton")
    if not kernels.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: on a GPU tests/bench_train.py and bench_sample.py check this")
    before = kernels.mode()
    yield kernels.use
    kernels.use(before)
