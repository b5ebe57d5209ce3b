# An image for the nodes of a Ray cluster: `docker build -t outrider .` in the repository's root.
# torch's wheels bring CUDA; the machine brings the driver, and its container toolkit (NVIDIA's) puts it in.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes. procps, rsync, openssh-client: Ray's cluster launcher.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

# Dependencies stay in a layer of their own as long as these two files do: an outrider without modules asks for them.
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p src/outrider \
    && echo '__version__ = "0"' > src/outrider/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt '.[cluster]'

COPY configs configs
COPY kernels kernels
COPY workers workers
COPY cluster cluster
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall . \
    && cd / && rm -rf /build \
    && python -c "import outrider.cluster.serving.ray_serve"

RUN useradd --uid 1000 --create-home outrider \
    && mkdir /models \
    && chown outrider /models
USER 1000
WORKDIR /home/outrider
