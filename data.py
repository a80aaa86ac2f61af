"""Sets of images: built-in ones, folders, captioned ones; and batches of their pictures.

B, 3, H, W: pixels in [-1, 1]; A: augmentations of a picture.
"""

import atexit
import functools
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import builtin_sets
from builtin_sets import split_indices
from common import nearest, rank_and_world, whole_characters
from crops import center_crop, open_image, pair, random_crop, to_tensor

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BUILT_IN = ("digits", "emoji", "digits-text")
DATA_HELP = f"{', '.join(BUILT_IN)}, a folder of images or of class folders, or a .jsonl file of captioned images"
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # names of folders that are no classes
BAD_SHARE = 0.01  # of a set's images, that may have no usable pixels or caption
log = logging.getLogger(__name__)


def add_data_options(group):
    """The options that train_vq.py, encode.py and evaluate.py share."""
    group.add_argument("--data", required=True, help=DATA_HELP)
    group.add_argument("--val-data",
                       help="held-out images, a folder or file as DATA is (default: DATA/val, or a fixed 5%% of DATA)")
    group.add_argument("--bad-share", type=float, default=BAD_SHARE,
                       help="share of images that may have no usable pixels or caption before the run stops")
    group.add_argument("--size", type=int, nargs="+", default=[256], help="pixels: one side, or height and width")


@dataclass
class ImageSet:
    """Pictures of one split; `images` holds RGB images or Paths, `names` one name per picture."""

    images: list
    labels: np.ndarray  # int64 [N]
    class_names: list[str]
    names: list[str]
    flip: bool  # may pictures be mirrored?
    notice: str = ""  # the licence's sentence
    scale: float = 1.25  # random crops come out of 1 to `scale` times their size
    captions: list | None = None  # a list of strings per picture
    bad_share: float = BAD_SHARE
    source: str = "the images"  # whose they are, for errors and reports
    of: int | None = None  # pictures that bad_share is a share of (default: these)

    def __len__(self):
        return len(self.images)

    def subset(self, keep, of=None):
        """Some of the pictures: a set of its own, or a sample out of `of` pictures, whose bad_share is theirs."""
        keep = np.asarray(keep, dtype=np.int64)
        captions = None if self.captions is None else [self.captions[i] for i in keep]
        return replace(self, images=[self.images[i] for i in keep], labels=self.labels[keep],
                       names=[self.names[i] for i in keep], captions=captions, of=of)


def load_images(data, size, val_data=None, text=False, bad_share=BAD_SHARE):
    """The ImageSets to train on and held out, of a built-in set, of a folder of class folders or of images, or of
    captioned images: a .jsonl file, or a folder with name.txt beside name.jpg.

    size (int or (h, w), pixels) is what emoji are drawn at; digits are 32 x 32, digits-text 32 x 64, others keep
    theirs. Held out: a fixed 10% of the digits, 5% of the rest; for a folder, its own `val` beside `train`, or
    `val_data`, of the same kind as data. text: captions are needed; pictures without are left out, and none is
    mirrored, since captions speak of left and right. bad_share: how many may have no usable caption or image.
    Raises ValueError or FileNotFoundError with one sentence.
    """
    if val_data is not None and str(data) in BUILT_IN:
        raise ValueError(f"{data} has its own held-out pictures: val_data goes with a folder or .jsonl file only")
    if str(data) == "digits-text":
        splits = [ImageSet(**builtin_sets.digits_text(*of)[0]) for of in (("train", 24_000), ("val", 960))]
    elif str(data) in BUILT_IN:
        digits = str(data) == "digits"
        pictures = ImageSet(**(builtin_sets.digits() if digits else builtin_sets.emoji(max(pair(size)))))
        splits = _hold_out(pictures, 0.1 if digits else 0.05)
    else:
        read = _scan_jsonl if Path(data).suffix == ".jsonl" else _scan
        splits = _split(Path(data), val_data, lambda path: read(path, text, bad_share))
        if text:  # after the split, which is the same with captions and without
            splits = [part.subset([i for i, texts in enumerate(part.captions) if texts]) for part in splits]
    sources = f"{data}, train", str(val_data or f"{data}, val")
    return [replace(part, bad_share=bad_share, source=source) for part, source in zip(splits, sources, strict=True)]


def _hold_out(pictures, share):
    return [pictures.subset(split_indices(pictures.labels, share, split)) for split in ("train", "val")]


def _split(root, val_data, read):
    if (root / "train").is_dir() and (root / "val").is_dir():
        root, val_data = root / "train", val_data or root / "val"
    pictures = read(root)
    if val_data is None:
        if len(pictures) < 2:
            raise ValueError(f"{root} holds one image, and one has to be held out: add more, or name a val_data folder")
        return _hold_out(pictures, 0.05)
    held_out = read(Path(val_data))
    if held_out.class_names != pictures.class_names:
        odd = sorted(set(held_out.class_names) ^ set(pictures.class_names))
        raise ValueError(f"the class folders of {val_data} are not those of {root}: {', '.join(odd[:5])} in one only")
    places = set(_places(held_out.images))
    if both := next((path for path, place in zip(pictures.images, _places(pictures.images), strict=True)
                     if place in places), None):
        raise ValueError(f"{both} is given for training and for validation: the held-out images must be others")
    return pictures, held_out


def _places(paths):
    """Where files really are, whatever links lead there."""
    parent = functools.cache(os.path.realpath)
    for path in paths:
        place = os.path.join(parent(os.path.dirname(path)), os.path.basename(path))
        yield os.path.realpath(place) if os.path.islink(place) else place


def _scan_jsonl(path, text, bad_share):
    if not path.is_file():
        what = "no .jsonl file, as the images to train on are" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    images, captions = {}, {}  # a picture may have several lines, and is in one split only, however it is written
    paths, lines = read_jsonl(path, bad_share)
    for place, image, texts in zip(_places(paths), paths, lines, strict=True):
        images.setdefault(place, image)
        captions.setdefault(place, []).extend(texts)
    images = list(images.values())
    return ImageSet(images, np.zeros(len(images), np.int64), ["image"], [str(image) for image in images],
                    flip=not text, captions=list(captions.values()))


def _scan(root, text=False, bad_share=BAD_SHARE):
    """Class folders (sorted names are the classes) or one flat folder of images (class "image")."""
    images, folders = _list(root)
    if images and folders:
        raise ValueError(f"{root} mixes images ({images[0].name}) and class folders ({folders[0].name}): sort them")
    if not images and not folders:
        raise ValueError(f"{root} holds no images ({' '.join(sorted(EXTENSIONS))})")
    if folders and SPLITS.issuperset(folder.name.lower() for folder in folders):
        raise ValueError(f"{root} holds {' and '.join(f.name for f in folders)}, no classes: name one of them as the "
                         "data, and the held-out one with --val-data (train and val together are found)")
    groups = [images] if images else [_list(folder)[0] for folder in folders]
    for folder, group in zip(folders, groups, strict=False):
        if not group:
            raise ValueError(f"class folder {folder} holds no images: every folder in {root} counts as a class")
    paths = [path for group in groups for path in group]
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups]).astype(np.int64)
    pictures = ImageSet(paths, labels, [f.name for f in folders] or ["image"], [p.name for p in paths], flip=True)
    if not text:
        return pictures
    return replace(pictures, captions=read_pairs(paths, bad_share), flip=False)


def _list(folder):
    """Paths of images, and of folders. What has an image's name counts as one, be it a folder or a dangling link."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "not there"
        hint = nearest(str(folder), BUILT_IN) or f": data is {DATA_HELP}"
        if folder.suffix == ".jsonl" and folder.exists():
            hint = ", as the images to train on are"
        raise FileNotFoundError(f"{folder} is {what}{hint}")
    with os.scandir(folder) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    images, folders = [], []
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            path = Path(entry.path)  # no pipe, which would block its reader, and no link to one
            if not path.is_fifo() if entry.is_symlink() else entry.is_file() or entry.is_dir():
                images.append(path)
        elif entry.is_dir():
            folders.append(Path(entry.path))
    return images, folders


def too_many(n, total, share):
    """Are n unusable ones of `total` more than the share that may be left out, or all?"""
    return n > share * total or n == total > 0


def check_unusable(n, total, share, source, hint):
    """ValueError where too many pictures have no usable caption or image; it ends in `hint`."""
    if too_many(n, total, share):
        some = f"{n} of {total} ({n / total:.1%}) have no usable caption or image"
        raise ValueError(f"{source}: {f'everything is unusable ({n} of {total})' if n == total else some}, {hint}")


class Rejects:
    """What had to be left out: the first ten are named (at level INFO all), and too many of them end the run."""

    def __init__(self, source, share):
        self.source, self.share, self.n, self.first = source, share, 0, None

    def add(self, where, why):
        self.n, self.first = self.n + 1, self.first or f"{where} ({why})"
        log.log(logging.WARNING if self.n <= 10 else logging.INFO, "left out: %s (%s)", where, why)

    def check(self, total):
        """ValueError if more than the share of `total` was left out, or everything."""
        if not total:
            raise ValueError(f"{self.source}: no captioned images")
        if self.n:
            log.log(logging.WARNING if self.n > 10 else logging.INFO, "left out: %d in all of %d", self.n, total)
        check_unusable(self.n, total, self.share, self.source, f"the first is {self.first}")


def clean_texts(texts):
    """Captions with single spaces between words; those that hold nothing are dropped."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("text is neither a string nor a list of strings")
    if not (texts := [" ".join(text.split()) for text in map(whole_characters, texts) if text.strip()]):
        raise ValueError("the caption is empty")
    return texts


def read_jsonl(path, bad_share):
    """Lines {"image": "path relative to the file", "text": "..." or ["...", ...]} -> image paths, captions of each.

    Malformed lines, missing images and empty captions are left out; ValueError if they pass `bad_share` of the lines.
    """
    path, images, captions = Path(path), [], []
    rejects, total = Rejects(path, bad_share), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            total += 1
            try:
                entry = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a mark
                if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or "text" not in entry:
                    raise ValueError('not {"image": "...", "text": "..."}')
                texts, image = clean_texts(entry["text"]), path.parent / entry["image"]
                if not image.is_file():
                    raise ValueError(f"{image} is not there")
            except (ValueError, OSError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
                rejects.add(f"{path} line {number}", error)
                continue
            images.append(image)
            captions.append(texts)
    rejects.check(total)
    return images, captions


def read_pairs(images, bad_share):
    """name.txt beside each image path name.jpg, a caption a line -> captions of each image, None where there are none.

    ValueError if that passes `bad_share` of the images.
    """
    captions, rejects = [], Rejects(Path(images[0]).parent, bad_share)
    for image in images:
        text = Path(image).with_suffix(".txt")
        try:
            captions.append(clean_texts(text.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, ValueError) as error:
            rejects.add(text, getattr(error, "strerror", None) or error)
            captions.append(None)
    rejects.check(len(images))
    return captions


def _read(image):
    """(RGB image, "") of an image or a path, or (None, why it cannot be read)."""
    try:
        return (image if isinstance(image, Image.Image) else open_image(image)), ""
    except Exception as error:  # decoders raise whatever they like
        return None, f"{type(error).__name__}: {error}"


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> (pixels or None, label, index, [(unreadable index, why), ...]).

    crop(img, size) returns one image, or a list that is stacked: [A, 3, H, W]. crop=None is one random_crop, crop=A a
    stack of A, drawn from (seed, epoch, index). An unreadable image gives way to the next, at most `retries` times.
    """

    def __init__(self, image_set, size, crop=None, seed=0, retries=0):
        self.set, self.size, self.crop, self.seed, self.retries = image_set, size, crop, seed, retries

    def __getitem__(self, key):
        epoch, index = key
        unreadable = []
        for at in range(index, index + self.retries + 1):
            at = at % len(self.set)
            img, why = _read(self.set.images[at])
            if why:
                unreadable.append((at, why))
                continue
            views = self._views(img, np.random.default_rng((self.seed, epoch, index)))
            pixels = _stack([to_tensor(v) for v in views]) if isinstance(views, list) else to_tensor(views)
            return pixels, int(self.set.labels[at]), at, unreadable
        return None, -1, -1, unreadable

    def _views(self, img, rng):
        if callable(self.crop):
            return self.crop(img, self.size)
        draws = [random_crop(img, self.size, rng, self.set.flip, self.set.scale) for _ in range(self.crop or 1)]
        return draws if self.crop else draws[0]


def _stack(tensors):
    return torch.from_numpy(np.stack([t.numpy() for t in tensors]))  # torch.stack: 100 ms a batch when cores are busy


def _collate(items):
    good = [item for item in items if item[0] is not None]
    unreadable = [pair for item in items for pair in item[3]]
    if not good:
        return None, None, None, unreadable
    images, labels, indices, _ = zip(*good, strict=True)
    batch = _stack(images), torch.tensor(labels), torch.tensor(indices)
    try:
        if torch.utils.data.get_worker_info():  # here, where errors are heard: a thread would lose the batch, and go on
            batch = [x.share_memory_() for x in batch]
    except RuntimeError:
        room = f"{images[0].numel() * 4 * len(images) / 2**20:.0f} MiB of shared memory"
        return None, None, None, f"--workers need room for batches of {room} in /dev/shm (docker run --shm-size)"
    return *batch, unreadable


def _leave_signals_to_the_run(_):
    """Workers outlive these signals, which reach whole groups of processes: the run ends them after its step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _end_workers():
    """At the end: an error may still hold a loader, and Python would wait for its workers, which ignore SIGTERM."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would take it for an accident
            worker.kill()


atexit.register(_end_workers)


def _workers(n):
    """Options of a DataLoader. Forked, workers share a set of a million paths; Python 3.14 would copy it to each."""
    context = "fork" if n and sys.platform == "linux" else None
    return dict(num_workers=n, worker_init_fn=_leave_signals_to_the_run, multiprocessing_context=context)


def _received(loader):
    """Its batches. A worker that was killed while it handed one over is told of as PyTorch tells of others."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        if not loader.num_workers:
            raise
        raise RuntimeError(f"DataLoader worker was lost: {error}") from error


def _batches(image_set, views, batch_sampler, workers):
    """Yields (images, labels, indices), names each unreadable image once; ValueError when they are too many."""
    loader = torch.utils.data.DataLoader(
        views, batch_sampler=batch_sampler, collate_fn=_collate, **_workers(workers),
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())  # leaves the global generator untouched
    seen = {}
    for images, labels, indices, unreadable in _received(loader):
        if isinstance(unreadable, str):
            raise OSError(unreadable)
        for index, error in unreadable:
            if index in seen:
                continue
            seen[index] = f"{image_set.images[index]} ({error})"
            log.warning("unreadable image left out: %s", seen[index])
            check_unusable(len(seen), image_set.of or len(image_set), image_set.bad_share, image_set.source,
                           f"the first is {next(iter(seen.values()))}")
        if images is not None:
            yield images, labels, indices


@functools.lru_cache(maxsize=8)
def _epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def endless_positions(n, step, batch_size, seed, rank, world):
    """Epochs and indices [B/world]: batch s of size B covers s*B .. (s+1)*B-1 of the endless shuffled sequence."""
    part = batch_size // world
    epochs, places = np.divmod(step * batch_size + rank * part + np.arange(part), n)
    return epochs, np.array([_epoch_order(n, seed, int(e))[p] for e, p in zip(epochs, places, strict=True)])


def check_batch(n, batch_size, world):
    if n == 0:
        raise ValueError("the set holds no pictures")
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"the global batch size {batch_size} cannot be shared evenly by {world} ranks")


def image_batches(image_set, size, batch_size, seed, start_step=0, workers=0, rank=0, world=1):
    """Endless (images [B/world, 3, H, W], labels int64 [B/world]); batch s depends on (seed, s) alone, so it resumes.

    batch_size B is over all ranks; every batch is full, running on into the next epoch. Random crops, and flips where
    the set allows them. Raises ValueError when more than its bad_share is unreadable, or all.
    """
    n = len(image_set)
    check_batch(n, batch_size, world)
    views = Views(image_set, size, seed=seed, retries=int(image_set.bad_share * n))
    positions = (endless_positions(n, step, batch_size, seed, rank, world) for step in itertools.count(start_step))
    keys = (list(zip(*(part.tolist() for part in pair), strict=True)) for pair in positions)  # (epoch, index) each
    return ((images, labels) for images, labels, _ in _batches(image_set, views, keys, workers))


def eval_batches(image_set, size, batch_size, crop=center_crop, workers=0, seed=0, indices=None):
    """One pass in order, (images [b, 3, H, W] or [b, A, 3, H, W], labels, indices); unreadable images are left out.

    crop(img, size) returns one image or a list of A; crop=A (int) takes A random crops, drawn from `seed`; indices:
    the pictures to take (default: all). Raises ValueError like image_batches.
    """
    keys = [(0, i) for i in (range(len(image_set)) if indices is None else indices)]
    order = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    return _batches(image_set, Views(image_set, size, crop, seed), order, workers)


class Sizes(torch.utils.data.Dataset):
    """index -> (width, height, "") of a picture, decoded, or (0, 0, why it cannot be read)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        img, why = _read(self.images[index])
        return (0, 0, why) if why else (*img.size, "")


def check_images(data, size, val_data=None, text=False, bad_share=BAD_SHARE, workers=0):
    """Reads every picture of both splits, prints what is there, and names in the log all that cannot be used.

    The arguments are load_images'. Raises ValueError as it does, or at the end if too many pictures are unreadable.
    Under torchrun the first process does it.
    """
    if rank_and_world()[0] > 0:
        return
    logging.getLogger().setLevel(logging.INFO)
    (h, w), checked = pair(size), []
    for split, pictures in zip(("train", "val"), load_images(data, size, val_data, text, bad_share), strict=True):
        rejects, sizes = Rejects(pictures.source, bad_share), []
        loader = torch.utils.data.DataLoader(Sizes(pictures.images), batch_size=None, **_workers(workers),
                                             generator=torch.Generator())
        for image, (*found, why) in zip(pictures.images, tqdm(loader, split), strict=True):
            if why:
                rejects.add(image, why)
            else:
                sizes.append(found)
        checked.append((rejects, len(pictures)))
        counts = np.bincount(pictures.labels, minlength=len(pictures.class_names))
        few, many = counts.min(), counts.max()
        of = f"{few}" if few == many else (f"{few} ({pictures.class_names[counts.argmin()]}) to "
                                           f"{many} ({pictures.class_names[counts.argmax()]})")
        print(f"{split}: {len(pictures)} pictures, {rejects.n} unreadable; classes: {len(counts)}, of {of}")
        if sizes:
            small = sum(width < w or height < h for width, height in sizes)
            width, height = min(sizes, key=lambda s: min(s[0] / w, s[1] / h))
            print(f"{split}: {small} smaller than {h} x {w}, to be enlarged; the smallest is {height} x {width}")
        if text:
            print(f"{split}: {sum(map(len, pictures.captions))} captions")
    for rejects, n in checked:
        rejects.check(n)
