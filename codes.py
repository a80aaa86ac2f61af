"""Code files: what encode.py writes and all that comes after it reads, one folder for each split.

codes.npy [images, A, h*w]: uint16, or int32 for codebooks above 65,536; A augmentations of an image, h x w codes in
raster order. labels.npy: int64 [images]. meta.json: what CODE_KEYS lists. Captions lie beside them (captions.py).
"""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captions import CaptionFile, id_dtype, without_path
from common import file_sha256
from data import check_batch, endless_positions
from kernels import code_usage
from vq import VQModel, usage_and_perplexity

CODE_VERSION = 2
CODE_KEYS = (
    "version", "tokenizer", "tokenizer_sha256", "codebook_size", "grid", "image_size", "images", "augmentations",
    "class_names", "data", "split", "notice", "text",
)
NAMES = "codes.npy", "labels.npy", "meta.json"  # the last says that the others are whole
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # of disks


class CodeWriter:
    """Writes a folder of codes: codes.npy [images, A, h*w], labels.npy int64 [images] and meta.json.

    Use as a context manager; the files take their names when it closes without an error. meta gives what CODE_KEYS
    lists and the arguments do not say; "text" (captions) may be left out.
    """

    def __init__(self, folder, grid, codebook_size, meta):
        self.folder, self.labels = Path(folder), []
        self.meta = dict(text=None) | meta | dict(version=CODE_VERSION, codebook_size=int(codebook_size), images=0,
                                                  grid=[int(g) for g in grid])
        missing = [key for key in CODE_KEYS if key not in self.meta]
        if missing:
            raise ValueError(f"the description of the codes lacks {', '.join(missing)}")
        self.shape = len(self.meta["augmentations"]), int(np.prod(self.meta["grid"]))  # of an image: A, h*w
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self._temporary("codes.npy"), "wb")
        self._head()

    def _temporary(self, name):
        return self.folder / f".{name}.partial"

    def _head(self):
        """NumPy's header of codes.npy, as long for any number of images."""
        dtype, shape = id_dtype(self.meta["codebook_size"]), (self.meta["images"], *self.shape)
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, dict(descr=dtype.str, fortran_order=False, shape=shape))

    def write(self, codes, labels):
        """codes [b, A, h*w] and labels [b], tensors or arrays of integers; raises ValueError if they do not fit."""
        codes, labels = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (codes, labels))
        if codes.shape[1:] != self.shape or len(labels) != len(codes):
            raise ValueError(f"codes {codes.shape} and labels {labels.shape} do not fit images of {self.shape} codes")
        _check_range("codes", codes, self.meta["codebook_size"])
        _check_range("labels", labels, len(self.meta["class_names"]))
        self.file.write(codes.astype(id_dtype(self.meta["codebook_size"])).tobytes())
        self.labels.extend(labels.tolist())
        self.meta["images"] += len(codes)

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        try:
            if error is None:
                self._close()
        except OSError as full:
            error = full
            raise
        finally:
            if isinstance(error, OSError) and error.errno in FULL and not error.filename:
                error.filename = str(self.folder)
            with suppress(OSError):  # on a full disk it fails again
                self.file.close()
            for name in NAMES:
                self._temporary(name).unlink(missing_ok=True)

    def _close(self):
        if not self.labels and "part" not in self.meta:  # a part of a split may be unreadable
            raise ValueError(f"no codes were written to {self.folder}")
        self._head()
        self.file.close()
        with open(self._temporary("labels.npy"), "wb") as file:
            np.save(file, np.array(self.labels, dtype=np.int64))
        self._temporary("meta.json").write_text(json.dumps(self.meta, indent=1))
        for name in NAMES:
            with open(self._temporary(name), "r+b") as file:
                os.fsync(file.fileno())
        (self.folder / "meta.json").unlink(missing_ok=True)
        for name in NAMES:
            self._temporary(name).replace(self.folder / name)


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
            hint = "encode the images first"
            if (self.folder / "val" / name).is_file():
                hint = f"give {self.folder / 'train'} or {self.folder / 'val'}"
            if (self.folder.parent / name).is_file():
                hint = f"give {self.folder.parent.parent}"
            raise ValueError(f"{self.folder / name} is not there: {hint}") from None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.folder / name} is truncated or damaged ({error})") from error

    def _check(self):
        path = self.folder / "codes.npy"
        shape = (self.meta["images"], len(self.meta["augmentations"]), self.grid[0] * self.grid[1])
        if self.codes.dtype != id_dtype(self.codebook_size):
            raise ValueError(f"{path} is {self.codes.dtype}, a codebook of {self.codebook_size} needs "
                             f"{id_dtype(self.codebook_size)}")
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
            found, wanted = (without_path(v) if name == "text" else v for v in (self.meta[name], value))
            if found != wanted:
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

    def tokens(self, indices, views=0):
        """Codes int64 [B, h*w] of images [B] or a slice: of their first crops, or of crop views[i]."""
        return torch.from_numpy(self.codes[indices, views].astype(np.int64))

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

        Augmentation and caption are drawn again for each picture and epoch. batch_size B is over all ranks.
        """
        check_batch(len(self), batch_size, world)
        epochs, indices = endless_positions(len(self), step, batch_size, seed, rank, world)
        draws = [np.random.default_rng((seed, int(e), int(i))) for e, i in zip(epochs, indices, strict=True)]
        views = [draw.integers(self.codes.shape[1]) for draw in draws]
        captions = np.array([draw.integers(1 << 30) for draw in draws])
        batch = self.tokens(indices, views), *self.condition(indices, captions)
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
