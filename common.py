"""What every script needs: devices, reading and writing checkpoints, LlamaGen's files, pictures."""

import argparse
import difflib
import errno
import hashlib
import math
import os
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def nearest(word, words):
    """": did you mean ...?" with the nearest of `words`, or "" where none is near."""
    near = difflib.get_close_matches(word, words, n=1)
    return f": did you mean {near[0]}?" if near else ""


def make_folder(path):
    """`path` as a folder that can be written to; OSError, before any work is done, where it cannot be one."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
    except OSError as error:
        raise OSError(f"{path} cannot be a folder to write to ({error.strerror.lower()})") from None
    return path


# LlamaGen's files on the Hugging Face hub, and their parameters in millions.
PUBLISHED = {
    "FoundationVision/LlamaGen": {
        "vq_ds16_c2i.pt": 71.9, "vq_ds8_c2i.pt": 70.1, "c2i_B_256.pt": 110.9, "c2i_B_384.pt": 110.9,
        "c2i_L_256.pt": 342.9, "c2i_L_384.pt": 342.9, "c2i_XL_384.pt": 774.7, "c2i_XXL_384.pt": 1411,
        "c2i_3B_384.pt": 3097,
    },
    "peizesun/llamagen_t2i": {"vq_ds16_t2i.pt": 71.9, "t2i_XL_stage1_256.pt": 777.7, "t2i_XL_stage2_512.pt": 777.7},
}


def published(path):
    """(repository, parameters in millions) of a file that LlamaGen published under this name, or None."""
    name = Path(path).name
    return next(((repo, files[name]) for repo, files in PUBLISHED.items() if name in files), None)


def fetch(path):
    """`path`, or, where nothing is there, the published file of that name in huggingface_hub's cache, fetched if need
    be.

    Raises FileNotFoundError for a name that was not published, ImportError without huggingface_hub, OSError where the
    hub cannot be reached.
    """
    path = Path(path)
    if path.exists():
        return path
    if not published(path):
        names = [name for files in PUBLISHED.values() for name in files]
        raise FileNotFoundError(f"{path}: no such file, and none that --hub knows{nearest(path.name, names)}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError("--hub needs the huggingface_hub package: pip install huggingface_hub") from None
    repo, _ = published(path)
    try:
        return Path(hf_hub_download(repo, path.name))
    except Exception as error:  # its own, requests' or httpx's, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{path.name} could not be fetched from {repo}: {reason}") from None


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1" -> torch.device, a GPU by its number; ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        nothing = torch.empty(0, device=torch.device(name))
        nothing.tolist()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {name} is not there: this machine has {', '.join(there)}") from None
    return nothing.device


def rank_and_world():
    """(rank, number of processes) of this process: torchrun's, or (0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) if world > 1 else 0, world  # some clusters set RANK alone


def autocast(device, dtype):
    """Autocast to bfloat16, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def pick_dtype(name, device):
    """"auto" means bfloat16 on a CUDA device that has it and float32 elsewhere, also where it would be emulated."""
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_it else "float32"
    return name


def file_sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path):
    """Yields another name to write to, which becomes `path` at the end: the file is whole, or as it was before.

    OSError, with the file's name, where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:  # of a full disk NumPy and PIL name no file
        raise error if error.filename else OSError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_file(path, content):
    """torch.save, flushed to disk before the file gets its name."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # it hides the system's reason
            raise OSError(str(error).partition("\n")[0]) from error
        file.flush()
        os.fsync(file.fileno())


def write_whole(path, text):
    """A text file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text)


class Unreadable(ValueError):
    """A file that is no checkpoint, or was damaged."""


def read_file(path):
    """A checkpoint as a dict of CPU tensors and plain values; nothing in the file is executed.

    Raises FileNotFoundError, or Unreadable with the file's name where it is no readable checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint")
    if not path.is_file():
        if found := published(path):
            repo, millions = found
            where = f"https://huggingface.co/{repo}/resolve/main/{path.name}"
            size = f"about {millions * 4 / 1000:.2g} GB"  # 4 bytes a parameter
            raise FileNotFoundError(f"{path} is not there: LlamaGen's file, {size}, is at {where} (--hub fetches it)")
        raise FileNotFoundError(f"{path}: no such file")
    zipped = zipfile.is_zipfile(path)  # torch < 1.6 wrote another format, which cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen pickles its options along
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load raises a dozen kinds for a broken file
        with open(path, "rb") as file:
            short = file.read(2) in (b"PK", b"") and not zipped
        reason = (str(error).strip().splitlines() or [""])[0]
        if "Weights only" in reason or " " not in reason:  # torch's advice is to execute what is in the file
            reason = "it holds more than weights and plain values" if zipped else "torch.save wrote no such file"
        raise Unreadable(f"{path}: not a readable checkpoint ({'cut short' if short else reason[:120]})") from None
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


KINDS = {"an image tokenizer": "quant_conv.weight", "a GPT": "tok_embeddings.weight"}  # and what tells them


def check_kind(weights, path, want):
    """ValueError where a state dict is not that of `want`, one of KINDS."""
    if KINDS[want] not in weights:
        other = next((kind for kind, name in KINDS.items() if name in weights), None)
        raise ValueError(f"{path}: not {want} " + (f"but {other}" if other else f"(it holds no {KINDS[want]})"))


def make_config(cls, fields, path):
    """cls(**fields), the config that a checkpoint holds; ValueError for fields that this version does not know."""
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{path}: its config is not one of this version ({error})") from None


def load_weights(model, weights, path):
    """Strict: ValueError naming what is missing, unexpected or misshapen. Assigns, so `model` may be on meta."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in weights.items() if isinstance(v, torch.Tensor)}
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


def label_font(size):
    """DejaVu, which knows accents, Greek and Cyrillic; it comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def save_picture(path, image):
    """A PIL image, in the format that the name asks for; OSError, and the picture from before, if it cannot be."""
    with writing(path) as temporary:
        image.save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])


def save_grid(path, images, columns, labels=None, scale=None, notice=""):
    """Write uint8 images [N, H, W, 3] as one PNG, `columns` a row, with a label under each if there are any.

    Small images are enlarged by a whole number (`scale`; by default to about 96 pixels) without smoothing. Labels have
    as many lines as they need, at most four. `notice` (the licence's sentence) goes below.
    """
    n, h, w, _ = images.shape
    scale = scale or max(1, round(96 / max(h, w)))
    font = label_font(12)
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
    save_picture(path, sheet)
