#!/usr/bin/env bash
# The whole chain on small real models, as the README shows it: make demo
# Writes models/tiny and demo/ afresh. Minutes on 2 CPU cores, both of which are used; no network.
# SEED=1 make demo trains other models; examples/tiny_mistral/seeds.sh does that for several seeds and averages.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
TINY=models/tiny
RECIPES=examples/tiny_mistral/recipes
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # a second thread gains nothing with models this small
# Training adds in another order on a processor with AVX-512, and the figures would not be the README's.
if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then
    export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
fi
WEIGHTS="0.4 0.6 0.8 1.0 1.2 1.4"

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

# Shows a command the way one would type it, one flag a line, then runs it; progress bars go to demo/run.log.
run() {
    local line="\$ python" word status
    for word in "$@"; do
        [[ $word == --* ]] && line+=$' \\\n     '
        [[ $word == *" "* ]] && word="\"$word\""
        line+=" $word"
    done
    printf '\n%s\n' "$line"
    "$PYTHON" "$@" 2>>demo/run.log || { status=$?; tail -n 5 demo/run.log >&2; exit $status; }
}

extract() { # topic
    run extract_task_vector_7b.py --finetuned_model_path $TINY/"$1" \
        --base_model_path $TINY/base-float16 --save_path $TINY/task_vector_"$1"
}

prune() { # row, flags
    run prune_task_vector_7b.py \
        --task_vector_path1 $TINY/task_vector_countries --task_vector_path2 $TINY/task_vector_elements "${@:2}" \
        --save_directory1 $TINY/"$1"_countries --save_directory2 $TINY/"$1"_elements
}

score() { # row, model
    run merge_and_evaluate_7b.py --eval_only --save_path ./$TINY/"$2" --name "$1" \
        --eval_recipe $RECIPES/evaluate.yml --output_path demo/results_"$2".json
}

merge() { # row, recipe, results
    run merge_and_evaluate_7b.py --recipe $RECIPES/"$2".yml --save_path ./$TINY/merged_"$2" --name "$1" \
        --eval_recipe $RECIPES/evaluate.yml --output_path demo/"$3".json \
        --race --weights $WEIGHTS --choose_on tiny_val
}

rm -rf $TINY demo
mkdir -p demo

say "0. The models: a base that half knows two sets of facts, two fine-tuned ones that learned one each"
run examples/tiny_mistral/make_models.py --save_path $TINY --seed "${SEED:-0}"

say "1. Convert dtype"
run convert_dtype.py --model_path $TINY/base --save_path $TINY/base-float16

say "2. Extract the task vectors"
extract countries
extract elements

# Half of the rows are made meanwhile on the second core; what that prints is shown when it is done.
meanwhile() {
    score "base" base-float16
    merge "task arithmetic" task_arithmetic results_task_arithmetic
    merge "TIES" ties results_ties
    prune magnitude --sparsity_level 0.75 --pruning_method magnitude
    merge "TA + magnitude" magnitude results_magnitude
}
meanwhile >demo/meanwhile.txt 2>&1 &
OTHER=$!
# Stopped or failed: the other core's command first, whose shell then ends by itself.
trap 'pkill -P $OTHER || true; kill $OTHER 2>/dev/null || true' EXIT

say "3. Prune them to a quarter: CABS, and at random and rescaled (DARE)"
prune cabs --n 64 --m 256 --pruning_method nm
prune dare --sparsity_level 0.75 --pruning_method random --rescale --seed 0

say "4. Merge and evaluate: each method's λ by a race on the validation questions, scored on the test questions"
score "fine-tuned on countries" countries
score "fine-tuned on elements" elements
merge "TA + DARE" dare results_dare
merge "TIES + DARE" ties_dare results_ties_dare
merge "CABS" cabs results

say "Meanwhile: the other rows"
status=0
wait $OTHER || status=$?
trap - EXIT
cat demo/meanwhile.txt
((status == 0)) || exit "$status"

say "All rows"
run merge_and_evaluate_7b.py --plot_path demo/comparison.png --against "task arithmetic" --compare \
    demo/results_{base-float16,countries,elements,task_arithmetic,magnitude,dare,ties,ties_dare}.json demo/results.json

say "λ of each method, and what choosing it took"
run examples/tiny_mistral/seeds.py demo

say "Where everything is"
cat <<'END'
the table as a picture      demo/comparison.png
CABS, all figures           demo/results.json (each row has its own: demo/results_*.json)
CABS, score against λ       demo/results_sweep.png, .csv; item by item: demo/results_race.json
what pruning kept           models/tiny/cabs_elements/prune_report.json
the merged model            models/tiny/merged_cabs
progress and warnings       demo/run.log

What the figures do and do not show: examples/tiny_mistral/README.md
END
