import argparse
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common import cli, save_file
from encode import file_sha256
from gpt import GPT, GPTConfig
from sample import draw, generate, guide, keep_probable, paint, parse_classes, uniforms
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


def test_guidance_formula():
    cond, uncond = torch.randn(2, 3, 7)
    torch.testing.assert_close(guide(torch.cat([cond, uncond]), 2.5), 2.5 * cond - 1.5 * uncond)


# The distribution

def direct_probabilities(row, top_k, top_p):
    """Sorted by hand, in float64; ties with the last code kept are kept."""
    row = row.double()
    if top_k:
        row = torch.where(row < sorted(row.tolist())[-min(top_k, len(row))], -torch.inf, row)
    p = (row - row.max()).exp()
    p = p / p.sum()
    mass, last = 0.0, 0.0
    for value in sorted(p.tolist(), reverse=True):
        mass, last = mass + value, value
        if mass >= top_p - 1e-9:
            break
    p = torch.where(p < last - 1e-12, 0.0, p)
    return p / p.sum()


ROWS = {
    "random": torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3,
    "ties": torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 2.0, 2.0, -1.0]),
    "uniform": torch.zeros(16),
    "minus infinity": torch.tensor([-torch.inf, 0.5, -torch.inf, 2.0, 0.3, -torch.inf]),
    "one": torch.tensor([-torch.inf, -torch.inf, 4.0, -torch.inf]),
    "huge": torch.tensor([1e4, 9e3, -1e4, 1e4]),
}


@pytest.mark.parametrize("top_p", [1.0, 0.83, 0.5, 1e-6], ids="p {}".format)
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 16, 10_000], ids="k {}".format)
@pytest.mark.parametrize("name", ROWS)
def test_top_k_and_top_p_against_sorting(name, top_k, top_p):
    logits = torch.stack([ROWS[name], ROWS[name].flip(0)])
    before = logits.clone()
    p = keep_probable(logits, top_k, top_p)
    assert torch.equal(logits, before)  # not filtered in place
    for row, mine in zip(logits, p, strict=True):
        direct = direct_probabilities(row, top_k, top_p)
        assert torch.equal(mine > 0, direct > 0)
        torch.testing.assert_close(mine.double(), direct, atol=1e-6, rtol=1e-5)


def test_draw_never_takes_a_code_without_mass():
    p = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0], [1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    top = float(np.nextafter(np.float32(1), np.float32(0)))
    for u, expected in ((0.0, [2, 0, 5]), (0.2999, [2, 0, 5]), (0.3001, [4, 0, 5]), (top, [4, 0, 5])):
        assert draw(p, torch.full((3,), u)).tolist() == expected
    wide = torch.zeros(2, 16384)
    wide[:, 5:16000] = torch.rand(2, 15995) * 1e-5
    assert draw(wide, torch.tensor([0.0, top])).tolist() == [5, 15999]  # whatever the sum is


def chi_square(codes, p):
    expected = p.double() * codes.numel()
    return float(((codes.flatten().bincount(minlength=len(p)) - expected) ** 2 / expected).sum())


def test_draw_follows_the_distribution():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    noise = uniforms(7, 0, 200, 100)
    assert noise.dtype == torch.float32 and 0 <= noise.min() and noise.max() < 1
    assert chi_square(draw(p.expand(20_000, -1), noise.flatten()), p) < 20.5  # 5 degrees of freedom, 1 in 1000


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
    images, all_codes = paint(vq, model, cond, batch_size=2, **settings)
    assert torch.equal(all_codes, codes) and images.shape == (5, 4, 8, 3) and images.dtype == np.uint8
    expected = (127.5 * vq.decode(codes) + 128).clamp(0, 255)
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


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
    (dict(top_p=float("nan")), "top_p"), (dict(cfg_stop=-2), "cfg_stop has to be -1"),
    (dict(cfg_scale=float("nan")), "cfg_scale"), (dict(cfg_scale=float("inf")), "cfg_scale"),
    (dict(grid=(4, 2)), r"paints \(2, 4\), not \(4, 2\)"), (dict(cond=torch.tensor([0, 4])), "labels .* in 0..3"),
    (dict(cond=torch.tensor([-1])), "labels have to be"), (dict(cond=torch.ones(0, dtype=torch.long)), "no condition"),
], ids=str)
def test_requests_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(small_gpt(), **dict(dict(cond=torch.tensor([0])), **settings))


def test_the_null_class_can_be_painted():
    model = small_gpt()
    codes = generate(model, torch.tensor([3]), cfg_scale=4.0, greedy=True)
    assert torch.equal(codes, direct_greedy(model, torch.tensor([3]), None, 1.0, 0))


def test_parse_classes():
    names = ["cat", "dog", "10", "sea lion"]
    assert parse_classes("dog, 0,sea lion,10,3", names, 4) == [1, 0, 3, 2, 3]
    assert parse_classes("2", [], 3) == [2]
    for text, word in (("cow", "cow"), ("4", "4"), ("-1", "-1"), ("1,,2", ""), ("²", "²"), ("1.5", "1.5")):
        with pytest.raises(ValueError, match=f"^--classes: '{word}' is neither a class name nor a number below 4$"):
            parse_classes(text, names, 4)


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
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, options)])
    sample.main()


def tile(path, column, row, h=96, w=192, text=16):
    """One picture of a sheet of 4 x 8 pixels at 24 (or 12) times their size, as it was painted."""
    x, y = 4 + column * (w + 4), 4 + row * (h + text + 4)
    return np.asarray(Image.open(path).crop((x, y, x + w, y + h)).resize((8, 4), Image.NEAREST))


def test_command_writes_a_labelled_grid(files, monkeypatch, capsys):
    out, settings = files / "new" / "grid.png", ("--cfg-scale", 3, "--top-k", 5, "--seed", 2, "--batch-size", 4)
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--n", 6, "--out", out, *settings)
    assert "6 images in" in capsys.readouterr().out and Image.open(out).size == (2 * 100 + 4, 3 * 68 + 4)
    vq, gpt = VQModel.from_pretrained(files / "vq.pt"), GPT.from_pretrained(files / "gpt.pt")
    images, _ = paint(vq, gpt, torch.tensor([0, 0, 1, 1, 2, 2]), cfg_scale=3.0, top_k=5, seed=2)
    for i in range(6):
        np.testing.assert_array_equal(tile(out, i % 2, i // 2, 48, 96), images[i])
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--classes", "cow,0", "--greedy", "--out", out)
    images, _ = paint(vq, gpt, torch.tensor([2, 0]), cfg_scale=2.0, greedy=True)
    for i in range(2):
        np.testing.assert_array_equal(tile(out, i, 0, 48, 96), images[i])


def test_command_reads_published_files(files, monkeypatch):
    """They say nothing of the codes: no names, no check of the tokenizer beyond the number of codes."""
    published = ("--vq", files / "vq_ds2_c2i.pt", "--gpt", files / "c2i_XXL.pt", "--seed", 2, "--classes", "2,1,1")
    run(monkeypatch, *published, "--grid", "2x4", "--out", files / "a.png")
    run(monkeypatch, "--vq", files / "vq.pt", "--gpt", files / "gpt.pt", "--seed", 2, "--classes", "cow,dog,dog",
        "--out", files / "b.png")  # fmt: skip
    for i in range(3):
        np.testing.assert_array_equal(tile(files / "a.png", i, 0, 48, 96), tile(files / "b.png", i, 0, 48, 96))
    run(monkeypatch, *published, "--grid", "4x2", "--out", files / "a.png")
    assert Image.open(files / "a.png").size == (3 * 52 + 4, 116 + 4)


@pytest.mark.parametrize("options, message", [
    (["--gpt", "c2i_XXL.pt"], "does not tell its grid"), (["--grid", "2by4"], "ROWSxCOLUMNS"),
    (["--grid", "2x"], "ROWSxCOLUMNS"), (["--grid", "²x2"], "ROWSxCOLUMNS"), (["--classes", "horse"], "'horse' is"),
    (["--vq", "vq_ds2_c2i.pt"], "was trained on codes of vq.pt, and .*vq_ds2_c2i.pt is another"),
    (["--gpt", "c2i_XXL.pt", "--vq", "vq_12.pt", "--grid", "2x4"], "knows 16 codes, .*vq_12.pt has 12"),
    (["--gpt", "text.pt"], "wants text"), (["--n", 0], "--n, --batch-size"), (["--columns", 0], "--n, --batch-size"),
    (["--batch-size", 0], "--n, --batch-size"), (["--top-p", 2], "top_p"), (["--vq", "none.pt"], "no such file"),
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
