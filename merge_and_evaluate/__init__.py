"""What merge_and_evaluate_7b.py alone uses, in reading order.

yaml_files.py     YAML files, read warily
recipes.py        merge recipes: read, checked, weights set
streamed_methods.py  merge methods that stream, their parameters
parameters.py     values of every parameter, by tensor
sum_inputs.py     blocks, rules, torch's order of sums
sums.py           the sums of a block, compiled
budgets.py        what TIES keeps, DARE's factor
merging.py        merge by recipe with mergekit, check, publish
merge_methods.py  our masks as merge methods of mergekit
eval_recipes.py   eval recipes: read, checked
eval_tasks.py     the tasks they name
evaluation.py     score a model with lm-eval
scores.py         the figures that people compare
results.py        results files: put together, written, read
scoring.py        one model into one results file
sweep.py          several weights, the best kept
comparison.py     results side by side
overview.py       a sweep at a glance
"""
