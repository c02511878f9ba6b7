# One image per service: docker build --target edge|inference|tools|provision .
# They share every layer but the last. And one for pools of tools of your own: --target worker.
ARG PYTHON_VERSION=3.11
ARG NODE_VERSION=24

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
RUN python -m venv /opt/tapeline
WORKDIR /build
# Wheels only: building a source package would run code that no hash here covers.
COPY requirements.lock .
RUN /opt/tapeline/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml LICENSE README.md ./
COPY shared shared
RUN /opt/tapeline/bin/pip install --no-deps --no-build-isolation .

FROM python:${PYTHON_VERSION}-slim AS build-worker
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
RUN python -m venv /opt/tapeline
WORKDIR /build
COPY requirements-worker.lock .
RUN /opt/tapeline/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements-worker.lock
COPY pyproject.toml LICENSE README.md ./
COPY shared shared
RUN /opt/tapeline/bin/pip install --no-deps --no-build-isolation .

FROM node:${NODE_VERSION}-slim AS page
WORKDIR /build
COPY shared/client shared/client
COPY services/edge/page services/edge/page
RUN npm ci --prefix shared/client --ignore-scripts --omit=dev
RUN npm ci --prefix services/edge/page --ignore-scripts --omit=dev
RUN node services/edge/page/build.mjs

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent tapeline
# HOME is for MCP servers, which are given it and may want to write there.
ENV PATH=/opt/tapeline/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /app

# Put your module into /app and name it: docker run … my_tools, or CMD ["my_tools"] in an image made from this one.
FROM runtime AS worker
COPY --from=build-worker /opt/tapeline /opt/tapeline
USER tapeline
ENTRYPOINT ["python", "-m", "tapeline.tools"]

FROM runtime AS base
COPY --from=build /opt/tapeline /opt/tapeline
COPY services/__init__.py services/__init__.py
USER tapeline

FROM base AS provision
COPY services/provision.py services/provision.py
CMD ["python", "-m", "services.provision"]

FROM base AS inference
COPY services/inference services/inference
CMD ["python", "-m", "services.inference"]

FROM base AS tools
COPY services/tools services/tools
CMD ["python", "-m", "services.tools"]

FROM base AS edge
COPY services/edge services/edge
COPY --from=page /build/services/edge/page/dist services/edge/page/dist
# All interfaces, and therefore only with TAPELINE_API_KEYS or another way to tell users apart.
ENV TAPELINE_HOST=0.0.0.0 TAPELINE_PORT=8080
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"TAPELINE_PORT\"]}/healthz', timeout=2)"]
CMD ["python", "-m", "services.edge"]
