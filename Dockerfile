# segtrain with CUDA 13: the wheels bring CUDA, the host brings the driver (r580 or newer, Turing or newer card).
# docker build -t segtrain .          The docker run lines are in README.md.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 segtrain \
    && install --directory --owner=segtrain /home/segtrain/work /home/segtrain/work/runs /home/segtrain/.cache
WORKDIR /opt/segtrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY segtrain segtrain
RUN pip install --no-cache-dir --constraint constraints.txt ".[cuda]"

USER 1000
# Kernels compiled at run time and results of data checks stay in the home of the user, which is writable.
ENV SEGTRAIN_CACHE=/home/segtrain/.cache/segtrain \
    CUPY_CACHE_DIR=/home/segtrain/.cache/cupy \
    SEGTRAIN_DATA=/data
WORKDIR /home/segtrain/work
ENTRYPOINT ["segtrain"]
CMD ["--help"]
