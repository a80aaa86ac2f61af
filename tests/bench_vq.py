"""The image tokenizer: training steps as train_vq.py makes them, encoding as encode.py does, decoding as sample.py.

    plain            eager PyTorch; so encode.py and sample.py run on a GPU
    channels_last    the same with images and weights in that order
    compiled         torch.compile, which chooses the order within its graph
    both             both; so train_vq.py runs on a GPU

VQ-16 with random weights at 256 x 256 pixels. Encoding, with the search for codes: 32 images, in float32 (on a GPU
TF32, PyTorch's default for convolutions) and in bfloat16. Decoding: 16. A training step: 16 images (LlamaGen's 128 on 8
GPUs) under bfloat16 autocast, LPIPS with a VGG16 of random weights (needs lpips), the adversarial loss and the
discriminator's own step, clipping, fused AdamW. Before a row is timed, codes in both orders of memory are compared in
full float32; a training step's first loss is compared with that of `both`. Rows go to benchmarks/<gpu>/vq.csv, vq.png
is drawn from it.

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
ROWS = [("encode", "float32", 32, 40), ("encode", "bfloat16", 32, 40), ("decode", "bfloat16", 16, 40),
        ("train", "bfloat16", 16, 180)]  # images at a time; seconds on an H100, estimated
EFFICIENCY = 0.7  # of the large product, that convolutions reach: assumed
VGG_FLOP = 40.1e9  # of VGG16's convolutions, an image of 256 x 256
# Bytes that an element costs beside products. Compiled: a GroupNorm and its SiLU read twice and write once. Eager: SiLU
# is a pass of its own, both are float32 under autocast, with casts before and after, and biases are added by themselves
BYTES = {("compiled", "bfloat16"): dict(norm=6, add=6, bias=0), ("eager", "float32"): dict(norm=20, add=12, bias=8),
         ("eager", "bfloat16"): dict(norm=32, add=6, bias=4)}


def cost(preset, size, job, dtype):
    """FLOPs of one image, 2 per multiply-add, and bytes that norms, additions of residual blocks and biases move.

    A training step takes three times what a forward pass does. LPIPS: VGG16 on both images, and back through one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    kinds = dict(norm=torch.nn.GroupNorm, add=ResBlock, bias=torch.nn.Conv2d)
    each = BYTES["compiled" if OURS[job] == "both" else "eager", dtype]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, moved = VQModel(VQConfig(**PRESETS[preset])), []
        for name, kind in kinds.items():
            for module in model.modules():
                if isinstance(module, kind):
                    module.register_forward_hook(lambda *call, per=each[name]: moved.append(per * call[2].numel()))
        if job != "decode":
            model._encode(torch.empty(1, 3, size, size))
        if job != "encode":
            side = size // model.config.factor
            model._decode(torch.empty(1, model.config.code_dim, side, side))
    flops, moved = counter.get_total_flops(), sum(moved)
    return (3 * (flops + VGG_FLOP * (size / 256) ** 2), 3 * moved) if job == "train" else (flops, moved)


def predicted_ms(preset, size, job, dtype, images, top):
    """Products, in TF32 at half the rate of bfloat16, then the bytes; not the search, LPIPS' passes, the discriminator,
    the optimizer."""
    flops, moved = cost(preset, size, job, dtype)
    rate = top.matmul if dtype == "bfloat16" else top.matmul / 2
    return 1e3 * images * (flops / (EFFICIENCY * rate) + moved / top.copy)


class Contender:
    """A tokenizer of its own, the same for all, in one order of memory, compiled or not; and what a step needs."""

    def __init__(self, name, preset, size, images):
        last, compiled = CONTENDERS[name]
        order = torch.channels_last if last else torch.contiguous_format
        torch.manual_seed(0)
        with torch.device(bench.DEVICE):
            self.model = VQModel(VQConfig(**PRESETS[preset])).to(memory_format=order)
            self.images = (2 * torch.rand(images, 3, size, size) - 1).contiguous(memory_format=order)
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
                loss = loss + lpips(rec, self.images)
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
    row |= {f"{name}_{what}": None for name in CONTENDERS for what in ("ms", "gib", "compile_s", "same")}
    lpips, exact = LPIPS(random_weights=True).to(bench.DEVICE) if job == "train" else None, None
    ours, losses = OURS[job], {}
    if job == "encode":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = Contender("plain", preset, size, images).encoder("float32")()
            other = Contender("channels_last", preset, size, images).encoder("float32")()
        same = (exact == other).float().mean().item()
        assert same > 0.999, f"in full float32 {same:.1%} of the codes are the same in both orders of memory"
    for name in sorted(names, key=lambda name: name != ours):  # ours first: the others are compared with it
        bench.release_memory()
        try:
            contender = Contender(name, preset, size, images)
            call = contender.trainer(lpips) if job == "train" else getattr(contender, f"{job}r")(dtype)
            began = time.perf_counter()
            first = call()
            bench.synchronize()
            row[f"{name}_compile_s"] = time.perf_counter() - began
            if job == "encode":
                row[f"{name}_same"] = (first == exact).float().mean().item()
            if job == "train":
                losses[name] = first.item()
                assert abs(losses[name] - losses[ours]) < 0.02 * abs(losses[ours]), f"the first losses are {losses}"
            if bench.DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            call()
            row[f"{name}_gib"] = training.peak_gib(torch.device(bench.DEVICE))
            if job == "train":
                row[f"{name}_ms"] = statistics.median(bench_train.time_steps(call, 3) for _ in range(3))
            else:
                row[f"{name}_ms"] = bench.time_ms(call, 500)[0]
        except Exception as error:  # a rival that does not run or fit here
            if name == ours:
                raise
            print(f"  {job}, {dtype}, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    our_ms = row[f"{ours}_ms"]
    row |= {f"vs_{name}": row[f"{name}_ms"] and row[f"{name}_ms"] / our_ms for name in CONTENDERS if name != ours}
    return row | dict(ours_ms=our_ms, images_per_s=1e3 * images / our_ms)


def draw(rows, path):
    series = {f"{name}_ms": name for name in CONTENDERS} | dict(predicted_ms="predicted")
    bench.bars(rows, "{preset}, {job}, {dtype}, {images} images".format_map, series, path, "ms", log=False)


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
    if not importlib.util.find_spec("lpips"):
        print("training is left out: its loss needs lpips (pip install lpips)")
        plan, tiny = ([row for row in rows if row[0]["job"] != "train"] for rows in (plan, tiny))
    columns = ("job", "dtype", "images", "predicted_ms", "ours_ms", "images_per_s", "vs_plain", "vs_channels_last",
               "vs_compiled", "vs_both", "plain_same", "plain_gib", "both_gib")
    return int(run.measure(plan, columns, tiny))


if __name__ == "__main__":
    sys.exit(main())
