#!/usr/bin/env bash
# Installs the project into ~/venv, or does nothing on an image that has it (deploy/aws/image.sh).
# cluster.yaml runs it on every new node. With RAYJEPA_WHEELHOUSE=s3://BUCKET/PREFIX the wheels come
# from S3 (deploy/aws/wheelhouse.sh), else from PyPI.
set -euo pipefail

constraints=~/rayjepa/constraints.txt
done_with=~/venv/installed   # what was installed last; an image has it too
wanted=$(cat "$constraints" ~/rayjepa/pyproject.toml | sha256sum)
if [[ -e $done_with && $(cat "$done_with") == "$wanted" ]]; then
    exit 0
fi

apt_get() {
    # Ubuntu's own apt-get runs in the first minutes of an instance. DPkg::Lock::Timeout waits for
    # its installation, but not for its update, whose lock is another: try again.
    for _ in {1..30}; do
        sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@" && return
        sleep 10
    done
    return 1
}

if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt_get update
    apt_get install -y python3-venv
fi
test -x ~/venv/bin/pip || python3 -m venv ~/venv

from=()
if [[ -n ${RAYJEPA_WHEELHOUSE:-} ]]; then
    aws s3 sync --only-show-errors "$RAYJEPA_WHEELHOUSE" ~/wheelhouse
    from=(--no-index --find-links ~/wheelhouse)
fi
~/venv/bin/pip install -q "${from[@]}" setuptools -c "$constraints"
~/venv/bin/pip install -q "${from[@]}" --no-build-isolation -e ~/rayjepa boto3 -c "$constraints"
rm -rf ~/wheelhouse
echo "$wanted" > "$done_with"
