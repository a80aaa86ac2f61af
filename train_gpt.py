"""Stage 2: train the GPT on codes that encode.py wrote.

    python train_gpt.py --preset tiny --codes out/codes --lr 3e-3 --schedule cosine --max-steps 600 --out out/gpt
    python train_gpt.py --preset B --codes codes --max-steps 1500000 --out out/gpt_B    # LlamaGen's recipe

The condition is what the codes come with: classes, FLAN-T5 features or caption tokens.
"""

import argparse
import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

import checkpoints
import command_line
import common
import distributed
import training
from codes import CodeFile, open_tokenizer
from gpt import GPT, PRESETS, GPTConfig
from sample import decode, release, sample_images

SAME = ("tokenizer_sha256", "grid", "codebook_size", "class_names", "text")  # in train and val, on resuming


def options():
    parser = command_line.Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--codes", type=Path, required=True, help="folder that encode.py wrote, with train/ and val/")
    data.add_argument("--vq", type=Path, help="the tokenizer, for pictures (default: the file that the codes name)")
    data.add_argument("--check-data", action="store_true", help="read all codes and captions, say what is there, end")
    data.add_argument("--eval-images", type=int, default=5000, help="held-out images per evaluation, at most")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=list(PRESETS), help="default: B")
    model.add_argument("--init", type=Path, help="start from these weights, ours or LlamaGen's (sizes are the file's)")
    model.add_argument("--hub", action="store_true", help=command_line.HUB_HELP)
    model.add_argument("--cond-rope", choices=["identity", "zero"],
                       help="rotation of condition tokens (default: identity; LlamaGen: zero)")
    model.add_argument("--n-kv-head", type=int, help="key and value heads (default: as many as query heads)")
    model.add_argument("--dropout", type=float, default=GPTConfig.dropout,
                       help="share of embeddings, attention and FFN dropped")
    model.add_argument("--cond-dropout", type=float, default=GPTConfig.cond_dropout,
                       help="share of unconditional images, for guidance")
    model.add_argument("--code-features", action=argparse.BooleanOptionalAction, default=False,
                       help="let the GPT see the tokenizer's code vectors, in embeddings and logits")
    model.add_argument("--caption-loss-weight", type=float, default=GPTConfig.caption_loss_weight,
                       help="weight of the loss on caption tokens")
    look = parser.add_argument_group("pictures")
    look.add_argument("--sample-cfg-scale", type=float, default=2.0,
                      help="classifier-free guidance of the sample grids (1: none)")
    look.add_argument("--sample-top-k", type=int, default=0, help="codes kept in the sample grids (0: all)")
    opt = training.add_training_options(parser, max_steps=1_500_000, batch_size=256)
    opt.add_argument("--fsdp", action="store_true",
                     help="shard model, gradients and optimizer over torchrun's processes: for XXL and 3B")
    opt.add_argument("--activation-checkpointing", action="store_true",
                     help="compute blocks again in the backward pass: a third more work, a fraction of the memory")
    opt.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"],
                     help="muon: for the blocks' matrices, AdamW for the rest")
    return parser.parse_args()


def open_codes(args):
    """The CodeFiles of training and of held-out images; ValueError if they are not of one kind."""
    codes, val_codes = CodeFile(args.codes / "train"), CodeFile(args.codes / "val")
    val_codes.check(**{name: codes.meta[name] for name in SAME})
    return codes, val_codes


def vocabulary(meta):
    """What the numbers of a condition stand for, by what meta.json says of codes: classes, or tokens of a model."""
    return meta["text"].get("model_sha256") if meta["text"] else meta["class_names"]


def build_model(args, codes, vq):
    """The preset at the codes' sizes, or the file of --init, which has to fit them but for its kind of condition."""
    how = dict(dropout=args.dropout, cond_dropout=args.cond_dropout)
    text = codes.meta["text"]
    if not text:
        cond = dict(cond="class", n_cond=1, num_classes=len(codes.class_names), text_vocab_size=0)
    elif text["kind"] == "t5":
        cond = dict(cond="text", n_cond=text["length"], text_dim=text["size"], text_vocab_size=0)
    else:
        cond = dict(cond="tokens", n_cond=text["length"], text_vocab_size=text["size"])
    fresh = cond | dict(cond_rope=args.cond_rope or "identity", caption_loss_weight=args.caption_loss_weight)
    if not args.init:
        how |= fresh | dict(vocab_size=codes.codebook_size, grid=codes.grid)
        how |= dict(n_kv_head=args.n_kv_head) if args.n_kv_head else {}
        model = GPT(GPTConfig(**PRESETS[args.preset or "B"] | how))
    elif args.preset or args.n_kv_head:
        raise ValueError("--init takes the model from the file: leave --preset and --n-kv-head out")
    else:
        model = GPT.from_pretrained(args.init, grid=codes.grid, **how)
        if model.config.vocab_size != codes.codebook_size:
            found = f"{model.config.vocab_size} codes, {args.codes} has {codes.codebook_size}"
            raise ValueError(f"--init {args.init} knows {found}")
        same = all(getattr(model.config, name) == value for name, value in cond.items())
        trained_on = common.read_file(args.init).get("codes")  # published files do not tell
        if trained_on and trained_on.get("tokenizer_sha256") != codes.meta["tokenizer_sha256"]:
            tokenizer = trained_on.get("tokenizer")
            distributed.say(f"--init {args.init} was trained on codes of another tokenizer, {tokenizer}")
        if not same or trained_on and vocabulary(trained_on) != vocabulary(codes.meta):
            what = "captions" if text else "classes"
            distributed.say(f"--init {args.init} was trained on other {what}: their embedding is re-initialised")
            model.set_condition(**fresh)
        elif args.cond_rope:
            raise ValueError("--cond-rope is for conditions that are re-initialised, and this one is the file's")
    model.config = replace(model.config, caption_loss_weight=args.caption_loss_weight)
    if args.code_features:
        model.see_codes(vq.quantize.codebook())
    else:
        model.fold_code_features()  # a file's: what it learnt of them stays
    return model


@torch.no_grad()
def evaluate(model, codes, args, device, dtype):
    """Held-out teacher-forced loss in nats per code, of the first crop (of ten: the centre) of evenly spread images."""
    (rank, world), order = common.rank_and_world(), training.spread(args.eval_images, len(codes))
    total = torch.zeros((), dtype=torch.float64)
    for images in order.split(args.micro_batch_size * world):
        part = images[rank::world]
        mine = (part if len(part) else images[:1]).numpy()  # a sharded model wants every process in every forward
        tokens = codes.tokens(mine).to(device)
        cond = (x.to(device) for x in codes.condition(mine))
        # Blocks run as they are written, not compiled: evaluations and pictures are rare, of many shapes.
        with common.evaluating(model), common.autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            total += len(part) * model(tokens[:, :-1], *cond, targets=tokens)[1].cpu()
    return float(distributed.total(total)) / len(order)


@torch.no_grad()
def unsharded(model):
    """A model that is sharded, in one piece on the CPU of the first process; every process has to ask for it."""
    if not distributed.sharded(model):
        return model
    weights, first = {}, common.rank_and_world()[0] == 0
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        x = distributed.whole(x.detach())
        if first:
            weights[name] = x.cpu()
    with torch.device("meta"):
        whole = GPT(model.config)
    if first:
        whole.load_state_dict(weights, strict=False, assign=True)  # files hold no cos and sin
    return whole.requires_grad_(False)


def sample_conditions(codes, val_codes, n=64):
    """What the sample grids show, the same every time: classes evenly, or held-out captions; and their names."""
    if codes.captions:
        pick = training.spread(n, len(val_codes)).numpy()
        return val_codes.condition(pick), val_codes.names(pick)
    labels = torch.arange(n) * len(codes.class_names) // n
    return (labels,), [codes.class_names[i] for i in labels]


def page(vq, codes, path):
    """64 stored training images decoded, with their conditions: to be looked at when training goes nowhere."""
    pick = training.spread(64, len(codes)).numpy()
    tokens = codes.tokens(pick).view(-1, *codes.grid).to(vq.post_quant_conv.weight.device)
    common.save_grid(path, decode(vq, tokens), 8, codes.names(pick), notice=codes.meta["notice"])


def train(args, device, rank, world, asked):
    """The run; `asked` as distributed.stopping() yields it."""
    dtype = common.pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    codes, val_codes = open_codes(args)
    vq = open_tokenizer(args.vq, codes, args.codes, device)

    model = build_model(args, codes, vq).to(device).train()
    model.activation_checkpointing = args.activation_checkpointing
    compile_blocks = device.type == "cuda" if args.compile is None else args.compile
    if compile_blocks:
        torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph at DDP's buckets: blocks are such cuts
        for block in model.layers:  # two graphs serve all: the first block has no residual
            block.compile()
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    if args.fsdp:
        from sharding import shard

        for each in (model, ema) if ema else (model,):
            shard(each, each.layers, device, dtype)
    muon = [p for p in model.layers.parameters() if p.dim() == 2] if args.optimizer == "muon" else []
    optimizers = training.make_optimizers(model, args, muon)
    parts = dict(model=model, ema=ema, **optimizers)
    parts = {name: part for name, part in parts.items() if part is not None}

    torch.manual_seed(args.seed + rank)  # each process drops other things
    start_step, elapsed, trained_on = checkpoints.load_state(args, parts)
    if trained_on:
        codes.check(**trained_on)
    run_model = model if args.fsdp else distributed.parallel(model, device)
    best = ema or model  # what is evaluated, sampled and saved
    log = training.RunLog(args.out, args, start_step)
    sample_cond, sample_names = sample_conditions(codes, val_codes)
    if rank == 0:
        page(vq, codes, args.out / "codes.png")
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(codes)} images x "
            f"{codes.codes.shape[1]} crops of {codes.grid} codes, "
            f"{f'captions ({model.config.cond})' if codes.captions else f'{len(codes.class_names)} classes'}, "
            f"{len(val_codes)} held out, {world} x {device} {dtype}; see {args.out / 'codes.png'}"
        )

    def save(step):
        files = {"gpt.pt": dict(unsharded(best).checkpoint(), **codes.origin(), step=step)}
        data = {name: codes.meta[name] for name in SAME}
        return checkpoints.save_state(args, step, elapsed, parts, files, data)

    def picture(name):
        sampler = unsharded(best)
        if rank > 0:
            return
        how = dict(batch_size=8, cfg_scale=args.sample_cfg_scale, top_k=args.sample_top_k)
        with training.dispensable(name), torch.compiler.set_stance("force_eager"):
            sampler = sampler if sampler is best else sampler.to(device)
            images, _ = sample_images(vq, sampler, *(x.to(device) for x in sample_cond), **how)
            common.save_grid(args.out / name, images, 8, sample_names, notice=codes.meta["notice"])
        release(sampler)  # training needs the memory

    peak = training.peak_flops(device, dtype)
    means, bad_steps = training.Means(), training.BadSteps(args.max_bad_steps)
    since, timer, began = start_step, training.Timer(), time.perf_counter() - elapsed
    bar = training.progress_bar(args, "train_gpt", start_step)
    step, stopped = start_step, False
    while (progress := training.progress(args, step, elapsed)) < 1:
        lr = training.learning_rate(args, step, progress)
        batch = codes.code_batch(step, args.batch_size, args.seed, rank, world)
        batch = [x.to(device, non_blocking=True).split(args.micro_batch_size) for x in batch]
        for i, (tokens, *cond) in enumerate(zip(*batch, strict=True), 1):
            with distributed.unsynchronised(run_model, i < len(batch[0])), training.advice(args, "these codes"):
                with common.autocast(device, dtype):
                    _, loss = run_model(tokens[:, :-1], *cond, targets=tokens)
                (loss / len(batch[0])).backward()
            means.add(loss=loss)
        norm = training.update(model, optimizers, lr, args.clip)
        means.add(grad_norm=norm)
        bad_steps.add(norm)
        if ema:
            training.update_ema(ema, model, args.ema, step)

        step += 1
        bar.update()
        elapsed = distributed.clock(args, time.perf_counter() - began)
        stopped = distributed.agree(asked)
        last = stopped or training.progress(args, step, elapsed) >= 1
        if step % args.log_every == 0 or last:
            row, dt_ms, since = means.pop() | bad_steps.pop(step), timer() / (step - since), step
            images_per_s = 1000 * args.batch_size / dt_ms
            row |= dict(lr=lr, dt_ms=dt_ms, tokens_per_s=images_per_s * math.prod(codes.grid))
            row |= dict(mem_gib=training.peak_gib(device))
            if peak:  # share of it that the model's own operations took
                row |= dict(mfu=images_per_s * model.flops_per_image() / (world * peak))
            log.write(step=step, **row)
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.3f}", lr=f"{lr:.1e}")
        if last:
            break
        with timer.paused():
            if args.save_every and step % args.save_every == 0:  # first: what follows may fail
                save(step)
            if step % args.eval_every == 0:
                log.write(step=step, val_loss=evaluate(best, val_codes, args, device, dtype))
                log.plot()
            if args.picture_every and step % args.picture_every == 0:
                picture(f"samples_{step:06}.png")

    bar.close()
    if not save(step):
        raise OSError(f"{args.out}: the last checkpoint could not be written, the one before it stands")
    if stopped:
        return distributed.say(f"stopped at step {step}, as a signal asked: --resume goes on")
    train_loss = next((row["loss"] for row in reversed(log.rows) if "loss" in row), None)
    final = dict(train_loss=train_loss, val_loss=evaluate(best, val_codes, args, device, dtype))
    log.write(step=step, val_loss=final["val_loss"])
    log.plot()
    picture("samples.png")
    log.result(seconds=elapsed, steps=step, **final)
    distributed.say(f"{step} steps in {elapsed:.0f} s, held-out loss {final['val_loss']:.3f} nats per code: {args.out}")


def main():
    args = options()
    if args.check_data:
        if common.rank_and_world()[0] == 0:
            for codes in open_codes(args):
                codes.report()
        return
    with distributed.stopping() as asked, distributed.processes(args.device) as (device, rank, world):
        if args.fsdp and not torch.distributed.is_initialized():
            raise ValueError("--fsdp shards over torchrun's processes: torchrun --nproc_per_node=8 -- train_gpt.py ...")
        training.check_training_options(args, world)
        checkpoints.find(args)
        with distributed.alone(common.make_folder(args.out), rank):
            train(args, device, rank, world, asked)


if __name__ == "__main__":
    command_line.cli(main)
