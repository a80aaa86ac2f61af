"""Without a GPU the Triton kernels run under the interpreter, which must be asked for before triton is imported.

One thread: the small tensors of the tests gain little from a second, and wait for it where cores are busy.
"""

import importlib.metadata
import os

import numpy as np
import pytest
import torch


def triton_is_old():
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) < (3, 7)


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if triton_is_old() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise pytest.UsageError("the interpreter of Triton 3.6 needs NumPy below 2.4: pip install 'numpy<2.4'")

torch.set_num_threads(1)
