"""What merge_and_evaluate_7b.py alone uses, in reading order: merging, scoring, comparing, searching for the weight.

yaml_files.py        YAML files, read warily
recipes.py           merge recipes: read, checked, weights set
streamed_methods.py  methods that stream, their parameters, why a recipe does not
parameters.py        the value of every parameter, tensor by tensor
merging.py           open the models, choose the engine, say what it was made of
streaming.py         a streamed merge: planned from headers, one job
merge_tensor.py      one tensor of it: read, keep, sum, write
sums.py              the sums of a block, compiled
sum_inputs.py        what they are given: blocks, rules, torch's order of summation
budgets.py           what TIES keeps, DARE's factor
mergekit_engine.py   what does not stream, by mergekit; what it dropped is refused
merge_methods.py     our masks as merge methods of mergekit
card.py              the model card
eval_recipes.py      eval recipes: read, checked
eval_tasks.py        the tasks they name
evaluation.py        score a model with lm-eval
scores.py            the figures that people compare
results.py           results files: put together, written, read
scoring.py           one model into one results file
comparison.py        results side by side
overview.py          a sweep at a glance
sweep.py             several weights, the best kept
race_plan.py         which items a race scores when
race.py              who drops out of a race
search.py            CMA-ES over the weights
"""
