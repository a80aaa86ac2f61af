"""generate() against what others do with the same weights: seconds for an image's codes, random weights.

    recompute    the whole prefix anew for every code (no cache)
    full cache   LlamaGen's method: attention over the whole masked cache, topk, softmax, a multinomial draw
    compiled     that step under torch.compile(mode="reduce-overhead"); GPU only
    eager        our step without its CUDA graph; GPU only
    products     nothing but a step's matrix products, as PyTorch does them; CPU only

On a GPU: B, L, XL, XXL, 3B at 24x24 codes, 16 and 256 rows (half of them unconditional), bfloat16; rows go to
benchmarks/<gpu>/sample.csv as they come, sample.png is drawn from that file. Before a row is timed, the codes drawn
greedily are compared with a full forward pass. The floor is reading every weight and the mean valid cache once a step
at the measured copy bandwidth, the prediction adds 2.5 us per kernel. A full-cache step costs the same at any position:
64 steps stand for all. On a CPU: B at 16x16, 4 images with guidance, in float32 and bfloat16, methods in turn.

    python tests/bench_sample.py [--presets L 3B] [--rows 16] [--quick | --dry-run]
"""

import functools
import math
import pathlib
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark as bench  # noqa: E402 - needs the path above

import kernels  # noqa: E402
from gpt import GPT, PRESETS, GPTConfig, Linear  # noqa: E402
from kernels.linear import MAX_ROWS  # noqa: E402
from sample import LOOPS, generate, release  # noqa: E402

CFG, TOP_K = 4.0, 2000
TARGET_S = dict(zip(("B", "L", "XL", "XXL", "3B"), (0.20, 0.40, 0.75, 1.25, 2.0), strict=True))  # 16 rows, 576 codes
TARGET_SHARE = 0.75  # of the floor, at 256 rows
TARGET_VS = {"full cache": 10, "compiled": 1.4}  # at 16 rows
SECONDS = {"B": 30, "L": 45, "XL": 65, "XXL": 85, "3B": 55}  # that a row of 16 takes on an H100, estimated
STEPS = 64  # of a full cache that are timed


def make_model(sizes, grid, dtype, device):
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(GPTConfig(**sizes, grid=grid, cond_rope="zero"))
    torch.nn.init.normal_(model.output.weight, std=0.02)  # logits of equal size would make every draw alike
    return model.to(dtype).eval()


class FullCache:
    """LlamaGen's method: one step attends over the whole static cache under a mask; draws as it does."""

    def __init__(self, model, images, compiled=False):
        c, self.model, self.images = model.config, model, images
        self.length, weight = c.grid[0] * c.grid[1], model.output.weight
        cache = weight.new_zeros(2 * images, c.n_kv_head, self.length + 1, c.head_dim)
        self.k, self.v = ([torch.zeros_like(cache) for _ in range(c.n_layer)] for _ in range(2))
        self.seen = torch.ones(self.length + 1, self.length + 1, device=weight.device).tril().bool()
        for cache in self.k + self.v if compiled else ():  # else what writes to them gets no CUDA graph
            torch._dynamo.mark_static_address(cache)
        self.step = bench.compiled(self.one, mode="reduce-overhead") if compiled else self.one

    def norm(self, x, layer):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + layer.eps)).type_as(x) * layer.weight

    def one(self, x, position):
        """Embedded tokens x [2 images, 1, C] at `position` [1] -> the next codes [images, 1]."""
        c, m = self.model.config, self.model
        cos, sin, mask = m.cos[position], m.sin[position], self.seen[position][None, None]
        for i, block in enumerate(m.layers):
            a, f = block.attention, block.feed_forward
            q, k, v = a.wqkv(self.norm(x, block.attention_norm)).unflatten(-1, (-1, c.head_dim)).split(
                [c.n_head, c.n_kv_head, c.n_kv_head], dim=2)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            q, k = kernels.apply_rope(q, cos, sin), kernels.apply_rope(k, cos, sin)
            self.k[i].index_copy_(2, position, k)
            self.v[i].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, self.k[i], self.v[i], attn_mask=mask)
            x = x + a.wo(y.transpose(1, 2).flatten(2))
            y = self.norm(x, block.ffn_norm)
            w1, w3 = f.w13.weight.chunk(2)
            x = x + f.w2(F.silu(F.linear(y, w1)) * F.linear(y, w3))
        cond, uncond = m.output(self.norm(x[:, -1:], m.norm))[:, 0].float().chunk(2)
        logits = uncond + CFG * (cond - uncond)
        logits = logits.masked_fill(logits < logits.topk(min(TOP_K, logits.shape[1])).values[:, -1:], -torch.inf)
        p = logits.softmax(-1)
        return (p / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)  # multinomial, without its checks

    @torch.no_grad()
    def __call__(self, cond, steps=None):
        codes = torch.empty(self.images, self.length, dtype=torch.long, device=cond.device)
        x = self.model.cls_embedding(torch.cat([cond, self.model.cls_embedding.null(cond)]))
        position = torch.zeros(1, dtype=torch.long, device=cond.device)
        for i in range(steps or self.length):
            torch.compiler.cudagraph_mark_step_begin()
            codes[:, i : i + 1] = self.step(x, position)
            position += 1
            x = self.model.tok_embeddings(codes[:, i : i + 1].repeat(2, 1))
        return codes


@torch.no_grad()
def recompute_seconds(model, cond, count=8):
    """Seconds for all codes without a cache, from `count` prefixes evenly spread over them."""
    length = model.config.grid[0] * model.config.grid[1]
    cond, times = torch.cat([cond, model.cls_embedding.null(cond)]), []
    for t in range(length // count // 2, length, max(length // count, 1)):
        codes = torch.zeros(len(cond), t, dtype=torch.long, device=cond.device)
        began = time.perf_counter()
        x = torch.cat([model.cls_embedding(cond), model.tok_embeddings(codes)], dim=1)
        model.output(model.transform(x)[:, -1])
        times.append(time.perf_counter() - began)
    return statistics.mean(times) * length


@torch.no_grad()
def products_seconds(model, rows):
    """Seconds for the matrix products of one image's steps, as F.linear does them."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    inputs = [torch.randn(rows, w.shape[1], dtype=w.dtype) for w in weights]
    began = time.perf_counter()
    for _ in range(20):
        for x, w in zip(inputs, weights, strict=True):
            F.linear(x, w)
    return (time.perf_counter() - began) / 20 * model.config.grid[0] * model.config.grid[1]


def seconds(call):
    bench.synchronize()
    began = time.perf_counter()
    call()
    bench.synchronize()
    return time.perf_counter() - began


def contenders_on_cpu(model, images):
    cond, other = torch.arange(images), FullCache(model, images)
    return {
        "ours": lambda: seconds(lambda: generate(model, cond, cfg_scale=CFG, top_k=TOP_K)),
        "full cache": lambda: seconds(lambda: other(cond)),
        "products": lambda: products_seconds(model, 2 * images),
        "recompute": lambda: recompute_seconds(model, cond),
    }


def on_cpu(sizes, grid, images, rounds):
    print(f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        contenders = contenders_on_cpu(make_model(sizes, grid, dtype, "cpu"), images)
        times = {name: [] for name in contenders}
        for _ in range(rounds):  # in turn, so that a busy minute falls on all
            for name, contender in contenders.items():
                times[name].append(contender())
        best = {name: min(values) for name, values in times.items()}
        for name, value in best.items():
            step = 1e3 * value / (grid[0] * grid[1])
            row = dict(dtype=str(dtype).removeprefix("torch."), method=name, seconds=value, ms_per_step=step)
            rows.append(dict(row, images_per_s=images / value, ours_is_faster=value / best["ours"]))
            print("  ".join(f"{x:10.3f}" if isinstance(x, float) else f"{x:10}" for x in rows[-1].values()), flush=True)
    return rows


def floor_seconds(model, rows, copy):
    """Reading what a step has to read, at `copy` byte/s, for all codes: weights, and the keys and values so far."""
    c, size = model.config, model.output.weight.element_size()
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.embedding_table.weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - tables
    length = c.grid[0] * c.grid[1]
    cache = 2 * c.n_layer * rows * c.n_kv_head * c.head_dim * length / 2
    return length * (weights + cache) * size / copy


def predicted_seconds(model, rows, copy):
    """The floor, and for each kernel what it takes to start, to wait for its first bytes and to end: 5 a layer, 8
    where norms and SwiGLU are apart, and 7 besides; the draw from the top-k takes 15 us more."""
    n = (5 if rows <= MAX_ROWS else 8) * model.config.n_layer + 7
    return floor_seconds(model, rows, copy) + 1e-3 * (bench.KERNEL_MS * n + 15e-3) * math.prod(model.config.grid)


@torch.no_grad()
def check(model, images=2):
    """Greedy codes of generate() against the guided logits of full forward passes by the PyTorch path: how far below
    the largest logit those of the drawn codes are, in standard deviations (a random code: about 4)."""
    cond = torch.arange(images, device=bench.DEVICE)
    codes = generate(model, cond, cfg_scale=CFG, greedy=True).flatten(1)
    release(model)
    mode = kernels.use("torch")
    try:
        given = torch.cat([cond, model.cls_embedding.null(cond)])
        cond, uncond = model(codes[:, :-1].repeat(2, 1), given)[0].chunk(2)
    finally:
        kernels.use(mode)
    logits = uncond + CFG * (cond - uncond)
    drawn = logits.gather(2, codes[..., None])[..., 0]
    gap = ((logits.amax(2) - drawn) / logits.std(2)).mean().item()
    assert gap < 0.5, f"the codes drawn are {gap:.2f} standard deviations below the likeliest"
    return gap


def time_method(name, model, images, rounds):
    """Median seconds for all codes of an image and the peak GiB above the weights."""
    cond, length = torch.arange(images, device=bench.DEVICE), math.prod(model.config.grid)
    settings = dict(cfg_scale=CFG, top_k=TOP_K)
    before = torch.cuda.memory_allocated() if bench.DEVICE == "cuda" else 0
    if bench.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if name in ("ours", "eager"):
        generate(model, cond, **settings)  # compiles, captures
        if name == "eager":
            LOOPS[model][1].graphs.clear()
        times = [seconds(lambda: generate(model, cond, **settings)) for _ in range(rounds)]
    else:
        other, steps = FullCache(model, images, compiled=name == "compiled"), min(STEPS, length)
        other(cond, min(8, length))  # compiles, captures
        times = [length / steps * seconds(lambda: other(cond, steps)) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() if bench.DEVICE == "cuda" else 0
    return statistics.median(times), (peak - before) / 2**30


def measure(preset, rows, grid, methods, rounds, top):
    model = make_model(PRESETS[preset], grid, torch.bfloat16, bench.DEVICE)
    row = dict(floor_s=floor_seconds(model, rows, top.copy), predicted_s=predicted_seconds(model, rows, top.copy))
    row["gap"] = check(model)
    for name in ("ours", "full cache", "compiled", "eager"):
        row[f"{name}_s"] = row[f"{name}_gib"] = None
        bench.release_memory()
        try:
            if name in methods:
                row[f"{name}_s"], row[f"{name}_gib"] = time_method(name, model, rows // 2, rounds)
        except Exception as error:  # a rival that does not run or fit here
            if name == "ours":
                raise
            print(f"  {preset}, {rows} rows, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        finally:
            release(model)
    ours = row["ours_s"]
    row |= dict(ms_per_step=1e3 * ours / math.prod(grid), images_per_s=rows / 2 / ours)
    row["share_of_floor"] = row["floor_s"] / ours
    for name in ("full cache", "compiled", "eager"):
        row[f"vs_{name}"] = row[f"{name}_s"] and row[f"{name}_s"] / ours
    return row


def draw(rows, path):
    """Seconds by preset and rows, every method and the floor."""
    series = dict(floor_s="floor", ours_s="ours", compiled_s="compiled full cache", eager_s="ours without CUDA graph")
    label = "{preset}, {rows} rows".format_map
    bench.bars(rows, label, series | {"full cache_s": "full cache"}, path, f"seconds for {rows[0]['codes']} codes")


def main(words=None):
    parser = bench.parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["B", "L", "XL", "XXL", "3B"], choices=list(TARGET_S))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256], help="images and unconditional rows")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(words)
    if not torch.cuda.is_available() and not args.dry_run:
        on_cpu(PRESETS["B"], (16, 16), 4, args.rounds)
        return 0
    run = bench.Run(args, "sample", draw)

    def plan(presets, all_rows, grid):
        for rows in all_rows:
            for preset in presets:
                methods = ("ours", "full cache") if args.quick else ("ours", "full cache", "eager", "compiled")
                methods = methods if rows < 256 else methods[:2]  # compiling takes minutes: once per model
                estimate = 8 if args.quick else SECONDS.get(preset, 0) if rows < 256 else 0.4 * SECONDS.get(preset, 0)
                key = dict(preset=preset, rows=rows, codes=math.prod(grid), dtype="bfloat16")
                yield key, estimate, functools.partial(measure, preset, rows, grid, methods, args.rounds, run.top)

    presets, all_rows = (["B", "L"], [16]) if args.quick else (args.presets, args.rows)
    columns = ("preset", "rows", "floor_s", "predicted_s", "ours_s", "share_of_floor", "images_per_s", "vs_full cache",
               "vs_compiled", "vs_eager", "ours_gib")
    tiny = [(key, 0, measure) for key, _, measure in plan(["tiny"], [4, 256], (2, 3))] if args.dry_run else []
    return int(run.measure(list(plan(presets, all_rows, (24, 24))), columns, tiny))


if __name__ == "__main__":
    sys.exit(main())
