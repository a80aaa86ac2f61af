"""The README's tables of what a GPU gives: predictions and targets from the benchmarks, figures from benchmarks/<gpu>/.

    python tests/tables.py [--check]    # writes them between their markers; --check: only says whether they are there

The GPU is an H100 or, if none was measured, the last one that was, and predictions are made from the two ceilings that
were measured with it; without any, from an H100's. What was not measured reads so.
"""

import argparse
import pathlib
import re
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_kernels  # noqa: E402 - needs the path above
import bench_sample  # noqa: E402
import bench_train  # noqa: E402
import bench_vq  # noqa: E402
from benchmark import Ceilings, read_csv  # noqa: E402

import training  # noqa: E402
from gpt import GPT, PRESETS, GPTConfig  # noqa: E402

GPU, NOTHING = "H100", "not measured"
NAMES = "kernels", "sample", "train", "vq"  # of the tables that are shown


def measured_gpu():
    """Folder of the GPU whose figures are shown, or None."""
    last = {}  # folder -> date of its newest row
    for path in (path for name in NAMES for path in ROOT.glob(f"benchmarks/*/{name}.csv")):
        if path.parent.name != "dry-run" and not path.parent.name.endswith("_quick"):
            last[path.parent] = max([last.get(path.parent, ""), *(row["date"] for row in read_csv(path))])
    return max(last, key=lambda folder: (GPU in folder.name, last[folder]), default=None)


def measured(name, **key):
    """The row of a table with these values, or {}."""
    rows = read_csv(gpu / f"{name}.csv") if (gpu := measured_gpu()) else []
    return next((row for row in rows if all(row[k] == str(v) for k, v in key.items())), {})


def ceilings():
    """What predictions are made from, and how to say so."""
    rows = [row for name in NAMES for row in read_csv(gpu / f"{name}.csv")] if (gpu := measured_gpu()) else []
    newest = max(rows, key=lambda row: row["date"], default={})
    if not newest.get("copy_tb_per_s"):
        return Ceilings(), "predicted on an H100"
    copy, matmul = (float(newest[name]) for name in ("copy_tb_per_s", "matmul_tflop_per_s"))
    top = Ceilings(1e12 * copy, 1e12 * matmul, int(newest["multiprocessors"]))
    return top, f"predicted for its {copy:.2f} TB/s and {matmul:.0f} TFLOP/s"


def measured_on():
    return f"measured on one {gpu.name.replace('_', ' ')}" if (gpu := measured_gpu()) else "measured"


def number(row, name, form, factor=1.0):
    return format(factor * float(row[name]), form) if row.get(name) else NOTHING


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def joined(values, unit):
    """Values as "a / b unit"."""
    return f"{' / '.join(values)} {unit}"


def of_kernel(found, unit, cases):
    """Times, the share of the floor, and how often eager PyTorch and torch.compile take as long."""
    if not all(row.get("ours_ms") for row in found):
        return NOTHING
    times = joined([of_time(float(row["ours_ms"]), unit) for row in found], unit)
    if any("tflop_per_s" in case.targets for case in cases):
        times += f" ({joined([number(row, 'tflop_per_s', '.0f') for row in found], 'TFLOP/s')})"
    shares = joined([number(row, "share_of_floor", ".0f", 100) for row in found], "% of the floor")
    names = (("vs_eager", "eager"), ("vs_compile", "compile"))
    ratios = (joined([f"{float(row[name]):.2g}x" for row in found], text) for name, text in names if found[0].get(name))
    return ", ".join((times, shares, *ratios))


def of_time(ms, unit):
    value = 1e3 * ms if unit == "us" else ms
    if unit == "us":
        return f"{value:,.0f}" if value >= 7 else f"{value:.1f}"
    return f"{value:.1f}" if value >= 7 else f"{value:.2f}"


def kernels_table():
    (top, predicted_for), rows = ceilings(), []
    known = {(case.op, case.shape, case.direction): case for case in bench_kernels.cases()}
    for text, bound, keys, registers in bench_kernels.README:
        cases = [known[key] for key in keys]
        unit = "ms" if cases[0].search or cases[0].passes else "us"
        floors = [of_time(case.floor_ms(top), unit) for case in cases]
        floor = f"{bound}, {joined(floors, unit)}" if bound != "latency" else bound
        predicted = joined([of_time(case.predicted_ms(top), unit) for case in cases], unit)
        targets = [case.targets for case in cases]
        if "tflop_per_s" in targets[0]:
            rates = [f"{case.flops / case.predicted_ms(top) / 1e9:.0f}" for case in cases]
            predicted += f" ({joined(rates, 'TFLOP/s')})"
            target = joined([f"{t['tflop_per_s']}" for t in targets], "TFLOP/s")
        elif "ours_ms" in targets[0]:
            target = joined([f"{1e3 * t['ours_ms']:.0f}" if unit == "us" else f"{t['ours_ms']}" for t in targets], unit)
        elif cases[0].passes:
            target = joined([of_time(c.floor_ms(top) / c.targets["share_of_floor"], unit) for c in cases], unit)
        elif "share_of_floor" in targets[0]:
            target = joined([f"{100 * t['share_of_floor']:.0f}" for t in targets], "% of copy").replace(" %", "%")
        else:
            target = "-"
        found = [measured("kernels", op=op, shape=shape, direction=direction) for op, shape, direction in keys]
        used = " / ".join(map(str, registers.values()))
        rows.append((text, floor, used, predicted, target, of_kernel(found, unit, cases)))
    head = ("kernel", "bound by", "registers on sm_90", predicted_for, "target", measured_on())
    return markdown(head, rows)


def sampling_table():
    (top, predicted_for), columns = ceilings(), []
    for preset, target in bench_sample.TARGET_S.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(**PRESETS[preset], grid=(24, 24))).bfloat16()
        few, many = (measured("sample", preset=preset, rows=rows, codes=576) for rows in (16, 256))
        floor, most = (bench_sample.floor_seconds(model, rows, top.copy) for rows in (16, 256))
        predicted = bench_sample.predicted_seconds(model, 16, top.copy)
        columns.append((
            preset, f"{floor:.{2 if floor > 1 else 3}f}", f"{predicted:.2f}", f"{target:.2f}",
            number(few, "ours_s", ".3g"), number(few, "vs_full cache", ".3g"), number(few, "vs_compiled", ".3g"),
            f"{128 / most:.0f}", f"{128 * bench_sample.TARGET_SHARE / most:.0f}", number(many, "images_per_s", ".3g"),
        ))
    vs = {name: f"at least {value}" for name, value in bench_sample.TARGET_VS.items()}
    names = ("seconds", "floor", predicted_for, "target", measured_on(),
             f"times as long: LlamaGen's method ({vs['full cache']})", f"the same compiled ({vs['compiled']})",
             "256 rows, images/s: floor", "target", measured_on())
    head, *rows = zip(names, *columns, strict=True)
    return markdown(head, rows)


def training_table():
    (top, predicted_for), columns = ceilings(), []
    for preset in ("B", "L", "XL"):
        for side in (16, 24):
            with torch.device("meta"):
                model = GPT(bench_train.make_config(preset, side))
            images, ms = bench_train.IMAGES[side], bench_train.predicted_ms(model, side, bench_train.PARTS[preset], top)
            mfu = images * model.flops_per_image() / (1e-3 * ms) / (1e12 * training.PEAK_TFLOPS["H100"])
            found = measured("train", preset=preset, tokens=side**2, images=images)
            target, ratio = bench_train.TARGET_MFU.get(preset), bench_train.TARGET_VS_COMPILE.get(preset)

            def of(name, found=found):
                if not found.get(f"{name}_ms"):
                    return NOTHING
                return f"{number(found, f'{name}_tokens_per_s', ',.0f')} ({number(found, f'{name}_mfu', '.1%')})"

            columns.append((
                f"{preset}, {side * side}", f"{images * side * side / ms:,.0f}k ({mfu:.0%})",
                f"{target:.0%} MFU, {ratio}x torch.compile" if target else "-", of("both"), of("compile"), of("eager"),
                number(found, "both_gib", ".1f"),
            ))
    names = ("tokens/s (MFU) of GPT", predicted_for, "target", f"{measured_on()}: kernels and torch.compile",
             "torch.compile alone", "eager PyTorch", "GiB at the peak")
    head, *rows = zip(names, *columns, strict=True)
    return markdown(head, rows)


def tokenizer_table():
    (top, predicted_for), columns = ceilings(), []
    for job, dtype, images, _ in bench_vq.ROWS:
        ms = bench_vq.predicted_ms("vq16", 256, job, dtype, images, top)
        found = measured("vq", job=job, preset="vq16", dtype=dtype, images=images)
        times = {name: float(found[f"{name}_ms"]) for name in bench_vq.CONTENDERS if found.get(f"{name}_ms")}
        best = min(times, key=times.get, default=None)
        fastest = f"{1e3 * images / times[best]:,.0f} ({best})" if best else NOTHING
        name = {"train": "training", "encode": "encoding", "decode": "decoding"}[job]
        rate = number(found, "images_per_s", ",.0f")
        columns.append((f"{name}, {images}, {dtype}", f"{1e3 * images / ms:,.0f}", rate, fastest))
    names = "images/s of VQ-16", predicted_for, f"{measured_on()}, as the scripts do it", "the fastest way"
    head, *rows = zip(names, *columns, strict=True)
    return markdown(head, rows)


def fill(text):
    """The README with its tables as they have to be."""
    tables = dict(kernels=kernels_table, sampling=sampling_table, training=training_table, tokenizer=tokenizer_table)
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert len(re.findall(pattern, text, re.S)) == 1, f"the README needs one <!-- {name} --> ... <!-- end -->"
        text = re.sub(pattern, lambda found, table=table: found[1] + table() + found[2], text, flags=re.S)
    return text


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README is out of date")
    args = parser.parse_args(words)
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old)
    if args.check:
        print("README.md is up to date" if old == new else "README.md is out of date: python tests/tables.py")
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
