#!/usr/bin/env bash
# Train the embedded base and its LoRA on one machine with GPUs, and measure them. About 27 minutes on two H100.
#
#   bash experiments/tiny_base/train.sh OUTPUT
#
# Everything is written below OUTPUT as it comes: base/ (exported every 1,000 steps), lora/, evaluation/<arm>/, logs, and
# `progress`, a line with the time for every stage. A stage that ended well is left out when the script runs again; one
# that did not starts afresh, and everything behind it too.
# The LoRA is trained at every learning rate of LORA_RATES at once, over all GPUs; the one with the lowest loss is kept.
# Times can be set: VAE_TIME, BASE_TIME, LORA_TIME (DD:HH:MM:SS); VAE_TIME=0 keeps the autoencoder in base/vae, or takes
# the one in assets/tiny-flux. To train the base in assets/tiny-flux further, on other scenes:
#   VAE_TIME=0 BASE_ARGS="model.initial=assets/tiny-flux seed=3" bash experiments/tiny_base/train.sh OUTPUT
set -u
output=${1:?give the output folder}
trainer=${TRAINER:-ddp}
python=${PYTHON:-python3}
rates=${LORA_RATES:-"1e-3 3e-3"}
arms=${ARMS:-"from_draft from_noise from_draft_no_lora no_lora no_guidance dense bicubic"}
mkdir -p "$output/done"
export PYTHONPATH=${PYTHONPATH:-}:src:kernels PYTHONUNBUFFERED=1
common=(paths.tiny_base="$output/base" paths.log_dir="$output/logs" logger=csv callbacks.progress=null)

say() { echo "$(date +%T) $*" | tee -a "$output/progress"; }

stage() {  # name, seconds after which it is killed, command: run it unless it ended well before, and keep its log
    local name=$1 limit=$2
    shift 2
    [ -e "$output/done/$name" ] && return 0
    case $name in
        vae | base) rm -rf "$output"/done/{base,lora_*,choose_lora,eval_*} "$output"/logs/lora_* "$output/evaluation" ;;
        lora_*) rm -rf "$output"/done/{choose_lora,eval_*} "$output/logs/$name" "$output/evaluation" ;;
        choose_lora) rm -rf "$output"/done/eval_* "$output/evaluation" ;;
    esac
    say "$name starts"
    timeout -k 15 "$limit" "$@" > "$output/$name.log" 2>&1
    local status=$?
    say "$name ends with status $status"
    if [ $status = 0 ]; then touch "$output/done/$name"; else tail -n 5 "$output/$name.log"; fi
    return $status
}

if [ "${VAE_TIME:-00:00:03:00}" != 0 ]; then
    stage vae "${VAE_LIMIT:-420}" "$python" src/train.py experiment=tiny_vae "trainer=$trainer" "${common[@]}" \
        "trainer.max_time=${VAE_TIME:-00:00:03:00}" trainer.max_steps=100000 ${VAE_ARGS:-} || exit 1
elif [ ! -d "$output/base/vae" ]; then
    mkdir -p "$output/base" && cp -r assets/tiny-flux/vae "$output/base/"
fi
stage base "${BASE_LIMIT:-1200}" "$python" src/train.py experiment=tiny_base "trainer=$trainer" "${common[@]}" \
    "trainer.max_time=${BASE_TIME:-00:00:13:00}" trainer.max_steps=1000000 ${BASE_ARGS:-}
[ -d "$output/base/transformer" ] || exit 1

# The GPUs that this script may use, by the names that CUDA_VISIBLE_DEVICES takes; a CPU has none.
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$("$python" -c \
    'import torch; print(*range(torch.cuda.device_count()), sep=",")')}"
gpu() { [ ${#gpus[@]} = 0 ] || echo "${gpus[$(($1 % ${#gpus[@]}))]}"; }
number=0
for rate in $rates; do
    CUDA_VISIBLE_DEVICES=$(gpu $number) stage "lora_$rate" "${LORA_LIMIT:-420}" "$python" src/train.py \
        experiment=scale_dit_4k base=tiny "trainer=${LORA_TRAINER:-gpu}" "${common[@]}" callbacks.samples=null \
        hydra.run.dir="$output/logs/lora_$rate" "trainer.max_time=${LORA_TIME:-00:00:04:00}" trainer.max_steps=1000000 \
        data.count=32000 data.workers=8 data.batch_size=256 callbacks.ema.decay=0.99 "model.learning_rate=$rate" \
        ${LORA_ARGS:-} &
    number=$((number + 1))
done
wait
# All rates saw the same pictures, noise and noise levels, so their mean losses over the same last steps compare.
stage choose_lora 60 "$python" experiments/tiny_base/choose_lora.py "$output"/logs/lora_* --to "$output/lora" || exit 1

number=0
# Pictures are judged on the CPU: its cores are shared among the arms, or their threads would fight over them.
threads=$(($(nproc) / ($(echo "$arms" | wc -w) + 1) + 1))
for arm in $arms; do
    OMP_NUM_THREADS=$threads CUDA_VISIBLE_DEVICES=$(gpu $number) stage "eval_$arm" "${EVAL_LIMIT:-400}" "$python" src/eval.py base=tiny \
        paths.tiny_base="$output/base" lora.path="$output/lora" logger=csv "n=${N:-200}" batch_size=16 \
        "+baseline=$arm" "only=[$arm]" 'metrics=[scenes,detail]' hydra.run.dir="$output/evaluation/$arm" ${EVAL_ARGS:-} &
    number=$((number + 1))
done
wait
say "all done"
