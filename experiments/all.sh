#!/usr/bin/env bash
# Measure every figure that a document quotes, then rewrite the documents: make figures
# On two cores the evaluation at 1024 px takes many hours; a GPU needs minutes.
set -euo pipefail
python=${1:-python}
run=logs/figures/$(date +%Y-%m-%d_%H-%M-%S)

"$python" experiments/parser/run.py
"$python" experiments/tiny_base/run.py
"$python" src/eval.py base=tiny n=200 'metrics=[scenes,detail]' hydra.run.dir="$run" \
    '+baseline=[from_draft,from_noise,from_draft_no_lora,no_lora,no_guidance,dense,bicubic]'
"$python" experiments/tiny_1024/run.py "$run"
"$python" experiments/installation/run.py
"$python" -m scale_dit.evaluation.figures --update-docs
