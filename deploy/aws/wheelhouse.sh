#!/usr/bin/env bash
# Copies every wheel that this machine's environment needs to S3, so that new nodes install from
# there and not from PyPI. Run it once on a node of the cluster, and again when constraints.txt
# changes; the wheels must be those of the nodes' own Python and platform.
#
#   ray exec cluster.yaml 'bash ~/rayjepa/deploy/aws/wheelhouse.sh s3://BUCKET/wheelhouse'
#
# Then export RAYJEPA_WHEELHOUSE=s3://BUCKET/wheelhouse in setup_commands of cluster.yaml.
set -euo pipefail

target=${1:?name the target: s3://BUCKET/PREFIX}
pip=~/venv/bin/pip
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$pip" wheel -q --wheel-dir "$wheels" -c ~/rayjepa/constraints.txt "$HOME/rayjepa" boto3 setuptools
rm -f "$wheels"/rayjepa-*.whl   # the code comes with the mounts
aws s3 sync --delete --only-show-errors "$wheels" "$target"
echo "$(find "$wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$wheels" | cut -f1), in $target"
