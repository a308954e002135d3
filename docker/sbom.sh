#!/usr/bin/env bash
# Lists the packages of an image as CycloneDX 1.6, checked against its schema: reads a tar of the image's *.dist-info
# folders from standard input. cyclonedx-py is a development tool, so it is in .venv and not in the image.
#
#   docker/sbom.sh -o FILE    options of `cyclonedx-py environment`; `python` and `cyclonedx-py` are those on PATH
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m venv --without-pip "$folder"
tar -x -C "$folder"/lib/python3*/site-packages
cyclonedx-py environment --output-reproducible --pyproject "$(dirname "$0")/../pyproject.toml" "$@" "$folder/bin/python"
