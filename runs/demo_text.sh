#!/usr/bin/env bash
# From nothing to pictures of prompts: two coloured digits side by side, their captions, and how often both agree.
# One CPU core: about 6 minutes. Results in out/text. PYTHON names the interpreter,
# SEED the seed (0).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-out/text}
seed=${SEED:-0}

$python train_vq.py --preset tiny --data digits-text --size 32 64 --perceptual-weight 0 --disc-weight 0 --out "$out/vq" \
  --max-steps 1600 --batch-size 8 --lr 1.5e-3 --schedule cosine --warmup-steps 20 --kmeans-step 60 \
  --restart-every 100 --usage-window 16384 --no-compile --resume no --eval-every 400 --picture-every 400 --eval-images 480 \
  --seed "$seed"
rm -rf "$out/codes"
$python encode.py --vq "$out/vq/vq.pt" --data digits-text --size 32 64 --crops center --out "$out/codes" \
  --text tokens --text-pieces word --text-length 16
$python train_gpt.py --preset tiny --codes "$out/codes" --out "$out/gpt" --max-steps 2000 --batch-size 24 --lr 3e-3 \
  --optimizer muon --schedule cosine --warmup-steps 20 --dropout 0.05 --code-features --eval-every 400 \
  --picture-every 400 --eval-images 480 --no-compile --resume no --seed "$seed"
$python demo.py text --vq "$out/vq/vq.pt" --gpt "$out/gpt/gpt.pt" --codes "$out/codes" --out "$out" --seed "$seed"
