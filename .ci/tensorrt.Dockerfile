# The command line on NVIDIA GPUs, with TensorRT from the base image. From the root of the checkout:
#   docker build -f .ci/tensorrt.Dockerfile -t onnx-mdp:tensorrt .
#   docker run --rm --gpus all -v "$PWD:/work" onnx-mdp:tensorrt doctor
FROM nvcr.io/nvidia/tensorrt:25.03-py3

COPY setup.cfg pyproject.toml README.md LICENSE /source/
COPY onnx_mdp /source/onnx_mdp
# The image has a Python of its own with pinned packages, so ours go into an environment. It holds TensorRT 10.9,
# which is what this ONNX Runtime was built for: change both together.
RUN python3 -m venv /opt/onnx-mdp \
    && /opt/onnx-mdp/bin/pip install --no-cache-dir "/source[gpu]" onnxruntime-gpu==1.22.0 \
    && rm -r /source
ENV PATH=/opt/onnx-mdp/bin:$PATH

RUN useradd --create-home pruner
USER pruner
ENV ONNX_MDP_STORE=/tmp/onnx-mdp.sqlite
WORKDIR /work
ENTRYPOINT ["onnx-mdp"]
CMD ["--help"]
