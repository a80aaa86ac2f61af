"""Several processes: torchrun's, DistributedDataParallel, and signals that end a run."""

import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import pick_device, rank_and_world

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not told apart
    fcntl = None


def by_torchrun():
    """Did torchrun start this process, be it the only one? (RANK alone is what some clusters set.)"""
    return rank_and_world()[1] > 1 or {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def own_device(name):
    """As pick_device; of GPUs each of several processes has its own. ValueError for one that all would share."""
    rank, world = rank_and_world()
    if world > 1 and name.startswith("cuda:"):
        raise ValueError(f"--device {name} is one GPU, and there are {world} processes: give --device cuda")
    if world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK') or rank % torch.cuda.device_count()}"
    return pick_device(name)  # which touches no other: all would take memory of the first


@contextmanager
def processes(device_name, timeout=None, gradients=True):
    """Join torchrun's processes, if it started this one; yields (device, rank, number of processes).

    timeout: a timedelta that a process may wait for the others (default: PyTorch's). gradients: GPUs exchange tensors,
    over NCCL; without, processes exchange what lies in main memory only, over gloo.
    """
    (rank, world), device = rank_and_world(), own_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks about "the" GPU means this one
    if not by_torchrun():
        yield device, rank, world
        return
    # Optimizers and operators import this when they are first used. After the group it would keep the group beyond its
    # end, and a thread of it that still holds a tensor aborts the process as the interpreter ends.
    from torch import _dynamo  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if gradients and device.type == "cuda" else "gloo", timeout=timeout)
    yield device, rank, world
    dist.destroy_process_group()  # not after an error: it would wait for processes that wait for this one
    time.sleep(0.1)  # threads of a group that outlives this (a sharded model's does) let go of their last tensors


def say(text):
    """Print, in the first process."""
    if rank_and_world()[0] == 0:
        print(text)


def barrier():
    """Wait until every process is here. After an error nobody may: the others would take it that all is well."""
    agree(False)  # of tensors on the CPU: NCCL's barrier would need a GPU


@contextmanager
def in_turn():
    """Inside, the first process of each node before its others, which then find on disk what it fetched."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:  # the others see for themselves what went wrong
        if first:
            barrier()


def total(value):
    """The sum of a tensor over all processes, which replaces it."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def agree(flag):
    """True in every process if it is in one."""
    return bool(total(torch.tensor(int(bool(flag)))))


def everyone(value):
    """[value of each process], values that can be pickled."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@contextmanager
def alone(out, rank):
    """OUT belongs to this run, all its processes, until it ends or is killed; ValueError where another is writing."""
    file, refused = None, False
    if rank == 0 and fcntl:
        file = open(out / ".lock", "ab")  # it stays: removing it would be a race
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused = True
            file.close()
        except OSError:  # a file system without locks
            pass
        else:
            os.register_at_fork(after_in_child=file.close)  # workers, which may outlive a kill, hold nothing
    if everyone(refused)[0]:
        raise ValueError(f"another run is writing to {out}: wait until it ends, or give another --out")
    with file or nullcontext():
        yield


def parallel(model, device):
    """The model with gradients averaged over the processes."""
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 2.13 has another name for broadcast_buffers, 2.11 has not
        how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
        return DistributedDataParallel(model, device_ids=devices, **how)


def sharded(model):
    return any(hasattr(p, "to_local") for p in model.parameters())


def local(tensor):
    """This process's shard of a sharded tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A sharded tensor in one piece, which every process has to ask for, or the tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unsynchronised(model, wanted):
    """Where `wanted`, a context in which backward() leaves gradients to themselves: more of the batch is to come.

    Sharded models add theirs up every time: whole gradients are what they have no room for.
    """
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def stopping():
    """Yields a list that SIGTERM, SIGINT and SIGHUP (a closed terminal) put their time into: the run saves at its next
    step boundary and ends. Under nohup, SIGHUP stays ignored.

    A second signal ends the process at once, but not within two seconds: Ctrl-C reaches every process of a terminal,
    and torchrun passes its own on.
    """
    asked = []

    def ask(number, _):
        if asked and time.monotonic() < asked[0] + 2:
            return
        if asked:
            os._exit(128 + number)
        asked.append(time.monotonic())
        what = f"signal {number}: a checkpoint after this step, then the end (again: at once)\n"
        with suppress(AttributeError, OSError):  # stderr may be closed, or full
            os.write(sys.stderr.fileno(), what.encode())  # print() would raise where the signal came within another

    heard = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clock(args, elapsed):
    """Seconds of the run so far; where they decide when it ends, those of the first process."""
    return everyone(elapsed)[0] if args.max_minutes < math.inf else elapsed
