#!/usr/bin/env bash
# One row of a table: the paper's benchmarks with one method at one keep ratio.
#
#     evaluation/lmms/scripts/row.sh METHOD KEEP [OPTION=VALUE]...      (none 1.0: the full model)
#
# In the environment: MODEL (a folder or hub id), OUT (where the runs go), TASKS, BATCH, ARGS (further model
# arguments, as in ARGS='device=[cuda:0,cuda:1],quantize=int8'), and LMMS_ARGS, further options of lmms-eval.
# If it is stopped, the same command goes on after the last answer.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
method=$1 keep=$2
shift 2
model=${MODEL:-meta-llama/Llama-3.2-11B-Vision-Instruct}
options=$(IFS=,; echo "$*")
name=$(basename "$model")/$method-$keep${options:+-${options//,/-}}
out=${OUT:-runs}/$name
mkdir -p "$out"
args="model=$model,prune=$method,keep=$keep,record=$out/kept.jsonl"
[ -z "$options" ] || args+=",set=[$options]"
[ -z "${ARGS:-}" ] || args+=",$ARGS"
# The cache of answers is found again under a fixed name only.
LMMS_CACHE_RUN_ID=${name//[^A-Za-z0-9._-]/-} lmms-eval --model trimmed_llama --model_args "$args" \
    --include_path "$here/tasks" --tasks "${TASKS:-seedbench_image,mme,mmvp,llava_in_the_wild}" \
    --batch_size "${BATCH:-1}" --use_cache "$out/cache" --log_samples --output_path "$out" ${LMMS_ARGS:-}
