"""Checkpoints of a run: OUT/state.pt, its predecessor state.pt.previous, and what --keep-every keeps.

A file; of a sharded model a folder, in which each process writes its pieces (torch.distributed.checkpoint), and from
which any number of processes go on, sharded or not. Reading executes nothing.
"""

import logging
import os
import pickle
import shutil
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module

from common import Unreadable, launched, read_file, save_file
from distributed import agree, everyone, local, sharded

log = logging.getLogger(__name__)

FIXED = ("seed", "batch_size")  # of a resumed run: they say which images a step sees
REST = "rest.pt"  # of a folder: what is no tensor of a model or an optimizer
INDEX = {  # what the index of a folder may be made of, which is a pickle
    "torch": {"Size", "float32", "bfloat16", "float16", "int64", "int32", "bool", "uint8"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING"},
}  # fmt: skip


def link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def replace(path, target):
    """Let `target` be what `path` is; where one of them is a folder, it is away for a moment."""
    old = target.with_name(target.name + ".old")
    if target.exists() and (path.is_dir() or target.is_dir()):
        remove(old)
        os.rename(target, old)
    os.replace(path, target)
    remove(old)


def keep(path, name):
    """Let NAME, beside it, be what `path` is now: files under two names, as saving replaces names, not content."""
    temporary = path.with_name(name + ".tmp")
    remove(temporary)
    try:
        if path.is_dir():
            shutil.copytree(path, temporary, copy_function=link)
        else:
            link(path, temporary)
        replace(temporary, path.with_name(name))
    finally:
        remove(temporary)  # it stays where NAME is this file already


def save_state(out, args, step, elapsed, parts, files, data, device):
    """Write OUT/state.pt, whose predecessor stays as state.pt.previous, and the `files` {name: content} beside it.

    `parts` {name: model or optimizer}. Every process calls it; what is not sharded the first one writes. Returns
    whether it could be written: on a full disk the last checkpoint stands. With --keep-every, copies with the step in
    their names stay. ValueError for weights that are not finite.
    """
    check_finite(parts["model"], step)
    state = dict(options={name: getattr(args, name) for name in FIXED}, parts=list(parts), data=data, step=step,
                 elapsed=elapsed, own=everyone(own_state(parts, device)))  # fmt: skip
    path, fresh, failed = out / "state.pt", out / "state.pt.tmp", None
    folder, first = sharded(parts["model"]), launched()[0] == 0
    if folder:
        failed = save_shards(fresh, parts)
    if first and not failed:
        try:
            for name, content in files.items():
                save_file(out / name, content)
            if folder:
                save_file(fresh / REST, state)
            else:
                remove(fresh)  # a killed sharded run may have left a folder
                save_file(fresh, state | {name: part.state_dict() for name, part in parts.items()})
            if path.exists():
                keep(path, path.name + ".previous")
            replace(fresh, path)
            if args.keep_every and step % args.keep_every == 0:
                for name in (*files, path.name):
                    keep(out / name, name.replace(".pt", f"_{step:07}.pt"))
        except OSError as error:
            failed = error
    if first and failed:
        log.warning("no checkpoint at step %d, the last one stands: %s", step, failed)
        remove(fresh)
    return not agree(failed)


def load_state(out, args, parts, device):
    """Fill models and optimizers {name: part} and the random generators from OUT/state.pt, or, if that cannot be read,
    from the checkpoint before it. Returns (step, seconds, data), or (0, 0.0, None) where nothing is to be resumed.

    On another number of processes the generators begin anew. ValueError where it is a run with other options.
    """
    paths = [path for path in (out / "state.pt", out / "state.pt.previous") if path.exists()]
    if not args.resume or (args.resume == "auto" and not paths):
        return 0, 0.0, None
    paths = paths or [out / "state.pt"]
    for path in paths:
        try:
            state = fill(parts, path, args)
            break
        except Unreadable as error:
            if path == paths[-1]:
                raise
            log.warning("%s; going on from %s", error, paths[-1])
    rank, world = launched()
    if len(state["own"]) == world:
        set_own_state(state["own"][rank], parts, device)
    return state["step"], state["elapsed"], state["data"]


def fill(parts, path, args):
    """Read a checkpoint into `parts`; returns the rest of it."""
    state = read_file(path / REST if path.is_dir() else path)
    try:
        other = [f"{n} {v}, not {getattr(args, n)}" for n, v in state["options"].items() if v != getattr(args, n)]
        if state["parts"] != list(parts):
            other.append(f"{', '.join(state['parts'])}, not {', '.join(parts)}")
        if other:
            raise ValueError(", ".join(other))
        if path.is_dir():
            load_shards(path, parts)
        elif sharded(parts["model"]):
            raise ValueError("no --fsdp: go on without, or from the weights with --init")
        else:
            for name, part in parts.items():
                if not isinstance(part, Module):  # rates and decays are those of this run
                    state[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state[name])
    except Unreadable:
        raise
    except KeyError as error:
        raise ValueError(f"{path} holds no {error.args[0]}: resume with the options of the first run") from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{path} is of a run with other options ({' '.join(reason[:2])[:200]})") from None
    return state


def tensors(parts):
    """{name: tensor} of models and optimizers: the tensors themselves, in pieces where they are sharded."""
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
    """Every process writes its pieces into a new folder; returns what went wrong in one of them, or None."""
    if launched()[0] == 0:
        remove(path)
    agree(False)  # nobody writes before that
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
        if any(Path(piece.relative_path).name != piece.relative_path for piece in index.storage_data.values()):
            raise pickle.UnpicklingError("pieces outside of the folder")
        return index


def why(error):
    """What is wrong with a folder, in a few words."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    first = (str(error).strip().splitlines() or ["cut short"])[0]
    return "a piece holds more than weights" if "Weights only" in first else first[:120]


def load_shards(path, parts):
    """Every process reads its pieces into `parts`; optimizers get the memory that the folder tells of.

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


def check_finite(model, step):
    """ValueError if a weight is not a finite number: such a model must not replace the last checkpoint."""
    finite = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all()
    if agree(not finite):
        raise ValueError(f"the weights are not finite at step {step}: the last checkpoint stands, lower --lr")


def own_state(parts, device):
    """What each process has of its own: generators (data order needs none: it follows the step), and buffers."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    models = {kind: part for kind, part in parts.items() if isinstance(part, Module)}
    buffers = {kind: {name: x.cpu() for name, x in model.named_buffers()} for kind, model in models.items()}
    return {"torch": torch.get_rng_state(), "cuda": cuda, "buffers": buffers}


def set_own_state(state, parts, device):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    for kind, buffers in state["buffers"].items():
        mine = dict(parts[kind].named_buffers())
        for name, x in buffers.items():
            mine[name].copy_(x)
