import argparse
import gc
import multiprocessing
import os
import re
import socket
import sys

import bench_sample
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from command_line import cli
from common import file_sha256, save_file
from gpt import GPT, PRESETS, GPTConfig
from sample import LOOPS, generate, parse_classes, release, sample_images, uniforms
from vq import VQConfig, VQModel


def small_gpt(**changes):
    """A GPT whose logits are spread out: random weights everywhere."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, dim=32, ffn_dim=48, vocab_size=16, num_classes=3, grid=(2, 4))
    model = GPT(GPTConfig(**sizes | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2 if p.dim() == 1 else p.shape[1] ** -0.5)
    model.output.weight.data.mul_(2)
    return model


TEXT = dict(cond="text", n_cond=5, text_dim=12, cond_rope="zero")


def text_condition():
    mask = torch.arange(5)[None] >= torch.tensor([0, 2, 4])[:, None]
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)) * mask.unsqueeze(-1), mask


@torch.no_grad()
def direct_greedy(model, cond, mask, scale, guided):
    """The likeliest codes, with everything computed anew for each, the two branches apart."""
    null, codes = model.cls_embedding.null(cond), torch.zeros(len(cond), 0, dtype=torch.long)
    for i in range(model.config.grid[0] * model.config.grid[1]):
        logits = model(codes, cond, mask)[0][:, -1].double()
        if i < guided:
            uncond = model(codes, null, mask)[0][:, -1].double()
            logits = uncond + scale * (logits - uncond)
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    return codes.view(-1, *model.config.grid)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("given", [0, 1, 4, 7])
@pytest.mark.parametrize("stop", [-1, 0, 4, 6], ids="stop {}".format)
def test_completing_images(kind, given, stop):
    """Of codes that the model would not have chosen; what follows is what it would choose then."""
    model = small_gpt(**TEXT if kind == "text" else {})
    cond, mask = text_condition() if kind == "text" else (torch.tensor([0, 2, 1]), None)
    prefix = torch.randint(16, (3, given), generator=torch.Generator().manual_seed(given))
    codes = generate(model, cond, mask, cfg_scale=3.0, cfg_stop=stop, greedy=True, prefix=prefix.to(torch.uint16))
    expected, guided = prefix, 8 if stop < 0 else stop
    while expected.shape[1] < 8:
        logits = model(expected, cond, mask)[0][:, -1].double()
        if expected.shape[1] < guided:
            uncond = model(expected, model.cls_embedding.null(cond), mask)[0][:, -1].double()
            logits = uncond + 3 * (logits - uncond)
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(codes.flatten(1), expected)
    whole = generate(model, cond, mask, cfg_scale=3.0, cfg_stop=stop, top_k=9, seed=4)  # and with the same numbers
    prefix = whole.flatten(1)[:, :given]
    again = generate(model, cond, mask, cfg_scale=3.0, cfg_stop=stop, top_k=9, seed=4, prefix=prefix)
    assert torch.equal(whole, again)


def test_every_seed_and_index_has_numbers_of_its_own():
    """NumPy makes floats of numbers from 2^63 on beside smaller ones."""
    seeds = [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    rows = [uniforms(seed, 0, 1, 4) for seed in seeds] + [uniforms(0, index, 1, 4) for index in seeds[1:]]
    assert len({tuple(row[0].tolist()) for row in rows}) == len(rows)
    assert torch.equal(uniforms(0, 2**63, 3, 4)[1:], uniforms(0, 2**63 + 1, 2, 4))


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0], ids="scale {}".format)
@pytest.mark.parametrize("stop", [0, 1, 3, 8, 99, -1], ids="stop {}".format)
def test_guidance_against_recomputing(kind, scale, stop):
    model = small_gpt(**TEXT if kind == "text" else {})
    cond, mask = text_condition() if kind == "text" else (torch.tensor([0, 2, 1]), None)
    guided = 8 if stop < 0 else min(stop, 8)
    batches = []
    step, prefill = model.step, model.prefill
    model.step = lambda codes, *args: batches.append(len(codes)) or step(codes, *args)
    model.prefill = lambda cond, *args: batches.append(len(cond)) or prefill(cond, *args)
    codes = generate(model, cond, mask, cfg_scale=scale, cfg_stop=stop, greedy=True)
    assert torch.equal(codes, direct_greedy(model, cond, mask, scale, guided))
    assert batches == [6] * guided + [3] * (8 - guided)  # no unconditional row more than is needed


def test_guidance_matters_for_the_tests_above():
    model, cond = small_gpt(), torch.tensor([0, 2, 1])
    stops = [generate(model, cond, cfg_scale=3.0, cfg_stop=stop, greedy=True) for stop in (0, 1, 3, 8)]
    assert not any(torch.equal(a, b) for a, b in zip(stops, stops[1:], strict=False))
    assert not torch.equal(stops[-1], generate(model, cond, cfg_scale=2.0, greedy=True))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_guidance_1_is_conditional(kind):
    model = small_gpt(**TEXT if kind == "text" else {})
    cond, mask = text_condition() if kind == "text" else (torch.tensor([0, 2, 1]), None)
    batches, prefill = [], model.prefill
    model.prefill = lambda cond, *args: batches.append(len(cond)) or prefill(cond, *args)
    codes = generate(model, cond, mask, cfg_scale=1.0, seed=3)
    assert batches == [3]
    assert torch.equal(codes, generate(model, cond, mask, cfg_scale=5.0, cfg_stop=0, seed=3))
    assert torch.equal(codes, generate(model, cond, mask, cfg_scale=1.0 + 1e-7, seed=3)) and batches[-1] == 6
    assert torch.equal(generate(model, cond, mask, greedy=True), direct_greedy(model, cond, mask, 1.0, 0))


# The distribution

def chi_square(codes, p):
    expected = p.double() * codes.numel()
    return float(((codes.flatten().bincount(minlength=len(p)) - expected) ** 2 / expected).sum())


def test_uniform_numbers():
    noise = uniforms(7, 3, 4, 1000)
    assert noise.shape == (4, 1000) and noise.dtype == torch.float32 and 0 <= noise.min() and noise.max() < 1
    assert torch.equal(noise[2], uniforms(7, 5, 1, 1000)[0]) and torch.equal(noise[:, :9], uniforms(7, 3, 4, 9))
    assert not torch.equal(noise, uniforms(8, 3, 4, 1000)) and abs(float(noise.mean()) - 0.5) < 0.02
    assert chi_square((noise * 20).long(), torch.full((20,), 0.05)) < 43.8  # 19 degrees of freedom, 1 in 1000


def test_generated_codes_follow_the_model():
    model = small_gpt(grid=(1, 1))
    with torch.no_grad():
        logits = model(torch.zeros(1, 0, dtype=torch.long), torch.tensor([1]))[0][0, 0]
    codes = generate(model, torch.ones(20_000, dtype=torch.long), temperature=1.5)
    assert chi_square(codes, (logits / 1.5).softmax(0)) < 37.7  # 15 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_images_do_not_depend_on_their_neighbours(scale):
    model, cond = small_gpt(), torch.tensor([0, 1, 2, 0, 1])
    settings = dict(cfg_scale=scale, seed=4, top_p=0.9)
    codes = generate(model, cond, **settings)
    for cut in (1, 3):
        parts = [generate(model, cond[:cut], **settings), generate(model, cond[cut:], first_index=cut, **settings)]
        assert torch.equal(torch.cat(parts), codes)
    assert not torch.equal(codes[0], codes[3])  # the same class, another index
    assert not torch.equal(codes, generate(model, cond, **settings | dict(seed=5)))
    vq = small_vq()
    images, all_codes = sample_images(vq, model, cond, batch_size=2, **settings)
    assert torch.equal(all_codes, codes) and images.shape == (5, 4, 8, 3) and images.dtype == np.uint8
    expected = (127.5 * vq.decode(codes) + 128).clamp(0, 255)
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


@pytest.mark.xfail(
    torch.__version__ < "2.13" and not torch.cpu._is_avx512_supported(), strict=False,
    reason="oneDNN of torch 2.11 rounds by the number of rows on CPUs without AVX-512",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_1_3_and_8_at_the_width_of_a_real_model(dtype):
    """Matrix libraries choose their kernel by the size of the batch: rows must not notice."""
    model = small_gpt(dim=768, n_head=12, n_kv_head=12, ffn_dim=2048, vocab_size=16384, n_layer=1).to(dtype)
    cond = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    codes = generate(model, cond, cfg_scale=2.0, seed=1)
    for batch in (1, 3):
        for first in range(0, 8, batch):
            part = generate(model, cond[first : first + batch], cfg_scale=2.0, seed=1, first_index=first)
            assert torch.equal(part, codes[first : first + batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_float32(dtype):
    model, cond = small_gpt(dim=400, n_kv_head=4, ffn_dim=96), torch.tensor([0, 1, 2])  # heads of 100
    codes = generate(model, cond, cfg_scale=2.0, greedy=True)
    low = generate(model.to(dtype), cond, cfg_scale=2.0, greedy=True)
    assert (low == codes).float().mean() > 0.5 and (low[:, 0, 0] == codes[:, 0, 0]).all()


@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_by_kernels(kind, kernels_mode):
    """Those of the PyTorch path: reading the condition, the steps and the draw, guided and then not."""
    model, cond = small_gpt(dim=64, grid=(2, 3), **TEXT if kind == "text" else {}), torch.tensor([0, 2, 1])
    cond, mask = text_condition() if kind == "text" else (cond, None)
    codes = []
    for mode in ("torch", "triton"):
        kernels_mode(mode)
        codes.append(generate(model, cond, mask, cfg_scale=2.0, cfg_stop=4, top_k=12, top_p=0.9, seed=1))
    assert torch.equal(*codes) and len(codes[0].unique()) > 5


def test_greedy():
    model, cond = small_gpt().train(), torch.tensor([0, 1, 2])
    codes = generate(model, cond, greedy=True, seed=0)
    assert torch.equal(codes, generate(model, cond, greedy=True, seed=1, temperature=0.0))
    assert torch.equal(codes, generate(model, cond, top_k=1)) and torch.equal(codes, generate(model, cond, top_p=1e-9))
    assert model.training and codes.shape == (3, 2, 4) and codes.dtype == torch.int64


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=0.0), "temperature has to be above 0"), (dict(temperature=-1.0), "temperature has to be above 0"),
    (dict(temperature=float("nan")), "temperature"), (dict(temperature=float("inf")), "temperature"),
    (dict(top_k=-1), "top_k has to be 0"), (dict(top_p=0.0), "top_p has to be in"), (dict(top_p=1.1), "top_p"),
    (dict(seed=-1), "seed and first_index"), (dict(first_index=2**64), "seed and first_index"),
    (dict(top_p=float("nan")), "top_p"), (dict(cfg_stop=-2), "cfg_stop has to be -1"),
    (dict(cfg_scale=float("nan")), "cfg_scale"), (dict(cfg_scale=float("inf")), "cfg_scale"),
    (dict(grid=(4, 2)), r"generates \(2, 4\) codes, not \(4, 2\)"),
    (dict(cond=torch.tensor([0, 4])), "labels .* in 0..3"),
    (dict(cond=3), "cond has to be a tensor with a condition for each image, not 3"), (dict(top_k=0.5), "top_k"),
    (dict(prefix=torch.zeros(1, 8, dtype=torch.long)), r"prefix has to be codes \[1, t < 8\], not \[1, 8\]"),
    (dict(prefix=torch.zeros(2, 3, dtype=torch.long)), "prefix has to be codes"),
    (dict(prefix=torch.zeros(1, 3)), "prefix has to be a tensor of codes, not torch.float32"),
    (dict(prefix=[[1, 2]]), "prefix has to be a tensor of codes, not <class 'list'>"),
    (dict(top_k=float("inf")), "top_k"), (dict(seed=2**64), "seed and first_index"),
    (dict(prefix=torch.full((1, 1), 16)), r"prefix has to hold codes in 0..15, not 16..16"),
    (dict(cond=torch.tensor([-1])), "labels have to be"), (dict(cond=torch.ones(0, dtype=torch.long)), "no condition"),
], ids=str)
def test_requests_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(small_gpt(), **dict(dict(cond=torch.tensor([0])), **settings))


def test_buffers_are_kept_for_the_next_request_and_follow_the_weights():
    LOOPS.clear()
    model, cond = small_gpt(), torch.tensor([0, 1, 2])
    first = generate(model, cond, cfg_scale=2.0, seed=1)
    kept = LOOPS[model][1]
    assert torch.equal(first, small_codes := first.clone())
    second = generate(model, cond.flip(0), cfg_scale=2.0, seed=2)
    assert LOOPS[model][1] is kept and torch.equal(first, small_codes) and not torch.equal(first, second)
    assert torch.equal(generate(model, cond, cfg_scale=2.0, seed=1), first)  # nothing is left of the second
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(-1)  # a training step
    changed = generate(model, cond, cfg_scale=2.0, seed=1)
    assert LOOPS[model][1] is kept and not torch.equal(changed, first)
    release(model)
    assert model not in LOOPS and torch.equal(generate(model, cond, cfg_scale=2.0, seed=1), changed)
    kept = LOOPS[model][1]
    for settings in (dict(cfg_scale=2.5), dict(cfg_scale=2.0, cfg_stop=3), dict(), dict(top_k=2), dict(greedy=True)):
        generate(model, cond, **settings)
        assert LOOPS[model][1] is not kept
        kept = LOOPS[model][1]
    model.set_grid((4, 4))
    assert generate(model, cond, greedy=True).shape == (3, 4, 4) and len(LOOPS) == 1
    del model, kept
    gc.collect()
    assert len(LOOPS) == 0  # it does not keep a model alive


def test_text_without_a_mask_after_text_with_one():
    model, (cond, mask) = small_gpt(**TEXT), text_condition()
    whole = generate(model, cond, greedy=True)
    generate(model, cond, mask, greedy=True)
    assert torch.equal(generate(model, cond, greedy=True), whole)
    assert torch.equal(whole, direct_greedy(model, cond, None, 1.0, 0))


def test_autocast_around_it_changes_nothing():
    model, cond = small_gpt(), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        codes = generate(model, cond, seed=1)
    assert torch.equal(codes, generate(model, cond, seed=1))


def test_the_null_class_can_be_sampled():
    model = small_gpt()
    codes = generate(model, torch.tensor([3]), cfg_scale=4.0, greedy=True)
    assert torch.equal(codes, direct_greedy(model, torch.tensor([3]), None, 1.0, 0))


def test_parse_classes():
    names = ["cat", "dog", "10", "sea lion"]
    assert parse_classes("dog, 0,sea lion,10,3", names, 4) == [1, 0, 3, 2, 3]
    assert parse_classes("2", [], 3) == [2]
    spelt = ["Ma\u0308nner", "gold, stripes"]  # as a Mac spells it; and a comma
    assert parse_classes("M\u00e4nner,1", spelt, 2) == [0, 1] and parse_classes("gold, stripes", spelt, 2) == [1]
    for text, word in (("cow", "cow"), ("4", "4"), ("-1", "-1"), ("1,,2", ""), ("²", "²"), ("1.5", "1.5")):
        with pytest.raises(ValueError, match=f"^--classes: '{word}' is neither a class name nor a number below 4$"):
            parse_classes(text, names, 4)
    with pytest.raises(ValueError, match="a number below 3 .neither the GPT's file nor torchvision has names.$"):
        parse_classes("dog", [], 3)


# The command

def small_vq():
    torch.manual_seed(0)
    return VQModel(VQConfig(channels=(32, 32), z_channels=8, codebook_size=16, code_dim=4)).eval()


@pytest.fixture
def files(tmp_path):
    """Our files, and the same models in the published format; a tokenizer of another kind."""
    vq, gpt = small_vq(), small_gpt(n_head=4, n_kv_head=4, dim=128, cond_rope="zero")
    save_file(tmp_path / "vq.pt", vq.checkpoint())
    codes = dict(tokenizer="vq.pt", tokenizer_sha256=file_sha256(tmp_path / "vq.pt"), class_names=["cat", "dog", "cow"])
    save_file(tmp_path / "gpt.pt", dict(gpt.checkpoint(), codes=codes))
    torch.save({"model": vq.state_dict(), "args": argparse.Namespace()}, tmp_path / "vq_ds2_c2i.pt")
    torch.save(gpt.state_dict(), tmp_path / "c2i_XXL.pt")
    small = VQModel(VQConfig(channels=(32, 32), z_channels=8, codebook_size=12, code_dim=4))
    save_file(tmp_path / "vq_12.pt", small.checkpoint())
    return tmp_path


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, options)])
    sample.main()


def tile(path, column, row, h=96, w=192, text=16):
    """One picture of a sheet of 4 x 8 pixels at 24 (or 12) times their size, as it was generated."""
    x, y = 4 + column * (w + 4), 4 + row * (h + text + 4)
    return np.asarray(Image.open(path).crop((x, y, x + w, y + h)).resize((8, 4), Image.NEAREST))


def test_command_writes_a_labelled_grid(files, monkeypatch, capsys):
    out, settings = files / "new" / "grid.png", ("--cfg-scale", 3, "--top-k", 5, "--seed", 2, "--batch-size", 4)
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--n", 6, "--out", out, *settings)
    assert "6 images, " in capsys.readouterr().out and Image.open(out).size == (2 * 100 + 4, 3 * 68 + 4)
    vq, gpt = VQModel.from_pretrained(files / "vq.pt"), GPT.from_pretrained(files / "gpt.pt")
    images, _ = sample_images(vq, gpt, torch.tensor([0, 0, 1, 1, 2, 2]), cfg_scale=3.0, top_k=5, seed=2)
    for i in range(6):
        np.testing.assert_array_equal(tile(out, i % 2, i // 2, 48, 96), images[i])
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--classes", "cow,0", "--greedy", "--out", out)
    images, _ = sample_images(vq, gpt, torch.tensor([2, 0]), cfg_scale=2.0, greedy=True)
    for i in range(2):
        np.testing.assert_array_equal(tile(out, i, 0, 48, 96), images[i])


def test_command_reads_published_files(files, monkeypatch):
    """They say nothing of the codes: no names, no check of the tokenizer beyond the number of codes."""
    published = ("--vq", files / "vq_ds2_c2i.pt", "--gpt", files / "c2i_XXL.pt", "--seed", 2, "--classes", "2,1,1")
    run(monkeypatch, *published, "--grid", "2x4", "--out", files / "a.png")
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--seed", 2, "--classes", "cow,dog,dog",
        "--out", files / "b.png")
    for i in range(3):
        np.testing.assert_array_equal(tile(files / "a.png", i, 0, 48, 96), tile(files / "b.png", i, 0, 48, 96))
    run(monkeypatch, *published, "--grid", "4x2", "--out", files / "a.png")
    assert Image.open(files / "a.png").size == (3 * 52 + 4, 116 + 4)


def test_published_classes_have_names(files, monkeypatch):
    """Those of ImageNet, where a file of 1,000 classes holds none."""
    gpt = small_gpt(n_head=4, n_kv_head=4, dim=128, cond_rope="zero", num_classes=1000)
    torch.save(gpt.state_dict(), files / "c2i_B.pt")
    written, published = [], ("--vq", files / "vq_ds2_c2i.pt", "--gpt", files / "c2i_B.pt", "--grid", "2x4")
    monkeypatch.setattr(sample, "save_grid", lambda path, images, columns, labels, **_: written.append(labels))
    run(monkeypatch, *published, "--classes", "golden retriever, 974")
    assert written == [["golden retriever", "geyser"]]
    with pytest.raises(ValueError, match="did you mean macaw"):
        run(monkeypatch, *published, "--classes", "maccaw")
    named = [f"folder {i}" for i in range(1000)]
    codes = dict(tokenizer="vq.pt", tokenizer_sha256=file_sha256(files / "vq.pt"), class_names=named)
    save_file(files / "own.pt", dict(gpt.checkpoint(), codes=codes))
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "own.pt", "--classes", "folder 974")
    assert written.pop() == ["folder 974"]  # of a GPT trained here: its own
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not installed
    run(monkeypatch, *published, "--classes", "974")
    assert written[1:] == [[974]]


def long_run(files, monkeypatch, name, *more):
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--n", 11, "--batch-size", 2, "--top-k", 9,
        "--npz", files / f"{name}.npz", "--folder", files / name, "--out", files / f"{name}.png", *more)
    with np.load(files / f"{name}.npz") as content:
        return content["arr_0"], content["arr_1"]


def test_npz_and_folder(files, monkeypatch):
    images, labels = long_run(files, monkeypatch, "a")
    assert images.shape == (11, 4, 8, 3) and images.dtype == np.uint8
    assert sorted(np.bincount(labels)) == [3, 4, 4] and (np.diff(labels) < 0).any()  # balanced, shuffled
    vq, gpt = VQModel.from_pretrained(files / "vq.pt"), GPT.from_pretrained(files / "gpt.pt")
    np.testing.assert_array_equal(images, sample_images(vq, gpt, torch.from_numpy(labels), cfg_scale=2.0, top_k=9)[0])
    assert sorted(path.name for path in (files / "a").iterdir()) == [f"{i:06}.png" for i in range(11)]
    for i in range(11):
        np.testing.assert_array_equal(np.asarray(Image.open(files / "a" / f"{i:06}.png")), images[i])
    np.testing.assert_array_equal(tile(files / "a.png", 2, 1, 48, 96), images[10])
    assert not (files / "a.npz.parts").exists() and len(list(files.glob("*.tmp"))) == 0


def test_size(files, monkeypatch):
    images, labels = long_run(files, monkeypatch, "a", "--size", 6)
    vq, gpt = VQModel.from_pretrained(files / "vq.pt"), GPT.from_pretrained(files / "gpt.pt")
    codes = generate(gpt, torch.from_numpy(labels), cfg_scale=2.0, top_k=9)
    wanted = torch.nn.functional.interpolate(vq.decode(codes), (6, 6), mode="bicubic", antialias=False)
    assert images.shape == (11, 6, 6, 3)
    assert np.abs(images - (127.5 * wanted + 128).clamp(0, 255).permute(0, 2, 3, 1).detach().numpy()).max() <= 1


def test_an_interrupted_run_goes_on(files, monkeypatch, capsys):
    whole, labels = long_run(files, monkeypatch, "a")
    decode, generated = sample.decode, []

    def die_at_the_fourth(*args):
        if len(generated) == 3:
            raise KeyboardInterrupt
        generated.append(1)
        return decode(*args)

    monkeypatch.setattr(sample, "decode", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        long_run(files, monkeypatch, "b")
    assert not (files / "b.npz").exists() and len(list((files / "b.npz.parts").glob("*.npy"))) == 3
    (files / "b.npz.parts" / "00000006.tmp").write_bytes(b"cut short")
    monkeypatch.setattr(sample, "decode", lambda *args: generated.append(1) or decode(*args))
    with pytest.raises(ValueError, match="unfinished run of top_k 9, not 8: finish or remove"):
        long_run(files, monkeypatch, "b", "--top-k", 8)
    with pytest.raises(ValueError, match="b.npz.parts is an unfinished run of n 11, not 12"):
        long_run(files, monkeypatch, "b", "--n", 12)
    images, same = long_run(files, monkeypatch, "b")
    assert len(generated) == 6 and np.array_equal(images, whole) and np.array_equal(labels, same)
    assert "5 images (6 were there already), " in capsys.readouterr().out
    for name in ("b", "a"):
        with pytest.raises(ValueError, match=f"{name}.npz is there already"):
            long_run(files, monkeypatch, name)
        (files / f"{name}.npz").unlink()
        with pytest.raises(ValueError, match=f"{name} is not empty"):
            long_run(files, monkeypatch, name)


def test_a_refused_request_leaves_nothing(files, monkeypatch):
    with pytest.raises(ValueError, match="top_p"):
        long_run(files, monkeypatch, "a", "--top-p", 0)
    assert not (files / "a.npz.parts").exists() and not (files / "a").exists()


@pytest.mark.parametrize("how", ["npz", "grid"])
def test_two_processes_generate_what_one_does(files, monkeypatch, how):
    """As torchrun starts them."""
    more = ["--npz", files / "two.npz", "--folder", files / "two"] if how == "npz" else []

    def process(rank, port):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
        )
        run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--n", 11, "--batch-size", 2, "--top-k", 9,
            "--out", files / "two.png", *more)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank, port)) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
    if how == "npz":
        images, labels = long_run(files, monkeypatch, "one")
        with np.load(files / "two.npz") as content:
            assert np.array_equal(content["arr_0"], images) and np.array_equal(content["arr_1"], labels)
        assert len(list((files / "two").iterdir())) == 11 and not (files / "two.npz.parts").exists()
        assert (files / "two.png").read_bytes() == (files / "one.png").read_bytes()
    else:
        run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--n", 11, "--top-k", 9,
            "--out", files / "one.png")
        assert (files / "two.png").read_bytes() == (files / "one.png").read_bytes()
        assert not (files / "two.png.parts").exists()


@pytest.mark.parametrize("options, message", [
    (["--gpt", "c2i_XXL.pt"], "does not tell its grid"), (["--grid", "2by4"], "ROWSxCOLUMNS"),
    (["--grid", "2x"], "ROWSxCOLUMNS"), (["--grid", "²x2"], "ROWSxCOLUMNS"), (["--classes", "horse"], "'horse' is"),
    (["--vq", "vq_ds2_c2i.pt"], "was trained on codes of vq.pt, and .*vq_ds2_c2i.pt is another"),
    (["--gpt", "c2i_XXL.pt", "--vq", "vq_12.pt", "--grid", "2x4"], "knows 16 codes, .*vq_12.pt has 12"),
    (["--gpt", "text.pt"], "conditioned on texts"), (["--n", 0], "--n has to be above 0"),
    (["--columns", 0], "--columns has"),
    (["--size", 0], "--size has to be above 0"), (["--batch-size", 0], "--batch-size has to be above 0"),
    (["--top-p", 2], "top_p"), (["--vq", "none.pt"], "no such file"),
    (["--gpt", "vq.pt"], "not a GPT"), (["--device", "cuda:77"], "--device cuda:77"), (["--device", "gpu"], "--dev"),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_command_refuses_in_one_sentence(files, monkeypatch, capsys, options, message):
    if "text.pt" in options:
        save_file(files / "text.pt", small_gpt(**TEXT).checkpoint())
    names = {"--vq": "vq.pt", "--gpt": "gpt.pt"} | dict(zip(options[::2], options[1::2], strict=True))
    names = {k: files / v if k in ("--vq", "--gpt") else v for k, v in names.items()}
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--out", str(files / "no.png")])
        monkeypatch.setattr(sys, "argv", sys.argv + [str(word) for pair in names.items() for word in pair])
        cli(sample.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and re.match(f"sample.py: error: .*{message}", error), error
    assert not (files / "no.png").exists()


# The benchmark

def test_the_benchmark_compares_the_same_computation(monkeypatch, capsys):
    """Its baseline, made greedy, draws the codes that generate() draws; and the script runs."""
    monkeypatch.setattr(bench_sample, "TOP_K", 1)
    model, cond = bench_sample.make_model(PRESETS["tiny"] | dict(vocab_size=500), (2, 4), torch.float32, "cpu"), [5, 70]
    baseline = bench_sample.FullCache(model, 2)(torch.tensor(cond))
    codes = generate(model, torch.tensor(cond), cfg_scale=bench_sample.CFG, greedy=True)
    assert torch.equal(baseline, codes.flatten(1)) and len(codes.unique()) > 1
    rows = bench_sample.on_cpu(PRESETS["tiny"] | dict(vocab_size=500), (2, 4), 1, 1)
    assert [row["method"] for row in rows] == ["ours", "full cache", "products", "recompute"] * 2
    assert all(row["seconds"] > 0 for row in rows) and "full cache" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("1960 requested and 1432 written"), OSError(28, "No space left on device")])
def test_a_full_disk_is_named(error, tmp_path, monkeypatch):
    """NumPy and the system do not tell the file; the one from before stays, and nothing else does."""
    parts, images = sample.Parts(tmp_path), np.zeros((1, 8, 8, 3), np.uint8)
    parts.save(0, images)
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=f"{parts.path(0)} could not be written: .*{re.escape(error.args[-1])}"):
        parts.save(0, images)
    assert list(tmp_path.iterdir()) == [parts.path(0)] and next(parts.load([0])).shape == images.shape
