"""What every script needs: devices, errors, reading and writing checkpoints, pictures."""

import argparse
import math
import os
import sys
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


def autocast(device, dtype):
    """The autocast context of a training step: bfloat16, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def pick_dtype(name, device):
    """"auto" means bfloat16 on a CUDA device that has it and float32 elsewhere."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return name


def save_file(path, content):
    """torch.save under a temporary name, flushed to disk, then renamed: a file of this name is always whole.

    OSError where it cannot be written (a full disk); the file of that name is then the one from before.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's writer hides the system's reason
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Unreadable(ValueError):
    """A file that is no checkpoint, or was damaged."""


def read_file(path):
    """A checkpoint as a dict of CPU tensors and plain values; nothing in the file is executed.

    Raises FileNotFoundError, or Unreadable with the file's name where it is no readable checkpoint.
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
        raise Unreadable(f"{path}: not a readable checkpoint ({reason[:120]})") from None
    if not isinstance(content, dict):
        raise Unreadable(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def read_weights(path):
    """(state dict, config dict or None) of a file that this project or LlamaGen wrote.

    The weights are under "ema", "model", "module" or "state_dict", in that order, or are the file itself (FSDP).
    """
    content = read_file(path)
    if "elapsed" in content and "own" in content:
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


@contextmanager
def evaluating(model):
    """The model in eval mode, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def to_uint8(images):
    """[B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3], as LlamaGen writes images: clamp(127.5 x + 128, 0, 255)."""
    return (127.5 * images.float() + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def whole_characters(text):
    """A text without halves of characters (lone surrogates), which JSON and command lines may hold, UTF-8 not."""
    return text.encode("utf-8", "ignore").decode()


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
