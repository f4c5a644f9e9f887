#!/usr/bin/env bash
# Train the embedded base and its LoRA on one machine with GPUs, and measure them. About 25 minutes on two H100.
#
#   bash experiments/tiny_base/train.sh OUTPUT
#
# Everything is written below OUTPUT as it comes: base/ (exported every 1,000 steps), lora/, evaluation/<arm>/, logs, and
# `progress`, a line with the time for every stage. Stages whose result is there already are left out, so an interrupted
# run goes on. Times can be set: VAE_TIME, BASE_TIME, LORA_TIME (DD:HH:MM:SS); VAE_TIME=0 keeps the autoencoder in base/vae.
set -u
output=$(realpath -m "${1:?give the output folder}")
trainer=${TRAINER:-ddp}
arms=${ARMS:-"from_draft from_noise from_draft_no_lora no_lora no_guidance dense bicubic"}
mkdir -p "$output"
export PYTHONPATH=${PYTHONPATH:-}:src:kernels PYTHONUNBUFFERED=1
common=(paths.tiny_base="$output/base" paths.log_dir="$output/logs" logger=csv callbacks.progress=null)

say() { echo "$(date +%T) $*" | tee -a "$output/progress"; }

stage() {  # name, seconds after which it is killed, command: run it, keep its log, tell its status
    local name=$1 limit=$2
    shift 2
    say "$name starts"
    timeout -k 15 "$limit" "$@" > "$output/$name.log" 2>&1
    local status=$?
    say "$name ends with status $status"
    [ $status = 0 ] || tail -n 5 "$output/$name.log"
    return $status
}

if [ "${VAE_TIME:-00:00:03:00}" != 0 ]; then
    stage vae "${VAE_LIMIT:-420}" python3 src/train.py experiment=tiny_vae "trainer=$trainer" "${common[@]}" \
        "trainer.max_time=${VAE_TIME:-00:00:03:00}" trainer.max_steps=100000 ${VAE_ARGS:-} || exit 1
fi
if [ "${BASE_TIME:-00:00:12:00}" != 0 ]; then
    stage base "${BASE_LIMIT:-1100}" python3 src/train.py experiment=tiny_base "trainer=$trainer" "${common[@]}" \
        "trainer.max_time=${BASE_TIME:-00:00:12:00}" trainer.max_steps=100000 ${BASE_ARGS:-}
    [ -d "$output/base/transformer" ] || exit 1
fi
stage lora "${LORA_LIMIT:-300}" python3 src/train.py experiment=scale_dit_4k base=tiny "trainer=${LORA_TRAINER:-gpu}" \
    "${common[@]}" "trainer.max_time=${LORA_TIME:-00:00:01:30}" trainer.max_steps=100000 data.count=16000 \
    data.batch_size=64 callbacks.ema.decay=0.99 "model.export=$output/lora" ${LORA_ARGS:-} || exit 1

gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
number=0
for arm in $arms; do
    CUDA_VISIBLE_DEVICES=$((number % gpus)) stage "eval_$arm" "${EVAL_LIMIT:-400}" python3 src/eval.py base=tiny \
        paths.tiny_base="$output/base" lora.path="$output/lora" logger=csv "n=${N:-200}" batch_size=16 \
        "+baseline=$arm" "only=[$arm]" 'metrics=[scenes,detail]' hydra.run.dir="$output/evaluation/$arm" ${EVAL_ARGS:-} &
    number=$((number + 1))
done
wait
say "all done"
