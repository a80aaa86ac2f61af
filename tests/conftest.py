"""Without a GPU the Triton kernels run under the interpreter, which must be asked for before triton is imported.

One thread: the small tensors of the tests gain little from a second, and wait for it where cores are busy.
"""

import importlib.metadata
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def triton_is_old():
    try:
        return importlib.metadata.version("triton").startswith("3.6")
    except importlib.metadata.PackageNotFoundError:
        return False


def pytest_configure():
    new = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    if new and os.environ.get("TRITON_INTERPRET") == "1" and triton_is_old():
        raise pytest.UsageError("the interpreter of Triton 3.6 needs NumPy below 2.4: pip install 'numpy<2.4'")
