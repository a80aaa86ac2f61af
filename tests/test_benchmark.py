"""The benchmarks without a GPU: the README's tables are those of the code, rows survive, and the scripts run dry."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from types import SimpleNamespace

import bench_kernels
import bench_sample
import bench_train
import bench_vq
import benchmark
import pytest
import tables
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels


def test_the_readme_shows_what_was_measured_and_predicted():
    assert tables.main(["--check"]) == 0


def test_tables_read_what_a_gpu_left(tmp_path, monkeypatch):
    """Of several GPUs the H100 measured last counts, or if there is none, the last; of a quick or dry run no row."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for gpu, ms, date in (
        ("NVIDIA_H100_80GB_HBM3", 0.75, "2026-01-02"), ("NVIDIA_H100_NVL", 0.85, "2026-01-01"),
        ("NVIDIA_H100_NVL_quick", 0.1, "2026-01-03"), ("NVIDIA_A100", 0.2, "2026-01-03"),
        ("NVIDIA_H200", 0.6, "2026-01-04"), ("dry-run", 9, "2026-01-05"),
    ):
        folder = tmp_path / "benchmarks" / gpu
        folder.mkdir(parents=True)
        (folder / "kernels.csv").write_text(
            "op,shape,direction,ours_ms,share_of_floor,vs_eager,vs_compile,copy_tb_per_s,matmul_tflop_per_s,"
            "multiprocessors,date\n"
            f"nearest_code,262144x16384 D=8,fwd,{ms},0.458,60.1,15.3,{3.0 if 'H100' in gpu else 4.5},800,132,{date}\n"
        )
    (tmp_path / "benchmarks/NVIDIA_B200").mkdir()  # only checked, later
    (tmp_path / "benchmarks/NVIDIA_B200/check.csv").write_text("op,date\nnearest_code,2026-01-06\n")
    assert "| 0.070 | 0.212 |" in tables.sampling_table()
    for gone, gpu, ms in (([], "H100 80GB HBM3", 0.75), (["H100_80GB_HBM3", "H100_NVL"], "H200", 0.60)):
        for name in gone:
            shutil.rmtree(tmp_path / f"benchmarks/NVIDIA_{name}")
        head, _, first, *_ = tables.kernels_table().splitlines()
        assert head.endswith(f"| target | measured on one NVIDIA {gpu} |")
        assert first.endswith(f"| 0.9 ms | {ms:.2f} ms, 46 % of the floor, 60x eager, 15x compile |")
    assert "| predicted for its 4.50 TB/s and 800 TFLOP/s |" in head
    assert "| floor | 0.047 | 0.141 |" in tables.sampling_table()  # two thirds of an H100's


def test_the_tokenizers_table_names_the_fastest_way(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "benchmarks/NVIDIA_H100").mkdir(parents=True)
    (tmp_path / "benchmarks/NVIDIA_H100/vq.csv").write_text(
        "job,preset,images,dtype,images_per_s,plain_ms,channels_last_ms,compiled_ms,both_ms,date\n"
        "encode,vq16,32,float32,800.4,40,,,20,2026-01-01\n"
    )
    ours, fastest = tables.tokenizer_table().splitlines()[3:]
    assert ours == "| measured on one NVIDIA H100, as the scripts do it | 800 |" + 3 * " not measured |"
    assert fastest == "| the fastest way | 1,600 (both) |" + 3 * " not measured |"


def test_each_backend_of_attention_is_compiled_anew():
    """Not taken from a cache on disk, whose key does not know which one was allowed."""
    q, used = torch.randn(1, 2, 16, 8), []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        benchmark.release_memory()
        attend = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        with sdpa_kernel(backend):
            attend(q)
            with torch.profiler.profile() as profile:
                attend(q)
        used.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert used == [True, False]


def run(args, plan):
    run = benchmark.Run(args, "table")
    return run.measure(plan, ("a", "b"), plan)


def test_rows_stay_and_failures_tell(tmp_path, capsys):
    """A row replaces the one of its key; one that fails leaves the others; the mode of the kernels is restored."""
    args, before = benchmark.parser("").parse_args(["--dry-run", "--out", str(tmp_path)]), kernels.mode()
    assert run(args, [(dict(a=1), 1, lambda: dict(b=2.5)), (dict(a=2), 1, lambda: dict(b=3.5))]) == 0
    assert run(args, [(dict(a=2), 1, lambda: 1 / 0), (dict(a=1), 1, lambda: dict(b=4.5, c=None))]) == 1
    rows = benchmark.read_csv(tmp_path / "dry-run" / "table.csv")
    assert [(row["a"], row["b"], row["c"]) for row in rows] == [("2", "3.5", ""), ("1", "4.5", "")]
    assert all(row["torch"] and row["date"] for row in rows) and kernels.mode() == before
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_rival_that_waits_for_the_gpu_is_not_captured(monkeypatch):
    """PyTorch refuses it before that, and the setting that makes it do so does not stay."""
    modes, captured, cuda = [], [], benchmark.torch.cuda

    def waits():
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(cuda, "graph", lambda graph: captured.append(graph) or contextlib.nullcontext())
    monkeypatch.setattr(cuda, "current_stream", lambda: None)
    monkeypatch.setattr(cuda, "stream", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="synchronizing"):
        bench_kernels.replay(waits)
    assert modes == ["error", "default"] and not captured
    assert bench_kernels.replay(lambda: None) == "replay" and modes[-1] == "default" and len(captured) == 1


def test_the_gpu_waits_until_a_call_is_issued(monkeypatch):
    """For longer than the host takes for it: else kernels shorter than their launch would be timed as that."""
    calls, cuda, zeros = [], benchmark.torch.cuda, benchmark.torch.zeros

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, end):
            return 0.25

    def slow():
        time.sleep(0.004)
        calls.append("call")

    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    monkeypatch.setattr(benchmark.torch, "zeros", lambda *shape, dtype, device: zeros(8, dtype=dtype))
    for name, fake in dict(Event=Event, _sleep=calls.append, synchronize=lambda: None).items():
        monkeypatch.setattr(cuda, name, fake)
    assert benchmark.time_ms(slow, 1) == [0.25] * 3
    timed = calls[calls.index("event") - 1 :]
    assert len(timed) == 4 * 20 and timed[1::4] == timed[3::4] == 20 * ["event"] and timed[2::4] == 20 * ["call"]
    assert set(map(type, timed[::4])) == {int} and timed[0] > 2e9 * 0.004


def test_a_rival_that_fails_costs_its_figure_only(monkeypatch, capsys):
    """The row names it."""
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    case = next(bench_kernels.sampling_cases(bench_kernels.TINY))
    row = bench_kernels.measure(dataclasses.replace(case, library=lambda *_: 1 / 0), benchmark.Ceilings())
    assert row["failed"] == "library" and row["library_ms"] is None and row["compile_ms"] and row["ours_ms"]
    assert "library: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["", "fwd"])
def test_a_variant_lasts_for_its_row_only(kernel):
    """And is one of the kernel that it names; a name of the file is another thing than a constant of a launch."""
    pytest.importorskip("triton")
    rope, loss = bench_kernels.rope_file, bench_kernels.loss_file
    before = [rope.launch_config(name, 64) for name in ("fwd", "dq")], rope.rotates_inside, loss.CHUNK
    changes = dict(BLOCK_N=16, rotates_inside=bench_kernels.never)
    with bench_kernels.varied(rope, kernel, changes), bench_kernels.varied(loss, "", dict(CHUNK=7, num_warps=32)):
        fwd, dq = (rope.launch_config(name, 64) for name in ("fwd", "dq"))
        assert fwd == before[0][0] | dict(BLOCK_N=16) and dq == before[0][1] | (dict(BLOCK_N=16) if not kernel else {})
        assert not rope.rotates_inside(256, 64, 1, False, "sm_90") and loss.CHUNK == 7
        assert loss.launch_config(512) == dict(BLOCK_V=512, num_warps=32)
    assert before == ([rope.launch_config(name, 64) for name in ("fwd", "dq")], rope.rotates_inside, loss.CHUNK)


@pytest.mark.parametrize("op, kernel, changes", [
    pytest.param(*variant, id=f"{variant[0]} {bench_kernels.describe(*variant[1:])}")
    for variant in bench_kernels.VARIANTS
])
def test_variants_compute_the_same(op, kernel, changes, kernels_mode, monkeypatch):
    """By the kernels, on a CPU, with keys before the diagonal of attention."""
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    sizes = dataclasses.replace(bench_kernels.TINY, attention=((2, 160, 1, 16),))
    kernels_mode("triton")
    for case in bench_kernels.cases(sizes):
        if case.op == op:
            inputs, upstream = case.make()
            with bench_kernels.varied(bench_kernels.FILES[op], kernel, changes):
                bench_kernels.check(case, inputs, upstream)


def test_every_variant_has_a_row():
    rows = {(key["op"], key["variant"]) for key, _, _ in bench_kernels.tuning_plan(None)}
    assert len(rows) == len(bench_kernels.VARIANTS)


def test_rows_for_which_no_time_is_left(tmp_path, capsys):
    args = benchmark.parser("").parse_args(["--dry-run", "--minutes", "0", "--out", str(tmp_path)])
    assert run(args, [(dict(a=1), 1, lambda: dict(b=2.5))]) == 0
    assert "left out, for lack of time: 1" in capsys.readouterr().out


@pytest.mark.parametrize("script, words", [
    (bench_kernels, ["--only", "swiglu"]), (bench_kernels, ["--check"]), (bench_kernels, ["--tune"]),
    (bench_sample, ["--rounds", "1"]), (bench_train, ["--rounds", "1"]), (bench_vq, []),
])
def test_dry_run(script, words, tmp_path, capsys):
    """All of it but the demos, and what compiles ahead of time."""
    assert script.main(["--dry-run", "--out", str(tmp_path), *words]) == 0
    (path,) = (tmp_path / "dry-run").glob("*.csv")
    assert benchmark.read_csv(path) and "FAILED" not in capsys.readouterr().out


def test_pytorch_alone_has_its_own_loss(monkeypatch):
    """And ours is there again afterwards."""
    losses, run = [], bench_train.Contenders("tiny", 16, 2, 512)
    monkeypatch.setattr(bench_train, "one_step", lambda *_: losses.append(kernels.linear_cross_entropy))
    for name in bench_train.CONTENDERS:
        run.step(name)
    plain = bench_train.loss_file.linear_cross_entropy_ref
    assert [loss is plain for loss in losses] == [True, True, False, False, True, False]
    assert kernels.linear_cross_entropy is bench_train.OUR_LOSS is not plain


def test_no_gpu_no_figures(tmp_path):
    if not benchmark.torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            bench_train.main(["--out", str(tmp_path)])
    done = subprocess.run(["bash", "runs/benchmark.sh", "kernel"], capture_output=True, text=True, cwd=benchmark.ROOT)
    assert done.returncode == 2 and "neither a part" in done.stderr


def test_options_of_the_benchmark_reach_every_part():
    command = ["bash", "runs/benchmark.sh", "--minutes", "4", "sampler", "--out=there", "--quick", "demo"]
    told = dict(capture_output=True, text=True, cwd=benchmark.ROOT, env=os.environ | dict(PYTHON="echo"))
    done = subprocess.run(command, **told)
    options = "--minutes 4 --out=there --quick"
    assert done.stdout.splitlines() == ["== sampler", f"tests/bench_sample.py {options}",
                                        "== demo", f"tests/bench_train.py --demo {options}"]
    assert "--minutes needs a value" in subprocess.run([*command, "--minutes"], **told).stderr
