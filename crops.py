"""One picture: opening it, crops of it, its pixels as a tensor.

A size is a number of pixels for both sides, or (height, width). Random crops and their scales are those of LlamaGen's
recipe, centre crops ADM's (OpenAI's guided-diffusion).
"""

import numpy as np
import torch
from PIL import Image, ImageOps

LONGEST = 32  # crops that a picture may be long


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


def as_size(numbers):
    """[256] or [256, 256] -> 256, [32, 64] -> (32, 64), of --size; ValueError for others."""
    if len(numbers) not in (1, 2) or min(numbers) < 1 or max(numbers) > 8192:
        raise ValueError(f"--size takes one or two numbers (height, width) from 1 to 8192, not {numbers}")
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def check_size(size, factor):
    """ValueError where a tokenizer with `factor` pixels per code cannot take images of this size."""
    if any(side % factor for side in pair(size)):
        raise ValueError(f"--size {size} is no multiple of {factor}, the tokenizer's pixels per code")


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def cover(img, h, w):
    """Scaled so that it just covers h x w: halved with a box while twice too large, then bicubic (ADM's rule).

    Of a picture more than LONGEST crops long the middle is scaled: the whole of 10000 x 1 pixels would fill gigabytes.
    """
    width, height = min(img.width, LONGEST * -(-img.height * w // h)), min(img.height, LONGEST * -(-img.width * h // w))
    if (width, height) != img.size:
        img = cut(img, (img.height - height) // 2, (img.width - width) // 2, height, width)
    while img.width >= 2 * w and img.height >= 2 * h:
        img = img.resize((img.width // 2, img.height // 2), Image.Resampling.BOX)
    scale = max(w / img.width, h / img.height)
    return img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.BICUBIC)


def cut(img, top, left, h, w):
    return img.crop((left, top, left + w, top + h))


def center_crop(img, size):
    """The middle `size` (int or (h, w), pixels) of img scaled to cover it, as ADM and LlamaGen do."""
    h, w = pair(size)
    img = cover(img, h, w)
    return cut(img, (img.height - h) // 2, (img.width - w) // 2, h, w)


def mirrored(img, size):
    """[centre crop, its mirror image]."""
    img = center_crop(img, size)
    return [img, ImageOps.mirror(img)]


def random_crop(img, size, rng, flip, scale=1.25):
    """A random `size` of img scaled to cover 1 to `scale` times it (256..320 at 256); mirrored at random if `flip`."""
    h, w = pair(size)
    short = min(h, w)
    scaled = rng.integers(short, round(scale * short), endpoint=True)
    img = cover(img, round(h * scaled / short), round(w * scaled / short))
    top, left = rng.integers(img.height - h, endpoint=True), rng.integers(img.width - w, endpoint=True)
    img = cut(img, int(top), int(left), h, w)
    return ImageOps.mirror(img) if flip and rng.random() < 0.5 else img


def ten_crops(img, size, scales, n):
    """For each scale the first n of ten crops: centre and corners (top left, top right, bottom ...) of a centre crop
    at scale * size, then their mirrors.

    The centre comes first: held-out losses and pictures of codes take the first.
    """
    (h, w), found = pair(size), []
    for scale in scales:
        whole = center_crop(img, (round(h * scale), round(w * scale)))
        bottom, right = whole.height - h, whole.width - w
        places = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
        crops = [cut(whole, top, left, h, w) for top, left in places]
        found += (crops + [ImageOps.mirror(crop) for crop in crops])[:n]
    return found


def to_tensor(img):
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    x = np.ascontiguousarray(np.asarray(img).transpose(2, 0, 1), dtype=np.float32)  # [H, W, 3] -> [3, H, W]
    return torch.from_numpy(x / np.float32(127.5) - 1)
