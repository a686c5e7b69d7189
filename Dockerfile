# segtrain with CUDA 13. The wheels contain CUDA; the host needs driver r580 or newer and a GPU of Turing or newer.
# docker build -t segtrain .          The docker run commands are in configs/README.md.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 segtrain \
    && install --directory --owner=segtrain /home/segtrain/work /home/segtrain/work/runs /home/segtrain/.cache
WORKDIR /opt/segtrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY segtrain segtrain
RUN pip install --no-cache-dir --constraint constraints.txt ".[cuda]"

USER 1000
# Kernels compiled at run time and results of data checks are written to the user's home.
ENV SEGTRAIN_CACHE=/home/segtrain/.cache/segtrain \
    CUPY_CACHE_DIR=/home/segtrain/.cache/cupy \
    SEGTRAIN_DATA=/data
WORKDIR /home/segtrain/work
ENTRYPOINT ["segtrain"]
CMD ["--help"]
