#!/usr/bin/env bash
# The README's games by ILQL: data, behaviour cloning by sft.py, ILQL from there, and games played with each.
#     PYTHON=.venv/bin/python benchmarks/games.sh maze|wordle SEED OUT_FOLDER [WORDS_FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python=${PYTHON:-python} game=$1 seed=$2 out=$3 words=${4:-../shared/data/games/wordle_official_400.txt}
mkdir -p "$out"
common=(--dataset "$out/rows.jsonl" --eval-prompts "$out/prompts.jsonl" --stop $'\n' --seed "$seed")
if [ "$game" = maze ]; then
    common+=(--history 1 --max-length 64 --max-new-tokens 8 --metric examples/maze.py:accuracy --eval-samples 8)
    "$python" examples/maze.py data "$out/rows.jsonl" --games 1200 --seed 1
    "$python" examples/maze.py prompts "$out/prompts.jsonl"
    "$python" sft.py --from-config examples/gpt2-tiny.json --train-tokenizer 400 --batch-size 128 --micro-batch-size 64 \
        --learning-rate 1e-3 --warmup-steps 20 --max-steps 300 --eval-every 300 --num-eval-rows 20 "${common[@]}" \
        --output-dir "$out/cloned"
    "$python" ilql.py --model "$out/cloned/model" --batch-size 64 --micro-batch-size 64 --learning-rate 3e-4 \
        --warmup-steps 20 --normalize-rewards none --tau 0.99 --cql-scale 0.5 --target-rate 0.05 --epochs 4 \
        --eval-every 500 --beta 0 4 16 "${common[@]}" --output-dir "$out/ilql"
    "$python" examples/maze.py play "$out/cloned/model" --beta 0
    "$python" examples/maze.py play "$out/ilql/model" --beta 0 4 16 64
else
    common+=(--max-length 96 --max-new-tokens 12 --metric examples/wordle.py:consistent --eval-samples 64)
    "$python" examples/wordle.py data "$out/rows.jsonl" --words "$words" --games 100000 --seed 1
    "$python" examples/wordle.py prompts "$out/prompts.jsonl"
    "$python" sft.py --from-config examples/gpt2-tiny.json --train-tokenizer 320 --batch-size 128 --micro-batch-size 64 \
        --learning-rate 2e-3 --warmup-steps 20 --eval-every 200 --num-eval-rows 200 --held-out 0.01 "${common[@]}" \
        --output-dir "$out/cloned"
    "$python" ilql.py --model "$out/cloned/model" --batch-size 64 --micro-batch-size 64 --learning-rate 3e-4 \
        --warmup-steps 20 --normalize-rewards none --tau 0.8 --cql-scale 0.01 --target-rate 0.05 --max-steps 1500 \
        --eval-every 500 --beta 0 4 16 "${common[@]}" --output-dir "$out/ilql"
    "$python" examples/wordle.py play "$out/cloned/model" --words "$words" --beta 0
    "$python" examples/wordle.py play "$out/ilql/model" --words "$words" --beta 0 4 16 32
fi
