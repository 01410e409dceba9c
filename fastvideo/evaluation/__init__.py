"""Evaluation: which prompts a benchmark has and how they are scored (benchmarks.py), and what may be said of the scores (statistics.py).

`evaluate.py` samples the pictures. Nothing of training may live here.
"""
