import argparse
import ast
import importlib
import logging
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import VQ
from tqdm import tqdm

import command_line
import common
import demo
import encode
import evaluate
import gpt
import sample
import train_gpt
import train_vq
import training
from codes import CodeWriter
from common import file_sha256, save_file
from gpt import GPT, GPTConfig
from vq import VQConfig, VQModel

ROOT = Path(__file__).parent.parent
SCRIPTS = {module.__name__: module for module in (train_vq, train_gpt, encode, sample, evaluate, demo)}


LLAMA = dict(n_layer=1, n_head=2, dim=16, ffn_dim=24, vocab_size=32, num_classes=3, grid=(2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the table of docs/errors.md speaks of."""
    folder = tmp_path_factory.mktemp("files")
    save_file(folder / "vq.pt", VQModel(VQConfig(**VQ)).checkpoint())
    meta = dict(tokenizer="vq.pt", tokenizer_sha256=file_sha256(folder / "vq.pt"), image_size=[8, 12], notice="",
                augmentations=["centre"], class_names=["tabby", "tiger", "husky"], data="x")
    for split in ("train", "val"):
        with CodeWriter(folder / "codes" / split, (2, 3), 32, dict(meta, split=split)) as writer:
            writer.write(torch.zeros(3, 1, 6, dtype=torch.long), torch.arange(3))
    save_file(folder / "gpt.pt", dict(GPT(GPTConfig(**LLAMA)).checkpoint(), codes=meta))
    save_file(folder / "gpt24.pt", GPT(GPTConfig(**LLAMA | dict(vocab_size=24))).checkpoint())
    (folder / "cut.pt").write_bytes((folder / "gpt.pt").read_bytes()[:9000])
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "a.jsonl").write_text('{"image": "b.jpg", "text": "a cat"}')
    (folder / "list.json").write_text("[]")
    for name in ("empty", "folder.png"):
        (folder / name).mkdir()
    for i in range(4):
        (folder / "broken").mkdir(exist_ok=True)
        (folder / "broken" / f"{i}.png").write_text("no picture")
    return folder


def sentence(command, monkeypatch, capsys):
    """What a command that cannot run prints, the name of its script left out."""
    words = command.split()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        command_line.cli(SCRIPTS[Path(words[0]).stem].main)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Traceback" in line or ": error: " in line]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0].split(f"{words[0]}: error: ")[1]


README = (ROOT / "README.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
TABLE = re.findall(r"^\| `(\w+\.py [^`]+)` \| (.+) \|$", ERRORS, re.MULTILINE)


@pytest.mark.parametrize("command, says", TABLE, ids=[command for command, _ in TABLE])
def test_the_table_of_error_messages(command, says, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    gpus = "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
    assert sentence(command, monkeypatch, capsys) == says.replace("this machine has cpu", f"this machine has cpu{gpus}")
    assert not (folder / "out" / "train").exists()


MODELS = "--vq vq.pt --gpt gpt.pt"
MORE = {
    "evaluate.py --vq vq.pt recon": "no option --vq: the command comes first",
    "evaluate.py recon --vqq vq.pt": "no option --vqq: did you mean --vq[?]",
    "evaluate.py": "the following arguments are required: {recon,gen",
    "demo.py digits --seeed 3": "no option --seeed: did you mean --seed[?]",
    "train_vq.py --bat 3 --data digits": "no option --bat",
    "train_vq.py --data empty --perceptual-weight 0 --out out": "empty holds no images",
    "train_vq.py --data notes.txt --perceptual-weight 0 --out out": "notes.txt is not a folder: data is",
    "train_vq.py --data a.jsonl --perceptual-weight 0 --out out": "a.jsonl: everything is unusable .1 of 1.",
    "train_vq.py --data digits --perceptual-weight 0 --init cut.pt --out out": "cut.pt: not a readable .* .cut short.",
    "train_vq.py --data digits --perceptual-weight 0 --usage-window 0 --out out": "--usage-window has to be above 0",
    "train_gpt.py --codes codes --preset tiny --vq gpt.pt --out out": "gpt.pt: not an image tokenizer but a GPT",
    "train_gpt.py --codes codes --preset tiny --out notes.txt": "notes.txt cannot be a folder to write to",
    "train_gpt.py --codes codes --preset tiny --out /proc/out": "/proc/out cannot be a folder to write to",
    "train_gpt.py --codes codes --preset tiny --seed -1 --out out": "--seed cannot be below 0, and is -1",
    "train_gpt.py --codes codes --preset tiny --dropout 2 --out out": "--dropout cannot be above 1, and is 2.0",
    "train_gpt.py --codes codes --init gpt24.pt --out out": "--init gpt24.pt knows 24 codes, codes has 32",
    "encode.py --vq notes.txt --data digits --out out": "notes.txt: not a readable checkpoint .torch.save wrote no",
    "encode.py --vq list.json --data digits --out out": "list.json: not a readable checkpoint",
    "encode.py --vq empty --data digits --out out": "empty is a folder, not a checkpoint",
    "encode.py --vq vq.pt --data digits --size 32 --out notes.txt": "notes.txt cannot be a folder",
    "encode.py --vq vq.pt --data broken --size 32 --out broken": "broken, train: 1 of 3 .33.3%. have no usable",
    f"sample.py {MODELS} --n 1.5": "--n: invalid int value: '1.5'",
    f"sample.py {MODELS} --n 100000000000000000": "out of memory: Unable to allocate",
    f"sample.py {MODELS} --seed 1e9": "--seed: invalid int value",
    f"sample.py {MODELS} --cfg-scale inf": "--cfg-scale cannot be inf",
    f"sample.py {MODELS} --device meta": "--device meta is not there",
    f"sample.py {MODELS} --out empty": "--out empty is no name of a picture",
    f"sample.py {MODELS} --out a.wmf": "--out a.wmf is no name of a picture",
    f"sample.py {MODELS} --out folder.png": "--out folder.png is no name of a picture",
    f"sample.py {MODELS} --classes=": "--classes: '' is neither a class name nor a number below",
    f"sample.py {MODELS} --text-file empty/a": "empty/a: No such file or directory",
    "evaluate.py recon --vq gpt.pt --data digits --out out": "gpt.pt: not an image tokenizer but a GPT",
    "evaluate.py codes --codes empty --out out": "empty/meta.json is not there: encode the images first",
    "evaluate.py codes --codes codes --out out": "codes/meta.json is not there: give codes/train or codes/val",
    "train_gpt.py --codes codes/val --out out": "codes/val/train/meta.json is not there: give codes",
    "evaluate.py likelihood --gpt vq.pt --codes codes/val": "vq.pt: not a GPT but an image tokenizer",
    "evaluate.py likelihood --gpt gpt.pt --codes codes/val --out empty": "empty is a folder, not the name of a JSON",
    "evaluate.py gen --samples a.npz --ref empty --inception vq.pt": "vq.pt: the weights do not fit: missing",
    "demo.py digits --vq vq.pt --gpt gpt.pt --codes empty --out out": "empty/train/meta.json is not there",
    "demo.py text --vq vq.pt --gpt gpt.pt --codes codes --out out --cfg-scale 9": "--cfg-scale cannot be 9.0: it is",
}


@pytest.mark.parametrize("command", MORE)
def test_more_wrong_commands(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert re.match(MORE[command], sentence(command, monkeypatch, capsys))


def test_errors_of_the_program_itself_keep_their_traceback(monkeypatch):
    def broken():
        raise RuntimeError("the shapes do not fit")

    with pytest.raises(RuntimeError, match="the shapes"):
        command_line.cli(broken)


def test_an_interruption_is_one_line():
    """And the process dies of the signal, or a shell's loop would go on."""
    code = "import os, signal, command_line\ncommand_line.cli(lambda: os.kill(os.getpid(), signal.SIGINT))"
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in a background job it is not
    done = subprocess.run([sys.executable, "-c", heard + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == "-c: interrupted\n"


LOUD = """
import logging, os, sys, tqdm, command_line

def main():
    for i in tqdm.tqdm(range(3), mininterval=0):
        print(i, "\\u00fc", flush=i == 1)
        logging.warning("a warning")
    open(f"{sys.argv[1]}{bad}", "w").write("done")
    if bad:
        raise ValueError("bad input")

for bad in (False, True):
    if not (child := os.fork()):
        command_line.cli(main)
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2 * bad
"""


@pytest.mark.parametrize("redirected", ["> /dev/full 2>&1", ">&- 2>&-", "2>&1 | true", "2> /dev/null > /dev/null"])
def test_what_nobody_hears_ends_no_run(redirected, tmp_path):
    """A full disk, closed streams, a pipe whose reader has gone, an encoding without the letter."""
    (tmp_path / "loud.py").write_text(LOUD)
    command = f"{sys.executable} {tmp_path / 'loud.py'} {tmp_path / 'end'} {redirected}; exit ${{PIPESTATUS[0]}}"
    env = os.environ | dict(PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    assert subprocess.run(["bash", "-c", command], env=env, timeout=60).returncode == 0
    assert (tmp_path / "endFalse").read_text() == (tmp_path / "endTrue").read_text() == "done"


def test_docstrings_may_be_gone():
    done = subprocess.run([sys.executable, "-OO", "evaluate.py", "gen", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"--samples" in done.stdout


AMONG_OTHERS = """
import tempfile, threading, time, torch, command_line

def main():
    threading.Thread(target=time.sleep, args=(60,)).start()
    main.folder = tempfile.TemporaryDirectory()
    print(main.folder.name)
    raise ValueError("bad input")

torch.distributed.is_initialized = lambda: True
command_line.cli(main)
"""


def test_an_error_of_one_of_several_processes_waits_for_no_thread():
    """And leaves no temporary folder, nor what was printed in a buffer."""
    done = subprocess.run([sys.executable, "-c", AMONG_OTHERS], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and done.stderr == "-c: error: bad input\n"
    assert done.stdout.startswith("/") and not Path(done.stdout.strip()).exists()


# The published files

def test_missing_published_files_have_an_address(tmp_path):
    for name, size, repo in (("vq_ds16_c2i.pt", "0.29", "FoundationVision/LlamaGen"), ("c2i_3B_384.pt", "12", None),
                             ("t2i_XL_stage2_512.pt", "3.1", "peizesun/llamagen_t2i")):
        address = f"https://huggingface.co/{repo or 'FoundationVision/LlamaGen'}/resolve/main/{name}"
        with pytest.raises(FileNotFoundError, match=re.escape(f"about {size} GB, is at {address} (--hub fetches it)")):
            VQModel.from_pretrained(tmp_path / name)


def test_sizes_of_published_files_are_those_of_the_presets():
    def millions(**config):
        with torch.device("meta"):
            model = GPT(GPTConfig(**config))
        return len(torch.nn.utils.parameters_to_vector(model.parameters())) / 1e6

    files = {name: size for files in common.PUBLISHED.values() for name, size in files.items()}
    for name in ("B", "L", "XL", "XXL", "3B"):
        assert millions(**gpt.PRESETS[name]) == pytest.approx(files[f"c2i_{name}_384.pt"], abs=0.5)
    text = millions(**gpt.PRESETS["XL"], cond="text", n_cond=120)
    assert text == pytest.approx(files["t2i_XL_stage1_256.pt"], abs=0.5)


def test_hub(folder, tmp_path, monkeypatch, capsys):
    """Only what is not there is fetched, by name; what fails says so."""
    asked = []

    def hf_hub_download(repo, name):
        asked.append((repo, name))
        if repo != "FoundationVision/LlamaGen":
            raise ConnectionError("no network\nmore lines")
        return str(folder / "vq.pt" if name.startswith("vq") else folder / "gpt.pt")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    monkeypatch.chdir(folder)
    command = f"sample.py --hub --vq models/vq_ds16_c2i.pt --gpt c2i_B_256.pt --n 1 --out {tmp_path}/a.png"
    monkeypatch.setattr(sys, "argv", command.split())
    sample.main()
    assert asked == [("FoundationVision/LlamaGen", "vq_ds16_c2i.pt"), ("FoundationVision/LlamaGen", "c2i_B_256.pt")]
    assert (tmp_path / "a.png").exists()
    for words, says in (
        ("encode.py --vq vq_ds16_t2i.pt --data digits", "vq_ds16_t2i.pt could not be fetched from peizesun/"),
        ("encode.py --vq vq_ds16_c2.pt --data digits", "vq_ds16_c2.pt: no such file, and none that --hub"),
        ("train_gpt.py --codes codes --init vq.pt", "vq.pt: not a GPT but an image tokenizer"),
    ):
        assert sentence(f"{words} --hub --out out", monkeypatch, capsys).startswith(says)
    assert len(asked) == 3
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    command = "evaluate.py likelihood --gpt c2i_B_256.pt --codes codes/val"
    assert "pip install huggingface_hub" in sentence(f"{command} --hub", monkeypatch, capsys)
    assert "c2i_B_256.pt is not there: LlamaGen's file" in sentence(command, monkeypatch, capsys)


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    """On small models in files of those names."""
    lines = README.split("From Python:\n\n")[1].split("\n\n##")[0].splitlines()
    save_file(tmp_path / "vq_ds16_c2i.pt", VQModel(VQConfig(**VQ)).checkpoint())
    save_file(tmp_path / "c2i_B_256.pt", GPT(GPTConfig(**LLAMA | dict(num_classes=1000))).checkpoint())
    Image.new("RGB", (300, 200)).save(tmp_path / "otter.png")
    monkeypatch.chdir(tmp_path)
    source = "\n".join(line.removeprefix("    ") for line in lines)
    exec(source.replace("256)", "64)"), names := {})  # the size at which these make as many codes
    assert names["images"].shape == (2, 64, 64, 3) and names["images"].dtype == "uint8"
    assert names["nats_per_code"] == pytest.approx(math.log(32))  # a GPT that has not been trained
    assert torch.equal(names["completed"].flatten(1)[:, :128], names["codes"][:, :128])


def test_how_it_works_names_what_is_there():
    """Files, classes, functions and methods."""
    names = set(re.findall(r"`([A-Za-z][\w./]+)`", README.split("## How it works")[1].split("\n## ")[0]))
    files = {name for name in names if name.endswith(".py")}
    assert len(files) >= 5 and all((ROOT / name).is_file() for name in files)
    trees = [ast.parse((ROOT / name).read_text()) for name in files]
    functions = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for name in names - files:
        owner, _, method = name.partition(".")
        found = [node.name for node in ast.walk(classes[owner]) if isinstance(node, ast.FunctionDef)] if method else []
        assert method in found if method else owner in functions | classes.keys(), name


# Help, presets and recipes

def parsers(parser):
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch):
    """Every option has a help that says its default, every command an example; there are no abbreviations."""
    with monkeypatch.context() as patched:
        patched.setattr(command_line.Parser, "parse_args", lambda self: self)
        main = SCRIPTS[script].options()
    for parser in parsers(main):
        text = parser.format_help()
        assert re.search(rf"^ *python {script}\.py ", text, re.M)  # 3.13 on takes indentation off docstrings
        assert "(default: None)" not in text and not parser.allow_abbrev
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.dest
            silent = action.default is False or action.default == argparse.SUPPRESS
            if isinstance(action.default, int | float | str) and not silent:
                shown = parser._get_formatter()._expand_help(action)
                assert f"{action.default}" in shown or "default" in shown, action.dest


def test_scripts_start_without_the_compiler():
    """torch.compile and sharded tensors take as long to load as the rest of PyTorch, and most commands need neither."""
    late = "{'torch._dynamo', 'torch.distributed.tensor'}"
    code = f"import sys, {', '.join(SCRIPTS)}\nprint(*{late} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_tables_of_the_presets(capsys):
    runpy.run_path(str(ROOT / "vq.py"), run_name="__main__")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["vq16"][:4] == ["71.9M", "16384", "256", "576"] and rows["vq8"][2] == "1024"
    assert float(rows["vq16"][-1]) == pytest.approx(71.9e6 * 16 / 2**30, abs=0.06)
    runpy.run_path(str(ROOT / "gpt.py"), run_name="__main__")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["3B"][:4] == ["24", "3200", "32", "3096.7M"] and float(rows["L"][10]) == pytest.approx(5.1, abs=0.05)
    n, tokens, c = 342.9e6, 256, 1024  # of L: products of every weight but the tables that are looked up, and attention
    forward = 2 * tokens * (n - (16384 + 1001) * c) + 2 * 24 * tokens * tokens * c
    assert float(rows["L"][4]) == pytest.approx(3 * forward / 1e12, rel=0.02)
    assert float(rows["L"][7]) == pytest.approx(2 * forward / 1e12, rel=0.03)
    cache = 2 * 24 * 16 * 256 * 1024  # keys and values: layers, rows, positions, channels
    assert float(rows["L"][11]) == pytest.approx(2 * (n + cache) / 2**30, abs=0.06)


RECIPES = {
    "imagenet_vq.sh": ["vq16", "vq8"], "text_to_image.sh": [""],
    "imagenet_gpt.sh": ["B 256", "B 384", "L 256", "L 384", "XL 256", "XL 384", "XXL 384", "3B 384"],
    "evaluate_published.sh": ["vq16", "vq8", "B_256", "B_384", "L_256", "L_384", "XL_384", "XXL_384", "3B_384"],
    "demo.sh": ["OUT"], "demo_text.sh": ["OUT"], "emoji.sh": ["OUT"],
}


def test_recipes_are_all_here():
    assert {*RECIPES, "benchmark.sh"} == {path.name for path in (ROOT / "runs").glob("*.sh")}


@pytest.mark.parametrize("name, words", [(name, words) for name in RECIPES for words in RECIPES[name]], ids=str)
def test_recipes_have_options_that_the_scripts_know(name, words, tmp_path, monkeypatch):
    """PYTHON is a stub that writes its arguments down; the scripts' own parsers read them."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> {tmp_path}/calls\nprintf "\\n\\0" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    more = dict(PYTHON=str(stub), VAL="imagenet/val")
    words = words.replace("OUT", f"{tmp_path}/out").split()  # demos replace the codes of the run before
    subprocess.run(["bash", ROOT / "runs" / name, *words], check=True, env=os.environ | more)
    calls = [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text().split("\n\0")[:-1]]
    assert calls
    monkeypatch.setattr(command_line, "fetch", Path)
    for call in calls:
        world = 1
        if call[:2] == ["-m", "torch.distributed.run"]:
            world, call = 8, call[call.index("--") + 1 :]
        monkeypatch.setattr(sys, "argv", call)
        script = importlib.import_module(Path(call[0]).stem)
        args = script.options()
        if script in (train_vq, train_gpt):
            training.check_training_options(args, world)


def test_warnings_and_errors_have_lines_of_their_own(monkeypatch, capsys):
    """Beside a progress bar, whose line is open."""
    def main():
        bar = tqdm(total=2, desc="run")
        bar.update()
        logging.getLogger("a").warning("a warning")
        bar.refresh()
        raise ValueError("an error")

    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit):
        command_line.cli(main)
    lines = [line.split("\r")[-1].strip() for line in capsys.readouterr().err.split("\n")]
    assert lines[0] == "a warning" and "1/2" in lines[1] and lines[2:] == ["run.py: error: an error", ""]


# Dead code


def names_in(tree):
    """Every variable, attribute and import in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.split(".")[-1]


def test_every_function_and_class_is_used():
    """Outside the tests; but for what libraries call, and the references that the tests hold kernels against."""
    trees = [ast.parse(path.read_text()) for folder in (ROOT, ROOT / "kernels") for path in folder.glob("*.py")]
    used = Counter(name for tree in trees for name in names_in(tree))
    defined = {node.name for tree in trees for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__")}
    by_libraries = {"forward", "train", "_apply", "add_usage", "_get_help_string", "_check_value", "parse_known_args",
                    "storage_meta"}
    assert sorted(n for n in defined - by_libraries if not used[n] and not n.endswith("_ref")) == []
