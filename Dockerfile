# For machines with NVIDIA GPUs. The CUDA toolkit is in the image because Transformer-Engine's torch extension is compiled here.
#   docker build -t open-qwen-image .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -it open-qwen-image
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-dev python3-venv git fonts-dejavu-core fonts-wqy-microhei tesseract-ocr tesseract-ocr-chi-sim \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/open-qwen-image
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch setuptools wheel pybind11 ninja \
 && pip install --no-cache-dir -c constraints.txt --no-build-isolation "transformer-engine[pytorch]>=2.9,<2.12"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[dev]"
