# Video Lab runner. The wheels contain CUDA, so a slim base image is enough for GPU machines too. A compiler and
# Python's headers are in the image because Triton and torch.compile build kernels at run time.
#
#   docker build -t video-lab .                                  # for NVIDIA GPUs
#   docker build -t video-lab:cpu --build-arg EXTRA=cpu .        # without CUDA
#   tools/image.sh build video-lab:cpu --build-arg EXTRA=cpu     # without a docker engine
#
# Only syntax that buildah 1.28 supports too: no heredocs, no COPY --link.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The base image's release determines the versions; pinned versions would break the build at each security update.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ gcc libc6-dev python3 python3-dev python3-venv tini \
 && rm -rf /var/lib/apt/lists/*

# All users may write to /cache and /out, so that `--user` may be any uid. The caches of all libraries are in /cache.
RUN groupadd --gid 10001 video-lab \
 && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin video-lab \
 && install -d -m 1777 /cache /out \
 && install -d -m 0755 /models /app \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# EXTRA: gpu or cpu selects the onnxruntime. `gpu,svdq` adds the kernels of docs/svdquant.md and their older torch.
# TORCH_BACKEND: uv's name of a torch build; empty: CUDA for gpu, CPU for cpu.
ARG EXTRA=gpu
ARG TORCH_BACKEND=""

# Dependencies come before sources, so that a build after a changed source file takes seconds. A pip.conf may be passed
# as a build secret (a mirror, a certificate, local wheels); it does not stay in the image. 242 MB of unused files are
# removed from the GPU image: comfy-kitchen imports its kernels for AMD only with torch's ROCm build, and static
# archives (most of them CUPTI, from Triton's wheel) are only needed to link other programs.
COPY pyproject.toml /build/
COPY tools/install.py tools/pip_settings.py /build/tools/
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf,required=false \
    UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 \
    python /build/tools/install.py --extras "${EXTRA},demo,compare" --backend "${TORCH_BACKEND}" \
 && rm -rf /opt/venv/lib/python3*/site-packages/comfy_kitchen/backends/hip \
 && find /opt/venv -name '*.a' -delete

COPY LICENSE THIRD_PARTY.md entrypoint.py /app/
COPY manifests /app/manifests
COPY runner /app/runner
RUN python -m compileall -q /app/runner /app/entrypoint.py

# USER is set because torch reads the user's name, and the uid of --user may have no account.
ENV HOME=/cache \
    USER=video-lab \
    TMPDIR=/cache/tmp \
    VIDEO_LAB_CACHE=/cache/video-lab \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    VIDEO_LAB_MODELS=/models \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG REVISION=""
LABEL org.opencontainers.image.title="Video Lab runner" \
      org.opencontainers.image.description="Batch renderer for character animation: a manifest in, MP4s and records out" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-3.0-or-later" \
      org.opencontainers.image.revision="${REVISION}"

VOLUME ["/cache"]
WORKDIR /out
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--", "python", "/app/entrypoint.py"]
CMD ["--help"]
