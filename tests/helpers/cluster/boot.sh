#!/bin/bash
# Boots one host of the rig: its PID 1, already in namespaces of its own. See hosts.py.
#   boot.sh NAME FOLDER PYTHON_PREFIX HOSTS_FILE
set -e
name=$1 folder=$2 prefix=$3 hosts=$4
mount --make-rprivate /
mount -o loop "$folder/disk.img" "$folder/disk"
mkdir -p "$folder"/disk/{upper,work,tmp}
chmod 1777 "$folder/disk/tmp"
# The root is this machine's, and what the host writes goes to its own disk.
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/disk/upper,workdir=$folder/disk/work" "$folder/root"
cd "$folder/root"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs -o size=600m tmpfs dev/shm
mount --rbind /sys sys
mount -t tmpfs tmpfs run
mount --bind "$folder/disk/tmp" tmp      # not this machine's, which may hold another Ray
mkdir -p "./$prefix"                     # may be below /tmp, or on a volume that the overlay hides
mount --bind "$prefix" "./$prefix"
mkdir -p run/sshd root/.ssh
cp "$folder/../key.pub" root/.ssh/authorized_keys
chmod 700 root/.ssh
chmod 600 root/.ssh/authorized_keys
if [ ! -e var/booted ]; then
    rm -rf root/.ray                     # this machine's own token is not the host's
    touch var/booted
fi
ln -sfn "$prefix" root/venv
cp "$hosts" etc/hosts
hostname "$name"
# Nothing ends PID 1 but a power cut; it reaps what daemons leave behind.
exec chroot . /bin/bash -c '
    /usr/sbin/sshd -D -o PermitRootLogin=yes -o UsePAM=no -o MaxStartups=100 &
    while :; do sleep 3600 & wait -n; done'
