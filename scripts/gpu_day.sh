#!/usr/bin/env bash
# All that has to be seen on a GPU, in one go: the most valuable part first, every part with a time limit.
#
#   scripts/gpu_day.sh [OUT] [options]      OUT (default: gpu_day) gets gpu.md, results.jsonl and gpu_day.log,
#                                           and seed-<n>.tar with what the trainings export
#
#   --minutes N       time for everything together (default 9)
#   --runs DIR        keep the trainings' checkpoints and logs there (or GPU_DAY_RUNS=DIR)
#   --parts A,B,...   only these, in this order (default: all, see below)
#   --limit PART=S    another limit for a part, in seconds
#   --wheels DIR      install the wheels of DIR first, without a network (or GPU_DAY_WHEELS=DIR)
#   --parity DIR      further parity cases, <family>/<case> below DIR (or GPU_DAY_PARITY=DIR)
#   --device NAME     auto (CUDA where there is one), cuda or cpu
#   --tiny            tiny numbers, as always on a CPU: does it run at all?
#
# Needs a checkout, a Python with torch (PYTHON=... names it, default python3) and what pyproject.toml lists;
# the part "environment" names the packages that are missing, and these can come as wheels:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#     --platform manylinux_2_28_x86_64 -d DIR NAME==VERSION ...
#
# The trainings take all the time that the tests leave; the measurements after them get some when --minutes is
# larger, when --limit trainings=S holds them back, or alone with
#   --parts environment,ids,speed,training,probe,tasks
#
# Results are written as soon as they are there. A part that fails or is stopped does not stop the next one.
# The exit status is 0 when every part came to its end.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
# seconds; without the trainings, which take what is left, together less than nine minutes
declare -A LIMIT=([environment]=45 [tests]=150 [trainings]=900 [ids]=70 [speed]=110 [training]=100 [probe]=50 [tasks]=60)
PARTS=environment,tests,trainings,ids,speed,training,probe,tasks
OUT=gpu_day MINUTES=9 WHEELS=${GPU_DAY_WHEELS:-} PARITY=${GPU_DAY_PARITY:-} DEVICE=auto TINY=

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu_day.sh >&2; exit "$1"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) MINUTES=${2:?}; shift 2 ;;
    --parts) PARTS=${2:?}; shift 2 ;;
    --limit)
      name=${2%%=*}
      if [ -z "${LIMIT[$name]:-}" ]; then echo "--limit $2: no part $name" >&2; exit 2; fi
      LIMIT[$name]=${2#*=}; shift 2 ;;
    --wheels) WHEELS=${2:?}; shift 2 ;;
    --runs) export GPU_DAY_RUNS=${2:?}; shift 2 ;;
    --parity) PARITY=${2:?}; shift 2 ;;
    --device) DEVICE=${2:?}; shift 2 ;;
    --tiny) TINY=--tiny; shift ;;
    -h | --help) usage 0 ;;
    -*) usage 2 ;;
    *) OUT=$1; shift ;;
  esac
done
for part in ${PARTS//,/ }; do
  if [ -z "${LIMIT[$part]:-}" ]; then echo "--parts: no part $part among ${!LIMIT[*]}" >&2; exit 2; fi
done

mkdir -p -- "$OUT" || exit 1
OUT=$(cd -- "$OUT" && pwd)
log=$OUT/gpu_day.log
started=$SECONDS
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "$PARITY" ]; then export COMIT_BENCH_PARITY=$PWD/tests/parity/cases:$PARITY; fi
note() { "$PYTHON" scripts/gpu_day/summary.py "$OUT" "$@" >>"$log" 2>&1; }

: >"$log"
rm -f -- "$OUT/results.jsonl" "$OUT/gpu.md"
if [ -n "$WHEELS" ]; then
  site=$(mktemp -d)
  trap 'rm -rf -- "$site"' EXIT
  if "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    "$WHEELS"/*.whl >>"$log" 2>&1; then
    export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
  else
    echo "the wheels of $WHEELS could not be installed, see $log" >&2
  fi
fi

status=0
for part in ${PARTS//,/ }; do
  left=$((MINUTES * 60 - (SECONDS - started) - 5))
  limit=$((LIMIT[$part] < left ? LIMIT[$part] : left))
  if [ "$limit" -lt 1 ]; then
    note part "$part" left-out 0
    status=1
    continue
  fi
  printf '== %s (at most %s s)\n' "$part" "$limit" | tee -a "$log"
  before=$SECONDS
  timeout --signal=TERM --kill-after=5 "$limit" \
    "$PYTHON" scripts/gpu_day "$part" --out "$OUT" --device "$DEVICE" --seconds "$limit" $TINY >>"$log" 2>&1
  code=$?
  case $code in
    0) state=done ;;
    124 | 137) state=stopped ;;
    *) state=failed ;;
  esac
  if [ $code -ne 0 ]; then status=1; fi
  note part "$part" "$state" $((SECONDS - before))
done
cat -- "$OUT/gpu.md"
exit $status
