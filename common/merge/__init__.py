"""Merging: recipes, mergekit, merge methods of ours."""
