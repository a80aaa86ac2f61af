"""Images -> code files for train_gpt.py: OUT/train and OUT/val, each codes.npy, labels.npy and meta.json.

With --text, their captions too: as tokens, or as features of FLAN-T5. Large sets are encoded in parts, which torchrun's
processes share; the same command goes on after an interruption, and the files are those of one process. Two runs into
one folder at once are refused.

    python encode.py --vq out/vq/vq.pt --data digits --size 32 --crops random --n-random 6 --out out/codes
    torchrun --standalone --nproc_per_node=8 -- encode.py --vq vq_ds16_c2i.pt --data imagenet --size 256 --crops ten \\
        --workers 12 --out codes  # LlamaGen's
    python encode.py --vq vq_ds16_t2i.pt --data pairs.jsonl --crops center --text t5 --t5 flan-t5-xl --out codes
"""

import argparse
import hashlib
import itertools
import json
import shutil
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from captions import CaptionFeatures, CaptionTokens, CaptionWriter, train_tokenizer, without_path
from codes import CodeFile, CodeWriter
from command_line import DEVICE_HELP, HUB_HELP, Parser, cli
from common import autocast, file_sha256, make_folder, rank_and_world, write_whole
from crops import as_size, center_crop, check_size, mirrored, ten_crops
from data import add_data_options, check_images, check_unusable, eval_batches, load_images, too_many
from distributed import alone, barrier, everyone, processes, say
from t5 import T5Encoder
from vq import VQModel

PLACES = ["centre", "top left", "top right", "bottom left", "bottom right"]  # of ten_crops
PART = 4096  # images of a part, which is what an interrupted run may lose


def options():
    parser = Parser(__doc__)
    what = parser.add_argument_group("what")
    what.add_argument("--vq", type=Path, required=True, help="tokenizer, ours or LlamaGen's")
    what.add_argument("--hub", action="store_true", help=HUB_HELP)
    add_data_options(what)
    what.add_argument("--out", type=Path, required=True, help="folder for the code files")
    crops = parser.add_argument_group("augmentations, all stored")
    crops.add_argument("--crops", choices=["center", "ten", "random"], default="ten",
                       help="ten: centre, corners and their mirrors, at each of --crop-scales")
    crops.add_argument("--crop-scales", type=float, nargs="+",
                       help="of ten: crops of SIZE pixels out of a centre crop of SCALE times SIZE (default: 1.1 1.05)")
    crops.add_argument("--n-random", type=int, help="of random: crops per image, as train_vq.py draws (default: 6)")
    crops.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                       help="store mirrored crops, too; never of digits, emoji or with --text")
    text = parser.add_argument_group("captions")
    text.add_argument("--text", choices=["none", "t5", "tokens"], default="none",
                      help="store captions, too: features of FLAN-T5, or tokens")
    text.add_argument("--t5", type=Path, help="of t5: folder of FLAN-T5 as Hugging Face has it")
    text.add_argument("--text-length", type=int, help="tokens of a caption, at most; GPTs read as many (default: 120)")
    text.add_argument("--text-model", type=Path, help="of tokens: a sentencepiece model (default: trained here)")
    text.add_argument("--text-vocab", type=int, help="tokens of the model trained here, at most (default: 8192)")
    text.add_argument("--text-pieces", choices=["unigram", "bpe", "word"], help="kind of that model (default: unigram)")
    run = parser.add_argument_group("run")
    run.add_argument("--batch-size", type=int, default=32, help="images read, and crops encoded, at a time")
    run.add_argument("--workers", type=int, default=0, help="processes that read images")
    run.add_argument("--check-data", action="store_true", help="read all images and captions, say what is there, end")
    run.add_argument("--seed", type=int, default=0, help="of random crops")
    run.add_argument("--device", default="auto", help=DEVICE_HELP)
    run.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                     help="of the encoder; bfloat16 moves some codes")
    return parser.parse_args()


def check_options(args):
    """ValueError for options that do not go together, or that no run can have; fills in those that were not given."""
    tokens = dict.fromkeys(("text_model", "text_vocab", "text_pieces"), ("text", "tokens"))
    belongs = dict(n_random=("crops", "random"), crop_scales=("crops", "ten"), t5=("text", "t5"),
                   text_length=("text", "t5", "tokens"), **tokens)
    for name, (to, *kinds) in belongs.items():
        if getattr(args, name) is not None and getattr(args, to) not in kinds:
            name, given = name.replace("_", "-"), getattr(args, to)
            raise ValueError(f"--{name} goes with --{to} {' or '.join(kinds)}, not {given}")
    if args.text_model and (args.text_vocab or args.text_pieces):
        raise ValueError("--text-vocab and --text-pieces are for a model trained here: leave them out, or --text-model")
    if args.text == "t5" and not args.t5:
        raise ValueError("--text t5 needs the encoder's folder: give it with --t5")
    for name, value in dict(n_random=6, crop_scales=[1.1, 1.05], text_length=120).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.text_length < 2 or args.n_random > 1000:
        raise ValueError("--text-length has to be above 1, --n-random at most 1000")
    if not all(1 <= scale <= 10 for scale in args.crop_scales):
        raise ValueError(f"--crop-scales have to be in [1, 10], not {args.crop_scales}")


def choose_crops(args, flip):
    """What Views takes as `crop`, and a name for each augmentation it gives."""
    if args.crops == "random":
        return args.n_random, [f"random {i}" for i in range(args.n_random)]
    if args.crops == "center":
        names = ["centre"] + (["centre, mirrored"] if flip else [])
        return (mirrored if flip else center_crop), names
    each = PLACES + ([f"{place}, mirrored" for place in PLACES] if flip else [])
    names = [f"{c} of {scale}" for scale in args.crop_scales for c in each]
    return partial(ten_crops, scales=args.crop_scales, n=len(each)), names


def caption_reader(args, splits, device):
    """What turns captions into rows, or None."""
    if args.text == "none":
        return None
    if args.text == "t5":
        return CaptionFeatures(T5Encoder.from_pretrained(args.t5, device), args.text_length, args.t5)
    if args.text_model:
        return CaptionTokens(args.text_model.read_bytes(), args.text_length, args.text_model)
    model = None
    if rank_and_world()[0] == 0:
        captions = splits["train"].captions
        every = -(-sum(map(len, captions)) // 1_000_000)  # beyond a million the trainer would draw, each time others
        captions = itertools.islice((caption for texts in captions for caption in texts), 0, None, every)
        model = train_tokenizer(captions, args.text_vocab or 8192, args.text_pieces or "unigram")
    return CaptionTokens(everyone(model)[0], args.text_length)


def pictures_sha256(image_set):
    """Hexadecimal SHA-256 of what a set is known by: names, labels and captions, in order."""
    digest = hashlib.sha256()
    for i, name in enumerate(image_set.names):
        texts = image_set.captions and image_set.captions[i]
        digest.update(repr((name, int(image_set.labels[i]), texts)).encode())
    return digest.hexdigest()


def written(folder, meta):
    """How many images a whole part of a split has, or None; ValueError where it was encoded with other settings."""
    if not (folder / "meta.json").is_file():
        return None
    found, wanted = ({**m, **m["part"], "part": None, "text": without_path(m["text"])}
                     for m in (json.loads((folder / "meta.json").read_text()), meta))
    for name, value in wanted.items():
        if found.get(name) != value:
            before, now = (str(v)[:60] for v in (found.get(name), value))
            raise ValueError(f"{folder.parent} was begun with another {name} ({before}, now {now}): go on with that, "
                             "or delete the folder")
    return found["images"]


def check_lost(lost, image_set):
    check_unusable(lost, len(image_set), image_set.bad_share, image_set.source, "--check-data names them")


def encode_images(vq, image_set, indices, crop, folder, meta, args, device, reader, bar):
    """Write codes and captions of some images to a folder; returns how many could be read."""
    size, n_aug = tuple(meta["image_size"]), len(meta["augmentations"])
    grid = [side // vq.config.factor for side in size]
    texts = CaptionWriter(folder, reader) if reader else nullcontext()
    with CodeWriter(folder, grid, vq.config.codebook_size, meta) as writer, texts:
        for images, labels, kept in eval_batches(image_set, size, args.batch_size, crop=crop, workers=args.workers,
                                                 seed=args.seed, indices=indices):
            images = images.view(-1, *images.shape[-3:]).to(device, non_blocking=True)  # b * n_aug, 3, H, W
            with autocast(device, args.dtype):
                codes = torch.cat([vq.encode(part) for part in images.split(args.batch_size)])
            writer.write(codes.view(len(labels), n_aug, -1), labels)
            if reader:
                texts.write([image_set.captions[i] for i in kept])
            bar.update()
    return writer.meta["images"]


def encode_split(vq, split, image_set, args, size, device, tokenizer_sha256, reader):
    """Write OUT/split or, where it has several parts, this process's share of those that are not there yet, to
    OUT/split.parts. Returns the folders of all.
    """
    (rank, world), image_set.flip = rank_and_world(), image_set.flip and args.flip
    crop, names = choose_crops(args, image_set.flip)
    meta = dict(
        tokenizer=str(args.vq), tokenizer_sha256=tokenizer_sha256,
        image_size=[size, size] if isinstance(size, int) else list(size), augmentations=names,
        class_names=image_set.class_names, data=str(args.data), split=split, notice=image_set.notice,
        dtype=args.dtype, seed=args.seed, text=reader and reader.about(),
    )
    step = max(1, PART // args.batch_size) * args.batch_size  # whole batches, the same in parts as without
    parts = [range(first, min(first + step, len(image_set))) for first in range(0, max(1, len(image_set)), step)]
    folders, there = [args.out / split], [None]
    if len(parts) > 1:
        folders = [args.out / f"{split}.parts" / f"{i:05}" for i in range(len(parts))]
        meta["part"] = dict(batch_size=args.batch_size, part_size=step, flip=image_set.flip,
                            pictures_sha256=pictures_sha256(image_set))
        there = everyone([written(folder, meta) for folder in folders])[0]  # of process 0: others may be late
    lost = sum(len(part) - n for part, n in zip(parts, there, strict=True) if n is not None)
    if too_many(lost, len(image_set), image_set.bad_share):  # the run before ended by it: mended since, perhaps
        there, lost = [n if n == len(part) else None for part, n in zip(parts, there, strict=True)], 0
    if whole := sum(n is not None for n in there):
        say(f"{split}: {whole} of {len(parts)} parts are there")
    mine = [i for i, n in enumerate(there) if n is None][rank::world]
    batches = sum(-(-len(parts[i]) // args.batch_size) for i in mine)
    with tqdm(desc=split, total=batches, unit="batch", disable=rank > 0) as bar:
        for i in mine:
            n = encode_images(vq, image_set, parts[i], crop, folders[i], meta, args, device, reader, bar)
            lost += len(parts[i]) - n
            check_lost(lost, image_set)
    return folders


def join(folder, parts, image_set, reader):
    """Make the whole folder of its parts; returns the number of images."""
    metas = [json.loads((part / "meta.json").read_text()) for part in parts]
    n = sum(meta["images"] for meta in metas)
    if parts == [folder]:
        return n
    check_lost(len(image_set) - n, image_set)
    meta = {key: value for key, value in metas[0].items() if key != "part"}
    texts = CaptionWriter(folder, reader) if reader else nullcontext()
    with CodeWriter(folder, meta["grid"], meta["codebook_size"], meta) as writer, texts:
        for part, of_part in zip(tqdm(parts, desc=f"{folder}", unit="part"), metas, strict=True):
            if of_part["images"]:
                file = CodeFile(part)
                writer.write(file.codes, file.labels)
                if reader:
                    texts.take(file.captions)
    return n


def remove_parts(out):
    """What both splits were joined from; the first process does it."""
    for folder in (out / "train.parts", out / "val.parts"):
        if rank_and_world()[0] == 0 and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def run(vq, args, size, device):
    """What main() does in each process; the first joins what all have written."""
    result = args.out / "result.json"  # written last: all is there
    if result.exists() and all((args.out / split / "meta.json").exists() for split in ("train", "val")):
        remove_parts(args.out)  # a killed run may have left some
        raise ValueError(f"{args.out} holds finished codes: remove train, val and result.json in it to encode again")
    if result.exists():
        raise ValueError(f"{result} is there, and no codes are beside it: give another --out")
    start, text = time.perf_counter(), args.text != "none"
    splits = load_images(args.data, size, args.val_data, text, args.bad_share)
    splits = dict(zip(("train", "val"), splits, strict=True))
    sha, reader = file_sha256(args.vq), caption_reader(args, splits, device)
    folders = {split: encode_split(vq, split, image_set, args, size, device, sha, reader)
               for split, image_set in splits.items()}
    barrier()  # all parts are written
    if rank_and_world()[0] > 0:
        return
    images = {split: join(args.out / split, folders[split], splits[split], reader) for split in splits}
    seconds = time.perf_counter() - start
    write_whole(result, json.dumps(dict(seconds=seconds, images=images), indent=1))
    remove_parts(args.out)
    print(f"{images['train']} images to train on and {images['val']} held out in {seconds:.1f} s: {args.out}")


def main():
    args = options()
    size = as_size(args.size)
    check_options(args)
    if args.check_data:
        return check_images(args.data, size, args.val_data, args.text != "none", args.bad_share, args.workers)
    with processes(args.device, timedelta(days=9), gradients=False) as (device, rank, _):  # to wait for slower ones
        vq = VQModel.from_pretrained(args.vq).to(device)
        check_size(size, vq.config.factor)
        with alone(make_folder(args.out), rank):
            run(vq, args, size, device)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    cli(main)
