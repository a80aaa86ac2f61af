"""Kernels at the models' real sizes against eager PyTorch, torch.compile and the best library operation.

On a GPU: checks against float64, then times; rows go to benchmarks/<gpu>/kernels.csv as they come, kernels.png is drawn
from that file. --check: only the checks, of every case, into check.csv, then the kernels' tests. --tune: VARIANTS, that
is other tiles and decisions than the kernels', each in turn with those, into tune.csv. Predictions are made before
anything runs, from bytes and instruction counts. Without a GPU: the ahead-of-time table and the times that it predicts
for one H100.

    python tests/bench_kernels.py [--only swiglu] [--check | --tune] [--quick | --dry-run]
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark as bench  # noqa: E402 - needs the path above
from benchmark import Ceilings, compiled  # noqa: E402

import kernels  # noqa: E402

codebook, rms_norm_file, swiglu_file, rope_file, decode_file, linear_file, sampling_file, loss_file = (
    importlib.import_module(f"kernels.{name}")
    for name in ("codebook", "rms_norm", "swiglu", "rope_attention", "decode", "linear", "sampling", "cross_entropy")
)
FILES = {
    "nearest_code": codebook, "rms_norm": rms_norm_file, "dropout + residual + rms_norm": rms_norm_file,
    "swiglu": swiglu_file, "rope_attention": rope_file, "decode_attention": decode_file, "sample_codes": sampling_file,
    "linear_cross_entropy": loss_file, "skinny_linear": linear_file,
}
TESTS = ("kernels", "rope_attention", "decode", "linear", "sampling", "cross_entropy")  # that run on a GPU, too
SHARE_FWD, SHARE_BWD = 0.92, 0.85  # of the copy bandwidth, the targets
EPS = 1e-5
# by (D, l2), on sm_90: half-rate instructions per pair and executed depth, from tests/test_compile.py; instructions of
# a warp that one vector's rescan costs, from a simulation on random codes
SEARCH = {(8, True): (1.44, 32, 67), (256, False): (6.08, 768, 1090)}
# by head and whether keys are turned inside: instructions per score of fwd, dq, dkv on sm_90, without padding
ATTENTION = {(64, True): (10.9, 10.3, 12.4), (64, False): (8.0, 7.8, 9.8), (100, False): (11.6, 10.8, 16.2)}
RIVALS = ("flash", "cudnn", "efficient", "flex", "prefix")


@dataclasses.dataclass
class Sizes:
    """Tokens and widths of GPT-L, XL and XXL; attention: B, T, H, D; decoding: B, S, position, H, D."""

    tokens: int = 65536
    searches: tuple = ((32768, 16384, 8, True), (262144, 16384, 8, True), (262144, 1024, 256, False))
    widths: tuple = (1024, 1280, 1536)
    hidden: tuple = (2816, 3584, 4096)
    attention: tuple = ((64, 256, 16, 64), (64, 576, 16, 64), (64, 1024, 16, 64), (32, 576, 32, 100))
    decode: tuple = (  # 8 images with guidance, late and halfway, one image, many
        (16, 256, 255, 16, 64), (16, 256, 128, 16, 64), (16, 576, 288, 32, 100), (2, 576, 288, 32, 100),
        (256, 256, 128, 16, 64),
    )
    linear: tuple = (  # rows, blocks, width, hidden width: GPT-L, 3B
        (16, 8, 1024, 2816), (32, 8, 1024, 2816), (16, 2, 3200, 8704),
    )
    sampling: tuple = ((8, 16384), (128, 16384))
    loss: tuple = (1024, 16384)


TINY = Sizes(64, ((96, 128, 8, True), (96, 32, 256, False)), (48,), (24,), ((2, 16, 2, 16),), ((4, 16, 9, 2, 16),),
             ((4, 2, 32, 48),), ((2, 512),), (32, 96))


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
    exact: Callable | None = None  # what check compares with, where eager draws random numbers of its own
    rivals: dict = dataclasses.field(default_factory=dict)  # more contenders, by a name of RIVALS
    tolerance: float = 2e-2
    latency_ms: float = 0  # predicted beside bytes and FLOPs
    passes: float = 0  # bytes moved beside the products, before or after them
    captured: bool = False  # timed as the replay of a CUDA graph, which is how the sampler runs it
    targets: dict = dataclasses.field(default_factory=dict)  # by column: ours_ms at most, the others at least

    @property
    def key(self):
        return dict(op=self.op, shape=self.shape, dtype=self.dtype, direction=self.direction)

    @property
    def shown(self):
        """Whether the README's table has it."""
        return (self.op, self.shape, self.direction) in [key for _, _, keys, _ in README for key in keys]

    def floor_ms(self, top):
        return 1e3 * max(self.bytes / top.copy, self.flops / top.matmul)

    def predicted_ms(self, top):
        if self.attention:
            return self.predicted_attention_ms(top)
        if not self.search:
            share = SHARE_BWD if "bwd" in self.direction else SHARE_FWD
            return self.floor_ms(top) / share + self.latency_ms + 1e3 * self.passes / top.copy
        N, K, D, l2 = self.search  # maxima and tensor cores one after the other; FMNMX issues every second cycle
        half, depth, rescan = SEARCH[D, l2]
        issue = top.multiprocessors * 4 * top.clock
        return 1e3 * (N * K * half * 2 / 32 / issue + 2 * N * K * depth / top.matmul + N * rescan / issue)

    def predicted_attention_ms(self, top):
        """Memory, or tensor cores and other instructions one after the other, and the pass that turns keys before."""
        B, T, H, D = self.attention
        wide, inside = 64 if D <= 64 else 128, rope_file.rotates_inside(T, D, 1, False, "sm_90")
        scores = B * H * T * (T + 128) / 2  # blocks on the diagonal are computed whole
        counts, products = ATTENTION[64 if wide == 64 else 100, inside], (4, 6, 8)
        parts = {"fwd": (0,), "bwd": (1, 2), "fwd+bwd": (0, 1, 2)}[self.direction]
        ms = sum(
            1e3 * scores * (counts[i] / 32 / (top.multiprocessors * 4 * top.clock) + products[i] * wide / top.matmul)
            for i in parts
        )
        turned = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[self.direction] * (not inside)  # k; q and k
        pass_ms = 1e3 * turned * 4 * B * T * H * D / top.copy / SHARE_BWD
        return max(ms, 1e3 * self.bytes / top.copy / SHARE_BWD) + pass_ms

    def seconds(self, quick, check):
        """What its row takes on an H100, estimated: checks, timing, and torch.compile for some."""
        if quick or check:
            return 1.5
        contenders = 2 + len(self.rivals) + bool(self.library)
        uses_compile = 1 + len(self.rivals) + (self.op == "decode_attention")
        each = (6 if self.attention else 3) if "bwd" in self.direction else 2.5
        return 1 + 0.7 * contenders + each * uses_compile


def rms_cases(sizes):
    """The plain norm in bfloat16, and what training runs: dropout and residual, x in bfloat16, the sum in float32."""
    tokens, dropout = sizes.tokens, 0.1

    def library(x, weight, residual=None):
        s = x if residual is None else F.dropout(x, dropout) + residual
        y = F.rms_norm(s, (s.shape[-1],), weight.to(s.dtype), EPS).to(x.dtype)
        return y if residual is None else (y, s)

    def ours(x, weight, *residual):
        return kernels.rms_norm(x, weight, EPS, *residual, dropout=dropout * len(residual))

    def eager(x, weight, *residual):
        return rms_norm_file.rms_norm_ref(x, weight, EPS, *residual, dropout=dropout * len(residual))

    def exact(x, weight, *residual):
        """What `ours` has to give when it starts from seed 0: the elements that it keeps show on ones."""
        if residual:
            torch.manual_seed(0)
            ones = torch.ones(x.shape, dtype=torch.bfloat16, device=x.device)
            x = x * (ours(ones, ones[0], 0 * ones)[1] != 0) / (1 - dropout)
        return rms_norm_file.rms_norm_ref(x, weight, EPS, *residual)

    for W in sizes.widths:
        for add, direction in ((False, "fwd"), (True, "fwd"), (False, "bwd"), (True, "bwd")):

            def make(W=W, add=add):
                x, dy = (torch.randn(tokens, W, device=bench.DEVICE, dtype=torch.bfloat16) for _ in range(2))
                stream = [torch.randn(tokens, W, device=bench.DEVICE) for _ in range(2 * add)]  # residual, ds
                return [x, torch.rand(W, device=bench.DEVICE) + 0.5, *stream[:1]], [dy, *stream[1:]]

            # x, y; x, residual, s, y; dy, x, dx; dy, ds, s, the gradient in both dtypes
            size = {"fwd": (2 + 2, 2 + 4 + 4 + 2), "bwd": (2 + 2 + 2, 2 + 4 + 4 + 4 + 2)}[direction][add]
            yield Case(
                "dropout + residual + " * add + "rms_norm", f"{tokens}x{W}", "bfloat16" + "+float32" * add, direction,
                make, ours, eager, library, size * tokens * W, exact=exact,
                targets=dict(share_of_floor=SHARE_FWD, vs_eager=7, vs_library=1) if direction == "fwd" else
                dict(share_of_floor=SHARE_BWD, vs_eager=7, vs_library=1.2),
            )


def swiglu_cases(sizes):
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def library(x):
            return LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, -1)))
    except ImportError:
        library = None
    tokens = sizes.tokens
    for H in sizes.hidden:
        for direction, passes in (("fwd", 3), ("bwd", 5)):

            def make(H=H):
                x = torch.randn(tokens, 2 * H, device=bench.DEVICE, dtype=torch.bfloat16)
                return [x], [torch.randn_like(x[:, :H])]

            yield Case(
                "swiglu", f"{tokens}x{H}", "bfloat16", direction, make, kernels.swiglu, swiglu_file.swiglu_ref, library,
                passes * tokens * H * 2,
                targets=dict(share_of_floor=SHARE_FWD if direction == "fwd" else SHARE_BWD, vs_eager=2.5, vs_compile=1),
            )


def distances(z, codes):
    """The N x K matrix, as LlamaGen's quantizer makes it."""
    d = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * torch.einsum("nd,kd->nk", z, codes)
    return d.argmin(1)


def search_cases(sizes):
    targets = {32768: dict(ours_ms=0.13), 262144: dict(ours_ms=0.9, vs_eager=40, vs_compile=10)}
    for N, K, D, l2 in sizes.searches:

        def make(N=N, K=K, D=D, l2=l2):
            z, codes = (torch.randn(n, D, device=bench.DEVICE) for n in (N, K))
            return ([F.normalize(z, dim=1), F.normalize(codes, dim=1)] if l2 else [z, codes]), None

        yield Case(
            "nearest_code", f"{N}x{K} D={D}", "float32", "fwd", make, functools.partial(kernels.nearest_code, l2=l2),
            distances, functools.partial(codebook.nearest_code_ref, l2=l2), N * (D * 4 + 8),
            2 * N * K * SEARCH[D, l2][1], (N, K, D, l2),
            targets=targets.get(N, {}) if D == 8 else dict(ours_ms=1.4, vs_eager=3.5),
        )


def with_backend(name, fn):
    """fn compiled, with one backend of scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend, fast = getattr(SDPBackend, f"{name.upper()}_ATTENTION"), compiled(fn)

    def call(*inputs):
        with sdpa_kernel(backend):
            return fast(*inputs)

    return call


def attention_cases(sizes):
    for B, T, H, D in sizes.attention:
        yield from attention_case(B, T, H, D)


def attention_case(B, T, H, D):
    where = {}  # the table of angles and the block mask, made with the inputs

    def make():
        from torch.nn.attention.flex_attention import create_block_mask

        frequencies = 10000.0 ** -torch.arange(0, 1, 2 / D, device=bench.DEVICE)
        angles = torch.outer(torch.arange(T, device=bench.DEVICE), frequencies)
        where["table"] = angles.cos(), angles.sin()
        where["mask"] = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=bench.DEVICE)
        qkv = torch.randn(B, T, 3 * H * D, device=bench.DEVICE, dtype=torch.bfloat16)
        return [qkv], [torch.randn(B, T, H * D, device=bench.DEVICE, dtype=torch.bfloat16)]

    def ours(qkv):
        return kernels.rope_attention(qkv, *where["table"], H)

    def sdpa(qkv):
        return rope_file._rope_attention_sdpa(qkv, *where["table"], H, H, None)

    def flex(qkv):
        from torch.nn.attention.flex_attention import flex_attention

        heads = rope_file._heads(qkv, *where["table"], H, H)
        return flex_attention(*heads, block_mask=where["mask"]).transpose(1, 2).flatten(2)

    rivals = {name: functools.partial(with_backend, name, sdpa) for name in RIVALS[:3]}
    rivals["flex"] = functools.partial(compiled, flex)
    size, scores = B * T * H * D, B * H * T * (T + 1) / 2
    targets = {256: dict(fwd=dict(ours_ms=0.12, vs_flash=1.3)),
               1024: {"fwd": dict(tflop_per_s=280), "fwd+bwd": dict(tflop_per_s=200)}}
    for direction, passes, products in (("fwd", 4, 4), ("fwd+bwd", 12, 14)):
        yield Case(
            "rope_attention", f"{B}x{T}x{H}x{D}", "bfloat16", direction, make, ours, sdpa, None,
            passes * size * 2, products * scores * D, attention=(B, T, H, D), rivals=rivals,
            targets=targets.get(T, {}).get(direction, {}) if D == 64 else {},
        )


def decode_cases(sizes):
    """One token per row. 2 us are for trips to memory."""
    for B, S, t, H, D in sizes.decode:
        padded, where = -(-D // 8) * 8, {}

        def make(B=B, S=S, t=t, H=H, D=D, padded=padded, where=where):
            angles = torch.randn(S, D // 2, device=bench.DEVICE)
            where.update(table=(angles.cos(), angles.sin()), position=torch.tensor([t], device=bench.DEVICE))
            where["seen"] = torch.arange(S, device=bench.DEVICE) <= t
            caches = [torch.randn(B, H, S, padded, device=bench.DEVICE, dtype=torch.bfloat16) for _ in range(2)]
            return [torch.randn(B, 3 * H * D, device=bench.DEVICE, dtype=torch.bfloat16), *caches], None

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
            compiled(functools.partial(sdpa, end=None)), 4 * B * H * t * padded, 4 * B * H * t * D,
            rivals=dict(prefix=lambda sdpa=sdpa, t=t: compiled(functools.partial(sdpa, end=t + 1))),
            latency_ms=2e-3, captured=True,
        )


def linear_cases(sizes):
    """The products of blocks one after the other, as a step of the sampler has them, with their norms, SwiGLU and
    residual adds, from weights that no cache holds. Queries stand for what attention gives. The library: cuBLAS between
    our kernels for the rest."""

    def chain(linear, x, qkv, o, w13, w2, norms):
        x, lengths = x.clone(), None  # residuals may be written to
        for i in range(len(qkv)):
            y = linear(x, qkv[i], norms[i, 0], EPS, lengths)
            x, lengths = linear(y[:, : x.shape[1]], o[i], residual=x)
            y = linear(x, w13[i], norms[i, 1], EPS, lengths, gated=True)
            x, lengths = linear(y, w2[i], residual=x)
        return x

    def without_lengths(fn):
        def linear(x, weight, norm=None, eps=0.0, lengths=None, residual=None, gated=False):
            y = fn(x, weight, norm, eps, residual, gated)
            return y if residual is None else (y, None)

        return functools.partial(chain, linear)

    for M, blocks, C, H in sizes.linear:

        def make(M=M, blocks=blocks, C=C, H=H):
            shapes = (M, C), (blocks, 3 * C, C), (blocks, C, C), (blocks, 2 * H, C), (blocks, C, H), (blocks, 2, C)
            scales = 1, *(shape[-1] ** -0.5 for shape in shapes[1:5]), 1
            made = zip(scales, shapes, strict=True)
            return [(a * torch.randn(s, device=bench.DEVICE)).bfloat16() for a, s in made], None

        weights = blocks * (4 * C * C + 3 * C * H)
        yield Case(
            "skinny_linear", f"{M} rows, {blocks}x{C}x{H}", "bfloat16", "fwd", make,
            functools.partial(chain, kernels.skinny_linear), without_lengths(linear_file.skinny_linear_ref),
            without_lengths(linear_file._one_by_one), 2 * weights, 2 * M * weights,
            latency_ms=(4 * blocks + 1) * bench.KERNEL_MS, captured=True, tolerance=5e-2,
        )


def sampling_cases(sizes):
    """Guided rows of logits against topk, a sort and a multinomial draw, LlamaGen's way; bound by latency."""

    def sorted_draw(logits, noise, index, top_p):
        cond, uncond = logits.float().chunk(2)
        x = uncond + (cond - uncond) * 2.0
        x = x.masked_fill(x < x.topk(min(2000, x.shape[1] // 2)).values[:, -1:], -torch.inf)
        if top_p < 1:
            x, order = x.sort(descending=True)
            mass = x.softmax(-1).cumsum(-1)
            x = x.masked_fill(mass - x.softmax(-1) >= top_p, -torch.inf).scatter(1, order, x)
        p = x.softmax(-1)
        return (p / torch.empty_like(p).exponential_(1)).argmax(-1).repeat(2)  # multinomial, without its checks

    for B, V in sizes.sampling:
        for top_p, latency in ((1.0, 17e-3), (0.9, 40e-3)):

            def make(B=B, V=V):
                logits = 3 * torch.randn(2 * B, V, device=bench.DEVICE, dtype=torch.bfloat16)
                return [logits, torch.rand(B, 576, device=bench.DEVICE), torch.tensor([7], device=bench.DEVICE)], None

            def with_settings(fn, top_p=top_p):
                return lambda logits, noise, index: fn(
                    logits, noise, index, cfg_scale=2.0, top_k=2000, top_p=top_p, guided=True
                )

            yield Case(
                "sample_codes", f"{2 * B}x{V} top-k" + " top-p" * (top_p < 1), "bfloat16", "fwd", make,
                with_settings(kernels.sample_codes), with_settings(sampling_file.sample_codes_ref),
                functools.partial(sorted_draw, top_p=top_p), 4 * B * V, latency_ms=latency, captured=True,
            )


def loss_bytes(N, C, V):
    """What linear_cross_entropy moves beside its products: the logits, once in and once out; dw, for every chunk added
    in float32, zeroed at first, in the end scaled and cast; dx, scaled."""
    chunks = -(-N // (loss_file.CHUNK // V))
    return 4 * N * V + (12 * chunks + 18) * V * C + 4 * N * C


def loss_cases(sizes):
    """Output product and loss with their gradients: three products, and passes over the logits and the gradients."""
    (C, V), N, where = sizes.loss, sizes.tokens, {}

    def make():
        where["targets"] = torch.randint(V, (N,), device=bench.DEVICE)
        x = torch.randn(N, C, device=bench.DEVICE, dtype=torch.bfloat16)
        weight = 0.05 * torch.randn(V, C, device=bench.DEVICE, dtype=torch.bfloat16)
        return [x, weight], [torch.ones((), device=bench.DEVICE)]

    def with_targets(fn):
        return lambda x, weight: fn(x, weight, where["targets"][: len(x)])

    yield Case(
        "linear_cross_entropy", f"{N}x{C}x{V}", "bfloat16", "fwd+bwd", make, with_targets(kernels.linear_cross_entropy),
        with_targets(loss_file.linear_cross_entropy_ref), None, 4 * (N * C + V * C), 6 * N * C * V,
        passes=loss_bytes(N, C, V), targets=dict(share_of_floor=0.8, vs_eager=1.8),
    )


def cases(sizes=None):
    """All of them, those of the README's table first."""
    families = (search_cases, rms_cases, swiglu_cases, attention_cases, decode_cases, linear_cases, sampling_cases,
                loss_cases)
    found = [case for family in families for case in family(sizes or Sizes())]
    return sorted(found, key=lambda case: not case.shown)


# The rows of the README's table: what is shown, bound, cases, and the most registers on sm_90 of kernels whose names
# match (tests/test_compile.py compares; rows of 768 have the tiles of 1,024)
README = (
    ("codebook search, 262,144 vectors x 16,384 codes, D 8: float16 hi/lo parts on tensor cores, exact rescan; "
     "2.0 instructions per pair", "one maximum per pair", [("nearest_code", "262144x16384 D=8", "fwd")],
     {"nearest_code l2 D=8": 110}),
    ("codebook search, 32,768 x 16,384, D 8", "the same", [("nearest_code", "32768x16384 D=8", "fwd")],
     {"nearest_code l2 D=8": 110}),
    ("codebook search, 262,144 x 1,024, D 256", "tensor cores", [("nearest_code", "262144x1024 D=256", "fwd")],
     {"nearest_code euclid D=256": 211}),
    ("RMSNorm, 65,536 x 1,024, bfloat16, forward / backward", "memory",
     [("rms_norm", "65536x1024", direction) for direction in ("fwd", "bwd")],
     {"rms_norm fwd W=768 bfloat16": 60, "rms_norm bwd W=768 bfloat16": 80}),
    ("dropout + residual add + RMSNorm as training runs them (float32 stream), forward / backward", "memory",
     [("dropout + residual + rms_norm", "65536x1024", direction) for direction in ("fwd", "bwd")],
     {r"rms_norm fwd W=768 bfloat16 \+ float32, dropout": 96,
      r"rms_norm bwd W=768 bfloat16 \+ float32, dropout": 86}),
    ("SwiGLU, 65,536 x 2,816, forward / backward", "memory",
     [("swiglu", "65536x2816", direction) for direction in ("fwd", "bwd")],
     {"swiglu fwd H=2048 bfloat16": 32, "swiglu bwd H=2048 bfloat16": 48}),
    ("RoPE attention, batch 64, 16 heads of 64, T 256, forward", "memory",
     [("rope_attention", "64x256x16x64", "fwd")], {"attention fwd D=64 inside": 255}),
    ("the same, T 1,024, forward / both ways", "memory / tensor cores",
     [("rope_attention", "64x1024x16x64", direction) for direction in ("fwd", "fwd+bwd")],
     {"attention fwd D=64": 255, "attention (dq|dkv) D=64": 218}),
    ("decoding: 16 rows of GPT-L, rotation, cache write and attention over 256 keys; heads of 64 / 100", "memory",
     [("decode_attention", "16x255/256x16x64", "fwd")], {"decode D=64 bfloat16": 96, "decode D=100 bfloat16": 96}),
    ("the products of 8 blocks of GPT-L for 16 rows, norm, SwiGLU and residual add within them", "memory",
     [("skinny_linear", "16 rows, 8x1024x2816", "fwd")], {"linear M=16 K=(1024|2816) bfloat16 .*": 112}),
    ("sampling: guidance, top-k, top-p and the draw, rows of 16,384", "latency",
     [("sample_codes", "16x16384 top-k top-p", "fwd")], {"draw V=16384 bfloat16 guided top-k top-p": 124}),
    ("output product and cross-entropy in chunks, 65,536 x 1,024 x 16,384, both ways", "tensor cores",
     [("linear_cross_entropy", "65536x1024x16384", "fwd+bwd")], {r"loss V=16384 bfloat16 \+ gradient": 61}),
)


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
    """Ours against float64 (indices: against float64 distances of a sample); returns the relative RMS error."""
    got = step(case.ours, inputs, upstream, case.direction)()
    if case.search:
        z, codes = inputs[0][:4096].double(), inputs[1].double()
        true = (z @ codes.t() - (0 if case.search[3] else codes.square().sum(1) / 2)).argmax(1)
        assert torch.equal(got[:4096], true), f"{(got[:4096] != true).sum()} of 4096 differ from float64"
        return 0.0
    if case.op == "sample_codes":  # exp rounds otherwise in PyTorch: a draw at the edge of two codes may differ
        same = (got == case.eager(*inputs)).float().mean().item()
        assert same > 0.99, f"{same:.2%} of the codes are those of the PyTorch path"
        return 0.0
    rows = 2 if case.attention else min(len(inputs[0]) // 2, 4096)
    fewer = case.op != "decode_attention"  # of the first dimension; weights stay whole
    part = [x[:rows] if fewer and len(x) == len(inputs[0]) else x for x in inputs]
    grads = upstream and [g[:rows] if fewer and g.dim() else g for g in upstream]
    torch.manual_seed(0)
    got = step(case.ours, part, grads, case.direction)()
    exact, doubles = case.exact or case.eager, [x.double() for x in part]
    true = step(exact, doubles, grads and [g.double() for g in grads], case.direction)()
    errors = [0.0]
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, true)), strict=True):
        worst, error = (a - b).abs().max() / b.abs().max(), (a - b).norm() / b.norm()
        assert worst <= case.tolerance and error <= case.tolerance / 2, f"error {error:.2e}, at worst {worst:.2e}"
        errors.append(error.item())
    return max(errors)


def replay(call):
    """What runs call on a GPU without the host: a captured CUDA graph of it.

    RuntimeError for a call that waits for the GPU, before it is captured: after a capture that failed, the allocator of
    some PyTorch versions (2.11) refuses to free memory, and the rows to come would fail as well.
    """
    if bench.DEVICE != "cuda":
        return call
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # comes back to it after a failure
        call()
    return graph.replay


def time_one(make, inputs, upstream, direction, captured, rep):
    """p50, p20, p80 in ms and the peak memory in MiB above the inputs."""
    call = step(make(), inputs, upstream, direction)
    call()  # compiles
    peak = bench.peak_mib(call)
    call = replay(call) if captured else call
    return *bench.time_ms(call, rep), peak


def measure(case, top, quick=False, only_check=False):
    inputs, upstream = case.make()
    row = dict(floor_ms=case.floor_ms(top), predicted_ms=case.predicted_ms(top), error=check(case, inputs, upstream))
    if only_check:
        return row
    contenders = dict(ours=lambda: case.ours, eager=lambda: case.eager)
    if not quick:
        contenders |= dict(compile=lambda: compiled(case.eager)) | case.rivals
        contenders |= dict(library=lambda: case.library) if case.library else {}
    times, failed = {}, []
    for name, make in contenders.items():
        bench.release_memory()  # what was compiled for one backend of attention is not for the next
        try:
            times[name] = time_one(make, inputs, upstream, case.direction, case.captured, 100 if quick else 300)
        except Exception as error:  # a rival that does not run or fit here
            if name == "ours":
                raise
            failed.append(name)
            print(f"  {case.op} {case.shape}, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    row.update(zip(("ours_ms", "p20_ms", "p80_ms", "peak_mib"), times["ours"], strict=True))
    row["share_of_floor"] = row["floor_ms"] / row["ours_ms"]
    row["gb_per_s"], row["tflop_per_s"] = case.bytes / row["ours_ms"] / 1e6, case.flops / row["ours_ms"] / 1e9
    for name in ("eager", "compile", "library", *RIVALS):
        ms, _, _, peak = times.get(name) or (None,) * 4
        row.update({f"{name}_ms": ms, f"{name}_peak_mib": peak, f"vs_{name}": ms and ms / row["ours_ms"]})
    row["failed"] = ", ".join(failed)
    row["targets"] = ", ".join(f"{name} {value:g}" for name, value in case.targets.items())
    row["missed"] = ", ".join(missed(case, row)) if bench.DEVICE == "cuda" else ""
    return row


def missed(case, row):
    """The targets that a row misses, of those that it has a figure for."""
    for name, value in case.targets.items():
        if row[name] is not None and (row[name] > value if name.endswith("_ms") else row[name] < value):
            yield name


def never(*_):
    return False


def always(*_):
    return True


# What --tune tries, of what compiled for sm_90 without spills: by operation and kernel of attention ("": all), names of
# its file or constants of its launches. rotates_inside is false at T 1,024 and true at 256: forcing that value changes
# nothing, and such rows show the noise
VARIANTS = (
    ("nearest_code", "", dict(num_warps=4, BLOCK_M=64)),
    ("nearest_code", "", dict(BLOCK_M=64)),
    ("rms_norm", "", dict(BLOCK_M=1)),
    ("rms_norm", "", dict(num_warps=8)),
    ("dropout + residual + rms_norm", "", dict(BLOCK_M=1)),
    ("dropout + residual + rms_norm", "", dict(num_warps=8)),
    ("swiglu", "", dict(BLOCK_M=4, num_warps=8)),
    ("swiglu", "", dict(BLOCK_M=1)),
    ("rope_attention", "", dict(rotates_inside=never)),
    ("rope_attention", "", dict(rotates_inside=always)),
    ("rope_attention", "fwd", dict(BLOCK_N=128, num_warps=8, num_stages=2)),
    ("rope_attention", "fwd", dict(num_warps=8)),
    ("rope_attention", "dq", dict(BLOCK_N=128)),
    ("rope_attention", "dq", dict(BLOCK_M=64, num_warps=4)),
    ("rope_attention", "dkv", dict(BLOCK_N=64, num_warps=4)),
    ("rope_attention", "dkv", dict(num_stages=1)),
    ("decode_attention", "", dict(BLOCK_N=32)),
    ("decode_attention", "", dict(BLOCK_N=128, num_warps=8)),
    ("skinny_linear", "", dict(BLOCK_N=32)),
    ("skinny_linear", "", dict(BLOCK_K=128, STAGES=6)),
    ("skinny_linear", "", dict(STAGES=3)),
    ("skinny_linear", "", dict(BLOCK_K=512, STAGES=3)),
    ("sample_codes", "", dict(num_warps=8)),
    ("linear_cross_entropy", "", dict(num_warps=4)),
    ("linear_cross_entropy", "", dict(CHUNK=2**28)),
)


@contextlib.contextmanager
def varied(file, kernel, changes):
    """One of VARIANTS, while it lasts."""
    launch_config, before = file.launch_config, {name: vars(file)[name] for name in changes if name in vars(file)}
    constants = {name: value for name, value in changes.items() if name not in before}

    def changed(*args, **others):
        return launch_config(*args, **others) | (constants if kernel in ("", args[0]) else {})

    vars(file).update({name: changes[name] for name in before}, launch_config=changed)
    try:
        yield
    finally:
        vars(file).update(before, launch_config=launch_config)


def describe(kernel, changes):
    said = (f"{name} {getattr(value, '__name__', value)}" for name, value in changes.items())
    return " ".join(filter(None, (kernel, *said)))


def tuning_plan(sizes, rep=100):
    """(key, estimated seconds, what measures the rest of a row) for every case of the README that a variant is for."""
    for case in cases(sizes):
        for op, kernel, changes in VARIANTS:
            variant = dict(variant=describe(kernel, changes))
            direction = "fwd" if kernel == "fwd" else "fwd+bwd" if kernel else case.direction
            if op == case.op and direction == case.direction and (sizes or case.shown):
                yield case.key | variant, 2.5, functools.partial(measure_variant, case, kernel, changes, rep)


def measure_variant(case, kernel, changes, rep):
    """The variant in turn with what the kernels launch with, two times each: ms, and how many times as fast it is."""
    inputs, upstream = case.make()
    with varied(FILES[case.op], kernel, changes):
        row, times = dict(error=check(case, inputs, upstream)), {True: [], False: []}
    for new in (False, True, False, True):
        with varied(FILES[case.op], kernel, changes) if new else contextlib.nullcontext():
            times[new].append(time_one(lambda: case.ours, inputs, upstream, case.direction, case.captured, rep)[0])
    usual, variant = min(times[False]), min(times[True])
    return row | dict(usual_ms=usual, variant_ms=variant, times_as_fast=usual / variant)


def draw(rows, path):
    label = "{op} {shape} {direction}".format_map
    series = dict(vs_eager="eager PyTorch", vs_compile="torch.compile", vs_library="library")
    bench.bars(rows, label, series, path, "speed-up of our kernel, times")


def run_tests(seconds):
    """The kernels' own tests on the GPU: odd sizes, strides, every dtype. Returns the exit code."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    try:
        return subprocess.run([sys.executable, "-m", "pytest", *workers, *files], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"the kernels' tests did not end within {seconds:.0f} s")
        return 1


def without_gpu(only):
    import test_compile

    print("No GPU here: nothing is measured. Compiled ahead of time, instructions per element of a thread's hot loop:")
    print(test_compile.show(test_compile.table()))
    print("\nPredicted for one H100 (3.0 TB/s copy, 800 TFLOP/s bfloat16 matmul), not measured:")
    columns = ("op", "shape", "direction", "floor_ms", "predicted_ms")
    print("".join(name.rjust(24 if name in columns[:2] else 16) for name in columns))
    for case in cases():
        if only in case.op:
            times = f"{case.floor_ms(Ceilings()):16.3f}{case.predicted_ms(Ceilings()):16.3f}"
            print(f"{case.op:>24}{case.shape:>24}{case.direction:>16}{times}")


def main(words=None):
    parser = bench.parser(__doc__)
    parser.add_argument("--only", default="", help="operations whose name holds this (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with float64 and run the tests; nothing is timed")
    what.add_argument("--tune", action="store_true", help="other tiles and decisions than the kernels'")
    args = parser.parse_args(words)
    if not torch.cuda.is_available() and not args.dry_run:
        return without_gpu(args.only)
    name = "check" if args.check else "tune" if args.tune else "kernels"
    run = bench.Run(args, name, draw if name == "kernels" else None)

    def plan(sizes):
        if args.tune:
            return [row for row in tuning_plan(sizes, 20 if args.quick else 100) if args.only in row[0]["op"]]
        return [
            (case.key, case.seconds(args.quick, args.check),
             functools.partial(measure, case, run.top, args.quick, args.check))
            for case in cases(sizes)
            if args.only in case.op and (not args.quick or sizes or case.shown)
        ]

    columns = ("op", "shape", "direction", "variant", "error", "predicted_ms", "usual_ms", "variant_ms",
               "times_as_fast", "ours_ms", "share_of_floor", "peak_mib", "vs_eager", "vs_compile", "vs_library",
               "missed")
    failed = run.measure(plan(None), columns, plan(TINY))
    if args.check and not args.quick and not args.dry_run and not args.only:
        failed = run_tests(max(60 * args.minutes - (time.monotonic() - run.began), 10)) or failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
