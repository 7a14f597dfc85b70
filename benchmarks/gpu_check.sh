#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go and about ten minutes, twenty where transformers is there to be
# timed as well: the kernel tests compiled and run, their memory accesses checked where compute-sanitizer is at
# hand, the selftest, and the benchmark at the released geometry in each format. Needs no network and no
# installation: `python` must have torch, triton, numpy and pytest. Leaves what it found in one JSON file, also
# when a step fails.
#
#     benchmarks/gpu_check.sh [OUT.json]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check.json}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/shared:$PWD/convert:$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

# step NAME SECONDS COMMAND…: stdout to NAME.out, stderr to NAME.err, the outcome to NAME.rc
step() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    printf '== %s\n' "$name" >&2
    timeout "$limit" "$@" >"$work/$name.out" 2>"$work/$name.err"
    printf '%s %s\n' "$?" "$((SECONDS - began))" >"$work/$name.rc"
    cat "$work/$name.rc" >&2
}

step selftest 120 "$python" -m dgemma selftest --json
step tests 240 "$python" -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/test_aot.py \
    --ignore tests/kernels/test_aot_vocabulary.py
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 120 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_moe.py -k "odd_sizes or whole"
fi
for form in nvfp4 bf16 fp8; do
    step "bench-$form" 150 "$python" -m dgemma bench --random-weights --format "$form" --json
done
step bench-nvfp4-8-rows 120 "$python" -m dgemma bench --random-weights --rows 8 --json
step bench-nvfp4-skewed 120 "$python" -m dgemma bench --random-weights --skew 1 --json
# Last, because compiling its passes takes minutes; its 16-bit weights need 56 GB.
if "$python" -c 'from transformers import DiffusionGemmaForBlockDiffusion' 2>/dev/null; then
    step against-transformers 540 "$python" -m dgemma bench --random-weights --against transformers --json
fi

"$python" - "$work" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

work, out = Path(sys.argv[1]), Path(sys.argv[2])
report = {}
for file in sorted(work.glob("*.rc"), key=lambda path: path.stat().st_mtime):
    code, seconds = file.read_text().split()
    said, errors = (file.with_suffix(end).read_text() for end in (".out", ".err"))
    try:
        found = json.loads(said)
    except ValueError:
        found = said[-4000:]
    report[file.stem] = {"exit": int(code), "seconds": int(seconds), "found": found, "stderr": errors[-2000:]}
out.write_text(json.dumps(report, indent=1) + "\n")
bad = [name for name, step in report.items() if step["exit"]]
print(f"{out}: {len(report)} steps, failed: {', '.join(bad) or 'none'}")
sys.exit(bool(bad))
PYTHON
