"""Runs that are disturbed: bad numbers, signals, kills, damaged files, full disks; and runs of two processes."""

import io
import json
import math
import multiprocessing.forkserver
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_train
import torch
from test_train import LLAMA, NO_DISC, VQ, gpt_options, run, same, series, vq_options

import checkpoints
import command_line
import common
import data
import distributed
import train_gpt
import train_vq
import training
from codes import CodeFile, CodeWriter

pictures, codes, tiny_presets = test_train.pictures, test_train.codes, test_train.tiny_presets
FILES = {train_gpt: "gpt.pt", train_vq: "vq.pt"}
BARE = ("--dropout", 0, "--cond-dropout", 0, "--lr", 1e-3)
load = partial(torch.load, weights_only=True)
ERRORS = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
SERVER = multiprocessing.get_context("forkserver")  # has imported everything: each process is cheap, may be killed


@pytest.fixture(scope="module", autouse=True)
def server():
    SERVER.set_forkserver_preload(["test_training", "sharding", "torch._dynamo"])  # the last an optimizer imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 does not tell it
        multiprocessing.forkserver.ensure_running()


def process(main, before, words, err, env):
    sys.argv, sys.stdout = words, open(err, "w", buffering=1)
    sys.stderr = sys.stdout
    train_vq.PRESETS["tiny"], train_gpt.PRESETS["tiny"] = VQ, LLAMA
    torch.set_num_threads(1)
    os.environ.update(env)
    before()
    command_line.cli(main)


def start(main, out, *options, world=0, before=list):
    """`world` processes that run main(), as torchrun starts them, or one without it, after before(); they print to
    OUT.0, OUT.1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world))
    words = ["x.py", "--device", "cpu", "--preset", "tiny", "--log-every", 1, "--out", out, *options]
    envs = [dict(env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(world)] or [{}]
    how = main, before, list(map(str, words))
    children = [SERVER.Process(target=process, args=(*how, f"{out}.{i}", env)) for i, env in enumerate(envs)]
    for child in children:
        child.start()
    return children


def group():
    """What torchrun tells its only process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))


def python(code, env):
    """Run it in an interpreter of its own, which has a minute to end."""
    how = dict(env=os.environ | env, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    return subprocess.run([sys.executable, "-c", code], **how)


def finish(children):
    """Their exit codes."""
    return [child.join(300) or child.exitcode for child in children]


def slow(seconds=0.1):
    update = training.update
    training.update = lambda *args: time.sleep(seconds) or update(*args)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait(path, pattern):
    """Until a file holds that."""
    end = time.monotonic() + 300
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


TOLD = "signal {}: a checkpoint after this step, then the end (again: at once)"
SIGNALS = {
    "gpt": (train_gpt, lambda p, c: gpt_options(c, "--dropout", 0.1), signal.SIGTERM, 0),
    "two": (train_gpt, lambda p, c: gpt_options(c, "--optimizer", "muon"), signal.SIGTERM, 2),  # the second hears it
    "vq": (train_vq, lambda p, c: vq_options(p, "--disc-start", 2, "--disc-warmup", 1), signal.SIGINT, 1),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_after_the_step(name, pictures, codes, tmp_path):
    """Exit code 0, one checkpoint, no step lost; resumed, the run ends in the very weights of one left alone."""
    (script, options, number, world), whole, cut = SIGNALS[name], tmp_path / "whole", tmp_path / "cut"
    options = (*options(pictures, codes), "--max-steps", 10, "--ema", 0.8, "--lr", 1e-3, "--schedule", "cosine")
    alone, children = (start(script.main, whole, *options, world=world),
                       start(script.main, cut, *options, world=world, before=slow))
    wait(cut / "log.jsonl", r'"step": 3, .*\n')
    os.kill(children[-1].pid, number)
    assert set(finish(alone + children)) == {0}
    step = load(cut / "state.pt")["step"]
    assert 3 <= step < 10 and series(rows(cut), "step") == list(range(1, step + 1))
    assert load(cut / FILES[script])["step"] == step
    assert not {"state.pt.previous", "result.json", "samples.png", "reconstructions.png"} & set(os.listdir(cut))
    assert f"stopped at step {step}, as a signal asked" in (tmp_path / "cut.0").read_text()
    assert finish(start(script.main, cut, *options, "--resume", "auto", world=world))[0] == 0
    states = [load(out / "state.pt") for out in (whole, cut)]
    assert all(state.pop("elapsed") > 0 for state in states) and same(*states)
    assert {"ema", "adamw", "own"} <= set(states[0]) and (name != "vq" or "disc_adamw" in states[0])
    assert same(load(whole / FILES[script]), load(cut / FILES[script]))
    assert series(rows(whole), "loss") == series(rows(cut), "loss")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number, codes, tmp_path):
    out, said = tmp_path / "run", tmp_path / "run.0"
    [child] = start(train_gpt.main, out, *gpt_options(codes), before=partial(slow, 50))
    wait(said, "[?]step/s")
    os.kill(child.pid, number)
    wait(said, "a checkpoint after this step")
    os.kill(child.pid, number)  # torchrun's copy of the first
    child.join(2.5)
    assert child.is_alive()
    os.kill(child.pid, number)
    child.join(10)
    assert child.exitcode == 128 + number and not (out / "state.pt").exists()


class Interrupted(io.FileIO):
    """A file that a signal meets while it is written to."""

    def write(self, data):
        signal.raise_signal(signal.SIGTERM)
        return super().write(data)


@pytest.mark.parametrize("closed", [False, True])
def test_a_signal_while_the_bar_is_drawn(closed, tmp_path, monkeypatch):
    """It is heard, and told where stderr is open."""
    bar = io.TextIOWrapper(io.BufferedWriter(Interrupted(tmp_path / "stderr", "w")), line_buffering=True)
    monkeypatch.setattr(sys, "stderr", None if closed else bar)
    with distributed.stopping() as asked:
        print("30%", file=bar)
    assert len(asked) == 1
    said = (tmp_path / "stderr").read_text()
    assert said == "30%\n" if closed else sorted(said.split("\n"))[1:] == ["30%", TOLD.format(signal.SIGTERM.value)]


def test_a_closed_terminal_asks_for_a_checkpoint():
    """Unless the run was started to ignore it, as by nohup."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, times in ((signal.SIG_DFL, 1), (signal.SIG_IGN, 0)):
            signal.signal(signal.SIGHUP, handler)
            with distributed.stopping() as asked:
                signal.raise_signal(signal.SIGHUP)
            assert len(asked) == times and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def small(muon):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    args = SimpleNamespace(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    return model, training.make_optimizers(model, args, [model[0].weight, model[2].weight] if muon else ())


def step(model, optimizers, seed, bad=None):
    """One update on random data, with NaN as the loss, or NaN or infinity in one entry of one gradient."""
    loss = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean()
    if bad:
        weight = getattr(model, "module", model)[2].weight
        loss = loss * math.nan if bad == "loss" else loss + float(bad) * weight[1, 2]
    loss.backward()
    return training.update(model, optimizers, 1e-2, 1.0)


def everything(model, optimizers):
    return pickle.loads(pickle.dumps([part.state_dict() for part in (model, *optimizers.values())]))


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize("bad", ["loss", "nan", "inf"])
def test_a_bad_step_changes_nothing(bad, muon):
    run, plain = small(muon), small(muon)
    assert not step(*run, 99, bad).isfinite()  # before there is any memory
    assert same(run[0].state_dict(), plain[0].state_dict())
    for seed in range(6):
        assert step(*run, seed).isfinite() and step(*plain, seed).isfinite()
        before = everything(*run)
        assert same(before, everything(*plain))
        if seed in (1, 2, 4):
            assert not step(*run, seed + 10, bad).isfinite()
            assert same(everything(*run), before) and all(p.grad is None for p in run[0].parameters())
    assert before[1]["state"][0]["step"] == 6 and not same(before[0], small(muon)[0].state_dict())


def bad_step_of_one():
    """One of two processes: runs whose third step is bad in the second process; what came of them goes to its file."""
    found = {}
    with distributed.processes("cpu") as (device, rank, _):
        for bad, muon in ((bad, muon) for bad in ("loss", "nan", "inf") for muon in (False, True)):
            model, optimizers = small(muon)
            run_model, count, states = distributed.parallel(model, device), training.BadSteps(3), []
            for seed in range(4):
                count.add(step(run_model, optimizers, 2 * seed + rank, bad if seed == 2 and rank == 1 else None))
                states.append(everything(model, optimizers))
            found[bad, muon] = states, count.pop(4)
    with open(f"{sys.argv[sys.argv.index('--out') + 1]}.{rank}.pickle", "wb") as file:
        pickle.dump(found, file)


def test_a_bad_step_of_one_process_changes_nothing_in_either(tmp_path):
    assert finish(start(bad_step_of_one, tmp_path / "x", world=2)) == [0, 0]
    first, second = (pickle.loads((tmp_path / f"x.{rank}.pickle").read_bytes()) for rank in range(2))
    assert same(first, second) and len(first) == 6
    for states, counted in first.values():
        assert same(states[1], states[2]) and counted == {"bad_steps": 1}
        assert not same(states[0], states[1]) and not same(states[2], states[3])


def test_bad_steps_are_counted_and_left_out_of_means(caplog):
    count, means = training.BadSteps(4), training.Means()
    for norms, found in (("11", {}), ("x1x", {"bad_steps": 2}), ("xx", {"bad_steps": 2}), ("11", {}),
                         ("xxx1", {"bad_steps": 3}), ("1", {}), ("xxx", {"bad_steps": 3})):
        for norm in norms:
            count.add(torch.tensor(math.nan if norm == "x" else 1.0))
        assert count.pop(7) == found
    assert "bad_steps: 3 up to step 7 had no finite gradient and changed nothing" in caplog.text
    count.add(torch.tensor(math.inf))  # the fourth in a row, of two log lines
    with pytest.raises(ValueError, match="4 steps in a row, up to step 9, had no finite gradient"):
        count.pop(9)
    for value in (1.0, math.nan, 4.0, math.inf):
        means.add(a=torch.tensor(value), b=torch.tensor(math.nan))
    assert means.pop() == {"a": 2.5} and means.pop() == {}


def test_a_row_of_bad_steps_ends_the_run(codes, tmp_path, monkeypatch, capsys):
    """The losses of steps 6 to 9 are NaN."""
    options, calls, forward = gpt_options(codes, "--save-every", 5, "--max-steps", 12), [], train_gpt.GPT.forward

    def broken(self, *args, **more):
        logits, loss = forward(self, *args, **more)
        calls.extend([1] * self.training)
        return logits, loss * math.nan if self.training and 6 <= len(calls) <= 9 else loss

    monkeypatch.setattr(train_gpt.GPT, "forward", broken)
    with pytest.raises(SystemExit, match="2"):
        more = "--max-bad-steps", 4, "--log-every", 3
        command_line.cli(lambda: run(train_gpt, monkeypatch, tmp_path / "a", *options, *more))
    assert re.search("error: 4 steps in a row, up to step 9, .*: the last checkpoint stands", capsys.readouterr().err)
    assert [(row["step"], row.get("bad_steps")) for row in rows(tmp_path / "a")] == [(3, None), (6, 1)]
    assert load(tmp_path / "a" / "state.pt")["step"] == load(tmp_path / "a" / "gpt.pt")["step"] == 5
    calls.clear()
    found = run(train_gpt, monkeypatch, tmp_path / "b", *options, "--max-bad-steps", 5)
    assert [row["step"] for row in found if row.get("bad_steps") == 1 and "loss" not in row] == [6, 7, 8, 9]
    state = load(tmp_path / "b" / "state.pt")
    assert state["step"] == 12 and state["adamw"]["state"][0]["step"] == 8


# Script, options, steps, how many of them are equal, how close the weights end. Two images are two summands, whose sum
# has no order: equal bit for bit. Four pairs are added up in another order, and where rounding moves a code, tokenizers
# part: after ten steps on some CPUs. A critic's batch statistics are, on CPUs, of one process: equal until it is asked.
# Muon orthogonalises in bfloat16: within the length of one step. Where weights are near, not equal, vectors are left
# out: biases before a norm have no gradient but rounding, of which AdamW makes steps.
PAIR = ("--batch-size", 2, "--micro-batch-size", 1, "--lr", 1e-3)
TWO = {
    "gpt": (train_gpt, lambda p, c: gpt_options(c, *BARE, *PAIR), 20, 20, 0),
    "adamw": (train_gpt, lambda p, c: gpt_options(c, *BARE, "--micro-batch-size", 2, "--ema", 0.9), 20, 20, 1e-5),
    "muon": (train_gpt, lambda p, c: gpt_options(c, *BARE, "--optimizer", "muon"), 20, 20, 1e-3),
    "vq": (train_vq, lambda p, c: vq_options(p, *NO_DISC, *PAIR), 20, 20, 0),
    "four pairs": (train_vq, lambda p, c: vq_options(p, *NO_DISC, "--lr", 1e-3, "--micro-batch-size", 2), 8, 8, 1e-5),
    "critic": (train_vq, lambda p, c: vq_options(p, "--lr", 1e-3, "--disc-start", 14, "--disc-warmup", 5),
               20, 14, None),
}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_what_one_does(name, pictures, codes, tmp_path):
    (script, options, steps, equal, close), outs = TWO[name], [tmp_path / "1", tmp_path / "2"]
    often = "--eval-every", 7, "--eval-images", 3, "--save-every", 8
    options = (*options(pictures, codes), "--max-steps", steps, *often)
    children = [start(script.main, out, *options, world=world) for world, out in enumerate(outs, 1)]
    assert finish(sum(children, [])) == [0, 0, 0]
    one, two = ([row for row in rows(out) if row["step"] <= equal] for out in outs)
    assert series(one, "step") == series(two, "step") and len(series(two, "loss")) == equal
    for part in {"loss", "mse", "val_loss", "val_psnr"} & set(one[0] | one[-1]):
        assert series(two, part) == pytest.approx(series(one, part), rel=1e-5)
    assert len(rows(outs[0])) == len(rows(outs[1])) and set(os.listdir(outs[0])) == set(os.listdir(outs[1]))
    assert "step" not in (tmp_path / "2.1").read_text() and "2 x cpu" in (tmp_path / "2.0").read_text()
    if close is not None:
        weights = [load(out / FILES[script])["model"].items() for out in outs]
        compared = [{k: w for k, w in each if w.is_floating_point() and (w.dim() > 1 or not close)} for each in weights]
        first, second = compared
        torch.testing.assert_close(first, second, atol=close, rtol=0)


# Script, options, processes: some of what is compiled by default on a GPU. Of the critic a little: AdamW's first step
# makes as much of a gradient that is rounding alone as of any other
COMPILED = {
    "vq": (train_vq, lambda p, c: vq_options(p, "--micro-batch-size", 4, "--disc-start", 3, "--disc-warmup", 1,
                                             "--disc-weight", 0.005, "--kmeans-step", 2, "--restart-every", 4,
                                             "--ema", 0.9), 0),
    "gpt": (train_gpt, lambda p, c: gpt_options(c, *BARE, "--micro-batch-size", 4, "--code-features", "--ema", 0.9), 0),
    "two": (train_gpt, lambda p, c: gpt_options(c, "--lr", 1e-3, "--dropout", 0.3, "--micro-batch-size", 2,
                                               "--activation-checkpointing"), 2),
    "sharded": (train_gpt, lambda p, c: gpt_options(c, *BARE, "--fsdp", "--activation-checkpointing"), 2),
}


def trace_only(graphs):
    """torch.compile without generated code, which takes the CPU's compiler half a minute; no more than `graphs`."""
    backend = torch._dynamo.lookup_backend("aot_eager")
    traced = lambda graph, inputs: print("a graph") or backend(graph, inputs)  # noqa: E731
    torch.compile = partial(torch.compile, backend=traced, fullgraph=True)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = graphs, True


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_are_the_same(name, pictures, codes, tmp_path):
    """Other shapes, evaluations and pictures compile nothing; of a GPT's blocks the first, without a residual, and the
    rest make a graph each."""
    (script, options, world), outs = COMPILED[name], [tmp_path / "eager", tmp_path / "compiled"]
    options = (*options(pictures, codes), "--max-steps", 6, "--eval-every", 3, "--picture-every", 4, "--save-every", 4)
    graphs = 1 if script is train_vq else 2
    children = start(script.main, outs[0], *options, "--no-compile", world=world)
    children += start(script.main, outs[1], *options, "--compile", world=world, before=partial(trace_only, graphs))
    assert set(finish(children)) == {0}
    eager, compiled = map(rows, outs)
    assert (tmp_path / "compiled.0").read_text().count("a graph\n") == graphs
    assert len(series(compiled, "loss")) == 6 and len(series(compiled, "val_loss")) == 2
    for part in ("loss", "grad_norm", "val_loss", "disc_loss"):
        close = 1e-3 if script is train_vq else 1e-5  # a tokenizer's codes move where rounding does
        assert series(compiled, part) == pytest.approx(series(eager, part), rel=close)
    names = [load(out / FILES[script])["model"].keys() for out in outs]
    assert names[0] == names[1]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by /proc")
def test_no_thread_outlives_the_group():
    """One of Gloo's that still lets go of a tensor aborts a process whose interpreter is ending (SIGABRT)."""
    code = """import os, torch, distributed
with distributed.processes("cpu"):
    import torch._dynamo
    distributed.total(torch.ones(1))
print(*(open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")))"""
    done = python(code, group())
    assert done.returncode == 0 and "python" in done.stdout and "gloo" not in done.stdout


@pytest.mark.parametrize("world", [0, 1])
def test_an_error_ends_a_run_with_workers(world, pictures):
    """They outlive SIGTERM, by which Python would end them, and the error still holds what reads from them."""
    code = f"""import pathlib, command_line, data, distributed
def main():
    with distributed.processes("cpu"):
        batches = data.image_batches(data._scan(pathlib.Path({str(pictures)!r})), 16, 2, seed=0, workers=2)
        raise ValueError(f"after a batch of {{len(next(batches)[0])}}")
command_line.cli(main)"""
    done = python(code, group() if world else {})
    assert done.returncode == 2 and done.stderr.endswith("error: after a batch of 2\n")


def test_a_killed_worker_is_told(pictures):
    """The system kills what takes too much memory."""
    code = f"""import multiprocessing, pathlib, command_line, data
def main():
    batches = data.image_batches(data._scan(pathlib.Path({str(pictures)!r})), 16, 2, seed=0, workers=2)
    next(batches)
    multiprocessing.active_children()[0].kill()
    for _ in batches:
        pass
command_line.cli(main)"""
    done = python(code, {})
    assert done.returncode == 2 and "error: a process of --workers was killed, perhaps for its memory" in done.stderr


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_it_hands_over_is_told(error, monkeypatch, capsys):
    class Loader:
        def __init__(self, *_, num_workers, **__):
            self.num_workers = num_workers

        def __iter__(self):
            yield torch.zeros(1), torch.zeros(1), torch.zeros(1), []
            raise error

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    batches = data.image_batches(data.ImageSet([None], [0], [""], [""], False), 8, 1, seed=0, workers=2)
    next(batches)
    with pytest.raises(SystemExit, match="2"):
        command_line.cli(lambda: next(batches))
    assert "error: a process of --workers was killed, perhaps for its memory" in capsys.readouterr().err
    batches = data.image_batches(data.ImageSet([None], [0], [""], [""], False), 8, 1, seed=0)
    next(batches)
    with pytest.raises(type(error)):  # without workers it is what it is
        next(batches)


def test_one_process_goes_on_as_two(codes, tmp_path):
    options, (a, b) = gpt_options(codes, *BARE, "--max-steps", 20), (tmp_path / "a", tmp_path / "b")
    children = start(train_gpt.main, a, *options) + start(train_gpt.main, b, *options, "--max-steps", 10)
    assert finish(children) == [0, 0]
    assert finish(start(train_gpt.main, b, *options, "--resume", world=2)) == [0, 0]
    assert series(rows(b), "loss") == pytest.approx(series(rows(a), "loss"), rel=1e-5) and len(rows(b)) == 22
    torch.testing.assert_close(*(load(out / "gpt.pt")["model"] for out in (a, b)), atol=1e-5, rtol=0)
    assert len(load(b / "state.pt")["own"]) == 2


def killed(at, after):
    """kill -9 itself before or after file operation number `at` of all that saving does; torch.save: half way."""
    calls, save = [], torch.save

    def fatal(function, *args, **how):
        calls.append(1)
        if len(calls) < at or after or function is save:
            function(*args, **how)
        if len(calls) >= at:
            if function is save and not after:
                args[1].truncate(args[1].tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = partial(fatal, save)
    for name in ("link", "rename", "replace", "fsync"):
        setattr(os, name, partial(fatal, getattr(os, name)))


def killed_between():
    """kill -9 itself when the checkpoint has become the previous one, and the new one is not there yet."""
    rename = os.rename

    def fatal(source, target):
        rename(source, target)
        if str(target).endswith(".previous"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = fatal


def check_left(outs, step_of):
    """Where a checkpoint was once written there is one, and between two the one before."""
    for out in outs:
        if (out / "gpt.pt").exists() and load(out / "gpt.pt")["step"] > 1:
            assert (out / "state.pt").exists() or (out / "state.pt.previous").exists(), out
    between = outs[-1]
    assert not (between / "state.pt").exists() and step_of(between / "state.pt.previous") == 1


def test_a_killed_run_goes_on_from_a_whole_file(codes, tmp_path):
    options = gpt_options(codes, "--max-steps", 5, "--save-every", 1, "--ema", 0.8, "--lr", 1e-3)
    moments = random.Random(0).sample([(at, after) for at in range(1, 37) for after in (False, True)], 20)
    outs = {tmp_path / f"{at} {after}": partial(killed, at, after) for at, after in moments}
    outs[tmp_path / "between"] = killed_between
    children = [start(train_gpt.main, out, *options, before=kill)[0] for out, kill in outs.items()]
    assert finish(children + start(train_gpt.main, tmp_path / "whole", *options)) == 21 * [-signal.SIGKILL] + [0]
    assert len(list(tmp_path.glob("*/*.tmp"))) > 5
    check_left(list(outs), lambda path: load(path)["step"])
    for path in (path for end in ("pt", "previous") for path in tmp_path.glob(f"*/*.{end}")):
        assert 1 <= common.read_file(path)["step"] <= 5
    assert finish([start(train_gpt.main, out, *options, "--resume", "auto")[0] for out in outs]) == 21 * [0]
    assert not list(tmp_path.glob("*/*.tmp"))
    for out, name in ((out, name) for out in outs for name in ("gpt.pt", "state.pt")):
        whole, again = (load(path / name) for path in (tmp_path / "whole", out))
        assert whole.pop("elapsed", 0) != again.pop("elapsed", 1) and same(whole, again)
        assert series(rows(out), "loss") == series(rows(tmp_path / "whole"), "loss")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


DAMAGE = {  # as docs/errors.md lists it
    "cut short": (lambda path: os.truncate(path, path.stat().st_size * 2 // 3), "cut short"),
    "empty": (lambda path: os.truncate(path, 0), "cut short"),
    "a pickle with code": (lambda path: path.write_bytes(pickle.dumps({"model": Trap()})),
                           "torch.save wrote no such file"),
    "a file of torch.save with code": (lambda path: torch.save({"model": Trap()}, path),
                                       "it holds more than weights and plain values"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_leaves_the_one_before(name, codes, tmp_path, monkeypatch, caplog, capsys):
    options, out = gpt_options(codes, "--max-steps", 4, "--save-every", 3, "--lr", 1e-3), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    run(train_gpt, monkeypatch, out, *options)
    whole, state, before = load(out / "gpt.pt"), out / "state.pt", out / "state.pt.previous"
    assert (load(state)["step"], load(before)["step"]) == (4, 3)
    damage, reason = DAMAGE[name]
    damage(state)
    run(train_gpt, monkeypatch, out, *options, "--resume")
    assert f"{state}: not a readable checkpoint ({reason}); going on from {before}" in caplog.text
    assert f"| {name} | not a readable checkpoint ({reason}) |" in ERRORS
    assert same(load(out / "gpt.pt"), whole) and load(state)["step"] == 4
    assert (out / "state.pt.damaged").exists() and load(before)["step"] == 3  # the whole one stood until the next was
    for path in (state, before):
        damage(path)
    with pytest.raises(SystemExit, match="2"):
        command_line.cli(lambda: run(train_gpt, monkeypatch, out, *options, "--resume", "auto"))
    assert f"error: {before}: not a readable checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "trap").exists()


def test_what_resuming_asks_for(codes, tmp_path, monkeypatch):
    options, out = gpt_options(codes, "--max-steps", 1, "--batch-size", 4), tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="state.pt: no such file"):
        run(train_gpt, monkeypatch, out, *options, "--resume")
    assert not out.exists()
    run(train_gpt, monkeypatch, out, *options, "--resume", "auto")
    before = load(out / "state.pt")
    with pytest.raises(ValueError, match="a holds a run: --resume goes on with it, --resume no starts over"):
        run(train_gpt, monkeypatch, out, "--codes", tmp_path / "missing")  # said before anything is read
    assert same(load(out / "state.pt"), before)
    for split in ("train", "val"):
        file = CodeFile(codes / split)
        with CodeWriter(tmp_path / "narrow" / split, (2, 2), file.codebook_size, file.meta) as writer:
            writer.write(file.codes[:, :, :4], file.labels)
    with pytest.raises(ValueError, match=r"state.pt is of a run with other options .grid .2, 3., not .2, 2.."):
        run(train_gpt, monkeypatch, out, "--codes", tmp_path / "narrow", *options[2:], "--resume")
    for change, message in ((("--seed", 1), "seed 0, not 1"), (("--batch-size", 2), "batch_size 4, not 2"),
                            (("--cond-rope", "zero"), "cond_rope identity, not zero")):
        for how in ("yes", "auto"):
            with pytest.raises(ValueError, match=f"state.pt is of a run with other options .*{message}"):
                run(train_gpt, monkeypatch, out, *options, *change, "--resume", how)
    torch.save({name: x for name, x in load(out / "state.pt").items() if name != "config"}, out / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt is of a run with other options .cos .7, 8., not .5, 8.."):
        run(train_gpt, monkeypatch, out, "--codes", tmp_path / "narrow", *options[2:], "--resume")
    os.rename(out / "state.pt", out / "state.pt.previous")  # of an earlier version, and whatever took it away
    (out / "config.json").write_text('{"cut')
    found = run(train_gpt, monkeypatch, out, *options, "--max-steps", 2, "--resume", "auto")
    assert series(found, "step") == [1, 1, 2, 2]
    assert series(run(train_gpt, monkeypatch, out, *options, "--resume", "no"), "step") == [1, 1]
    assert (out / "state.pt").exists() and not (out / "state.pt.previous").exists()  # the other run's are gone


def test_a_resumed_run_decays_as_its_own_options_say(codes, tmp_path, monkeypatch):
    options = gpt_options(codes, "--max-steps")
    run(train_gpt, monkeypatch, tmp_path, *options, 1)
    run(train_gpt, monkeypatch, tmp_path, *options, 2, "--dropout", 0.3, "--resume")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["dropout"] == "0.3" and [c["options"]["dropout"] for c in config["earlier"]] == ["0.1"]
    run(train_gpt, monkeypatch, tmp_path, *options, 3, "--resume")
    config = json.loads((tmp_path / "config.json").read_text())
    assert [c["options"]["max_steps"] for c in (*config["earlier"], config)] == ["1", "2", "3"]
    run(train_gpt, monkeypatch, tmp_path, *options, 1, "--resume", "no")
    run(train_gpt, monkeypatch, tmp_path, *options, 2, "--weight-decay", 0.7, "--beta2", 0.5, "--resume")
    state = load(tmp_path / "state.pt")["adamw"]
    assert [(group["weight_decay"], group["betas"]) for group in state["param_groups"]] == [
        (0.7, (0.9, 0.5)), (0.0, (0.9, 0.5))]
    assert state["state"][0]["step"] == 2


def test_a_training_state_is_no_model(codes, tmp_path, monkeypatch):
    run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 1))
    with pytest.raises(ValueError, match="state.pt is a training state, for --resume: the model is the other .pt file"):
        common.read_weights(tmp_path / "state.pt")


def test_weights_that_are_not_finite_replace_no_checkpoint(codes, tmp_path, monkeypatch):
    def broken(model, *args, update=training.update):
        norm = update(model, *args)
        if (tmp_path / "state.pt").exists():
            model.output.weight.data[1, 2] = math.inf
        return norm

    monkeypatch.setattr(training, "update", broken)
    with pytest.raises(ValueError, match="the weights are not finite at step 2: the last checkpoint stands"):
        run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 3, "--save-every", 1))
    assert load(tmp_path / "state.pt")["step"] == load(tmp_path / "gpt.pt")["step"] == 1


@pytest.fixture(params=["tmpfs", "patched"])
def disk(request, tmp_path, monkeypatch):
    """(folder, function that leaves so many free bytes on its disk, or None: as many as there were)."""
    folder, ballast, true = tmp_path / "small", tmp_path / "small" / "ballast", torch.save
    folder.mkdir()
    if request.param == "patched":
        def save(content, file):
            raise OSError(file.write(b"x" * 28), "No space left on device")

        yield folder, lambda spare: monkeypatch.setattr(torch, "save", true if spare is None else save)
        return
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of a few megabytes here: {done.stderr.strip()}")

    def full(spare):
        ballast.unlink(missing_ok=True)
        free = os.statvfs(folder)
        ballast.write_bytes(bytes(0 if spare is None else max(0, free.f_bavail * free.f_bsize - spare)))

    yield folder, full
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("until", [5, 9], ids=["for a while", "to the end"])
def test_a_full_disk_leaves_the_last_checkpoint(until, disk, codes, monkeypatch, capsys, caplog):
    (folder, full), update, steps = disk, training.update, []
    out, options = folder / "run", gpt_options(codes, "--max-steps", 6, "--save-every", 1, "--keep-every", 2)

    def counted(*args):
        steps.append(1)
        if len(steps) in (3, until):
            full(20000 if len(steps) == 3 else None)
            assert load(out / "state.pt")["step"] == load(out / "gpt.pt")["step"] == 2 and not list(out.glob("*.tmp"))
        return update(*args)

    monkeypatch.setattr(training, "update", counted)
    command, last = partial(run, train_gpt, monkeypatch, out, *options), 6 if until == 5 else 2
    if last == 6:
        command()
    else:
        with pytest.raises(SystemExit, match="2"):
            command_line.cli(command)
        assert re.search("error: .*the last checkpoint could not be written, the one before", capsys.readouterr().err)
    assert list(map(int, re.findall("no checkpoint at step (.)", caplog.text))) == list(range(3, min(until, 7)))
    assert {name for name in os.listdir(out) if ".pt" in name} == {"state.pt", "state.pt.previous", "gpt.pt"} | {
        f"{name}_{step:07}.pt" for name in ("state", "gpt") for step in {2, last}}
    assert all(load(path)["step"] == last for path in (out / "state.pt", out / "gpt.pt"))
    assert series(rows(out), "step")[:6] == list(range(1, 7))


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_full_disk_loses_no_log_line(disk, codes, monkeypatch):
    """More lines than the log's last block holds; there is room again in step 58 of 60."""
    (folder, full), update, steps = disk, training.update, []
    fill = lambda: steps.append(1) or full(0 if 2 < len(steps) < 58 else None)  # noqa: E731
    monkeypatch.setattr(training, "update", lambda *args: fill() or update(*args))
    rows = run(train_gpt, monkeypatch, folder / "run", *gpt_options(codes, "--max-steps", 60))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))  # lines waited, and came


def test_checkpoints_that_stay(codes, tmp_path, monkeypatch):
    run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 9, "--save-every", 2, "--keep-every", 4))
    assert {path.name: load(path)["step"] for path in tmp_path.iterdir() if ".pt" in path.name} == {
        "state.pt": 9, "gpt.pt": 9, "state.pt.previous": 8, "state_0000004.pt": 4, "gpt_0000004.pt": 4,
        "state_0000008.pt": 8, "gpt_0000008.pt": 8}


def test_a_second_name_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"abc")
    for _ in range(2):  # the second time they are one file already
        checkpoints.keep(path, "b.pt")
        assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"] and (tmp_path / "b.pt").samefile(path)
    monkeypatch.setattr(os, "link", lambda *_: os.stat("/none"))  # no hard links here
    checkpoints.keep(path, "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == b"abc"
    monkeypatch.setattr(checkpoints.shutil, "copyfile", lambda _, copy: copy.write_bytes(b"a") and os.stat("/none"))
    with pytest.raises(OSError):
        checkpoints.keep(path, "d.pt")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt", "c.pt"]


def test_what_a_process_takes_of_the_machine(monkeypatch):
    """Its own GPU under torchrun, which is the current one; and NCCL where gradients are exchanged, only."""
    backends, current = [], []
    by_name = dict(auto="cuda:0", cuda="cuda:0")
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device(by_name.get(name, name)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, timeout: backends.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.processes("auto") as found:
        assert found == (torch.device("cuda:0"), 0, 1) and not backends and current == [0]
    for name, value in dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4").items():
        monkeypatch.setenv(name, value)
    for name, gradients, device, backend in (
        ("auto", True, "cuda:1", "cpu:gloo,cuda:nccl"), ("auto", False, "cuda:1", "gloo"), ("cpu", True, "cpu", "gloo"),
    ):
        with distributed.processes(name, gradients=gradients) as found:
            assert found == (torch.device(device), 3, 4) and backends.pop() == backend
    assert current == [0, 1, 1]
    with pytest.raises(ValueError, match="--device cuda:1 is one GPU, and there are 4 processes"):
        distributed.own_device("cuda:1")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device("cuda") == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # RANK and this, without torchrun's address of the first process
    with distributed.processes("cuda:1") as found:
        assert found == (torch.device("cuda:1"), 0, 1) and not backends
    for name, value in dict(RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1").items():  # torchrun with one process
        monkeypatch.setenv(name, value)
    with distributed.processes("auto") as found:
        assert found == (torch.device("cuda:0"), 0, 1) and backends == ["cpu:gloo,cuda:nccl"] and current[-1] == 0


def test_what_is_fetched_is_fetched_once_a_node(monkeypatch):
    """The first process before the others, also where it fails: they must not wait for it for ever."""
    order = []
    monkeypatch.setattr(distributed, "agree", lambda _: order.append("met"))
    for local, expected in (("0", ["fetched", "met"]), ("1", ["met", "fetched"])):
        for error in (None, FileNotFoundError):
            monkeypatch.setenv("LOCAL_RANK", local)
            with pytest.raises(error) if error else nullcontext(), distributed.in_turn():
                order.append("fetched")
                if error:
                    raise error
            assert order == expected
            order.clear()


def test_a_gpu_has_a_number(monkeypatch):
    """Which torch.cuda.set_device asks for; "cuda" alone is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = SimpleNamespace(device=torch.device("cuda:0"), tolist=list)
    monkeypatch.setattr(torch, "empty", lambda *_, device: empty if device == torch.device("cuda") else None)
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda:0")


def test_impossible_options_are_refused(monkeypatch):
    for world, options, message in (
        (1, ("--save-every", 4, "--keep-every", 6), "--keep-every 6 is no multiple of --save-every 4"),
        (1, ("--save-every", 0, "--keep-every", 5), "--keep-every 5 keeps what --save-every writes, and that is 0"),
        (1, ("--keep-every", -1), "--keep-every cannot be below 0"),
        (1, ("--max-bad-steps", 0), "--max-bad-steps has to be above 0"),
        (3, (), "--batch-size 8 is no multiple of --micro-batch-size 3 times 3 processes"),
        (2, ("--micro-batch-size", 8), "--batch-size 8 is no multiple of --micro-batch-size 8 times 2 processes"),
    ):
        monkeypatch.setattr(sys, "argv", list(map(str, ("x", "--out", "x", *gpt_options("x", *options)))))
        with pytest.raises(ValueError, match=message):
            training.check_training_options(train_gpt.options(), world)


def test_peak_of_the_device_that_is_there(monkeypatch):
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125,
        "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165, "AMD Instinct MI300X": 1307, "NVIDIA RTX A4000": None,
        "NVIDIA RTX A1000": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA H200": 989,
        "NVIDIA H200 NVL": 835, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA RTX 6000 Ada Generation": 364,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert training.peak_flops(torch.device("cuda"), "bfloat16") == (peak and peak * 1e12)
        assert training.peak_flops(torch.device("cuda"), "float32") is None
    assert training.peak_flops(torch.device("cpu"), "bfloat16") is None


def test_emulated_bfloat16_is_not_picked(monkeypatch):
    """V100 and T4 compute it by way of float32, and slower than that."""
    for native in (True, False):
        supported = lambda including_emulation=True, native=native: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert common.pick_dtype("auto", torch.device("cuda")) == ("bfloat16" if native else "float32")
        assert common.pick_dtype("bfloat16", torch.device("cuda")) == "bfloat16"
        assert common.pick_dtype("auto", torch.device("cpu")) == "float32"


def test_share_of_the_peak_is_logged(codes, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "peak_flops", lambda device, dtype: 1e9)
    row = run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 1))[0]
    parameters = 2 * (4 * 32 * 32 + 3 * 32 * 48) * 6 + 6 * 32 * 32  # 2 blocks over 6 tokens, and the output
    attention = 2 * 2 * 32 * (1 + 2 + 3 + 4 + 5 + 6)
    assert row["mfu"] == pytest.approx(6 * (parameters + attention) * row["tokens_per_s"] / 6 / 1e9, rel=1e-4)


def test_out_of_memory_says_what_to_change():
    args = SimpleNamespace(micro_batch_size=12)
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")):
        with pytest.raises(ValueError, match="12 images of y at a time: halve --micro-batch-size"):
            with training.advice(args, "y"):
                raise error
    with pytest.raises(RuntimeError, match="shapes differ"), training.advice(args, "y"):
        raise RuntimeError("shapes differ")
