"""Checkpoints of a run: OUT/state.pt, its predecessor state.pt.previous, and what --keep-every keeps.

A file; of a sharded model a folder (sharding.py), from which any number of processes go on, sharded or not. Reading
executes nothing.
"""

import logging
import os
import shutil
from dataclasses import asdict

import torch
from torch.nn import Module

from common import Unreadable, rank_and_world, read_file, save_file
from distributed import agree, barrier, everyone, local, say, sharded

log = logging.getLogger(__name__)

FIXED = ("seed", "batch_size", "size")  # of a resumed run: they say which images a step sees (a GPT has no size)
FREE = ("dropout", "cond_dropout", "caption_loss_weight", "beta", "entropy_weight")  # of a model's config
REST = "rest.pt"  # of a folder: what is no tensor of a model or an optimizer


def link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def keep(path, name):
    """Let NAME, beside it, be what `path` is now: files under two names, as saving replaces names, not content."""
    temporary, target = path.with_name(name + ".tmp"), path.with_name(name)
    try:
        remove(temporary)
        if path.is_dir():
            shutil.copytree(path, temporary, copy_function=link)
        else:
            link(path, temporary)
        if path.is_dir() or target.is_dir():
            remove(target)
        temporary.replace(target)
    finally:
        remove(temporary)  # it stays where NAME is this file already


def save_state(args, step, elapsed, parts, files, data=None):
    """Write OUT/state.pt, whose predecessor stays as state.pt.previous, and the `files` {name: content} beside it.

    `parts` {name: model or optimizer}. Every process calls it; what is not sharded the first one writes. Returns
    whether it could be written: on a full disk the last checkpoint stands. With --keep-every, copies with the step in
    their names stay. ValueError for weights that are not finite.
    """
    check_finite(parts["model"], step)
    options = {name: getattr(args, name) for name in FIXED if name in args}
    state = dict(options=options, config=asdict(parts["model"].config), parts=list(parts), data=data, step=step,
                 elapsed=elapsed, own=everyone(own_state(parts)))
    (path, previous, fresh), failed = (args.out / f"state.pt{end}" for end in ("", ".previous", ".tmp")), None
    folder, first = sharded(parts["model"]), rank_and_world()[0] == 0
    if folder:
        from sharding import save_shards

        if first:
            remove(fresh)
        barrier()  # nobody writes before that
        failed = save_shards(fresh, parts)
    if first and not failed:
        try:
            for name, content in files.items():
                save_file(args.out / name, content)
            if folder:
                save_file(fresh / REST, state)
            else:
                remove(fresh)  # a killed sharded run may have left a folder
                save_file(fresh, state | {name: part.state_dict() for name, part in parts.items()})
            if path.exists():  # which is whole (load_state): at every moment it or the new one is
                remove(previous)
                path.rename(previous)
            fresh.rename(path)
            if args.keep_every and step % args.keep_every == 0:
                for name in (*files, path.name):
                    keep(args.out / name, name.replace(".pt", f"_{step:07}.pt"))
        except OSError as error:
            failed = error
    if first and failed:
        log.warning("no checkpoint at step %d, the last one stands: %s", step, failed)
        remove(fresh)
    return not agree(failed)


def find(args):
    """The checkpoints in OUT, the newest first. ValueError where there is one and --resume was not given,
    FileNotFoundError where there is none and --resume wants it: scripts ask before they load anything."""
    paths = [path for path in (args.out / "state.pt", args.out / "state.pt.previous") if path.exists()]
    if paths and not args.resume:
        raise ValueError(f"{args.out} holds a run: --resume goes on with it, --resume no starts over in its place")
    if not paths and args.resume == "yes":
        raise FileNotFoundError(f"{args.out / 'state.pt'}: no such file (--resume auto begins a run then)")
    return paths


def load_state(args, parts):
    """Fill models and optimizers {name: part} and the random generators from OUT/state.pt, or, if that cannot be read,
    from the checkpoint before it. Returns (step, seconds, data), or (0, 0.0, None) where nothing is to be resumed.

    On another number of processes the generators start from the seed. ValueError where it is a run with other options;
    with --resume no it is removed.
    """
    paths = find(args)
    if args.resume == "no" and rank_and_world()[0] == 0:  # nobody is to go on from another run's checkpoint
        for path in paths:
            remove(path)
    if args.resume == "no" or not paths:
        return 0, 0.0, None
    for path in paths:
        try:
            state = fill(parts, path, args)
            break
        except Unreadable as error:
            if path == paths[-1]:
                raise
            log.warning("%s; going on from %s", error, paths[-1])
    rank, world = rank_and_world()
    if agree(path != paths[0]) and rank == 0:  # the next checkpoint would take the place of the one that is whole
        remove(args.out / "state.pt.damaged")
        paths[0].rename(args.out / "state.pt.damaged")
    if len(state["own"]) == world:
        set_own_state(state["own"][rank], parts, path)
    say(f"{path}: going on from step {state['step']}")
    return state["step"], state["elapsed"], state["data"]


def fill(parts, path, args):
    """Read a checkpoint into `parts`; returns the rest of it."""
    if path.is_dir():
        from sharding import load_shards
    state = read_file(path / REST if path.is_dir() else path)
    try:
        other = [f"{n} {v}, not {getattr(args, n)}" for n, v in state["options"].items() if v != getattr(args, n)]
        now = asdict(parts["model"].config)
        other += [f"{n} {v}, not {now[n]}" for n, v in state.get("config", {}).items()
                  if n in now and n not in FREE and v != now[n]]
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


def check_finite(model, step):
    """ValueError if a weight is not a finite number: such a model must not replace the last checkpoint."""
    finite = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all()
    if agree(not finite):
        raise ValueError(f"the weights are not finite at step {step}: the last checkpoint stands, lower --lr")


def own_state(parts):
    """What each process has of its own: generators (data order needs none: it follows the step), and buffers."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    models = {kind: part for kind, part in parts.items() if isinstance(part, Module)}
    buffers = {kind: {name: x.cpu() for name, x in model.named_buffers()} for kind, model in models.items()}
    return {"torch": torch.get_rng_state(), "cuda": cuda, "buffers": buffers}


def set_own_state(state, parts, path):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    for kind, buffers in state["buffers"].items():
        mine = dict(parts[kind].named_buffers())
        for name, x in buffers.items():
            if mine[name].shape != x.shape:
                shapes = f"{name} {list(x.shape)}, not {list(mine[name].shape)}"
                raise ValueError(f"{path} is of a run with other options ({shapes})")
            mine[name].copy_(x)
