# For GPU hosts. Never built by us: there is no GPU and no Docker where this is tested.
#   docker build -t grpo . && docker run --gpus all --ipc host -v /data:/data -it grpo
# On SLURM by Pyxis or Apptainer: docs/clusters.md.
# CUDA 13, as torch 2.13 from PyPI; the host needs a driver of 580 or newer.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /grpo
# The requirements first, so that a change of the code does not install them again.
COPY requirements.txt requirements-gpu.txt ./
COPY scripts/setup.sh scripts/
RUN bash scripts/setup.sh requirements.txt
ENV PATH=/grpo/.venv/bin:$PATH
# flash-attn is optional: docker build --build-arg FLASH_ATTN=1, which compiles for an hour or so.
ARG FLASH_ATTN=
RUN if [ -n "$FLASH_ATTN" ]; then pip install --no-cache-dir ninja packaging && MAX_JOBS=8 pip install --no-cache-dir --no-build-isolation -r requirements-gpu.txt; fi
COPY . .
