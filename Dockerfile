# The versions of constraints.txt in one image, for machines with NVIDIA GPUs and without: docker build -t protoclip-scale .
# Not built by the tests, which only compare it with constraints.txt, pyproject.toml and apptainer.def.
FROM python:3.11-slim-bookworm

# DeepSpeed compiles its optimiser for CPU memory (zero3_offload); git tells environment.json the commit; without libibverbs NCCL would go over TCP.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/protoclip-scale
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY protoclip_scale protoclip_scale
RUN python -m pip install --no-cache-dir --constraint constraints.txt '.[cpu,minilm,s3,wordnet]'
COPY launch launch
COPY tools tools
COPY recipes recipes

# docker run --gpus all --shm-size 16g -v DATA:/data -v RUNS:/opt/protoclip-scale/runs protoclip-scale \
#     accelerate launch --num_processes 1 launch/pretrain.py --recipe recipes/demo.yaml --expect-ranks 1
CMD ["python", "launch/pretrain.py", "--help"]
