import argparse
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
from PIL import Image
from test_train import VQ

import distributed
import encode
from captions import CaptionWriter
from codes import CodeFile
from common import save_file
from vq import VQConfig, VQModel


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tokenizer, and 39 captioned pictures of which three cannot be read: all of a part of two, and one more."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    vq = VQModel(VQConfig(**VQ))
    save_file(folder / "vq.pt", vq.checkpoint())
    (folder / "train").mkdir()
    for i in range(39):
        Image.effect_noise((20, 14), 10 * i).convert("RGB").save(folder / f"{i:02}.png")
    for i in (4, 5, 20):
        (folder / f"{i:02}.png").write_text("no picture")
    lines = [dict(image=f"{i:02}.png", text=[f"the {i}th noise", "grey"][: 1 + i % 2]) for i in range(39)]
    for name, some in (("train", lines[:30]), ("val", lines[30:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return folder


def run(pictures, out, *more, batch_size=2, part=2, text=True, world=0, rank=0, port=0):
    """encode.py with parts of `part` images, as torchrun starts it where it has a world."""
    words = ["--vq", pictures / "vq.pt", "--data", pictures / "train.jsonl", "--val-data", pictures / "val.jsonl",
             "--size", 8, 12, "--crops", "random", "--n-random", 3, "--device", "cpu", "--bad-share", 0.1, "--out", out,
             "--batch-size", batch_size, *(["--text", "tokens", "--text-pieces", "word"] if text else []), *more]
    joined = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode.py", *map(str, words)])
        patch.setattr(encode, "PART", part)
        for name, value in joined.items() if world else ():
            patch.setenv(name, str(value))
        with torch.no_grad():
            encode.main()


def files(out):
    """What lies in the folders of both splits, and nothing beside them."""
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["result.json", "train", "val"]
    return {f"{path.relative_to(out)}": path.read_bytes() for path in out.glob("*/*")}


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The files that one process writes directly."""
    out = tmp_path_factory.mktemp("whole")
    run(pictures, out, part=100)
    found = files(out)
    assert len(found) == 14 and len(CodeFile(out / "train")) == 27 and len(CodeFile(out / "val")) == 9
    return found


def watched(monkeypatch, stop=None):
    """The parts that are encoded from here on; before number `stop` is, KeyboardInterrupt."""
    seen, real = [], encode.encode_images

    def encode_images(vq, image_set, indices, crop, folder, *more):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(f"{folder.parent.name}/{folder.name}")
        return real(vq, image_set, indices, crop, folder, *more)

    monkeypatch.setattr(encode, "encode_images", encode_images)
    return seen


def two(pictures, out, *more, part):
    """Exit codes of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    how = [dict(part=part, world=2, rank=rank, port=port) for rank in range(2)]
    processes = [fork.Process(target=run, args=(pictures, out, *more), kwargs=kwargs) for kwargs in how]
    for p in processes:
        p.start()
    return [p.join(300) or p.exitcode for p in processes]


@pytest.mark.parametrize("crops, flip, count", [("center", False, 1), ("center", True, 2), ("ten", False, 10),
                                                ("ten", True, 20)])
def test_crops_reach_processes_that_are_spawned(crops, flip, count):
    """As macOS starts those that read images: what they do is pickled."""
    crop, names = encode.choose_crops(argparse.Namespace(crops=crops, crop_scales=[1.1, 1.05]), flip)
    found = pickle.loads(pickle.dumps(crop))(Image.new("RGB", (40, 30)), (16, 16))
    assert len(found if isinstance(found, list) else [found]) == len(names) == count


@pytest.mark.parametrize("part", [2, 7, 100])
def test_two_processes_write_what_one_does(pictures, whole, tmp_path, part):
    """In parts of 2 images, of 6, which are whole batches, and of all."""
    assert two(pictures, tmp_path / "two", part=part) == [0, 0]
    assert files(tmp_path / "two") == whole


def test_what_was_interrupted_goes_on(pictures, whole, tmp_path, monkeypatch, capsys):
    """Train has 15 parts, val 5. Whole parts are not encoded again, also by two processes."""
    out, done = tmp_path / "codes", []
    for stop in (2, 14, 0):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            seen = watched(patch, stop)
            run(pictures, out)
        done += seen
        assert len(seen) == stop and not (out / "train").exists() and not (out / "val").exists()
    assert done == [f"train.parts/{i:05}" for i in range(15)] + ["val.parts/00000"]
    assert "train: 15 of 15 parts are there\nval: 1 of 5 parts are there\n" in capsys.readouterr().out
    (out / "train.parts" / "00013" / "meta.json").unlink()  # as if killed there
    with monkeypatch.context() as patch:
        patch.setattr(CaptionWriter, "take", lambda *_: 1 / 0)
        seen = watched(patch)
        with pytest.raises(ZeroDivisionError):  # while parts are joined
            run(pictures, out)
    assert seen == ["train.parts/00013", *(f"val.parts/{i:05}" for i in range(1, 5))]
    (out / "train.parts" / "00003" / "meta.json").unlink()
    assert two(pictures, out, part=2) == [0, 0] and files(out) == whole
    seen = watched(monkeypatch)
    with pytest.raises(ValueError, match="codes holds finished codes"):
        run(pictures, out)
    assert not seen and files(out) == whole


def test_other_settings_are_refused(pictures, tmp_path, monkeypatch):
    out = tmp_path / "codes"

    def change(how, *more, **changes):
        with pytest.raises(ValueError, match=f"train.parts was begun with another {how}.*: go on with that, or delete"):
            run(pictures, out, *more, **changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, 2)
        run(pictures, out, text=False)
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    change("seed .0, now 1", "--seed", 1, text=False)
    change("flip .True, now False", "--no-flip", text=False)
    change("dtype", "--dtype", "bfloat16", text=False)
    change("part_size .2, now 4", part=4, text=False)
    change("batch_size .2, now 1", batch_size=1, text=False)
    change("text .None, now ..kind.: .tokens.")
    lines = (pictures / "train.jsonl").read_text()
    try:
        (pictures / "train.jsonl").write_text(lines.replace("the 7th", "the 17th"))
        change("pictures_sha256", text=False)
    finally:
        (pictures / "train.jsonl").write_text(lines)
    assert before == {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}


def test_the_share_of_unreadable_images_is_that_of_all_parts(pictures, whole, tmp_path, monkeypatch):
    """Three of train's 30: two in one part, another in a later one."""
    message = r"train.jsonl, train: 3 of 30 \(10.0%\) have no usable caption or image, --check-data names them"
    seen = watched(monkeypatch)
    for n in (11, 13):  # again, those that lack some are read again
        with pytest.raises(ValueError, match=message):
            run(pictures, tmp_path / "one", "--bad-share", 0.08)
        assert len(seen) == n
    run(pictures, tmp_path / "one")
    assert len(seen) == 22 and files(tmp_path / "one") == whole
    assert two(pictures, tmp_path / "two", "--bad-share", 0.08, part=6) == [1, 0]  # neither sees more than two
    assert not (tmp_path / "two" / "train").exists() and len(list((tmp_path / "two" / "train.parts").iterdir())) == 5


def test_mended_images_are_read_again(pictures, whole, tmp_path):
    folder, out = tmp_path / "mended", tmp_path / "codes"
    shutil.copytree(pictures, folder)
    for _ in range(2):
        with pytest.raises(ValueError, match="3 of 30 .* have no usable"):
            run(folder, out, "--bad-share", 0.08)
    for i in (4, 5, 20):
        shutil.copy(folder / "06.png", folder / f"{i:02}.png")
    run(folder, out, "--bad-share", 0.08)
    assert len(CodeFile(out / "train")) == 30


def test_a_kill_while_parts_are_removed(pictures, whole, tmp_path, monkeypatch):
    """The codes are whole, and what is left of the parts goes the next time."""
    out = tmp_path / "codes"

    def rmtree(folder):
        for path in folder.rglob("codes.npy"):
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", rmtree)
        run(pictures, out)
    assert (out / "train.parts").is_dir()
    (out / "mine.parts").mkdir()
    with pytest.raises(ValueError, match="codes holds finished codes: remove train, val and result.json in it to"):
        run(pictures, out)
    (out / "mine.parts").rmdir()  # it is not ours
    assert files(out) == whole


def test_a_folder_of_another_script(pictures, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="result.json is there, and no codes are beside it: give another --out"):
        run(pictures, tmp_path)


def held(pictures, out):
    """A run into `out` in another process, which stops before its third part; and what lets it go on."""
    fork = multiprocessing.get_context("fork")
    there, go = fork.Event(), fork.Event()

    def wait():
        seen, real = [], encode.encode_images

        def encode_images(*args):
            seen.append(0)
            if len(seen) == 3:
                there.set()
                assert go.wait(300)
            return real(*args)

        encode.encode_images = encode_images
        run(pictures, out)

    first = fork.Process(target=wait, daemon=True)
    first.start()
    assert there.wait(300)
    return first, go


def test_two_runs_into_one_folder(pictures, whole, tmp_path):
    """The second is refused, be it one process or two, and what the first writes stays whole."""
    out = tmp_path / "codes"
    first, go = held(pictures, out)
    try:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="another run is writing to .*codes: wait until it ends, or give another"):
            run(pictures, out)
        assert two(pictures, out, part=2) == [1, 1]
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    finally:
        go.set()
        first.join(300)
    assert first.exitcode == 0 and files(out) == whole


def test_a_killed_run_leaves_no_lock(pictures, whole, tmp_path):
    """Though its file is there, and a process that it forked, as those that read images, lives on."""
    out, fork = tmp_path / "codes", multiprocessing.get_context("fork")

    def start(pipe):
        with distributed.alone(out, 0):
            child = fork.Process(target=time.sleep, args=(60,))
            child.start()
            pipe.send(child.pid)
            time.sleep(60)

    out.mkdir()
    here, pipe = fork.Pipe()
    killed = fork.Process(target=start, args=(pipe,))
    killed.start()
    child = here.recv()
    killed.kill()
    killed.join()
    try:
        assert (out / ".lock").exists()
        run(pictures, out)
    finally:
        os.kill(child, signal.SIGKILL)
    assert files(out) == whole


@pytest.mark.parametrize("how", ["system", "folder"])
def test_where_there_are_no_locks(pictures, whole, tmp_path, monkeypatch, how):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(distributed, "fcntl", None) if how == "system" else monkeypatch.setattr(fcntl, "flock", flock)
    run(pictures, tmp_path / "codes", part=100)
    assert files(tmp_path / "codes") == whole


def test_what_is_refused_changes_nothing(pictures, tmp_path):
    out = tmp_path / "codes"
    run(pictures, out, part=100)
    before = files(out)
    with pytest.raises(ValueError, match="holds finished codes"):
        run(pictures, out, part=100)
    assert files(out) == before
    (out / "result.json").unlink()
    for options, error in ((("--t5", "x"), "--t5 goes with --text t5, not tokens"),
                           (("--data", tmp_path / "nothing.jsonl"), "nothing.jsonl: no such file"),
                           (("--text", "none", "--text-length", 9), "--text-length goes with --text t5 or tokens, not"),
                           (("--crops", "center"), "--n-random goes with --crops random, not center"),
                           (("--crop-scales", 1.1), "--crop-scales goes with --crops ten, not random")):
        with pytest.raises((ValueError, OSError), match=error):
            run(pictures, out, *options, part=100)
    (out / "result.json").touch()
    assert files(out) == before
