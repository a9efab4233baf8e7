"""What merge_and_evaluate_7b.py alone uses, in reading order.

flags.py             its command line

merging
yaml_files.py        YAML files, read with suspicion
recipes.py           merge recipes: read, weights and paths set
recipe_paths.py      the models a recipe names, and their paths
recipe_checks.py     what of a recipe is refused, with mergekit's own definitions
streamed_methods.py  the methods that stream, their parameters, why a recipe does not
parameters.py        the value of every parameter, tensor by tensor
merging.py           open the models, choose the engine, say what a merge was made of
streaming.py         a streamed merge: planned from headers, one job
merge_tensor.py      one tensor of it: read, keep, sum, write
sums.py              the sums of a block, compiled
sum_inputs.py        what they are given: blocks, rules, torch's order of summation
budgets.py           what TIES keeps, DARE's factor
mergekit_engine.py   merge with mergekit what does not stream; what it dropped is refused
merge_methods.py     our masks as merge methods of mergekit
card.py              the model card

scoring
eval_recipes.py      eval recipes: read, checked
eval_settings.py     what their groups say about members
eval_tasks.py        the tasks they name
eval_machine.py      which device, which dtype
loadable.py          can transformers load what is to be scored
announcement.py      the line printed before a model is scored
eval_log.py          what lm-eval says, to a file
evaluation.py        score a model with lm-eval
items.py             every question's score
scores.py            the figures that people compare
leaderboard_v2.py    the second leaderboard's own figures
results.py           results files: put together, written, read
in_memory.py         candidates streamed into one loaded model
scoring.py           one model into one results file

comparing
rows.py              results files as rows to compare
statistics.py        paired differences and their p-values
verdicts.py          which row is better, in words
scores_picture.py    scores and differences, drawn
comparison.py        results side by side

which weight is best, which recipe
choices.py           what is tried, and its name
choosing.py          which tasks choose, what a result is worth
candidates.py        the merges they mean, how each is made
sweep.py             several candidates, the best kept
overview.py          a sweep at a glance
race_plan.py         which items a race scores when
race.py              who drops out of a race
race_tasks.py        what a race asks of lm-eval's tasks
racing.py            a race, batch by batch, resumable
search.py            CMA-ES over the weights
searching.py         a search, trial by trial, resumable
which_weight.py      what the flags ask: planned, priced, carried out
"""
