#!/usr/bin/env bash
# All that needs a GPU, in less than nine minutes of one H200 or H100: tests, steps of all sizes side by side with
# their profiles, 500 steps in float16, errors against float64, what DDP adds, and a table of targets and figures.
#
#     bash benchmarks/gpu_suite.sh                                  # from anywhere; needs no network
#     COMMIT=$(git rev-parse --short HEAD) bash benchmarks/gpu_suite.sh        # where the code goes without its .git
#     PARTS='tests t14_train' COMPILE=graphs bash benchmarks/gpu_suite.sh
#     DEVICE=cpu SMALL=1 bash benchmarks/gpu_suite.sh               # tiny, on any machine: two minutes, for proof
#
# Four files come of it in OUT: NAME.md (targets, parts, all tables), NAME.json (all records), NAME.log (all output) and
# NAME-scale.png. They are what is committed: `git add benchmarks/results/DATE-DEVICE*`.
#
# The parts are in order of importance, each with its own limit; one that fails or is slow costs only itself, and none
# begins when LIMIT is over: those up to `scale` have their whole limits, the others what these leave. The first is
# without compiling, so that no slow compiler costs the most important figures. The exit code is 0 if and only if all that
# were asked for ended well, and 2 of a mistake.
#
# OUT      folder of the files (benchmarks/results)
# NAME     of the files, without a folder (DATE-DEVICE, as 2026-12-24-h200)
# PARTS    which parts (all but peers_compiled, whose compiling takes too long beside the others)
# LIMIT    seconds for all parts (510)
# COMPILE  what `compiled` is in the parts of t2t_vit_14 at 224 pixels (model; see train.py)
# COMMIT   what the records have as the commit (that of git)
# PYTHON   the interpreter (python3)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=$(realpath -m "${OUT:-$here/benchmarks/results}")
cd "$here" || exit 1
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${LIMIT:-510}
all='t14_eager t14_train t14_inference float16 tests t_14 fidelity scale t7 batch_64 deeper pixels_384 peers'
all+=' compiled_errors'
parts=${PARTS:-$all}
for part in $parts; do
    case " $all peers_compiled " in *" $part "*) ;; *)
        echo "PARTS: there is no part $part; there are: $all peers_compiled" >&2
        exit 2 ;;
    esac
done
if [ "$device" = cpu ]; then
    name=cpu
else
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | grep -oE '[A-Z]+[0-9]+' | head -n 1) || true
fi
name=${NAME:-$(date +%F)-$(echo "${name:-gpu}" | tr '[:upper:]' '[:lower:]')}
case $name in */* | . | ..)
    echo "NAME=$name: give a name without a folder; the folder is OUT" >&2
    exit 2 ;;
esac
work=output/gpu_suite/$name  # no path that only this machine has, for commands stand in the records
trap 'rm -rf "$work"' EXIT
rm -rf "$work"
mkdir -p "$OUT" "$work" || exit 1
log=$OUT/$name.log
: > "$log"
: > "$work/parts.tsv"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# What is measured, and how long it may take at most.
peer=vit_little_patch16_reg4_gap_256
step=(benchmarks.step --device "$device" --output "$work" --repeats 12 --seconds 4 --window 0.08 --warmup 5
      --profile 25)
scale=(benchmarks.scale --device "$device" --output "$work" --name scale)
fidelity=(benchmarks.fidelity --device "$device" --output "$work" --weights golden)
float16=(train.py --dataset digits --output "$work" --experiment fp16 --device "$device" --no-tensorboard
         --checkpoint-hist 1 --warmup-epochs 2 --cooldown-epochs 0 --lr 5e-4 --log-interval 10)
if [ -n "${SMALL:-}" ]; then
    base=t2t_vit_7 token=t2t_vit_7 deep=t2t_vit_7 peer=resnet18
    peers=resnet18 large=48
    step+=(--batch-size 2 --img-size 32 --precision fp32 --repeats 3 --warmup 1 --window 0.01)
    small_batch=1 compiled=(--contenders published default)
    parts=${PARTS:-t14_eager t14_train t14_inference float16 tests fidelity scale peers}
    scale+=(--models "$base" --img-size 32 --img-sizes 32 48 --token-sizes 32 48 64 --batch-sizes 1 2
            --ddp-batch-size 2 --window 0.01 --pairs 5)
    fidelity+=(--models "$base" --precision fp32 --images 2 --img-size 32)
    float16+=(--model "$base" --img-size 32 -b 256 -j 1 --epochs 2 --amp --amp-dtype bfloat16)
else
    base=t2t_vit_14 token=t2t_vit_t_14 deep='t2t_vit_19 t2t_vit_24'
    peers="deit_small_patch16_224 $peer@256 swin_tiny_patch4_window7_224 convnext_tiny resnet50" large=384
    step+=(--batch-size 256 --precision bf16)
    small_batch=64 compiled=(--compile "${COMPILE:-model}")
    scale+=(--models "$base" --precision bf16 --parts overhead tokens size batch --batch-sizes 16 64 128 256 -b 64
            --token-sizes 448 896 1344 1792 2688 --ddp-batch-size 256 --pairs 40 --window 0.1)
    fidelity+=(--models t2t_vit_7 t2t_vit_t_14 --precision fp32 bf16 fp16 --images 4)
    float16+=(--model "$base" --img-size 224 -b 64 -j "$(nproc)" --epochs 23 --amp --amp-dtype float16)
fi

run() {  # run PART SECONDS COMMAND…: unless it was not asked for; what became of it goes to parts.tsv
    local part=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS code=0
    shift 2
    case " $parts " in *" $part "*) ;; *) return 0 ;; esac
    if [ "$left" -lt 10 ]; then
        printf '%s\t0\tnot begun: no time was left\n' "$part" >> "$work/parts.tsv"
        failed=1
        return 0
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    printf '\n=== %s, at %d s\n' "$part" "$SECONDS" | tee -a "$log"
    timeout --kill-after=5 "$seconds" "$python" "$@" 2>&1 | tee -a "$log" || code=${PIPESTATUS[0]}
    case $code in
        0) outcome='well' ;;
        124 | 137) outcome="cut off after $seconds s" ;;
        *) outcome="with exit code $code" ;;
    esac
    [ "$code" -eq 0 ] || failed=1
    printf '%s\t%d\t%s\n' "$part" "$((SECONDS - began))" "$outcome" >> "$work/parts.tsv"
}

failed=0
blocks=("${compiled[@]}" --compile blocks)
run t14_eager 60 -m "${step[@]}" --models $base --task train --peers $peer --contenders published default \
    --name t14_eager
run t14_train 110 -m "${step[@]}" --models $base --task train --peers $peer "${compiled[@]}" --name t14_train
run t14_inference 60 -m "${step[@]}" --models $base --task inference --peers $peer "${compiled[@]}" --name t14_inference
run float16 70 "${float16[@]}"
# shellcheck disable=SC2046  # a list of files
run tests 45 -m pytest -m gpu -p no:cacheprovider $(grep -l 'mark[.]gpu' tests/test_*.py)
run t_14 60 -m "${step[@]}" --models $token --task train --peers none "${blocks[@]}" --name t_14
run fidelity 45 -m "${fidelity[@]}" --name fidelity
run scale 60 -m "${scale[@]}"
run t7 50 -m "${step[@]}" --models t2t_vit_7 --task train --peers none "${blocks[@]}" --name t7
run batch_64 60 -m "${step[@]}" --models $base --task train --peers none "${compiled[@]}" \
    --compile graphs --batch-size $small_batch --name batch_64
# shellcheck disable=SC2086  # lists of words
run deeper 80 -m "${step[@]}" --models $deep --task train --peers none "${blocks[@]}" --name deeper
run pixels_384 60 -m "${step[@]}" --models $base --task train --peers none "${blocks[@]}" \
    --img-size $large --name pixels_384
# shellcheck disable=SC2086
run peers 60 -m "${step[@]}" --models $base --peers $peers --contenders default --name peers
run compiled_errors 80 -m "${fidelity[@]}" --models t2t_vit_7 --compile blocks --name fidelity_compiled
# shellcheck disable=SC2086
run peers_compiled 400 -m "${step[@]}" --models $base --peers $peers --task train "${compiled[@]}" --name peers_compiled

printf '\n=== Targets, after %d s\n' "$SECONDS" | tee -a "$log"
[ ! -e "$work/scale.png" ] || cp "$work/scale.png" "$OUT/$name-scale.png"
"$python" -m benchmarks.targets --records "$work" --output "$OUT" --name "$name" 2>&1 | tee -a "$log" || failed=1
tee -a "$log" < "$work/parts.tsv"
exit $failed
