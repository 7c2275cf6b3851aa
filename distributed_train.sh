#!/usr/bin/env bash
# Starts NUM_PROC processes of train.py (or of $SCRIPT) on this machine, one per GPU:
#
#     ./distributed_train.sh 8 /data/imagenet -c configs/t2t_vit_14.yaml
#     SCRIPT=validate.py ./distributed_train.sh 8 /data/imagenet --model t2t_vit_14 --eval_checkpoint PATH
#     SCRIPT=transfer.py ./distributed_train.sh 2 …
#
# After a crash the processes are started again, MAX_RESTARTS times (3), and go on from the run's last checkpoint. SIGTERM,
# SIGHUP, SIGUSR1 (Slurm) and Ctrl-C have them save first, for which they have GRACE seconds (120).
#
# On several machines, say the same on each (docs/many_machines.md, launch/):
#
#     NNODES=4 RDZV_ENDPOINT=node1:29500 ./distributed_train.sh 8 /data/imagenet -c configs/t2t_vit_14.yaml
#     NNODES=1:4 RDZV_ENDPOINT=… ./distributed_train.sh 8 … --global-batch-size 576    machines may go and come
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 1 ]; then
    echo "usage: ./distributed_train.sh NUM_PROC OPTIONS… (see python train.py --help)" >&2
    exit 2
fi
num_proc=$1
shift
export T2T_COMMAND="$0"  # for the line that says how to go on
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# -P: a folder named utils where this is called from is not ours.
exec "${PYTHON:-python}" -P -m launch.launcher "$num_proc" "$here/${SCRIPT:-train.py}" "$@"
