"""Results documents, as lm-eval and our summary leave them, without a model."""

import json
import math
from pathlib import Path

import numpy as np

from merge_and_evaluate.scores import summarize


def scored(name: str, values: dict[str, list], **changes) -> dict:
    """A results document with these items; `changes` replace parts of it."""
    results = {
        task: {"acc,none": float(np.mean(v)), "acc_stderr,none": float(np.std(v, ddof=1) / math.sqrt(len(v)))}
        for task, v in values.items()
    }
    document = {
        "results": results,
        "group_subtasks": {},
        "n-shot": dict.fromkeys(values, 5),
        "n-samples": {task: {"effective": len(v), "original": len(v)} for task, v in values.items()},
        "higher_is_better": {},
        "config": {"model_dtype": "torch.bfloat16", "limit": None, "model_args": {"pretrained": name}},
        **changes,
    }
    document["summary"] = {"name": name, **summarize(document)}
    document["provenance"] = {"batch_size": 8, "versions": {"lm_eval": "0.4.13"}}
    document["items"] = {
        task: {"doc": [f"{task[:4]}{i:012x}" for i in range(len(v))], "value": list(v), "gold": [None] * len(v)}
        for task, v in values.items()
    }
    return document


def save(**documents: dict) -> None:
    """A results file of each document, by its name, in the working directory."""
    for name, document in documents.items():
        Path(f"{name}.json").write_text(json.dumps(document))
