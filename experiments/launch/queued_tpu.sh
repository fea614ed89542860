#!/bin/bash
# Train on a queued Cloud TPU resource without Kubernetes, on all of its hosts, from the machine you sit at:
#
#   NAME=crosscoder ZONE=us-east5-a experiments/launch/queued_tpu.sh \
#       --store /data/store --output /data/run --data-shards 16 --latent-shards 4 --lanes 16
#
# once `gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" ...` is ACTIVE,
# crosscoder-jax[tpu] is installed on its hosts and /data, which all of them see, is mounted. It is given again
# until the run is finished, whether a step was stuck (76) or a host failed, for as long as the resource is there:
# when it was preempted, queue it anew and run this again.
set -u

: "${NAME:?set NAME to the name of the queued resource}"
: "${ZONE:?set ZONE to its zone}"

is_active() {
    state=$(gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)')
    [ "$state" = ACTIVE ]
}

for _ in $(seq "${MAX_RESTARTS:-100}"); do
    is_active || { echo "$NAME is not active: queue it anew, then run this again" >&2; exit 75; }
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
        --command="crosscoder-jax train --distributed $(printf '%q ' "$@")" && exit 0
    sleep 10
done
exit 1
