"""Without a GPU the Triton kernels run under the interpreter, which must be asked for before triton is imported.

One thread: the small tensors of the tests gain little from a second, and wait for it where cores are busy.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
