"""Stage 1: train the image tokenizer (VQGAN).

    python train_vq.py --preset tiny --data digits --size 32 --perceptual-weight 0 --disc-weight 0 --out out/vq
    python train_vq.py --preset vq16 --data imagenet --workers 16 --out out/vq16    # LlamaGen's recipe, 40 epochs
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import command_line
import common
import distributed
import training
from crops import as_size, check_size, pair
from data import add_data_options, check_images, eval_batches, image_batches, load_images
from losses import (
    LPIPS,
    PatchGAN,
    adaptive_weight,
    hinge_d_loss,
    hinge_g_loss,
    non_saturating_d_loss,
    non_saturating_g_loss,
)
from metrics import reconstruction_psnr
from vq import PRESETS, VQConfig, VQModel, usage_and_perplexity

KMEANS_BATCHES = 64  # that k-means looks at, at most
ADVERSARIAL = {"hinge": (hinge_g_loss, hinge_d_loss), "non-saturating": (non_saturating_g_loss, non_saturating_d_loss)}


def options():
    parser = command_line.Parser(__doc__)
    data = parser.add_argument_group("data")
    add_data_options(data)
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                      help="mirror images at random; never digits or emoji")
    data.add_argument("--workers", type=int, default=0, help="processes that read images")
    data.add_argument("--check-data", action="store_true", help="read every image, say what is there, and end")
    data.add_argument("--eval-images", type=int, default=1000, help="held-out images per evaluation, at most")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=list(PRESETS), help="default: vq16")
    model.add_argument("--init", type=Path, help="start from these weights, ours or LlamaGen's (sizes are the file's)")
    model.add_argument("--hub", action="store_true", help=command_line.HUB_HELP)
    model.add_argument("--codebook-size", type=int, help="codes (default: the preset's)")
    model.add_argument("--code-dim", type=int, help="channels of a code's vector (default: the preset's)")
    model.add_argument("--model-dropout", type=float, default=VQConfig.dropout,
                       help="share of channels dropped in residual blocks")
    book = parser.add_argument_group("codebook")
    book.add_argument("--beta", type=float, default=VQConfig.beta, help="weight of the commitment loss")
    book.add_argument("--codebook-weight", type=float, default=1.0, help="of codebook, commitment and entropy losses")
    book.add_argument("--entropy-weight", type=float, default=VQConfig.entropy_weight,
                      help="weight of the entropy loss (0: not computed)")
    book.add_argument("--kmeans-step", type=int, default=0, help="step at which k-means sets the codes (0: never)")
    book.add_argument("--restart-every", type=int, default=0, help="steps between restarts of unused codes (0: never)")
    book.add_argument("--usage-window", type=int, default=VQConfig.usage_window,
                      help="latest codes of a process that usage counts")
    loss = parser.add_argument_group("losses")
    loss.add_argument("--perceptual-weight", type=float, default=1.0, help="weight of LPIPS (0: none, no VGG16 needed)")
    loss.add_argument("--disc-weight", type=float, default=0.5,
                      help="weight of the adversarial loss (0: no discriminator)")
    loss.add_argument("--disc-start", type=int, default=20000, help="step at which the adversarial loss begins")
    loss.add_argument("--disc-warmup", type=int, default=1000,
                      help="steps before --disc-start in which the discriminator alone trains on that loss")
    loss.add_argument("--disc-loss", choices=list(ADVERSARIAL), default="hinge", help="adversarial loss")
    loss.add_argument("--adaptive-disc-weight", action="store_true",
                      help="times the ratio of both losses' gradients (VQGAN, eq. 7)")
    training.add_training_options(parser, max_steps=400_000, batch_size=128)
    return parser.parse_args()


def build_model(args):
    """The preset, or the file of --init with the options that no shape depends on."""
    how = dict(beta=args.beta, entropy_weight=args.entropy_weight, dropout=args.model_dropout)
    how["usage_window"] = args.usage_window
    sizes = {k: v for k, v in (("codebook_size", args.codebook_size), ("code_dim", args.code_dim)) if v is not None}
    if not args.init:
        return VQModel(VQConfig(**PRESETS[args.preset or "vq16"] | sizes | how))
    if sizes or args.preset:
        raise ValueError("--init takes the model from the file: leave --preset, --codebook-size and --code-dim out")
    return VQModel.from_pretrained(args.init, **how)


def check_sizes(args, model, disc):
    """ValueError where the images are too small, or too few, for what happens to them later in the run."""
    check_size(args.size, model.config.factor)
    if disc and args.disc_start - args.disc_warmup < args.max_steps:
        disc.check_size(*pair(args.size))
    vectors = KMEANS_BATCHES * args.batch_size * math.prod(side // model.config.factor for side in pair(args.size))
    if 0 < args.kmeans_step < args.max_steps and vectors < model.config.codebook_size:
        raise ValueError(f"--kmeans-step: {KMEANS_BATCHES} batches of {args.batch_size} images give k-means {vectors} "
                         f"vectors, fewer than its {model.config.codebook_size} codes")


@torch.no_grad()
def evaluate(model, lpips, val_set, args, device):
    """Held-out {val_loss: mse + weighted LPIPS, val_psnr: dB}."""
    (rank, world), sums = common.rank_and_world(), torch.zeros(3, dtype=torch.float64)  # of losses, of PSNR, and images
    n = len(val_set)
    mine = val_set.subset(training.spread(args.eval_images, n)[rank::world], of=n)
    for images, _, _ in eval_batches(mine, args.size, args.micro_batch_size):
        images = images.to(device)
        with common.evaluating(model):
            rec, _, _ = model(images)
        loss = F.mse_loss(rec, images) + (args.perceptual_weight * lpips(rec, images) if lpips else 0)
        quality = reconstruction_psnr(images, rec).sum()
        sums += torch.tensor([len(images) * float(loss), float(quality), len(images)], dtype=torch.float64)
    loss, quality, read = distributed.total(sums).tolist()
    if not read:
        raise ValueError(f"{val_set.source}: none of the {min(args.eval_images, n)} images to evaluate can be read")
    return {"val_loss": loss / read, "val_psnr": quality / read}


@torch.no_grad()
def picture(model, val_set, size, device, path):
    """Held-out images above their reconstructions, the same eight each time."""
    images, *_ = next(eval_batches(val_set, size, 8, indices=training.spread(8, len(val_set)).tolist()), (None,))
    if images is None:
        raise OSError("none of these images can be read")
    with common.evaluating(model):
        rec, _, _ = model(images.to(device))
    common.save_grid(path, common.to_uint8(torch.cat([images, rec.cpu()])), columns=len(images), notice=val_set.notice)


def features(model, images, args, dtype):
    """Encoder outputs [N, D] of images, in micro batches."""
    with common.autocast(images.device, dtype), common.evaluating(model):
        return torch.cat([model.features(part) for part in images.split(args.micro_batch_size)])


def first_features(model, train_set, args, device, dtype, per_code=32):
    """Encoder outputs [N, D] of the first batches, at least `per_code` a code where KMEANS_BATCHES hold that many."""
    batches, parts, want = image_batches(train_set, args.size, args.batch_size, args.seed), [], 1
    while len(parts) < min(want, KMEANS_BATCHES):
        parts.append(features(model, next(batches)[0].to(device), args, dtype))
        want = -(-per_code * model.config.codebook_size // len(parts[0]))
    return torch.cat(parts)


def train(args, device, rank, world, asked):
    """The run; `asked` as distributed.stopping() yields it."""
    dtype = common.pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    model, disc = build_model(args), PatchGAN() if args.disc_weight else None
    check_sizes(args, model, disc)
    train_set, val_set = load_images(args.data, args.size, args.val_data, bad_share=args.bad_share)
    train_set.flip = train_set.flip and args.flip
    with distributed.in_turn():
        lpips = LPIPS().to(device) if args.perceptual_weight else None

    model = model.to(device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    optimizers = training.make_optimizers(model, args)
    disc = disc and disc.to(device)
    if disc and world > 1 and device.type == "cuda":  # its batch statistics over all processes
        disc = torch.nn.SyncBatchNorm.convert_sync_batchnorm(disc)
    disc_optimizers = training.make_optimizers(disc, args) if disc else {}
    g_loss_fn, d_loss_fn = ADVERSARIAL[args.disc_loss]
    parts = dict(model=model, ema=ema, disc=disc, **optimizers)
    parts |= {f"disc_{name}": optimizer for name, optimizer in disc_optimizers.items()}
    parts = {name: part for name, part in parts.items() if part is not None}

    torch.manual_seed(args.seed + rank)  # each process drops and redraws other things
    start_step, elapsed, _ = checkpoints.load_state(args, parts)
    compile_model = device.type == "cuda" and not args.adaptive_disc_weight if args.compile is None else args.compile
    run_model = distributed.parallel(torch.compile(model) if compile_model else model, device)
    run_disc = distributed.parallel(disc, device) if disc else None
    best = ema or model  # what is evaluated, drawn and saved
    log = training.RunLog(args.out, args, start_step)
    batches = image_batches(train_set, args.size, args.batch_size, args.seed, start_step, args.workers,
                            rank=rank, world=world)
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    distributed.say(f"{n_parameters:.1f}M parameters, {len(train_set)} images, {len(val_set)} more held out, "
                    f"{world} x {device} {dtype}")

    def save(step):
        files = {"vq.pt": dict(best.checkpoint(), step=step)}
        return checkpoints.save_state(args, step, elapsed, parts, files)

    def draw(name):
        if rank == 0:
            with training.dispensable(name):
                picture(best, val_set, args.size, device, args.out / name)

    means, bad_steps = training.Means(), training.BadSteps(args.max_bad_steps)
    bad_disc_steps = training.BadSteps(args.max_bad_steps, "bad_disc_steps")
    since, timer, began = start_step, training.Timer(), time.perf_counter() - elapsed
    bar = training.progress_bar(args, "train_vq", start_step)
    step, stopped = start_step, False
    while (progress := training.progress(args, step, elapsed)) < 1:
        lr = training.learning_rate(args, step, progress)
        images = next(batches)[0].to(device, memory_format=torch.channels_last, non_blocking=True)
        moved = step == args.kmeans_step > 0
        if moved:
            model.quantize.init_kmeans(first_features(model, train_set, args, device, dtype))
        if args.restart_every and step > args.kmeans_step and step % args.restart_every == 0:
            moved = True
            model.quantize.restart_dead_codes(features(model, images, args, dtype))

        # The tokenizer: pixels, LPIPS, codebook, and from disc_start on the adversarial loss.
        adversarial = disc is not None and step >= args.disc_start
        fakes, micro = [], images.split(args.micro_batch_size)
        for i, part in enumerate(micro, 1):
            with distributed.unsynchronised(run_model, i < len(micro)), training.advice(args, f"{args.size} pixels"):
                with common.autocast(device, dtype):
                    rec, code_losses, _ = run_model(part)
                    losses = {"mse": F.mse_loss(rec.float(), part)}
                    if lpips:
                        losses["perceptual"] = args.perceptual_weight * lpips(rec, part)
                    if adversarial:
                        disc.requires_grad_(False)  # until its own step below
                        g_loss = g_loss_fn(disc(rec))
                if adversarial:
                    weight = args.disc_weight
                    if args.adaptive_disc_weight:
                        weight *= adaptive_weight(sum(losses.values()), g_loss, model.decoder.conv_out.weight)
                    losses["adversarial"] = weight * g_loss
                losses |= {name: args.codebook_weight * value for name, value in code_losses.items()}
                loss = sum(losses.values())
                (loss / len(micro)).backward()
            fakes.append(rec.detach())
            means.add(loss=loss, **losses)
        norm = training.update(model, optimizers, lr, args.clip)
        means.add(grad_norm=norm)
        bad_steps.add(norm)
        if ema:
            training.update_ema(ema, model, args.ema, step)
            if moved:  # codes that jumped are not averaged across the jump
                ema.quantize.set_codebook(model.quantize.embedding.weight)

        # The discriminator, which starts --disc-warmup steps earlier: it is trained before its loss is used.
        if disc is not None and step >= args.disc_start - args.disc_warmup:
            disc.requires_grad_(True)
            for i, (part, fake) in enumerate(zip(micro, fakes, strict=True), 1):
                with distributed.unsynchronised(run_disc, i < len(micro)):
                    with common.autocast(device, dtype):
                        real_logits, fake_logits = run_disc(part), run_disc(fake)
                    d_loss = d_loss_fn(real_logits, fake_logits)
                    (d_loss / len(micro)).backward()
                accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
                means.add(disc_loss=d_loss, disc_accuracy=accuracy)
            bad_disc_steps.add(training.update(disc, disc_optimizers, lr, args.clip))

        step += 1
        bar.update()
        elapsed = distributed.clock(args, time.perf_counter() - began)
        stopped = distributed.agree(asked)
        last = stopped or training.progress(args, step, elapsed) >= 1
        if step % args.log_every == 0 or last:
            usage, perplexity = map(float, usage_and_perplexity(model.quantize.window_counts()))
            row = means.pop() | bad_steps.pop(step) | bad_disc_steps.pop(step)
            dt_ms, since = timer() / (step - since), step
            log.write(step=step, **row, lr=lr, usage=usage, perplexity=perplexity, dt_ms=dt_ms,
                      images_per_s=1000 * args.batch_size / dt_ms, mem_gib=training.peak_gib(device))
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", usage=f"{usage:.0%}", lr=f"{lr:.1e}")
        if last:
            break
        with timer.paused():
            if args.save_every and step % args.save_every == 0:  # first: what follows may fail
                save(step)
            if step % args.eval_every == 0:
                log.write(step=step, **evaluate(best, lpips, val_set, args, device))
                log.plot(("mse", "perceptual"))
            if args.picture_every and step % args.picture_every == 0:
                draw(f"reconstructions_{step:06}.png")

    bar.close()
    if not save(step):
        raise OSError(f"{args.out}: the last checkpoint could not be written, the one before it stands")
    if stopped:
        return distributed.say(f"stopped at step {step}, as a signal asked: --resume goes on")
    final = evaluate(best, lpips, val_set, args, device)
    log.write(step=step, **final)
    log.plot(("mse", "perceptual"))
    draw("reconstructions.png")
    log.result(seconds=elapsed, steps=step, **final)
    distributed.say(f"{step} steps in {elapsed:.0f} s, held-out PSNR {final['val_psnr']:.1f} dB: {args.out}")


def main():
    args = options()
    args.size = as_size(args.size)
    if args.check_data:
        return check_images(args.data, args.size, args.val_data, False, args.bad_share, args.workers)
    if args.compile and args.adaptive_disc_weight:
        raise ValueError("--adaptive-disc-weight asks for gradients twice, which --compile does not give")
    with distributed.stopping() as asked, distributed.processes(args.device) as (device, rank, world):
        training.check_training_options(args, world)
        checkpoints.find(args)
        with distributed.alone(common.make_folder(args.out), rank):
            train(args, device, rank, world, asked)


if __name__ == "__main__":
    command_line.cli(main)
