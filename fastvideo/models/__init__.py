"""A model as it lies in a folder of diffusers' layout: whether it is the right one, its weights, its tokenizers.

What a network is given and how its output is read stands in the training scripts.
"""
