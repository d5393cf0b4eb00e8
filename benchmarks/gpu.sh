#!/bin/bash
# What only an NVIDIA GPU shows, in one run of at most eleven minutes:
#
#     bash benchmarks/gpu.sh FOLDER
#
# Errors of attention's kernels, block sizes, times with them beside plain XLA and cuDNN, evaluations
# of FLUX.1-lite-8B and its training step (fewer layers). FOLDER gets a file of JSON lines and a log
# of each. Needs jax with CUDA, flax, optax, chex, ml_collections and msgspec.
set -u
out=${1:?usage: bash benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=.92

part() {  # NAME, SECONDS at most, COMMAND
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.jsonl" 2> "$out/$name.log"
    echo "$name: exit status $?, $((SECONDS - begun)) s"
    cut -c 1-600 "$out/$name.jsonl"
    grep -v Warning "$out/$name.log" | tail -n 1 | cut -c 1-300
}

part accuracy 80 python3 benchmarks/attention.py --accuracy
part tune128 140 python3 benchmarks/attention.py --tune --repeats=3
part tune64 80 python3 benchmarks/attention.py --tune --repeats=3 --width=64
rows=$out/tune128.jsonl,$out/tune64.jsonl
part attention128 70 python3 benchmarks/attention.py --rows="$rows"
part attention64 50 python3 benchmarks/attention.py --rows="$rows" --width=64 --tokens=4352
part network 100 python3 benchmarks/network.py --pixels=1024,512
part step 110 python3 benchmarks/attention_memory.py --step --topology=here --layers=2,4
