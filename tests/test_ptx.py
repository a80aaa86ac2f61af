"""The machine for PTX (ptx.py): what its statements compute, what it counts and refuses; and kernels that run on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<9>;
	mov.u32 	%r1, %tid.x; // the thread
	ld.param.b32 	%r2, [kernel_param_1];
	ld.param.b64 	%rd1, [kernel_param_0];
	mul.lo.s32 	%r3, %r1, %r2;
	mad.wide.s32 	%rd2, %r1, 4, %rd1;
	BODY
	ret;
}
"""


def run(body, threads=32, stride=4, content=None, programs=1):
    """What programs leave in memory, of which %rd1 is the address and %rd2 that of the thread's word: uint32."""
    memory = torch.zeros(threads, dtype=torch.int32) if content is None else content
    machine = ptx.Machine(KERNEL.replace("BODY", body), threads, 4096, range(programs), (programs, 1, 1),
                          [memory.data_ptr(), stride], ptx.Tensors([memory]))
    machine.run()
    return memory.numpy().view("u4")


def bits(x):
    return int(np.array([x], "f4").view("u4")[0])


@pytest.mark.parametrize("statements, expected", [
    ("mov.b32 %r4, 0x80000000; shr.s32 %r9, %r4, 40", 0xFFFFFFFF), ("shr.u32 %r9, 0x80000000, 32", 0),
    ("shl.b32 %r9, 3, 31", 0x80000000), ("add.s32 %r9, 0x7fffffff, 1", 0x80000000), ("div.s32 %r9, -7, 2", 2**32 - 3),
    ("mov.b32 %r4, 0xfffffffe; mul.hi.u32 %r9, %r4, 3", 2), ("mov.b32 %r4, -2; mul.hi.s32 %r9, %r4, 3", 0xFFFFFFFF),
    ("mul.wide.s32 %rd3, -2, 3; mov.b64 {_, %r9}, %rd3", 0xFFFFFFFF), ("mad.lo.s32 %r9, 5, 6, 7", 37),
    ("bfe.u32 %r9, 0xabcd, 4, 8", 0xBC), ("bfe.s32 %r9, 0xabcd, 4, 8", 0xFFFFFFBC), ("popc.b32 %r9, 0xff01", 9),
    ("bfi.b32 %r9, 0xabcd, 0x11111111, 8, 12", 0x111BCD11), ("bfi.b32 %r9, 5, 6, 0, 32", 5),
    ("bfi.b32 %r9, 5, 6, 3, 0", 6), ("bfi.b32 %r9, 5, 6, 33, 4", 6),
    ("mov.b64 %rd3, -1; bfi.b64 %rd3, 0, %rd3, 60, 9; mov.b64 {_, %r9}, %rd3", 0x0FFFFFFF),
    ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x7531", 0x77553311), ("prmt.b32 %r9, 0x80, 0, 0x4448", 0xFF),
    ("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40000000", 0x3F804000),  # the first is the upper half
    ("cvt.rn.bf16.f32 %rs1, 0f3F808000; cvt.u32.u16 %r9, %rs1", 0x3F80),  # to even
    ("cvt.rn.bf16.f32 %rs1, 0f3F818000; cvt.u32.u16 %r9, %rs1", 0x3F82), ("cvt.rzi.s32.f32 %r9, 0fBFC00000", 2**32 - 1),
    ("cvt.rzi.s32.f32 %r9, 0f7F800000", 0x7FFFFFFF), ("cvt.rzi.s32.f32 %r9, 0f7FC00000", 0),
    ("setp.lt.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 2, %p1", 2),  # NaN is not less,
    ("setp.ltu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 2, %p1", 1),  # or is not known to be more
    ("setp.num.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r9, 1, 2, %p1", 2),
    ("setp.lt.u32 %p1, -1, 0; @!%p1 mov.b32 %r9, 5", 5), ("max.f32 %r9, 0f7FC00000, 0f3F800000", bits(1)),
    ("mul.f32 %r9, 0f40400000, 0fBF000000", bits(-1.5)),
    ("fma.rn.f32 %r9, 0f40400000, 0f40000000, 0f3F800000", bits(7)),
    ("fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002", bits(2.0**-46)),  # the product is not rounded
    ("fma.rn.ftz.f32 %r9, 0f00800000, 0f3F000000, 0f00000000", 0), ("ex2.approx.ftz.f32 %r9, 0f40000000", bits(4)),
    ("mov.b64 %rd3, {%r2, 9}; mov.b64 {%r4, %r9}, %rd3", 9), ("neg.f32 %r9, 0f00000000", 0x80000000),
    ("cvt.u64.u32 %rd3, -1; shl.b64 %rd3, %rd3, 4; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r9, %rd3", 15),
    ("mov.b32 {%rs1, %rs2}, 0x11112222; mov.b32 %r9, {%rs2, %rs1}", 0x22221111),
    ("mul.bf16x2 %r9, 0x40003F80, 0x40404040", 0x40C04040), ("xor.b32 %r9, 12, 10", 6),
    ("st.shared.b32 [%r3], -1; ld.shared.s32 %rd3, [%r3]; mov.b64 {_, %r9}, %rd3", 2**32 - 1),
    ("cvt.s64.s32 %rd3, -1; mov.b64 {_, %r9}, %rd3", 2**32 - 1), ("cvt.rzi.s32.f32 %r9, 0fFF800000", 2**31),
    ("div.s32 %r9, 0x80000000, 3", 2**32 - 0x2AAAAAAA), ("fma.rn.ftz.f32 %r9, 0f00400000, 0f7F000000, 0f00000000", 0),
    ("min.s32 %r9, -1, 1", 2**32 - 1), ("min.u32 %r9, -1, 1", 1),
    ("not.b32 %r9, 0", 2**32 - 1), ("and.pred %p1, 1, 0; selp.b32 %r9, 1, 2, %p1", 2),
])
def test_statements(statements, expected):
    assert (run(f"{statements}; st.global.b32 [%rd2], {{%r9}};") == expected).all()


@pytest.mark.parametrize("statement, expected", [
    ("shfl.sync.bfly.b32 %r9, %r1, 4, 31, -1", [i ^ 4 for i in range(32)]),
    ("shfl.sync.bfly.b32 %r9, %r1, 8, 0x181f, -1", [i & ~8 for i in range(32)]),
    ("shfl.sync.up.b32 %r9, %r1, 3, 0, -1", [max(i - 3, i % 3 if i < 3 else 0) for i in range(32)]),
    ("shfl.sync.idx.b32 %r9, %r1, 39, 31, -1", 32 * [7]),
    ("shfl.sync.idx.b32 %r9, %r1, 1, 0x181f, -1", [i // 8 * 8 + 1 for i in range(32)]),  # of eight lanes each
    ("setp.lt.u32 %p1, %r1, 9; mov.b32 %r9, 6; st.global.b32 [%rd2], {%r9}; @%p1 ret; mov.b32 %r9, 3",
     9 * [6] + 23 * [3]), ("redux.sync.add.s32 %r9, %r1, -1", 32 * [496]),
    ("setp.gt.u32 %p1, %r1, 30; @%p1 bra FAR; add.s32 %r9, %r1, 5; bra.uni END; FAR: mov.b32 %r9, 7; END: bar.sync 0",
     [*range(5, 36), 7]),
    ("mov.b32 %r9, 0; AGAIN: add.s32 %r9, %r9, 2; setp.lt.u32 %p1, %r9, %r1; @%p1 bra AGAIN",  # threads part
     [max(2, i + i % 2) for i in range(32)]),
    ("mov.b32 %r9, 0; " + 2 * (  # of the same labels in two blocks, each jump stays in its own
        "{ mov.b32 %r4, 0; AGAIN: add.s32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 3; @%p1 bra.uni AGAIN; "
        "add.s32 %r9, %r9, %r4; setp.gt.u32 %p1, %r1, 8; { @%p1 bra ON; } add.s32 %r9, %r9, 10; ON: } "),
     9 * [26] + 23 * [6]),
])
def test_threads(statement, expected):
    assert run(f"{statement}; st.global.b32 [%rd2], {{%r9}};").tolist() == expected


def test_approximations():
    """Within a unit in the last place of what is right, and not always right."""
    found = run("cvt.rn.f32.s32 %r4, %r1; mul.f32 %r4, %r4, 0f3DCCCCCD; ex2.approx.f32 %r9, %r4; "
                "st.global.b32 [%rd2], {%r9};")
    exact = np.exp2((np.arange(32, dtype="f4") * np.float32(0.1)).astype("f8")).astype("f4")
    assert set(np.unique(found.astype("i8") - exact.view("u4"))) == {-1, 0, 1}


def test_tensor_cores():
    """mma and wgmma of the same product, the latter from shared memory with and without swizzles, against NumPy."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, shape).astype("f2") for shape in ((64, 16), (16, 8)))
    load = "".join(f"ld.global.b32 {{%r{4 + i}}}, [%rd2+{512 * i}]; " for i in range(6))
    store = "".join(f"st.global.b32 [%rd2+{512 * i}], {{%r{10 + i}}}; " for i in range(4))
    zero = "".join(f"mov.b32 %r{10 + i}, 0; " for i in range(4))
    warp, g, t = (x.reshape(-1) for x in np.meshgrid(range(4), range(8), range(4), indexing="ij"))
    pair = 2 * t[:, None] + [0, 1]
    words = [a[(16 * warp + g + 8 * (i % 2))[:, None], pair + 8 * (i // 2)] for i in range(4)]
    words += [b.T[g[:, None], pair + 8 * i] for i in range(2)]
    registers = np.stack([np.ascontiguousarray(word).view("i4")[:, 0] for word in words])
    expected = a.astype("f4") @ b.astype("f4")
    expected = np.stack([expected[16 * warp + g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)])
    d = "{%r10, %r11, %r12, %r13}"
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {d}; "
    content = torch.from_numpy(registers.copy())
    found = run(load + zero + 2 * mma + store, 128, content=content)[:4].view("f4")
    assert (found == 2 * expected).all()
    for mode, span in ((0, 16), (1, 128), (2, 64), (3, 32)):  # B^T along k: rows of `span` bytes, swizzled
        n, k = (x.reshape(-1) for x in np.meshgrid(range(8), range(16), indexing="ij"))
        at = n * span + (2 * k if mode else k // 8 * 128 + k % 8 * 2)
        at ^= at >> 3 & span - 16
        shared = np.zeros(512, "f2")
        shared[at // 2] = b[k, n]
        content = torch.from_numpy(np.concatenate([registers[:4], shared.view("i4").reshape(2, 128)]))
        fill = "shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r8; st.shared.b32 [%r2+512], %r9; bar.sync 0; "
        descriptor = mode << 62 | (span * 8 >> 4) << 32 | (128 >> 4) << 16
        wgmma = ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
                 f"{d}, {{%r4, %r5, %r6, %r7}}, %rd3, MORE, 1, 1, 0; wgmma.wait_group.sync.aligned 0; ")
        nan = zero.replace(", 0;", ", -1;")  # what is in the registers is not added first
        body = load + fill + nan + f"mov.b64 %rd3, {descriptor}; "
        body += wgmma.replace("MORE", "0") + wgmma.replace("MORE", "1")
        assert (run(body + store, 128, content=content)[:4].view("f4") == 2 * expected).all(), mode


def test_matrices():
    """ldmatrix, transposed or not, and stmatrix, which undoes it."""
    fill = "shl.b32 %r3, %r1, 4; " + "".join(
        f"shl.b32 %r5, %r1, 16; or.b32 %r4, %r5, {i}; st.shared.b32 [%r3+{4 * i}], %r4; " for i in range(4))
    names = "{%r10, %r11, %r12, %r13}"
    for trans in ("", ".trans"):
        load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names}, [%r3]; "
        there = run(f"{fill} {load} st.global.b32 [%rd2], {{%r11}};")
        row, pair = np.arange(32) // 4, np.arange(32) % 4  # of the second matrix, whose rows lanes 8 to 15 have
        halves = np.stack([np.array([[i, 8 + r] for i in range(4)]).reshape(-1) for r in range(8)])
        halves = halves.T if trans else halves
        assert (there == halves[row, 2 * pair] + (halves[row, 2 * pair + 1] << 16)).all()
        back = f"bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {names}; "
        again = run(f"{fill} {load} {back} ld.shared.b32 %r9, [%r3+4]; st.global.b32 [%rd2], {{%r9}};")
        assert (again == np.arange(32) * 65536 + 1).all()


STORE, COPY = "st.shared.b32 [%r3], %r1;", "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group;"
OTHER = "xor.b32 %r4, %r3, 128; "  # where a thread of the other warp stores
WORD = "ld.shared.b32 %r5, [global_smem];"
FIRST, ROWS = "setp.lt.s32 %p1, %r1, 32; ", "shl.b32 %r6, %r1, 4; and.b32 %r6, %r6, 127; "
WGMMA = ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, {%r4, %r5, %r6, %r7}, %rd3, "
         f"0, 1, 1, 0; mov.b64 %rd3, {8 << 32 | 8 << 16}; ")


@pytest.mark.parametrize("body, why", [
    ("st.global.b32 [%rd2+4], {%r1};", "outside of all tensors by 1 threads"),
    ("ld.global.b32 {%r4}, [%rd2+2];", "4 bytes that is not aligned"),
    ("setp.eq.s32 %p1, %r1, 1; @%p1 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd2];", "16 bytes that is not aligned"),
    ("st.shared.b32 [%r3+3970], %r1;", "not aligned or beyond 4096"), ("ld.shared.b32 %r4, [%r3+4064];", "beyond 4096"),
    ("ld.shared.b32 %r4, [%r3];", "where nothing was stored"),
    (f"{STORE} {OTHER} ld.shared.b32 %r5, [%r4];", "read after another warp's store"),
    (f"{STORE} {ROWS} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [%r6];", "read after another warp's store"),
    (f"{STORE} bar.sync 0; {OTHER} ld.shared.b32 %r5, [%r4]; {ROWS} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], "
     "{%r1};", "written after another warp's load"),
    (f"{STORE} bar.sync 0; {OTHER} ld.shared.b32 %r5, [%r4]; {STORE}", "written after another warp's load"),
    (f"{STORE} bar.sync 0; ld.shared.b32 %r5, [global_smem+160]; setp.eq.s32 %p1, %r1, 40; @%p1 {STORE}",
     "written after another warp's load"),  # both warps have read
    (f"{FIRST} {STORE} bar.sync 0; @!%p1 {WORD} @%p1 {WORD} @%p1 {STORE}", "written after another warp's load"),
    (f"{FIRST} and.b32 %r4, %r3, 127; @%p1 st.shared.b32 [%r4], %r1; @!%p1 st.shared.b32 [%r4], %r3;",
     "two warps store"),
    ("shl.b32 %r4, %r1, 8; st.shared.b32 [global_smem], %r4;", "two threads store"),
    (f"{COPY} ld.shared.b32 %r4, [%r3];", "before a copy has landed"),
    (f"{COPY} cp.async.wait_group 1; ld.shared.b32 %r4, [%r3];", "before a copy has landed"),
    (f"{FIRST} {COPY} @%p1 cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r4, [%r3];", "before a copy has landed"),
    (f"{FIRST} {COPY} @!%p1 cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r4, [%r3];", "before a copy"),
    (f"{COPY} {STORE}", "where a copy has not landed"), (COPY, "ends before its copies have landed"),
    (f"{COPY} cp.async.wait_group 0; {OTHER} ld.shared.b32 %r5, [%r4];", "after another warp's store"),
    (f"{STORE} bar.sync 0; {OTHER} ld.shared.b32 %r5, [%r4]; {COPY}", "written after another warp's load"),
    ("setp.lt.s32 %p1, %r1, 32; @%p1 bra ON; bar.sync 0; bra.uni END; ON: bar.sync 0; END: mov.b32 %r4, 1;",
     "different barriers"),
    ("setp.lt.s32 %p1, %r1, 7; @%p1 bra ON; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; ON: mov.b32 %r4, 1;",
     "part of a warp"),
    ("AGAIN: mov.b32 %r4, 1; bra AGAIN;", "does not end"), ("setp.eq.s32 %p1, %r1, 0; @%p1 trap;", "assertion"),
])
def test_faults(body, why, monkeypatch):
    monkeypatch.setattr(ptx, "ENDLESS", 1000)
    with pytest.raises(ptx.Fault, match=why):
        run(body, threads=64)


FILL = "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1;"  # of 128 threads: what wgmma reads, and some more
WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("body, why", [
    (f"{FILL} {WGMMA} {WAIT}", "read after another warp's store"),
    (f"{FILL} bar.sync 0; {WGMMA} bar.sync 0; {FILL} {WAIT}", "tensor cores read"),
    (f"{FILL} bar.sync 0; {WGMMA} bar.sync 0; bar.sync 0; {FILL} bar.sync 0; {WAIT}", "tensor cores read"),
    (f"{FILL} bar.sync 0; {WGMMA} bar.sync 0; {WAIT} {FILL}", "written after another warp's load"),
])
def test_races_with_tensor_cores(body, why):
    with pytest.raises(ptx.Fault, match=why):
        run(body, threads=128)
    run(f"{FILL} bar.sync 0; {WGMMA} {WAIT} bar.sync 0; {FILL}", threads=128)


@pytest.mark.parametrize("body", [
    f"{STORE} bar.sync 0; {OTHER} ld.shared.b32 %r5, [%r4];",
    f"{STORE} xor.b32 %r4, %r3, 64; ld.shared.b32 %r5, [%r4];",  # of the same warp
    f"{COPY} cp.async.wait_group 0; ld.shared.b32 %r5, [%r3];",
    f"{COPY} cp.async.wait_group 0; bar.sync 0; {OTHER} ld.shared.b32 %r5, [%r4];",
    "add.s64 %rd3, %rd2, 4096; cp.async.ca.shared.global [%r3], [%rd3], 4, 0; cp.async.commit_group; "
    "cp.async.wait_group 0;",  # reads nothing
    "setp.gt.s32 %p1, %r1, 99; @%p1 ld.global.b32 {%r4}, [%rd3]; @%p1 trap;",
    f"{FIRST} and.b32 %r4, %r3, 127; @%p1 st.shared.b32 [%r4], 5; @!%p1 st.shared.b32 [%r4], 5;",
    "and.b32 %r4, %r3, 127; st.shared.b32 [%r4], 5; bar.sync 0; ld.shared.b32 %r5, [%r4];",  # two warps, the same value
    "and.b32 %r4, %r1, 3; or.b32 %r4, %r4, 0x3f800000; st.shared.b32 [global_smem], %r4;",  # other rounding
    f"{FIRST} @!%p1 ret; {STORE} bar.sync 0; ld.shared.b32 %r5, [%r3];",  # who has returned is not waited for
])
def test_no_faults(body):
    run(body, threads=64)


def test_programs():
    """Each has its own shared memory and copies, and its place in the grid; one has no barrier."""
    body = ("mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r4, 1; @%p1 bra FAR; st.shared.b32 [%r3], %r1; bar.sync 0; "
            f"{OTHER.replace('%r4', '%r6')} ld.shared.b32 %r9, [%r6]; st.global.b32 [%rd2], {{%r9}}; FAR: ")
    rest = "mov.b32 %r9, 7; @%p1 st.global.b32 [%rd2+256], {%r9}; "
    content = torch.zeros(128, dtype=torch.int32)
    assert run(body + rest, 64, content=content, programs=2).tolist() == [*range(32, 64), *range(32)] + 64 * [7]
    with pytest.raises(ptx.Fault, match="before a copy has landed"):
        run(f"mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r4, 1; {COPY} @%p1 cp.async.wait_group 0; "
            "ld.shared.b32 %r5, [%r3];", 64, programs=2)


@pytest.mark.parametrize("statement", [
    "add.sat.f32 %r9, %r4, %r5", "cvt.rz.bf16.f32 %rs1, %r4", "setp.lt.ftz.f32 %p1, %r4, %r5", "bar.sync 1, 32",
    "setp.eq.s32 %p1, %r4, 0; @%p1 bar.sync 0", "lop3.b32 %r9, %r4, %r5, %r6, 7", "wgmma.wait_group.sync.aligned 1",
    "ld.b32 %r9, [%rd2]", "st.b32 [%rd2], %r9", "cp.async.ca.shared.global [%r3], [%rd2], 4, 2",
    "AT: mov.b32 %r4, 0; AT: mov.b32 %r4, 1; bra AT", "{ AT: mov.b32 %r4, 0; } bra AT",
    "{ .reg .b32 a; mov.b32 a, 0; } { .reg .b16 a; mov.b16 a, 0; }",
])
def test_what_it_does_not_know(statement):
    with pytest.raises(NotImplementedError):
        run(statement + ";")


LOOP = """mov.b32 %r4, 0;
	setp.lt.u32 	%p1, %r1, 8;
$L__BB0_1:
	add.s32 	%r3, %r3, 1024;
	ACCESS;
	add.s32 	%r4, %r4, 1;
	setp.lt.s32 	%p2, %r4, 3;
	@%p2 bra 	$L__BB0_1;"""


@pytest.mark.parametrize("access, stride, expected", [
    ("ld.shared.b32 %r5, [ %r3 + 0 ]", 4, (3, 3)), ("st.shared.b32 [ %r3 + 64 ], %r5", 8, (6, 3)),
    ("st.shared.b32 [global_smem], %r5", 8, (3, 3)),  # one word for all
    ("@%p1 ld.shared.b32 %r5, [ %r3 + 0 ]", 128, (24, 3)), ("@!%p1 ld.shared.b32 %r5, [ %r3 + 0 ]", 128, (72, 3)),
    ("ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [ %r3 + 0 ]", 16, (12, 12)),
    ("cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10, %r5", 32, (24, 12)),
    ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3+512]", 256, (96, 12)),
    ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r3]", 144, (6, 6)),
])
def test_bank_conflicts(access, stride, expected):
    """Of 32 threads, `stride` bytes apart, in three rounds of a loop."""
    code = KERNEL.replace("BODY", LOOP.replace("ACCESS", access))
    assert ptx.conflicts(code, 32, 16384, [1 << 20, stride]) == expected


KERNELS = [
    "test_linear.py::test_skinny_linear[(17,97,31,'columns')-bfloat16-all]",
    "test_decode.py::test_decode_attention[(3,261,2,2,16,(1,200,999))-bfloat16-4]",
    "test_rope_attention.py::test_rope_attention[(1,131,2,1,100,(5,))-bfloat16-turned inside]",
    "test_sampling.py::test_kernel_and_torch_path_agree[16384-float16]",
    "test_cross_entropy.py::test_rows_of_every_width[triton-3-8191-torch.float16]",
    "test_kernels.py::test_nearest_code[67-300-31-bfloat16-l2]",
    "test_kernels.py::test_rms_norm_dropout[(7,768)-strided-bfloat16-same]",
    "test_kernels.py::test_swiglu[(3,5,5632)-plain-bfloat16]",
]


def test_kernels_as_compiled():
    """One test of each kernel; continuous integration takes all of them, for sm_80 and sm_90."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them all")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNELS]
    env = {**os.environ, "NANOLLAMAGEN_PTX": "sm_90"}
    out = subprocess.run(words, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-4000:]
