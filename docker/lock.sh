#!/usr/bin/env bash
# Makes requirements.lock anew: the newest versions of all that pyproject.toml asks for, with their hashes. Needs uv.
#
#     bash docker/lock.sh
#
# torch and torchvision are named here, because the CPU image takes other builds of the same versions, which PyTorch's own
# index has: a new version means four new values.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
torch_cpu=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
torchvision=0.28.0
torchvision_cpu=1dad604dfc0177ecebe0891bd9701fe2c62ec3f7819a247be541b3fb6effee99

uv pip compile --quiet --generate-hashes --only-binary :all: --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --custom-compile-command "bash docker/lock.sh" \
    --extra heif --output-file docker/requirements.lock \
    pyproject.toml - <<EOF
torch==$torch
torchvision==$torchvision
# What builds the package.
hatchling
EOF

# The CPU builds are of the same versions, and so may stand beside the others.
sed -i \
    -e "/^torch==/a\\    --hash=sha256:$torch_cpu \\\\" \
    -e "/^torchvision==/a\\    --hash=sha256:$torchvision_cpu \\\\" \
    docker/requirements.lock
