# syntax=docker/dockerfile:1
# One actor: an engine, its graders, one connection. From the top of the checkout:
#   docker build -f docker/actor.Dockerfile -t isentrope-actor .                             torch engine, CPU
#   docker build -f docker/actor.Dockerfile --build-arg VARIANT=gpu -t isentrope-actor .     vLLM, NVIDIA GPUs
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL may be given as build arguments: pip reads them, the image does not keep them.

ARG PYTHON=3.11.13
FROM python:${PYTHON}-bookworm AS build
ARG VARIANT=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/isentrope
ENV PATH=/opt/isentrope/bin:$PATH
WORKDIR /src
# The largest layer changes only with the versions.
COPY constraints.txt ./
RUN pip install "$(grep '^torch==' constraints.txt)" "$(grep '^transformers==' constraints.txt)"
COPY pyproject.toml README.md ./
COPY common common
COPY actor actor
COPY learner learner
RUN case "$VARIANT" in \
        cpu) extras=graders ;; \
        gpu) extras=graders,vllm ;; \
        *) echo "VARIANT=$VARIANT: expected cpu or gpu" >&2; exit 2 ;; \
    esac \
    && pip install -c constraints.txt ".[$extras]"

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/isentrope /opt/isentrope
# Anybody may write there: the container runs as whoever owns the keys, and a named volume begins as a copy.
RUN install -d -m 1777 /weights /models /recipes
ENV PATH=/opt/isentrope/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    ISENTROPE_MODELS=/models
WORKDIR /tmp
USER 1000:1000
# It lives when it says so in Redis: compose.yaml and k8s/ ask that way, for they know where Redis is.
HEALTHCHECK --interval=30s --timeout=20s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os; os.kill(1, 0)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["isentrope", "actor"]
CMD ["--help"]
