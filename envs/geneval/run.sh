#!/usr/bin/env bash
# GenEval's own scorer on every picture folder below a folder of `tritflow evaluate geneval --draw-only`.
#   GENEVAL=CHECKOUT DETECTOR=WEIGHTS_FOLDER PYTHON=ENVS_PYTHON envs/geneval/run.sh runs/geneval [scorer's arguments]
# Leaves results.jsonl and official.sha256 in each picture folder; one that has both, unchanged, is not scored again.
set -euo pipefail
[ $# -ge 1 ] && [ -d "$1" ] || { echo "usage: GENEVAL=CHECKOUT DETECTOR=FOLDER PYTHON=... $0 FOLDER [arguments]" >&2; exit 2; }
out=$(cd "$1" && pwd); shift
scorer=$(realpath -m "${GENEVAL:?a checkout of djghosh13/geneval}/evaluation/evaluate_images.py")
weights=$(realpath -m "${DETECTOR:?the folder of the detector}")
[ -f "$scorer" ] || { echo "$scorer is not there; see README.md beside this script" >&2; exit 2; }
scored=0
for folder in "$out" "$out"/*/; do
  folder=${folder%/}
  [ -f "$folder/manifest.jsonl" ] || continue
  scored=$((scored + 1))
  cd "$folder"
  if [ -f results.jsonl ] && tail -n 2 official.sha256 2>/dev/null | sha256sum --check --status 2>/dev/null; then
    echo "$folder is scored"
    continue
  fi
  "${PYTHON:-python}" "$scorer" "$folder" --outfile "$folder/results.jsonl" --model-path "$weights" "$@"
  sha256sum manifest.jsonl results.jsonl >> official.sha256
done
[ "$scored" -gt 0 ] || { echo "$out holds no finished picture folder; draw with tritflow evaluate geneval --draw-only" >&2; exit 2; }
