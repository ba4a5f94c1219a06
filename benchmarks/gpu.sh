#!/usr/bin/env bash
# What a GPU makes of it: `benchmarks/gpu.sh` on one H100 or H200, under 10 minutes, nothing to download.
#
# Random weights of 11B's shape. Three measurements, each within a time of its own, and the longest, which compiles
# six graphs, in all that is left; what is known when a time runs out is in its JSON.
# `benchmarks/gpu.sh --rehearse FOLDER` runs the same on the CPU with the smallest shape and writes to FOLDER: it
# shows that everything runs, and its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "")
        out=benchmarks/results
        size=(--shape 11b --device cuda --repeat 3 --new-tokens 16)
        batches=1,8,32
        table2=1,4,8,16,32
        slice=()
        ;;
    --rehearse)
        out=${2:?give a folder: benchmarks/gpu.sh --rehearse FOLDER}
        mkdir -p "$out" || exit 2
        size=(--shape tiny --device cpu --repeat 1 --new-tokens 3 --prompt-tokens 12)
        batches=1,2
        table2=1,2
        slice=(--layers 4)              # compiles in half the time
        ;;
    *)
        echo "error: unknown argument $1: use benchmarks/gpu.sh, or benchmarks/gpu.sh --rehearse FOLDER" >&2
        exit 2
        ;;
esac

failed=0

measure() {     # seconds, file, options of benchmark.py
    local seconds=$1 file=$2
    shift 2
    echo "== $file" >&2
    timeout "$seconds" python benchmark.py "${size[@]}" "$@" --json "$out/$file" || {
        failed=$?
        echo "error: $file: exit code $failed (124: its $seconds s are over)" >&2
    }
}

# Encoding and the first token, beside transformers.
measure 90 gpu-11b-transformers.json --tiles 1,4 --against transformers
# Table 2 of arXiv 2504.00557.
measure 90 gpu-11b-table2.json --preset table2 --new-tokens 1 --batch $table2 --keep 0.396 \
    --prune trimmed_llama,coreset
# Decoding against the memory ceiling: bf16, int8 and int4, plain and compiled, whole and pruned.
measure $((580 - SECONDS)) gpu-11b-decode.json "${slice[@]}" --tiles 4 --batch $batches --compile \
    --quantize int8,int4 --prune trimmed_llama,coreset --keep 0.1
exit $failed
