# docker build --tag soap-loop .
# docker run --rm --gpus all --shm-size 2g --volume "$PWD/runs:/soap-loop/runs" soap-loop
#
# The steps of the README, in a container: Python, git, ./launch.sh setup. g++ compiles kernels at
# their first use. For a machine without a GPU, a tenth of the size:
#   docker build --build-arg LOOP_TORCH_INDEX=https://download.pytorch.org/whl/cpu --tag soap-loop .
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /soap-loop
# Empty: PyTorch's build for GPUs. A build of an image sees no GPU, so set-up can't tell by itself.
ARG LOOP_TORCH_INDEX=""
# Before the rest, so that a change of the code installs nothing.
COPY launch.sh constraints.txt ./
COPY setup setup
RUN ./launch.sh setup
COPY . .
ENTRYPOINT ["./launch.sh"]
