"""The utility layer under the training scripts: what is about GPUs, files or bytes. What stands in Algorithm 1 is in the scripts.

Rooms, each of which imports only from those before it: this folder (errors, files, flags, media), `parallel`, `models`, `embeddings`,
`rewards`, `evaluation`, `runs`, `report`. None imports a script or the shapes world.
"""
