#!/usr/bin/env bash
# Start NUM_PROC processes of train.py (or of $SCRIPT) on this machine, one per GPU:
#
#     ./distributed_train.sh 8 /data/imagenet -c configs/t2t_vit_14.yaml
#     SCRIPT=validate.py ./distributed_train.sh 8 /data/imagenet --model t2t_vit_14 --eval_checkpoint PATH
#     SCRIPT=transfer.py ./distributed_train.sh 2 …
#
# After a crash the processes start again, MAX_RESTARTS times (3), and continue from the run's last checkpoint. After
# SIGTERM, SIGHUP, SIGUSR1 (Slurm) or Ctrl-C they have GRACE seconds (120) to save.
#
# On several machines, give the same command on each (docs/many_machines.md, launch/):
#
#     NNODES=4 RDZV_ENDPOINT=node1:29500 ./distributed_train.sh 8 /data/imagenet -c configs/t2t_vit_14.yaml
#     NNODES=1:4 RDZV_ENDPOINT=… ./distributed_train.sh 8 … --global-batch-size 576    machines may come and go
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 1 ]; then
    echo "usage: ./distributed_train.sh NUM_PROC OPTIONS… (see python train.py --help)" >&2
    exit 2
fi
num_proc=$1
shift
export T2T_COMMAND="$0"  # for the line that says how to resume
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# -P: the current directory may hold another folder named utils.
exec "${PYTHON:-python}" -P -m launch.launcher "$num_proc" "$here/${SCRIPT:-train.py}" "$@"
