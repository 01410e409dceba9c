"""Prompts, and the cache of their embeddings: prompt files, text encoders, the files of a cache and whose work they are.

Training reads a cache and runs no text encoder; nothing here knows of rewards or runs.
"""
