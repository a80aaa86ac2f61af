import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from PIL import Image

import checkpoints
import command_line
import common
import demo
import distributed
import encode
import evaluate
import losses
import sample
import train_gpt
import train_vq
import training
import vq
from codes import CodeFile, CodeWriter
from common import file_sha256, save_file
from data import ImageSet
from gpt import GPT
from training import learning_rate
from vq import VQConfig, VQModel

VQ = dict(channels=(16, 32), patch=2, z_channels=16, codebook_size=32, code_dim=4)
LLAMA = dict(n_layer=2, n_head=2, dim=32, ffn_dim=48)


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    monkeypatch.setitem(train_vq.PRESETS, "tiny", VQ)
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", LLAMA)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of coloured stripes in two classes, of which two are held out."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        stripes = np.arange(40)[:, None] // int(rng.integers(3, 9)) % 2
        pixels = np.where(stripes[..., None], *(rng.permutation([0, 255, 255]) for _ in range(2)))
        pixels = np.broadcast_to(pixels, (40, 40, 3)).astype(np.uint8)
        path = folder / ("across" if i % 2 else "down") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels if i % 2 else pixels.transpose(1, 0, 2)).save(path)
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A tokenizer file, and code files that name it: 12 and 4 images of 2 x 3 codes."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    save_file(folder / "vq.pt", VQModel(VQConfig(**VQ)).checkpoint())
    meta = dict(tokenizer=str(folder / "vq.pt"), tokenizer_sha256=file_sha256(folder / "vq.pt"), image_size=[8, 12],
                augmentations=["a", "b"], class_names=["cat", "dog", "cow"], data="x", notice="")
    for split, n in (("train", 12), ("val", 4)):
        with CodeWriter(folder / "codes" / split, (2, 3), 32, dict(meta, split=split)) as writer:
            writer.write(torch.randint(32, (n, 2, 6)), torch.arange(n) % 3)
    return folder / "codes"


def run(script, monkeypatch, out, *options):
    words = [f"{script.__name__}.py", "--device", "cpu", "--out", out, "--log-every", "1"]
    words += [] if "--init" in options else ["--preset", "tiny"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *options)])
    script.main()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def vq_options(pictures, *more):
    return ("--data", pictures, "--size", "24", "--perceptual-weight", "0", "--batch-size", "8", *more)


def gpt_options(codes, *more):
    return ("--codes", codes, "--batch-size", "8", *more)


NO_DISC = ("--disc-weight", "0")


def series(rows, name):
    return [row[name] for row in rows if name in row]


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# What a run leaves behind

def test_run_folder_of_the_tokenizer(pictures, tmp_path, monkeypatch):
    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **how: drawn.update({how["label"]: args[1:]}) or plot(*args, **how))
    rows = run(train_vq, monkeypatch, tmp_path, *vq_options(
        pictures, *NO_DISC, "--max-steps", 5, "--eval-every", 2, "--picture-every", 2, "--save-every", 2,
        "--usage-window", 700, "--entropy-weight", 0.1, "--codebook-weight", 0.5, "--lr", 2e-3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "config.json", "log.jsonl", "loss.png", "reconstructions.png", "reconstructions_000002.png",
        "reconstructions_000004.png", "result.json", "state.pt", "state.pt.previous", "vq.pt"]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5] and len(series(rows, "val_loss")) == 3
    assert set(steps[0]) == {"step", "loss", "mse", "codebook", "commitment", "entropy", "grad_norm", "lr", "usage",
                             "perplexity", "dt_ms", "images_per_s", "mem_gib"}
    for row in steps:
        parts = sum(row[name] for name in ("mse", "codebook", "commitment", "entropy"))
        assert math.isclose(row["loss"], parts, rel_tol=1e-4) and row["lr"] == 2e-3 and 0 < row["usage"] <= 1
    assert drawn["training"] == ((1, 2, 3, 4, 5), tuple(row["mse"] for row in steps))  # what val_loss holds
    assert drawn["held out"] == ((2, 4, 5), tuple(series(rows, "val_loss")))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["lr"] == "0.002" and config["command"][0] == "train_vq.py"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 5 and result["val_psnr"] > 0 and result["seconds"] > 0
    assert all(Image.open(tmp_path / name).size[0] > 100 for name in ("reconstructions.png", "loss.png"))
    model = VQModel.from_pretrained(tmp_path / "vq.pt")
    assert model.config == VQConfig(**VQ, entropy_weight=0.1, usage_window=700)


def test_run_folder_of_the_gpt(codes, tmp_path, monkeypatch):
    rows = run(train_gpt, monkeypatch, tmp_path, *gpt_options(
        codes, "--max-steps", 5, "--eval-every", 2, "--picture-every", 2, "--n-kv-head", 1, "--cond-rope", "zero"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "codes.png", "config.json", "gpt.pt", "log.jsonl", "loss.png", "result.json", "samples.png",
        "samples_000002.png", "samples_000004.png", "state.pt"]
    steps = [row for row in rows if "loss" in row]
    assert set(steps[0]) == {"step", "loss", "grad_norm", "lr", "dt_ms", "tokens_per_s", "mem_gib"}
    assert len(steps) == 5
    assert math.isclose(steps[0]["loss"], math.log(32), rel_tol=1e-5)
    assert series(rows, "val_loss")[-1] == pytest.approx(json.loads((tmp_path / "result.json").read_text())["val_loss"])
    model = GPT.from_pretrained(tmp_path / "gpt.pt")
    config = model.config
    assert (config.grid, config.num_classes, config.vocab_size, config.n_kv_head) == ((2, 3), 3, 32, 1)
    tokens = CodeFile(codes / "val")
    first = torch.from_numpy(tokens.codes[:, 0].astype(np.int64))
    loss = model(first[:, :-1], torch.from_numpy(tokens.labels), targets=first)[1]
    assert loss.item() == pytest.approx(rows[-1]["val_loss"], rel=1e-5)
    *_, meta = sample.load_models(codes.parent / "vq.pt", tmp_path / "gpt.pt", None, torch.device("cpu"))
    assert meta == tokens.meta | dict(split="train", images=12)


# Learning

def test_tokenizer_overfits_one_batch():
    torch.manual_seed(0)
    model = VQModel(VQConfig(**VQ)).train()
    images = F.interpolate(torch.rand(2, 3, 4, 4), size=16) * 2 - 1
    args = SimpleNamespace(lr=5e-3, weight_decay=0.0, beta1=0.9, beta2=0.95)
    optimizers = training.make_optimizers(model, args)
    for _ in range(200):
        rec, code_losses, codes = model(images)
        mse = F.mse_loss(rec, images)
        (mse + sum(code_losses.values())).backward()
        training.update(model, optimizers, args.lr, 1.0)
    assert mse < 0.02 < images.var() / 10 and len(codes.unique()) > 8


def test_both_scripts_learn(pictures, codes, tmp_path, monkeypatch):
    rows = run(train_vq, monkeypatch, tmp_path / "vq", *vq_options(
        pictures, *NO_DISC, "--max-steps", 60, "--lr", 3e-3, "--kmeans-step", 10, "--restart-every", 20))
    mse = series(rows, "mse")
    assert np.mean(mse[-5:]) < 0.65 * np.mean(mse[:5])
    rows = run(train_gpt, monkeypatch, tmp_path / "gpt", *gpt_options(
        codes, "--max-steps", 120, "--lr", 1e-2, "--dropout", 0, "--batch-size", 12))
    assert np.mean(series(rows, "loss")[-5:]) < 0.8 < math.log(32) / 4


def test_kmeans_and_restarts_come_at_their_steps(pictures, tmp_path, monkeypatch):
    calls, step = [], []
    for name in ("init_kmeans", "restart_dead_codes"):
        method = getattr(vq.Quantizer, name)
        monkeypatch.setattr(vq.Quantizer, name, lambda book, z, name=name, method=method: (
            calls.append((len(step), name, tuple(z.shape))), method(book, z)))
    rate = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda *args: step.append(1) or rate(*args))
    rows = run(train_vq, monkeypatch, tmp_path, *vq_options(
        pictures, *NO_DISC, "--max-steps", 11, "--kmeans-step", 4, "--restart-every", 3, "--usage-window", 288))
    enough = (1152, 4)  # 32 vectors a code, out of batches of 8 x 36
    assert calls == [(5, "init_kmeans", enough), (7, "restart_dead_codes", (288, 4)),
                     (10, "restart_dead_codes", (288, 4))]  # the loop counts from 0, learning_rate calls from 1
    assert series(rows, "usage")[4] == 1 > series(rows, "usage")[0]


def test_critic_learns_to_separate_before_it_is_asked(pictures, tmp_path, monkeypatch):
    rows = run(train_vq, monkeypatch, tmp_path, *vq_options(
        pictures, "--max-steps", 16, "--lr", 3e-4, "--disc-start", 14, "--disc-warmup", 12))
    assert [row["step"] for row in rows if "disc_loss" in row] == list(range(3, 17))  # steps count from 0 in the loop
    assert [row["step"] for row in rows if "adversarial" in row] == [15, 16]
    assert np.mean(series(rows, "disc_accuracy")[-4:]) > 0.9 > 0.8 > series(rows, "disc_accuracy")[0]
    assert series(rows, "disc_loss")[-1] < 0.7 * series(rows, "disc_loss")[0]


@pytest.mark.parametrize("more", [(), ("--disc-loss", "non-saturating"), ("--adaptive-disc-weight",)],
                         ids=["hinge", "non-saturating", "adaptive"])
def test_generator_feels_the_critic(pictures, tmp_path, monkeypatch, more):
    options = vq_options(pictures, "--max-steps", 3, "--disc-start", 0, "--disc-warmup", 0, *more)
    rows, asked = run(train_vq, monkeypatch, tmp_path / "a", *options), {}
    for weight in (0.0001, 0.5):
        grad = run(train_vq, monkeypatch, tmp_path / str(weight), *options, "--disc-weight", weight)[0]["grad_norm"]
        asked[weight] = grad
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert asked[0.5] != asked[0.0001] and len(series(rows, "adversarial")) == 3


def test_perceptual_loss_and_bfloat16(pictures, codes, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vq, "LPIPS", lambda: losses.LPIPS(random_weights=True))
    rows = run(train_vq, monkeypatch, tmp_path / "vq", *vq_options(
        pictures, "--max-steps", 2, "--perceptual-weight", 2, "--dtype", "bfloat16", "--disc-start", 0,
        "--adaptive-disc-weight", "--batch-size", 2))
    assert series(rows, "perceptual")[0] > 0 and all(math.isfinite(v) for row in rows for v in row.values())
    assert series(rows, "val_loss")[-1] > 0.01
    rows = run(train_gpt, monkeypatch, tmp_path / "gpt", *gpt_options(
        codes, "--max-steps", 40, "--lr", 1e-2, "--dtype", "bfloat16", "--ema", 0.5))
    assert series(rows, "loss")[-1] < 2.5
    weights = torch.load(tmp_path / "gpt" / "gpt.pt")["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


# Resuming, accumulation, limits

class Killed(Exception):
    pass


def kill_at(monkeypatch, call):
    """`update` raises on its call number `call`; what is returned puts an end to that."""
    update, calls = training.update, []

    def counted(*args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return update(*args)

    monkeypatch.setattr(training, "update", counted)
    return lambda: monkeypatch.setattr(training, "update", update)


RUNS = {
    "vq": (train_vq, "vq.pt", lambda p, c: vq_options(
        p, "--model-dropout", 0.1, "--disc-start", 2, "--disc-warmup", 1, "--kmeans-step", 2, "--restart-every", 4,
        "--micro-batch-size", 4), 9),
    "gpt": (train_gpt, "gpt.pt", lambda p, c: gpt_options(c, "--micro-batch-size", 4, "--optimizer", "muon"), 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_resuming_is_exact(name, pictures, codes, tmp_path, monkeypatch):
    """Killed in step 6 of 7 after the checkpoint of step 4: the same weights, states and log as without."""
    script, file, options, updates = RUNS[name]
    options = (*options(pictures, codes), "--max-steps", 7, "--save-every", 4, "--eval-every", 3, "--picture-every", 3,
               "--schedule", "cosine", "--warmup-steps", 2, "--ema", 0.8, "--lr", 1e-3)
    rows = run(script, monkeypatch, tmp_path / "whole", *options)
    revive = kill_at(monkeypatch, updates)
    with pytest.raises(Killed):
        run(script, monkeypatch, tmp_path / "cut", *options)
    revive()
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 4
    resumed = run(script, monkeypatch, tmp_path / "cut", *options, "--resume")
    timing = ("dt_ms", "images_per_s", "tokens_per_s", "mem_gib")
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows] == [
        {k: v for k, v in row.items() if k not in timing} for row in resumed]
    for path in (file, "state.pt"):
        whole, cut = (torch.load(tmp_path / run / path, weights_only=True) for run in ("whole", "cut"))
        assert whole.pop("elapsed", 0) != cut.pop("elapsed", 1)
        assert same(whole, cut)
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    assert {"model", "ema", "adamw", "own", "step"} <= set(state)
    assert not same(state["model"], state["ema"])
    saved = torch.load(tmp_path / "whole" / file, weights_only=True)["model"]
    assert same(saved, state["ema"])  # what is evaluated and sampled


def test_a_picture_of_unreadable_images_is_a_warning(tmp_path, caplog):
    """Every second one of 16, within --bad-share: all eight that it would show."""
    paths = [tmp_path / f"{i}.png" for i in range(16)]
    for path in paths[1::2]:
        Image.new("RGB", (8, 8)).save(path)
    held_out = ImageSet(paths, np.zeros(16, np.int64), ["image"], [path.name for path in paths], True, bad_share=0.5)
    with training.dispensable("reconstructions.png"):
        train_vq.picture(VQModel(VQConfig(**VQ)), held_out, 8, torch.device("cpu"), tmp_path / "reconstructions.png")
    assert "reconstructions.png could not be written: none of these images can be read" in caplog.text
    args = SimpleNamespace(eval_images=8, size=8, micro_batch_size=4, perceptual_weight=0)
    with pytest.raises(ValueError, match="the images: none of the 8 images to evaluate can be read"):
        train_vq.evaluate(VQModel(VQConfig(**VQ)), None, held_out, args, torch.device("cpu"))


@pytest.mark.parametrize("name", ["vq", "gpt"])
def test_a_failing_evaluation_comes_after_the_checkpoint(name, pictures, codes, tmp_path, monkeypatch):
    script = RUNS[name][0]
    options = vq_options(pictures, *NO_DISC) if name == "vq" else gpt_options(codes)
    options = [*options, "--max-steps", 6, "--eval-every", 3, "--save-every", 3]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="unreadable"):
        patch.setattr(script, "evaluate", lambda *_: (_ for _ in ()).throw(OSError("unreadable")))
        run(script, patch, tmp_path, *options)
    assert torch.load(tmp_path / "state.pt")["step"] == 3
    assert run(script, monkeypatch, tmp_path, *options, "--resume")[-1]["step"] == 6


@pytest.mark.parametrize("change, message", [
    (("--size", 16), "the discriminator needs images of at least 24 pixels a side, these are 16x16"),
    (("--kmeans-step", 5, "--batch-size", 1, "--codebook-size", 2305),
     "64 batches of 1 images give k-means 2304 vectors, fewer than its 2305 codes"),
    (("--size", 16, "--max-steps", 20, "--disc-start", 30, "--disc-warmup", 11), "24 pixels a side"),
    (("--size", 16, "--max-steps", 20, "--disc-start", 30, "--disc-warmup", 10), "none is not there"),
    (("--kmeans-step", 5, "--max-steps", 5, "--batch-size", 1, "--codebook-size", 2305), "none is not there"),
    (("--size", 30), "--size 30 is no multiple of 4")], ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_what_would_fail_later_is_said_at_once(change, message, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=message):  # before the pictures are missed
        run(train_vq, monkeypatch, tmp_path / "out", "--preset", "tiny", "--data", "none", "--size", 24, *change)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["vq", "gpt"])
def test_two_runs_into_one_folder_are_refused(name, pictures, codes, tmp_path, monkeypatch):
    """One may outlive its torchrun, and be started again."""
    options = [*(vq_options(pictures, *NO_DISC) if name == "vq" else gpt_options(codes)), "--max-steps", 1]
    with distributed.alone(tmp_path, 0), pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"):
        run(RUNS[name][0], monkeypatch, tmp_path, *options, "--resume", "auto")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run(RUNS[name][0], monkeypatch, tmp_path, *options)


def test_resuming_needs_the_same_size(pictures, tmp_path, monkeypatch):
    options = [*vq_options(pictures, *NO_DISC), "--max-steps", 1, "--size", 16]
    run(train_vq, monkeypatch, tmp_path, *options)
    run(train_vq, monkeypatch, tmp_path, *options, 16, "--max-steps", 2, "--resume")
    with pytest.raises(ValueError, match=r"state.pt is of a run with other options \(size .*, not 8\)"):
        run(train_vq, monkeypatch, tmp_path, *options, "--size", 8, "--resume")


def test_resuming_needs_the_same_options(codes, tmp_path, monkeypatch):
    options = gpt_options(codes, "--max-steps", 1)
    with pytest.raises(FileNotFoundError, match="state.pt: no such file"):
        run(train_gpt, monkeypatch, tmp_path, *options, "--resume")
    run(train_gpt, monkeypatch, tmp_path, *options)
    for change, message in ((("--ema", 0.9), "model, adamw, not model, ema"), (("--n-kv-head", 1), "other options")):
        with pytest.raises(ValueError, match=f"state.pt .*{message}"):
            run(train_gpt, monkeypatch, tmp_path, *options, *change, "--resume")


@pytest.mark.parametrize("name", ["vq", "gpt"])
def test_accumulation_gives_the_same_gradient(name, pictures, codes, tmp_path, monkeypatch):
    script = RUNS[name][0]
    still = ("--dropout", 0, "--cond-dropout", 0, "--max-steps", 2)
    options = vq_options(pictures, *NO_DISC, "--max-steps", 2) if name == "vq" else gpt_options(codes, *still)
    gradients, update = {}, training.update

    def spy(model, *args):
        gradients.setdefault(size, []).append([p.grad.clone() for p in model.parameters()])
        return update(model, *args)

    monkeypatch.setattr(training, "update", spy)
    logs = {}
    for size in (8, 4, 1):
        logs[size] = run(script, monkeypatch, tmp_path / str(size), *options, "--micro-batch-size", size)
    for size in (4, 1):
        assert len(gradients[size]) == len(gradients[8]) == 2
        for mine, whole in zip(gradients[size][0], gradients[8][0], strict=True):
            torch.testing.assert_close(mine, whole, atol=2e-6, rtol=1e-4)
        for part in ("loss", "grad_norm", "val_loss"):
            assert series(logs[size], part) == pytest.approx(series(logs[8], part), rel=1e-3)


@pytest.mark.parametrize("name", ["vq", "gpt"])
def test_max_minutes_ends_the_run(name, pictures, codes, tmp_path, monkeypatch):
    script = RUNS[name][0]
    options = vq_options(pictures, *NO_DISC) if name == "vq" else gpt_options(codes)
    rows = run(script, monkeypatch, tmp_path, *options, "--max-minutes", 0.04, "--max-steps", 10**6, "--log-every",
               10**5, "--schedule", "cosine", "--lr", 1e-3)
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["steps"] < 5000 and 2.4 <= result["seconds"] < 5
    last = [row for row in rows if "loss" in row][-1]  # logged although no interval was complete
    assert last["step"] == result["steps"] and last["lr"] < 5e-4  # the cosine followed the clock
    assert (name == "vq") or result["train_loss"] == pytest.approx(last["loss"], rel=1e-5)


# Weights and codes from elsewhere

def test_tokenizer_goes_on_from_weights_alone(pictures, tmp_path, monkeypatch):
    options = vq_options(pictures, *NO_DISC)
    run(train_vq, monkeypatch, tmp_path / "a", *options, "--max-steps", 30, "--lr", 3e-3)
    weights = torch.load(tmp_path / "a" / "vq.pt")["model"]
    torch.save({"model": weights, "args": argparse.Namespace()}, tmp_path / "p.pt")
    before = json.loads((tmp_path / "a" / "result.json").read_text())
    for init in (tmp_path / "a" / "vq.pt", tmp_path / "p.pt"):
        rows = run(train_vq, monkeypatch, tmp_path / "b", *options, "--max-steps", 1, "--lr", 1e-9, "--init", init,
                   "--beta", 0.5, "--usage-window", 100, "--resume", "no")
        assert rows[-1]["val_loss"] == pytest.approx(before["val_loss"], rel=1e-3)
        config = VQModel.from_pretrained(tmp_path / "b" / "vq.pt").config
        assert (config.beta, config.usage_window, config.patch) == (0.5, 100, 2)
    with pytest.raises(ValueError, match="leave --preset, --codebook-size and --code-dim out"):
        run(train_vq, monkeypatch, tmp_path / "b", *options, "--init", init, "--code-dim", 4, "--resume", "no")


def test_gpt_goes_on_from_weights_alone(codes, tmp_path, monkeypatch):
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", dict(LLAMA, n_head=4, dim=128))
    options = gpt_options(codes, "--max-steps", 20, "--lr", 3e-3, "--cond-rope", "zero")
    run(train_gpt, monkeypatch, tmp_path / "a", *options)
    torch.save(torch.load(tmp_path / "a" / "gpt.pt")["model"], tmp_path / "p.pt")
    before = json.loads((tmp_path / "a" / "result.json").read_text())
    for init in (tmp_path / "a" / "gpt.pt", tmp_path / "p.pt"):
        rows = run(train_gpt, monkeypatch, tmp_path / "b", *gpt_options(
            codes, "--max-steps", 1, "--lr", 1e-9, "--init", init, "--dropout", 0.3, "--resume", "no"))
        assert rows[-1]["val_loss"] == pytest.approx(before["val_loss"], rel=1e-3)
        config = GPT.from_pretrained(tmp_path / "b" / "gpt.pt").config
        assert (config.cond_rope, config.dropout) == ("zero", 0.3)


def test_other_classes_begin_anew(codes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", dict(LLAMA, n_head=4, dim=128))
    run(train_gpt, monkeypatch, tmp_path / "a", *gpt_options(codes, "--max-steps", 2))
    shutil.copytree(codes, tmp_path / "codes")
    for split in ("train", "val"):
        meta = json.loads((tmp_path / "codes" / split / "meta.json").read_text())
        meta["class_names"] = meta["class_names"][::-1]
        (tmp_path / "codes" / split / "meta.json").write_text(json.dumps(meta))
    for folder, anew in ((codes, False), (tmp_path / "codes", True)):
        init = torch.load(tmp_path / "a" / "gpt.pt")
        init["codes"]["tokenizer_sha256"] = "ab" * 32
        torch.save(init, tmp_path / "init.pt")
        run(train_gpt, monkeypatch, tmp_path / "b", *gpt_options(
            folder, "--max-steps", 1, "--lr", 1e-9, "--init", tmp_path / "init.pt", "--resume", "no"))
        before, after = (torch.load(tmp_path / x / "gpt.pt")["model"] for x in "ab")
        same = [torch.allclose(before[x], after[x], atol=1e-6) for x in
                ("cls_embedding.embedding_table.weight", "output.weight")]
        out = capsys.readouterr().out
        assert "init.pt was trained on codes of another tokenizer, " in out
        said = "was trained on other classes: their embedding is re-initialised" in out
        assert same == [not anew, True] and said == anew


def test_codes_of_another_tokenizer_are_refused(codes, tmp_path, monkeypatch):
    torch.manual_seed(123)
    save_file(tmp_path / "vq.pt", VQModel(VQConfig(**VQ)).checkpoint())
    options = gpt_options(codes, "--max-steps", 1)
    with pytest.raises(ValueError, match="vq.pt. has the tokenizer_sha256"):
        run(train_gpt, monkeypatch, tmp_path / "a", *options, "--vq", tmp_path / "vq.pt")
    with pytest.raises(FileNotFoundError, match="is not there: give it with --vq"):
        run(train_gpt, monkeypatch, tmp_path / "a", *options, "--vq", tmp_path / "none.pt")
    meta = json.loads((codes / "val" / "meta.json").read_text())
    for split in ("train", "val"):
        (tmp_path / "mixed" / split).mkdir(parents=True)
        for file in (codes / split).iterdir():
            (tmp_path / "mixed" / split / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mixed" / "val" / "meta.json").write_text(json.dumps(meta | dict(tokenizer_sha256="ab" * 32)))
    with pytest.raises(ValueError, match="val/meta.json .* has the tokenizer_sha256"):
        run(train_gpt, monkeypatch, tmp_path / "a", *gpt_options(tmp_path / "mixed", "--max-steps", 1))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_weights_that_do_not_fit_the_codes_are_refused(codes, tmp_path, monkeypatch):
    save_file(tmp_path / "gpt.pt", GPT(train_gpt.GPTConfig(**LLAMA, vocab_size=33, num_classes=3)).checkpoint())
    with pytest.raises(ValueError, match="--init .*gpt.pt knows 33 codes, .* has 32"):
        run(train_gpt, monkeypatch, tmp_path / "a", *gpt_options(codes, "--init", tmp_path / "gpt.pt"))


# Bad data

def run_command(script, monkeypatch, *words):
    """Exit code of a script."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        command_line.cli(script.main)
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def bad_pictures(pictures, tmp_path):
    """The two classes with captions and a val folder; 12 of 38 training pictures damaged, 2 small, 2 without text."""
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        new = tmp_path / "data" / ("train" if 0 < i < 39 else "val") / path.parent.name / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(path.read_bytes() if i == 0 or i % 3 else b"damaged" if i < 39 else path.read_bytes())
        if i in (1, 2):
            Image.new("RGB", (7 + i, 9)).save(new)
        if i not in (5, 7):
            new.with_suffix(".txt").write_text(f"number {i}\nof {path.parent.name}\n")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", [train_vq, encode], ids=lambda s: s.__name__)
def test_check_data_names_all_and_trains_nothing(script, workers, bad_pictures, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    out, text = tmp_path / "out", script is encode
    words = ["--data", bad_pictures, "--size", 16, 24, "--workers", workers, "--check-data"]
    words += ["--text", "tokens"] if text else ["--out", out]
    bad = [path for path in bad_pictures.rglob("*.png") if path.read_bytes() == b"damaged"]
    for share, code in ((0.4, 0), (0.2, 2)):
        caplog.clear()
        assert run_command(script, monkeypatch, *words, "--bad-share", share) == code
        printed, error = capsys.readouterr()
        n = 36 if text else 38
        assert f"train: {n} pictures, 12 unreadable; classes: 2, of " in printed
        assert "train: 2 smaller than 16 x 24, to be enlarged; the smallest is 9 x 8" in printed
        assert "val: 2 pictures, 0 unreadable; classes: 2, of 1\n" in printed
        assert (f"train: {2 * n} captions" in printed) == ("val: 4 captions" in printed) == text
        assert len(bad) == 12 and all(sum(f"left out: {p} (Unid" in m for m in caplog.messages) == 1 for p in bad)
        assert f"left out: 12 in all of {n}" in caplog.messages
        assert not text or "left out: 2 in all of 38" in caplog.messages
        message = rf"{script.__name__}.py: error: .*, train: 12 of {n} \(3.*%\) have no usable .*, the first is .*png"
        assert code == 0 or re.match(message, error.splitlines()[-1])
    assert not out.exists()
    for name, value in dict(RANK="1", WORLD_SIZE="2").items():  # the second of two says nothing
        monkeypatch.setenv(name, value)
    assert run_command(script, monkeypatch, *words) == 0 and not capsys.readouterr().out


def test_encode_leaves_unreadable_pictures_out_of_everything(bad_pictures, codes, tmp_path, monkeypatch, caplog):
    words = ("--vq", codes.parent / "vq.pt", "--data", bad_pictures, "--size", 8, 12, "--crops", "center", "--text",
             "tokens", "--text-pieces", "word", "--device", "cpu", "--out", tmp_path / "codes")
    assert run_command(encode, monkeypatch, *words, "--bad-share", 0.4) == 0
    assert sum("unreadable image left out: " in message for message in caplog.messages) == 12
    file, tokenizer = CodeFile(tmp_path / "codes" / "train"), VQModel.from_pretrained(codes.parent / "vq.pt")
    pictures = train_vq.load_images(bad_pictures, 8, text=True, bad_share=0.4)[0]
    kept = [i for i, path in enumerate(pictures.images) if path.read_bytes() != b"damaged"]
    assert len(file) == len(file.labels) == len(kept) == 24
    assert file.labels.tolist() == pictures.labels[kept].tolist()
    assert file.captions.texts(range(24)) == [pictures.captions[i][0] for i in kept]
    ((images, _, _),) = train_vq.eval_batches(pictures.subset(kept), (8, 12), 24)
    assert np.array_equal(file.codes[:, 0], tokenizer.encode(images).flatten(1).numpy())
    assert run_command(encode, monkeypatch, *words, "--bad-share", 0.2) == 2


def test_check_data_of_codes(codes, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "codes"
    shutil.copytree(codes, folder)
    words = ("--codes", folder, "--check-data")
    assert run_command(train_gpt, monkeypatch, *words) == 0
    counts = CodeFile(folder / "train").counts()
    assert counts.tolist() == np.bincount(np.load(folder / "train" / "codes.npy").ravel(), minlength=32).tolist()
    train, val = capsys.readouterr().out.splitlines()
    usage, perplexity = vq.usage_and_perplexity(counts)
    assert train == (f"{folder}/train: 12 images x 2 crops of (2, 3) codes; {usage:.1%} of 32 codes used, perplexity "
                     f"{perplexity:.1f}; 3 classes of 4 to 4 images")
    assert val.startswith(f"{folder}/val: 4 images x 2 crops")
    raw = bytearray((folder / "val" / "codes.npy").read_bytes())
    raw[-2:] = b"\x20\x00"  # code 32
    (folder / "val" / "codes.npy").write_bytes(raw)
    assert run_command(train_gpt, monkeypatch, *words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match("train_gpt.py: error: the codes in .*val/codes.npy reach from 0 to 32, outside 0..31", error)
    assert not (tmp_path / "out").exists()


# Options

@pytest.mark.parametrize("flag, mirrored", [("--flip", True), ("--no-flip", False)])
def test_flip(flag, mirrored, pictures, tmp_path, monkeypatch):
    seen, image_batches = [], train_vq.image_batches
    spy = lambda s, *args, **more: seen.append(s.flip) or image_batches(s, *args, **more)  # noqa: E731
    monkeypatch.setattr(train_vq, "image_batches", spy)
    run(train_vq, monkeypatch, tmp_path / "vq", *vq_options(pictures, *NO_DISC, flag, "--max-steps", 1))
    assert seen == [mirrored]
    monkeypatch.setattr(sys, "argv", [
        "encode.py", "--vq", str(tmp_path / "vq" / "vq.pt"), "--data", str(pictures), "--size", "16", "24", flag,
        "--out", str(tmp_path / "codes"), "--crop-scales", "1.1", "--device", "cpu"])
    encode.main()
    file = CodeFile(tmp_path / "codes" / "train")
    assert file.codes.shape == (38, 10 if mirrored else 5, 24) and file.grid == (4, 6)
    assert any("mirrored" in name for name in file.meta["augmentations"]) == mirrored


@pytest.mark.parametrize("options, message", [
    (("--max-steps", 0), "--max-steps has to be above 0"), (("--batch-size", 0), "--batch-size has to be above 0"),
    (("--log-every", 0), "--log-every has to be above 0"), (("--max-minutes", 0), "--max-minutes has to be above 0"),
    (("--micro-batch-size", 3), "--batch-size 8 is no multiple of --micro-batch-size 3"), (("--ema", 1), r"--ema 1.0"),
    (("--micro-batch-size", 0), "--micro-batch-size has to be above 0"), (("--clip", -1), "--clip cannot be below 0"),
    (("--warmup-steps", -1), "--warmup-steps cannot be below 0"), (("--device", "tpu"), "--device tpu"),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "")
def test_impossible_options_are_refused(options, message, codes, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(train_gpt, monkeypatch, tmp_path / "a", *gpt_options(codes, "--max-steps", 1, *options))
    assert not (tmp_path / "a").exists()


def test_learning_rates():
    args = SimpleNamespace(lr=2.0, min_lr=0.5, warmup_steps=4, schedule="constant")
    assert [learning_rate(args, step, step / 10) for step in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    args.schedule = "cosine"
    for step, progress in ((0, 0.0), (3, 0.3), (5, 0.5), (9, 0.9), (10, 1.0), (10, 1.2)):
        cosine = 0.5 + 1.5 * (1 + math.cos(math.pi * min(progress, 1))) / 2
        assert learning_rate(args, step, progress) == pytest.approx(min(1, (step + 1) / 4) * cosine)
    args.warmup_steps = 0
    assert learning_rate(args, 0, 0.0) == 2.0 and learning_rate(args, 9, 1.0) == 0.5


def test_update_decays_matrices_only_and_clips():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Conv2d(1, 1, 2))
    before = [p.detach().clone() for p in model.parameters()]
    args = SimpleNamespace(lr=7.0, weight_decay=0.1, beta1=0.8, beta2=0.9)
    optimizers = training.make_optimizers(model, args)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert training.update(model, optimizers, 0.5, 1.0) == 0
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.dim() >= 2 else 1.0))
        assert p.grad is None
    assert {group["betas"] for group in optimizers["adamw"].param_groups} == {(0.8, 0.9)}
    p = torch.nn.Parameter(torch.zeros(2))
    for clip, moved in ((0.5, [-0.3, -0.4]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])):
        p.data.zero_()
        p.grad = torch.tensor([3.0, 4.0])
        assert training.update(torch.nn.ParameterList([p]), dict(sgd=torch.optim.SGD([p], fused=True)), 1.0, clip) == 5
        torch.testing.assert_close(p.data, torch.tensor(moved), atol=1e-5, rtol=1e-5)


def test_average_of_weights():
    torch.manual_seed(0)
    ema, model = (torch.nn.BatchNorm1d(3) for _ in range(2))
    torch.nn.init.normal_(model.weight)
    model.running_mean += 5
    training.update_ema(ema, model, 0.9, step=10**6)
    torch.testing.assert_close(ema.weight, 0.9 + 0.1 * model.weight)
    training.update_ema(ema, model, 0.9, step=0)  # 1/10: the start is soon forgotten
    torch.testing.assert_close(ema.weight, 0.1 * (0.9 + 0.1 * model.weight) + 0.9 * model.weight)
    assert torch.equal(ema.running_mean, model.running_mean)


def test_log_survives_a_line_cut_short(tmp_path):
    args = SimpleNamespace()
    log = training.RunLog(tmp_path, args, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1 / step)
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in training.RunLog(tmp_path, args, 2).rows] == [1, 2]
    assert len(log.path.read_text().splitlines()) == 2
    assert training.RunLog(tmp_path, args, 0).rows == []


def dests(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from dests(child)
        elif action.dest != "help":
            yield action.dest


@pytest.mark.parametrize("script", [train_vq, train_gpt, encode, sample, evaluate, demo], ids=lambda s: s.__name__)
def test_every_option_is_read(script, monkeypatch):
    monkeypatch.setattr(command_line.Parser, "parse_args", lambda self: self)
    names = set(dests(script.options()))
    sources = "".join(Path(module.__file__).read_text() for module in (script, command_line, training, checkpoints))
    assert names and {name for name in names if not re.search(rf"\bargs\.{name}\b", sources)} == set()


def test_help_names_units_and_defaults(monkeypatch, capsys):
    for script in (train_vq, train_gpt, encode, sample, evaluate, demo):
        monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
        with pytest.raises(SystemExit) as stopped:
            script.options()
        assert stopped.value.code == 0 and "usage: x.py" in capsys.readouterr().out


def test_presets_of_the_scripts_are_those_of_the_models():
    assert train_vq.PRESETS is vq.PRESETS and {"B", "L", "XL", "XXL", "3B"} < set(train_gpt.PRESETS)


def test_codes_of_the_average_move_with_the_model(tmp_path, monkeypatch):
    run(train_vq, monkeypatch, tmp_path, "--data", "digits", "--size", 32, "--perceptual-weight", 0, "--disc-weight", 0,
        "--batch-size", 8, "--max-steps", 3, "--kmeans-step", 2, "--ema", 0.999, "--lr", 1e-9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    name = "quantize.embedding.weight"
    torch.testing.assert_close(state["ema"][name], state["model"][name])


def test_resuming_refuses_other_codes(codes, tmp_path, monkeypatch):
    run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 1))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["data"]["tokenizer_sha256"] = "ab" * 32
    save_file(tmp_path / "state.pt", state)
    with pytest.raises(ValueError, match="has the tokenizer_sha256"):
        run(train_gpt, monkeypatch, tmp_path, *gpt_options(codes, "--max-steps", 2, "--resume"))


def test_weights_that_are_not_finite_are_not_saved(codes, tmp_path, monkeypatch):
    options = gpt_options(codes, "--lr", 1e30, "--max-bad-steps", 3, "--save-every", 1, "--max-steps", 8)
    with pytest.raises(ValueError, match="3 steps in a row, up to step 4, had no finite gradient: the last checkpoint"):
        run(train_gpt, monkeypatch, tmp_path, *options)
    assert torch.load(tmp_path / "gpt.pt", weights_only=True)["model"]["output.weight"].isfinite().all()


def test_a_process_without_held_out_images_adds_nothing(codes, monkeypatch):
    args, file = SimpleNamespace(eval_images=4, micro_batch_size=2), CodeFile(codes / "val")
    device = torch.device("cpu"), "float32"
    model = GPT(train_gpt.GPTConfig(**LLAMA, vocab_size=32, num_classes=3, grid=(2, 3)))
    alone = train_gpt.evaluate(model, file, args, *device)
    shares = []
    for rank in range(8):
        monkeypatch.setattr(common, "rank_and_world", lambda rank=rank: (rank, 8))
        shares.append(train_gpt.evaluate(model, file, args, *device))
    assert shares[4:] == [0, 0, 0, 0] and sum(shares) == pytest.approx(alone, rel=1e-6)
