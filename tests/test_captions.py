"""Text conditions: captioned sets, tokenizers, files of captions, the scripts that use them and GPTs that read them."""

import json
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import direct_greedy, small_gpt
from test_train import LLAMA, VQ

import builtin_sets
import captions
import data
import demo
import encode
import sample
import train_gpt
from builtin_sets import COLOURS, DIGITS, GROUNDS, SPLITS, UNSEEN_COLOUR, UNSEEN_RIGHT, digits_text
from captions import CaptionFeatures, CaptionFile, CaptionTokens, CaptionWriter, condition, open_reader, train_tokenizer
from codes import CodeFile
from command_line import cli
from common import save_file
from data import eval_batches, load_images, read_jsonl
from gpt import rope_table
from sample import generate, read_captions, sample_images
from t5 import T5Config, T5Encoder, clean_caption
from vq import VQConfig, VQModel

OURS = dict(vocab_size=32, grid=(2, 3), dropout=0.0, cond_dropout=0.0)
TEXTS = [texts[i % 6] for i, texts in enumerate(digits_text("train", 500)[0]["captions"])]
MODELS = {kind: train_tokenizer(iter(TEXTS), 400, kind) for kind in ("unigram", "bpe", "word")}
PROMPTS = ["a red three left of a blue six", "a green one and a white two on navy"]


def jsonl(folder, lines):
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    (folder / "pairs.jsonl").write_bytes(b"\n".join(lines))
    return folder / "pairs.jsonl"


def both(data, **how):
    return load_images(data, 16, **how)


GOOD = [b'{"image": "0.png", "text": " a  red\\tcat "}', b'{"image": "0.png", "text": ["one", " ", "two\\nwords"]}']
BAD = [
    (b'{"image": "0.png", "text": ', "Expecting value"), (b'["0.png", "cat"]', "not {"), (b'{"text": "cat"}', "not {"),
    (b'{"image": "0.png"}', "not {"), (b'{"image": 7, "text": "cat"}', "not {"), (b'{"image": "0.png", "text": 7}', ""),
    (b'{"image": "0.png", "text": ["cat", 7]}', "text is"), (b'{"image": ".", "text": "cat"}', "is not there"),
    (b'{"image": "1.png", "text": "cat"}', "1.png is not there"), (b'{"image": "0.png", "text": ""}', "is empty"),
    (b'{"image": "0.png", "text": " \\n"}', "is empty"), (b'{"image": "0.png", "text": []}', "is empty"),
    (b'{"image": "0.png", "text": "caf\xe9"}', "can't decode byte 0xe9"),
    (b'{"image": "%s", "text": "cat"}' % (b"0" * 300), "00"),  # OSError: name too long
]


@pytest.mark.parametrize("line, reason", BAD, ids=range(len(BAD)))
def test_bad_lines_are_counted_named_and_left_out(line, reason, tmp_path, caplog):
    path = jsonl(tmp_path, [GOOD[0], b" ", line, b"", GOOD[1]])
    images, texts = read_jsonl(path, 1 / 3)  # the share may be reached
    assert images == [tmp_path / "0.png"] * 2 and texts == [["a red cat"], ["one", "two words"]]
    assert len(caplog.messages) == 1 and re.match(rf"left out: {path} line 3 \(.*{reason}", caplog.messages[0])
    with pytest.raises(ValueError, match=rf"^{path}: 1 of 3 \(33.3%\) have no .*first is {path} line 3 \(.*{reason}"):
        read_jsonl(path, 0.3)


def test_jsonl_files(tmp_path, caplog):
    """Ten bad lines are named, and how many there are; nothing is no set; the splits are disjoint and complete."""
    for n in (10, 12):
        caplog.clear()
        assert len(read_jsonl(jsonl(tmp_path, GOOD * 10 + [b"{}"] * n), 0.5)[0]) == 20
        assert [int(text.split("line ")[1].split()[0]) for text in caplog.messages[:10]] == list(range(21, 31))
        assert caplog.messages[10:] == ([f"left out: {n} in all of {20 + n}"] if n > 10 else [])
    nothing = "no captioned images$"
    for lines, message in (([], nothing), ([b"", b" "], nothing), ([b"{}"], "everything is")):
        with pytest.raises(ValueError, match=rf"pairs.jsonl: {message}"):
            read_jsonl(jsonl(tmp_path, lines), 1)
    marked = [b"\xef\xbb\xbf" + GOOD[0], GOOD[1]]  # as some editors begin a file
    assert read_jsonl(jsonl(tmp_path, marked), 0) == read_jsonl(jsonl(tmp_path, GOOD), 0)
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        both(tmp_path / "none.jsonl", text=True)
    for i in range(40):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    path = jsonl(tmp_path, [b'{"image": "%d.png", "text": "of %d"}' % (i % 40, i % 40) for i in range(80)])
    parts = both(path, text=True)  # two lines of one picture are two captions of it, in one split
    assert sorted((int(a[3:]), int(b[3:])) for part in parts for a, b in part.captions) == [(i, i) for i in range(40)]
    assert [(len(p), p.flip) for p in parts + both(path)] == [(38, False), (2, False), (38, True), (2, True)]


@pytest.mark.parametrize("folders", [[""], ["cats", "dogs"]], ids=["flat", "class folders"])
def test_pairs_of_files(folders, tmp_path, caplog):
    spoil = {3: lambda f: f.unlink(), 5: lambda f: f.write_text(" \n\n"), 8: lambda f: f.write_bytes(b"caf\xe9")}
    for i in range(30):
        path = tmp_path / folders[i % len(folders)] / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
        text = f"caption {i:02} {path.parent.name}\n\n second  {i:02}\n"
        path.with_suffix(".txt").write_text(text, encoding=("utf-8", "utf-8-sig")[i % 2])  # as some editors write it
        spoil.get(i, bool)(path.with_suffix(".txt"))
    parts, plain = both(tmp_path, text=True, bad_share=0.1), both(tmp_path)
    assert sorted(int(i.stem) for part in parts for i in part.images) == [i for i in range(30) if i not in spoil]
    for part, same in zip(parts, plain, strict=True):  # the tokenizer, which reads no captions, has the same split
        assert part.images == [image for image in same.images if int(image.stem) not in spoil]
        for image, label, texts in zip(part.images, part.labels, part.captions, strict=True):
            assert texts == [f"caption {image.stem} {image.parent.name}", f"second {image.stem}"]
            assert part.class_names[label] == (image.parent.name if folders[1:] else "image")
    for start in (r"03.txt \(No such file", r"05.txt \(the caption is empty", r"08.txt \(.*can't decode"):
        assert sum(bool(re.search(start, text)) for text in caplog.messages) == 1
    with pytest.raises(ValueError, match=r"3 of 30 \(10.0%\) .*, the first is .*0[38].txt \("):
        both(tmp_path, text=True, bad_share=0.09)
    assert [part.flip for part in parts + plain] == [False, False, True, True] and sum(map(len, plain)) == 30


def test_a_picture_is_in_one_split_however_it_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    lines = []
    for i in range(20):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"{i}.png")
        for name in (f"a/{i}.png", f"a/../a/./{i}.png"):
            lines.append(json.dumps(dict(image=name, text=f"{i} as {len(lines)}")))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    train, val = both(tmp_path / "pairs.jsonl", text=True)
    assert (len(train), len(val)) == (19, 1)
    assert val.captions == [[f"{i} as {2 * i}", f"{i} as {2 * i + 1}"] for i in [int(val.images[0].stem)]]
    (tmp_path / "more.jsonl").write_text(json.dumps(dict(image="a/./3.png", text="again")))
    with pytest.raises(ValueError, match="a/3.png is given for training and for validation"):
        both(tmp_path / "pairs.jsonl", val_data=tmp_path / "more.jsonl")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "deep" / "3.png")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "3.png").symlink_to(tmp_path / "a" / "3.png")
    names = "link/../3.png", "3.png", "a/3.png"  # the first is deep/3.png, the others are one
    (tmp_path / "links.jsonl").write_text("\n".join(json.dumps(dict(image=n, text=n)) for n in names))
    train, val = both(tmp_path / "links.jsonl", text=True)
    assert sorted(train.captions + val.captions) == [["3.png", "a/3.png"], ["link/../3.png"]]
    with pytest.raises(FileNotFoundError, match="a: no .jsonl file, as the images to train on are"):
        both(tmp_path / "pairs.jsonl", val_data=tmp_path / "a")


def test_captions_of_built_in_sets():
    words = "zero one two three four five six seven eight nine".split()
    for digits, emoji in zip(both("digits", text=True), both("emoji", text=True), strict=True):
        assert digits.captions == [[words[label]] for label in digits.labels] and not digits.flip and not emoji.flip
        assert emoji.captions == [[name] for name in emoji.names] and len({*emoji.names}) == len(emoji)


def parse(caption):
    """Left digit, right digit, left colour, right colour, ground."""
    text, ground = re.fullmatch(r"(.*?)(?: on (brown|navy|grey))?", caption).groups()
    things = re.findall(r"\b(?:a (?=[^aeiou])|an (?=[aeiou]))(\w+) (\w+)", text)
    names, digits = zip(*things[:: -1 if re.match(r"an? \w+ \w+ (to the |on the )?right", text) else 1], strict=True)
    return [*map(DIGITS.index, digits), *map([*COLOURS].index, names), [*GROUNDS].index(ground or "dark")]


@pytest.mark.parametrize("split", SPLITS)
def test_digits_text_is_what_split_captions_and_truth_say(split, monkeypatch):
    drawn, draw, many = [], builtin_sets.draw_digits, split in ("train", "val")
    monkeypatch.setattr(builtin_sets, "draw_digits", lambda *args: drawn.append(args) or draw(*args))
    (pictures, truth), (again, same) = digits_text(split, 2000), digits_text(split, 2000)
    texts = pictures["captions"]
    assert pictures["images"] == again["images"] and texts == again["captions"] and np.array_equal(truth, same)
    assert [[*map(parse, row)] for row in texts] == [[row] * (6 if many else 1) for row in truth.tolist()]
    assert {len({*row}) for row in texts} == {6 if many else 1}
    assert {" to the left of " in text for row in texts for text in row} == {split == "unseen phrasing"}
    assert {w for row in texts for text in row for w in text.split()} <= {w for text in TEXTS for w in text.split()}
    pairs = np.array(UNSEEN_RIGHT)[truth[:, 0]] == truth[:, 1]
    colours = np.array(UNSEEN_COLOUR)[truth[:, :2]] == truth[:, 2:4]
    assert colours.any(1).all() if split in ("unseen colours", "unseen both") else not colours.any()
    assert pairs.all() if split in ("unseen pairs", "unseen both") else not pairs.any()
    for kind in ([1, 0], [0, 1], [1, 1]) if colours.any() else ():  # left, right, both
        assert abs((colours == kind).all(1).mean() - 1 / 3) < 0.042  # 4 standard deviations
    assert len({*map(tuple, truth[:, :2])}) == (10 if pairs.all() else 90) and len({*truth[:, 4]}) == 4  # all there are
    assert len({*map(tuple, truth[:, [0, 2]])}) == (80 if colours.any() else 70)
    kept = load_images("digits", 32)[0 if split == "train" else 1]
    for _, grey, labels, _ in drawn:  # digits of the split alone
        assert np.array_equal(grey, np.stack([image.convert("L") for image in kept.images]))
        assert np.array_equal(labels, kept.labels)
    shares = demo.score(demo.read_pictures(np.stack(pictures["images"][:300]), demo.classifier())[0], truth[:300])
    assert shares["colours"] == shares["ground"] == 1 and shares["digits"] >= 0.97


def test_score_of_made_up_readings():
    truth = np.array([[1, 2, 3, 4, 0], [1, 2, 3, 4, 1], [5, 5, 2, 2, 2], [5, 5, 2, 3, 3]] + [[1, 2, 3, 4, 0]] * 6)
    read = [[1, 2, 3, 4, 0], [2, 1, 4, 3, 1], [5, 5, 2, 2, 0], [5, 5, 3, 2, 3], [1, 9, 9, 9, 0]] + [[9] * 5] * 5
    # right; mirrored; alike, which has no order, on another ground; colours mirrored; a digit and the ground; nothing
    expected = dict(digits=0.35, colours=0.2, ground=0.4, order=0.3, all=0.1)
    assert demo.score(np.array(read), truth) == pytest.approx(expected)
    truth = digits_text("seen", 2000)[1]
    shares = demo.score(truth[np.random.default_rng(0).permutation(2000)], truth)
    for name, chance, bound in (("digits", 1 / 10, 0.019), ("colours", 1 / 8, 0.021), ("ground", 1 / 4, 0.039)):
        assert abs(shares[name] - chance) < bound and shares["all"] < 0.003  # 4 standard deviations; all: 1 in 20,000


@pytest.mark.parametrize("kind", MODELS)
def test_tokenizers(kind):
    reader, short = (CaptionTokens(MODELS[kind], length) for length in (24, 4))
    p = reader.tokenizer
    assert (p.pad_id(), p.eos_id(), p.unk_id(), p.bos_id()) == (0, 1, 2, -1) and reader.size == len(p) <= 400
    upper, lower, nothing = (row.tolist() for row in reader.rows(["A RED Seven", "a red seven", ""]))
    assert upper == lower and nothing == [1] and lower[-1] == 1 and min(lower[:-1]) > 2
    assert p.decode(lower[:-1]) == "a red seven" and reader.unread(" A red  Seven") == ""
    assert (2 in reader.rows(["a red жук"])[0]) == (kind == "word")  # the others spell it in bytes
    (long,), (cut,) = reader.rows(PROMPTS[:1]), short.rows(PROMPTS[:1])
    assert cut.tolist() == [*long[:3], 1] and short.unread(PROMPTS[0]) == p.decode(long[3:-1].tolist())
    if kind == "word":
        assert reader.unread("A red ZEBRA left of a  blue gnu") == "zebra gnu"
        assert short.unread("a zebra left of a six") == "zebra of a six"


@pytest.mark.parametrize("kind, texts, size", [("unigram", [], 400), ("bpe", [" "], 400), ("word", [""], 400),
                                               ("unigram", TEXTS, 50), ("bpe", TEXTS, 258), ("word", TEXTS, 1)])
def test_impossible_tokenizers_are_refused_in_one_sentence(kind, texts, size):
    with pytest.raises(ValueError, match=r"\Ano tokenizer could be made of these captions: .+\Z"):  # . is no newline
        train_tokenizer(texts, size, kind)


def test_models_that_are_none_or_have_other_ids_are_refused(monkeypatch):
    models = {"": b"no", "not a": MODELS["word"][:999], "padding and end": b""}
    for ids in ((1, 0), (0, 3), (-1, 1)):
        monkeypatch.setattr(captions, "PAD", ids[0])
        monkeypatch.setattr(captions, "END", ids[1])
        models[re.escape(f"padding and end have to be tokens 0 and 1, not {ids}")] = train_tokenizer(TEXTS, 30, "word")
        monkeypatch.undo()
    for message, model in models.items():
        with pytest.raises(ValueError, match=f"^x.model: {message}"):
            CaptionTokens(model, 9, "x.model")


class Rows:
    """A reader whose rows follow from the text alone."""

    about = CaptionTokens.about

    def __init__(self, kind, size, length=7):
        self.kind, self.size, self.length, self.model = kind, size, length, b"its model"

    def rows(self, texts):
        draws = [np.random.default_rng([*text.encode()]) for text in texts]
        if self.kind == "t5":
            return [draw.integers(1 << 16, size=(draw.integers(1, 8), self.size)).astype(np.uint16) for draw in draws]
        return [np.append(self.size - 1, draw.integers(1, self.size, draw.integers(7))) for draw in draws]


def write(folder, reader, parts=([["a"], ["b", "c", "d"], ["e", "f"]], [["g"]])):
    with CaptionWriter(folder, reader) as writer:
        for part in parts:
            writer.write(part)


@pytest.mark.parametrize("full", [False] + [True] * Path("/dev/full").exists())
def test_captions_that_failed_leave_nothing(full, tmp_path):
    """Also where a full disk makes closing fail. New ones take the description of the codes before away."""
    (tmp_path / "meta.json").write_text("{}")
    message = "No space" if full else "first"
    with pytest.raises(OSError, match=message), CaptionWriter(tmp_path, Rows("t5", 5)) as writer:
        if full:
            writer.values.close()
            writer.values = open("/dev/full", "wb")
        writer.write([["a"]])
        raise OSError("first")
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]
    write(tmp_path, Rows("t5", 5))
    assert not (tmp_path / "meta.json").exists()


def bits(cond):
    return cond.numpy() if cond.dtype == torch.int64 else cond.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind, size, dtype", [("tokens", 1 << 16, "u2"), ("tokens", 70_000, "i4"), ("t5", 5, "u2")])
def test_captions_round_trip(kind, size, dtype, tmp_path):
    reader = Rows(kind, size)
    write(tmp_path, reader)
    file = CaptionFile(tmp_path, reader.about(), 4)
    assert isinstance(file.values, np.memmap) and file.values.dtype == dtype and file.texts([2, 0]) == ["e", "a"]
    for draws, said in ((None, "ebag"), ([0, 0, 0, 0], "ebag"), ([1, 1, 1, 1], "fcag"), ([2, 4, 2, 9], "ecag")):
        cond, *mask = file.condition(np.array([2, 1, 0, 3]), draws and np.array(draws))
        assert (cond.dtype, len(mask)) == ((torch.int64, 0) if kind == "tokens" else (torch.bfloat16, 1))
        for i, row in enumerate(reader.rows(said)):
            empty = 7 - len(row)
            assert np.array_equal(bits(cond)[i, empty:], row) and not bits(cond)[i, :empty].any()
            assert kind == "tokens" or mask[0][i].tolist() == [False] * empty + [True] * len(row)


DAMAGE = [
    ("text.bin", None, "missing or truncated"), ("text.bin", lambda x: x[:-2], "missing or truncated"),
    ("text.bin", lambda x: b"\x2c\x01" + x[2:], "holds token 300, the vocabulary ends at 299"),
    ("text_offsets.npz", None, "missing, truncated"), ("text_offsets.npz", lambda x: b"", "missing, truncated"),
    ("text_offsets.npz", dict(n=5), "captions of 5 pictures"), ("text_offsets.npz", dict(length=3), "3 is the longest"),
    ("text_offsets.npz", lambda x: x[:-9], "missing, truncated"), ("tokenizer.model", None, "is missing, or not"),
    ("tokenizer.model", lambda x: x[1:], "is missing, or not the one"),
    ("captions.jsonl", None, "missing or truncated"), ("captions.jsonl", lambda x: x[:9], "missing or truncated"),
]


@pytest.mark.parametrize("name, change, message", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_files_and_those_of_other_captions_are_named(name, change, message, tmp_path):
    about, path = dict(Rows("tokens", 300).about(), n=4), tmp_path / name
    write(tmp_path, Rows("tokens", 300))
    if isinstance(change, dict):
        about |= change
    elif change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        CaptionFile(tmp_path, about, about["n"]).texts([3])


SPOILT = [
    ("t5", "text.bin", lambda x: x[:-2] + b"\x80\x7f", r"text.bin is damaged: .* token \d+ are not finite"),
    ("t5", "captions.jsonl", lambda x: b'{"a"]' + x[5:], "jsonl is damaged: line 1 is no list of 1 captions"),
    ("tokens", "captions.jsonl", lambda x: x.replace(b'"c", ', b""), "line 2 is no list of 3 captions"),
    ("tokens", "captions.jsonl", lambda x: x.replace(b'["g"]', b'"g"'), "line 4 is no list of 1 captions"),
    ("tokens", "captions.jsonl", lambda x: x.replace(b"g", b"\xff"), "line 4 is no list of 1 captions"),
]


@pytest.mark.parametrize("kind, name, change, message", SPOILT, ids=range(len(SPOILT)))
def test_a_check_reads_features_and_texts(kind, name, change, message, tmp_path):
    reader = Rows(kind, 300)
    reader.rows = lambda texts, rows=reader.rows: [row & 0x3FFF for row in rows(texts)]  # small, so finite
    write(tmp_path, reader)
    CaptionFile(tmp_path, reader.about(), 4).check()
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        CaptionFile(tmp_path, reader.about(), 4).check()


def test_ids_below_zero_are_none(tmp_path):
    write(tmp_path, Rows("tokens", 70_000))
    (tmp_path / "text.bin").write_bytes(b"\xff" * 4 + (tmp_path / "text.bin").read_bytes()[4:])
    with pytest.raises(ValueError, match="text.bin holds token 4294967295, the vocabulary ends at 69999"):
        CaptionFile(tmp_path, Rows("tokens", 70_000).about(), 4)


def test_old_files_outlive_an_error(tmp_path):
    write(tmp_path, Rows("tokens", 300))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["captions.jsonl", "text.bin", "text_offsets.npz", "tokenizer.model"]
    with pytest.raises(AttributeError):
        write(tmp_path, Rows("tokens", 200), ([["x"]], [[7]]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_memory_stays_far_below_the_size_of_the_file(tmp_path):
    """100,000 captions of 12 x 64 features, 154 MB: offsets and a batch are held, a tenth of it at most."""
    reader, rng = Rows("t5", 64, 12), np.random.default_rng(0)
    pool = rng.integers(1 << 16, size=(1000, 12, 64)).astype(np.uint16)
    reader.rows = lambda texts: list(pool[[int(text) % 1000 for text in texts]])
    tracemalloc.start()
    write(tmp_path, reader, ([[f"{i}"] for i in range(first, first + 500)] for first in range(0, 100_000, 500)))
    file = CaptionFile(tmp_path, reader.about(), 100_000)
    for index in rng.integers(100_000, size=(100, 64)):
        assert np.array_equal(bits(file.condition(index)[0]), pool[index % 1000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "text.bin").stat().st_size == 153_600_000 > 10 * peak and isinstance(file.values, np.memmap)


def run(patch, script, *words):
    patch.setitem(train_gpt.PRESETS, "tiny", LLAMA)
    patch.setattr(sys, "argv", [f"{script.__name__}.py", "--device", "cpu", *map(str, words)])
    script.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, FLAN-T5's files, 40 captioned pictures of which one is damaged, and both kinds of codes and GPT."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    vq = VQModel(VQConfig(**VQ))
    save_file(folder / "vq.pt", vq.checkpoint())
    for name, width in (("t5", 48), ("wide", 64)):
        sizes = dict(d_model=width, d_ff=80, num_layers=2, num_heads=2, d_kv=16, vocab_size=160)
        (folder / name).mkdir()
        (folder / name / "spiece.model").write_bytes(MODELS["word"])
        config = dict(sizes, model_type="t5", feed_forward_proj="gated-gelu")
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(folder / name / "pytorch_model.bin", T5Encoder(T5Config(**sizes)).state_dict())
    lines = [dict(image=f"{i}.png", text=TEXTS[i] if i % 3 else TEXTS[i : i + 2]) for i in range(40)]
    path = jsonl(folder, [json.dumps(line).encode() for line in lines])
    for i in range(40):
        Image.effect_noise((16, 16), 10 * i).convert("RGB").save(folder / f"{i}.png")
    (folder / "7.png").write_text("no picture")
    more = {"tokens": (("--text-pieces", "word"), ("--code-features", "--caption-loss-weight", 0.1)),
            "t5": (("--t5", folder / "t5"), ())}
    with pytest.MonkeyPatch.context() as patch:
        for kind, (of_codes, of_gpt) in more.items():
            run(patch, encode, "--vq", folder / "vq.pt", "--data", path, "--size", 8, 12, "--crops", "center", "--text",
                kind, "--text-length", 9, "--bad-share", 0.05, "--out", folder / kind, *of_codes)
            run(patch, train_gpt, "--codes", folder / kind, "--preset", "tiny", "--max-steps", 3, "--batch-size", 8,
                "--lr", 1e-2, "--out", folder / f"gpt_{kind}", *of_gpt)
    return folder


def open_all(made, kind):
    """Tokenizer, GPT, what its file says of the codes, and what reads its prompts."""
    vq, gpt, codes = sample.load_models(made / "vq.pt", made / f"gpt_{kind}" / "gpt.pt", None, torch.device("cpu"))
    return vq, gpt, codes, open_reader(gpt.config.cond, codes["text"], None, "cpu", "gpt.pt")


@pytest.mark.parametrize("kind", ["tokens", "t5"])
def test_codes_and_captions_are_of_the_same_pictures(kind, made):
    vq, *_, reader = open_all(made, kind)
    files = [CodeFile(made / kind / split) for split in ("train", "val")]
    for pictures, file in zip(both(made / "pairs.jsonl", text=True, bad_share=0.05), files, strict=True):
        ((images, _, kept),) = eval_batches(pictures, (8, 12), 40)
        said = [pictures.captions[i] for i in kept]
        assert file.names(range(len(file))) == [texts[0] for texts in said]
        assert np.array_equal(file.codes[:, 0], vq.encode(images).flatten(1).numpy())
        asked = condition(reader.rows([texts[1 % len(texts)] for texts in said]), 9, kind)
        found = file.condition(np.arange(len(kept)), np.ones(len(kept), int))
        assert len(asked) == len(found) and all(map(torch.equal, asked, found))
        about = file.meta["text"]
        file.check(text=dict(about, t5="elsewhere") if kind == "t5" else about)  # a path is no identity
        with pytest.raises(ValueError, match="has the text {'length': 9}, {'length': 8} is expected"):
            file.check(text=dict(about, length=8))
    assert sum(map(len, files)) == 39


@pytest.mark.parametrize("kind", ["tokens", "t5"])
def test_writers_take_over_files(kind, made, tmp_path):
    """Written in two pieces, one taken over, the files are those of one piece."""
    reader = CaptionTokens(MODELS["bpe"], 9) if kind == "tokens" else open_all(made, kind)[-1]
    pictures = [TEXTS[i : i + 1 + i % 3] for i in range(12)]
    for name, some in (("a", pictures[:5]), ("b", pictures[5:])):
        with CaptionWriter(tmp_path / name, reader) as writer:
            writer.write(some)
    with CaptionWriter(tmp_path / "joined", reader) as joined, CaptionWriter(tmp_path / "one", reader) as one:
        joined.take(CaptionFile(tmp_path / "a", reader.about(), 5))
        joined.take(CaptionFile(tmp_path / "b", reader.about(), 7))
        one.write(pictures[:5])
        one.write(pictures[5:])
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("joined", "one")]
    assert found[0] == found[1] and len(found[0]) == (4 if kind == "tokens" else 3)


def test_features_are_those_of_the_encoder(made, tmp_path):
    reader, texts = CaptionFeatures(T5Encoder.from_pretrained(made / "t5"), 9, made), [*PROMPTS, "A <b>red</b> six", ""]
    write(tmp_path, reader, [[[text] for text in texts]])
    cond, mask = CaptionFile(tmp_path, reader.about(), 4).condition(np.arange(4))
    features, same = reader.encoder.encode([clean_caption(text) for text in texts], 9, left_pad=True)
    assert cond.dtype == features.dtype == torch.bfloat16 and torch.equal(cond, features) and torch.equal(mask, same)
    assert reader.unread("a red three left of a blue six on dark navy") == "on dark navy" and reader.unread("Six") == ""
    with pytest.raises(ValueError, match="--text t5 needs the encoder's folder: give it with --t5"):
        none = dict.fromkeys("t5 text_model text_vocab text_pieces text_length n_random crop_scales".split())
        encode.check_options(SimpleNamespace(text="t5", crops="ten", **none))


def sample_by_command(monkeypatch, made, kind, *more):
    """The first two pictures of the grid."""
    run(monkeypatch, sample, "--vq", made / "vq.pt", "--gpt", made / f"gpt_{kind}" / "gpt.pt", "--out",
        made / "grid.png", "--cfg-scale", 9, *more)
    grid = Image.open(made / "grid.png")
    return [np.asarray(grid.crop((x, 4, x + 96, 68)).resize((12, 8), Image.NEAREST)) for x in (4, 104)]


@pytest.mark.parametrize("kind", ["tokens", "t5"])
def test_prompts_are_sampled(kind, made, monkeypatch):
    content = torch.load(made / f"gpt_{kind}" / "gpt.pt", weights_only=True)
    for p in content["model"].values():  # three steps have not taught it to mind what it reads
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * p.shape[-1] ** -0.5)
    save_file(made / f"gpt_{kind}" / "gpt.pt", content)
    vq, gpt, codes, reader = open_all(made, kind)
    if kind == "tokens":
        path = made / "tokens" / "val" / "tokenizer.model"
        assert path.read_bytes() == content["text_model"].numpy().tobytes() == reader.model
        run(monkeypatch, encode, "--vq", made / "vq.pt", "--data", made / "pairs.jsonl", "--size", 8, "--text",
            "tokens", "--text-model", path, "--bad-share", 0.05, "--out", made / "again")
        assert CodeFile(made / "again" / "train").captions.model == path.read_bytes()
    else:
        assert codes["text"]["t5"] == f"{made / 't5'}" and "text_model" not in content
    conds = [read_captions(gpt, reader, prompts) for prompts in (PROMPTS, PROMPTS[::-1])]
    first, other = (sample_images(vq, gpt, *cond, cfg_scale=9)[0] for cond in conds)
    assert not np.array_equal(first, other) and gpt.code_features is None  # folded
    for n in (0, 1):
        (made / f"{n}.txt").write_text("\n".join(PROMPTS[n:]), encoding="utf-8-sig")
    twice, t5 = ["--text", PROMPTS[0], "--text", PROMPTS[1]], ["--t5", made / "t5"] if kind == "t5" else []
    for more in (twice, ["--text-file", made / "0.txt"], [*t5, *twice[:2], "--text-file", made / "1.txt"]):
        assert np.array_equal(sample_by_command(monkeypatch, made, kind, *more), first)


REFUSED = [
    ("class", ["--text", "cat"], "conditioned on classes: leave --text"),
    ("tokens", [], "conditioned on texts: give them with --text"),
    ("tokens", ["--classes", "0", "--text", "cat"], "conditioned on texts: .* and no --classes"),
    ("t5", [], "conditioned on texts"),
    ("tokens", ["--text", "cat", "--t5", "t5"], "reads captions by a tokenizer of its own: leave --t5 out"),
    ("t2i", ["--text", "cat", "--grid", "2x3"], "reads features of FLAN-T5-XL: give its folder with --t5"),
    ("t5", ["--text", "cat", "--t5", "wide"], "reads 48 channels a token, wide gives 64"),
    ("tokens", ["--text-file", "vq.pt"], "vq.pt is not text in UTF-8"), ("t5", ["--text-file", "none"], ".*No such"),
]


@pytest.mark.parametrize("kind, options, message", REFUSED, ids=range(len(REFUSED)))
def test_requests_that_do_not_fit_the_model_are_refused(kind, options, message, made, monkeypatch, capsys):
    for name, how in (("class", {}), ("t2i", dict(cond="text", n_cond=120, text_dim=48))):
        (made / f"gpt_{name}").mkdir(exist_ok=True)
        model = small_gpt(**OURS | LLAMA | how)
        save_file(made / f"gpt_{name}" / "gpt.pt", dict(model=model.state_dict()) if how else model.checkpoint())
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: sample_by_command(monkeypatch, made, kind, *options))
    (error,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.match(f"sample.py: error: .*{message}", error)
    if kind == "t2i":  # the published format, with its encoder
        assert len(sample_by_command(monkeypatch, made, kind, *options, "--text", "dog", "--t5", "t5")) == 2


@pytest.mark.parametrize("kind", ["tokens", "t5"])
def test_an_empty_prompt_is_the_unconditional_branch(kind, made):
    *_, reader = open_all(made, kind)
    how = dict(cond="text", text_dim=48) if kind == "t5" else dict(cond="tokens", text_vocab_size=reader.size)
    model = small_gpt(**OURS, **how, n_cond=9)
    cond, *mask = read_captions(model, reader, ["", PROMPTS[0], "  "])
    logits, null = (model(CODES[:, :5], c, *mask)[0] for c in (cond, model.cls_embedding.null(cond)))
    plain, guided = (generate(model, cond, *mask, cfg_scale=scale, seed=3) for scale in (1.0, 3.0))
    for a, b in ((logits, null), (plain, guided)):
        assert [torch.equal(*rows) for rows in zip(a, b, strict=True)] == [True, False, True]


IDS, CODES = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 7, 3, 1], [4, 5, 6, 7, 1]]), torch.arange(18).view(3, 6) * 7 % 32
TOKENS = dict(OURS, cond="tokens", n_cond=5, text_vocab_size=20)
LABELS = SimpleNamespace(meta=dict(text=None), class_names=["a", "b", "c"], codebook_size=32, grid=(2, 3))


def go_on(made, codes, model, **options):
    """What train_gpt.py makes of a model's file for these codes, and the names of weights that are not the file's."""
    save_file(made / "init.pt", model.checkpoint())
    how = dict(dropout=0.0, cond_dropout=0.0, preset=None, cond_rope=None, n_kv_head=None, caption_loss_weight=0.0)
    args = SimpleNamespace(**how | dict(init=made / "init.pt", codes="codes", code_features=False) | options)
    new = train_gpt.build_model(args, codes, VQModel.from_pretrained(made / "vq.pt"))
    old, state = model.state_dict(), new.state_dict()
    return new, {name for name in state if name not in old or not torch.equal(old[name], state[name])}


@pytest.mark.parametrize("to, start, fresh, rope", [
    ("tokens", dict(OURS, cond_rope="zero"), {"tok_embeddings.weight", "pos_embeddings.weight"}, "identity"),
    ("t5", dict(OURS, grid=(4, 4), cond="text", n_cond=9, text_dim=48, cond_rope="zero"), set(), "zero"),
    ("class", dict(TOKENS, cond_rope="zero"), {"embedding_table.weight"}, "identity"),
    ("class", dict(TOKENS, caption_loss_weight=0.5), {"embedding_table.weight"}, "identity"),
], ids=["class to tokens", "another grid", "tokens to class", "tokens with caption loss to class"])
def test_init_goes_on_with_another_condition_or_grid(to, start, fresh, rope, made):
    codes = LABELS if to == "class" else CodeFile(made / to / "train")
    model, new = go_on(made, codes, small_gpt(**start))
    assert new == {f"cls_embedding.{name}" for name in fresh} and model.config.cond_rope == rope
    assert torch.equal(model.cos, rope_table(model.config, (2, 3))[0]) and len(model.cos) == model.config.n_cond + 6
    assert all(abs(p.std() - 0.02) < 0.003 for p in model.cls_embedding.parameters() if fresh and p.shape[0] > 9)
    if not fresh:
        with pytest.raises(ValueError, match="--cond-rope is for conditions that are re-initialised"):
            go_on(made, codes, small_gpt(**start), cond_rope="identity")


def test_init_does_not_take_the_words_of_another_tokenizer(made):
    """Two vocabularies of one size: the embedding goes on where the file names the same tokenizer only."""
    codes = CodeFile(made / "tokens" / "train")
    model = small_gpt(**dict(OURS, cond="tokens", n_cond=codes.captions.length, text_vocab_size=codes.captions.size))
    for sha, fresh in ((codes.meta["text"]["model_sha256"], False), ("ab" * 32, True)):
        text = dict(codes.meta["text"], model_sha256=sha)
        _, new = go_on(made, codes, SimpleNamespace(
            checkpoint=lambda text=text: dict(model.checkpoint(), codes=dict(text=text)), state_dict=model.state_dict))
        assert new == {f"cls_embedding.{name}_embeddings.weight" for name in ("tok", "pos") if fresh}


def test_half_an_emoji_is_no_character():
    reader, whole = (CaptionTokens(MODELS["word"], 24) for _ in range(2))
    assert reader.rows(["a red \ud83d six"])[0].tolist() == whole.rows(["a red  six"])[0].tolist()
    assert reader.unread("a red \ud83d six") == whole.unread("a red  six")
    assert data.clean_texts("cat \ud83d") == ["cat"]


def test_what_is_cut_off_is_named_in_letters():
    assert CaptionTokens(MODELS["unigram"], 3).unread("a red жук").endswith("жук")


def test_code_vectors_of_another_tokenizer_take_the_place_of_the_first():
    model = small_gpt(**OURS)
    model.see_codes(torch.ones(32, 4))
    model.see_codes(torch.ones(32, 9))
    assert model.config.code_dim == 9 and torch.equal(model.code_features.vectors, torch.full((32, 9), 3.0))


def test_code_vectors_change_nothing_at_first_and_fold_into_the_tables(made):
    plain, codes, labels = small_gpt(**OURS), CODES[:, :5], torch.tensor([0, 2, 3])
    model, _ = go_on(made, LABELS, plain, code_features=True)
    torch.testing.assert_close(model(codes, labels)[0], plain(codes, labels)[0], atol=1e-6, rtol=1e-6)
    book = VQModel.from_pretrained(made / "vq.pt").quantize.codebook()
    assert torch.equal(model.code_features.vectors, 2 * book)  # 4 channels
    for p in model.code_features.parameters():
        torch.nn.init.normal_(p, std=0.5)
    logits, drawn = model(codes, labels)[0], generate(model, labels, greedy=True)
    assert (logits - plain(codes, labels)[0]).abs().max() > 0.1
    torch.testing.assert_close(model.fold_code_features()(codes, labels)[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(model, labels, greedy=True), drawn) and model.config == plain.config
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_caption_loss_is_of_the_caption_and_of_training():
    model = small_gpt(**TOKENS, caption_loss_weight=0.3)
    prefix, padding, _ = model.embed_condition(IDS, None)
    x, table = model.transform(prefix, padding), model.cls_embedding.tok_embeddings.weight.double()
    terms = [-(table @ x[b, i].double()).log_softmax(0)[IDS[b, i + 1]] for b in range(3) for i in range(4) if IDS[b, i]]
    direct = torch.stack(terms).mean()
    torch.testing.assert_close(model.caption_loss(x, IDS).double(), direct, atol=1e-6, rtol=1e-6)
    assert len(terms) == 6 and model.caption_loss(x[:1], IDS[:1]) == 0  # no caption
    logits, loss = model(CODES[:, :5], IDS)[0], model(CODES[:, :5], IDS, targets=CODES)[1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), CODES.flatten()))
    trained = model.train()(CODES[:, :5], IDS, targets=CODES)[1]
    torch.testing.assert_close((trained - loss).double(), 0.3 * direct, atol=1e-6, rtol=1e-6)


def test_more_padding_changes_nothing_and_needs_no_mask():
    model, longer = small_gpt(**TOKENS), small_gpt(**dict(TOKENS, n_cond=8))
    weights = dict(model.state_dict())
    weights["cls_embedding.pos_embeddings.weight"] = torch.randn(8, 32)
    weights["cls_embedding.pos_embeddings.weight"][:5] = model.cls_embedding.pos_embeddings.weight
    longer.load_state_dict(weights)
    padded = longer(CODES[:, :5], torch.nn.functional.pad(IDS, (3, 0)))[0]
    torch.testing.assert_close(padded, model(CODES[:, :5], IDS)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="caption tokens need no cond_mask"):
        model(CODES[:, :5], IDS, IDS != 0)


@pytest.mark.parametrize("scale, guided", [(1.0, 0), (3.0, 6), (3.0, 2)])
def test_caption_tokens_from_the_cache_equal_teacher_forcing(scale, guided):
    model = small_gpt(**TOKENS)
    codes = generate(model, IDS, cfg_scale=scale, cfg_stop=guided, greedy=True)
    assert torch.equal(codes, direct_greedy(model, IDS, None, scale, guided)) and len(codes.unique()) > 3
