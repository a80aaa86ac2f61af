#!/usr/bin/env bash
# LlamaGen's text-conditional XL: bash runs/text_to_image.sh stage1.jsonl stage2.jsonl
# Stage 1 at 256 pixels (16x16 codes), stage 2 at 512 (32x32) from its weights; captions as features of FLAN-T5-XL, 120
# tokens; lr 1e-4, batch 256.
# Not run here. LlamaGen trained stage 1 on 50M images of LAION-COCO and stage 2 on 10M images of its own, and reports
# neither steps, time nor memory: STEPS is ours. Weights, gradients and AdamW take 11.6 GiB a GPU; activations come on top.
# VQ names the tokenizer (default: LlamaGen's), T5 the folder of google/flan-t5-xl, GPUS how many there are, PYTHON the
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
vq=${VQ:-vq_ds16_t2i.pt}
t5=${T5:-flan-t5-xl}
pairs=("${1:-stage1.jsonl}" "${2:-stage2.jsonl}")
launch="$python -m torch.distributed.run --standalone --nproc_per_node=${GPUS:-8} --"

for stage in 1 2; do
  pixels=$((256 * stage))
  codes=out/text_codes_$pixels
  out=out/text_stage$stage
  [ $stage = 1 ] && from=(--preset XL --cond-rope zero) || from=(--init out/text_stage1/gpt.pt)
  [ -f "$codes/result.json" ] || $launch encode.py --vq "$vq" --hub --data "${pairs[stage - 1]}" --size "$pixels" \
    --crops center --text t5 --t5 "$t5" --text-length 120 --workers 12 --out "$codes"
  $launch train_gpt.py "${from[@]}" --vq "$vq" --hub --codes "$codes" --max-steps "${STEPS:-500000}" --batch-size 256 \
    --lr 1e-4 --eval-every 10000 --picture-every 10000 --save-every 5000 --resume auto --out "$out"
  $python sample.py --vq "$vq" --hub --gpt "$out/gpt.pt" --t5 "$t5" --cfg-scale 7.5 --n 4 --out "$out/fox.png" \
    --text "a red fox in the snow"
done
