# One image for all: workers, the dashboard, and every other command of hpo.
#
#   docker build --tag hpo .
#
# What hpo needs is installed from pyproject.toml alone, before the code is copied: a change of the
# code makes one small layer. PyPI's torch brings CUDA along and runs without a GPU, too.
FROM python:3.12-slim

ARG EXTRAS="postgres mysql samplers onnx s3"

# tini is process 1: it passes signals on, also while Python still starts, and reaps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /usr/src/hpo
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [one for name in sys.argv[1:] for one in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\n')" $EXTRAS > requirements.txt \
    && pip install --no-cache-dir --requirement requirements.txt
COPY README.md ./
COPY hpo hpo
RUN pip install --no-cache-dir --no-deps .

# Nobody special. A volume at /var/lib/hpo takes its owner over from the image.
RUN useradd --uid 10001 --user-group --create-home hpo \
    && install --directory --owner=hpo --group=hpo /var/lib/hpo
USER 10001:10001
WORKDIR /srv/hpo
ENV HPO_HOME=/var/lib/hpo \
    TORCH_HOME=/var/lib/hpo/torch \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENTRYPOINT ["tini", "--", "hpo"]
CMD ["--help"]

# Of a worker; whatever else runs in the image says its own.
HEALTHCHECK --interval=60s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "hpo.workers.healthcheck"]
