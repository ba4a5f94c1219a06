#!/usr/bin/env bash
# The same rows for every method, from the first cross-attention layer on: METHODS at KEEPS. Those that need
# something learned for the model at hand, as quecc, attention_predictor and the guide of sgl, are not among them.
#
#     METHODS=coreset,divprune KEEPS="0.25 0.10" evaluation/lmms/scripts/methods.sh
#     python -m evaluation.lmms.table runs/Llama-3.2-11B-Vision-Instruct/*
#
# 82 GPU hours for all, 1.1 for each of the 77 rows of an A100: computed from FLOPs and bytes,
# not measured, by `python -m evaluation.lmms.cost --table methods`, which says how.
set -euo pipefail
row="$(dirname "$0")/row.sh"
methods=${METHODS:-coreset,trimmed_llama,fastv,elastic_cache,csp,aircache,zipvl,topv,mint,divprune,cdpruner,visionzip,prumerge,tome,scope,attention_matching,random,spatial,downsample}
"$row" none 1.0
for method in ${methods//,/ }; do
    for keep in ${KEEPS:-0.50 0.25 0.10 0.05}; do
        "$row" "$method" "$keep"
    done
done
