#!/usr/bin/env bash
# From ordinary packages to the shipped checkpoint, one script: fetch, render, train the tokenizer, train the predictor,
# judge, pack. Every step resumes where it was stopped; run it again after a kill.
#
#   train/pictures.sh RUN            on a CPU: two processes of one thread each, overnight
#   DEVICE=gpu train/pictures.sh RUN  on one GPU: the larger YAMLs, minutes
#
# On a CPU 64 concepts are learned first, from nothing; then 300, from those weights, while the decoder alone goes on.
set -euo pipefail
run=${1:?usage: train/pictures.sh RUN}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$run"

[ -e "$run/packages/fetched" ] || { "$here/tools/fetch_pictures.sh" "$run/packages"; touch "$run/packages/fetched"; }
mmdlm data build pictures "$run/pictures" --source "$run/packages"

if [ "${DEVICE:-cpu}" = gpu ]; then
  launch="accelerate launch --num_processes 1 --mixed_precision bf16"
  tokenizer="$run/tokenizer" predictor=pictures_gpu
  $launch "$here/tokenizers/train_lfq.py" --config pictures_f8_gpu data="$run/pictures" out="$tokenizer"
  begin=tokenizer="$tokenizer/visual_tokenizer"
else
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
  launch="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"
  tokenizer="$run/decoder" predictor=pictures_300
  tokenize() { $launch "$here/tokenizers/train_lfq.py" --config "$1" data="$run/pictures" "${@:2}"; }
  learn() { $launch "$here/train/supervised.py" --config "$1" data="$run/pictures" "${@:2}"; }
  tokenize pictures_f4 out="$run/tokenizer"
  tokenize pictures_f4_decoder init_from="$run/tokenizer/visual_tokenizer" train_batch_size=2 out="$tokenizer"
  learn pictures tokenizer="$run/tokenizer/visual_tokenizer" out="$run/first"
  learn pictures_longer init_from="$run/first/pipeline" out="$run/second"
  [ -e "$run/grown" ] || mmdlm run train/grow model="$run/second/pipeline" data="$run/pictures" concepts=300 out="$run/grown"
  begin=init_from="$run/grown"
fi
$launch "$here/train/supervised.py" --config $predictor data="$run/pictures" "$begin" out="$run/predictor"
mmdlm run train/ship model="$run/predictor/pipeline" tokenizer="$tokenizer/visual_tokenizer" out="$run/shipped" \
  card="$here/train/pictures_card.md"
mmdlm run eval/pictures model="$run/shipped" recipe=$predictor data="$run/pictures" out="$run/judged"
