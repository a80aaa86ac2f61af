#!/usr/bin/env bash
# LlamaGen's class-conditional GPTs on ImageNet: bash runs/imagenet_gpt.sh [B|L|XL|XXL|3B] [256|384]
# Codes of ten crops at two scales (13 GB, 30 at 384 pixels, and as much again while their parts are joined), 300 epochs,
# batch 256 (512 for XXL and 3B), lr 1e-4 per 256; 50,000 samples at 256 pixels, scored against the reference batch of the
# ADM evaluator.
# Not run here. LlamaGen reports about 1 day on 8 A100 for B and 2 for L, and, by guidance, FID / inception score:
#   256 pixels: B 2.0 5.46 / 193.6, L 1.75 3.81 / 248.3
#   384 pixels: B 2.25 6.09, L 2.0 3.08 / 256, XL 1.75 2.63 / 244, XXL 1.75 2.34 / 254, 3B 1.65 2.19 / 263
# (no figure for XL at 256 is at hand). It reports no memory: `python gpt.py` lists that of weights, gradients and AdamW,
# 1.7 GiB for B to 46 GiB for 3B, in all; activations come on top. With --fsdp the GPUs share them.
# IMAGENET names a folder with train/ and val/; VQ the tokenizer (default: LlamaGen's); REF the reference batch; GPUS how
# many there are; PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
model=${1:-B}
pixels=${2:-256}
vq=${VQ:-vq_ds16_c2i.pt}
ref=${REF:-VIRTUAL_imagenet256_labeled.npz}
codes=out/imagenet_codes_$pixels
out=out/imagenet_${model}_$pixels
launch="$python -m torch.distributed.run --standalone --nproc_per_node=${GPUS:-8} --"

case $model-$pixels in
  B-256) cfg=2.0 ;; B-384) cfg=2.25 ;; L-384) cfg=2.0 ;; 3B-*) cfg=1.65 ;; *) cfg=1.75 ;;
esac
case $model in
  XXL | 3B) batch=(--batch-size 512 --micro-batch-size 16 --lr 2e-4 --max-steps 750000 --fsdp) ;;
  *) batch=(--batch-size 256 --lr 1e-4 --max-steps 1500000) ;;
esac

[ -f "$codes/result.json" ] || $launch encode.py --vq "$vq" --hub --data "${IMAGENET:-imagenet}" --size "$pixels" \
  --crops ten --crop-scales 1.1 1.05 --workers 12 --out "$codes"
$launch train_gpt.py --preset "$model" --vq "$vq" --hub --codes "$codes" "${batch[@]}" --eval-every 10000 \
  --picture-every 10000 --save-every 5000 --resume auto --out "$out"
[ -f "$out/samples.npz" ] || $launch sample.py --vq "$vq" --hub --gpt "$out/gpt.pt" --n 50000 --cfg-scale "$cfg" \
  --size 256 --npz "$out/samples.npz" --out "$out/samples_50000.png"
$python evaluate.py gen --samples "$out/samples.npz" --ref "$ref"
