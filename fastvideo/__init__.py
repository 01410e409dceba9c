"""The utility layer under the training scripts: what is about GPUs, files or bytes. What stands in Algorithm 1 is in the scripts."""
