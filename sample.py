"""Sample from a trained GPT: guided sampling of codes, the tokenizer's decoder, a grid, PNGs or an npz.

    python sample.py --vq out/demo/vq/vq.pt --gpt out/demo/gpt/gpt.pt --cfg-scale 2 --top-k 50 --out samples.png
    python sample.py --vq vq_ds16_c2i.pt --gpt c2i_B_256.pt --grid 16x16 --classes otter,207 --n 12 --cfg-scale 4
    python sample.py --vq vq_ds16_t2i.pt --gpt t2i_XL_stage1_256.pt --t5 flan-t5-xl --grid 16x16 --cfg-scale 7.5 \\
        --text "a red fox in the snow"
    torchrun --standalone --nproc_per_node=8 -- sample.py --vq vq_ds16_c2i.pt --gpt c2i_L_384.pt --grid 24x24 \\
        --n 50000 --cfg-scale 2 --size 256 --npz samples.npz    # continues after an interruption
"""

import functools
import hashlib
import json
import math
import shutil
import tempfile
import time
import weakref
import zipfile
from datetime import timedelta
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import kernels
from captions import condition, open_reader
from command_line import DEVICE_HELP, HUB_HELP, Parser, cli
from common import (
    evaluating,
    file_sha256,
    make_folder,
    nearest,
    pick_dtype,
    rank_and_world,
    read_file,
    save_grid,
    save_picture,
    to_uint8,
    whole_characters,
    write_whole,
    writing,
)
from data import EXTENSIONS
from distributed import barrier, processes, total
from gpt import GPT
from kernels.sampling import check_settings
from losses import import_torchvision
from t5 import clean_caption
from vq import VQModel

# Codes


def uniforms(seed, first_index, batch, length):
    """float32 [batch, length] in [0, 1): row i is a stream of its own, of (seed, first_index + i)."""
    keys = (np.array([seed, first_index + i], np.uint64) for i in range(batch))
    rows = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    return torch.from_numpy(np.stack([row.random(length, dtype=np.float32) for row in rows]))


def check_request(
    model, cond, grid, cfg_scale, cfg_stop, temperature, top_k, top_p, greedy, seed, first_index, prefix=None
):
    """One sentence for everything that cannot be sampled."""
    if not isinstance(cond, torch.Tensor) or not cond.dim():
        raise ValueError(f"cond has to be a tensor with a condition for each image, not {cond!r}")
    if grid != (has := model.config.grid):
        raise ValueError(f"the model generates {has} codes, not {grid}: load it, or set_grid, for another grid")
    check_settings(temperature, top_k, top_p, greedy)
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale has to be a finite number, not {cfg_scale}")
    if cfg_stop < -1:
        raise ValueError(f"cfg_stop has to be -1 (guide every code) or a number of codes, not {cfg_stop}")
    if min(seed, first_index) < 0 or max(seed + 1, first_index + len(cond)) > 2**64:
        raise ValueError(f"seed and first_index have to be in 0..2^64-1, not {seed} and {first_index}")
    if len(cond) == 0:
        raise ValueError("there is no condition to sample from: cond is empty")
    null = model.config.num_classes
    if model.config.cond == "class" and not 0 <= int(cond.min()) <= int(cond.max()) <= null:
        raise ValueError(f"labels have to be in 0..{null} ({null}: no class), not {cond.tolist()}")
    if prefix is not None:
        length, end = grid[0] * grid[1], model.config.vocab_size
        if not isinstance(prefix, torch.Tensor) or prefix.is_floating_point() or prefix.dtype == torch.bool:
            raise ValueError(f"prefix has to be a tensor of codes, not {getattr(prefix, 'dtype', type(prefix))}")
        if prefix.dim() != 2 or len(prefix) != len(cond) or prefix.shape[1] >= length:
            raise ValueError(f"prefix has to be codes [{len(cond)}, t < {length}], not {list(prefix.shape)}")
        if prefix.numel() and not 0 <= int((p := prefix.long()).min()) <= int(p.max()) < end:
            raise ValueError(f"prefix has to hold codes in 0..{end - 1}, not {int(p.min())}..{int(p.max())}")


@functools.cache
def side_stream(device):
    """The stream of a GPU on which steps are captured: one, as cuBLAS keeps a workspace for every stream for good."""
    return torch.cuda.Stream(device)


class Loop:
    """Buffers and, on a GPU, CUDA graphs of the steps for requests of one shape; reused by the next such request.

    Rows are the `batch` images and, while they are guided, their unconditional copies after them. Where a step stands
    is known to the device alone: `clock` = (position of the code that it reads, index of the code that it draws).
    """

    def __init__(self, model, batch, rows, later_rows, settings):
        c, device = model.config, model.output.weight.device
        length = c.grid[0] * c.grid[1]
        self.settings, self.cache = settings, model.new_cache(rows)
        self.padding = torch.zeros(rows, dtype=torch.long, device=device) if c.cond != "class" else None
        self.noise = torch.zeros(batch, length, device=device)
        self.codes = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        self.start = torch.tensor([c.n_cond - 1, 0], device=device)
        self.clock = self.start.clone()
        self.position, self.index = self.clock[:1], self.clock[1:]
        self.graphs = {}
        if device.type == "cuda":
            with torch.cuda.device(device):
                pool, stream = torch.cuda.graph_pool_handle(), side_stream(device)
                self.graphs = {rows: self.capture(model, rows, pool, stream) for rows in later_rows}

    def capture(self, model, rows, pool, stream):
        """One step as a CUDA graph, after two that run as they are: libraries set themselves up in those, for each
        stream again (cuBLAS its workspace), so all of it is on one."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.clock.copy_(self.start)
                self.step(model, rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # current again after a capture that failed, too
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.step(model, rows)
        return graph

    def prefill(self, model, cond, cond_mask, prefix, noise):
        """Read the condition and the codes [rows, t] that are given, and draw the next."""
        given = prefix.shape[1]
        self.codes[:, :given] = prefix[: len(self.codes)]
        self.clock.copy_(self.start + given)
        if noise is not None:
            self.noise.copy_(noise)
        logits, padding = model.prefill(cond, cond_mask, self.cache, prefix)
        if self.padding is not None:
            self.padding.copy_(padding) if padding is not None else self.padding.zero_()
        self.draw(logits)

    def step(self, model, rows):
        """Read the last codes of the first `rows` rows and draw the next."""
        if rows in self.graphs:
            return self.graphs[rows].replay()
        self.clock += 1
        padding = None if self.padding is None else self.padding[:rows]
        self.draw(model.step(self.last[:rows], self.position, padding, self.cache))

    def draw(self, logits):
        batch, rows = len(self.codes), len(logits)
        codes = kernels.sample_codes(logits, self.noise, self.index, guided=rows > batch, **self.settings)
        self.last[:rows] = codes
        self.codes.index_copy_(1, self.index, codes[:batch, None])


LOOPS = weakref.WeakKeyDictionary()  # model -> (what its loop depends on, the loop)


def find_loop(model, batch, rows, later_rows, settings):
    """The loop of the model's last request if it serves this one too, else a new one in its place."""
    weights = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))  # a graph reads these addresses
    key = (batch, rows, later_rows, *settings.values(), model.config.grid, kernels.mode(), weights)
    if model not in LOOPS or LOOPS[model][0] != key:
        release(model)
        LOOPS[model] = key, Loop(model, batch, rows, later_rows, settings)
    return LOOPS[model][1]


def release(model):
    """Free the cache, buffers and graphs that generate() keeps for the model's next request."""
    LOOPS.pop(model, None)


@torch.no_grad()
def generate(
    model, cond, cond_mask=None, grid=None, cfg_scale=1.0, cfg_stop=-1, temperature=1.0, top_k=0, top_p=1.0,
    greedy=False, seed=0, first_index=0, prefix=None, progress=False,
):
    """Sample codes int64 [B, h, w] in raster order.

    cond and cond_mask are those of GPT.forward: labels, features and their mask, or caption tokens. A guided image has
    two rows in the batch, with its condition and with none, and of the same codes, drawn from the logits uncond +
    cfg_scale (cond - uncond) (Ho and Salimans 2022, eq. 6, w = cfg_scale - 1); cfg_scale 1 is no guidance. cfg_stop = n
    guides the first n codes only and drops the unconditional rows after them. prefix, int64 [B, t], are the first t
    codes of each image, which it then completes. Image i depends on (seed, first_index + i), not on its neighbours: bit
    for bit on a CPU, on a GPU as far as its matrix products round alike in batches of other sizes.
    Raises ValueError for settings that cannot be.
    """
    grid = tuple(grid or model.config.grid)
    check_request(model, cond, grid, cfg_scale, cfg_stop, temperature, top_k, top_p, greedy, seed, first_index, prefix)
    device, batch, length = model.output.weight.device, len(cond), grid[0] * grid[1]
    cond, cond_mask = cond.to(device), None if cond_mask is None else cond_mask.to(device)
    guided = 0 if cfg_scale == 1 else length if cfg_stop < 0 else min(cfg_stop, length)  # codes drawn with guidance
    prefix = cond.new_empty(batch, 0, dtype=torch.long) if prefix is None else prefix.to(device, torch.long)
    rows, *later = (2 * batch if i < guided else batch for i in range(prefix.shape[1], length))
    if rows > batch:
        cond, prefix = torch.cat([cond, model.cls_embedding.null(cond)]), prefix.repeat(2, 1)
        cond_mask = None if cond_mask is None else cond_mask.repeat(2, 1)  # "no text" hides the same positions
    noise = None if greedy else uniforms(seed, first_index, batch, length)
    settings = dict(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
    with evaluating(model), torch.autocast(device.type, enabled=False), model.packed(rows):
        loop = find_loop(model, batch, rows, frozenset(later), settings)
        loop.prefill(model, cond, cond_mask, prefix, noise)
        for rows in tqdm(later, desc="codes", initial=length - len(later), total=length, disable=not progress):
            loop.step(model, rows)
    return loop.codes.view(batch, *grid).clone()


# Images


@torch.no_grad()
def decode(vq, codes, size=None):
    """codes int64 [B, h, w] -> uint8 images [B, H, W, 3], in bfloat16 on a GPU that has it.

    size: resize to it by bicubic interpolation without antialiasing, as published 384-pixel samples are brought to 256.
    """
    low, images = pick_dtype("auto", codes.device) == "bfloat16", []
    for part in codes.split(16):
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=low):
            x = vq.decode(part).float()
        images.append(to_uint8(F.interpolate(x, (size, size), mode="bicubic") if size else x))
    return np.concatenate(images)


def sample_batches(vq, model, cond, n, starts=None, batch_size=64, size=None, progress=False, **settings):
    """Sample the batches of n images that begin at `starts` (default: all); settings as for generate().

    cond(indices) gives what generate() takes for images int64 [b]: (cond,) or (cond, cond_mask). Yields (start, uint8
    images [b, H, W, 3], codes int64 [b, h, w], seconds for codes, seconds for decoding). On a GPU the last batch is
    filled up: it takes the same kernels, and so rounds, as the others.
    """
    device = model.output.weight.device
    starts = range(0, n, batch_size) if starts is None else starts
    many = len(starts) > 1
    for start in tqdm(starts, desc="images", unit="batch", disable=not (progress and many)):
        kept = min(batch_size, n - start)
        rows = batch_size if device.type == "cuda" and n > batch_size else kept
        part = cond(torch.arange(start, start + rows).clamp(max=n - 1))
        began, bar = time.perf_counter(), progress and not many
        codes = generate(model, *part, first_index=start, progress=bar, **settings)[:kept]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        drawn = time.perf_counter()
        images = decode(vq, codes, size)
        yield start, images, codes, drawn - began, time.perf_counter() - drawn


def sample_images(vq, model, cond, cond_mask=None, **settings):
    """cond as for generate() -> uint8 images [N, H, W, 3] and codes [N, h, w]; settings as for sample_batches()."""
    tensors = [x.cpu() for x in (cond, cond_mask) if x is not None]
    batches = sample_batches(vq, model, lambda index: [x[index] for x in tensors], len(cond), **settings)
    _, images, codes, *_ = zip(*batches, strict=True)
    return np.concatenate(images), torch.cat(codes)


def read_captions(model, reader, texts):
    """Texts -> what generate() takes: (ids,) or (features, mask). An empty text is "no text" to either kind.

    Features are computed in one batch, and in bfloat16 may round by who else is in it.
    """
    cond, *mask = condition(reader.rows(texts), model.config.n_cond, reader.kind)
    if reader.kind == "t5":  # caption tokens of an empty text are the end alone, which is what training knows as "none"
        empty = torch.tensor([not clean_caption(text) for text in texts])
        cond[empty] = model.cls_embedding.uncond_embedding.to("cpu", cond.dtype)
    return cond, *mask


class Parts:
    """The finished batches of a run, one .npy file each in a folder, beside the request that they answer."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def open(self, request):
        """Begin a run, or go on with one; ValueError where the folder holds parts of another request."""
        path, text = self.folder / "request.json", json.dumps(request, indent=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any(self.folder.glob("*.npy")):
            write_whole(path, text)
        old, new = json.loads(path.read_text()), json.loads(text)
        differ = [f"{name} {old.get(name)}, not {new[name]}" for name in new if old.get(name) != new[name]]
        if differ:
            raise ValueError(f"{self.folder} is an unfinished run of {'; '.join(differ)}: finish or remove that one")

    def path(self, start):
        return self.folder / f"{start:08}.npy"

    def save(self, start, images):
        with writing(self.path(start)) as temporary, open(temporary, "wb") as file:
            np.save(file, images)

    def load(self, starts):
        """The parts, one after the other, as memory maps."""
        return (np.load(self.path(start), mmap_mode="r") for start in starts)


def save_npz(path, n, parts, labels):
    """arr_0: n images [n, H, W, 3] of an iterable of parts, which are never in memory together; arr_1: labels [n]."""
    count = 0
    with writing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for part in parts:
                if not count:
                    shape = dict(descr="|u1", fortran_order=False, shape=(n, *part.shape[1:]))
                    np.lib.format.write_array_header_1_0(file, shape)
                file.write(np.ascontiguousarray(part).data)
                count += len(part)
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels)
        if count != n:
            raise RuntimeError(f"{count} images for an npz of {n}")


# The command


def imagenet_names():
    """ImageNet's 1,000 classes as torchvision names them, [] without it: LlamaGen's files hold no names."""
    try:
        return import_torchvision().models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    except (ImportError, RuntimeError):
        return []


def parse_classes(text, class_names, num_classes):
    """"3,7,tabby" -> labels; ValueError for one that is neither a number in range nor a name (which may hold commas, if
    it is the only one)."""
    labels, known = [], [normalize("NFC", name) for name in class_names]  # folders on a Mac spell accents apart
    for word in [text] if normalize("NFC", text) in known else text.split(","):
        word = word.strip()
        if normalize("NFC", word) in known:
            labels.append(known.index(normalize("NFC", word)))
        elif word.isdecimal() and int(word) < num_classes:
            labels.append(int(word))
        else:
            hint = nearest(word, class_names) if class_names else " (neither the GPT's file nor torchvision has names)"
            raise ValueError(f"--classes: {word!r} is neither a class name nor a number below {num_classes}{hint}")
    return labels


def parse_grid(text):
    """ROWSxCOLUMNS -> (rows, columns)."""
    if not all(part.isdecimal() for part in text.split("x")) or text.count("x") != 1:
        raise ValueError(f"--grid has to be ROWSxCOLUMNS, such as 16x16, not {text!r}")
    return tuple(int(part) for part in text.split("x"))


def options():
    parser = Parser(__doc__)
    what = parser.add_argument_group("what")
    what.add_argument("--vq", type=Path, required=True, help="tokenizer, ours or LlamaGen's")
    what.add_argument("--gpt", type=Path, required=True, help="GPT, ours or LlamaGen's")
    what.add_argument("--hub", action="store_true", help=HUB_HELP)
    what.add_argument("--grid", help="ROWSxCOLUMNS of codes, for LlamaGen's files: 16x16 at 256 pixels, 24x24 at 384")
    what.add_argument("--classes", help="numbers or names, by commas (default: all in turn)")
    what.add_argument("--text", action="append", default=[], help="a prompt; give it once for each (\"\": no text)")
    what.add_argument("--text-file", type=Path, help="prompts, one a line; blank lines are left out")
    what.add_argument("--t5", type=Path, help="folder of the encoder, for GPTs that read FLAN-T5's features")
    what.add_argument("--n", type=int, help="images (default: one per class or prompt; of all classes 8, at most 80)")
    how = parser.add_argument_group("how")
    how.add_argument("--cfg-scale", type=float, default=2.0, help="classifier-free guidance (1: none)")
    how.add_argument("--cfg-stop", type=int, default=-1, help="guide the first codes only, so many (-1: all)")
    how.add_argument("--temperature", type=float, default=1.0, help="of the codes' distribution")
    how.add_argument("--top-k", type=int, default=0, help="codes kept (0: all)")
    how.add_argument("--top-p", type=float, default=1.0, help="probability mass kept, after top-k (1: all)")
    how.add_argument("--greedy", action="store_true", help="take the likeliest code each time")
    how.add_argument("--seed", type=int, default=0, help="of the images; image i depends on it and on i alone")
    how.add_argument("--batch-size", type=int, default=64, help="images at a time, per process")
    how.add_argument("--device", default="auto", help=DEVICE_HELP)
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    how.add_argument("--dtype", default="auto", choices=dtypes, help="of the GPT's weights (auto: bfloat16 on a GPU)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid, of the first 100 images")
    out.add_argument("--columns", type=int, help="images per row of the grid (default: one row per class, or 8)")
    out.add_argument("--npz", type=Path, help="arr_0: images, uint8 NHWC; arr_1: classes (shuffled) or prompt numbers")
    out.add_argument("--folder", type=Path, help="one PNG per image")
    out.add_argument("--size", type=int, help="resize to this many pixels a side (default: none; of 384, for FID: 256)")
    return parser.parse_args()


def load_models(vq_path, gpt_path, grid, device, dtype="float32"):
    """Both models on `device`, the GPT in `dtype`, and what its file says of its codes ({} if nothing).

    Raises ValueError where the GPT was trained on another tokenizer's codes.
    """
    vq, gpt = VQModel.from_pretrained(vq_path), GPT.from_pretrained(gpt_path, grid=grid).fold_code_features()
    content = read_file(gpt_path)
    codes = content.get("codes", {})  # what encode.py said of the codes that this GPT was trained on
    if "text_model" in content:
        codes["text"]["model"] = content["text_model"].numpy().tobytes()
    if codes and codes["tokenizer_sha256"] != file_sha256(vq_path):
        raise ValueError(f"{gpt_path} was trained on codes of {codes['tokenizer']}, and {vq_path} is another tokenizer")
    if gpt.config.vocab_size != vq.config.codebook_size:
        raise ValueError(f"{gpt_path} knows {gpt.config.vocab_size} codes, {vq_path} has {vq.config.codebook_size}")
    return vq.to(device), gpt.to(device, getattr(torch, dtype)), codes


def read_prompts(args):
    """The texts of --text and --text-file."""
    prompts = list(args.text)
    if args.text_file:
        try:
            prompts += [line for line in args.text_file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.text_file} is not text in UTF-8: {error}") from None
    return [whole_characters(text) for text in prompts]


def open_condition(args, gpt, codes, device):
    """(classes or prompts to sample [M], what stands under the images of each, a function from indices into them to
    what generate() takes)."""
    names, prompts = codes.get("class_names", []), read_prompts(args)
    if gpt.config.cond == "class":
        if prompts or args.t5:
            raise ValueError(f"{args.gpt} is conditioned on classes: leave --text, --text-file and --t5 out")
        classes = list(range(gpt.config.num_classes))
        names = imagenet_names() if not codes and len(classes) == 1000 else names
        if args.classes is not None:
            classes = parse_classes(args.classes, names, gpt.config.num_classes)
        labels = torch.tensor(classes)
        return classes, [names[i] if names else i for i in classes], lambda index: (labels[index],)
    if args.classes is not None or not prompts:
        raise ValueError(f"{args.gpt} is conditioned on texts: give them with --text or --text-file, and no --classes")
    reader = open_reader(gpt.config.cond, codes.get("text"), args.t5, device, args.gpt)
    want = gpt.config.text_dim if gpt.config.cond == "text" else gpt.config.text_vocab_size
    if reader.size != want:
        raise ValueError(f"{args.gpt} reads {want} channels a token, {reader.source} gives {reader.size}")
    for text in prompts[:10] if rank_and_world()[0] == 0 else []:
        if lost := reader.unread(text):
            print(f"{text!r}: the model does not read {lost!r} (unknown words, or beyond its length)")
    return prompts, prompts, lambda index: read_captions(gpt, reader, [prompts[i] for i in index])


def choose_images(args, kinds, shuffle):
    """Which of the classes or prompts each image shows, int64 [n]: in turn, or shuffled, and how many go in a row."""
    asked = args.classes is not None or args.text or args.text_file
    n = args.n if args.n is not None else kinds if asked else min(8 * kinds, 80)
    if shuffle:  # balanced as well as n allows, and whatever part of the file is read
        return np.random.default_rng(args.seed).permutation(np.arange(n) % kinds), min(args.columns or 8, n)
    each = n // kinds
    columns = each if n % kinds == 0 and 1 < each <= 16 else min(n, 8)
    return np.arange(n) * kinds // max(n, kinds), min(args.columns or columns, n)


def check_outputs(args, folder):
    """ValueError where a finished result would be overwritten, OSError where nothing can be written."""
    if args.out.is_dir() or args.out.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"--out {args.out} is no name of a picture: .png, .jpg or .webp")
    if args.npz and args.npz.exists():
        raise ValueError(f"{args.npz} is there already: remove it to sample again")
    if args.folder and args.folder.is_dir() and any(args.folder.iterdir()) and not folder.exists():
        raise ValueError(f"{args.folder} is not empty: remove it to sample again")
    for path in filter(None, (args.folder, args.out.parent, args.npz and args.npz.parent)):
        make_folder(path)


def main():
    args = options()
    with processes(args.device, timedelta(days=30), gradients=False) as (device, rank, world):
        run(args, device, rank, world)


def run(args, device, rank, world):
    """What main() does in each of `world` processes."""
    dtype = pick_dtype(args.dtype, device)
    vq, gpt, codes = load_models(args.vq, args.gpt, args.grid and parse_grid(args.grid), device, dtype)
    kinds, names, cond = open_condition(args, gpt, codes, device)
    shuffle = args.npz is not None and gpt.config.cond == "class"
    which, columns = choose_images(args, len(kinds), shuffle)
    which = torch.from_numpy(which)
    starts = range(0, len(which), args.batch_size)
    settings = dict(
        cfg_scale=args.cfg_scale, cfg_stop=args.cfg_stop, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, greedy=args.greedy, seed=args.seed,
    )
    check_request(gpt, cond(which[:1])[0], gpt.config.grid, first_index=0, **settings)
    settings |= dict(batch_size=args.batch_size, size=args.size)

    long = args.npz or args.folder or (args.out if world > 1 else None)  # such a run can be continued
    temporary = None if long else tempfile.TemporaryDirectory()
    parts = Parts(f"{long}.parts" if long else temporary.name)
    if rank == 0:
        check_outputs(args, parts.folder)
        files = {name: [str(path), path.stat().st_size] for name, path in (("vq", args.vq), ("gpt", args.gpt))}
        of = hashlib.sha256(json.dumps(kinds).encode()).hexdigest()  # classes or prompts, one after the other
        what = dict(n=len(which), of=of, shuffled=shuffle, grid=gpt.config.grid, dtype=dtype, t5=str(args.t5))
        parts.open(settings | files | what)
    barrier()

    began, seconds = time.perf_counter(), np.zeros(2)  # for codes, for decoding
    todo = [start for start in starts[rank::world] if not parts.path(start).exists()]
    n = sum(min(args.batch_size, len(which) - start) for start in todo)
    batches = sample_batches(vq, gpt, lambda i: cond(which[i]), len(which), todo, progress=rank == 0, **settings)
    for start, images, _, *spent in batches:
        for i, image in enumerate(images if args.folder else []):
            save_picture(args.folder / f"{start + i:06}.png", Image.fromarray(image))
        parts.save(start, images)
        seconds += spent
    n = int(total(torch.tensor(n)))  # and the images of all are there
    if rank:
        return
    rate = n / (time.perf_counter() - began)
    if args.npz:
        shown = np.array(kinds)[which] if gpt.config.cond == "class" else which.numpy()
        save_npz(args.npz, len(which), parts.load(starts), shown)
    first = np.concatenate(list(parts.load(starts[: -(-100 // args.batch_size)])))[:100]
    save_grid(args.out, first, columns, [names[i] for i in which[:100]], notice=codes.get("notice", ""))
    if long:
        shutil.rmtree(parts.folder)
    there = f" ({len(which) - n} were there already)" if n < len(which) else ""
    print(f"{n} images{there}, {rate:.1f} images/s; codes {seconds[0]:.1f} s, decoding {seconds[1]:.1f} s: ", end="")
    print(*(path for path in (args.npz, args.folder, args.out) if path), sep=", ")


if __name__ == "__main__":
    cli(main)
