#!/usr/bin/env bash
# From ordinary packages to the shipped checkpoint, one script: fetch, render, train the tokenizer, train the predictor,
# judge, pack. Every step resumes where it was stopped; run it again after a kill.
#
#   train/pictures.sh RUN                    on a CPU: two processes of one thread each, overnight;
#                                            where there is a GPU, or with DEVICE=gpu: the larger YAMLs, minutes
#   PICTURES=DIR train/pictures.sh RUN       with drawings rendered elsewhere (35 MB); nothing is fetched
#
# Rendering needs npm, apt-get (tools/fetch_pictures.sh says what for) and pip install -e ".[data]".
# On a CPU 64 concepts are learned first, from nothing; then 300, from those weights. The decoder alone is trained longer.
set -euo pipefail
run=${1:?usage: train/pictures.sh RUN}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$run"

if [ -z "${PICTURES:-}" ]; then
  PICTURES="$run/pictures"
  [ -e "$run/packages/fetched" ] || { bash "$here/tools/fetch_pictures.sh" "$run/packages"; touch "$run/packages/fetched"; }
  mmdlm data build pictures "$PICTURES" --source "$run/packages"
fi

: "${DEVICE:=$(python -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}"
if [ "$DEVICE" = gpu ]; then
  launch="accelerate launch --num_processes 1 --mixed_precision bf16"
  tokenizer="$run/tokenizer" predictor=pictures_gpu
  $launch "$here/tokenizers/train_lfq.py" --config pictures_f8_gpu data="$PICTURES" out="$tokenizer"
  begin=tokenizer="$tokenizer/visual_tokenizer"
else
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
  launch="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"
  tokenizer="$run/decoder" predictor=pictures_300
  tokenize() { $launch "$here/tokenizers/train_lfq.py" --config "$1" data="$PICTURES" "${@:2}"; }
  learn() { $launch "$here/train/supervised.py" --config "$1" data="$PICTURES" "${@:2}"; }
  tokenize pictures_f4 out="$run/tokenizer"
  tokenize pictures_f4_decoder init_from="$run/tokenizer/visual_tokenizer" train_batch_size=2 out="$tokenizer"
  learn pictures tokenizer="$run/tokenizer/visual_tokenizer" out="$run/first"
  learn pictures_longer init_from="$run/first/pipeline" out="$run/second"
  [ -e "$run/grown" ] || mmdlm run train/grow model="$run/second/pipeline" data="$PICTURES" concepts=300 out="$run/grown"
  begin=init_from="$run/grown"
fi
$launch "$here/train/supervised.py" --config $predictor data="$PICTURES" "$begin" out="$run/predictor"
mmdlm run train/ship model="$run/predictor/pipeline" tokenizer="$tokenizer/visual_tokenizer" out="$run/shipped" \
  card="$here/train/pictures_card.md"
mmdlm run eval/pictures model="$run/shipped" recipe=$predictor data="$PICTURES" out="$run/judged"
