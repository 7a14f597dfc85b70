#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: the selftest at the released geometry, recorded steps against
# eager ones over contexts in pieces, the embedded model's answers, the benchmark in each format and beside
# transformers, the kernel tests compiled and run. What matters most comes first, and the JSON file is rewritten
# after every step, so that a run which is cut off leaves what it had. Needs no network and no installation: `python` must have
# torch, triton, numpy, click, rich, jinja2, tokenizers and safetensors; pytest and transformers for their steps.
#
#     benchmarks/gpu_check.sh [OUT.json]
#
# PYTHON names the interpreter. BUDGET is the seconds in all, 570 unless said: steps that do not fit are named
# as not begun. All of them take half an hour, a third of it transformers' compilation.
set -uo pipefail
out=$(realpath -m "${1:-gpu_check.json}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/shared:$PWD/convert:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
budget=${BUDGET:-570}

"$python" - <<'PYTHON' || exit 2
import sys

try:
    import torch
    import triton

    import benchmarks.tiny.evaluate
    import dgemma.cli
    import dgemma_cuda.selftest
except ImportError as error:
    sys.exit(f"gpu_check: {error}")
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} finds no NVIDIA GPU here")
PYTHON

# The report of all steps so far; put in place whole, as the run may end at any moment.
collect() {
    "$python" - "$work" "$out" <<'PYTHON'
import json
import os
import sys
from pathlib import Path

work, out = Path(sys.argv[1]), Path(sys.argv[2])
report = {}
for file in sorted(work.glob("*.rc")):
    code, seconds = file.read_text().split()
    said, errors = (file.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))
    try:
        found = json.loads(said)
    except ValueError:
        found = said[-4000:]
    step = {"exit": json.loads(code), "seconds": int(seconds), "found": found, "stderr": errors[-2000:]}
    report[file.stem.split("-", 1)[1]] = step
part = out.with_name(out.name + ".part")
part.write_text(json.dumps(report, indent=1) + "\n")
os.replace(part, out)
bad = [name for name, step in report.items() if step["exit"]]
late = [name for name, step in report.items() if step["exit"] is None]
said = f"failed: {', '.join(bad) or 'none'}; not begun: {', '.join(late) or 'none'}"
print(f"{out}: {len(report)} steps, {said}")
sys.exit(bool(bad))
PYTHON
}

# step NAME SECONDS COMMAND…: what it says and how it ended, in the report at once.
count=0
step() {
    local name=$1 limit=$2 began=$SECONDS left=$((budget - SECONDS)) file code
    shift 2
    printf -v file '%s/%02d-%s' "$work" "$((++count))" "$name"
    if ((left < 20)); then
        : >"$file.out"
        echo "not begun: the budget of $budget s is spent" >"$file.err"
        code=null
    else
        timeout -k 10 $((limit < left ? limit : left)) "$@" >"$file.out" 2>"$file.err"
        code=$?
    fi
    echo "$code $((SECONDS - began))" >"$file.rc"
    echo "== $name: exit $code after $((SECONDS - began)) s" >&2
    collect >/dev/null
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
bench=("$python" -m dgemma bench --random-weights --json)
against=("$python" -m benchmarks.bench_transformers --random-weights --json)
if "$python" -c 'import xdist' 2>/dev/null; then many=(-n 8); else many=(); fi

step machine 30 "$python" - <<'PYTHON'
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

found = {"python": platform.python_version(), "gpu": str(torch.cuda.get_device_properties(0))}
for name in ("torch", "triton", "transformers", "numpy"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
PYTHON
step selftest 150 "$python" -m dgemma selftest --backend cuda --json
step bench-nvfp4 150 "${bench[@]}"
step recorded-and-eager 90 "${pytest[@]}" tests/cuda/test_graphs.py -m cuda
step tiny 60 "$python" -m benchmarks.tiny.evaluate --backend cuda --count 32
step bench-bf16 150 "${bench[@]}" --format bf16
# Without the mode for which transformers compiles for minutes; its 16-bit weights need 56 GB.
step against-transformers 180 "${against[@]}" --no-compiled
step kernel-tests 240 "${pytest[@]}" "${many[@]}" tests/kernels --ignore tests/kernels/test_aot.py \
    --ignore tests/kernels/test_aot_vocabulary.py
step bench-8-rows 120 "${bench[@]}" --rows 8
step bench-fp8 150 "${bench[@]}" --format fp8
if "$python" -c 'import torch; raise SystemExit(torch.cuda.get_device_capability() < (10, 0))'; then
    step bench-w4a4 120 "${bench[@]}" --activations nvfp4
fi
step bench-skewed 120 "${bench[@]}" --skew 1
step bench-16k 120 "${bench[@]}" --context 16384
if command -v compute-sanitizer >/dev/null; then
    # Attention follows addresses that it reads: what it must not read is what the sanitizer knows.
    step sanitizer 120 compute-sanitizer --error-exitcode 9 "${pytest[@]}" tests/kernels/test_moe.py \
        tests/kernels/test_attention.py -k "odd_sizes or whole or unequal or windows"
fi
step against-transformers-compiled 540 "${against[@]}"
collect
