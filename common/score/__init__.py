"""Scoring: lm-eval, results files, sweeps, comparisons."""
