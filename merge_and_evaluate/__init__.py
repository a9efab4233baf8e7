"""What merge_and_evaluate_7b.py alone uses, in reading order.

yaml_files.py     YAML files, read warily
recipes.py        merge recipes: read, checked, weights set
merging.py        merge by recipe with mergekit, check, publish
merge_methods.py  our masks as merge methods of mergekit
eval_recipes.py   eval recipes: read, checked
eval_tasks.py     the tasks they name
evaluation.py     score a model with lm-eval
scores.py         the figures that people compare
results.py        results files: put together, written, read
scoring.py        one model into one results file
sweep.py          several weights, the best kept
race_plan.py      which items a race scores when
race.py           who drops out of a race, when it ends
search.py         which weights to try next (CMA-ES)
comparison.py     results side by side
overview.py       a sweep at a glance
"""
