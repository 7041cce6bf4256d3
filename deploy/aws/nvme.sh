#!/usr/bin/env bash
# Mounts the instance's NVMe disks at /mnt/scratch, as one if there are several. An instance without
# any, or of which the disk is mounted already, gets the folder on its root disk. cluster.yaml runs
# this before Ray starts, because Ray's temp dir, spilled objects and TMPDIR lie there. The disks
# come empty and are lost with the instance: nothing on them is worth keeping.
set -euo pipefail

scratch=${RAYJEPA_SCRATCH:-/mnt/scratch}
owner=${SUDO_USER:-$(id -un)}

if ! mountpoint -q "$scratch"; then
    # EBS volumes are NVMe devices as well; the model tells the instance's own disks.
    mapfile -t disks < <(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ {print $1}')
    free=()
    for disk in "${disks[@]}"; do
        # The image may have mounted or bundled it itself (/opt/dlami/nvme on AWS's GPU image).
        if [[ -z $(lsblk -no MOUNTPOINT "$disk" | tr -d '[:space:]') ]] \
            && [[ $(lsblk -no TYPE "$disk" | wc -l) -eq 1 ]]; then
            free+=("$disk")
        fi
    done
    mkdir -p "$scratch"
    if mountpoint -q /opt/dlami/nvme; then   # by the image itself
        mkdir -p /opt/dlami/nvme/rayjepa
        mount --bind /opt/dlami/nvme/rayjepa "$scratch"
    elif ((${#free[@]} > 1)); then
        mdadm --create /dev/md/scratch --run --level=0 --raid-devices=${#free[@]} "${free[@]}"
        mkfs.ext4 -q -F -E nodiscard /dev/md/scratch
        mount -o noatime /dev/md/scratch "$scratch"
    elif ((${#free[@]} == 1)); then
        mkfs.ext4 -q -F -E nodiscard "${free[0]}"
        mount -o noatime "${free[0]}" "$scratch"
    fi
fi
mkdir -p "$scratch/tmp" "$scratch/spill"
chown "$owner": "$scratch" "$scratch/tmp" "$scratch/spill"
df -h "$scratch" | tail -1
