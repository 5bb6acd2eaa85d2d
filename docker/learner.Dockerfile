# syntax=docker/dockerfile:1
# The learner, one process a rank, and what watches it (`isentrope dash`, `status`, `audit`). From the top of the checkout:
#   docker build -f docker/learner.Dockerfile -t isentrope-learner .                             CPU
#   docker build -f docker/learner.Dockerfile --build-arg VARIANT=gpu -t isentrope-learner .     NVIDIA GPUs
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL may be given as build arguments: pip reads them, the image does not keep them.
# For VARIANT=cpu let them name an index of CPU builds of torch, or pip takes the CUDA build, which works as well.

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
        cpu | gpu) ;; \
        *) echo "VARIANT=$VARIANT: expected cpu or gpu" >&2; exit 2 ;; \
    esac \
    && pip install -c constraints.txt ".[data,graders,smollm2,tensorboard,wandb]" \
    && if [ "$VARIANT" = gpu ]; then python -c 'import sys, torch; sys.exit(not torch.version.cuda)'; fi

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/isentrope /opt/isentrope
# Anybody may write there: the container runs as whoever owns the keys, and a named volume begins as a copy.
RUN install -d -m 1777 /runs /weights /models /recipes
ENV PATH=/opt/isentrope/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    ISENTROPE_MODELS=/models
WORKDIR /tmp
USER 1000:1000
EXPOSE 5555 5556
HEALTHCHECK --interval=30s --timeout=20s --start-period=300s --retries=10 \
    CMD ["isentrope", "status", "/runs/run", "--alive", "learner"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["isentrope"]
CMD ["--help"]
