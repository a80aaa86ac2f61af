"""Every kernel and configuration that may be picked, compiled ahead of time for four GPUs; needs none of them.

Checked: no spills, shared memory that also the smaller cards of a family have, tensor-core instructions in the codebook
search and in attention, copies of 16 bytes of cached keys and values, few bank conflicts. `python
tests/test_compile.py [sm_90 ...]` takes all of them, in minutes, prints the table, and fails where pytest would, which
takes HEAVY on sm_90 and a search for sm_100, and where figures that were taken from sm_90 are others now.
"""

import collections
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import ptx
import pytest
from ptx import TARGETS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 101376, "sm_100": 101376, "gfx942": 65536}  # 99 KiB: RTX cards too
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SASS_MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
CODE_DIMS = (8, 16, 32, 64, 128, 256)
# Other dtypes, and odd sizes as in the tests, have tiles like these: for them sm_90 stands for all four.
MORE_SEARCHES = ((4, "float32", True), (4, "bfloat16", True), (4, "float16", False), (8, "bfloat16", True),
                 (100, "float32", False), (100, "bfloat16", True), (100, "float16", False))
WIDTHS = (128, 768, 1280, 3200, 8192)  # tiny, B and L, XL to 1B, XXXL to 7B, and the widest supported
ODD_WIDTHS = (1, 7, 32, 97, 200)
HIDDEN = (384, 2048)  # tiny, and B to 7B
ODD_HIDDEN = (3, 48, 1031)
TOKENS, CODES = 65536, 16384
HEADS = ((64, 16), (100, 32), (128, 32))  # channels of a head, heads: L, 3B, 7B
HEAVY = (  # names: every kernel, in the configurations that leave little room
    r"nearest_code l2 D=8", r"nearest_code l2 D=32", r"nearest_code euclid D=64",
    r"nearest_code euclid D=256", r"pack D=256",
    r"rms_norm (fwd|bwd) W=8192 bfloat16 \+ float32, dropout", r"swiglu (fwd|bwd) H=2048 bfloat16",
    r"attention (fwd|dq|dkv) D=64( inside)?", r"attention (fwd|dkv) D=100 padded", r"attention dq D=100 (padded|odd)",
    r"attention (fwd|dq|dkv) D=128 grouped", r"attention (fwd|dq|dkv) D=128 float32", r"rotate D=64",
    r"decode D=64 bfloat16", r"decode D=100 bfloat16 in 2 padded", r"add parts D=100",
    r"draw V=16384 bfloat16 guided top-k top-p", r"draw greedy", r"loss V=50257 bfloat16 \+ gradient",
    r"linear M=(16|32) K=1024 bfloat16 norm gated",
)


def cases(target):
    """(name, kernel, arguments, constants, elements per thread of the hot part, its inner trips) of every launch."""
    for family in (search_cases, rms_norm_cases, swiglu_cases, attention_cases, decode_cases, linear_cases,
                   sampling_cases, loss_cases):
        yield from family(target)


def threads(config, target):
    return config["num_warps"] * TARGETS[target][2]


def search_cases(target):
    file, f32 = importlib.import_module("kernels.codebook"), "float32"
    searches = [(D, f32, l2) for D in CODE_DIMS for l2 in (True, False)]
    searches += MORE_SEARCHES if target == "sm_90" else ()
    for D, dtype, l2 in searches:
        config = file.launch_config(D, target)
        args = (dtype, dtype, "float16", f32, f32, "int64", 262144, CODES, CODES)
        name = f"nearest_code {'l2' if l2 else 'euclid'} D={D}" + f" {dtype}" * (dtype != f32)
        pairs, trips = config["BLOCK_M"] * config["BLOCK_K"], max(config["PART"] // config["BLOCK_D"], 1)
        yield name, file._nearest_code_kernel, args, dict(config, D=D, L2=l2), pairs / threads(config, target), trips
    for D, dtype in dict.fromkeys((D, dtype) for D, dtype, _ in searches):
        part = file.launch_config(D)["PART"]
        pack = dict(D=D, PART=part, BLOCK_K=min(64, 1024 // part), num_warps=4)
        args = (dtype, f32, f32, "float16", f32, CODES)
        name = f"pack D={D}" + f" {dtype}" * (dtype != f32)
        yield name, file._pack_kernel, args, pack, pack["BLOCK_K"] * D / threads(pack, target), 1


def rms_norm_cases(target):
    """bfloat16 alone, and with the float32 stream of autocast; on sm_90 also the other pairs that models make."""
    file, f32, bf16 = importlib.import_module("kernels.rms_norm"), "float32", "bfloat16"
    # x, residual, whether the sum has a gradient of its own, dropout
    usual = ((bf16, None, False, False), (bf16, f32, True, False), (bf16, f32, True, True))
    more = ((f32, None, False, False), (f32, f32, True, False), (f32, f32, True, True), (bf16, bf16, True, False),
            (bf16, bf16, True, True), (bf16, f32, False, False), (bf16, f32, False, True))
    runs = [(W, *run) for W in WIDTHS for run in usual]
    if target == "sm_90":
        runs += [(W, *run) for W in WIDTHS[:-1] for run in more] + [(W, bf16, f32, True, True) for W in ODD_WIDTHS]
    for W, x, residual, ds, drop in runs:
        s, size = residual or x, (TOKENS, W, 1e-5, round(0.1 * 2**32))
        name = f"W={W} {x}" + f" + {residual}" * bool(residual) + ", dropout" * drop
        config = dict(file.launch_config(W, backward=False), DROP=drop)
        if ds or not residual:
            args, per = (x, s, f32, "int64", x, s, W, W, *size), config["BLOCK_M"] * W / threads(config, target)
            yield f"rms_norm fwd {name}", file._rms_norm_fwd_kernel, args, dict(config, ADD=bool(residual)), per, 1
        config = dict(file.launch_config(W, backward=True), DROP=drop)
        args, per = (x, s, s, f32, "int64", s, x, f32, W, W, W, *size), config["BLOCK_M"] * W / threads(config, target)
        name += ", last" * (bool(residual) and not ds)
        both = s != x or drop
        yield f"rms_norm bwd {name}", file._rms_norm_bwd_kernel, args, dict(config, ADD=ds, BOTH=both), per, 1


def swiglu_cases(target):
    file, f32, bf16 = importlib.import_module("kernels.swiglu"), "float32", "bfloat16"
    runs = [(H, bf16) for H in HIDDEN]
    if target == "sm_90":
        runs += [(H, f32) for H in HIDDEN] + [(H, bf16) for H in ODD_HIDDEN]
    for H, x in runs:
        config = file.launch_config(H)
        per = config["BLOCK_M"] * config["BLOCK_H"] / threads(config, target)
        yield f"swiglu fwd H={H} {x}", file._swiglu_fwd_kernel, (x, x, 2 * H, TOKENS, H), config, per, 1
        yield f"swiglu bwd H={H} {x}", file._swiglu_bwd_kernel, (x, x, x, H, 2 * H, TOKENS, H), config, per, 1


def attention_cases(target):
    """As `cases`: with turned keys, padded or not, or turning them inside; grouped; in float32; at odd lengths."""
    file, arch = importlib.import_module("kernels.rope_attention"), "hip" if target == "gfx942" else target
    inside = [(64, 16, 1, "bfloat16", True, False, 256)] if file.rotates_inside(256, 64, 1, False, arch) else []
    # captions and codes have an odd length
    usual = [(D, H, 1, "bfloat16", False, *run) for D, H in HEADS for run in ((True, 375), (False, 1024), (False, 375))]
    grouped = [(64, 16, 4, "bfloat16", False, False, 1024), (128, 16, 4, "bfloat16", False, True, 375)]
    exact = (128, 16, 1, "float32", False, True, 375)
    for D, H, group, dtype, turn, padding, T in [*usual, *inside, *grouped, exact]:
        W, f32, mark = (H + 2 * H // group) * D, "float32", "int64" if padding else "float32"
        kind = "inside" if turn else "grouped" if group > 1 else dtype if dtype == f32 else "padded" if padding else ""
        kind = kind or "odd" * (T % 2)
        six, numbers = (dtype,) * 3 + (f32, f32, mark), (T * W, W) * 3 + (T, H, group)
        for kernel, args in {
            "fwd": (*six, dtype, f32, *numbers), "dq": (*six, dtype, dtype, f32, f32, dtype, T * W, W, *numbers),
            "dkv": (*six, dtype, f32, f32, dtype, dtype, T * W, W, *numbers),
        }.items():
            config = dict(file.launch_config(kernel, D, group, dtype == f32, arch), TURN=turn, PADDING=padding)
            per = config["BLOCK_M"] * config["BLOCK_N"] / (config["num_warps"] * TARGETS[target][2])
            name = f"attention {kernel} D={D} {kind}".strip()
            yield name, getattr(file, f"_rope_attention_{kernel}_kernel"), args, config, per, 1
    args = ("bfloat16", "float32", "float32", "bfloat16", 3072 * 1024, 3072, 1024, 16)
    config = dict(D=64, BLOCK_T=32, BLOCK_D=64, num_warps=4)
    yield "rotate D=64", file._rotate_kernel, args, config, 32 * 64 / (4 * TARGETS[target][2]), 1


def decode_cases(target):
    """Whole prefixes and parts of them, padded or not, grouped; the kernel that adds parts."""
    file, f32, bf16 = importlib.import_module("kernels.decode"), "float32", "bfloat16"
    runs = [(D, H, 1, bf16, *run) for D, H in HEADS for run in ((1, False), (2, True))]
    if target == "sm_90":
        runs += [(D, H, 1, bf16, 1, True) for D, H in HEADS]
        runs += [(64, 16, 4, bf16, 4, False), (128, 32, 4, bf16, 1, False)]
        runs += [(D, 16, 1, f32, 1, True) for D in (64, 100, 128)] + [(D, 4, 1, bf16, 2, True) for D in (16, 32, 20)]
    S = 375  # an odd length, as of captions and 256 codes: strides are multiples of 8, not of 16
    for D, H, group, x, splits, padding in runs:
        padded, config = -(-D // 8) * 8, file.launch_config(D)
        part, strides = (f32 if splits > 1 else x,) * 3, [H // group * S * padded, S * padded, padded]
        args = (x, f32, f32, x, x, "int64", "int64", x, *part, (H + 2 * H // group) * D, S, H, group, *strides)
        config.update(PADDED=padded, SPLITS=splits, PADDING=padding)
        kind = f"D={D} {x}" + f" in {splits}" * (splits > 1) + " grouped" * (group > 1) + " padded" * padding
        per = config["BLOCK_N"] * config["BLOCK_D"] / threads(config, target)
        yield f"decode {kind}", file._decode_attention_kernel, args, config, per, 1
    for D in (64, 100):
        constants = dict(D=D, BLOCK_D=file.launch_config(D)["BLOCK_D"], SPLITS=4, num_warps=1)
        yield f"add parts D={D}", file._add_parts_kernel, (f32, f32, f32, bf16), constants, 4 * D / 32, 1


def linear_cases(target):
    """The products of a step of GPT-L, one by one or fused; of 3B; more rows; in float32."""
    import torch
    import triton

    file, bf16 = importlib.import_module("kernels.linear"), "bfloat16"
    L = [(1024, 3072, "norm"), (1024, 1024, "add"), (1024, 2816, "norm gated"), (2816, 1024, "add"),
         (1024, CODES, "norm")]
    runs = [(16, *sizes, bf16) for sizes in L] + [(32, *sizes, bf16) for sizes in L[:3]]
    runs += [(16, 3200, 8704, "norm gated", bf16), (16, 1024, 3072, "norm first", bf16),
             (16, 1024, 2816, "norm gated", "float32"), (32, 1024, 2816, "norm gated", "float32")]
    if target == "sm_90":
        runs += [(1, 768, 2304, "norm", bf16), (4, 97, 31, "norm gated", bf16), (16, 1024, 1024, "", bf16)]
    for M, K, N, kind, x in runs:
        told = dict(K=K, NORM="norm" in kind, ADD="add" in kind, GATED="gated" in kind)
        rows = 2 * N if told["GATED"] else N
        config = file.launch_config(M, rows, told["GATED"], getattr(torch, x))
        P = K // 16 if told["NORM"] and "first" not in kind else 1
        told["BLOCK_P"] = triton.next_power_of_2(P)
        per = config["BLOCK_N"] * config["BLOCK_K"] / threads(config, target)
        args = (x, x, x, "float32", x, x, "float32", K, N, M, rows, P, 1e-5)
        name = f"linear M={M} K={K}" + f" N={N}" * (N >= 8192) + f" {x} {kind}".rstrip()
        yield name, file._skinny_linear_kernel, args, dict(config, **told), per, 1


def sampling_cases(target):
    """A row of logits by every setting that compiles anew; on sm_90 in float32 and at small models' widths too."""
    file = importlib.import_module("kernels.sampling")
    runs = [(CODES, "bfloat16", True, *kept) for kept in ((False, False), (True, False), (True, True))]
    if target == "sm_90":
        runs += [(CODES, "float32", True, True, True), *((V, "bfloat16", False, True, True) for V in (100, 512, 4096))]
    for V, x, guided, top_k, top_p in runs:
        args = (x, "float32", "int64", "int64", V, 576, 64, 576, V, 2.0, 1.25, 2000, 0.9)
        config = dict(file.launch_config(V), GUIDED=guided, GREEDY=False, TOP_K=top_k, TOP_P=top_p)
        kind = " guided" * guided + " top-k" * top_k + " top-p" * top_p
        yield f"draw V={V} {x}{kind}", file._sample_codes_kernel, args, config, V / threads(config, target), 1
    config = dict(file.launch_config(CODES), GUIDED=True, GREEDY=True, TOP_K=False, TOP_P=False)
    args = ("bfloat16", "bfloat16", "int64", "int64", CODES, CODES, 64, CODES, CODES, 2.0, 1.0, 0, 1.0)
    yield "draw greedy", file._sample_codes_kernel, args, config, CODES / threads(config, target), 1


def loss_cases(target):
    """A row of logits, also of an odd width; on sm_90 in other dtypes and at small models' widths too."""
    file, runs = importlib.import_module("kernels.cross_entropy"), [(CODES, "bfloat16"), (50257, "bfloat16")]
    if target == "sm_90":
        runs += [(CODES, "float32"), (CODES, "float16"), *((V, "bfloat16") for V in (53, 256, 4096))]
    for V, x in runs:
        for gradient in (True, False):
            config = dict(file.launch_config(V), GRADIENT=gradient)
            name, args = f"loss V={V} {x}" + " + gradient" * gradient, (x, "int64", "float32", V, V)
            per = min(V, config["BLOCK_V"]) / threads(config, target)
            yield name, file._softmax_loss_kernel, args, config, per, 1


def cuobjdump(cubin, *options):
    """What Triton's copy of the program prints."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def smallest_loop(code, *needed):
    """Opcode counts of the shortest loop that holds the needed (opcode, how often), or of everything."""
    loops = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            body = collections.Counter(op for at, op, _ in code if int(target[1], 16) <= at <= address)
            if all(body[op] >= count for op, count in needed):
                loops.append(body)
    body = min(loops, key=lambda body: body.total(), default=collections.Counter(op for _, op, _ in code))
    return body - collections.Counter(NOP=body["NOP"])


def count(target, name, cubin, per_thread, trips):
    """Instructions per element in the hot loop, and those of them that issue at half rate on sm_90."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9_]+)(.*)$", cuobjdump(cubin, "-sass"), re.M)
    code, mma = [(int(address, 16), opcode, rest) for address, opcode, rest in found], SASS_MMA[target]
    every = collections.Counter(op for _, op, _ in code)
    hot = smallest_loop(code)
    if name.startswith("nearest_code"):
        hot = smallest_loop(code, (mma, 1), ("FMNMX", 40))
        inner = smallest_loop(code, (mma, 1))
        for _ in range(trips - 1 if inner.total() < hot.total() else 0):  # else unrolled
            hot = hot + inner
    elif name.startswith("attention") and every[mma]:
        hot = smallest_loop(code, (mma, 1), ("MUFU", 1))
    elif name.startswith("linear") and every["HMMA"]:
        hot = smallest_loop(code, ("HMMA", 1))
    elif not name.startswith(("rms_norm bwd", "attention", "rotate", "decode", "linear")):
        hot = every - collections.Counter(NOP=every["NOP"], BRA=every["BRA"])
    half = sum(hot[op] for op in ("FMNMX", "FMNMX3", "SEL", "FSETP", "ISETP", "VIADD", "LEA", "LOP3", "IADD3", "PLOP3"))
    return dict(per_element=hot.total() / per_thread, half_rate=half / per_thread)


def compile_case(target, index, counted):
    """One row of the table; `counted`: with its instructions, which takes as long as compiling."""
    import torch
    import triton

    name, kernel, args, constants, per_thread, trips = list(cases(target))[index]
    triton.runtime.driver.set_active(ptx.FakeDriver(target))
    values = [torch.empty(64, dtype=getattr(torch, arg)) if isinstance(arg, str) else arg for arg in args]
    binary = kernel.warmup(*values, grid=(1,), **constants)
    row = dict(target=target, kernel=name, warps=constants["num_warps"], shared=binary.metadata.shared)
    row |= dict(function=kernel.fn.__name__, per_element=None, half_rate=None, tf32=0, conflicts=None)
    if target == "gfx942":
        asm = binary.asm["amdgcn"]
        keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        # `moved`: registers, to others of the matrix cores, which takes no stack
        row["registers"], stack, moved = (int(re.search(rf"\.{key}:\s*(\d+)", asm)[1]) for key in keys)
        copies = re.findall("buffer_load_dwordx4", asm)
        return row | dict(stack=max(stack, moved), mma=asm.count(MMA[target]), copies=copies)
    cubin, code = binary.asm["cubin"], binary.asm["ptx"]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", cuobjdump(cubin, "--dump-resource-usage")))
    row |= dict(registers=int(usage["REG"]), stack=int(usage["STACK"]), mma=code.count(MMA[target]))
    row |= dict(tf32=code.count("tf32"), copies=re.findall(r"cp\.async\.c[ag]", code))
    given = [1 << 20 if isinstance(arg, str) else arg for parameter, arg in zip(kernel.arg_names, args, strict=False)
             if binary.src.signature[parameter] != "constexpr"]  # which a 1 is, too
    took, least = ptx.conflicts(code, 32 * constants["num_warps"], binary.metadata.shared, given)
    row |= dict(conflicts=took / max(least, 1))
    if counted:
        row |= count(target, name, cubin, per_thread, trips)
    return row


def table(targets=(), only=".*", counted=True):
    """The rows (of these targets) whose names match `only`, compiled without the interpreter; `counted` as in
    compile_case."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NANOLLAMAGEN_KERNELS")}
    words = [sys.executable, __file__, "--json", json.dumps([only, counted]), *targets]
    out = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout)


def show(rows):
    """The table as text; conflicts: cycles of shared memory, the fewest being 1; instructions are per thread in the hot
    loop, half: those that issue at half rate on sm_90."""
    columns = ("target", "warps", "registers", "stack", "shared", "mma", "conflicts", "per_element", "half_rate")
    width = max((len(row["kernel"]) for row in rows), default=6)
    lines = ["kernel".ljust(width) + "".join(name.rjust(12) for name in columns)]
    for row in sorted(rows, key=lambda row: row["kernel"]):
        cells = ("-" if row[k] is None else f"{row[k]:.2f}" if k in columns[-3:] else str(row[k]) for k in columns)
        lines.append(row["kernel"].ljust(width) + "".join(cell.rjust(12) for cell in cells))
    return "\n".join(lines)


def compile_all(targets, only, counted):
    sys.path.insert(0, str(ROOT))
    jobs = [(target, index) for target in targets or TARGETS for index, (name, *_) in enumerate(cases(target))
            if re.fullmatch(only, name)]
    with ProcessPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:  # beside another worker's tests
        return list(pool.map(functools.partial(compile_case, counted=counted), *zip(*jobs, strict=True), chunksize=2))


def figures():
    """What the benchmarks' predictions and the README's table take from sm_90, each (the kernels that it is the largest
    of, by a pattern of their names; column; value; how far from it rounding may be)."""
    import bench_kernels as bench

    for pattern, registers in {k: v for *_, found in bench.README for k, v in found.items()}.items():
        yield pattern, "registers", registers, 0
    for (D, l2), (half, *_) in bench.SEARCH.items():
        yield f"nearest_code {'l2' if l2 else 'euclid'} D={D}", "half_rate", half, 0.005 * half
    for (D, inside), counts in bench.ATTENTION.items():
        for part, instructions in zip(("fwd", "dq", "dkv"), counts, strict=True):
            yield f"attention {part} D={D}" + " inside" * inside, "per_element", instructions, 0.06


def test_compile():
    """HEAVY on sm_90, and a search for sm_100; continuous integration takes all kernels, four GPUs, and the figures."""
    pytest.importorskip("triton")
    rows = table(["sm_90"], "|".join(HEAVY), counted=False)
    missing = [pattern for pattern in HEAVY if not any(re.fullmatch(pattern, row["kernel"]) for row in rows)]
    assert not missing, f"no kernel is called {missing}"
    left = {case[1].fn.__name__ for case in cases("sm_90")} - {row["function"] for row in rows}
    assert not left, f"HEAVY names no launch of {left}"
    check("sm_90", rows)
    (search,) = table(["sm_100"], "nearest_code l2 D=64", counted=False)  # whose code is another: tensor memory
    assert search["mma"] and 1 < search["conflicts"] < 8


def triton_version():
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def check(target, rows):
    """AssertionError, with their rows, where kernels are not as they should be on this target."""
    # Bytes of stack. Tiles were chosen with 3.7; 3.6 spills in three launches of attention, 3.8 in six of it and in two
    # of RMSNorm, 3.9 in 18 of it, one of RMSNorm and one of the search
    most = {(3, 6): 8, (3, 8): 96, (3, 9): 88}.get(triton_version(), 0)
    bad = [row for row in rows if row["stack"] > most]
    assert not bad, f"spills:\n{show(bad)}"
    bad = [row for row in rows if row["shared"] > SHARED_LIMIT[target]]
    assert not bad, f"too much shared memory:\n{show(bad)}"
    products = [row for row in rows if row["kernel"].startswith(("nearest_code", "attention"))]
    bad = [row for row in products if not row["mma"] and not row["kernel"].endswith("float32")]
    assert products and not bad, f"no tensor-core instructions:\n{show(bad)}"
    exact = [row for row in rows if row["kernel"].startswith("attention") and row["kernel"].endswith("float32")]
    bad = [row for row in exact if row["tf32"]]  # gfx942 has none, and matrix cores for full float32
    assert exact and not bad, f"float32 rounded to TF32:\n{show(bad)}"
    cached = [row for row in rows if row["kernel"].startswith("decode")]
    bad = [row for row in cached if not row["copies"] or "cp.async.ca" in row["copies"]]  # .cg: 16 bytes and no less
    assert cached and not bad, f"narrow copies of keys or values:\n{show(bad)}"
    few = [row for row in rows if row["kernel"].startswith("linear") and "K=97" not in row["kernel"]]
    least = 8 if target == "gfx942" else 16  # of x and of the weight in three or four stages, with 256 or 128 threads
    bad = [row for row in few if len(row["copies"]) < least or "cp.async.ca" in row["copies"]]
    assert few and not bad, f"narrow copies of weights or rows:\n{show(bad)}"
    # In full float32 tiles are not swizzled. Left as they are: a width of 1, the search's layout of tensor memory, what
    # Triton 3.6 makes of 32 gated rows
    known = r"(attention|linear|decode) .*float32.*|rms_norm .* W=1 .*" + r"|nearest_code .*" * (target == "sm_100")
    known += r"|linear M=32 .* gated" * (triton_version() == (3, 6))
    bad = [row for row in rows if (row["conflicts"] or 1) > 1.1 and not re.fullmatch(known, row["kernel"])]
    assert not bad, f"bank conflicts:\n{show(bad)}"


def check_figures(rows):
    """AssertionError where the benchmarks or the README hold another figure than sm_90's with Triton 3.7."""
    for pattern, column, value, tolerance in figures():
        found = [row[column] for row in rows if re.fullmatch(pattern, row["kernel"])]
        assert max(found) == pytest.approx(value, abs=tolerance), f"{pattern}: {column} {value}, now {found}"


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--json"]:
        print(json.dumps(compile_all(words[2:], *json.loads(words[1]))))
    else:
        if not importlib.util.find_spec("triton"):
            sys.exit("the package triton is not installed: nothing to compile with")
        if unknown := set(words) - set(TARGETS):
            sys.exit(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
        rows, failed = table(words), []
        print(show(rows))
        for target in words or TARGETS:
            try:
                check(target, of := [row for row in rows if row["target"] == target])
                if target == "sm_90" and triton_version() == (3, 7):
                    check_figures(of)
            except AssertionError as error:
                failed.append(f"{target}: {error}")
        sys.exit("\n".join(failed) or 0)
