# The service as an image: docker build -t chestct . && docker run --rm -p 127.0.0.1:7860:7860 chestct
# The model in the package is inside; nothing is downloaded when it starts. See docs/deploy.md for the rest.

# Pin it by digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Where torch comes from beside the usual index: the address of the CPU wheels saves some gigabytes.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt requirements-serve.txt ./
RUN python -m pip --python /opt/venv install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    -c constraints.txt -r requirements-serve.txt
WORKDIR /app
COPY serve.py ./
COPY conf conf
COPY chestct chestct
# The service runs as a user who may write nothing, and has to be able to read everything.
RUN chmod -R a+rX . && python -m compileall -q chestct serve.py

# docker build --target mlflow: the tracking server of compose.yaml.
FROM ${BASE} AS build-mlflow
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt ./
RUN python -m pip --python /opt/venv install -c constraints.txt mlflow

FROM ${BASE} AS mlflow
RUN useradd --no-create-home --uid 10001 chestct && install -d -o chestct /data
COPY --from=build-mlflow /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /data
USER 10001
VOLUME /data
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "2", \
    "--backend-store-uri", "sqlite:////data/mlflow.db", "--artifacts-destination", "/data/artifacts"]

# docker build --target train: experiments, in a folder that is mounted at /work.
FROM ${BASE} AS build-train
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['dicom'], sep='\n')" > requirements.txt \
    && python -m pip --python /opt/venv install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    -c constraints.txt -r requirements.txt
WORKDIR /app
COPY hydra_plugins hydra_plugins
COPY conf conf
COPY chestct chestct
RUN chmod -R a+rX . && python -m compileall -q .

FROM ${BASE} AS train
RUN useradd --no-create-home --uid 10001 chestct && install -d -o chestct /work
COPY --from=build-train /opt/venv /opt/venv
COPY --from=build-train /app /app
# MLflow looks for git, which is not there, and for the name of whoever `docker run -u` names, and would say so.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp USER=chestct PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    GIT_PYTHON_REFRESH=quiet MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /work
USER 10001
VOLUME /work
ENTRYPOINT ["python", "-m", "chestct"]
CMD ["train"]

FROM ${BASE} AS serve
RUN useradd --no-create-home --uid 10001 chestct && install -d -o chestct /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# Uploads and whatever else is written goes to /tmp and, with monitor.enabled=true, to /data. With more arenas glibc
# keeps what large images took.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MALLOC_ARENA_MAX=2
WORKDIR /app
USER 10001
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
ENTRYPOINT ["python", "serve.py", "serve.host=0.0.0.0", "monitor.path=/data/monitor.sqlite"]
