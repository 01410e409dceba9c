"""A run's folder and its life: checkpoints, metrics and pictures, guards, signals, and the run itself.

The method is not here: what is sampled, scored and learned stands in the training scripts.
"""
