#!/usr/bin/env bash
# Table 3: random and spatial at half of the image tokens, and trimmed_llama at K 0.15, and 0.20 for MMVP.
#
#     evaluation/lmms/scripts/table3.sh && python -m evaluation.lmms.table runs/Llama-3.2-11B-Vision-Instruct/*
#
# 3.2 GPU hours of an A100: computed from FLOPs and bytes,
# not measured, by `python -m evaluation.lmms.cost --table 3`, which says how.
set -euo pipefail
row="$(dirname "$0")/row.sh"
"$row" random 0.5
"$row" spatial 0.5
"$row" trimmed_llama 0.15
TASKS=${MMVP:-mmvp} "$row" trimmed_llama 0.20
