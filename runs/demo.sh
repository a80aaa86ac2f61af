#!/usr/bin/env bash
# From nothing to generated digits: tokenizer, codes, GPT, samples and their scores in out/demo.
# One CPU core: about 4 minutes. PYTHON names the interpreter; VQ_OPTIONS,
# GPT_OPTIONS and DEMO_OPTIONS are words more for these scripts.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a second thread saves a third of the time, and waits where cores are busy
out=${1:-out/demo}

$python train_vq.py --preset tiny --data digits --size 32 --perceptual-weight 0 --disc-weight 0 --out "$out/vq" \
  --max-steps 900 --batch-size 16 --lr 1.5e-3 --schedule cosine --warmup-steps 20 --kmeans-step 60 \
  --restart-every 100 --usage-window 16384 --no-compile --resume no --eval-every 200 --picture-every 200 ${VQ_OPTIONS:-}
rm -rf "$out/codes"
$python encode.py --vq "$out/vq/vq.pt" --data digits --size 32 --crops random --n-random 6 --out "$out/codes"
$python train_gpt.py --preset tiny --codes "$out/codes" --out "$out/gpt" --max-steps 1000 --batch-size 64 --lr 3e-3 \
  --schedule cosine --warmup-steps 20 --eval-every 200 --picture-every 200 --no-compile --resume no ${GPT_OPTIONS:-}
$python demo.py digits --vq "$out/vq/vq.pt" --gpt "$out/gpt/gpt.pt" --codes "$out/codes" --out "$out" ${DEMO_OPTIONS:-}
