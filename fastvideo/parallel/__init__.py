"""Many processes as one: who they are and who is lost, sequence parallelism and ZeRO, what DeepSpeed holds in shards, the moving average.

Nothing here knows of prompts, rewards or run folders.
"""
