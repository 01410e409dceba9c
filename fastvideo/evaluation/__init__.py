"""Evaluation: what a benchmark is (benchmarks.py), what is still to be sampled (tasks.py, store.py), what may be said (statistics.py).

`evaluate.py` samples the pictures. Nothing of training may live here.
"""
