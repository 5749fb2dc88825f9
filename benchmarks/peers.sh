#!/usr/bin/env bash
# Build the peers' own environment in build/peers: llm-compressor, gguf for smollm2.py, and the code of the papers.
# WANDA=FOLDER takes the papers' code from a clone (bare or not) that is already there.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/peers
commit=8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6

[ -x $folder/bin/python ] || "${PYTHON:-python3}" -m venv $folder
pip() { $folder/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' constraints.txt)
pip "$torch" # first and by itself, so that pip never weighs another build against it
pip -c <(echo "$torch") llmcompressor==0.14.0.1 transformers==5.17.0 gguf==0.19.0

clone=${WANDA:-$folder/wanda.git}
if [ -n "${WANDA:-}" ]; then
    git -C "$clone" cat-file -e "$commit^{commit}" || { echo "WANDA=$WANDA lacks commit $commit of locuslab/wanda; type git fetch there" >&2; exit 1; }
elif [ ! -d "$clone" ]; then
    git clone --quiet --bare https://github.com/locuslab/wanda "$clone"
fi
mkdir -p $folder/wanda
git -C "$clone" archive $commit lib LICENSE | tar -x -C $folder/wanda
echo $commit > $folder/wanda/COMMIT
