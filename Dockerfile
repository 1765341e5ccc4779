# Two images:
#   docker build --target cpu -t polylogit:cpu .   CPU engine and the demo; `docker run -p 8000:8000 polylogit:cpu` answers
#   docker build --target gpu -t polylogit:gpu .   upstream vLLM image of the version that the adapter supports
# Both run as uid 2000, gid 0, and write only to /tmp and /var/cache/polylogit, so the root file system can be read-only.
# pip's configuration, where a build needs one: --secret id=pip,src=pip.conf
ARG CPU_BASE=docker.io/library/python:3.11-slim-bookworm
ARG GPU_BASE=docker.io/vllm/vllm-openai:v0.32.0

# tini: PID 1 that passes signals on and reaps; the static build runs on any base.
FROM ${CPU_BASE} AS tini
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

# The project's own wheel; pure Python, the same for both images.
FROM ${CPU_BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY gate gate
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# --- GPU -------------------------------------------------------------------------------------------------------------
FROM ${GPU_BASE} AS gpu-build
COPY --from=wheel /wheels /wheels
# A virtual environment that sees the image's own packages: vLLM and what it brought stay exactly as they are.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --system-site-packages --without-pip /opt/polylogit \
    && python3 -m pip --python /opt/polylogit/bin/python install --no-cache-dir /wheels/*.whl

FROM ${GPU_BASE} AS gpu
USER root
# vLLM's image has this user already; an older one may not.
RUN getent passwd 2000 || useradd --uid 2000 --gid 0 --no-create-home --home-dir /var/cache/polylogit polylogit; \
    install -d -o 2000 -g 0 -m 0770 /var/cache/polylogit
COPY --from=tini /usr/bin/tini-static /usr/bin/tini
COPY --from=gpu-build /opt/polylogit /opt/polylogit
COPY docker/healthcheck.py /opt/polylogit/
ENV PATH=/opt/polylogit/bin:$PATH \
    HOME=/var/cache/polylogit \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/polylogit/torchinductor \
    NUMBA_CACHE_DIR=/var/cache/polylogit \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="polylogit" \
      org.opencontainers.image.description="OpenAI-compatible server that fuses several LLMs token by token; vLLM on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 2000:0
# What vLLM, Triton, torch and Numba compile. A volume, so that it can be written where the root file system cannot.
VOLUME /var/cache/polylogit
WORKDIR /etc/polylogit
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "/opt/polylogit/healthcheck.py"]
ENTRYPOINT ["tini", "--", "polylogit"]
CMD ["serve", "/etc/polylogit/polylogit.yaml", "--host", "0.0.0.0"]

# --- CPU -------------------------------------------------------------------------------------------------------------
FROM ${CPU_BASE} AS cpu-build
# binutils strips symbols, here only.
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/requirements/cpu.txt /tmp/cpu.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/polylogit \
    && pip --python /opt/polylogit/bin/python install --no-cache-dir --no-deps --no-compile --index-url ${TORCH_INDEX} ${TORCH} \
    && pip --python /opt/polylogit/bin/python install --no-cache-dir --no-deps --no-compile -r /tmp/cpu.txt
COPY docker/slim.sh /tmp/slim.sh
RUN sh /tmp/slim.sh /opt/polylogit

# A layer of its own, a megabyte: an upgrade that changes no dependency sends only this.
FROM cpu-build AS cpu-app
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/polylogit/bin/python install --no-cache-dir --no-deps --no-index --root /app /wheels/*.whl

FROM ${CPU_BASE} AS cpu
# vLLM's kernels link libnuma. No installer in the image that runs.
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip \
        /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/site-packages/setuptools* \
        /usr/local/lib/python3*/site-packages/wheel* \
    && useradd --uid 2000 --gid 0 --no-create-home --home-dir /var/cache/polylogit polylogit \
    && install -d -o 2000 -g 0 -m 0770 /var/cache/polylogit
COPY --from=tini /usr/bin/tini-static /usr/bin/tini
COPY --from=cpu-build /opt/polylogit /opt/polylogit
COPY deploy/demo /usr/share/polylogit/demo
COPY docker/healthcheck.py /opt/polylogit/
COPY --from=cpu-app /app /
ENV PATH=/opt/polylogit/bin:$PATH \
    HOME=/var/cache/polylogit \
    NUMBA_CACHE_DIR=/var/cache/polylogit \
    PYTHONPYCACHEPREFIX=/var/cache/polylogit/python \
    PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="polylogit" \
      org.opencontainers.image.description="OpenAI-compatible server that fuses several LLMs token by token; CPU, with a demo" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 2000:0
# What Python, vLLM, torch and Numba compile. A volume, so that it can be written where the root file system cannot.
VOLUME /var/cache/polylogit
WORKDIR /etc/polylogit
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "/opt/polylogit/healthcheck.py"]
ENTRYPOINT ["tini", "--", "polylogit"]
CMD ["serve", "/usr/share/polylogit/demo/polylogit.yaml", "--host", "0.0.0.0"]
