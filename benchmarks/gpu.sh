#!/usr/bin/env bash
# All that only a GPU can measure, in at most eight minutes.
#
#     bash benchmarks/gpu.sh [FOLDER]           # writes to FOLDER, by default out/gpu
#     DRY=1 bash benchmarks/gpu.sh [FOLDER]     # the same steps in a tiny form, on a CPU
#
# Needs what requirements.txt names, with CUDA, and for step 5 transformers; no network. Each step has
# its own limit in seconds, and its output is in FOLDER as soon as it ends: NAME.txt and NAME.err.
# steps.md says how each ended; a step that fails or takes too long does not stop the next.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-out/gpu}
mkdir -p "$out/work" && out=$(cd "$out" && pwd)
cd "$out/work" || exit 1
dry=${DRY:-}

step() { # step NAME LIMIT COMMAND...
  local name=$1 limit=$2 began code
  shift 2
  [ -n "$dry" ] && limit=$((3 * limit)) # the limits are a GPU's; a slow CPU may take longer
  began=$(date +%s)
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.err"
  code=$?
  echo "| $name | $code | $(($(date +%s) - began)) of $limit s |" | tee -a "$out/steps.md"
}

python="${PYTHON:-python}"
printf '| step | exit status | time |\n|---|---|---|\n' | tee "$out/steps.md"
if [ -n "$dry" ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  device=(--device=cpu) one_gpu=(--device=cpu)
  tiny=(--patch=8 --vision_width=16 --vision_depth=2 --vision_heads=2 --prototypes=16 --n_layer=2
    --n_head=2 --n_embd=16 --block_size=48 --vision_steps=4 --language_steps=4 --phase1_steps=4
    --phase2_steps=4 --vision_batch=8 --language_batch=8 --phase1_batch=8 --phase2_batch=8
    --eval_every=2 --save_every=2 --log_every=1 --select_layer=-1)
  world=(--size=16 --scenes=12 --clip_frames=2 --lines=200 --trials=0.03 --vocab_size=300)
  kernels=(--quick --device=cpu --repeats=2)
  used=(--widths=64 --tokens=256 --frames=1 --steps=1 --side=64)
  peers=(--shapes S --rounds 3 --modes eager)
else
  device=(--device=cuda) one_gpu=(--device=cuda:0)
  tiny=() world=() kernels=()
  used=(--widths=512)
  peers=(--shapes G --rounds 9)
fi

# 0. The machine, and data for the rest
step machine 20 "$python" -c "
import platform, torch
print(f'Python {platform.python_version()}, torch {torch.__version__}')
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))"
step data 40 "$python" "$root/data.py" toy "${world[@]}"
# 1. Kernels against fp64, and their speed beside PyTorch's best attention and norm
step kernels 110 "$python" "$root/benchmarks/kernel_speed.py" "${kernels[@]}"
# 2. Tokens/s, share of the rate of matrix products, busy share and memory
step utilization 60 "$python" "$root/benchmarks/utilization.py" "${used[@]}" "${device[@]}"
# 3. The whole recipe on the toy world; the time of compiling is printed apart
step toy 110 "$python" "$root/train.py" "$root/configs/toy.py" "${tiny[@]}" "${device[@]}"
# 4. The same captions and scores on GPU and CPU
step same 45 "$python" "$root/benchmarks/same.py" "${device[@]}"
# 5. Phase 2 beside transformers, in bf16, eager and compiled
step peers 70 "$python" "$root/benchmarks/peers.py" --work phase2 "${peers[@]}" "${device[@]}"
# 6. Two sharded processes, on one GPU
step shards 45 "$python" -m torch.distributed.run --standalone --nproc_per_node=2 "$root/train.py" \
  "$root/configs/toy.py" "${tiny[@]}" "${one_gpu[@]}" --shard=on --out=out/shards \
  --phase=language --language_steps=20
