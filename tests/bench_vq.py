"""The image tokenizer: training steps as train_vq.py makes them, encoding as encode.py does, decoding as sample.py.

    plain            eager PyTorch; so encode.py and sample.py run on a GPU
    channels_last    the same with images and weights in that order
    compiled         torch.compile
    both             both; so train_vq.py runs on a GPU

VQ-16 with random weights at 256 x 256 pixels. A training step: 16 images (LlamaGen's 128 on 8 GPUs) under bfloat16
autocast, LPIPS with a VGG16 of random weights where lpips is installed, the adversarial loss and the discriminator's
own step, clipping, fused AdamW. Encoding, with the search for codes, and decoding: 64 images, in float32 (on a GPU
TF32, PyTorch's default for convolutions) and in bfloat16. Before a row is timed, codes in both orders of memory are
compared in full float32; the first losses of a training step are compared between contenders. Rows go to
benchmarks/<gpu>/vq.csv, vq.png is drawn from it.

    python tests/bench_vq.py [--quick | --dry-run]
"""

import functools
import importlib.util
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_train  # noqa: E402 - needs the path above
import benchmark as bench  # noqa: E402

import common  # noqa: E402
import training  # noqa: E402
from losses import LPIPS, PatchGAN, hinge_d_loss, hinge_g_loss  # noqa: E402
from vq import PRESETS, ResBlock, VQConfig, VQModel  # noqa: E402

CONTENDERS = {"plain": (False, False), "channels_last": (True, False), "compiled": (False, True), "both": (True, True)}
OURS = dict(train="both", encode="plain", decode="plain")  # what the scripts do
ROWS = [("train", "bfloat16", 16, 180), ("encode", "float32", 64, 40), ("encode", "bfloat16", 64, 40),
        ("decode", "bfloat16", 64, 40)]  # images at a time; seconds on an H100, estimated
EFFICIENCY = 0.7  # of the large product, that convolutions reach: assumed
VGG_FLOP = 40.1e9  # of VGG16's convolutions, an image of 256 x 256


def cost(preset, size, job):
    """FLOPs of one image, 2 per multiply-add, and elements that passes outside of products read and write.

    A GroupNorm with its SiLU reads twice and writes once, an addition in a residual block reads twice and writes once;
    a training step takes three times what a forward pass does. LPIPS: VGG16 on both images, and back through one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, passes = VQModel(VQConfig(**PRESETS[preset])), []
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm | ResBlock):
                module.register_forward_hook(lambda module, inputs, output: passes.append(3 * output.numel()))
        if job != "decode":
            model._encode(torch.empty(1, 3, size, size))
        if job != "encode":
            side = size // model.config.factor
            model._decode(torch.empty(1, model.config.code_dim, side, side))
    flops, passes = counter.get_total_flops(), sum(passes)
    if job == "train":
        flops, passes = 3 * flops + 3 * VGG_FLOP * (size / 256) ** 2, 3 * passes
    return flops, passes


def predicted_ms(preset, size, job, dtype, images, top):
    """Products, in TF32 at half the rate of bfloat16, then the passes; no search, discriminator or optimizer."""
    flops, passes = cost(preset, size, job)
    rate, width = (top.matmul, 2) if dtype == "bfloat16" else (top.matmul / 2, 4)
    return 1e3 * images * (flops / (EFFICIENCY * rate) + width * passes / top.copy)


class Contender:
    """A tokenizer of its own, the same for all, in one order of memory, compiled or not; and what a step needs."""

    def __init__(self, name, preset, size, images):
        last, compiled = CONTENDERS[name]
        self.format = torch.channels_last if last else torch.contiguous_format
        torch.manual_seed(0)
        with torch.device(bench.DEVICE):
            self.model = VQModel(VQConfig(**PRESETS[preset])).to(memory_format=self.format)
            self.images = (2 * torch.rand(images, 3, size, size) - 1).contiguous(memory_format=self.format)
        self.compile = bench.compiled if compiled else lambda function: function

    def encoder(self, dtype):
        encode = self.compile(self.model.eval().encode)
        return functools.partial(self.under, dtype, encode, self.images)

    def decoder(self, dtype):
        decode, side = self.compile(self.model.eval().decode), self.images.shape[-1] // self.model.config.factor
        with torch.device(bench.DEVICE):
            codes = torch.randint(self.model.config.codebook_size, (len(self.images), side, side))
        return functools.partial(self.under, dtype, decode, codes)

    @staticmethod
    @torch.no_grad()
    def under(dtype, function, x):
        with common.autocast(torch.device(bench.DEVICE), dtype):
            return function(x)

    def trainer(self, lpips):
        """A function that makes a step and returns its loss."""
        disc = PatchGAN().to(bench.DEVICE)
        run_model = self.compile(self.model.train())
        optimizers = [training.make_optimizers(part, bench_train.RECIPE) for part in (self.model, disc)]
        autocast = functools.partial(common.autocast, torch.device(bench.DEVICE), "bfloat16")

        def step():
            with autocast():
                rec, code_losses, _ = run_model(self.images)
                loss = F.mse_loss(rec.float(), self.images) + sum(code_losses.values())
                loss = loss + (lpips(rec, self.images) if lpips else 0)
                disc.requires_grad_(False)
                loss = loss + 0.5 * hinge_g_loss(disc(rec))
            loss.backward()
            training.update(self.model, optimizers[0], bench_train.RECIPE.lr, 1.0)
            disc.requires_grad_(True)
            with autocast():
                d_loss = hinge_d_loss(disc(self.images), disc(rec.detach()))
            d_loss.backward()
            training.update(disc, optimizers[1], bench_train.RECIPE.lr, 1.0)
            return loss.detach()

        return step


def measure(job, preset, size, dtype, images, names, top):
    row = dict(predicted_ms=predicted_ms(preset, size, job, dtype, images, top))
    lpips = None
    if job == "train" and importlib.util.find_spec("lpips"):
        lpips = LPIPS(random_weights=True).to(bench.DEVICE)
    row["lpips"] = bool(lpips)
    if job == "encode":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = Contender("plain", preset, size, images).encoder("float32")()
            other = Contender("channels_last", preset, size, images).encoder("float32")()
        same = (exact == other).float().mean().item()
        assert same > 0.99, f"in full float32 {same:.1%} of the codes are the same in both orders of memory"
    losses = {}
    for name in CONTENDERS:
        row |= {f"{name}_ms": None, f"{name}_gib": None, f"{name}_compile_s": None}
        if name not in names:
            continue
        bench.release_memory()
        if bench.DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            contender = Contender(name, preset, size, images)
            call = contender.trainer(lpips) if job == "train" else getattr(contender, f"{job}r")(dtype)
            began = time.perf_counter()
            first = call()
            bench.synchronize()
            row[f"{name}_compile_s"] = time.perf_counter() - began
            if job == "train":
                losses[name] = first.item()
                call()
                row[f"{name}_ms"] = statistics.median(bench_train.time_steps(call, 3) for _ in range(3))
            else:
                row[f"{name}_ms"] = bench.time_ms(call, 500)[0]
            if job == "encode":
                row[f"{name}_same"] = (first == exact).float().mean().item()
            row[f"{name}_gib"] = training.peak_gib(torch.device(bench.DEVICE))
        except Exception as error:
            if name == OURS[job]:
                raise
            print(f"  {job}, {dtype}, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    for name, loss in losses.items():
        ours = losses[OURS[job]]
        assert abs(loss - ours) < 0.02 * abs(ours), f"the first loss is {loss:.4f} ({name}), not {ours:.4f}"
    ours = row[f"{OURS[job]}_ms"]
    row |= {f"vs_{name}": row[f"{name}_ms"] and row[f"{name}_ms"] / ours for name in CONTENDERS if name != OURS[job]}
    return row | dict(ours_ms=ours, images_per_s=1e3 * images / ours)


def draw(rows, path):
    series = {f"{name}_ms": name for name in CONTENDERS} | dict(predicted_ms="predicted")
    bench.bars(rows, "{preset}, {job}, {dtype}, {images} images".format_map, series, path, "ms")


def main(words=None):
    args = bench.parser(__doc__).parse_args(words)
    run = bench.Run(args, "vq", draw)

    def row(job, preset, size, dtype, images, seconds):
        key = dict(job=job, preset=preset, size=size, images=images, dtype=dtype)
        names = [name for name in CONTENDERS if job == "train" or name != "compiled"]  # one compilation less
        names = names[:2] if args.quick else names
        return key, seconds, functools.partial(measure, job, preset, size, dtype, images, names, run.top)

    plan = [row(job, "vq16", 256, dtype, images, 8 if args.quick else seconds)
            for job, dtype, images, seconds in ROWS if job != "train" or not args.quick]
    tiny = [row(job, "tiny", 32, dtype, 2, 0) for job, dtype, *_ in ROWS] if args.dry_run else []
    columns = ("job", "dtype", "images", "predicted_ms", "ours_ms", "images_per_s", "vs_plain", "vs_channels_last",
               "vs_compiled", "vs_both", "plain_same", "plain_gib", "both_gib")
    return int(run.measure(plan, columns, tiny))


if __name__ == "__main__":
    sys.exit(main())
