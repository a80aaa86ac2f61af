"""Runs that are disturbed: bad numbers, signals, kills, damaged files, full disks; and runs of two processes."""

import errno
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
from functools import partial
from types import SimpleNamespace

import pytest
import test_train
import torch
from test_train import LLAMA, NO_DISC, VQ, gpt_options, run, same, series, vq_options

import common
import train_gpt
import train_vq
import training

pictures, codes, tiny_presets = test_train.pictures, test_train.codes, test_train.tiny_presets
NAMES = {train_gpt: "gpt.pt", train_vq: "vq.pt"}


# Processes: forked from a server that has imported everything, so each is cheap, and may be killed


SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    SERVER.set_forkserver_preload(["test_training"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 does not tell it
        multiprocessing.forkserver.ensure_running()


def nothing():
    pass


def slow(seconds=0.1):
    """Each update takes longer."""
    update = training.update
    training.update = lambda *args: time.sleep(seconds) or update(*args)


def process(main, before, err, rank, world, port):
    """What a child runs: main(), as torchrun starts it if there are several, after before()."""
    sys.stdout = sys.stderr = open(err, "w", buffering=1)
    torch.set_num_threads(1)
    train_vq.PRESETS["tiny"], train_gpt.PRESETS["tiny"] = VQ, LLAMA
    if world > 1:
        where = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    before()
    common.cli(main)


def script_main(name, words):
    sys.argv = [f"{name}.py", *words]
    sys.modules[name].main()


def launch(main, err, world=1, before=nothing):
    """Start `world` processes that run main(); their messages go to ERR.0, ERR.1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [f"{err}.{rank}" for rank in range(world)]
    children = [SERVER.Process(target=process, args=(main, before, paths[i], i, world, port)) for i in range(world)]
    for child in children:
        child.start()
    return children


def start(script, out, *options, **how):
    words = ["--device", "cpu", "--preset", "tiny", "--out", out, "--log-every", 1, *options]
    return launch(partial(script_main, script.__name__, list(map(str, words))), out, **how)


def finish(children):
    """Their exit codes."""
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def rows(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def load(path):
    return torch.load(path, weights_only=True)


# Signals

LONG = ("--ema", 0.8, "--lr", 1e-3, "--schedule", "cosine", "--save-every", 100)
SIGNALS = {
    "gpt": (train_gpt, lambda p, c: gpt_options(c, "--dropout", 0.1, *LONG), signal.SIGTERM),
    "vq": (train_vq, lambda p, c: vq_options(p, "--disc-start", 2, "--disc-warmup", 1, *LONG), signal.SIGINT),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_after_the_step(name, pictures, codes, tmp_path):
    """Exit code 0, one checkpoint, no step lost; resumed, the run ends in the very weights of one left alone."""
    script, options, number = SIGNALS[name]
    options, (whole, cut) = (*options(pictures, codes), "--max-steps", 10), (tmp_path / "whole", tmp_path / "cut")
    [left_alone], [child] = start(script, whole, *options), start(script, cut, *options, before=slow)
    wait(lambda: (cut / "log.jsonl").exists() and len(rows(cut)) > 2)
    os.kill(child.pid, number)
    assert finish([left_alone, child]) == [0, 0]
    step = load(cut / "state.pt")["step"]
    assert 3 <= step < 10 and [row["step"] for row in rows(cut)] == list(range(1, step + 1))
    assert load(cut / NAMES[script])["step"] == step
    assert not {"state.pt.previous", "result.json", "samples.png", "reconstructions.png"} & set(os.listdir(cut))
    assert f"stopped at step {step}, as a signal asked" in (tmp_path / "cut.0").read_text()
    assert finish(start(script, cut, *options, "--resume", "auto")) == [0]
    states = [load(out / "state.pt") for out in (whole, cut)]
    assert all(state.pop("elapsed") > 0 for state in states) and same(*states)
    assert {"ema", "adamw"} <= set(states[0]) and (name == "gpt" or "disc_adamw" in states[0])
    assert same(load(whole / NAMES[script]), load(cut / NAMES[script]))
    assert series(rows(whole), "loss") == series(rows(cut), "loss")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number, codes, tmp_path):
    out = tmp_path / "run"
    [child] = start(train_gpt, out, *gpt_options(codes, "--max-steps", 9), before=partial(slow, 50))
    wait((out / "codes.png").exists)
    wait(lambda: "0/9" in (tmp_path / "run.0").read_text())
    os.kill(child.pid, number)
    wait(lambda: "a checkpoint after this step" in (tmp_path / "run.0").read_text())
    began = time.monotonic()
    os.kill(child.pid, number)
    assert finish([child]) == [128 + number] and time.monotonic() - began < 10
    assert not (out / "state.pt").exists()


# Steps without a finite gradient


def small(muon):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    args = SimpleNamespace(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    return model, training.make_optimizers(model, args, [model[0].weight, model[2].weight] if muon else ())


def step(model, optimizers, seed, bad=None, inner=None):
    """One update on random data, with NaN in the loss or a bad number in one entry of one gradient."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    loss, weight = model(x).square().mean(), (inner or model)[2].weight
    hook = weight.register_hook(lambda g: g.index_fill(0, torch.tensor(1), {"nan": math.nan, "inf": math.inf}[bad]))
    if bad in (None, "loss"):
        hook.remove()
    (loss * math.nan if bad == "loss" else loss).backward()
    hook.remove()
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


def bad_step_of_one(path):
    """In one of two processes: a run with a bad step in the second process only; what is left goes to PATH.RANK."""
    with training.processes("cpu") as (device, rank, _):
        found = {}
        for bad in ("loss", "nan", "inf"):
            for muon in (False, True):
                model, optimizers = small(muon)
                run_model, count, states = training.parallel(model, device), training.BadSteps(3), []
                for seed in range(4):
                    wrong = bad if seed == 2 and rank == 1 else None
                    count.add(step(run_model, optimizers, 2 * seed + rank, wrong, model))
                    states.append(everything(model, optimizers))
                found[bad, muon] = states, count.pop(4)
        with open(f"{path}.{rank}", "wb") as file:
            pickle.dump(found, file)


def test_a_bad_step_of_one_process_changes_nothing_in_either(tmp_path):
    assert finish(launch(partial(bad_step_of_one, tmp_path / "found"), tmp_path / "err", world=2)) == [0, 0]
    first, second = (pickle.loads((tmp_path / f"found.{rank}").read_bytes()) for rank in range(2))
    assert same(first, second) and len(first) == 6
    for states, counted in first.values():
        assert same(states[1], states[2]) and counted == {"bad_steps": 1}
        assert not same(states[0], states[1]) and not same(states[2], states[3])


def test_bad_steps_are_counted(caplog):
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    count = training.BadSteps(4)
    for norms, found in (([good, good], {}), ([bad, good, bad], {"bad_steps": 2}), ([bad, bad], {"bad_steps": 2}),
                         ([good, good], {}), ([bad, bad, bad, good], {"bad_steps": 3}), ([good], {})):  # fmt: skip
        for norm in norms:
            count.add(norm)
        assert count.pop(7) == found
    assert "3 steps up to step 7 had no finite gradient and changed nothing" in caplog.text
    for norm in (bad, bad, bad):
        count.add(norm)
    assert count.pop(8) == {"bad_steps": 3}
    count.add(bad)  # the fourth in a row, of two log lines
    with pytest.raises(ValueError, match="4 steps in a row, up to step 9, had no finite gradient"):
        count.pop(9)


def test_means_leave_out_what_is_not_finite():
    means = training.Means()
    for value in (1.0, math.nan, 4.0, math.inf):
        means.add(a=torch.tensor(value), b=torch.tensor(math.nan), weight=2.0)
    assert means.pop() == {"a": 2.5} and means.pop() == {}


def test_a_run_of_bad_steps_ends_it(codes, tmp_path, monkeypatch, capsys):
    """Steps 6 on give NaN; the checkpoint of step 5 stands."""
    options, calls, forward = gpt_options(codes, "--save-every", 5, "--eval-every", 99), [], train_gpt.GPT.forward

    def broken(self, *args, **more):
        logits, loss = forward(self, *args, **more)
        calls.extend([1] * self.training)
        return logits, loss * math.nan if self.training and first <= len(calls) <= last else loss

    monkeypatch.setattr(train_gpt.GPT, "forward", broken)
    first, last = 6, 9
    with pytest.raises(SystemExit) as ended:
        common.cli(lambda: run(train_gpt, monkeypatch, tmp_path / "a", *options, "--max-steps", 20, "--max-bad-steps",
                               4, "--log-every", 3))  # fmt: skip
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in err
    assert re.search("error: 4 steps in a row, up to step 9, .*: the last checkpoint stands", err)
    assert [(row["step"], row.get("bad_steps")) for row in rows(tmp_path / "a")] == [(3, None), (6, 1)]
    assert load(tmp_path / "a" / "state.pt")["step"] == load(tmp_path / "a" / "gpt.pt")["step"] == 5
    calls.clear()
    found = run(train_gpt, monkeypatch, tmp_path / "b", *options, "--max-steps", 12, "--max-bad-steps", 5)
    assert [row["step"] for row in found if row.get("bad_steps") == 1 and "loss" not in row] == [6, 7, 8, 9]
    state = load(tmp_path / "b" / "state.pt")
    assert state["step"] == 12 and state["adamw"]["state"][0]["step"] == 8


# Two processes


STILL = ("--dropout", 0, "--cond-dropout", 0)
TWO = {
    "adamw": (train_gpt, lambda p, c: gpt_options(c, *STILL, "--micro-batch-size", 2, "--ema", 0.9), 20, 1e-5),
    "muon": (train_gpt, lambda p, c: gpt_options(c, *STILL, "--optimizer", "muon"), 20, 1e-3),
    "vq": (train_vq, lambda p, c: vq_options(p, *NO_DISC, "--micro-batch-size", 2), 20, 1e-5),
    "critic": (train_vq, lambda p, c: vq_options(p, "--disc-start", 14, "--disc-warmup", 5), 14, 0),
}  # (script, options, steps that are equal, how close the matrices end)
# A critic's batch statistics are, on CPUs, of one process: equal until it is asked. Muon orthogonalises in bfloat16:
# within one step's length. Vectors are left out: AdamW moves biases before a norm, which have no gradient, by noise.


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_what_one_does(name, pictures, codes, tmp_path):
    script, options, equal, close = TWO[name]
    options = (*options(pictures, codes), "--max-steps", 20, "--eval-every", 7, "--save-every", 8, "--lr", 1e-3,
               "--eval-images", 3)  # fmt: skip
    out = {world: tmp_path / str(world) for world in (1, 2)}
    children = [start(script, path, *options, world=world) for world, path in out.items()]
    assert finish(sum(children, [])) == [0, 0, 0]
    one, two = ([row for row in rows(path) if row["step"] <= equal] for path in out.values())
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(series(two, "loss")) == equal
    for part in {"loss", "mse", "val_loss", "val_psnr"} & set(one[0] | one[-1]):
        assert series(two, part) == pytest.approx(series(one, part), rel=1e-5)
    assert len(rows(out[2])) == len(rows(out[1])) and set(os.listdir(out[1])) == set(os.listdir(out[2]))
    assert "step" not in (tmp_path / "2.1").read_text() and "2 x cpu" in (tmp_path / "2.0").read_text()
    if close:
        weights = [load(path / NAMES[script])["model"].items() for path in out.values()]
        first, second = ({k: w for k, w in each if w.dim() > 1} for each in weights)
        torch.testing.assert_close(first, second, atol=close, rtol=0)


def test_one_process_goes_on_as_two(codes, tmp_path):
    options = gpt_options(codes, *STILL, "--lr", 1e-3)
    assert finish(start(train_gpt, tmp_path / "a", *options, "--max-steps", 20)) == [0]
    assert finish(start(train_gpt, tmp_path / "b", *options, "--max-steps", 10)) == [0]
    assert finish(start(train_gpt, tmp_path / "b", *options, "--max-steps", 20, "--resume", world=2)) == [0, 0]
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[1]) == 20
    torch.testing.assert_close(*(load(tmp_path / name / "gpt.pt")["model"] for name in "ab"), atol=1e-5, rtol=1e-5)
    assert len(load(tmp_path / "b" / "state.pt")["rng"]) == 2


# Checkpoints: kills, damage, full disks


def killed(at, after):
    """kill -9 to itself at the file operation number `at` of all that saving does; torch.save is cut in its middle."""
    calls = []

    def fatal(function):
        def counted(*args, **more):
            calls.append(1)
            if len(calls) < at:
                return function(*args, **more)
            if function is save:
                content = io.BytesIO()
                save(args[0], content)
                args[1].write(content.getvalue()[: -1 if after else len(content.getvalue()) // 2])
                args[1].flush()
            elif after:
                function(*args, **more)
            os.kill(os.getpid(), signal.SIGKILL)

        return counted

    save = torch.save
    torch.save = fatal(save)
    for name in ("link", "replace", "fsync"):
        setattr(os, name, fatal(getattr(os, name)))


def test_a_killed_run_goes_on_from_a_whole_file(codes, tmp_path):
    options = gpt_options(codes, "--max-steps", 5, "--save-every", 1, "--ema", 0.8, "--lr", 1e-3)
    assert finish(start(train_gpt, tmp_path / "whole", *options)) == [0]
    moments = random.Random(0).sample([(at, after) for at in range(1, 37) for after in (False, True)], 20)
    outs = [tmp_path / f"{at}{after}" for at, after in moments]
    children = [start(train_gpt, out, *options, before=partial(killed, *moment))[0]
                for out, moment in zip(outs, moments, strict=True)]  # fmt: skip
    assert finish(children) == [-signal.SIGKILL] * 20
    left = {out.name: sorted(os.listdir(out)) for out in outs}
    for path in (path for out in outs for path in out.iterdir() if path.suffix in (".pt", ".previous")):
        assert common.read_file(path)["step"] <= 5
    assert sum(name.endswith(".tmp") for names in left.values() for name in names) > 5
    children = [start(train_gpt, out, *options, "--resume", "auto")[0] for out in outs]
    assert finish(children) == [0] * 20
    for out in outs:
        for name in ("gpt.pt", "state.pt"):
            whole, again = (load(path / name) for path in (tmp_path / "whole", out))
            assert whole.pop("elapsed", 0) != again.pop("elapsed", 1) and same(whole, again)
        assert not list(out.glob("*.tmp")) and len(series(rows(out), "loss")) == 5


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": Trap()})),
    "trap": lambda path: torch.save({"model": Trap()}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_leaves_the_one_before(damage, codes, tmp_path, monkeypatch, caplog, capsys):
    options, out = gpt_options(codes, "--max-steps", 4, "--save-every", 3, "--lr", 1e-3), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    run(train_gpt, monkeypatch, out, *options)
    whole, state, before = load(out / "gpt.pt"), out / "state.pt", out / "state.pt.previous"
    assert (load(state)["step"], load(before)["step"]) == (4, 3)
    DAMAGE[damage](state)
    run(train_gpt, monkeypatch, out, *options, "--resume")
    assert re.search(f"{state}: not a readable checkpoint .*going on from {before}", caplog.text)
    assert same(load(out / "gpt.pt"), whole) and load(state)["step"] == 4
    for path in (state, before):
        DAMAGE[damage](path)
    with pytest.raises(SystemExit) as ended:
        common.cli(lambda: run(train_gpt, monkeypatch, out, *options, "--resume", "auto"))
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and re.search(f"error: {out}/state.pt.*: not a readable checkpoint", err)
    assert not (tmp_path / "trap").exists()


def test_what_resuming_asks_for(codes, tmp_path, monkeypatch):
    options = gpt_options(codes, "--max-steps", 1, "--batch-size", 4)
    with pytest.raises(FileNotFoundError, match="state.pt: no such file"):
        run(train_gpt, monkeypatch, tmp_path / "a", *options, "--resume")
    assert not (tmp_path / "a").exists()
    run(train_gpt, monkeypatch, tmp_path / "a", *options, "--resume", "auto")
    for change, message in ((("--seed", 1), "seed 0, not 1"), (("--batch-size", 2), "batch_size 4, not 2")):
        for how in ("yes", "auto"):
            with pytest.raises(ValueError, match=f"state.pt is of a run with other options .*{message}"):
                run(train_gpt, monkeypatch, tmp_path / "a", *options, *change, "--resume", how)
    os.rename(tmp_path / "a" / "state.pt", tmp_path / "a" / "state.pt.previous")  # whatever took it away
    found = run(train_gpt, monkeypatch, tmp_path / "a", *options, "--max-steps", 2, "--resume", "auto")
    assert series(found, "step") == [1, 1, 2, 2]


@pytest.fixture(params=["tmpfs", "patched"])
def disk(request, tmp_path, monkeypatch):
    """(folder, function that fills or frees its disk)."""
    if request.param == "patched":
        save = torch.save

        def full(yes):
            def fails(content, file):
                file.write(b"x" * 5000)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(torch, "save", fails if yes else save)

        yield tmp_path, full
        return
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of a few megabytes here: {done.stderr.strip()}")

    def full(yes, spare=20000):
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        if yes:
            free = os.statvfs(folder)
            ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - spare)))

    yield folder, full
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("until", [5, 9], ids=["for a while", "to the end"])
def test_a_full_disk_leaves_the_last_checkpoint(until, disk, codes, monkeypatch, capsys, caplog):
    (folder, full), update, steps = disk, training.update, []

    def counted(*args):
        steps.append(1)
        if len(steps) in (3, until):
            full(len(steps) == 3)
            assert not list(out.glob("*.tmp"))
            assert load(out / "state.pt")["step"] == load(out / "gpt.pt")["step"] == 2
        return update(*args)

    monkeypatch.setattr(training, "update", counted)
    out, options = folder / "run", gpt_options(codes, "--max-steps", 6, "--save-every", 1, "--keep-every", 2)
    command = partial(run, train_gpt, monkeypatch, out, *options, "--picture-every", 0)
    if until == 9:
        with pytest.raises(SystemExit) as ended:
            common.cli(command)
        assert ended.value.code == 2
        assert re.search("error: .*the last checkpoint could not be written, the one before", capsys.readouterr().err)
        kept, last, lost = [2], 2, [3, 4, 5, 6]
    else:
        command()
        kept, last, lost = [2, 6], 6, [3, 4]
    assert [int(found) for found in re.findall("no checkpoint at step (.)", caplog.text)] == lost
    assert {name for name in os.listdir(out) if "pt" in name} == {"state.pt", "state.pt.previous", "gpt.pt"} | {
        f"{name}_{step:07}.pt" for name in ("state", "gpt") for step in kept}  # fmt: skip
    assert all(load(path)["step"] == last for path in (out / "state.pt", out / "gpt.pt"))
    assert series(rows(out), "step")[:6] == list(range(1, 7))


@pytest.mark.xfail(strict=True, raises=OSError, reason="RunLog.write lets OSError out: a disk without a byte ends it")
@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_full_disk_loses_log_lines_only(disk, codes, monkeypatch):
    (folder, full), update, steps = disk, training.update, []
    monkeypatch.setattr(training, "update", lambda *args: (steps.append(1), full(len(steps) > 2, 0)) and update(*args))
    steps_before = 60  # more lines than the log's last block holds
    run(train_gpt, monkeypatch, folder / "run", *gpt_options(codes, "--max-steps", steps_before, "--save-every", 2))


def test_checkpoints_that_stay(codes, tmp_path, monkeypatch):
    run(train_gpt, monkeypatch, tmp_path, *gpt_options(
        codes, "--max-steps", 9, "--save-every", 2, "--keep-every", 4))
    found = {path.name: load(path)["step"] for path in tmp_path.iterdir() if ".pt" in path.name}
    assert found == {"state.pt": 9, "gpt.pt": 9, "state.pt.previous": 8, "state_0000004.pt": 4, "gpt_0000004.pt": 4,
                     "state_0000008.pt": 8, "gpt_0000008.pt": 8}  # fmt: skip


@pytest.mark.parametrize("world, options, message", [
    (1, ("--save-every", 4, "--keep-every", 6), "--keep-every 6 is no multiple of --save-every 4"),
    (1, ("--keep-every", -1), "--keep-every cannot be below 0"),
    (1, ("--max-bad-steps", 0), "--max-bad-steps has to be above 0"),
    (3, (), "--batch-size 8 is no multiple of --micro-batch-size 3 times 3 processes"),
    (2, ("--micro-batch-size", 8), "--batch-size 8 is no multiple of --micro-batch-size 8 times 2 processes"),
], ids=str)  # fmt: skip
def test_impossible_options_are_refused(world, options, message, monkeypatch):
    words = ("x", "--out", "x", *gpt_options("x", *options))
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(ValueError, match=message):
        training.check_training_options(train_gpt.options(), world)


def test_out_of_memory_says_what_to_change():
    args = SimpleNamespace(micro_batch_size=12)
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")):
        with pytest.raises(ValueError, match="12 images of y at a time: halve --micro-batch-size"):
            with training.advice(args, "y"):
                raise error
    for error in (RuntimeError("shapes differ"), KeyError("x")):
        with pytest.raises(type(error), match=error.args[0]), training.advice(args, "y"):
            raise error
