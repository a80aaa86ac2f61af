"""Kernels at the models' real sizes against eager PyTorch, torch.compile and the best library operation.

On a GPU: checks, then times; rows go to benchmarks/<gpu>/kernels.csv as they come, kernels.png is drawn from that file.
Predictions are made before anything runs, from bytes and instruction counts. Without a GPU: the ahead-of-time table
and the times that it predicts for one H100.

    python tests/bench_kernels.py [--only swiglu]
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_compile  # noqa: E402 - needs the path above

import kernels  # noqa: E402

codebook, rms_norm_file, swiglu_file, rope_file, decode_file, sampling_file = (
    importlib.import_module(f"kernels.{name}")
    for name in ("codebook", "rms_norm", "swiglu", "rope_attention", "decode", "sampling")
)
DEVICE = "cuda"
TOKENS = 65536
SHARE_FWD, SHARE_BWD = 0.92, 0.85  # of the copy bandwidth, the targets
# by (D, l2), on sm_90: half-rate instructions per pair and executed depth, from tests/test_compile.py; instructions of
# a warp that one vector's rescan costs, from a simulation on random codes
SEARCH = {(8, True): (1.50, 32, 67), (256, False): (6.97, 768, 1090)}
# by padded head and whether keys are turned inside: instructions per score of fwd, dq, dkv on sm_90, without padding
ATTENTION = {(64, True): (11.0, 10.6, 12.4), (64, False): (8.2, 8.1, 9.8), (128, False): (12.1, 15.3, 17.3)}
RIVALS = ("flash", "cudnn", "efficient", "flex", "prefix")


@dataclasses.dataclass
class Ceilings:
    """What the GPU can do; the defaults are those of one H100 80GB."""

    copy: float = 3.0e12  # byte/s
    matmul: float = 800e12  # FLOP/s in bfloat16
    multiprocessors: int = 132
    clock: float = 1.755e9


@dataclasses.dataclass
class Case:
    op: str
    shape: str
    dtype: str
    direction: str
    make: Callable  # -> (inputs, upstream gradients)
    ours: Callable
    eager: Callable
    library: Callable | None
    bytes: float = 0
    flops: float = 0
    search: tuple = ()  # (N, K, D, l2)
    attention: tuple = ()  # (B, T, H, D)
    rivals: dict = dataclasses.field(default_factory=dict)  # more contenders, by a name of RIVALS
    tolerance: float = 2e-2
    latency_ms: float = 0  # predicted beside bytes and FLOPs
    captured: bool = False  # timed as the replay of a CUDA graph, which is how the sampler runs it

    def floor_ms(self, top):
        return 1e3 * max(self.bytes / top.copy, self.flops / top.matmul)

    def predicted_ms(self, top):
        if self.attention:
            return self.predicted_attention_ms(top)
        if not self.search:
            return self.floor_ms(top) / (SHARE_BWD if "bwd" in self.direction else SHARE_FWD) + self.latency_ms
        N, K, D, l2 = self.search  # maxima and tensor cores one after the other; FMNMX issues every second cycle
        half, depth, rescan = SEARCH[D, l2]
        issue = top.multiprocessors * 4 * top.clock
        return 1e3 * (N * K * half * 2 / 32 / issue + 2 * N * K * depth / top.matmul + N * rescan / issue)

    def predicted_attention_ms(self, top):
        """Memory, or tensor cores and other instructions one after the other, and the pass that turns keys before."""
        B, T, H, D = self.attention
        wide, inside = 64 if D <= 64 else 128, rope_file.rotates_inside(T, D, 1, False, "sm_90")
        scores = B * H * T * (T + 128) / 2  # blocks on the diagonal are computed whole
        counts, products = ATTENTION[wide, inside], (4, 6, 8)
        parts = {"fwd": (0,), "bwd": (1, 2), "fwd+bwd": (0, 1, 2)}[self.direction]
        ms = sum(
            1e3 * scores * (counts[i] / 32 / (top.multiprocessors * 4 * top.clock) + products[i] * wide / top.matmul)
            for i in parts
        )
        turned = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[self.direction] * (not inside)  # k; q and k
        pass_ms = 1e3 * turned * 4 * B * T * H * D / top.copy / SHARE_BWD
        return max(ms, 1e3 * self.bytes / top.copy / SHARE_BWD) + pass_ms


def rms_cases():
    """The plain norm in bfloat16, and what training runs: x in bfloat16, residual and sum in float32."""
    for W in (1024, 1280, 1536):
        for add, direction in ((False, "fwd"), (True, "fwd"), (False, "bwd"), (True, "bwd")):

            def make(W=W, add=add):
                x, dy = (torch.randn(TOKENS, W, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
                stream = [torch.randn(TOKENS, W, device=DEVICE) for _ in range(2 * add)]  # residual, ds
                return [x, torch.rand(W, device=DEVICE) + 0.5, *stream[:1]], [dy, *stream[1:]]

            def library(x, weight, residual=None):
                s = x if residual is None else x + residual
                y = F.rms_norm(s, (s.shape[-1],), weight.to(s.dtype), 1e-5).to(x.dtype)
                return y if residual is None else (y, s)

            def with_eps(fn):
                return lambda x, weight, *residual: fn(x, weight, 1e-5, *residual)

            # x, y; x, residual, s, y; dy, x, dx; dy, ds, s, the gradient in both dtypes
            size = {"fwd": (2 + 2, 2 + 4 + 4 + 2), "bwd": (2 + 2 + 2, 2 + 4 + 4 + 4 + 2)}[direction][add]
            yield Case(
                "rms_norm" + " + residual" * add, f"{TOKENS}x{W}", "bfloat16" + "+float32" * add, direction, make,
                with_eps(kernels.rms_norm), with_eps(rms_norm_file.rms_norm_ref), library, size * TOKENS * W,
            )  # fmt: skip


def swiglu_cases():
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def library(x):
            return LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, -1)))
    except ImportError:
        library = None
    for H in (2816, 3584, 4096):
        for direction, passes in (("fwd", 3), ("bwd", 5)):

            def make(H=H):
                x = torch.randn(TOKENS, 2 * H, device=DEVICE, dtype=torch.bfloat16)
                return [x], [torch.randn_like(x[:, :H])]

            yield Case(
                "swiglu", f"{TOKENS}x{H}", "bfloat16", direction, make, kernels.swiglu, swiglu_file.swiglu_ref, library,
                passes * TOKENS * H * 2,
            )  # fmt: skip


def distances(z, codes):
    """The N x K matrix, as LlamaGen's quantizer makes it."""
    d = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * torch.einsum("nd,kd->nk", z, codes)
    return d.argmin(1)


def search_cases():
    for N, K, D, l2 in ((32768, 16384, 8, True), (262144, 16384, 8, True), (262144, 1024, 256, False)):

        def make(N=N, K=K, D=D, l2=l2):
            z, codes = (torch.randn(n, D, device=DEVICE) for n in (N, K))
            return ([F.normalize(z, dim=1), F.normalize(codes, dim=1)] if l2 else [z, codes]), None

        yield Case(
            "nearest_code", f"{N}x{K} D={D}", "float32", "fwd", make, functools.partial(kernels.nearest_code, l2=l2),
            distances, functools.partial(codebook.nearest_code_ref, l2=l2), N * (D * 4 + 8),
            2 * N * K * SEARCH[D, l2][1], (N, K, D, l2),
        )  # fmt: skip


def with_backend(name, fn):
    """fn compiled, with one backend of scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend, compiled = getattr(SDPBackend, f"{name.upper()}_ATTENTION"), torch.compile(fn)

    def call(*inputs):
        with sdpa_kernel(backend):
            return compiled(*inputs)

    return call


def attention_cases():
    for D, H, B in ((64, 16, 64), (100, 32, 32)):
        for T in (256, 576, 1024):
            yield from attention_case(B, T, H, D)


def attention_case(B, T, H, D):
    where = {}  # the table of angles and the block mask, made with the inputs

    def make():
        from torch.nn.attention.flex_attention import create_block_mask

        angles = torch.outer(torch.arange(T, device=DEVICE), 10000.0 ** (-torch.arange(0, 1, 2 / D, device=DEVICE)))
        where["table"] = angles.cos(), angles.sin()
        where["mask"] = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=DEVICE)
        qkv = torch.randn(B, T, 3 * H * D, device=DEVICE, dtype=torch.bfloat16)
        return [qkv], [torch.randn(B, T, H * D, device=DEVICE, dtype=torch.bfloat16)]

    def ours(qkv):
        return kernels.rope_attention(qkv, *where["table"], H)

    def sdpa(qkv):
        return rope_file._rope_attention_sdpa(qkv, *where["table"], H, H, None)

    def flex(qkv):
        from torch.nn.attention.flex_attention import flex_attention

        heads = rope_file._heads(qkv, *where["table"], H, H)
        return flex_attention(*heads, block_mask=where["mask"]).transpose(1, 2).flatten(2)

    rivals = {name: functools.partial(with_backend, name, sdpa) for name in RIVALS[:3]}
    rivals["flex"] = functools.partial(torch.compile, flex)
    size, scores = B * T * H * D, B * H * T * (T + 1) / 2
    for direction, passes, products in (("fwd", 4, 4), ("bwd", 8, 10), ("fwd+bwd", 12, 14)):
        yield Case(
            "rope_attention", f"{B}x{T}x{H}x{D}", "bfloat16", direction, make, ours, sdpa, None,
            passes * size * 2, products * scores * D, attention=(B, T, H, D), rivals=rivals,
        )  # fmt: skip


def decode_cases():
    """One token per row: 8 images with guidance, late and halfway, one image, many. 2 us are for trips to memory."""
    for B, S, t, H, D in (
        (16, 256, 255, 16, 64), (16, 256, 128, 16, 64), (16, 576, 288, 32, 100), (2, 576, 288, 32, 100),
        (256, 256, 128, 16, 64),
    ):  # fmt: skip
        padded, where = -(-D // 8) * 8, {}

        def make(B=B, S=S, t=t, H=H, D=D, padded=padded, where=where):
            angles = torch.randn(S, D // 2, device=DEVICE)
            where.update(table=(angles.cos(), angles.sin()), position=torch.tensor([t], device=DEVICE))
            where["seen"] = torch.arange(S, device=DEVICE) <= t
            caches = [torch.randn(B, H, S, padded, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
            return [torch.randn(B, 3 * H * D, device=DEVICE, dtype=torch.bfloat16), *caches], None

        def ours(qkv, k, v, H=H, where=where):
            return kernels.decode_attention(qkv, *where["table"], k, v, where["position"], H)

        def eager(qkv, k, v, H=H, where=where):
            return decode_file.decode_attention_ref(qkv, *where["table"], k, v, where["position"], H, H, None)

        def sdpa(qkv, k, v, end, H=H, D=D, where=where):
            """Over the first `end` keys, which the host has to know, or over all of them under a mask."""
            angles = (table[where["position"]] for table in where["table"])
            q, *new = rope_file._heads(qkv[:, None], *angles, H, H)
            for cache, rows in zip((k, v), new, strict=True):
                cache[..., :D].index_copy_(2, where["position"], rows)
            k, v, seen = k[:, :, :end, :D], v[:, :, :end, :D], None if end else where["seen"][None, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(1)

        yield Case(
            "decode_attention", f"{B}x{t}/{S}x{H}x{D}", "bfloat16", "fwd", make, ours, eager,
            torch.compile(functools.partial(sdpa, end=None)), 4 * B * H * t * padded, 4 * B * H * t * D,
            rivals=dict(prefix=lambda sdpa=sdpa, t=t: torch.compile(functools.partial(sdpa, end=t + 1))),
            latency_ms=2e-3, captured=True,
        )  # fmt: skip


def drawing_cases():
    """Guided rows of 16,384 logits against topk, a sort and a multinomial draw, LlamaGen's way; bound by latency."""

    def sorted_draw(logits, noise, index, top_p):
        cond, uncond = logits.float().chunk(2)
        x = uncond + (cond - uncond) * 2.0
        x = x.masked_fill(x < x.topk(2000).values[:, -1:], -torch.inf)
        if top_p < 1:
            x, order = x.sort(descending=True)
            mass = x.softmax(-1).cumsum(-1)
            x = x.masked_fill(mass - x.softmax(-1) >= top_p, -torch.inf).scatter(1, order, x)
        return x.softmax(-1).multinomial(1)[:, 0].repeat(2)

    for B in (8, 128):
        for top_p, latency in ((1.0, 6e-3), (0.9, 11e-3)):

            def make(B=B):
                logits = 3 * torch.randn(2 * B, 16384, device=DEVICE, dtype=torch.bfloat16)
                return [logits, torch.rand(B, 576, device=DEVICE), torch.tensor([7], device=DEVICE)], None

            def with_settings(fn, top_p=top_p):
                return lambda logits, noise, index: fn(
                    logits, noise, index, cfg_scale=2.0, top_k=2000, top_p=top_p, guided=True
                )

            yield Case(
                "draw_codes", f"{2 * B}x16384 top-k" + " top-p" * (top_p < 1), "bfloat16", "fwd", make,
                with_settings(kernels.draw_codes), with_settings(sampling_file.draw_codes_ref),
                functools.partial(sorted_draw, top_p=top_p), 4 * B * 16384, latency_ms=latency, captured=True,
            )  # fmt: skip


def cases():
    return [*search_cases(), *rms_cases(), *swiglu_cases(), *attention_cases(), *decode_cases(), *drawing_cases()]


def measure_ceilings():
    from triton.testing import do_bench

    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    copy = 2 * source.nbytes / (1e-3 * do_bench(lambda: target.copy_(source), return_mode="median"))
    matmul = 2 * 8192**3 / (1e-3 * do_bench(lambda: a @ b, return_mode="median"))
    return Ceilings(copy, matmul, torch.cuda.get_device_properties(0).multi_processor_count)


def step(fn, inputs, upstream, direction):
    """What is timed: the forward pass, one backward pass of a kept graph, or both."""
    if direction == "fwd":
        return torch.no_grad()(lambda: fn(*inputs))
    inputs = [x.detach().requires_grad_() for x in inputs]
    if direction == "fwd+bwd":
        return lambda: torch.autograd.grad(fn(*inputs), inputs, upstream)
    outputs = fn(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def check(case, inputs, upstream):
    """Ours against float64 (indices: against float64 distances of a sample) before anything is timed."""
    got = step(case.ours, inputs, upstream, case.direction)()
    if case.search:
        z, codes = inputs[0][:4096].double(), inputs[1].double()
        true = (z @ codes.t() - (0 if case.search[3] else codes.square().sum(1) / 2)).argmax(1)
        assert torch.equal(got[:4096], true), f"{(got[:4096] != true).sum()} of 4096 differ from float64"
        return
    if case.op == "draw_codes":  # exp rounds otherwise in PyTorch: a draw at the edge of two codes may differ
        same = (got == case.eager(*inputs)).float().mean()
        assert same > 0.99, f"{same:.2%} of the codes are those of the PyTorch path"
        return
    part = [x[:2] if case.attention else x[:4096] if len(x) == TOKENS else x for x in inputs]
    fewer = upstream and [g[: 2 if case.attention else 4096] for g in upstream]
    got = step(case.ours, part, fewer, case.direction)()
    true = step(case.eager, [x.double() for x in part], fewer and [g.double() for g in fewer], case.direction)()
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, true)), strict=True):
        assert (a - b).abs().max() <= case.tolerance * b.abs().max(), f"{case.op} {case.shape} {case.direction}"


def replay(call):
    """What runs call on a GPU without the host: a captured CUDA graph of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_one(fn, inputs, upstream, direction, captured=False):
    """p50, p20, p80 in ms and the peak memory in MiB above the inputs; None where it does not run or fit."""
    from triton.testing import do_bench

    try:
        call = step(fn, inputs, upstream, direction)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        call = replay(call) if captured else call
        return *do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8]), peak
    except RuntimeError as error:
        print(f"  {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    finally:
        torch.cuda.empty_cache()


def measure(case, top, about):
    inputs, upstream = case.make()
    row = dict(op=case.op, shape=case.shape, dtype=case.dtype, direction=case.direction)
    row.update(predicted_ms=case.predicted_ms(top), floor_ms=case.floor_ms(top))
    check(case, inputs, upstream)
    contenders = dict(ours=lambda: case.ours, eager=lambda: case.eager, compile=lambda: torch.compile(case.eager))
    contenders |= dict(library=lambda: case.library) if case.library else {}
    times = {}
    for name, make in (contenders | case.rivals).items():
        torch._dynamo.reset()  # what was compiled for one backend of attention is not for the next
        times[name] = time_one(make(), inputs, upstream, case.direction, case.captured)
    row.update(zip(("ours_ms", "p20_ms", "p80_ms", "peak_mib"), times["ours"], strict=True))
    row["share_of_floor"] = row["floor_ms"] / row["ours_ms"]
    row["gb_per_s"], row["tflop_per_s"] = case.bytes / row["ours_ms"] / 1e6, case.flops / row["ours_ms"] / 1e9
    for name in ("eager", "compile", "library", *RIVALS):
        ms, _, _, peak = times.get(name) or (None,) * 4
        row.update({f"{name}_ms": ms, f"{name}_peak_mib": peak, f"vs_{name}": ms and ms / row["ours_ms"]})
    return {**row, **about}


def draw(folder):
    """Speed-up over each baseline, from the CSV file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader((folder / "kernels.csv").open()))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(rows)), layout="constrained")
    for offset, name in enumerate(("eager", "compile", "library")):
        values = [float(row[f"vs_{name}"] or 0) for row in rows]
        axes.barh([y + 0.27 * (offset - 1) for y in range(len(rows))], values, height=0.25, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['op']} {row['shape']} {row['direction']}" for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="speed-up of the Triton kernel, times", title=rows[0]["gpu"])
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(folder / "kernels.png", dpi=150)
    pyplot.close(figure)


def about_machine(top):
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = torch.version.hip or "unknown"
    versions = dict(driver=driver, torch=torch.__version__, triton=triton.__version__)
    ceilings = dict(copy_tb_per_s=top.copy / 1e12, matmul_tflop_per_s=top.matmul / 1e12)
    return dict(gpu=torch.cuda.get_device_name(), **versions, **ceilings)


def show(row, columns):
    cells = (row[name] for name in columns)
    return "".join((f"{x:.3f}" if isinstance(x, float) else str(x if x is not None else "-")).rjust(16) for x in cells)


def without_gpu(only):
    print("No GPU here: nothing is measured. Compiled ahead of time, instructions per element of a thread's hot loop:")
    print(test_compile.show(test_compile.table()))
    print("\nPredicted for one H100 (3.0 TB/s copy, 800 TFLOP/s bfloat16 matmul), not measured:")
    columns = ("op", "shape", "direction", "floor_ms", "predicted_ms")
    print("".join(name.rjust(24 if name in columns[:2] else 16) for name in columns))
    for case in cases():
        if only in case.op:
            times = f"{case.floor_ms(Ceilings()):16.3f}{case.predicted_ms(Ceilings()):16.3f}"
            print(f"{case.op:>24}{case.shape:>24}{case.direction:>16}{times}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operations whose name holds this (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks", help="folder for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        return without_gpu(args.only)
    kernels.use("triton")
    torch.manual_seed(0)
    top = measure_ceilings()
    about = about_machine(top)
    print(about)
    folder = args.out / about["gpu"].replace(" ", "_").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("op", "shape", "direction", "predicted_ms", "ours_ms", "share_of_floor", "peak_mib", "vs_eager",
               "vs_compile", "vs_library")  # fmt: skip
    print("".join(name.rjust(16) for name in columns))
    with (folder / "kernels.csv").open("w", newline="") as file:
        writer = None
        for case in cases():
            if args.only not in case.op:
                continue
            row = measure(case, top, about)
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(show(row, columns), flush=True)
            draw(folder)


if __name__ == "__main__":
    main()
