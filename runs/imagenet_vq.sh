#!/usr/bin/env bash
# LlamaGen's tokenizers on ImageNet at 256 pixels, 40 epochs, batch 128: bash runs/imagenet_vq.sh [vq16|vq8]
# Not run here. LlamaGen reports about 2 days on 8 A100 for vq16, and on the validation images at 256 pixels (rFID, PSNR,
# SSIM as it computes it, codes used): vq16 2.19, 20.79 dB, 0.675, 97.0%; vq8 0.59, 24.45 dB, 0.813, 97.6%. It reports no
# memory: weights, gradients and AdamW take 1.1 GiB (python vq.py), activations of 16 images a GPU come on top.
# IMAGENET names a folder with train/ and val/; GPUS how many there are; PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
imagenet=${IMAGENET:-imagenet}
preset=${1:-vq16}
out=out/imagenet_$preset

$python -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-8}" -- train_vq.py --preset "$preset" \
  --data "$imagenet" --workers 12 --max-steps 400000 --eval-every 10000 --picture-every 10000 --save-every 5000 \
  --resume auto --out "$out"
$python evaluate.py recon --vq "$out/vq.pt" --data "$imagenet" --split val --size 256 --out "$out/recon"
