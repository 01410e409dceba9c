"""The facts of each model, written once: evaluation, benchmarks, shapes/untrained.py and the tests read them here.

A new model is a module here with a FAMILY, and its name in the dictionary below.
"""

from fastvideo.models.families import flux, hunyuan, sd, skyreels, wan
from fastvideo.models.families.family import Family

FAMILIES: dict[str, Family] = {  # by what NAME is in train_grpo_NAME.py
    "sd": sd.FAMILY,
    "flux": flux.FAMILY,
    "hunyuan": hunyuan.FAMILY,
    "skyreels": skyreels.FAMILY,
    "wan": wan.FAMILY,
}
