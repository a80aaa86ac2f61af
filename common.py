"""What every script needs: checkpoints, the learning rate, the run folder (log, plot, pictures), devices, errors."""

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def cli(main):
    """Run a script's main(); bad input ends in one sentence and exit code 2 (NANOLLAMAGEN_TRACE=1 shows where)."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("NANOLLAMAGEN_TRACE"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1" -> torch.device; ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def launched():
    """(rank, number of processes) of this process: torchrun's, or (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def peak_gib(device):
    """Most memory held so far: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def autocast(device, dtype):
    """The autocast context of a training step: bfloat16, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def pick_dtype(name, device):
    """"auto" means bfloat16 on a CUDA device that has it and float32 elsewhere."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return name


def add_training_options(parser, **defaults):
    """The options that train_vq.py and train_gpt.py share; `defaults` are those of the script's published recipe.

    Returns the group "optimisation", for more of them.
    """
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log.jsonl, plot and pictures")
    run.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    run.add_argument("--seed", type=int, default=0, help="of weights, data order, crops and dropout")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    run.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="autocast of the step")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU only)")
    run.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    run.add_argument("--eval-every", type=int, default=1000, help="steps between held-out losses")
    run.add_argument("--picture-every", type=int, default=1000, help="steps between pictures (0: at the end only)")
    run.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (0: at the end only)")
    opt = parser.add_argument_group("optimisation")
    opt.add_argument("--max-steps", type=int, default=defaults["max_steps"], help="optimizer steps")
    opt.add_argument("--max-minutes", type=float, default=math.inf, help="wall clock; the rate follows what ends first")
    opt.add_argument("--batch-size", type=int, default=defaults["batch_size"], help="global batch, images per step")
    opt.add_argument("--micro-batch-size", type=int, help="images per forward; the rest is accumulated (default: all)")
    opt.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    opt.add_argument("--schedule", default="constant", choices=["constant", "cosine"], help="after the warm-up")
    opt.add_argument("--warmup-steps", type=int, default=0, help="linear warm-up")
    opt.add_argument("--min-lr", type=float, default=0.0, help="where the cosine ends")
    opt.add_argument("--beta1", type=float, default=0.9, help="of AdamW")
    opt.add_argument("--beta2", type=float, default=0.95, help="of AdamW")
    opt.add_argument("--weight-decay", type=float, default=0.05, help="on matrices and kernels, not on vectors")
    opt.add_argument("--clip", type=float, default=1.0, help="gradient norm (0: none)")
    opt.add_argument("--ema", type=float, default=0.0, help="decay per step of the averaged weights (0: none)")
    return opt


def check_training_options(args):
    """ValueError for numbers that no run can have; fills in the micro batch."""
    if args.micro_batch_size is None:
        args.micro_batch_size = args.batch_size
    positive = ("max_steps", "max_minutes", "batch_size", "micro_batch_size", "log_every", "eval_every", "eval_images")
    for name in positive:
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} has to be above 0, not {getattr(args, name)}")
    for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "clip", "picture_every", "save_every"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} cannot be below 0, and is {getattr(args, name)}")
    if args.batch_size % args.micro_batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size}")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema} is not in [0, 1)")


def make_optimizers(model, args, device, muon=()):
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
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=device.type == "cuda")}
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
    """One step of each optimizer on the gradients that are there, clipped; returns their norm before, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- d * ema + (1 - d) * model for the parameters; buffers are copied.

    d grows to `decay` as (1 + step) / (10 + step), so that a short run forgets its random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def save_file(path, content):
    """torch.save under a temporary name, flushed to disk, then renamed: a file of this name is always whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_file(path):
    """A checkpoint as a dict of CPU tensors and plain values; nothing in the file is executed.

    Raises FileNotFoundError, or ValueError with the file's name where it is no readable checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen pickles its options along
            zipped = zipfile.is_zipfile(path)  # torch < 1.6 wrote another format, which cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load raises a dozen kinds for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason[:120]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def read_weights(path):
    """(state dict, config dict or None) of a file that this project or LlamaGen wrote.

    The weights are under "ema", "model", "module" or "state_dict", in that order, or are the file itself (FSDP).
    """
    content = read_file(path)
    if "elapsed" in content and "rng" in content:
        raise ValueError(f"{path} is a training state, for --resume: the model is the other .pt file beside it")
    keys = ("ema", "model", "module", "state_dict")
    weights = next((content[k] for k in keys if isinstance(content.get(k), dict) and content[k]), content)
    weights = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    for prefix in ("module.", "_orig_mod."):  # of DDP and of torch.compile
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights, content.get("config")


def make_config(cls, fields, path):
    """cls(**fields), the config that a checkpoint holds; ValueError for fields that this version does not know."""
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{path}: its config is not one of this version ({error})") from None


def load_weights(model, weights, path):
    """Strict: ValueError naming what is missing, unexpected or misshapen. Assigns, so `model` may be on meta."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [f"missing {k}" for k in want if k not in have]
    wrong += [f"unexpected {k}" for k in have if k not in want]
    wrong += [f"{k} is {list(have[k])}, expected {list(want[k])}" for k in want if k in have and want[k] != have[k]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path}: the weights do not fit: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(weights, strict=True, assign=True)


def load_state(path, parts, device):
    """Fill models, optimizers {name: part} and random generators from a state.pt; returns (step, seconds, data)."""
    state = read_file(path)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_rng_state(state["rng"], device)
    except KeyError as error:
        raise ValueError(f"{path} holds no {error.args[0]}: resume with the options of the first run") from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{path} is of a run with other options ({' '.join(reason[:2])[:200]})") from None
    return state["step"], state["elapsed"], state.get("data", {})


def check_finite(model, step):
    """ValueError if a weight is not a finite number: such a model must not replace the last checkpoint."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise ValueError(f"the weights are not finite at step {step}: the last checkpoint stands, lower --lr")


@contextmanager
def evaluating(model):
    """The model in eval mode, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def rng_state(device):
    """The states of every generator that training draws from (data order needs none: it follows the step)."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state, device):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class RunLog:
    """log.jsonl (one object per logged step), config.json (command, options, versions) and loss.png of a run."""

    def __init__(self, out, args, start_step):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "log.jsonl"
        old = self.path.read_text().splitlines(keepends=True) if self.path.exists() and start_step else []
        old = [line for line in old if line.endswith("\n")]  # a killed run may have cut its last line short
        self.rows = [row for row in map(json.loads, old) if row["step"] <= start_step]  # a resumed run redoes the rest
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
        config = {"command": sys.argv, "options": {k: str(v) for k, v in vars(args).items()}, "versions": versions}
        (self.out / "config.json").write_text(json.dumps(config, indent=1))

    def write(self, **row):
        """Append one object, numbers rounded to six digits; ValueError, and no row, if the loss is not finite."""
        if not math.isfinite(row.get("loss", 0.0)):
            raise ValueError(f"the loss is {row['loss']} at step {row['step']}: the last checkpoint stands")
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def plot(self):
        """loss.png: training and held-out loss over steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for name in ("loss", "val_loss"):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if name == "val_loss" else None)
        axes.set(xlabel="step", ylabel="loss", title=self.out.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.out / "loss.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


class Means:
    """Running means of scalar tensors, kept on the device until they are logged."""

    def __init__(self):
        self.pop()

    def add(self, weight=1.0, **values):
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = total + weight * value.detach(), count + weight

    def pop(self):
        """{name: mean}, and start anew."""
        sums, self.sums = getattr(self, "sums", {}), {}
        return {name: float(total) / count for name, (total, count) in sums.items()}


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


def to_uint8(images):
    """[B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3], as LlamaGen writes images: clamp(127.5 x + 128, 0, 255)."""
    return (127.5 * images.float() + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def wrap(text, font, width):
    """Lines of at most `width` pixels, broken between words where there are spaces."""
    lines = [""]
    for word in str(text).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            lines[-1] = lines[-1][:-1]
    return lines


def save_grid(path, images, columns, labels=None, scale=None, notice=""):
    """Write uint8 images [N, H, W, 3] as one PNG, `columns` a row, with a label under each if there are any.

    Small images are enlarged by a whole number (`scale`; by default to about 96 pixels) without smoothing. Labels have
    as many lines as they need, at most four. `notice` (the licence's sentence) goes below.
    """
    n, h, w, _ = images.shape
    scale = scale or max(1, round(96 / max(h, w)))
    font = ImageFont.load_default(size=12)
    labels = [wrap(label, font, w * scale)[:4] for label in labels or []]
    pad, text = 4, max((16 * len(lines) for lines in labels), default=0)
    width, height = columns * (w * scale + pad) + pad, math.ceil(n / columns) * (h * scale + text + pad) + pad
    notice = wrap(notice, font, width - 2 * pad) if notice else []
    sheet = Image.new("RGB", (width, height + 16 * len(notice)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(notice):
        draw.text((pad, height + 16 * i), line, fill="black", font=font)
    for i in range(n):
        x, y = pad + i % columns * (w * scale + pad), pad + i // columns * (h * scale + text + pad)
        sheet.paste(Image.fromarray(np.asarray(images[i])).resize((w * scale, h * scale), Image.NEAREST), (x, y))
        for j, line in enumerate(labels[i] if labels else []):
            draw.text((x, y + h * scale + 1 + 16 * j), line, fill="black", font=font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
