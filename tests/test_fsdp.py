"""Sharded training: two processes against one, checkpoints in shards, and what may happen to them."""

import io
import math
import os
import pickle
import random
import signal
import sys
from functools import partial

import pytest
import test_train
import test_training
import torch
from test_train import LLAMA, gpt_options, run, same, series
from test_training import (
    BARE,
    Trap,
    check_left,
    finish,
    killed,
    killed_between,
    load,
    rows,
    small,
    start,
    step,
)
from torch.distributed.checkpoint import metadata

import checkpoints
import command_line
import distributed
import gpt
import sharding
import train_gpt
import training
from gpt import GPT, GPTConfig
from sample import generate

codes, tiny_presets, server, disk = test_train.codes, test_train.tiny_presets, test_training.server, test_training.disk
FSDP = ("--fsdp", "--eval-every", 7, "--eval-images", 3, "--lr", 1e-3)


def start_gpt(out, codes, *options, **how):
    return start(train_gpt.main, out, *gpt_options(codes), *options, **how)


def weights(out):
    return load(out / "gpt.pt")["model"]


KINDS = {
    "adamw": ("--micro-batch-size", 2, "--activation-checkpointing", "--ema", 0.9),
    "code features": ("--code-features", "--n-kv-head", 1, "--eval-images", 1),  # fewer than processes
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_processes_train_what_one_does(kind, codes, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = (*BARE, "--max-steps", 20, *FSDP[1:], *KINDS[kind])
    children = start_gpt(one, codes, *options) + start_gpt(two, codes, *options, "--fsdp", world=2)
    assert finish(children) == [0, 0, 0]
    assert set(os.listdir(one)) == set(os.listdir(two)) and len(series(rows(two), "loss")) == 20
    for name in ("step", "loss", "val_loss", "grad_norm"):
        assert series(rows(two), name) == pytest.approx(series(rows(one), name), rel=1e-5)
    torch.testing.assert_close(weights(one), weights(two), atol=1e-4, rtol=0)
    shards = [path.stat().st_size for path in (two / "state.pt").glob("*.distcp")]
    assert len(shards) == 2 and min(shards) > 0.8 * max(shards) and (one / "state.pt").is_file()


def test_muon_and_bfloat16_are_near(codes, tmp_path):
    """Sums of bfloat16 products are rounded in shards: near, not equal."""
    for more in (("--optimizer", "muon"), ("--dtype", "bfloat16")):
        one, two = tmp_path / more[1], tmp_path / f"{more[1]}2"
        children = [start_gpt(out, codes, *BARE, *more, "--max-steps", 8, *FSDP[3:], *fsdp, world=2)
                    for out, fsdp in ((one, ()), (two, ("--fsdp",)))]
        assert finish(sum(children, [])) == 4 * [0]
        losses = [torch.tensor(series(rows(out), "loss")) for out in (one, two)]
        torch.testing.assert_close(*losses, atol=0.02, rtol=0)


def test_blocks_are_gathered_in_bfloat16_the_rest_in_float32(monkeypatch):
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    model = GPT(GPTConfig(**LLAMA, vocab_size=32, num_classes=3, grid=(2, 3)))
    with distributed.processes("cpu") as (device, _, world):
        assert world == 1
        sharding.shard(model, model.layers, device, "bfloat16")
        assert distributed.sharded(model) and {p.dtype for p in model.parameters()} == {torch.float32}
        for part in (model, *model.layers):
            part.unshard()
        whole = {name: p.dtype for name, p in model.named_parameters()}
    assert not distributed.sharded(model)
    assert all((dtype == torch.bfloat16) == name.startswith("layers.") for name, dtype in whole.items())


def test_a_sharded_run_goes_on_exactly_and_as_any_number_of_processes(codes, tmp_path):
    whole, options = tmp_path / "whole", (*FSDP, "--dropout", 0.1, "--ema", 0.8, "--optimizer", "muon")
    cut = {name: tmp_path / name for name in ("two", "one", "plain")}
    children = start_gpt(whole, codes, *options, "--max-steps", 12, world=2)
    for out in cut.values():
        children += start_gpt(out, codes, *options, "--max-steps", 6, world=2)
    assert set(finish(children)) == {0}
    again = {"two": (2, options), "one": (1, options), "plain": (0, options[1:])}
    children = [start_gpt(cut[name], codes, *how, "--resume", "--max-steps", 12, world=world)
                for name, (world, how) in again.items()]
    assert set(finish(sum(children, []))) == {0}
    assert same(load(whole / "gpt.pt"), load(cut["two"] / "gpt.pt"))
    a, b = (load(out / "state.pt" / "rest.pt") for out in (whole, cut["two"]))
    assert a.pop("elapsed") != b.pop("elapsed") and same(a, b)
    for out in cut.values():  # dropout draws other numbers on other numbers of processes
        assert series(rows(out), "loss") == pytest.approx(series(rows(whole), "loss"), abs=0.05) and len(rows(out)) > 12
    assert load(cut["plain"] / "state.pt")["adamw"]["state"][0]["step"] == 12  # its memory came along
    assert (cut["plain"] / "state.pt").is_file() and (cut["plain"] / "state.pt.previous").is_dir()
    assert len(list((cut["one"] / "state.pt").glob("*.distcp"))) == 1


def test_without_dropout_other_numbers_of_processes_are_equal(codes, tmp_path):
    options, outs = (*BARE, *FSDP), {(2, 1): tmp_path / "a", (2, 0): tmp_path / "b", (1, 2): tmp_path / "c"}
    children = start_gpt(tmp_path / "one", codes, *options[:-7], *FSDP[1:], "--max-steps", 20)
    for (world, _), out in outs.items():
        children += start_gpt(out, codes, *options, "--max-steps", 10, world=world)
    assert set(finish(children)) == {0}
    children = [start_gpt(out, codes, *(options if world else [*BARE, *FSDP[1:]]), "--max-steps", 20, "--resume",
                          world=world) for (_, world), out in outs.items()]
    assert set(finish(sum(children, []))) == {0}
    for out in outs.values():
        assert series(rows(out), "loss") == pytest.approx(series(rows(tmp_path / "one"), "loss"), rel=1e-5)
        torch.testing.assert_close(weights(out), weights(tmp_path / "one"), atol=1e-4, rtol=0)


def test_published_names_in_one_file(codes, tmp_path):
    assert finish(start_gpt(tmp_path / "x", codes, *FSDP, "--max-steps", 2, world=2)) == [0, 0]
    model = GPT.from_pretrained(tmp_path / "x" / "gpt.pt")
    with torch.device("meta"):
        want = GPT(GPTConfig(**LLAMA, vocab_size=32, num_classes=3, grid=(2, 3))).state_dict()
    found = weights(tmp_path / "x")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in want.items()}
    assert "layers.0.feed_forward.w1.weight" in found and all(type(x) is torch.Tensor for x in found.values())
    assert generate(model, torch.tensor([0, 1]), seed=0).shape == (2, 2, 3)


@pytest.fixture(scope="module")
def twice(codes, tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("twice") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_gpt.PRESETS, "tiny", LLAMA)
        assert finish(start_gpt(out, codes, *FSDP, "--max-steps", 4, "--save-every", 2, world=2)) == [0, 0]
    return out


def rewrite(path, change):
    index = sharding.Reader(path).read_metadata()
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def bytes_for_a_tensor(index):
    """Such an entry would be unpickled without restraint."""
    index.state_dict_metadata["model.norm.weight"] = metadata.BytesStorageMetadata()


def a_shard_elsewhere(index):
    """An absolute path, of a file that could be read."""
    first = next(iter(index.storage_data.values()))
    first.relative_path = os.path.abspath(first.relative_path)


MISPLACED = " has no place in an index"
DAMAGE = {  # as docs/errors.md lists it
    "no index": (lambda path: (path / ".metadata").unlink(), ".metadata: No such file or directory"),
    "an empty index": (lambda path: (path / ".metadata").write_bytes(b""), "Ran out of input"),
    "half an index": (lambda path: os.truncate(path / ".metadata", 500), "pickle data was truncated"),
    "an index with code": (lambda path: (path / ".metadata").write_bytes(pickle.dumps(Trap())),
                           f"posix.mkdir{MISPLACED}"),
    "within": (lambda path: rewrite(path, lambda index: setattr(index, "planner_data", Trap())),
                    f"posix.mkdir{MISPLACED}"),
    "bytes": (lambda path: rewrite(path, bytes_for_a_tensor),
              f"torch.distributed.checkpoint.metadata.BytesStorageMetadata{MISPLACED}"),
    "elsewhere": (lambda path: rewrite(path, a_shard_elsewhere), "shards outside of the folder"),
    "a shard missing": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp: No such file or directory"),
    "half a shard": (lambda path: os.truncate(path / "__0_0.distcp", (path / "__0_0.distcp").stat().st_size // 2),
                     ""),
    "a shard with code": (lambda path: traps(path / "__1_0.distcp"), "a shard holds more than weights"),
    "no rest": (lambda path: os.truncate(path / "rest.pt", 0), ""),
}


def traps(path):
    file, size = io.BytesIO(), path.stat().st_size
    torch.save(Trap(), file)
    path.write_bytes((file.getvalue() * size)[:size])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_leave_those_before(name, twice, codes, tmp_path, monkeypatch, caplog, capsys):
    """Read by one process, unsharded: the same code, which would see a trap go off."""
    out = tmp_path / "run"
    checkpoints.shutil.copytree(twice, out)
    monkeypatch.chdir(tmp_path)
    options = gpt_options(codes, *FSDP[1:], "--max-steps", 5, "--resume", "auto")
    damage, reason = DAMAGE[name]
    damage(out / "state.pt")
    (out / "state.pt.tmp").mkdir()  # of a run that was killed while it saved
    run(train_gpt, monkeypatch, out, *options)
    assert f"{out / 'state.pt'}" in caplog.text and f"going on from {out / 'state.pt.previous'}" in caplog.text
    assert f"not a readable checkpoint ({reason}" in caplog.text
    assert " " not in name or not reason or (
        f"| {name} | not a readable checkpoint ({reason}) |" in test_training.ERRORS)
    assert load(out / "state.pt")["step"] == 5
    for path in (out / "state.pt", out / "state.pt.previous"):
        checkpoints.remove(path)
        checkpoints.shutil.copytree(twice / "state.pt", path)
        damage(path)
    with pytest.raises(SystemExit, match="2"):
        command_line.cli(lambda: run(train_gpt, monkeypatch, out, *options))
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {out / 'state.pt.previous'}" in said and "not a readable checkpoint" in said
    assert not (tmp_path / "trap").exists()


def test_what_does_not_fit_is_refused(twice, codes, tmp_path, monkeypatch):
    before = sorted(os.listdir(twice))
    for change, message in (
        (("--ema", 0.9), "model, adamw, not model, ema, adamw"),
        (("--optimizer", "muon"), "model, adamw, not model, adamw, muon"),
        (("--n-kv-head", 1), "n_kv_head 2, not 1"),
        (("--code-features",), "code_dim 0, not 4"),
        (("--seed", 1), "seed 0, not 1"),
    ):
        with pytest.raises(ValueError, match=f"{twice / 'state.pt'} .*{message}"):
            run(train_gpt, monkeypatch, twice, *gpt_options(codes, *FSDP[1:], *change, "--max-steps", 5, "--resume"))
    assert sorted(os.listdir(twice)) == before
    out = tmp_path / "more"
    checkpoints.shutil.copytree(twice, out)
    rewrite(out / "state.pt", lambda index: index.state_dict_metadata.update({"model.x": None}))
    with pytest.raises(ValueError, match="other options .it holds model.x, too"):
        run(train_gpt, monkeypatch, out, *gpt_options(codes, *FSDP[1:], "--max-steps", 5, "--resume"))
    with pytest.raises(ValueError, match="--fsdp shards over torchrun's processes"):
        run(train_gpt, monkeypatch, tmp_path / "x", *gpt_options(codes, *FSDP))
    run(train_gpt, monkeypatch, tmp_path / "y", *gpt_options(codes, "--max-steps", 1))
    assert finish(start_gpt(tmp_path / "y", codes, *FSDP, "--resume", world=2)) == [2, 2]
    assert "other options (no --fsdp: go on without, or from the weights with --init)" in (
        tmp_path / "y.0").read_text()


def test_a_killed_sharded_run_goes_on(codes, tmp_path):
    options = (*FSDP, "--max-steps", 4, "--save-every", 1, "--ema", 0.8)
    moments = random.Random(0).sample([(at, after) for at in range(1, 50) for after in (False, True)], 12)
    outs = {tmp_path / f"{at} {after}": partial(killed, at, after) for at, after in moments}
    outs[tmp_path / "between"] = killed_between
    children = [start_gpt(out, codes, *options, world=1, before=kill)[0] for out, kill in outs.items()]
    whole = start_gpt(tmp_path / "whole", codes, *options, world=1)
    assert finish(children + whole) == 13 * [-signal.SIGKILL] + [0]
    check_left(list(outs), lambda path: load(path / "rest.pt")["step"])
    assert finish([start_gpt(out, codes, *options, "--resume", "auto", world=1)[0] for out in outs]) == 13 * [0]
    for out in outs:
        assert same(load(out / "gpt.pt"), load(tmp_path / "whole" / "gpt.pt"))
        assert series(rows(out), "loss") == series(rows(tmp_path / "whole"), "loss")
        assert not [name for name in os.listdir(out) if name.endswith((".tmp", ".old"))]


def fill_the_disk(folder):
    update, steps, ballast = training.update, [], folder / "ballast"

    def counted(*args):
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) in (3, 5):
            free = os.statvfs(folder)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 20000 if len(steps) == 3 else 0))
        return update(*args)

    training.update = counted


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_full_disk_leaves_the_last_shards(disk, codes, tmp_path):
    out, options = disk[0] / "run", (*FSDP, "--max-steps", 6, "--save-every", 1, "--keep-every", 2)
    assert finish(start_gpt(out, codes, *options, world=2, before=partial(fill_the_disk, disk[0]))) == [0, 0]
    said = (disk[0] / "run.0").read_text()
    assert "no checkpoint at step 3, the last one stands" in said and "no checkpoint at step 4" in said
    assert "step 5, the last" not in said and load(out / "state.pt" / "rest.pt")["step"] == 6
    assert {name for name in os.listdir(out) if name.startswith("state")} == {
        "state.pt", "state.pt.previous", "state_0000002.pt", "state_0000006.pt"}


def one_cannot_write(rank, number):
    """Process `rank` has no room: the second one for its shards number `number`, the first one for that file."""
    owner, name = (sharding.Writer, "write_data") if rank else (checkpoints, "save_file")
    write, calls = getattr(owner, name), []

    def full(*args):
        calls.append(1)
        if os.environ["RANK"] == str(rank) and len(calls) == number:
            raise OSError(28, "No space left on device")
        return write(*args)

    setattr(owner, name, full)


@pytest.mark.parametrize("rank, number, end, steps", [(1, 2, 0, (3, 1)), (1, 3, 2, (2, 1)), (0, 6, 2, (2, 1))])
def test_what_one_cannot_write_nobody_takes_for_written(rank, number, end, steps, codes, tmp_path):
    """Three saves; in each the first process writes gpt.pt and rest.pt."""
    out, options = tmp_path / "run", (*FSDP, "--max-steps", 3, "--save-every", 1)
    children = start_gpt(out, codes, *options, world=2, before=partial(one_cannot_write, rank, number))
    assert finish(children) == [end, end]
    assert f"no checkpoint at step {number if rank else 3}, the last one stands" in (tmp_path / "run.0").read_text()
    found = [load(out / name / "rest.pt")["step"] for name in ("state.pt", "state.pt.previous")]
    assert tuple(found) == steps and not list(out.glob("*.tmp"))


def bad_sharded_step():
    """One of two processes: the gradients of the third step are NaN in the second one."""
    found = {}
    with distributed.processes("cpu") as (device, rank, _):
        for bad, muon in ((bad, muon) for bad in ("loss", "inf") for muon in (False, True)):
            model, _ = small(muon)
            sharding.shard(model, [model[0], model[2]], device, "float32")
            args = test_training.SimpleNamespace(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
            optimizers = training.make_optimizers(model, args, [model[0].weight, model[2].weight] if muon else ())
            states, norms = [], []
            for seed in range(4):
                if seed == 2 and rank == 1:
                    x = math.nan if bad == "loss" else math.inf
                    norms.append(poisoned(model, optimizers, seed, x))
                else:
                    norms.append(step(model, optimizers, 2 * seed + rank))
                shards = sharding.tensors({"model": model, **optimizers})
                states.append({name: distributed.whole(x).clone() for name, x in shards.items()})
            found[bad, muon] = states, norms
    with open(f"{sys.argv[sys.argv.index('--out') + 1]}.{rank}.pickle", "wb") as file:
        pickle.dump(found, file)


def poisoned(model, optimizers, seed, x):
    (model(torch.ones(5, 4)).square().mean() * x).backward()
    return training.update(model, optimizers, 1e-2, 1.0)


def test_a_bad_step_of_one_changes_no_shard(tmp_path):
    assert finish(start(bad_sharded_step, tmp_path / "x", world=2)) == [0, 0]
    first, second = (pickle.loads((tmp_path / f"x.{rank}.pickle").read_bytes()) for rank in range(2))
    assert len(first) == 4
    for key, (states, norms) in first.items():
        assert [bool(norm.isfinite()) for norm in norms] == [True, True, False, True]
        assert same(states, second[key][0]) and same(states[1], states[2])
        assert not same(states[0], states[1]) and not same(states[2], states[3])


def test_activations_are_computed_again_where_asked(codes, tmp_path, monkeypatch):
    calls, checkpoint = [], gpt.checkpoint
    monkeypatch.setattr(gpt, "checkpoint", lambda *args, **how: calls.append(1) or checkpoint(*args, **how))
    for more, n in (((), 0), (("--activation-checkpointing",), 2 * 3)):  # blocks, steps
        run(train_gpt, monkeypatch, tmp_path / str(n), *gpt_options(codes, "--max-steps", 3, *more))
        assert len(calls) == n


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_activations_computed_again_give_the_same_gradients(mode, request):
    """Dropout keeps the same elements when they are."""
    if mode == "triton":
        request.getfixturevalue("kernels_mode")("triton")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**LLAMA, vocab_size=32, num_classes=3, grid=(2, 3), dropout=0.2)).train()
    torch.nn.init.normal_(model.output.weight, std=0.1)  # zero as it is at first, it would hide every difference
    tokens, labels, found = torch.randint(32, (4, 6)), torch.tensor([0, 1, 2, 0]), []
    for again in (False, True):
        model.activation_checkpointing, sizes = again, []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = model(tokens[:, :-1], labels, targets=tokens)[1]
        kept = sum(sizes)
        loss.backward()
        found.append(([p.grad for p in model.parameters()], kept))
        model.zero_grad()
    assert all(grad.any() for grad in found[0][0])
    assert same(found[0][0], found[1][0]) and found[1][1] < found[0][1] / 3
