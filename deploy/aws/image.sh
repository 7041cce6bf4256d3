#!/usr/bin/env bash
# Makes an image (AMI) of a node that is set up, from which new nodes start without installing
# anything. Run it on your own machine; it needs the AWS CLI and ec2:CreateImage.
#
#   deploy/aws/image.sh INSTANCE_ID REGION     # a decode worker of the running cluster will do
#
# Then write the image's id as ImageId into cluster.yaml, for all node types. Make a new one when
# constraints.txt changes; until then setup installs the difference.
set -euo pipefail

instance=${1:?name the instance: i-0123...} region=${2:?name the region}
name="rayjepa-$(date -u +%Y%m%d-%H%M)"
# The node restarts for a consistent copy: the cluster counts it as lost meanwhile.
image=$(aws ec2 create-image --region "$region" --instance-id "$instance" --name "$name" \
    --query ImageId --output text)
echo "waiting for $image ($name)"
aws ec2 wait image-available --region "$region" --image-ids "$image"
echo "ImageId: $image"
