#!/bin/bash
# Train on a TPU slice of GKE by xpk (pip install xpk), which writes the JobSet itself:
#
#   CLUSTER=mine IMAGE=registry/crosscoder-jax TPU=v5p-128 experiments/launch/xpk.sh \
#       --store /data/store --output /data/run --data-shards 16 --latent-shards 4 --lanes 16
#
# The words after the file are those of `crosscoder-jax train`. Store and output lie on storage that was
# attached to the cluster (xpk storage attach). A host that is preempted (75), stuck (76) or fails ends the run on
# all within half a minute, and the JobSet starts all again.
set -eu

: "${CLUSTER:?set CLUSTER to the name of your xpk cluster}"
: "${IMAGE:?set IMAGE to an image with crosscoder-jax[tpu] in it}"
: "${TPU:?set TPU to the type of the slice, such as v5p-128}"

exec xpk workload create \
    --cluster "$CLUSTER" \
    --workload "${WORKLOAD:-crosscoder}" \
    --tpu-type "$TPU" \
    --docker-image "$IMAGE" \
    --max-restarts "${MAX_RESTARTS:-100}" \
    --command "crosscoder-jax train --distributed $(printf '%q ' "$@")"
