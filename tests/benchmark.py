"""What the benchmarks share: the card's two ceilings, timing, and a table in benchmarks/<gpu>/ that grows row by row.

--quick measures less, into benchmarks/<gpu>_quick/. --dry-run needs no GPU: the same code once on a CPU at toy sizes,
by the PyTorch path, into benchmarks/dry-run/; its times mean nothing. runs/benchmark.sh runs all parts.
"""

import argparse
import csv
import dataclasses
import datetime
import gc
import pathlib
import signal
import subprocess
import sys
import time
import traceback

import torch
import torch._functorch.config

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kernels  # noqa: E402 - needs the path above

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" in a dry run
KERNEL_MS = 2.5e-3  # that a kernel in a graph takes to start, to wait for its first bytes and to end, estimated
# Its key does not know which backend of attention is allowed: what was compiled for one would be timed for the others.
torch._functorch.config.enable_autograd_cache = False


@dataclasses.dataclass
class Ceilings:
    """What the GPU can do; the defaults are those of one H100 80GB."""

    copy: float = 3.0e12  # byte/s
    matmul: float = 800e12  # FLOP/s in bfloat16
    multiprocessors: int = 132
    clock: float = 1.755e9


def measure_ceilings():
    from triton.testing import do_bench

    source = torch.randn(1 << 29, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    copy = 2 * source.nbytes / (1e-3 * do_bench(lambda: target.copy_(source), return_mode="median"))
    matmul = 2 * 8192**3 / (1e-3 * do_bench(lambda: a @ b, return_mode="median"))
    return Ceilings(copy, matmul, torch.cuda.get_device_properties(0).multi_processor_count)


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def about_machine(top):
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "dry run, no GPU"
    driver = torch.version.hip or output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    commit = output("git", "rev-parse", "--short", "HEAD") + "+" * bool(output("git", "status", "--porcelain", "-uno"))
    triton = getattr(kernels.triton, "__version__", "none")
    versions = dict(driver=driver, torch=torch.__version__, triton=triton, commit=commit)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ceilings = dict(copy_tb_per_s=top.copy / 1e12, matmul_tflop_per_s=top.matmul / 1e12,
                    multiprocessors=top.multiprocessors)
    return dict(gpu=name, **versions, date=now, **ceilings)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compiled(fn, **how):
    """torch.compile; in a dry run without code generation, which would take minutes on a CPU."""
    return torch.compile(fn, **how) if DEVICE == "cuda" else torch.compile(fn, backend="aot_eager")


def peak_mib(call):
    """The most memory that a call holds beside what was there before."""
    if DEVICE != "cuda":
        call()
        return 0.0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds(call):
    """What the host takes for it, the GPU being idle."""
    synchronize()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def time_ms(call, rep):
    """p50, p20, p80 in ms over about `rep` ms, between CUDA events, the cache emptied before every call.

    Before it the GPU waits for as long as the host takes to issue the call: times are those of the GPU, also where a
    kernel is shorter than what Python does for it, but for a call that itself waits for the GPU.
    """
    if DEVICE != "cuda":
        return [1e3 * seconds(call)] * 3
    cache = torch.zeros(1 << 25, dtype=torch.int64, device=DEVICE)  # 256 MiB
    cycles = int(3e9 * (min(seconds(call) for _ in range(5)) + 2e-5))  # no GPU's clock is faster, most take 2e9

    def once():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.amax()  # read: zeros written would have to leave the cache first, while the call is timed
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        return start, end

    def all_of(count):
        began = [once() for _ in range(count)]
        synchronize()
        return torch.tensor([start.elapsed_time(end) for start, end in began])

    each = seconds(lambda: all_of(10)) / 10
    return all_of(max(10, int(1e-3 * rep / each))).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def release_memory():
    """What the last contender left: its graphs, its compiled code, its memory."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def parser(doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, fewer contenders")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows that would end later are left out")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks", help="folder for the results")
    return parser


def read_csv(path):
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Run:
    """One table: what it is measured on, where it goes, and how much time is left.

    Kernels are on while it lasts. A row of an earlier run stays until its like is measured again.
    """

    def __init__(self, args, name, draw=None):
        global DEVICE
        self.began, self.name, self.draw, self.minutes = time.monotonic(), name, draw, args.minutes
        self.dry, self.quick, self.failed, self.left_out = args.dry_run, args.quick, [], []
        if not self.dry and not torch.cuda.is_available():
            raise SystemExit("There is no GPU: nothing is measured (--dry-run runs the same code on a CPU).")
        self.before = DEVICE, kernels.use("torch" if self.dry else "triton")
        DEVICE = "cpu" if self.dry else "cuda"
        torch.manual_seed(0)
        self.top = Ceilings() if self.dry else measure_ceilings()
        self.about = about_machine(self.top)
        print(self.about, flush=True)
        gpu = "dry-run" if self.dry else self.about["gpu"].replace(" ", "_").replace("/", "_") + "_quick" * self.quick
        self.folder = args.out / gpu
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.drawn = self.folder / f"{name}.csv", self.began
        self.rows = read_csv(self.path)

    def write(self, key, row):
        """Add a row or replace the one of this key; the file is whole at any time."""
        self.rows = [old for old in self.rows if any(old.get(name) != str(value) for name, value in key.items())]
        self.rows.append(row)
        columns = dict.fromkeys(name for row in self.rows for name in row)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.rename(self.path)
        self.rows = read_csv(self.path)
        if time.monotonic() > self.drawn + 60:
            self.picture()

    def picture(self):
        self.drawn = time.monotonic()
        try:
            if self.draw and self.rows:
                self.draw(self.rows, self.folder / f"{self.name}.png")
        except Exception as error:  # the table matters more
            print(f"no plot: {type(error).__name__}: {error}")

    def measure(self, plan, columns, tiny):
        """plan: (key, seconds on an H100, estimated; what measures the rest of the row); in a dry run `tiny` is
        measured in its place. Returns the exit code."""
        self.handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: what was measured is in the table"))
        print(f"{self.name}: {len(plan)} rows, about {sum(s for _, s, _ in plan) + 15:.0f} s on one H100", flush=True)
        if self.dry:
            print("\n".join(f"{seconds:6.0f} s  {label(key)}" for key, seconds, _ in plan))
            plan = [(key, 0.0, measure) for key, _, measure in tiny]
        began, done = time.monotonic(), 0.0
        try:
            for key, seconds, measure in plan:
                now = time.monotonic()
                pace = max(1.0, (now - began) / done) if done else 1.0  # of a slower card
                if now - self.began + pace * seconds > 60 * self.minutes:
                    self.left_out.append(label(key))
                    continue
                try:
                    row = key | measure()
                    self.write(key, row | self.about)
                    print(show(row, columns), f"  {time.monotonic() - now:.0f} s (estimated {seconds:.0f})", flush=True)
                except Exception:
                    self.failed.append(label(key))
                    print(f"FAILED: {label(key)}\n{traceback.format_exc()}", flush=True)
                    synchronize()  # raises where the GPU no longer answers this process
                done += seconds
                release_memory()
        finally:
            self.close()
        return bool(self.failed)

    def close(self):
        global DEVICE
        DEVICE, mode = self.before
        kernels.use(mode)
        signal.signal(signal.SIGTERM, self.handler)
        self.picture()
        for what, rows in (("failed", self.failed), ("left out, for lack of time", self.left_out)):
            if rows:
                print(f"{self.name}: {what}: {'; '.join(rows)}")
        print(f"{self.name}: {time.monotonic() - self.began:.0f} s, {self.path}", flush=True)


def label(key):
    return " ".join(map(str, key.values()))


def show(row, columns):
    cells = ((name, row.get(name)) for name in columns)
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" if k in ("missed",) else str(v)
                     for k, v in cells if v is not None)


def bars(rows, label, series, path, xlabel, log=True):
    """Horizontal bars: for every row one of each column in `series` {column: name}, where it has a number."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.16 * len(rows) * (len(series) + 1)), layout="constrained")
    height = 1 / (len(series) + 1)
    for i, (column, name) in enumerate(series.items()):
        values = [float(row.get(column) or 0) for row in rows]
        axes.barh([y + height * (i - (len(series) - 1) / 2) for y in range(len(rows))], values, height, label=name)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set(xscale="log" if log else "linear", xlabel=xlabel, title=rows[-1]["gpu"])
    if log:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
