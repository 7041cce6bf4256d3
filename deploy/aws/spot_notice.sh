#!/usr/bin/env bash
# Tells Ray when this spot instance is going to be taken away: AWS says so in the instance's metadata
# two minutes before. Training workers then save a checkpoint and stop, and nothing more is placed
# here (docs/cluster.md, "Elastic runs"). cluster.yaml starts it beside Ray; it ends after the notice.
#
#     spot_notice.sh HEAD_ADDRESS:PORT
set -euo pipefail

head=$1
metadata=${METADATA_URL:-http://169.254.169.254}/latest
pause=${SPOT_PAUSE_S:-5}

notice() {  # when the instance ends, or nothing; 404 means that there is no notice
    local token
    token=$(curl -sf -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
        "$metadata/api/token") || return 0
    curl -sf -m 5 -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action" \
        | sed -n 's/.*"time"[^"]*"\([^"]*\)".*/\1/p' || return 0
}

until at=$(notice) && [[ -n $at ]]; do sleep "$pause"; done
left=$(($(date -d "$at" +%s) - $(date +%s)))
# The raylet's command line has the id of this node.
node=$(pgrep -af raylet | grep -oP -- '--node-id=\K[0-9a-f]+' | head -n 1)
echo "taken away at $at, in $left s; node $node"
ray drain-node --address "$head" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "spot instance ends at $at" \
    --deadline-remaining-seconds "$((left > 1 ? left : 1))"
