#!/usr/bin/env bash
# Makes this machine (Debian, Ubuntu) the head or a worker of a cluster that comes back by itself.
#
#   sudo deploy/own_machines/install.sh head   HEAD_ADDRESS TOKEN_FILE
#   sudo deploy/own_machines/install.sh worker HEAD_ADDRESS TOKEN_FILE
#
# Run it from a checkout, with the same Python on every machine. TOKEN_FILE is the same everywhere:
# `ray get-auth-token --generate` writes one to ~/.ray/auth_token. Run again, it updates.
set -euo pipefail

if [[ $# -ne 3 || ! $1 =~ ^(head|worker)$ ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
role=$1 head=$2 token=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

id -u ray >/dev/null 2>&1 || useradd --system --create-home --home-dir /home/ray ray
install -d -o ray -g ray /opt/rayjepa /var/lib/rayjepa /var/lib/rayjepa/ray /var/lib/rayjepa/tmp
install -d -o ray -g ray -m 700 /home/ray/.ray
install -o ray -g ray -m 600 "$token" /home/ray/.ray/auth_token

cp -r "$root"/{pyproject.toml,constraints.txt,README.md,models,pipelines,serve} /opt/rayjepa/
chown -R ray: /opt/rayjepa
runuser -u ray -- python3 -m venv /opt/rayjepa/venv
runuser -u ray -- /opt/rayjepa/venv/bin/pip install -q -e /opt/rayjepa -c /opt/rayjepa/constraints.txt

install -d /etc/rayjepa
if [[ ! -e /etc/rayjepa/ray.env ]]; then
    install -m 640 -g ray "$here/ray.env" /etc/rayjepa/ray.env   # may hold keys
fi
sed -i "s/^RAYJEPA_HEAD=.*/RAYJEPA_HEAD=$head/" /etc/rayjepa/ray.env
install -m 644 "$here/rayjepa-$role.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable "rayjepa-$role"
systemctl restart "rayjepa-$role"
