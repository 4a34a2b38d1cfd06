#!/bin/bash
# What only a GPU can tell, in at most fourteen minutes: tests, compute-sanitizer, layers and losses, whole runs.
#
#     bash benchmarks/on_gpu.sh FOLDER [PART ...]
#
# Each part has a limit in seconds, after which it is stopped and what it has measured stays. FOLDER gets a log of each
# and the results. `pip install '.[test]'` brings what tests need; peers that are not installed are named in the logs.
set -u
out=$(realpath -m "${1:?a folder for logs and results}")
shift
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
touch "$out/begin"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
failed=0

part() { # name, seconds, lines to show of the log's end, command
    local name=$1 limit=$2 lines=$3 begin=$SECONDS code
    shift 3
    [[ ${parts[*]} == *" $name "* ]] || return 0
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    ((code)) && failed=1
    echo "== $name: exit $code after $((SECONDS - begin)) s of $limit (124: stopped by the limit)"
    tail -n "$lines" "$out/$name.log"
}

parts=(" ${*:-kernels suite memcheck racecheck losses runs compiled} ")
sanitize=(compute-sanitizer --error-exitcode 9 --tool)
some=(python -m pytest -q -x -m gpu tests/ops/test_gpu.py -k "bfloat16 or graph or stream")
runs=(python benchmarks/gpu_training.py --repeats 1)
part kernels 60 3 python setup.py -q build_ext --inplace
part suite 150 15 python -m pytest -q -m gpu tests
part memcheck 60 5 "${sanitize[@]}" memcheck "${some[@]}"
part racecheck 60 5 "${sanitize[@]}" racecheck "${some[@]}"
part losses 170 80 python benchmarks/gpu.py --repeats 5 --sizes 32768 4096 16384 65536 --dims 768 512 1024
part runs 210 20 "${runs[@]}" --without "Trainer, compiled"
part compiled 100 12 "${runs[@]}" --models vit-l-14 --scenarios lora
find benchmarks/results -name 'gpu*.json' -newer "$out/begin" -exec cp {} "$out" \;
exit $failed
