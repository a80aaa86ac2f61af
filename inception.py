"""The Inception network of 2015 whose features FID and its relatives compare, as a port of TensorFlow's graph, and the
features of sets of images.

Module names are those of the published port's weights. It differs from torchvision's Inception v3 in its average pools,
which leave the border out, in a maximum pool in the last block, and in 1,008 classes.
Sources: Szegedy et al. (arXiv 1512.00567); Heusel et al. (arXiv 1706.08500) for FID; the ADM evaluator (Dhariwal and
Nichol, arXiv 2105.05233) for the spatial features and for logits without bias.
"""

import errno
import hashlib
import math
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from common import file_sha256, load_weights, rank_and_world, read_file
from crops import open_image
from data import EXTENSIONS
from distributed import barrier

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
POOL, SPATIAL = 2048, 17 * 17 * 7  # features


def five(pool):
    return [("branch1x1", (64, 1)), ("branch5x5", (48, 1), (64, 5)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            ("average", (pool, 1))]


def seven(c):
    across, down = (1, 7), (7, 1)
    twice = (c, 1), (c, down), (c, across), (c, down), (192, across)
    return [("branch1x1", (192, 1)), ("branch7x7", (c, 1), (c, across), (192, down)), ("branch7x7dbl", *twice),
            ("average", (192, 1))]


def eight(pool):
    fork = [(384, (1, 3)), (384, (3, 1))]  # both read the layer before
    return [("branch1x1", (320, 1)), ("branch3x3", (384, 1), fork), ("branch3x3dbl", (448, 1), (384, 3), fork),
            (pool, (192, 1))]


# channels in, then branches: a name and (channels, kernel[, stride 2]) of its layers
BLOCKS = {
    "Mixed_5b": (192, five(32)), "Mixed_5c": (256, five(64)), "Mixed_5d": (288, five(64)),
    "Mixed_6a": (288, [("branch3x3", (384, 3, 2)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), ("maximum",)]),
    "Mixed_6b": (768, seven(128)), "Mixed_6c": (768, seven(160)), "Mixed_6d": (768, seven(160)),
    "Mixed_6e": (768, seven(192)),
    "Mixed_7a": (768, [("branch3x3", (192, 1), (320, 3, 2)),
                       ("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)), ("maximum",)]),
    "Mixed_7b": (1280, eight("average")), "Mixed_7c": (2048, eight("maximum")),
}


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless `padded` is False."""

    def __init__(self, c_in, c_out, kernel, stride=1, padded=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 for k in kernel] if padded and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches of one input, concatenated. A branch named after a pool begins with it, or is nothing else."""

    def __init__(self, c_in, branches):
        super().__init__()
        self.branches = []  # per branch: its pool or None, and the names of its layers, two where it forks
        for name, *layers in branches:
            pool, c, names = name if name in ("average", "maximum") else None, c_in, []
            for i, layer in enumerate(layers, start=1):
                alone = "branch_pool" if pool else name
                fork = layer if isinstance(layer, list) else [layer]
                stems = [f"{alone}_{i}" if len(layers) > 1 else alone]
                stems = [stems[0] + letter for letter in "ab"] if len(fork) > 1 else stems
                for stem, sizes in zip(stems, fork, strict=True):
                    self.add_module(stem, Conv(c, *sizes))
                names.append(stems)
                c = sum(sizes[0] for sizes in fork)
            self.branches.append((pool, names))

    def forward(self, x):
        outputs = []
        for pool, names in self.branches:
            y = x
            if pool == "average":
                y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif pool == "maximum":
                y = F.max_pool2d(x, 3, 1, 1) if names else F.max_pool2d(x, 3, 2)
            for stems in names:
                y = torch.cat([getattr(self, stem)(y) for stem in stems], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def resize(images, size=299):
    """Bilinear as TensorFlow 1 does it: source = i * in / out, no half-pixel centres. [B, C, H, W] float32."""
    for dim in (3, 2):
        n = images.shape[dim]
        source = torch.arange(size, device=images.device, dtype=torch.float32) * (torch.tensor(float(n)) / size).item()
        low = source.long()
        share = (source - low).view(-1, *[1] * (3 - dim))
        a, b = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=n - 1))
        images = a + (b - a) * share
    return images


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        for name, *sizes in (("1a_3x3", 3, 32, 3, 2), ("2a_3x3", 32, 32, 3, 1, False), ("2b_3x3", 32, 64, 3),
                             ("3b_1x1", 64, 80, 1), ("4a_3x3", 80, 192, 3, 1, False)):
            self.add_module(f"Conv2d_{name}", Conv(*sizes))
        for name, sizes in BLOCKS.items():
            self.add_module(name, Block(*sizes))
        self.fc = nn.Linear(POOL, 1008)

    def forward(self, images):
        """uint8 [B, 3, H, W] -> pool features [B, 2048] and spatial features [B, 2023], float32.

        Spatial: the first 7 channels of Mixed_6d's 1x1 branch, positions before channels.
        """
        x = (resize(images.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            if name == "Mixed_6d":
                spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = getattr(self, name)(x)
        return x.mean((2, 3)), spatial

    def probabilities(self, pool):
        """Pool features [B, 2048] -> class probabilities [B, 1008]; without the bias, as the ADM evaluator has them."""
        return (pool @ self.fc.weight.T).softmax(-1)

    def fold(self):
        """Batch norms go into the convolutions before them: the same features to 1e-6, with a pass less per layer."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)  # a third faster on CPUs

    @classmethod
    def from_pretrained(cls, path=None):
        """The published weights, from `path` or torch hub's cache, folded, in eval mode, with `path` and `sha256`.

        Raises FileNotFoundError that tells where to have them, or ValueError naming every tensor that does not fit.
        """
        path = Path(path) if path else hub_file()
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there: fetch {FILES[0]} (91 MiB) from {ADDRESS}, or name the file with --inception"
            )
        with torch.device("meta"):
            model = cls()
        weights = {name: x for name, x in read_file(path).items() if not name.endswith("num_batches_tracked")}
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):  # in some of the files, and not read in eval mode
                weights[name] = torch.zeros_like(buffer, device="cpu")
        load_weights(model, weights, path)
        model.path, model.sha256 = path, file_sha256(path)
        return model.float().eval().requires_grad_(False).fold()


def hub_file():
    """The weights in torch hub's cache under either of their names; where there are none, where they belong."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])


# Sets of images


class Images:
    """uint8 images of one size: arr_0 [N, H, W, 3] of an npz, or a folder of PNG and JPEG files in order of name.

    Read batch by batch. Raises ValueError, in one sentence, for what is neither.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.is_dir():
            self.files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not self.files:
                raise ValueError(f"{path} holds no images")
            first = self._read(self.files[0])
            self.n, self.shape = len(self.files), (first.height, first.width, 3)
            return
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        self.files = None
        with self._open() as file:
            self._header(file)

    def _read(self, path):
        try:
            return open_image(path)
        except (OSError, ValueError, SyntaxError) as error:  # of PIL's readers
            raise ValueError(f"{path} cannot be read ({error})") from None

    @contextmanager
    def _open(self):
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                yield file
        except KeyError:
            raise ValueError(f"{self.path} holds no arr_0, the images") from None
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.path} is not a readable npz ({error})") from None

    def _header(self, file):
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, not uint8 images [N, H, W, 3]")
        self.n, self.shape = shape[0], tuple(shape[1:])

    def batches(self, batch_size):
        """(start, uint8 [b, 3, H, W]) of the batches that are this process's."""
        rank, world = rank_and_world()
        starts = range(0, self.n, batch_size)
        if self.files:
            for start in starts[rank::world]:
                arrays = [np.asarray(self._read(p)) for p in self.files[start : start + batch_size]]
                for path, array in zip(self.files[start:], arrays, strict=False):
                    if array.shape != self.shape:
                        raise ValueError(f"{path} is {array.shape[1]} x {array.shape[0]} pixels, "
                                         f"{self.files[0].name} {self.shape[1]} x {self.shape[0]}")
                yield start, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            return
        with self._open() as file:
            self._header(file)
            for i, start in enumerate(starts):
                count = min(batch_size, self.n - start)
                content = file.read(count * math.prod(self.shape))
                if len(content) < count * math.prod(self.shape):
                    raise ValueError(f"{self.path}: arr_0 is cut short")
                if i % world == rank:
                    array = np.frombuffer(content, np.uint8).reshape(count, *self.shape)
                    yield start, torch.from_numpy(array.copy()).permute(0, 3, 1, 2)


def _reserve(path):
    """Room on the disk for the whole file, which has holes: a write to a memory map that finds none kills a process."""
    if hasattr(os, "posix_fallocate"):
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # other systems cannot reserve
                    os.unlink(path)
                    what = f"no room for {size / 1e6:.0f} MB of features: TMPDIR or --cache say where"
                    raise OSError(error.errno, what, str(path)) from None


def open_rows(path, shape):
    """A float32 array in a file, to which every process writes its rows; OSError where the disk has no room for it."""
    if rank_and_world()[0] == 0:
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        _reserve(path)
    barrier()
    return np.lib.format.open_memmap(path, "r+")


@torch.no_grad()
def features(images, network, device, folder, batch_size=64):
    """Pool and spatial features of Images -> float32 memory map [N, 2048 + 2023] in `folder`, kept for the next time.

    network: as Inception.from_pretrained gives it.

    Raises ValueError for fewer than two images, features that are not finite, and sets of one and the same image.
    """
    if images.n < 2:
        raise ValueError(f"{images.path} holds {images.n} image: statistics need two or more")
    what = [str(images.path.resolve()), images.shape, network.sha256]
    for file in images.files or [images.path]:
        what += [os.path.relpath(file, images.path), (stat := file.stat()).st_size, stat.st_mtime_ns]
    path = folder / f"{images.path.stem}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        rows = open_rows(path.with_suffix(".tmp"), (images.n, POOL + SPATIAL))
        rank, world = rank_and_world()
        with tqdm(total=images.n, desc=images.path.name, unit="image", disable=rank > 0) as bar:
            for start, batch in images.batches(batch_size):
                rows[start : start + len(batch)] = torch.cat(network(batch.to(device)), 1).float().cpu().numpy()
                bar.update(len(batch) * world)
        rows.flush()
        barrier()
        if rank == 0:
            path.with_suffix(".tmp").rename(path)
        barrier()
    rows = np.load(path, mmap_mode="r")
    low, high = np.full(POOL, np.inf, np.float32), np.full(POOL, -np.inf, np.float32)
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        if not np.isfinite(part).all():
            raise ValueError(f"{images.path}: features are not finite numbers")
        low, high = np.minimum(low, part[:, :POOL].min(0)), np.maximum(high, part[:, :POOL].max(0))
    if (high - low).max() < 1e-6:
        raise ValueError(f"{images.path}: all {images.n} images have the same features (all black?)")
    return rows
