"""Score trained models.

    python evaluate.py digits --vq out/demo/vq/vq.pt --gpt out/demo/gpt/gpt.pt --codes out/demo/codes --out out/demo
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import kernels
from common import cli, pick_device, save_grid, to_uint8
from data import center_crop, load_images, to_tensor
from encode import CodeFile
from sample import load_models, paint
from vq import usage_and_perplexity

# Guidance, top-k and temperature that `digits` tries on one seed before it reports the best on another.
CANDIDATES = [dict(cfg_scale=s, top_k=k) for s in (1.0, 1.5, 2.0, 3.0) for k in (0, 50)]


def psnr(a, b):
    """Peak signal-to-noise ratio of images [B, C, H, W] in [0, 1], data range 1 -> dB per image [B]."""
    return -10 * torch.log10((a.double() - b.double()).square().mean(dim=(1, 2, 3)).clamp(min=1e-12))


def reconstruction_psnr(images, reconstructions):
    """PSNR in dB per image [B], both [B, 3, H, W] in [-1, 1]: the reconstruction as it is written, 8 bits."""
    written = torch.from_numpy(to_uint8(reconstructions)).permute(0, 3, 1, 2).to(images.device) / 255
    return psnr(written, images / 2 + 0.5)


def as_pixels(image_set):
    """Every image of a digits set -> float32 [N, 3, 32, 32] in [-1, 1]."""
    return torch.stack([to_tensor(center_crop(image, 32)) for image in image_set.images])


def grey(images):
    """uint8 [N, 32, 32, 3] -> float [N, 64]: the 8 x 8 grey levels in [0, 1] that scikit-learn's digits have."""
    return images.astype(np.float32).mean(-1).reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) / 255


def nearest(a, b):
    """For each row of a [N, F] the root-mean-square distance to the nearest row of b [M, F]."""
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).min(1).values.numpy() / a.shape[1] ** 0.5


def copying(samples, train, held_out, sample_codes, train_codes, held_out_codes):
    """Are samples closer to training digits than real held-out digits are? And do they repeat stored codes whole?"""
    stored = {row.tobytes() for row in train_codes}
    same = {}
    for name, rows in (("sample", sample_codes), ("held_out", held_out_codes)):
        same[name] = float(np.mean([row.tobytes() in stored for row in rows]))
    to_train, real_to_train = nearest(samples, train), nearest(held_out, train)
    return {
        "sample_to_train": float(np.median(to_train)),
        "held_out_to_train": float(np.median(real_to_train)),
        "sample_closer_than_closest_percent_of_held_out": float((to_train < np.quantile(real_to_train, 0.01)).mean()),
        "sample_codes_in_train": same["sample"],
        "held_out_codes_in_train": same["held_out"],
    }


def digits(args):
    """The demo's report: PSNR, codebook usage, losses, and what a classifier of real digits says of painted ones."""
    from sklearn.svm import SVC

    start = time.perf_counter()
    device = pick_device(args.device)
    vq, gpt, _ = load_models(args.vq, args.gpt, None, device)
    codes, val_codes = CodeFile(args.codes / "train"), CodeFile(args.codes / "val")
    train_set, val_set = (load_images("digits", split, 32) for split in ("train", "val"))
    train, val = as_pixels(train_set), as_pixels(val_set)
    with torch.no_grad():
        rec = torch.cat([vq(part.to(device))[0].cpu() for part in val.split(64)])
    quality = reconstruction_psnr(val, rec)
    counts = kernels.code_usage(torch.from_numpy(codes.codes[:].astype(np.int64)), codes.codebook_size)
    usage, perplexity = map(float, usage_and_perplexity(counts))

    train_grey, val_grey = grey(to_uint8(train)), grey(to_uint8(val))
    judge = SVC(C=10.0, gamma="scale").fit(train_grey, train_set.labels)
    labels = np.arange(args.n) % 10

    def score(seed, settings):
        images, painted = paint(vq, gpt, torch.from_numpy(labels).to(device), batch_size=500, seed=seed, **settings)
        return float((judge.predict(grey(images)) == labels).mean()), images, painted

    tried = {json.dumps(s): score(args.choose_seed, s)[0] for s in CANDIDATES}
    chosen = json.loads(max(tried, key=tried.get))
    accuracy, images, painted = score(args.seed, chosen)
    save_grid(args.out / "samples.png", images[:100], 10, [f"{i}" for i in labels[:100]], scale=2)

    stages = {n: json.loads((p / "result.json").read_text()) for n, p in
              (("tokenizer", args.vq.parent), ("encode", args.codes), ("gpt", args.gpt.parent))}
    seconds = {name: round(result["seconds"], 1) for name, result in stages.items()}
    seconds["sample and score"] = round(time.perf_counter() - start, 1)
    report = dict(
        seconds=dict(seconds, total=round(sum(seconds.values()), 1)),
        psnr=float(quality.mean()), codebook_usage=usage, perplexity=perplexity,
        train_loss=stages["gpt"]["train_loss"], val_loss=stages["gpt"]["val_loss"],
        sample_accuracy=accuracy, real_accuracy=float(judge.score(val_grey, val_set.labels)),
        sampling=dict(chosen, seed=args.seed, samples=args.n), tried_on_seed={str(args.choose_seed): tried},
        copying=copying(grey(images), train_grey, val_grey, painted.flatten(1).cpu().numpy().astype(np.uint16),
                        codes.codes[:].reshape(-1, codes.codes.shape[2]), val_codes.codes[:, 0]),
    )  # fmt: skip
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print_report(report, args)


def print_report(report, args):
    c, s = report["copying"], report["sampling"]
    rows = [
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())),
        ("held-out PSNR", f"{report['psnr']:.2f} dB"),
        ("codes used", f"{report['codebook_usage']:.1%}, perplexity {report['perplexity']:.0f}"),
        ("GPT loss", f"{report['train_loss']:.3f} training, {report['val_loss']:.3f} held out (nats per code)"),
        ("painted digits read right", f"{report['sample_accuracy']:.1%} of {s['samples']} (cfg {s['cfg_scale']}, top-k "
                                      f"{s['top_k']}; settings chosen on another seed)"),
        ("real digits read right", f"{report['real_accuracy']:.1%} of the held-out ones, by the same classifier"),
        ("nearest training digit", f"{c['sample_to_train']:.3f} from painted, {c['held_out_to_train']:.3f} from held-"
                                   "out digits (RMS grey level)"),
        ("code for code in training", f"{c['sample_codes_in_train']:.1%} of painted, "
                                      f"{c['held_out_codes_in_train']:.1%} of held-out digits"),
    ]  # fmt: skip
    print("\n".join(f"{name:28}{value}" for name, value in rows))
    pictures = args.out / "samples.png", args.vq.parent / "reconstructions.png", args.gpt.parent / "samples.png"
    print(f"{'pictures':28}{', '.join(map(str, pictures))}")


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("digits", help="the demo's report", description=digits.__doc__)
    p.add_argument("--vq", type=Path, required=True, help="tokenizer, in the folder that train_vq.py made")
    p.add_argument("--gpt", type=Path, required=True, help="GPT, in the folder that train_gpt.py made")
    p.add_argument("--codes", type=Path, required=True, help="folder that encode.py made")
    p.add_argument("--out", type=Path, required=True, help="folder for report.json and samples.png")
    p.add_argument("--n", type=int, default=500, help="digits to paint, classes in turn")
    p.add_argument("--seed", type=int, default=0, help="of the digits that are reported")
    p.add_argument("--choose-seed", type=int, default=1, help="of the digits on which the sampling settings are chosen")
    p.add_argument("--device", default="auto")
    p.set_defaults(run=digits)
    return parser.parse_args()


def main():
    args = options()
    args.run(args)


if __name__ == "__main__":
    cli(main)
