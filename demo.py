"""Score the demos' models: does a classifier of real digits read in a picture what it was asked for?

    python demo.py digits --vq out/demo/vq/vq.pt --gpt out/demo/gpt/gpt.pt --codes out/demo/codes --out out/demo
    python demo.py text --vq out/text/vq/vq.pt --gpt out/text/gpt/gpt.pt --codes out/text/codes --out out/text

Each writes report.json and samples.png, `digits` also how.png, which shows what codes are.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.svm import SVC

from builtin_sets import COLOURS, GROUNDS, SPLITS, digits_text
from captions import open_reader
from codes import CodeFile
from command_line import DEVICE_HELP, Parser, add_command, cli
from common import label_font, make_folder, pick_device, save_grid, to_uint8
from crops import center_crop, to_tensor
from data import load_images
from metrics import reconstruct
from sample import load_models, read_captions, sample_images
from vq import usage_and_perplexity

# Guidance and top-k that `digits` tries on one seed before it reports the best on another.
CANDIDATES = [dict(cfg_scale=s, top_k=k) for s in (1.0, 1.5, 2.0, 3.0) for k in (0, 50)]
GUIDANCE = (1.0, 1.5, 2.0, 3.0)  # of `text`: all are reported


def as_pixels(image_set):
    """Every image of a digits set -> float32 [N, 3, 32, 32] in [-1, 1]."""
    return torch.stack([to_tensor(center_crop(image, 32)) for image in image_set.images])


def shrink(images):
    """[N, H, W, ...] in 0..255 -> float32 [N, F] in 0..1: means of 4 x 4 pixels, as digits were before enlargement."""
    n, h, w = images.shape[:3]
    return images.reshape(n, h // 4, 4, w // 4, 4, -1).mean((2, 4), dtype=np.float32).reshape(n, -1) / 255


def grey(images):
    """uint8 [N, 32, 32, 3] -> float32 [N, 64]: the 8 x 8 grey levels in [0, 1] that scikit-learn's digits have."""
    return shrink(images.mean(-1, dtype=np.float32))


def classifier():
    """A support vector machine that reads the training digits' grey levels."""
    train_set = load_images("digits", 32)[0]
    return SVC(C=10.0, gamma="scale").fit(grey(to_uint8(as_pixels(train_set))), train_set.labels)


def nearest_distance(a, b):
    """For each row of a [N, F] the root-mean-square distance to the nearest row of b [M, F]."""
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).min(1).values.numpy() / a.shape[1] ** 0.5


def copying(samples, train, held_out, sample_codes, train_codes, held_out_codes):
    """Are samples closer to training digits than real held-out digits are? And do they repeat stored codes whole?"""
    stored = {row.tobytes() for row in train_codes}
    same = {}
    for name, rows in (("sample", sample_codes), ("held_out", held_out_codes)):
        same[name] = float(np.mean([row.tobytes() in stored for row in rows]))
    to_train, real_to_train = nearest_distance(samples, train), nearest_distance(held_out, train)
    return {
        "sample_to_train": float(np.median(to_train)),
        "held_out_to_train": float(np.median(real_to_train)),
        "sample_closer_than_closest_percent_of_held_out": float((to_train < np.quantile(real_to_train, 0.01)).mean()),
        "sample_codes_in_train": same["sample"],
        "held_out_codes_in_train": same["held_out"],
    }


def stages(args, start):
    """Seconds of every stage, losses and held-out PSNR, from the folders that the scripts made."""
    folders = dict(tokenizer=args.vq.parent, encode=args.codes, gpt=args.gpt.parent)
    results = {name: json.loads((folder / "result.json").read_text()) for name, folder in folders.items()}
    seconds = {name: round(result["seconds"], 1) for name, result in results.items()}
    seconds["sample and score"] = round(time.perf_counter() - start, 1)
    losses = {name: results["gpt"][name] for name in ("train_loss", "val_loss")}
    psnr = results["tokenizer"]["val_psnr"]
    return dict(seconds=dict(seconds, total=round(sum(seconds.values()), 1)), **losses, psnr=psnr)


def write_numbers(codes, cell):
    """Codes [h, w] as a picture of them, uint8 [h * cell, w * cell, 3]."""
    h, w = codes.shape
    sheet, font = Image.new("RGB", (w * cell, h * cell), "white"), label_font(12)
    draw = ImageDraw.Draw(sheet)
    for i, code in enumerate(codes.flatten().tolist()):
        x, y = i % w * cell, i // w * cell
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline="lightgrey")
        draw.text((x + cell / 2, y + cell / 2), f"{code}", fill="black", font=font, anchor="mm")
    return np.asarray(sheet)


@torch.no_grad()
def explain(path, vq, real, generated):
    """Two images [2, 3, H, W], their codes and what these decode to; a generated one [H, W, 3], uncovered in steps."""
    codes, zoom = vq.encode(real), 4
    (h, w), cell = codes.shape[1:], zoom * vq.config.factor
    pixels, decoded = (to_uint8(x).repeat(zoom, 1).repeat(zoom, 2) for x in (real, vq.decode(codes)))
    tiles = [tile for i in range(2) for tile in (pixels[i], write_numbers(codes[i], cell), decoded[i])]
    steps = [h * w * i // 6 for i in range(1, 7)]
    for n in steps:
        drawn = (np.arange(h * w).reshape(h, w) < n).repeat(cell, 0).repeat(cell, 1)
        tiles.append(np.where(drawn[..., None], generated.repeat(zoom, 0).repeat(zoom, 1), np.uint8(200)))
    labels = 2 * ["held-out image", "its codes", "decoded"] + [f"{n} codes drawn" for n in steps]
    save_grid(path, np.stack(tiles), len(steps), labels, scale=1)


def digits(args):
    """The report of `make demo`: PSNR, codebook usage, losses, and what a classifier reads in generated digits."""
    start, device = time.perf_counter(), pick_device(args.device)
    make_folder(args.out)
    vq, gpt, _ = load_models(args.vq, args.gpt, None, device)
    codes, val_codes = CodeFile(args.codes / "train"), CodeFile(args.codes / "val")
    train_set, val_set = load_images("digits", 32)
    train, val = as_pixels(train_set), as_pixels(val_set)
    usage, perplexity = map(float, usage_and_perplexity(codes.counts()))

    train_grey, val_grey = grey(to_uint8(train)), grey(to_uint8(val))
    judge = classifier()
    labels = np.arange(args.n) % 10

    def sample_and_read(seed, settings):
        cond = torch.from_numpy(labels).to(device)
        images, generated = sample_images(vq, gpt, cond, batch_size=500, seed=seed, **settings)
        return float((judge.predict(grey(images)) == labels).mean()), images, generated

    tried = {json.dumps(s): sample_and_read(args.choose_seed, s)[0] for s in CANDIDATES}
    chosen = json.loads(max(tried, key=tried.get))
    accuracy, images, generated = sample_and_read(args.seed, chosen)
    save_grid(args.out / "samples.png", images[:100], 10, [f"{i}" for i in labels[:100]], scale=2)
    explain(args.out / "how.png", vq, val[[13, 25]].to(device), images[13 % args.n])

    report = dict(
        **stages(args, start), codebook_usage=usage, perplexity=perplexity,
        sample_accuracy=accuracy, real_accuracy=float(judge.score(val_grey, val_set.labels)),
        sampling=dict(chosen, seed=args.seed, samples=args.n), tried_on_seed={str(args.choose_seed): tried},
        copying=copying(grey(images), train_grey, val_grey, generated.flatten(1).cpu().numpy().astype(np.uint16),
                        codes.codes[:].reshape(-1, codes.codes.shape[2]), val_codes.codes[:, 0]),
    )
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print_digits(report, args)


def print_digits(report, args):
    c, s = report["copying"], report["sampling"]
    rows = [
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())),
        ("held-out PSNR", f"{report['psnr']:.2f} dB"),
        ("codes used", f"{report['codebook_usage']:.1%}, perplexity {report['perplexity']:.0f}"),
        ("GPT loss", f"{report['train_loss']:.3f} training, {report['val_loss']:.3f} held out (nats per code)"),
        ("generated digits read right", f"{report['sample_accuracy']:.1%} of {s['samples']} (cfg {s['cfg_scale']}, "
                                        f"top-k {s['top_k']}; settings chosen on another seed)"),
        ("real digits read right", f"{report['real_accuracy']:.1%} of the held-out ones, by the same classifier"),
        ("nearest training digit", f"{c['sample_to_train']:.3f} from generated, {c['held_out_to_train']:.3f} from held-"
                                   "out digits (RMS grey level)"),
        ("code for code in training", f"{c['sample_codes_in_train']:.1%} of generated, "
                                      f"{c['held_out_codes_in_train']:.1%} of held-out digits"),
    ]
    print("\n".join(f"{name:28}{value}" for name, value in rows))
    pictures = [args.out / "samples.png", args.out / "how.png"]
    pictures += [args.vq.parent / "reconstructions.png", args.gpt.parent / "samples.png"]
    print(f"{'pictures':28}{', '.join(map(str, pictures))}")


# Two digits and their colours


def read_pictures(images, judge):
    """uint8 [N, 32, 64, 3] -> int64 [N, 5] as digits_text() says what they show (digits, colours, ground), and the ink
    float32 [N, 2, 64] of both digits as scikit-learn has them, 8 x 8 levels in 0..1.

    The ground is the named one nearest to the median of each half's outer columns, where digits seldom reach; the
    colour is the one that explains the pixels best as ground + ink * (colour - ground), ink in 0..1; the digit is what
    the classifier reads in that ink.
    """
    colours, grounds = (np.array(list(c.values()), np.float32) for c in (COLOURS, GROUNDS))
    sides = images.reshape(-1, 32, 2, 32, 3).transpose(2, 0, 1, 3, 4).astype(np.float32)  # 2, N, 32, 32, 3
    margin = sides[..., [0, 1, 30, 31], :].transpose(1, 0, 2, 3, 4).reshape(len(images), -1, 3)
    truth = np.zeros((len(images), 5), np.int64)
    truth[:, 4] = np.square(np.median(margin, 1)[:, None] - grounds).sum(-1).argmin(1)
    ink = np.zeros((len(images), 2, 64), np.float32)
    ground = grounds[truth[:, 4], None, None]  # N, 1, 1, 3
    for side, x in enumerate(sides):
        inks, errors = [], []
        for colour in colours:
            way = colour - ground
            share = ((x - ground) * way).sum(-1) / np.square(way).sum(-1)
            inks.append(share.clip(0, 1))  # N, 32, 32
            errors.append(np.square(x - ground - inks[-1][..., None] * way).sum((1, 2, 3)))
        truth[:, 2 + side] = np.argmin(errors, 0)
        ink[:, side] = shrink(255 * np.stack(inks)[truth[:, 2 + side], np.arange(len(images))])
        truth[:, side] = judge.predict(ink[:, side])
    return truth, ink


def score(read, truth):
    """Shares in which each digit, each colour, the ground, the order and all of it are right, of [N, 5] each.

    The order is right where what was read fits the caption better than its mirror image does.
    """
    right, mirrored = read == truth, read[:, [1, 0, 3, 2, 4]] == truth
    same = (truth[:, 0] == truth[:, 1]) & (truth[:, 2] == truth[:, 3])
    order = (right.sum(1) > mirrored.sum(1)) | same
    shares = dict(digits=right[:, :2], colours=right[:, 2:4], ground=right[:, 4], order=order, all=right.all(1))
    return {name: float(share.mean()) for name, share in shares.items()}


def halves(codes):
    """Codes [..., 4 * 8] of two digits -> [N, 4 * 4] of each, left and right."""
    return np.ascontiguousarray(codes.reshape(-1, 4, 2, 4).swapaxes(1, 2)).reshape(-1, 16).astype(np.uint16)


def text(args):
    """The report of `make demo-text`: how often pictures show what their captions say, for captions never seen, too."""
    start, device = time.perf_counter(), pick_device(args.device)
    make_folder(args.out)
    vq, gpt, codes_meta = load_models(args.vq, args.gpt, None, device)
    codes, val_codes = CodeFile(args.codes / "train"), CodeFile(args.codes / "val")
    if codes.meta["data"] != "digits-text":
        raise ValueError(f"{args.codes} holds codes of {codes.meta['data']}, not of digits-text")
    reader, judge = open_reader(gpt.config.cond, codes_meta.get("text"), args.t5, device, args.gpt), classifier()
    report, shown, captions = dict(samples=args.n, seed=args.seed, real={}, reconstructed={}, generated={}), [], []
    seen = {}  # ink of the pictures of seen combinations, for the question of copying
    for split in ("train", *SPLITS[2:]):
        real, truth = digits_text(split, args.n, args.seed)
        pixels = np.stack([np.asarray(image) for image in real["images"]])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        again = torch.cat([reconstruct(vq, part.to(device))[0] for part in x.split(64)]).permute(0, 2, 3, 1).numpy()
        for name, images in (("real", pixels), ("reconstructed", again)):
            read, ink = read_pictures(images, judge)
            report[name][split] = score(read, truth)
            seen[name, split] = ink.reshape(-1, 64)
        if split == "train":
            continue
        texts = [texts[0] for texts in real["captions"]]
        cond = read_captions(gpt, reader, texts)
        for scale in GUIDANCE:
            images, generated = sample_images(vq, gpt, *cond, batch_size=args.n, seed=args.seed, cfg_scale=scale)
            read, ink = read_pictures(images, judge)
            report["generated"].setdefault(f"{scale}", {})[split] = score(read, truth)
            if scale == args.cfg_scale:
                shown.append(images[:6])
                captions += texts[:6]
            if scale == args.cfg_scale and split == "seen":
                shuffled = np.random.default_rng(0).permutation(args.n)
                report["captions_shuffled"] = score(read, truth[shuffled])
                seen["generated"] = ink.reshape(-1, 64), halves(generated.cpu().numpy())
    train = grey(to_uint8(as_pixels(load_images("digits", 32)[0])))
    report["copying"] = copying(seen["generated"][0], train, seen["real", "seen"], seen["generated"][1],
                                halves(codes.codes[:]), halves(val_codes.codes[:]))
    # What copies would score: training digits that went through the tokenizer.
    report["copying"]["copies_to_train"] = float(np.median(nearest_distance(seen["reconstructed", "train"], train)))
    save_grid(args.out / "samples.png", np.concatenate(shown), 6, captions, scale=3)
    report.update(cfg_scale=args.cfg_scale, **stages(args, start))
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print_text(report, args)


def print_text(report, args):
    chosen, c = report["generated"][f"{args.cfg_scale}"], report["copying"]

    def line(title, row, name="all"):
        cells = (f"{100 * row[split][name]:>17.1f}" if split in row else " " * 17 for split in report["real"])
        print(f"{title:26}" + "".join(cells))

    print(f"{'% right':26}" + "".join(f"{split:>17}" for split in report["real"]))
    line("all, real pictures", report["real"])
    line("all, reconstructions", report["reconstructed"])
    for scale, row in report["generated"].items():
        line(f"all, generated, guidance {scale}", row)
    for name in ("digits", "colours", "ground", "order"):
        line(f"{name}, guidance {args.cfg_scale}", chosen, name)
    print(f"captions shuffled: {report['captions_shuffled']['all']:.1%} all right")
    print(f"nearest training digit, RMS level: {c['sample_to_train']:.3f} from generated, {c['held_out_to_train']:.3f} "
          f"from real, {c['copies_to_train']:.3f} from copies; same codes as one: {c['sample_codes_in_train']:.1%}, "
          f"{c['held_out_codes_in_train']:.1%} of real")
    print(", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items()))
    print(f"pictures: {args.out / 'samples.png'}, {args.gpt.parent / 'samples.png'}")


def options():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for run in (digits, text):
        p = add_command(commands, run.__name__, run, __doc__)
        p.add_argument("--vq", type=Path, required=True, help="tokenizer, in the folder that train_vq.py made")
        p.add_argument("--gpt", type=Path, required=True, help="GPT, in the folder that train_gpt.py made")
        p.add_argument("--codes", type=Path, required=True, help="folder that encode.py made")
        p.add_argument("--out", type=Path, required=True, help="folder for report.json and the pictures")
        p.add_argument("--seed", type=int, default=0, help="of what is reported")
        p.add_argument("--device", default="auto", help=DEVICE_HELP)
    p = commands.choices["digits"]
    p.add_argument("--n", type=int, default=500, help="digits to generate, classes in turn")
    p.add_argument("--choose-seed", type=int, default=1, help="of the digits on which the sampling settings are chosen")
    p = commands.choices["text"]
    p.add_argument("--n", type=int, default=320, help="prompts of each kind")
    p.add_argument("--cfg-scale", type=float, default=2.0, choices=GUIDANCE, help="guidance of details and pictures")
    p.add_argument("--t5", type=Path, help="folder of the encoder, for GPTs that read its features, if it has moved")
    return parser.parse_args()


def main():
    args = options()
    args.run(args)


if __name__ == "__main__":
    cli(main)
