"""generate() against what others do with the same weights: seconds for an image's codes, random weights.

    recompute    the whole prefix anew for every code (no cache)
    full cache   LlamaGen's method: attention over the whole masked cache, topk, softmax, a multinomial draw
    compiled     that step under torch.compile(mode="reduce-overhead"); GPU only
    eager        our step without its CUDA graph; GPU only
    products     nothing but a step's matrix products, as PyTorch does them; CPU only

On a GPU: B, L, XL, XXL, 3B at 24x24 codes, 16, 64 and 256 rows (half of them unconditional), bfloat16; rows go to
benchmarks/<gpu>/sample.csv as they come, sample.png is drawn from that file. The floor is reading every weight and the
mean valid cache once a step at the measured copy bandwidth. On a CPU: B at 16x16, 4 images with guidance, in float32
and bfloat16, methods in turn. --dry-run: everything once, at a toy's size, for a test of this script.

    python tests/bench_sample.py [--presets L 3B] [--rows 16]
"""

import argparse
import csv
import pathlib
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_kernels  # noqa: E402 - needs the path above

from gpt import GPT, PRESETS, GPTConfig, Linear, apply_rope  # noqa: E402
from sample import LOOPS, generate, release  # noqa: E402

CFG, TOP_K = 4.0, 2000


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
        shape = (c.n_layer, 2 * images, c.n_kv_head, self.length + 1, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.seen = torch.ones(self.length + 1, self.length + 1, device=weight.device).tril().bool()
        self.step = torch.compile(self.one, mode="reduce-overhead") if compiled else self.one

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
                [c.n_head, c.n_kv_head, c.n_kv_head], dim=2)  # fmt: skip
            q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
            self.k[i].index_copy_(2, position, k)
            self.v[i].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, self.k[i], self.v[i], attn_mask=mask)
            x = x + a.wo(y.transpose(1, 2).flatten(2))
            y = self.norm(x, block.ffn_norm)
            w1, w3 = f.w13.weight.chunk(2)
            x = x + f.w2(F.silu(F.linear(y, w1)) * F.linear(y, w3))
        cond, uncond = m.output(self.norm(x[:, -1:], m.norm))[:, 0].float().chunk(2)
        logits = uncond + CFG * (cond - uncond)
        logits = logits.masked_fill(logits < logits.topk(TOP_K).values[:, -1:], -torch.inf)
        p = logits.softmax(-1)
        return (p / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)  # multinomial, without its checks

    @torch.no_grad()
    def __call__(self, cond):
        codes = torch.empty(self.images, self.length, dtype=torch.long, device=cond.device)
        x = self.model.cls_embedding(torch.cat([cond, self.model.cls_embedding.null(cond)]))
        for i in range(self.length):
            codes[:, i : i + 1] = self.step(x, torch.tensor([i], device=cond.device))
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


def seconds(call, device):
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def contenders_on_cpu(model, images):
    cond, other = torch.arange(images), FullCache(model, images)
    return {
        "ours": lambda: seconds(lambda: generate(model, cond, cfg_scale=CFG, top_k=TOP_K), "cpu"),
        "full cache": lambda: seconds(lambda: other(cond), "cpu"),
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


def contender_on_gpu(name, model, images):
    cond = torch.arange(images, device="cuda")
    if name in ("ours", "eager"):
        def call():
            generate(model, cond, cfg_scale=CFG, top_k=TOP_K)
            if name == "eager":
                LOOPS[model][1].graphs.clear()  # the next request steps without them
        return call
    other = FullCache(model, images, compiled=name == "compiled")
    return lambda: other(cond)


def time_on_gpu(name, model, images, rounds):
    """Median seconds and the peak GiB above the weights; None where it does not run or fit."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call = contender_on_gpu(name, model, images)
        call()  # compiles, captures
        times = [seconds(call, "cuda") for _ in range(rounds if name in ("ours", "compiled") else 1)]
        return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30
    except RuntimeError as error:
        print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None, None
    finally:
        release(model)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def on_gpu(presets, all_rows, grid, rounds, folder):
    top = bench_kernels.measure_ceilings()
    about = bench_kernels.about_machine(top)
    print(about)
    folder = folder / about["gpu"].replace(" ", "_").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sample.csv").open("w", newline="") as file:
        writer = None
        for preset in presets:
            model = make_model(PRESETS[preset], grid, torch.bfloat16, "cuda")
            for rows in all_rows:
                row = dict(preset=preset, rows=rows, codes=grid[0] * grid[1], dtype="bfloat16")
                row["floor_s"] = floor_seconds(model, rows, top.copy)
                for name in ("ours", "full cache", "compiled", "eager"):
                    row[f"{name}_s"], row[f"{name}_gib"] = time_on_gpu(name, model, rows // 2, rounds)
                ours = row["ours_s"]
                row["ms_per_step"] = ours and 1e3 * ours / row["codes"]
                row["images_per_s"] = ours and rows / 2 / ours
                row["share_of_floor"] = ours and row["floor_s"] / ours
                for name in ("full cache", "compiled", "eager"):
                    row[f"vs_{name}"] = ours and row[f"{name}_s"] and row[f"{name}_s"] / ours
                row |= about
                if writer is None:
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in about})
                draw(folder)
            del model


def draw(folder):
    """Seconds by preset and rows, every method and the floor, from the CSV file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader((folder / "sample.csv").open()))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.6 * len(rows)), layout="constrained")
    names = ("floor", "ours", "compiled", "full cache", "eager")
    for i, name in enumerate(names):
        values = [float(row[f"{name}_s"] or 0) for row in rows]
        axes.barh([y + 0.16 * (i - 2) for y in range(len(rows))], values, height=0.15, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['preset']}, {row['rows']} rows" for row in rows])
    axes.set(xscale="log", xlabel=f"seconds for {rows[0]['codes']} codes", title=rows[0]["gpu"])
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(folder / "sample.png", dpi=150)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["B", "L", "XL", "XXL", "3B"], choices=list(PRESETS))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256], help="images and unconditional rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks", help="folder for the results")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if torch.cuda.is_available():
        presets, rows, grid = (["tiny"], [4], (2, 3)) if args.dry_run else (args.presets, args.rows, (24, 24))
        return on_gpu(presets, rows, grid, args.rounds, args.out)
    if args.dry_run:
        return on_cpu(dict(PRESETS["tiny"], vocab_size=4096), (2, 4), 2, 1)
    return on_cpu(PRESETS["B"], (16, 16), 4, args.rounds)


if __name__ == "__main__":
    main()
