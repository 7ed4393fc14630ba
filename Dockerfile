# Image with the package and exactly the versions of requirements.lock.
#
#   docker build --tag agnews_dist .                                 torch for CUDA; needs only the driver of the host
#   docker build --tag agnews_dist --build-arg TORCH=cpu .           torch for CPUs, some gigabytes smaller
#   docker run --gpus all --shm-size 8g --volume "$PWD:/workspace" agnews_dist --config my.yaml
#
# The arguments of a container are those of launch/node.sh: the training's. COMMAND=evaluate starts another command. The user is
# not root and may be any number. It works in /workspace, which is its HOME as well: mount a directory that it can write.
ARG PYTHON=3.11
FROM docker.io/library/python:${PYTHON}-slim-bookworm

# g++: torch.compile and DeepSpeed build code at run time. Debian removes old versions, so that none can be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Before the code, so that a change of the code does not install everything again.
WORKDIR /agnews_dist
COPY pyproject.toml requirements.lock README.md ./
COPY configs configs/
COPY launch/env.sh launch/
COPY agnews_dist/__init__.py agnews_dist/
ARG TORCH=cuda
RUN case "$TORCH" in \
        cuda) ;; \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        *) echo "error: TORCH=$TORCH: must be cuda or cpu. Set --build-arg TORCH=cpu, for example." >&2; exit 1 ;; \
    esac \
    && PIP_NO_CACHE_DIR=1 bash launch/env.sh
COPY . .
RUN .venv/bin/python -m compileall -q agnews_dist \
    && mkdir --mode=1777 /workspace

# A number that is not in /etc/passwd has no name, which some libraries ask for.
ENV PATH=/agnews_dist/.venv/bin:$PATH HOME=/workspace USER=agnews LOGNAME=agnews
WORKDIR /workspace
USER 1000:0
ENTRYPOINT ["/agnews_dist/launch/node.sh"]
