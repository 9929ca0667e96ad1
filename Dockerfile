# syntax=docker/dockerfile:1
# CPU by default. For an NVIDIA card (see docker-compose.yml): CUDA images as bases and LMWEB_GPU=cuda.
ARG BUILD_BASE=python:3.11-slim-bookworm
ARG RUN_BASE=python:3.11-slim-bookworm

FROM ${BUILD_BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake git ca-certificates \
    && (command -v python3 || apt-get install -y --no-install-recommends python3) \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG LMWEB_GPU=cpu
# The image may run on another machine than the one that builds it: no instructions beyond AVX2.
ARG CMAKE_ARGS=-DGGML_NATIVE=OFF
COPY requirements requirements
COPY lmweb/__init__.py lmweb/env.py lmweb/bootstrap.py lmweb/
RUN LMWEB_GPU=${LMWEB_GPU} CMAKE_ARGS=${CMAKE_ARGS} python3 -m lmweb.bootstrap

FROM ${RUN_BASE} AS run
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && (command -v python3 || apt-get install -y --no-install-recommends python3) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home lmweb \
    && install -d -o lmweb -g lmweb -m 0700 /data
WORKDIR /app
COPY --from=build /app/.venv .venv
COPY . .
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LMWEB_DATA_DIR=/data
USER lmweb
VOLUME /data
EXPOSE 1234
ENTRYPOINT ["python3", "-m", "lmweb.supervisor.programs"]
CMD ["web"]
