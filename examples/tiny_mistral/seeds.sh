#!/usr/bin/env bash
# The demo over several seeds, each with models of its own, and each row's mean over them ± standard error:
#
#   SEEDS="0 1 2 3" bash examples/tiny_mistral/seeds.sh
#
# Minutes a seed on 2 CPU cores. A seed whose results are in demo_seeds/ from before is not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."

export PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2}
KEPT=demo_seeds

directories=()
for seed in $SEEDS; do
    directories+=("$KEPT/seed_$seed")
    [[ -d $KEPT/seed_$seed ]] && continue
    SEED=$seed bash examples/tiny_mistral/run.sh
    mkdir -p "$KEPT/seed_$seed.part"
    cp demo/results*.json "$KEPT/seed_$seed.part/"
    mv "$KEPT/seed_$seed.part" "$KEPT/seed_$seed" # there only once it is whole
done
"$PYTHON" examples/tiny_mistral/seeds.py "${directories[@]}"
