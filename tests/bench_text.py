"""How should a GPT read captions? Four ways on digits-text with equal steps, batches and rates, scored by demo.py.

    bash runs/demo_text.sh && python tests/bench_text.py --demo out/text --out out/bench_text

tokens: as the demo has it. T5, trained along: a small encoder, random at first, in front of a GPT that reads features.
T5, frozen: that encoder's features, stored by encode.py, and a new GPT. T5, random: the same with an encoder that has
learnt nothing. There are no published T5 weights here; two layers of 128 channels stand in for them.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file as save_safetensors
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402 - needs the path above
import common  # noqa: E402
import training  # noqa: E402
from codes import CodeFile  # noqa: E402
from gpt import GPT, PAD, PRESETS, GPTConfig  # noqa: E402
from t5 import FIXED, T5Config, T5Encoder  # noqa: E402
from vq import VQModel  # noqa: E402

T5_SIZES = dict(d_model=128, d_ff=256, num_layers=2, num_heads=4, d_kv=32)
RECIPE = dict(batch_size=24, lr=3e-3, schedule="cosine", warmup_steps=20, dropout=0.05, optimizer="muon")


def new_t5(codes):
    return T5Encoder(T5Config(**T5_SIZES, vocab_size=codes.captions.size))


def save_t5(t5, codes, folder):
    """The folder that T5Encoder.from_pretrained reads, as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIXED | vars(t5.config)))
    (folder / "spiece.model").write_bytes(codes.captions.model)
    save_safetensors({k: v.contiguous() for k, v in t5.state_dict().items()}, folder / "model.safetensors")


class Along(torch.nn.Module):
    """An encoder and a GPT as one model of caption tokens."""

    def __init__(self, t5, gpt):
        super().__init__()
        self.t5, self.gpt = t5, gpt

    def forward(self, tokens, ids, targets):
        mask = ids != PAD
        return self.gpt(tokens, self.t5(ids, mask) * mask.unsqueeze(-1), mask, targets=targets)


def train_along(args, codes, vq, folder):
    """Train both from nothing; writes the encoder's folder, gpt.pt and what demo.py reads beside it."""
    recipe = argparse.Namespace(**RECIPE, max_steps=args.max_steps, max_minutes=float("inf"), min_lr=0.0,
                                beta1=0.9, beta2=0.95, weight_decay=0.05)
    torch.manual_seed(args.seed)
    t5 = new_t5(codes)
    text = dict(kind="t5", size=t5.config.d_model, length=codes.captions.length, t5=str(folder / "t5"))
    config = GPTConfig(**PRESETS["tiny"], vocab_size=codes.codebook_size, cond="text", n_cond=text["length"],
                       text_dim=text["size"], grid=codes.grid, dropout=recipe.dropout)
    model = Along(t5, GPT(config)).train()
    model.gpt.see_codes(vq.quantize.codebook())
    muon = [p for part in (model.gpt.layers, t5.encoder) for n, p in part.named_parameters()
            if p.dim() == 2 and "bias" not in n]
    optimizers = training.make_optimizers(model, recipe, muon)
    timer = training.Timer()
    for step in tqdm(range(args.max_steps), desc="T5, trained along"):
        tokens, ids = codes.code_batch(step, recipe.batch_size, args.seed)
        _, loss = model(tokens[:, :-1], ids, tokens)
        loss.backward()
        training.update(model, optimizers, training.learning_rate(recipe, step, step / args.max_steps), 1.0)
    result = dict(seconds=timer() / 1000, steps=args.max_steps, train_loss=float(loss.detach()), val_loss=None)
    save_t5(t5, codes, folder / "t5")
    (folder / "gpt").mkdir(exist_ok=True)
    common.save_file(folder / "gpt" / "gpt.pt", dict(model.gpt.checkpoint(), codes=codes.meta | dict(text=text)))
    (folder / "gpt" / "result.json").write_text(json.dumps(result))


def call(script, *words):
    subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], check=True)


def train_frozen(args, vq_path, t5_folder, folder):
    """encode.py and train_gpt.py on the features of an encoder in a folder."""
    shutil.rmtree(folder / "codes", ignore_errors=True)
    call("encode.py", "--vq", vq_path, "--data", "digits-text", "--size", 32, 64, "--crops", "center", "--out",
         folder / "codes", "--text", "t5", "--t5", t5_folder, "--text-length", 16)
    recipe = [word for name, value in RECIPE.items() for word in (f"--{name.replace('_', '-')}", value)]
    call("train_gpt.py", "--preset", "tiny", "--codes", folder / "codes", "--out", folder / "gpt", *recipe,
         "--resume", "no", "--code-features", "--max-steps", args.max_steps, "--seed", args.seed, "--eval-every", 400,
         "--eval-images", 480, "--picture-every", 0, "--no-compile")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("out/text"), help="folder of runs/demo_text.sh")
    parser.add_argument("--out", type=Path, default=Path("out/bench_text"), help="folder for the runs and text.json")
    parser.add_argument("--max-steps", type=int, default=2000, help="of each GPT; the demo's is 2,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vq_path, codes = args.demo / "vq" / "vq.pt", CodeFile(args.demo / "codes" / "train")
    along, frozen, unlearnt = (args.out / name for name in ("along", "frozen", "random"))
    train_along(args, codes, VQModel.from_pretrained(vq_path), along)
    train_frozen(args, vq_path, along / "t5", frozen)
    torch.manual_seed(args.seed)
    save_t5(new_t5(codes), codes, unlearnt / "t5")
    train_frozen(args, vq_path, unlearnt / "t5", unlearnt)
    reports = {"caption tokens": json.loads((args.demo / "report.json").read_text())}
    for name, folder in (("T5, trained along", along), ("T5, frozen", frozen), ("T5, random", unlearnt)):
        codes_folder = folder / "codes" if (folder / "codes").is_dir() else args.demo / "codes"
        call("demo.py", "text", "--vq", vq_path, "--gpt", folder / "gpt" / "gpt.pt", "--codes", codes_folder, "--out",
             folder, "--seed", args.seed)
        reports[name] = json.loads((folder / "report.json").read_text())
    table = {name: dict(gpt_seconds=report["seconds"]["gpt"],
                        **{split: row["all"] for split, row in report["generated"]["2.0"].items()})
             for name, report in reports.items()}
    (args.out / "text.json").write_text(json.dumps(table, indent=1))
    for name, row in table.items():
        print(f"{name:20}" + "".join(f"{key}: {value:.3g}  " for key, value in row.items()))


if __name__ == "__main__":
    command_line.cli(main)
