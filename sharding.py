"""Sharded models: FSDP2, and their checkpoints, folders in which each process writes its shards.

Imported where it is used: what it needs of PyTorch takes a second to load.
"""

import pickle
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Module

from common import Unreadable

INDEX = {  # what the index of a folder may be made of, which is a pickle
    "torch": {"Size", "float32", "bfloat16", "float16", "int64", "int32", "bool", "uint8"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING"},
}


def shard(model, blocks, device, dtype):
    """FSDP2, in place: parameters, gradients and optimizer state are split into shards, one a process (ZeRO stage 3,
    Rajbhandari et al. 2020, arXiv 1910.02054); blocks are gathered when they are needed, in `dtype`.

    The rest of the model is gathered in float32, so that under autocast the arithmetic is that of one process, but for
    the blocks' vectors. Gradients are added up in float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also after an evaluation: saving and averaging follow


def tensors(parts):
    """{name: tensor} of models and optimizers: the tensors themselves, each with its shards."""
    names, found = {p: name for name, p in parts["model"].named_parameters()}, {}
    for kind, part in parts.items():
        if isinstance(part, Module):
            own = chain(part.named_parameters(), part.named_buffers())
            found |= {f"{kind}.{name}": x.detach() for name, x in own}
        else:
            memory = part.state.items()
            found |= {f"{kind}.{names[p]}.{key}": x for p, memories in memory for key, x in memories.items()}
    return found


def save_shards(path, parts):
    """Every process writes its shards into a new folder; returns what went wrong in one of them, or None."""
    try:
        dcp.save(tensors(parts), storage_writer=Writer(path))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, OSError | RuntimeError):
            raise
        return reason


class Writer(dcp.FileSystemWriter):
    def storage_meta(self):
        """Nothing: it would hold the folder's own name, which may change."""


class Index(pickle.Unpickler):
    """Refuses whatever INDEX does not name."""

    def find_class(self, module, name):
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    def read_metadata(self):
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = Index(file).load()
        if any(Path(shard.relative_path).name != shard.relative_path for shard in index.storage_data.values()):
            raise pickle.UnpicklingError("shards outside of the folder")
        return index


def why(error):
    """What is wrong with a folder, in a few words."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    first = (str(error).strip().splitlines() or ["cut short"])[0]
    return "a shard holds more than weights" if "Weights only" in first else first[:120]


def load_shards(path, parts):
    """Every process reads its shards into `parts`; optimizers get the memory that the folder tells of.

    Unreadable for a damaged folder, KeyError or ValueError for what does not fit.
    """
    reader = Reader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:  # a broken pickle raises whatever it likes
        raise Unreadable(f"{path}: not a readable checkpoint ({why(error)})") from None
    models = tensors({kind: part for kind, part in parts.items() if isinstance(part, Module)})
    if surplus := [name for name in saved if isinstance(parts[name.split(".")[0]], Module) and name not in models]:
        raise ValueError(f"it holds {surplus[0]}, too")
    parameters = dict(parts["model"].named_parameters())
    for name, found in saved.items():
        kind, rest = name.split(".", 1)
        if not isinstance(parts[kind], Module):
            parameter, key = rest.rsplit(".", 1)
            p = parameters[parameter].detach()
            fresh = torch.zeros_like(p) if found.size == p.shape else torch.zeros(found.size, device=p.device)
            parts[kind].state[parameters[parameter]][key] = fresh
    want = tensors(parts)
    for name, x in want.items():
        if saved[name].size != x.shape:
            raise ValueError(f"{name} is {list(saved[name].size)}, not {list(x.shape)}")
    try:
        dcp.load(want, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise Unreadable(f"{path}: not a readable checkpoint ({why(reason)})") from None
