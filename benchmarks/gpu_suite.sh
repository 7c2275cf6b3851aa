#!/usr/bin/env bash
# Run everything that needs a GPU in parts: steps of all sizes with memory and profiles, steps in float16, the GPU tests,
# errors against float64, the overhead of DDP, and a table of targets and figures.
#
#     bash benchmarks/gpu_suite.sh                                  # from any folder; needs no network
#     COMMIT=$(git rev-parse --short HEAD) bash benchmarks/gpu_suite.sh        # if .git does not exist there
#     PARTS='t14 t14_train' bash benchmarks/gpu_suite.sh
#     bash benchmarks/gpu_suite.sh --dry-run                        # all parts, small and not compiled, on a CPU
#
# The suite writes four files to OUT: NAME.md (targets, parts, all tables), NAME.json (all records), NAME.log (all output)
# and NAME-scale.png. Commit them: `git add benchmarks/results/DATE-DEVICE*`. The first two are renewed within a second of
# each new row, so a killed suite loses nothing that it measured.
#
# Parts run in order of importance, each with its own limit. A part that fails or is slow does not affect the others, and
# none begins after LIMIT. Run the suite again with the same NAME and commit to run the parts that did not end well. With
# another NAME, everything is measured again. The exit code is 0 if all parts ended well, and 2 for a mistake.
#
# OUT      folder of the files (benchmarks/results; for a dry run output/gpu_suite)
# NAME     name of the files, without a folder (DATE-DEVICE, such as 2026-12-24-h200)
# PARTS    parts to run (all)
# LIMIT    seconds for all parts (510; for a dry run 2000)
# COMMIT   commit in the records (that of git)
# PYTHON   the interpreter (python3)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=
case "$*" in '') ;; --dry-run) dry=1 ;; *) echo "$*: the only option is --dry-run" >&2; exit 2 ;; esac
out=benchmarks/results name=
if [ -n "$dry" ]; then
    out=output/gpu_suite name=dry-run
fi
OUT=$(realpath -m "${OUT:-$here/$out}")
cd "$here" || exit 1
python=${PYTHON:-python3}
limit=${LIMIT:-$((dry ? 2000 : 510))}
case $limit in '' | *[!0-9]*)
    echo "LIMIT=$limit: give seconds, a whole number" >&2
    exit 2 ;;
esac
command -v "$python" > /dev/null || { echo "PYTHON=$python: no such command; name an interpreter" >&2; exit 2; }
set -f  # a * in PARTS is not a pattern
all='t14 t14_train t14_inference peer t_14 float16 tests fidelity scale sizes batch_64 pixels_384 peers compiled_errors'
parts=${PARTS:-$all}
for part in $parts; do
    case " $all " in *" $part "*) ;; *)
        echo "PARTS: there is no part $part; there are: $all" >&2
        exit 2 ;;
    esac
done
set +f
[ -n "$name" ] || name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1 |
    grep -oE '[A-Z]+[0-9]+' | head -n 1)
name=${NAME:-$(date +%F)-$(echo "${name:-gpu}" | tr '[:upper:]' '[:lower:]')}
case $name in */* | . | ..)
    echo "NAME=$name: give a name without a folder; the folder is OUT" >&2
    exit 2 ;;
esac
# Relative, since records contain commands; for this run only, since parts of a killed one may still write.
work=output/gpu_suite/$name.$$
for old in "${work%.*}".*; do
    kill -0 "${old##*.}" 2> /dev/null || rm -rf "$old"
done
mkdir -p "$OUT" "$work" || exit 1
log=$OUT/$name.log
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
targets=(-m benchmarks.targets --records "$work" --output "$OUT" --name "$name")
touch "$work/parts.tsv" "$log"
[ -z "$dry" ] || [ -n "${NAME:-}" ] || rm -f "$OUT/$name".*  # results of an earlier dry run prove nothing
if [ -e "$OUT/$name.json" ]; then
    "$python" "${targets[@]}" --unpack || { code=$?; rm -rf "$work"; exit $code; }
fi

# Commands of the parts.
step=(benchmarks.step --output "$work" --warmup 5)
scale=(benchmarks.cost --output "$work" --name scale)
fidelity=(benchmarks.fidelity --output "$work" --weights golden)
float16=(benchmarks.float16 --output "$work" --name float16)
peer=vit_little_patch16_reg4_gap_256
if [ -n "$dry" ]; then
    base=t2t_vit_7 token=t2t_vit_t_14 sizes=t2t_vit_7 peer=resnet18 peers=(resnet18) large=48 small_batch=1
    step+=(--device cpu --batch-size 2 --img-size 32 --precision fp32 --repeats 3 --warmup 1 --window 0.01)
    scale+=(--device cpu --models "$base" --img-size 32 --img-sizes 32 --token-sizes 32 48 64 --batch-sizes 1 2
            --parts overhead tokens size batch --ddp-batch-size 2 --window 0.01 --pairs 5 --repeats 1)
    fidelity+=(--device cpu --precision fp32 --images 2 --img-size 32)
    float16+=(--device cpu --model "$base" --img-size 32 -b 64 --steps 12 -j 0)
    fidelity_models=t2t_vit_7
    compiled=(--contenders published default) blocks=("${compiled[@]}") graphs=("${compiled[@]}") errors=()
else
    base=t2t_vit_14 token=t2t_vit_t_14 sizes='t2t_vit_7 t2t_vit_19 t2t_vit_24' large=384 small_batch=64
    peers=(deit_small_patch16_224 "$peer@256" swin_tiny_patch4_window7_224 convnext_tiny resnet50)
    step+=(--device cuda --batch-size 256 --precision bf16 --repeats 12 --seconds 4 --window 0.08 --profile 25)
    scale+=(--device cuda --models "$base" --precision bf16 --parts overhead tokens size batch -b 64
            --batch-sizes 16 64 128 256 --token-sizes 448 896 1344 1792 2688 --ddp-batch-size 256 --pairs 40
            --window 0.1)
    fidelity+=(--device cuda --precision fp32 bf16 fp16 --images 4)
    fidelity_models='t2t_vit_7 t2t_vit_t_14'
    float16+=(--device cuda --seconds 40 -j "$(nproc)")
    compiled=(--compile model) blocks=(--compile blocks) graphs=(--compile graphs) errors=(--compile blocks)
fi

run() {  # run PART SECONDS COMMAND…: run it if PARTS has it; write its beginning and end to parts.tsv
    local part=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS code=0 outcome
    shift 2
    case " $parts " in *" $part "*) ;; *) return 0 ;; esac
    if grep -q "^$part"$'\t[0-9]*\twell$' "$work/parts.tsv"; then
        echo "=== $part was done before, and is not run again" | tee -a "$log"
        return 0
    fi
    if [ "$left" -lt 10 ]; then
        printf '%s\t0\tnot begun: no time was left\n' "$part" >> "$work/parts.tsv"
        failed=1
        return 0
    fi
    [ -z "$dry" ] || seconds=$((5 * seconds))  # a CPU may be busy
    [ "$seconds" -le "$left" ] || seconds=$left
    printf '\n=== %s, at %d s\n' "$part" "$SECONDS" | tee -a "$log"
    printf '%s\t0\tbegun, and not ended\n' "$part" >> "$work/parts.tsv"
    timeout --kill-after=5 "$seconds" "$python" -m "$@" 2>&1 | tee -a "$log" || code=${PIPESTATUS[0]}
    case $code in
        0) outcome=well ;;
        124) outcome="cut off after $seconds s" ;;
        137) outcome=killed ;;
        *) outcome="with exit code $code" ;;
    esac
    [ "$code" -eq 0 ] || failed=1
    printf '%s\t%d\t%s\n' "$part" "$((SECONDS - began))" "$outcome" >> "$work/parts.tsv"
}

[ -z "$dry" ] || echo '=== A dry run: tiny, on the CPU, and nothing is compiled' | tee -a "$log"
failed=0
"$python" "${targets[@]}" --follow >> "$log" 2>&1 &
follower=$!
run t14 50 "${step[@]}" --models $base --peers none --contenders published default --name t14
run t14_train 80 "${step[@]}" --models $base --task train --peers none "${compiled[@]}" --name t14_train
run t14_inference 50 "${step[@]}" --models $base --task inference --peers none "${compiled[@]}" --name t14_inference
run peer 90 "${step[@]}" --models $base --peers $peer "${compiled[@]}" --name peer
run t_14 60 "${step[@]}" --models $token --task train --peers none "${blocks[@]}" --name t_14
run float16 65 "${float16[@]}"
# shellcheck disable=SC2046  # a list of files
run tests 45 pytest -m gpu -p no:cacheprovider $(grep -l 'mark[.]gpu' tests/test_*.py)
# shellcheck disable=SC2086  # lists of words
run fidelity 45 "${fidelity[@]}" --models $fidelity_models --name fidelity
run scale 60 "${scale[@]}"
# shellcheck disable=SC2086
run sizes 100 "${step[@]}" --models $sizes --task train --peers none "${blocks[@]}" --name sizes
run batch_64 60 "${step[@]}" --models $base --task train --peers none "${graphs[@]}" \
    --batch-size $small_batch --name batch_64
run pixels_384 60 "${step[@]}" --models $base --task train --peers none "${blocks[@]}" --img-size $large \
    --name pixels_384
run peers 60 "${step[@]}" --models $base --peers "${peers[@]}" --contenders default --name peers
run compiled_errors 80 "${fidelity[@]}" --models t2t_vit_7 "${errors[@]}" --name compiled_errors

kill "$follower" 2> /dev/null
wait "$follower" 2> /dev/null
printf '\n=== Targets, after %d s\n' "$SECONDS" | tee -a "$log"
[ ! -e "$work/scale.png" ] || cp "$work/scale.png" "$OUT/$name-scale.png"
"$python" "${targets[@]}" 2>&1 | tee -a "$log" || failed=1
rm -rf "$work"
exit $failed
