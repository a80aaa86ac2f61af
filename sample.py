"""Paint with a trained GPT: guided sampling of codes, the tokenizer's decoder, a labelled grid.

    python sample.py --vq out/demo/vq/vq.pt --gpt out/demo/gpt/gpt.pt --cfg-scale 2 --top-k 50 --out samples.png
    python sample.py --vq vq_ds16_c2i.pt --gpt c2i_B_256.pt --grid 16x16 --classes 207,360,387 --n 12 --cfg-scale 4
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli, evaluating, pick_device, read_file, save_grid, to_uint8
from encode import file_sha256
from gpt import GPT
from vq import VQModel


def guide(logits, cfg_scale):
    """Stacked [conditional; unconditional] logits [2B, V] -> uncond + s (cond - uncond), [B, V] (Ho & Salimans)."""
    cond, uncond = logits.chunk(2)
    return uncond + cfg_scale * (cond - uncond)


def keep_probable(logits, top_k=0, top_p=1.0):
    """Probabilities [B, V] of the codes that top-k and then top-p keep, zero elsewhere; rows sum to one.

    top-k keeps the k largest logits (0: all), top-p the smallest set of codes whose mass reaches p, at least one;
    codes that tie with the last one kept are kept as well.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1.0:
        ordered = p.sort(dim=-1, descending=True).values
        reached = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        p = p.masked_fill(p < ordered.gather(-1, reached), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, uniform):
    """Invert the cumulative distribution: p [B, V], uniform [B] in [0, 1) -> int64 [B], never a code of mass zero."""
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def uniforms(seed, first_index, batch, length):
    """float32 [batch, length] in [0, 1): row i is a stream of its own, of (seed, first_index + i)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, first_index + i])) for i in range(batch)]
    return torch.from_numpy(np.stack([row.random(length, dtype=np.float32) for row in rows]))


def check_request(model, cond, grid, cfg_scale, cfg_stop, temperature, top_k, top_p, greedy):
    """One sentence for everything that cannot be sampled."""
    if grid != model.config.grid:
        raise ValueError(f"the model paints {model.config.grid}, not {grid}: load it, or set_grid, for another grid")
    if not greedy and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature has to be above 0, not {temperature} (greedy=True takes the likeliest code)")
    if top_k < 0:
        raise ValueError(f"top_k has to be 0 (all codes) or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p has to be in (0, 1], not {top_p}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale has to be a finite number, not {cfg_scale}")
    if cfg_stop < -1:
        raise ValueError(f"cfg_stop has to be -1 (guide every code) or a number of codes, not {cfg_stop}")
    if len(cond) == 0:
        raise ValueError("there is no condition to paint: cond is empty")
    null = model.config.num_classes
    if model.config.cond == "class" and not 0 <= int(cond.min()) <= int(cond.max()) <= null:
        raise ValueError(f"labels have to be in 0..{null} ({null}: no class), not {cond.tolist()}")


@torch.no_grad()
def generate(
    model, cond, cond_mask=None, grid=None, cfg_scale=1.0, cfg_stop=-1, temperature=1.0, top_k=0, top_p=1.0,
    greedy=False, seed=0, first_index=0, progress=False,
):  # fmt: skip
    """Draw codes int64 [B, h, w] in raster order.

    cond is int64 [B] labels, or features [B, n_cond, text_dim] with cond_mask bool [B, n_cond]. Guidance runs
    conditional and unconditional rows in one batch; cfg_scale 1 is none, and cfg_stop = n guides the first n codes only
    and drops the unconditional rows after them. Image i depends on (seed, first_index + i), not on its neighbours.
    Raises ValueError for settings that cannot be.
    """
    grid = tuple(grid or model.config.grid)
    check_request(model, cond, grid, cfg_scale, cfg_stop, temperature, top_k, top_p, greedy)
    batch, length = len(cond), grid[0] * grid[1]
    guided = length if cfg_stop < 0 else min(cfg_stop, length)  # codes drawn with guidance
    guided = 0 if cfg_scale == 1.0 else guided
    if guided:
        cond = torch.cat([cond, model.cls_embedding.null(cond)])
        cond_mask = None if cond_mask is None else cond_mask.repeat(2, 1)  # "no text" hides the same positions
    codes = torch.empty(batch, length, dtype=torch.long, device=model.output.weight.device)
    noise = None if greedy else uniforms(seed, first_index, batch, length).to(codes.device)
    with evaluating(model):
        cache = model.new_cache(len(cond))
        logits, hidden = model.prefill(cond, cond_mask, cache)
        for i in tqdm(range(length), desc="codes", disable=not progress):
            logits = guide(logits, cfg_scale) if i < guided else logits[:batch]
            if greedy:
                codes[:, i] = logits.argmax(-1)
            else:
                codes[:, i] = draw(keep_probable(logits / temperature, top_k, top_p), noise[:, i])
            if i + 1 == guided:  # from the next code on, the conditional rows go on alone
                cache.keep(batch)
                hidden = None if hidden is None else hidden[:batch]
            if i + 1 < length:
                fed = codes[:, i].repeat(2) if i + 1 < guided else codes[:, i]
                logits = model.step(fed, i, hidden, cache)
    return codes.view(batch, *grid)


@torch.no_grad()
def paint(vq, model, labels, batch_size=64, progress=False, seed=0, **settings):
    """labels int64 [N] -> uint8 images [N, H, W, 3] and codes [N, h, w], in batches; settings as for generate()."""
    images, codes = [], []
    for start in tqdm(range(0, len(labels), batch_size), desc="images", unit="batch", disable=not progress):
        part = generate(model, labels[start : start + batch_size], seed=seed, first_index=start, **settings)
        codes.append(part)
        images.append(to_uint8(vq.decode(part)))
    return np.concatenate(images), torch.cat(codes)


def parse_classes(text, class_names, num_classes):
    """"3,7,tabby" -> labels; ValueError for one that is neither a number in range nor a name."""
    labels = []
    for word in text.split(","):
        word = word.strip()
        if word in class_names:
            labels.append(class_names.index(word))
        elif word.isdecimal() and int(word) < num_classes:
            labels.append(int(word))
        else:
            raise ValueError(f"--classes: {word!r} is neither a class name nor a number below {num_classes}")
    return labels


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--vq", type=Path, required=True, help="tokenizer, ours or LlamaGen's")
    what.add_argument("--gpt", type=Path, required=True, help="GPT, ours or LlamaGen's")
    what.add_argument("--grid", help="ROWSxCOLUMNS of codes, for LlamaGen's files: 16x16 at 256 pixels, 24x24 at 384")
    what.add_argument("--classes", help="numbers or names, by commas (default: all in turn)")
    what.add_argument("--n", type=int, help="images (default: one per class given, or eight per class, at most 80)")
    how = parser.add_argument_group("how")
    how.add_argument("--cfg-scale", type=float, default=2.0, help="guidance (1: none)")
    how.add_argument("--cfg-stop", type=int, default=-1, help="codes that are guided (-1: all)")
    how.add_argument("--temperature", type=float, default=1.0)
    how.add_argument("--top-k", type=int, default=0, help="codes kept (0: all)")
    how.add_argument("--top-p", type=float, default=1.0, help="mass kept, after top-k")
    how.add_argument("--greedy", action="store_true", help="take the likeliest code each time")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--batch-size", type=int, default=64, help="images at a time")
    how.add_argument("--device", default="auto")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid")
    out.add_argument("--columns", type=int, help="images per row of the grid (default: one row per class, or 8)")
    return parser.parse_args()


def load_models(vq_path, gpt_path, grid, device):
    """Both models on `device`, and what the GPT's file says of its codes ({} if nothing).

    Raises ValueError where the GPT was trained on another tokenizer's codes.
    """
    vq, gpt = VQModel.from_pretrained(vq_path), GPT.from_pretrained(gpt_path, grid=grid)
    codes = read_file(gpt_path).get("codes", {})  # what encode.py said of the codes that this GPT was trained on
    if codes and codes["tokenizer_sha256"] != file_sha256(vq_path):
        raise ValueError(f"{gpt_path} was trained on codes of {codes['tokenizer']}, and {vq_path} is another tokenizer")
    if gpt.config.vocab_size != vq.config.codebook_size:
        raise ValueError(f"{gpt_path} knows {gpt.config.vocab_size} codes, {vq_path} has {vq.config.codebook_size}")
    return vq.to(device), gpt.to(device), codes


def main():
    args = options()
    device = pick_device(args.device)
    grid = None
    if args.grid:
        if not all(part.isdecimal() for part in args.grid.split("x")) or args.grid.count("x") != 1:
            raise ValueError(f"--grid has to be ROWSxCOLUMNS, such as 16x16, not {args.grid!r}")
        grid = tuple(int(part) for part in args.grid.split("x"))
    vq, gpt, codes = load_models(args.vq, args.gpt, grid, device)
    names = codes.get("class_names", [])
    if gpt.config.cond != "class":
        raise ValueError(f"{args.gpt} wants text; this command takes classes")
    classes = list(range(gpt.config.num_classes))
    if args.classes:
        classes = parse_classes(args.classes, names, gpt.config.num_classes)
    n = args.n if args.n is not None else len(classes) if args.classes else min(8 * len(classes), 80)
    if min(n, args.batch_size, 1 if args.columns is None else args.columns) < 1:
        raise ValueError("--n, --batch-size and --columns have to be above 0")
    labels = torch.tensor(classes)[torch.arange(n) * len(classes) // max(n, len(classes))]  # the classes in turn
    start = time.perf_counter()
    images, _ = paint(
        vq, gpt, labels.to(device), args.batch_size, progress=True, seed=args.seed, cfg_scale=args.cfg_scale,
        cfg_stop=args.cfg_stop, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, greedy=args.greedy,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    per_class = n // len(classes)
    columns = args.columns or (per_class if n % len(classes) == 0 and 1 < per_class <= 16 else min(n, 8))
    captions = [names[i] if names else i for i in labels.tolist()]
    save_grid(args.out, images, columns, captions, notice=codes.get("notice", ""))
    print(f"{n} images in {seconds:.1f} s ({n / seconds:.1f} images/s): {args.out}")


if __name__ == "__main__":
    cli(main)
