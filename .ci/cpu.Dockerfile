# The command line on the CPU. From the root of the checkout:
#   docker build -f .ci/cpu.Dockerfile -t onnx-mdp:cpu .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" onnx-mdp:cpu analyze model.onnx
FROM python:3.12.11-slim-bookworm

COPY setup.cfg pyproject.toml README.md LICENSE /source/
COPY onnx_mdp /source/onnx_mdp
RUN pip install --no-cache-dir "/source[cpu]" && rm -r /source

RUN useradd --create-home pruner
USER pruner
# Measurements are kept here: mount a volume to keep them longer than a container.
ENV ONNX_MDP_STORE=/tmp/onnx-mdp.sqlite
WORKDIR /work
ENTRYPOINT ["onnx-mdp"]
CMD ["--help"]
