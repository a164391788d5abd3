#!/usr/bin/env bash
# T2I-CompBench's own scripts on every picture folder below one of `tritflow evaluate t2i-compbench --draw-only`.
#   COMPBENCH=CHECKOUT PYTHON=ENVS_PYTHON JUDGE_PYTHON=JUDGES_PYTHON envs/t2i-compbench/run.sh runs/compbench [CATEGORY...]
# Leaves each category's output in its folder and notes it in official.sha256; a category that is noted, unchanged, is
# not scored again, so a killed run goes on.
set -euo pipefail
[ $# -ge 1 ] && [ -d "$1" ] || { echo "usage: COMPBENCH=CHECKOUT PYTHON=... JUDGE_PYTHON=... $0 FOLDER [CATEGORY...]" >&2; exit 2; }
out=$(cd "$1" && pwd); shift
suite=$(cd "${COMPBENCH:?a checkout of Karine-Huang/T2I-CompBench}" && pwd)
all=" color shape texture spatial 3d_spatial numeracy non_spatial complex "
categories=${*:-$all}
for c in $categories; do
  [[ $all == *" $c "* ]] || { echo "there is no category '$c' (there are$all)" >&2; exit 2; }
done
scored=0

# score LEFT FOLDER COMMAND... : run a command in a folder of the checkout unless what it leaves is noted already
score() {
  local left=$1 place=$2; shift 2
  if grep -F -- "  $left" official.sha256 2>/dev/null | tail -n 1 | sha256sum --check --status 2>/dev/null &&
     grep -F -- "  manifest.jsonl" official.sha256 | tail -n 1 | sha256sum --check --status; then
    echo "$PWD/$left is there"
    return
  fi
  (cd "$suite/$place" && "$@")
  [ -f "$left" ] || { echo "$* left no $PWD/$left" >&2; exit 1; }
  sha256sum manifest.jsonl "$left" >> official.sha256
}

for folder in "$out" "$out"/*/; do
  folder=${folder%/}
  [ -f "$folder/manifest.jsonl" ] || continue
  scored=$((scored + 1))
  cd "$folder"
  for c in $categories; do
    [ -d "$c/samples" ] || continue
    at="$folder/$c" python=${PYTHON:-python} judge=${JUDGE_PYTHON:-python}
    case $c in
      color|shape|texture) score "$c/annotation_blip/vqa_result.json" BLIPvqa_eval "$python" BLIP_vqa.py --out_dir="$at" ;;
      spatial) score "$c/labels/annotation_obj_detection_2d/vqa_result.json" UniDet_eval "$python" 2D_spatial_eval.py --outpath "$at" ;;
      3d_spatial) score "$c/labels/annotation_obj_detection_3d/vqa_result.json" UniDet_eval "$python" 3D_spatial_eval.py --outpath "$at" ;;
      numeracy) score "$c/annotation_num/vqa_result.json" UniDet_eval "$python" numeracy_eval.py --outpath "$at" ;;
      non_spatial) score "$c/sharegpt4v/vqa_result.json" MLLM_eval/ShareGPT4V-CoT_eval "$judge" Share_eval.py --category action --file-path "$at" --cot ;;
      complex) score "$c/sharegpt4v/vqa_result.json" MLLM_eval/ShareGPT4V-CoT_eval "$judge" Share_eval.py --category complex --file-path "$at" --cot ;;
    esac
  done
done
[ "$scored" -gt 0 ] || { echo "$out holds no finished picture folder; draw with tritflow evaluate t2i-compbench --draw-only" >&2; exit 2; }
