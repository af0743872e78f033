#!/usr/bin/env bash
# From ordinary packages to the shipped checkpoint, one script: fetch, render, train the tokenizer, train the predictor,
# judge, pack. Every step resumes where it was stopped; run it again after a kill.
#
#   train/pictures.sh RUN            on a CPU: two processes of one thread each, overnight
#   DEVICE=gpu train/pictures.sh RUN  on one GPU: the larger YAMLs, minutes
set -euo pipefail
run=${1:?usage: train/pictures.sh RUN}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$run"

if [ "${DEVICE:-cpu}" = gpu ]; then
  launch="accelerate launch --num_processes 1 --mixed_precision bf16"
  tokenizer=pictures_f8_gpu predictor=pictures_gpu
else
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
  launch="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"
  tokenizer=pictures_f4 predictor=pictures
fi

[ -e "$run/packages/fetched" ] || { "$here/tools/fetch_pictures.sh" "$run/packages"; touch "$run/packages/fetched"; }
mmdlm data build pictures "$run/pictures" --source "$run/packages"
$launch "$here/tokenizers/train_lfq.py" --config $tokenizer data="$run/pictures" out="$run/tokenizer"
$launch "$here/train/supervised.py" --config $predictor data="$run/pictures" \
  tokenizer="$run/tokenizer/visual_tokenizer" out="$run/predictor"
mmdlm run train/ship model="$run/predictor/pipeline" out="$run/shipped" card="$here/train/pictures_card.md"
mmdlm run eval/pictures model="$run/shipped" recipe=$predictor data="$run/pictures" out="$run/judged"
