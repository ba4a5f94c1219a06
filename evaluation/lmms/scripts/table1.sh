#!/usr/bin/env bash
# Table 1: the full model, and trimmed_llama at the paper's values of K. SIZE=90B for the other half.
#
#     evaluation/lmms/scripts/table1.sh && python -m evaluation.lmms.table runs/Llama-3.2-11B-Vision-Instruct/*
#
# 6.4 GPU hours for 11B and 34 for 90B (three cards) of an A100: computed from FLOPs and bytes,
# not measured, by `python -m evaluation.lmms.cost --table 1`, which says how.
set -euo pipefail
size=${SIZE:-11B}
export MODEL=${MODEL:-meta-llama/Llama-3.2-$size-Vision-Instruct}
case $size in
    11B) keeps="0.25 0.20 0.15 0.10 0.05" ;;
    90B) keeps="0.25 0.15" ;;
    *) echo "SIZE is $size, but must be 11B or 90B" >&2; exit 2 ;;
esac
row="$(dirname "$0")/row.sh"
"$row" none 1.0
for keep in ${KEEPS:-$keeps}; do
    "$row" trimmed_llama "$keep"
done
