#!/usr/bin/env bash
# Measure every quoted figure that needs no GPU, then rewrite the documents: make figures
# Those of a GPU: experiments/kernel, experiments/memory and experiments/decode, each with its commands in its README.
# On two cores the evaluation at 1024 px takes many hours; a GPU needs minutes.
set -euo pipefail
python=${1:-python}
run=logs/figures/$(date +%Y-%m-%d_%H-%M-%S)

"$python" experiments/parser/run.py
"$python" experiments/tiny_base/run.py
"$python" src/eval.py base=tiny n=200 'metrics=[scenes,detail]' hydra.run.dir="$run" \
    '+baseline=[from_draft,from_noise,from_draft_no_lora,no_lora,no_guidance,dense,bicubic]'
"$python" experiments/tiny_1024/run.py "$run"
"$python" experiments/orders/run.py
"$python" experiments/decode/measure.py --base tiny --px 512 1024
"$python" experiments/decode/run.py
"$python" experiments/installation/run.py
"$python" -m scale_dit.evaluation.figures --update-docs
