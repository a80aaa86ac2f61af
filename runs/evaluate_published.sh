#!/usr/bin/env bash
# LlamaGen's files against its tables: bash runs/evaluate_published.sh [vq16|vq8|B_256|B_384|L_256|L_384|XL_384|XXL_384|3B_384]
# Files that are not there are fetched (pip install huggingface_hub). Tokenizers: reconstruction of the 50,000 validation
# images. GPTs: 50,000 samples at 256 pixels against the reference batch of the ADM evaluator, after a self-check of it.
# Not run here. LlamaGen reports
#   rFID, PSNR, SSIM as it computes it: vq16 2.19, 20.79 dB, 0.675; vq8 0.59, 24.45 dB, 0.813
#   FID: B_256 5.46, L_256 3.81, B_384 6.09, L_384 3.08, XL_384 2.63, XXL_384 2.34, 3B_384 2.19
# and for 8 images at 384 pixels on one A100 (PyTorch / vLLM) B 7.80 / 2.39 s, L 13.72 / 3.48 s, XL 19.76 / 4.84 s,
# XXL 26.38 / 6.36 s, 3B 14.73 / 6.26 s; no memory (`python gpt.py` lists that of weights and cache).
# IMAGENET names a folder with train/ and val/, VAL its validation images as an npz or folder at 256 pixels (if given,
# they check the reference first), REF the reference batch; GPUS how many there are; PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
what=${1:-vq16}
ref=${REF:-VIRTUAL_imagenet256_labeled.npz}
out=out/published_$what
launch="$python -m torch.distributed.run --standalone --nproc_per_node=${GPUS:-8} --"

case $what in
  vq16 | vq8)
    $launch evaluate.py recon --vq "vq_ds${what#vq}_c2i.pt" --hub --data "${IMAGENET:-imagenet}" --size 256 --out "$out"
    exit ;;
  B_256) cfg=2.0 ;; B_384) cfg=2.25 ;; L_384) cfg=2.0 ;; 3B_384) cfg=1.65 ;; *) cfg=1.75 ;;
esac
[ "${what#*_}" = 256 ] && grid=16x16 || grid=24x24
[ -z "${VAL:-}" ] || $launch evaluate.py self-check --val "$VAL" --ref "$ref" --out "$out/self-check.json"
[ -f "$out/samples.npz" ] || $launch sample.py --vq vq_ds16_c2i.pt --gpt "c2i_$what.pt" --hub --grid $grid \
  --n 50000 --cfg-scale "$cfg" --size 256 --npz "$out/samples.npz" --out "$out/samples.png"
$launch evaluate.py gen --samples "$out/samples.npz" --ref "$ref" --out "$out/scores.json"
