#!/usr/bin/env bash
# Two games by ILQL: data, a small GPT-2 that reads their texts (sft.py), ILQL from there, and games played with it.
#     PYTHON=.venv/bin/python benchmarks/games.sh maze|wordle SEED OUT_FOLDER [WORDS_FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python=${PYTHON:-python} game=$1 seed=$2 out=$3 words=${4:-../shared/data/games/wordle_official_400.txt}
mkdir -p "$out"
reader=(--from-config examples/gpt2-tiny.json --dataset "$out/rows.jsonl" --format examples/formats.py:game
    --learning-rate 2e-3 --num-eval-rows 20 --num-eval-prompts 0 --seed "$seed" --output-dir "$out/read")
learner=(--model "$out/read/model" --dataset "$out/rows.jsonl" --normalize-rewards none --target-rate 0.05
    --warmup-steps 20 --batch-size 64 --micro-batch-size 64 --beta 0 4 16 --eval-prompts "$out/prompts.jsonl"
    --stop $'\n' --seed "$seed" --output-dir "$out/ilql")
if [ "$game" = maze ]; then
    "$python" examples/maze.py data "$out/rows.jsonl" --games 1200 --seed 1
    "$python" examples/maze.py prompts "$out/prompts.jsonl"
    "$python" sft.py "${reader[@]}" --train-tokenizer 400 --packing windows --max-length 128 --batch-size 8 \
        --epochs 3 --warmup-steps 20
    "$python" ilql.py "${learner[@]}" --history 1 --max-length 64 --max-new-tokens 8 --eval-samples 8 --eval-every 250 \
        --metric examples/maze.py:accuracy --learning-rate 1e-3 --tau 0.95 --awac-scale 0.05 --cql-scale 0.05 \
        --max-grad-norm 100 --epochs 24
    "$python" examples/maze.py play "$out/ilql/model" --beta 0 4 16 64
else
    "$python" examples/wordle.py data "$out/rows.jsonl" --words "$words" --games 100000 --seed 1
    "$python" examples/wordle.py prompts "$out/prompts.jsonl"
    "$python" sft.py "${reader[@]}" --train-tokenizer 320 --max-length 96 --batch-size 64 --micro-batch-size 64 \
        --epochs 6 --warmup-steps 50 --held-out 0.01 --eval-every 250 --max-steps 2000
    "$python" ilql.py "${learner[@]}" --max-length 96 --max-new-tokens 12 --eval-samples 64 --eval-every 500 \
        --metric examples/wordle.py:consistent --learning-rate 1e-3 --tau 0.8 --cql-scale 0.01 --max-steps 700 \
        --schedule constant
    "$python" examples/wordle.py play "$out/ilql/model" --words "$words" --beta 0 4 16 32
fi
