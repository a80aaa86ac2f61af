"""Score trained models: reconstructions, samples, stored codes, likelihoods.

    python evaluate.py recon --vq vq_ds16_c2i.pt --data imagenet --out out/recon
    python evaluate.py gen --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python evaluate.py self-check --ref VIRTUAL_imagenet256_labeled.npz --val imagenet/val
    python evaluate.py codes --codes out/codes/train --out out/codes
    python evaluate.py likelihood --gpt out/gpt/gpt.pt --codes out/codes/val

Generation is scored against the reference batch of the ADM evaluator, reconstruction against the images themselves:
mixing the two is the usual reason why published figures are not met. Under torchrun the images are split.
"""

import json
import logging
import math
import tempfile
import zipfile
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from codes import CodeFile, open_tokenizer
from command_line import DEVICE_HELP, HUB_HELP, Parser, add_command, cli
from common import make_folder, rank_and_world, read_file, save_grid, to_uint8, write_whole
from crops import as_size, check_size
from data import add_data_options, check_unusable, eval_batches, load_images
from distributed import barrier, everyone, in_turn, processes, total
from gpt import GPT
from inception import POOL, Images, Inception, features, open_rows
from losses import LPIPS
from metrics import frechet_distance, inception_score, precision_recall, psnr, reconstruct, ssim, statistics
from sample import decode
from vq import VQModel, usage_and_perplexity

log = logging.getLogger(__name__)

# What the ImageNet validation images score against VIRTUAL_imagenet256_labeled.npz, and by how much it may differ.
SELF_CHECK = dict(fid=(1.684, 0.02), inception_score=(231.8, 1.5), sfid=(3.69, 0.05), precision=(0.752, 0.005),
                  recall=(0.671, 0.005))


# References, and files of a command


@contextmanager
def scratch(folder=None):
    """A folder that all processes see: the one given, or a temporary one, which goes when all are done with it."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() if rank_and_world()[0] == 0 else nullcontext() as name:
        yield Path(everyone(name)[0])
        barrier()


def reference(path, shape, network, device, folder):
    """(statistics of pool, of spatial, pool features) of an npz or folder; None for what it does not hold.

    ValueError where its images are not as large as those of the samples, of the shape (height, width, channels).
    """
    path, stored, images = Path(path), {}, True
    if path.is_file() and zipfile.is_zipfile(path):
        with np.load(path) as content:
            pairs = (("mu", "sigma"), ("mu_s", "sigma_s"))
            stored = {mu: (content[mu], content[sigma]) for mu, sigma in pairs if {mu, sigma} <= {*content}}
            images = "arr_0" in content
        if not images and "mu" not in stored:
            raise ValueError(f"{path} holds neither statistics (mu, sigma) nor images (arr_0)")
    images = Images(path) if images else None
    if images and images.shape != shape:
        (h, w, _), (height, width, _) = shape, images.shape
        raise ValueError(f"the samples are {w} x {h} pixels, those of {path} {width} x {height}: they have to be alike "
                         "(sample.py --size)")
    rows = features(images, network, device, folder) if images else None
    pool = rows[:, :POOL] if images else None
    if "mu" in stored:
        return stored["mu"], stored.get("mu_s"), pool
    return statistics(pool), statistics(rows[:, POOL:]), pool


def result_file(path):
    """The path of a JSON file that can be written; OSError, before any work is done, where it cannot."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not the name of a JSON file")
    return make_folder(Path(path).parent) / Path(path).name


def write_result(path, result, hide=()):
    """One JSON file, whole or not at all, and the same but for `hide` on the screen; the first process alone."""
    if rank_and_world()[0]:
        return
    write_whole(path, json.dumps(result, indent=1))
    for name, value in ((name, value) for name, value in result.items() if name not in hide):
        print(f"{name:26}{value:.4f}" if isinstance(value, float) else f"{name:26}{value}")
    print(f"{'written':26}{path}")


# The commands


def compare(samples, ref, args):
    """Samples against a reference: FID, sFID, IS, precision and recall of the ADM evaluator."""
    device = args.device
    network, images = Inception.from_pretrained(args.inception).to(device), Images(samples)
    with scratch(args.cache) as folder:
        pool_stats, spatial_stats, ref_pool = reference(ref, images.shape, network, device, folder)  # wrong? at once
        rows = features(images, network, device, folder)
        result = dict(samples=str(samples), images=len(rows), size=images.shape[:2], reference=str(ref),
                      reference_images=None if ref_pool is None else len(ref_pool),
                      network=f"{network.path.name}, sha256 {network.sha256[:12]}")
        if rank_and_world()[0]:
            return result
        pool = torch.from_numpy(np.ascontiguousarray(rows[:, :POOL])).to(device)
        probs = torch.cat([network.probabilities(part).cpu() for part in pool.split(4096)])
        if Path(samples).is_dir():  # in order of name, perhaps class after class: each split is to hold all classes
            probs = probs[torch.randperm(len(probs), generator=torch.Generator().manual_seed(0))]
        result["fid"] = frechet_distance(*statistics(rows[:, :POOL]), *pool_stats)
        result["sfid"] = spatial_stats and frechet_distance(*statistics(rows[:, POOL:]), *spatial_stats)
        result["inception_score"] = inception_score(probs)
        if ref_pool is not None:
            pair = precision_recall(torch.from_numpy(np.ascontiguousarray(ref_pool)).to(device), pool)
            result["precision"], result["recall"] = pair
    return result


@torch.no_grad()
def gen(args):
    """FID, sFID, IS, precision and recall of samples against a reference, as the ADM evaluator defines them.

    The order of a folder's images, which IS depends on, is random, but always the same; that of an npz is its own.
    """
    out = result_file(args.out or f"{args.samples}.json")
    write_result(out, compare(args.samples, args.ref, args))


@torch.no_grad()
def self_check(args):
    """The ImageNet validation images against the reference batch: are this network and these files the right ones?"""
    out = result_file(args.out or f"{args.val}.self-check.json")
    result = compare(args.val, args.ref, args)
    if rank_and_world()[0]:
        return
    for name, (published, tolerance) in SELF_CHECK.items():
        ok = result.get(name) is not None and abs(result[name] - published) <= tolerance
        result[f"{name} is {published}"] = f"{'pass' if ok else 'FAIL'} (within {tolerance})"
    write_result(out, result)
    if any(str(value).startswith("FAIL") for value in result.values()):
        raise ValueError("the figures are not the published ones: other images, another crop or other weights")


@torch.no_grad()
def recon(args):
    """rFID, PSNR, SSIM, LPIPS and codebook usage of a tokenizer on held-out images."""
    device, (rank, world) = args.device, rank_and_world()
    args.size = as_size(args.size)
    make_folder(args.out)
    vq = VQModel.from_pretrained(args.vq).to(device)
    check_size(args.size, vq.config.factor)
    splits = load_images(args.data, args.size, args.val_data, bad_share=args.bad_share)
    images = dict(zip(("train", "val"), splits, strict=True))[args.split]
    network = lpips = None
    missing = {}
    for name in ("rfid", "lpips"):  # each needs weights that are fetched once, and is left out where they are not
        try:
            if name == "rfid":
                network = Inception.from_pretrained(args.inception).to(device)
            else:
                with in_turn():
                    lpips = LPIPS().to(device)
        except (FileNotFoundError, ImportError) as error:
            if name == "rfid" and args.inception:
                raise
            missing[name] = f"not measured: {error}"
            log.warning("%s is %s", name, missing[name])
    n, counts, late = len(images), *torch.zeros(2, vq.config.codebook_size, dtype=torch.long)
    with scratch() as folder:
        values = open_rows(folder / "values.npy", (n, 5))  # PSNR, SSIM, SSIM as LlamaGen, LPIPS; 1: it was read
        feats = network and [open_rows(folder / f"{name}.npy", (n, POOL)) for name in ("original", "reconstruction")]
        mine = images.subset(range(rank, n, world), of=n)
        bar = tqdm(total=len(mine), desc="images", unit="image", disable=rank > 0)
        for x, _, index in eval_batches(mine, args.size, args.batch_size):
            x, at = x.to(device), index.numpy() * world + rank
            y, codes = reconstruct(vq, x)
            counts += kernels.code_usage(codes.flatten(), len(counts)).cpu()
            last = codes[torch.from_numpy(at) >= n - -(-65536 // codes[0].numel())]  # images with the last positions
            late += kernels.code_usage(last.flatten(), len(late)).cpu()
            a, b, values[at, 4] = x / 2 + 0.5, y.to(device).float() / 255, 1
            values[at, 0], values[at, 1], values[at, 2] = psnr(a, b).cpu(), ssim(a, b).cpu(), ssim(a, b, 2.0).cpu()
            if lpips:
                values[at, 3] = [float(lpips(p, q)) for p, q in zip(x.split(1), (2 * b - 1).split(1), strict=True)]
            if network:
                feats[0][at] = network(((x + 1) * 127.5).round().clamp(0, 255))[0].cpu()
                feats[1][at] = network(y.to(device))[0].cpu()
            bar.update(len(x))
        bar.close()
        total(counts), total(late)
        read = int(total(torch.tensor(values[rank::world, 4].sum())))  # by all processes
        check_unusable(n - read, n, images.bad_share, images.source, "named above")
        if rank:
            return
        done = np.flatnonzero(values[:, 4])  # unreadable images were left out
        usage, perplexity = map(float, usage_and_perplexity(counts))
        means = values[done].mean(0, dtype=np.float64).tolist()
        result = dict(tokenizer=str(args.vq), data=images.source, images=len(done), size=args.size,
                      reference="the images themselves", psnr=means[0], ssim=means[1], ssim_as_llamagen=means[2],
                      lpips=means[3] if lpips else missing["lpips"], codes_used=usage,
                      codes_used_of_last_65536=float(usage_and_perplexity(late)[0]), perplexity=perplexity)
        if network:
            result["rfid"] = frechet_distance(*statistics(feats[1][done]), *statistics(feats[0][done]))
            result["network"] = f"{network.path.name}, sha256 {network.sha256[:12]}"
        else:
            result["rfid"] = missing["rfid"]
        order = done[values[done, 0].argsort()]
    save_extremes(args.out / "recon.png", vq, images, args.size, values[:, 0], order)
    write_result(args.out / "recon.json", result)


def save_extremes(path, vq, images, size, psnrs, order):
    """The pictures that fare worst, the median ones and the best, above their reconstructions; order: ascending."""
    device = vq.post_quant_conv.weight.device
    show = [order[:8], order[len(order) // 2 - min(4, len(order) // 2) :][:8], order[-8:]]
    pairs, names = [], []
    for title, part in zip(("worst", "median", "best"), show, strict=True):
        x = torch.cat([batch for batch, *_ in eval_batches(images.subset(part), size, 8)])
        y = reconstruct(vq, x.to(device))[0].permute(0, 2, 3, 1).cpu().numpy()
        pairs += [to_uint8(x), y]
        names += [title] * len(part) + [f"{value:.1f} dB" for value in psnrs[part]]
    columns = max(len(part) for part in show)
    save_grid(path, np.concatenate(pairs), columns, names, notice=images.notice)


@torch.no_grad()
def show_codes(args):
    """A random page of stored codes, decoded, and how often each code occurs."""
    if rank_and_world()[0]:
        return  # one page, of one process
    device, codes = args.device, CodeFile(args.codes)
    make_folder(args.out)
    vq = open_tokenizer(args.vq, codes, args.codes, device)
    counts = codes.counts()
    generator = np.random.default_rng(args.seed)
    pick = np.sort(generator.choice(len(codes), min(64, len(codes)), replace=False))
    views = generator.integers(codes.codes.shape[1], size=len(pick))
    images = decode(vq, codes.tokens(pick, views).view(-1, *codes.grid).to(device))
    save_grid(args.out / "codes.png", images, 8, codes.names(pick), notice=codes.meta["notice"])
    usage, perplexity = map(float, usage_and_perplexity(counts))
    most = counts.topk(min(5, len(counts)))
    result = dict(codes=str(args.codes), tokenizer=str(Path(args.vq or codes.meta["tokenizer"])), images=len(codes),
                  crops=codes.codes.shape[1],
                  codes_used=usage, perplexity=perplexity, never=int((counts == 0).sum()),
                  most_frequent={int(i): int(c) for i, c in zip(most.indices, most.values, strict=True)},
                  counts=counts.tolist())
    write_result(args.out / "codes.json", result, hide=("counts",))


@torch.no_grad()
def likelihood(args):
    """Teacher-forced loss of a GPT on stored codes: what they cost it, overall and per class."""
    device, codes, (rank, world) = args.device, CodeFile(args.codes), rank_and_world()
    out = result_file(args.out or f"{args.gpt}.likelihood.json")
    gpt = GPT.from_pretrained(args.gpt, grid=codes.grid).to(device)
    kind = {"t5": "text"}.get(codes.captions.kind, "tokens") if codes.captions else "class"
    if (gpt.config.vocab_size, gpt.config.cond) != (codes.codebook_size, kind):
        raise ValueError(f"{args.gpt} has {gpt.config.vocab_size} codes and reads {gpt.config.cond}; "
                         f"{args.codes} has {codes.codebook_size} and {kind}")
    if kind == "class" and gpt.config.num_classes < len(codes.class_names):
        raise ValueError(f"{args.gpt} has {gpt.config.num_classes} classes, {args.codes} {len(codes.class_names)}")
    trained_on = read_file(args.gpt).get("codes", {})
    same = ["tokenizer_sha256", "grid", "text", *(["class_names"] if kind == "class" else [])]
    codes.check(**{name: trained_on[name] for name in same if name in trained_on})
    n, classes = len(codes), len(codes.class_names)
    sums = torch.zeros(classes, 4, dtype=torch.float64)  # images, nats, right guesses, and nats squared of an image
    for start in tqdm(range(0, n, args.batch_size)[rank::world], desc="codes", unit="batch", disable=rank > 0):
        part = slice(start, start + args.batch_size)
        tokens = codes.tokens(part).to(device)
        labels = torch.from_numpy(codes.labels[part])
        cond = codes.condition(np.arange(n)[part])
        logits, _ = gpt(tokens[:, :-1], *(x.to(device) for x in cond))
        nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").double().mean(1)
        right = (logits.argmax(-1) == tokens).double().mean(1)
        sums.index_add_(0, labels, torch.stack([torch.ones_like(nats), nats, right, nats * nats], 1).cpu())
    images, nats, right, squares = (float(x) for x in total(sums).sum(0))
    nats, right = nats / images, right / images
    error = math.sqrt(max(squares / images - nats**2, 0) / max(images - 1, 1))
    per_class = {codes.class_names[i]: float(sums[i, 1] / sums[i, 0]) for i in range(classes) if sums[i, 0]}
    result = dict(gpt=str(args.gpt), codes=str(args.codes), images=int(images), nats_per_token=nats,
                  standard_error=error, bits_per_token=nats / math.log(2), perplexity=math.exp(nats), top_1=right,
                  uniform_nats=math.log(codes.codebook_size), nats_per_class=per_class)
    write_result(out, result)


def options():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    p = add_command(commands, "recon", recon, __doc__)
    p.add_argument("--vq", type=Path, required=True, help="tokenizer, ours or LlamaGen's")
    add_data_options(p)
    p.add_argument("--split", default="val", choices=["val", "train"], help="of the data")
    p.add_argument("--out", type=Path, required=True, help="folder for recon.json and recon.png")
    p = add_command(commands, "gen", gen, __doc__)
    p.add_argument("--samples", type=Path, required=True, help="npz with arr_0, or folder of images")
    p.add_argument("--ref", type=Path, required=True, help="npz with arr_0, or mu and sigma, or both; or folder")
    p.add_argument("--out", type=Path, help="JSON file (default: SAMPLES.json)")
    p = add_command(commands, "self-check", self_check, __doc__)
    p.add_argument("--val", type=Path, required=True, help="the 50,000 images at 256 pixels: npz or folder")
    p.add_argument("--ref", type=Path, required=True, help="VIRTUAL_imagenet256_labeled.npz")
    p.add_argument("--out", type=Path, help="JSON file (default: VAL.self-check.json)")
    for p in (commands.choices[name] for name in ("gen", "self-check")):
        p.add_argument("--cache", type=Path, help="folder that keeps the features")
    for p in (commands.choices[name] for name in ("recon", "gen", "self-check")):
        p.add_argument("--inception", type=Path, help="weights of the network (default: in torch hub's cache)")
    p = add_command(commands, "codes", show_codes, __doc__)
    p.add_argument("--codes", type=Path, required=True, help="split that encode.py wrote: FOLDER/train or FOLDER/val")
    p.add_argument("--vq", type=Path, help="the tokenizer (default: the file that the codes name)")
    p.add_argument("--out", type=Path, required=True, help="folder for codes.json and codes.png")
    p.add_argument("--seed", type=int, default=0, help="of the choice of images on the page")
    p = add_command(commands, "likelihood", likelihood, __doc__)
    p.add_argument("--gpt", type=Path, required=True, help="GPT, ours or LlamaGen's")
    p.add_argument("--codes", type=Path, required=True, help="split that encode.py wrote, held out: FOLDER/val")
    p.add_argument("--out", type=Path, help="JSON file (default: GPT.likelihood.json)")
    for p in (commands.choices[name] for name in ("recon", "codes", "likelihood")):
        p.add_argument("--hub", action="store_true", help=HUB_HELP)
    for p in (commands.choices[name] for name in ("recon", "likelihood")):
        p.add_argument("--batch-size", type=int, default=32, help="images at a time, per process")
    for p in commands.choices.values():
        p.add_argument("--device", default="auto", help=DEVICE_HELP)
    return parser.parse_args()


def main():
    args = options()
    with processes(args.device, timedelta(days=1), gradients=False) as (device, _, _):  # the first may have long to do
        args.device = device
        args.run(args)


if __name__ == "__main__":
    cli(main)
