"""Images -> code files for train_gpt.py: OUT/train and OUT/val, each codes.npy, labels.npy and meta.json.

With --text, their captions too: as tokens, or as features of FLAN-T5. Large sets are encoded in parts, which torchrun's
processes share; the same command goes on after an interruption, and the files are those of one process.

    python encode.py --vq out/vq/vq.pt --data digits --size 32 --crops random --n-random 6 --out out/codes
    torchrun --standalone --nproc_per_node=8 -- encode.py --vq vq_ds16_c2i.pt --data imagenet --size 256 --crops ten \\
        --workers 12 --out codes  # LlamaGen's
    python encode.py --vq vq_ds16_t2i.pt --data pairs.jsonl --crops center --text t5 --t5 flan-t5-xl --out codes
"""

import argparse
import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captions import CaptionFeatures, CaptionFile, CaptionTokens, CaptionWriter, train_tokenizer
from command_line import DEVICE_HELP, HUB_HELP, Parser, cli
from common import autocast, launched, make_folder
from data import (
    BAD_SHARE,
    BAD_SHARE_HELP,
    DATA_HELP,
    as_size,
    center_crop,
    check_batch,
    check_images,
    check_size,
    endless_positions,
    eval_batches,
    load_images,
    mirrored,
    ten_crop,
)
from distributed import everyone, processes, say
from kernels import code_usage
from t5 import T5Encoder
from vq import VQModel, usage_and_perplexity

CORNERS = ["top left", "top right", "bottom left", "bottom right", "centre"]
PART = 4096  # images of a part, which is what an interrupted run may lose
CODE_VERSION = 2
CODE_KEYS = (
    "version", "tokenizer", "tokenizer_sha256", "codebook_size", "grid", "image_size", "images", "augmentations",
    "class_names", "data", "split", "notice", "text",
)  # fmt: skip


def file_sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_dtype(codebook_size):
    return np.dtype(np.uint16 if codebook_size <= 65536 else np.int32)


class CodeWriter:
    """Writes a folder of codes: codes.npy [images, A, h*w], labels.npy int64 [images] and meta.json.

    Use as a context manager; the files take their names when it closes without an error, also after fewer than
    n_images. meta gives what CODE_KEYS lists and the arguments do not say; "text" (captions) may be left out.
    """
    def __init__(self, folder, n_images, n_aug, grid, codebook_size, meta):
        self.folder, self.codebook_size, self.written = Path(folder), int(codebook_size), 0
        self.meta = dict(text=None) | meta
        self.meta |= dict(version=CODE_VERSION, codebook_size=int(codebook_size), grid=[int(g) for g in grid],
                          images=int(n_images))  # fmt: skip
        missing = [key for key in CODE_KEYS if key not in self.meta]
        if missing:
            raise ValueError(f"the description of the codes lacks {', '.join(missing)}")
        if len(self.meta["augmentations"]) != n_aug:
            raise ValueError(f"{len(self.meta['augmentations'])} augmentations are named, {n_aug} are announced")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.labels = np.zeros(n_images, dtype=np.int64)
        self.codes = self._open("codes", n_images, n_aug)

    def _temporary(self, name):
        return self.folder / f".{name}.partial"

    def _open(self, name, n_images, n_aug):
        shape = (n_images, n_aug, int(np.prod(self.meta["grid"])))
        dtype, path = _code_dtype(self.codebook_size), self._temporary(name)
        codes = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        try:
            with open(path, "r+b") as file:  # a map that finds the disk full ends the process by a signal (SIGBUS)
                getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # others: a file system that cannot do it
                path.unlink()
                raise OSError(error.errno, f"no space for {codes.nbytes / 1e9:.3g} GB of codes", str(path)) from None
        return codes

    def write(self, codes, labels):
        """codes [b, A, h*w] and labels [b], tensors or arrays of integers; raises ValueError if they do not fit."""
        codes, labels = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (codes, labels))
        end = self.written + len(codes)
        if codes.shape[1:] != self.codes.shape[1:] or len(labels) != len(codes) or end > len(self.codes):
            raise ValueError(f"codes {codes.shape} and labels {labels.shape} do not fit into {self.codes.shape} "
                             f"after {self.written} images")
        _check_range("codes", codes, self.codebook_size)
        _check_range("labels", labels, len(self.meta["class_names"]))
        self.codes[self.written:end] = codes
        self.labels[self.written:end] = labels
        self.written = end

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                self._close()
        finally:
            for name in ("codes", "fewer", "labels", "meta"):
                self._temporary(name).unlink(missing_ok=True)

    def _close(self):
        if self.written == 0 and "part" not in self.meta:  # a part of a split may be unreadable
            raise ValueError(f"no codes were written to {self.folder}")
        name = "codes"
        if self.written < len(self.codes):
            name, codes = "fewer", self._open("fewer", self.written, self.codes.shape[1])
            codes[:] = self.codes[:self.written]
            self.codes = codes
        self.codes.flush()
        with open(self._temporary("labels"), "wb") as file:
            np.save(file, self.labels[:self.written])
        self.meta["images"] = self.written
        self._temporary("meta").write_text(json.dumps(self.meta, indent=1))
        (self.folder / "meta.json").unlink(missing_ok=True)  # meta.json says that the other two are whole
        for temporary, final in ((name, "codes.npy"), ("labels", "labels.npy"), ("meta", "meta.json")):
            self._temporary(temporary).replace(self.folder / final)


def _check_range(what, values, end):
    if values.size and not (0 <= int(values.min()) and int(values.max()) < end):
        raise ValueError(f"{what} reach from {values.min()} to {values.max()}, outside 0..{end - 1}")


class CodeFile:
    """A folder that CodeWriter wrote, opened and checked; raises ValueError with one sentence that names the file.

    codes: memory map [images, A, h*w]; labels: int64 [images]; meta: the dict of meta.json; captions: a CaptionFile, or
    None where meta["text"] is.
    """
    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = self._read("meta.json", lambda path: json.loads(path.read_text()))
        missing = [key for key in CODE_KEYS if key not in self.meta]
        if missing or self.meta["version"] != CODE_VERSION:
            raise ValueError(f"{self.folder / 'meta.json'} " + (f"lacks {', '.join(missing)}" if missing else
                             f"has version {self.meta['version']}, this program reads {CODE_VERSION}"))
        self.codebook_size, self.class_names = self.meta["codebook_size"], self.meta["class_names"]
        self.grid = tuple(self.meta["grid"])
        self.codes = self._read("codes.npy", lambda path: np.load(path, mmap_mode="r"))
        self.labels = self._read("labels.npy", np.load)
        self._check()
        self.captions = CaptionFile(self.folder, self.meta["text"], len(self)) if self.meta["text"] else None

    def __len__(self):
        return len(self.codes)

    def _read(self, name, read):
        try:
            return read(self.folder / name)
        except FileNotFoundError:
            raise ValueError(f"{self.folder / name} is not there: encode the images first") from None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.folder / name} is truncated or damaged ({error})") from error

    def _check(self):
        path = self.folder / "codes.npy"
        shape = (self.meta["images"], len(self.meta["augmentations"]), self.grid[0] * self.grid[1])
        if self.codes.dtype != _code_dtype(self.codebook_size):
            raise ValueError(f"{path} is {self.codes.dtype}, a codebook of {self.codebook_size} needs "
                             f"{_code_dtype(self.codebook_size)}")
        if self.codes.shape != shape:
            raise ValueError(f"{path} has the shape {self.codes.shape}, meta.json says {shape} (images, augmentations, "
                             f"{self.grid[0]} x {self.grid[1]} codes)")
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1]:
            raise ValueError(f"{self.folder / 'labels.npy'} is {self.labels.dtype} {self.labels.shape}, "
                             f"not int64 {shape[:1]}")
        _check_range(f"the labels in {self.folder / 'labels.npy'}", self.labels, len(self.class_names))
        for first in range(0, len(self.codes), 4096):
            _check_range(f"the codes in {path}", self.codes[first:first + 4096], self.codebook_size)

    def check(self, **expected):
        """Raises ValueError where meta.json says otherwise: codes of another tokenizer, grid or set of classes."""
        for name, value in expected.items():
            if self.meta[name] != value:
                found, wanted = self.meta[name], value
                if isinstance(found, dict) and isinstance(wanted, dict):  # of the captions: what differs
                    keys = [key for key in found | wanted if found.get(key) != wanted.get(key)]
                    found, wanted = ({key: d.get(key) for key in keys} for d in (found, wanted))
                found, wanted = (str(v)[:60] for v in (found, wanted))
                raise ValueError(f"{self.folder / 'meta.json'} (tokenizer {self.meta['tokenizer']}) has the {name} "
                                 f"{found}, {wanted} is expected")

    def counts(self):
        """How often each code occurs, over all images and augmentations: int64 [codebook_size]."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64)
        for first in tqdm(range(0, len(self), 4096), desc=f"{self.folder}", unit="block"):
            counts += code_usage(torch.from_numpy(self.codes[first:first + 4096].astype(np.int64)), self.codebook_size)
        return counts

    def report(self):
        """Prints what is there, after reading what opening does not: counts of codes, features, the captions' texts."""
        counts, of_class = self.counts(), np.bincount(self.labels, minlength=len(self.class_names))
        usage, perplexity = usage_and_perplexity(counts)
        print(f"{self.folder}: {len(self)} images x {self.codes.shape[1]} crops of {self.grid} codes; "
              f"{usage:.1%} of {self.codebook_size} codes used, perplexity {perplexity:.1f}; "
              f"{len(of_class)} classes of {of_class.min()} to {of_class.max()} images")
        if self.captions:
            self.captions.check()
            n = np.diff(self.captions.rows)
            print(f"{self.folder}: {len(n)} captions of {n.min()} to {n.max()} tokens ({self.captions.kind})")

    def condition(self, indices, draws=None):
        """What a GPT reads for images [B]: (labels int64 [B],), (ids [B, T],) or (features [B, T, C], mask [B, T]);
        of several captions the first, or caption draws[i] modulo their number."""
        if self.captions:
            return self.captions.condition(indices, draws)
        return (torch.from_numpy(self.labels[indices]),)

    def names(self, indices):
        """What to write under images [B]: their first captions or their classes."""
        if self.captions:
            return self.captions.texts(indices)
        return [self.class_names[i] for i in self.labels[indices]]

    def origin(self):
        """What a GPT's file keeps of the codes that it was trained on."""
        if self.captions and self.captions.model:
            return dict(codes=self.meta, text_model=torch.frombuffer(bytearray(self.captions.model), dtype=torch.uint8))
        return dict(codes=self.meta)

    def code_batch(self, step, batch_size, seed, rank=0, world=1):
        """(codes int64 [B/world, h*w], *condition) of the endless sequence; depends on (seed, step) alone.

        Augmentation and caption are drawn anew for each picture and epoch. batch_size B is over all ranks.
        """
        check_batch(len(self), batch_size, world)
        epochs, indices = endless_positions(len(self), step, batch_size, seed, rank, world)
        draws = [np.random.default_rng((seed, int(e), int(i))) for e, i in zip(epochs, indices, strict=True)]
        views = [draw.integers(self.codes.shape[1]) for draw in draws]
        codes = torch.from_numpy(self.codes[indices, views].astype(np.int64))  # [B/world, h*w]
        batch = codes, *self.condition(indices, np.array([draw.integers(1 << 30) for draw in draws]))
        return tuple(x.pin_memory() for x in batch) if torch.cuda.is_available() else batch


def open_tokenizer(path, codes, folder, device):
    """The tokenizer that wrote the codes in `folder`, from the file that they name where `path` is None.

    FileNotFoundError where it is not there, ValueError where it is another one.
    """
    path = path or Path(codes.meta["tokenizer"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the tokenizer that wrote {folder}, is not there: give it with --vq")
    vq = VQModel.from_pretrained(path)
    codes.check(tokenizer_sha256=file_sha256(path))
    return vq.to(device)


def options():
    parser = Parser(__doc__)
    what = parser.add_argument_group("what")
    what.add_argument("--vq", type=Path, required=True, help="tokenizer, ours or LlamaGen's")
    what.add_argument("--hub", action="store_true", help=HUB_HELP)
    what.add_argument("--data", required=True, help=DATA_HELP)
    what.add_argument("--val-data", help="held-out folder (default: DATA/val, or a fixed 5%% of DATA)")
    what.add_argument("--bad-share", type=float, default=BAD_SHARE, help=BAD_SHARE_HELP)
    what.add_argument("--out", type=Path, required=True, help="folder for the code files")
    what.add_argument("--size", type=int, nargs="+", default=[256], help="pixels: one side, or height and width")
    crops = parser.add_argument_group("augmentations, all stored")
    crops.add_argument("--crops", choices=["center", "ten", "random"], default="ten",
                       help="ten: corners, centre and their mirrors, at each of --crop-scales")
    crops.add_argument("--crop-scales", type=float, nargs="+", default=[1.1, 1.05],
                       help="of ten: crops of SIZE pixels out of a centre crop of SCALE times SIZE")
    crops.add_argument("--n-random", type=int, default=6, help="of random: crops per image, drawn as train_vq.py does")
    crops.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                       help="store mirrored crops, too; never of digits, emoji or with --text")
    text = parser.add_argument_group("captions")
    text.add_argument("--text", choices=["none", "t5", "tokens"], default="none",
                      help="store captions, too: features of FLAN-T5, or tokens")
    text.add_argument("--t5", type=Path, help="of t5: folder of FLAN-T5 as Hugging Face has it")
    text.add_argument("--text-length", type=int, default=120, help="tokens of a caption, at most; GPTs read as many")
    text.add_argument("--text-model", type=Path, help="of tokens: a sentencepiece model (default: trained here)")
    text.add_argument("--text-vocab", type=int, help="tokens of the model trained here, at most (default: 8192)")
    text.add_argument("--text-pieces", choices=["unigram", "bpe", "word"], help="kind of that model (default: unigram)")
    run = parser.add_argument_group("run")
    run.add_argument("--batch-size", type=int, default=32, help="images read, and crops encoded, at a time")
    run.add_argument("--workers", type=int, default=0, help="processes that read images")
    run.add_argument("--check-data", action="store_true", help="read all images and captions, say what is there, end")
    run.add_argument("--seed", type=int, default=0, help="of random crops")
    run.add_argument("--device", default="auto", help=DEVICE_HELP)
    run.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                     help="of the encoder; bfloat16 moves some codes")
    return parser.parse_args()


def choose_crops(args, flip):
    """What Views takes as `crop`, and a name for each augmentation it gives."""
    if args.crops == "random":
        return args.n_random, [f"random {i}" for i in range(args.n_random)]
    if args.crops == "center":
        names = ["centre"] + (["centre, mirrored"] if flip else [])
        return (mirrored if flip else center_crop), names
    each = CORNERS + ([f"{c}, mirrored" for c in CORNERS] if flip else [])
    names = [f"{c} of {scale}" for scale in args.crop_scales for c in each]
    return (lambda img, size: [c for s in args.crop_scales for c in ten_crop(img, size, s)[: len(each)]]), names


def caption_reader(args, device):
    """What turns captions into rows, or None; ValueError for options that do not go together."""
    for name, kind in dict(t5="t5", text_model="tokens", text_vocab="tokens", text_pieces="tokens").items():
        if getattr(args, name) is not None and args.text != kind:
            raise ValueError(f"--{name.replace('_', '-')} goes with --text {kind}, not {args.text}")
    if args.text_model and (args.text_vocab or args.text_pieces):
        raise ValueError("--text-vocab and --text-pieces are for a model trained here: leave them out, or --text-model")
    if args.text == "none":
        return None
    if args.text == "t5":
        if not args.t5:
            raise ValueError("--text t5 needs the encoder's folder: give it with --t5")
        return CaptionFeatures(T5Encoder.from_pretrained(args.t5, device), args.text_length, args.t5)
    if args.text_model:
        return CaptionTokens(args.text_model.read_bytes(), args.text_length, args.text_model)
    model = None
    if launched()[0] == 0:
        captions = load_images(args.data, "train", 32, args.val_data, True, args.bad_share).captions
        every = -(-sum(map(len, captions)) // 1_000_000)  # beyond a million the trainer would draw, each time others
        captions = itertools.islice((caption for texts in captions for caption in texts), 0, None, every)
        model = train_tokenizer(captions, args.text_vocab or 8192, args.text_pieces or "unigram")
    return CaptionTokens(everyone(model)[0], args.text_length)


def pictures_sha256(image_set):
    """Hexadecimal SHA-256 of what a set is known by: names, labels and captions, in order."""
    digest = hashlib.sha256()
    for i, name in enumerate(image_set.names):
        texts = image_set.captions and image_set.captions[i]
        digest.update(repr((name, int(image_set.labels[i]), texts)).encode())
    return digest.hexdigest()


def written(folder, meta):
    """How many images a whole part of a split has, or None; ValueError where it was encoded with other settings."""
    if not (folder / "meta.json").is_file():
        return None
    found, wanted = ({**m, **m["part"], "part": None} for m in (json.loads((folder / "meta.json").read_text()), meta))
    for name, value in wanted.items():
        if found.get(name) != value:
            before, now = (str(v)[:60] for v in (found.get(name), value))
            raise ValueError(f"{folder.parent} was begun with another {name} ({before}, now {now}): go on with that, "
                             "or delete the folder")  # fmt: skip
    return found["images"]


def check_lost(lost, image_set):
    n = len(image_set)
    if lost > image_set.bad_share * n:
        raise ValueError(f"{lost} of {n} images ({lost / n:.1%}) cannot be read: --check-data names them")


def encode_images(vq, image_set, indices, crop, folder, meta, args, device, reader, bar):
    """Write codes and captions of some images to a folder; returns how many could be read."""
    size, n_aug = tuple(meta["image_size"]), len(meta["augmentations"])
    grid = [side // vq.config.factor for side in size]
    texts = CaptionWriter(folder, reader) if reader else nullcontext()
    with CodeWriter(folder, len(indices), n_aug, grid, vq.config.codebook_size, meta) as writer, texts:
        for images, labels, kept in eval_batches(image_set, size, args.batch_size, crop=crop, workers=args.workers,
                                                 seed=args.seed, indices=indices):  # fmt: skip
            images = images.view(-1, *images.shape[-3:]).to(device, non_blocking=True)  # b * n_aug, 3, H, W
            with autocast(device, args.dtype):
                codes = torch.cat([vq.encode(part) for part in images.split(args.batch_size)])
            writer.write(codes.view(len(labels), n_aug, -1), labels)
            if reader:
                texts.write([image_set.captions[i] for i in kept])
            bar.update()
    return writer.written


def encode_split(vq, split, args, size, device, rank, world, tokenizer_sha256, reader):
    """Write OUT/split or, where it has several parts, this process's share of those that are not there yet, to
    OUT/split.parts. Returns the folders of all, and the ImageSet.
    """
    image_set = load_images(args.data, split, size, args.val_data, reader is not None, args.bad_share)
    image_set.flip = image_set.flip and args.flip
    crop, names = choose_crops(args, image_set.flip)
    meta = dict(
        tokenizer=str(args.vq), tokenizer_sha256=tokenizer_sha256,
        image_size=[size, size] if isinstance(size, int) else list(size), augmentations=names,
        class_names=image_set.class_names, data=str(args.data), split=split, notice=image_set.notice,
        dtype=args.dtype, seed=args.seed, text=reader and reader.about(),
    )  # fmt: skip
    step = max(1, PART // args.batch_size) * args.batch_size  # whole batches, the same in parts as without
    parts = [range(first, min(first + step, len(image_set))) for first in range(0, max(1, len(image_set)), step)]
    folders, there = [args.out / split], [None]
    if len(parts) > 1:
        folders = [args.out / f"{split}.parts" / f"{i:05}" for i in range(len(parts))]
        meta["part"] = dict(batch_size=args.batch_size, part_size=step, flip=image_set.flip,
                            pictures_sha256=pictures_sha256(image_set))  # fmt: skip
        there = everyone([written(folder, meta) for folder in folders])[0]  # of process 0: others may be late
    lost = sum(len(part) - n for part, n in zip(parts, there, strict=True) if n is not None)
    if lost > image_set.bad_share * len(image_set):  # the run before ended by it: they may have been mended since
        there, lost = [n if n == len(part) else None for part, n in zip(parts, there, strict=True)], 0
    if whole := sum(n is not None for n in there):
        say(f"{split}: {whole} of {len(parts)} parts are there")
    mine = [i for i, n in enumerate(there) if n is None][rank::world]
    batches = sum(-(-len(parts[i]) // args.batch_size) for i in mine)
    if rank == 0:  # nothing was refused: from here on what lies there changes
        (args.out / "result.json").unlink(missing_ok=True)
    with tqdm(desc=split, total=batches, unit="batch", disable=rank > 0) as bar:
        for i in mine:
            n = encode_images(vq, image_set, parts[i], crop, folders[i], meta, args, device, reader, bar)
            lost += len(parts[i]) - n
            check_lost(lost, image_set)
    return folders, image_set


def join(folder, parts, image_set, reader):
    """Make the whole folder of its parts; returns the number of images."""
    metas = [json.loads((part / "meta.json").read_text()) for part in parts]
    n = sum(meta["images"] for meta in metas)
    if parts == [folder]:
        return n
    check_lost(len(image_set) - n, image_set)
    meta = {key: value for key, value in metas[0].items() if key != "part"}
    texts = CaptionWriter(folder, reader) if reader else nullcontext()
    with CodeWriter(folder, n, len(meta["augmentations"]), meta["grid"], meta["codebook_size"], meta) as writer, texts:
        for part, of_part in zip(tqdm(parts, desc=f"{folder}", unit="part"), metas, strict=True):
            if of_part["images"]:
                file = CodeFile(part)
                writer.write(file.codes, file.labels)
                if reader:
                    texts.take(file.captions)
    return n


def main():
    args = options()
    size = as_size(args.size)
    if args.text_length < 2 or args.n_random > 1000:
        raise ValueError("--text-length has to be above 1, --n-random at most 1000")
    if not all(1 <= scale <= 10 for scale in args.crop_scales):
        raise ValueError(f"--crop-scales have to be in [1, 10], not {args.crop_scales}")
    if args.check_data:
        return check_images(args.data, size, args.val_data, args.text != "none", args.bad_share, args.workers)
    with processes(args.device, timedelta(days=9)) as (device, rank, world):  # to wait for slower ones
        vq = VQModel.from_pretrained(args.vq).to(device)
        check_size(size, vq.config.factor)
        result = make_folder(args.out) / "result.json"  # written last: all is there
        sha, reader = file_sha256(args.vq), caption_reader(args, device)
        start, splits = time.perf_counter(), {}
        for split in ("train", "val"):
            splits[split] = encode_split(vq, split, args, size, device, rank, world, sha, reader)
        everyone(None)  # all parts are written
    if rank > 0:
        return
    images = {split: join(args.out / split, *found, reader) for split, found in splits.items()}
    seconds = time.perf_counter() - start
    result.write_text(json.dumps(dict(seconds=seconds, images=images), indent=1))
    for split in splits:
        if splits[split][0] != [args.out / split]:
            for part in splits[split][0]:  # first, so that a kill leaves no part that looks whole
                (part / "meta.json").unlink()
            shutil.rmtree(args.out / f"{split}.parts")
    print(f"{images['train']} images to train on and {images['val']} held out in {seconds:.1f} s: {args.out}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    cli(main)
