"""What the two training scripts share: options, optimizers, the run's log."""

import argparse
import json
import logging
import math
import platform
import re
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from command_line import DEVICE_HELP
from common import make_folder, rank_and_world, write_whole
from distributed import local, total, whole

log = logging.getLogger(__name__)


# Dense bfloat16 TFLOP/s of the makers' data sheets; the first name that occurs in the device's counts.
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756,
               "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125,
               "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX 5090": 209, "RTX 4090": 165,
               "RTX 3090": 71, "MI325X": 1307, "MI300X": 1307}
OTHERS = "Laptop|Ti|D|MIG"  # words in the names of slower or faster devices, or of a part of one


def peak_gib(device):
    """Most memory held so far: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(device, dtype):
    """FLOP/s that the device's maker promises for matrix products in bfloat16; None where that is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(rf"\b({OTHERS})\b", name):
        return None
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def add_training_options(parser, max_steps, batch_size):
    """The options that train_vq.py and train_gpt.py share; the two defaults are the published recipe's.

    Returns the group "optimisation", for more of them.
    """
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log.jsonl, plot and pictures")
    run.add_argument("--resume", nargs="?", const="yes", choices=["yes", "auto", "no"],
                     help="go on from OUT/state.pt; auto: if there is one; no: start over, its checkpoints go")
    run.add_argument("--seed", type=int, default=0, help="of weights, order of images, crops and dropout")
    run.add_argument("--device", default="auto", help=DEVICE_HELP)
    run.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"],
                     help="autocast of the step (auto: bfloat16 on a GPU that has it)")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU only)")
    run.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    run.add_argument("--eval-every", type=int, default=1000, help="steps between held-out losses")
    run.add_argument("--picture-every", type=int, default=1000, help="steps between pictures (0: at the end only)")
    run.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (0: at the end only)")
    run.add_argument("--keep-every", type=int, default=0,
                     help="steps between checkpoints that stay, a multiple of --save-every (0: none does)")
    run.add_argument("--max-bad-steps", type=int, default=10,
                     help="the run ends after so many steps in a row without a finite gradient")
    opt = parser.add_argument_group("optimisation")
    opt.add_argument("--max-steps", type=int, default=max_steps, help="optimizer steps")
    opt.add_argument("--max-minutes", type=float, default=math.inf,
                     help="minutes of wall clock, if they end before the steps (default: any number)")
    opt.add_argument("--batch-size", type=int, default=batch_size, help="global batch, images per step")
    opt.add_argument("--micro-batch-size", type=int, help="images per forward of a process (default: its whole share)")
    opt.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    opt.add_argument("--schedule", default="constant", choices=["constant", "cosine"],
                     help="of the learning rate, after the warm-up")
    opt.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up (0: none)")
    opt.add_argument("--min-lr", type=float, default=0.0, help="learning rate at which the cosine ends")
    opt.add_argument("--beta1", type=float, default=0.9, help="AdamW: decay of the gradients' mean")
    opt.add_argument("--beta2", type=float, default=0.95, help="AdamW: decay of their squares' mean")
    opt.add_argument("--weight-decay", type=float, default=0.05, help="on matrices and kernels, not on vectors")
    opt.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (0: any)")
    opt.add_argument("--ema", type=float, default=0.0, help="decay per step of the averaged weights (0: none)")
    return opt


def check_training_options(args, world):
    """ValueError for numbers that no run can have; fills in the micro batch of each of `world` processes."""
    if args.micro_batch_size is None:
        args.micro_batch_size = -(-args.batch_size // world)
    if args.batch_size % (args.micro_batch_size * world):
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size} "
                         f"times {world} processes")
    if args.keep_every and not args.save_every:
        raise ValueError(f"--keep-every {args.keep_every} keeps what --save-every writes, and that is 0: give it, too")
    if args.keep_every and args.keep_every % args.save_every:
        raise ValueError(f"--keep-every {args.keep_every} is no multiple of --save-every {args.save_every}")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema} is not in [0, 1)")


def make_optimizers(model, args, muon=()):
    """{name: optimizer}: AdamW, with weight decay on tensors of two or more dimensions (matrices, kernels, tables).

    The matrices in `muon` go to Muon instead: momentum, orthogonalised, and scaled so that AdamW's rates serve (Liu et
    al. 2025, arXiv 2502.16982, section 2.2).
    """
    muon = list(muon)
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, how = (args.beta1, args.beta2), dict(weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)}
    return optimizers | ({"muon": torch.optim.Muon(muon, lr=args.lr, **how)} if muon else {})


def progress(args, step, elapsed):
    """Share of the run that is done, by steps or by minutes, whichever ends first; `elapsed` in seconds."""
    return max(step / args.max_steps, elapsed / 60 / args.max_minutes)


def learning_rate(args, step, progress):
    """The rate of step `step` (from 0) when the share `progress` of the run is done."""
    warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.schedule == "constant":
        return warm * args.lr
    return warm * (args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def update(model, optimizers, lr, clip):
    """One step of each optimizer on the gradients that are there, clipped; returns their norm before, on the device.

    Where the norm is not finite nothing changes, neither weights nor the optimizers' memory. AdamW decides that on the
    device; for Muon, which cannot, the norm is read back.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    torch.nn.utils.clip_grads_with_norm_(parameters, clip or math.inf, norm)
    bad = ~norm.isfinite()
    skip = "muon" in optimizers and bool(bad)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # what fused steps ask
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


class BadSteps:
    """Counts steps without a finite gradient norm, on the device, and how many came in a row."""

    def __init__(self, most, name="bad_steps"):
        self.most, self.name, self.total, self.row, self.longest = most, name, 0, 0, 0

    def add(self, norm):
        bad = (~norm.isfinite()).int()
        self.total, self.row = self.total + bad, (self.row + 1) * bad
        self.longest = self.row.clamp(min=self.longest)

    def pop(self, step):
        """{name: how many since the last call} or {}; ValueError if `most` came in a row."""
        total, longest, self.total, self.longest = int(self.total), int(self.longest), 0, self.row
        if total:
            log.warning("%s: %d up to step %d had no finite gradient and changed nothing", self.name, total, step)
        if longest >= self.most:
            what = f"{longest} steps in a row, up to step {step}, had no finite gradient"
            raise ValueError(f"{what}: the last checkpoint stands; lower --lr, or look at the data")
        return {self.name: total} if total else {}


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- d * ema + (1 - d) * model for the parameters; buffers are copied.

    d grows to `decay` as (1 + step) / (10 + step), so that a short run forgets its random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*map(local, ema.parameters())], [*map(local, model.parameters())], 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


@contextmanager
def advice(args, what):
    """Out of memory as a ValueError that says what was tried and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        tried = f"out of memory with {args.micro_batch_size} images of {what} at a time"
        raise ValueError(f"{tried}: halve --micro-batch-size, the rest is accumulated") from error


@contextmanager
def dispensable(what):
    """A picture or plot: on a full disk, or without the memory for it, a warning."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError) as error:
        log.warning("%s could not be written: %s", what, error)


class RunLog:
    """log.jsonl (one object per logged step), config.json (command, options, versions; of a resumed run also the
    earlier ones) and loss.png of a run."""

    def __init__(self, out, args, start_step):
        self.out, self.rows = Path(out), []
        self.writes = rank_and_world()[0] == 0  # the first process alone
        if not self.writes:
            return
        make_folder(self.out)
        self.path, self.whole = self.out / "log.jsonl", True
        old = self.path.read_text().splitlines(keepends=True) if self.path.exists() and start_step else []
        old = [line for line in old if line.endswith("\n")]  # a killed run may have cut its last line short
        self.rows = [row for row in map(json.loads, old) if row["step"] <= start_step]  # a resumed run redoes the rest
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        path = self.out / "config.json"
        try:
            earlier = json.loads(path.read_text()) if start_step else {}
        except (OSError, ValueError):  # it is not there, or was cut short
            earlier = {}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
        config = {"command": sys.argv, "options": {k: str(v) for k, v in vars(args).items()}, "versions": versions}
        if earlier:  # of a resumed run: the commands before
            config["earlier"] = [*earlier.pop("earlier", []), earlier]
        write_whole(path, json.dumps(config, indent=1))

    def write(self, **row):
        """Append one object, numbers rounded to six digits; ValueError, and no row, if a loss is not finite.

        On a full disk the row waits for the next one.
        """
        for name in ("loss", "val_loss"):
            if not math.isfinite(row.get(name, 0.0)):
                where = f"{name} is {row[name]} at step {row['step']}"
                raise ValueError(f"{where}: go on from state.pt.previous, with a lower --lr")
        if not self.writes:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        path, rows = (self.path, [row]) if self.whole else (self.path.with_name("log.jsonl.tmp"), self.rows)
        try:
            with open(path, "a" if self.whole else "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            path.replace(self.path)
            self.whole = True
        except OSError as error:
            self.whole = False
            log.warning("the log could not be written: %s", error)

    def result(self, **values):
        """result.json: how the run ended."""
        if self.writes:
            write_whole(self.out / "result.json", json.dumps(values, indent=1))

    def plot(self, parts=("loss",)):
        """loss.png over steps: held-out loss, and the sum of those `parts` of the training loss that are in it."""
        if not self.writes:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        parts = [name for name in parts if any(name in row for row in self.rows)]
        for label, names, marker in (("training", parts, None), ("held out", ["val_loss"], ".")):
            points = [(row["step"], sum(row[x] for x in names if x in row)) for row in self.rows if {*names} & {*row}]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=marker)
        axes.set(xlabel="step", ylabel=" + ".join(parts), title=self.out.name)
        axes.grid(alpha=0.3)
        axes.legend()
        with dispensable("loss.png"):
            figure.savefig(self.out / "loss.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


class Means:
    """Running means of scalar tensors over steps and processes, kept on the device until they are logged.

    Values that are not finite are left out: `BadSteps` counts them.
    """

    def __init__(self):
        self.sums = {}

    def add(self, **values):
        for name, value in values.items():
            value, (sums, count) = value.detach(), self.sums.get(name, (0.0, 0.0))
            finite = value.isfinite()
            self.sums[name] = sums + value.where(finite, 0.0), count + finite

    def pop(self):
        """{name: mean} of those that had a finite value, and start again."""
        names, sums = list(self.sums), torch.tensor([[float(x) for x in pair] for pair in self.sums.values()])
        self.sums = {}
        return {name: float(s / n) for name, (s, n) in zip(names, total(sums.double()), strict=True) if n > 0}


def spread(n, length):
    """n indices, at most `length` of them, evenly over 0..length-1: int64 [n]."""
    n = min(n, length)
    return torch.arange(n) * length // n


def progress_bar(args, name, start_step):
    """Of the first process; a run that ends by the clock does not know how many steps it will take."""
    total = args.max_steps if args.max_minutes == math.inf else None
    return tqdm(total=total, initial=start_step, desc=name, unit="step", disable=rank_and_world()[0] > 0)


class Timer:
    """Milliseconds between calls, less what was paused."""

    def __init__(self):
        self.last = time.perf_counter()

    def __call__(self):
        last, self.last = self.last, time.perf_counter()
        return 1000 * (self.last - last)

    @contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start
