#!/usr/bin/env bash
# Score one checkpoint, or every checkpoint of a sweep, on the paper's six benchmarks, and print the table.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash recipes/math/evaluate.sh FAMILY (--model PATH | --manifest FILE) [options] [-- HYDRA OVERRIDES]

FAMILY
  qwen2_5_math     4K tokens; MATH greedy
  qwen3            16K tokens; MATH sampled at temperature 0.7
  Both: AIME 2025 and 2026, HMMT 2025, OlympiadBench, AMC 2023 as avg@8 at temperature 0.7

What to score
  --model PATH     a Hugging Face checkpoint: a folder or a Hub id
  --manifest FILE  manifest.json of `relex-verl sweep`: every prediction in it

Options
  --label NAME     name of --model in the table (default: from relex.json, else the folder)
  --math500        MATH-500 instead of all 5,000 test problems
  --groups LIST    math,ood (both) or one of them
  --data DIR       folder that prepare.py wrote (default: ~/data/relex_math)
  --out DIR        results, kept and added to (default: outputs/relex_math_eval/FAMILY)
  --dry-run        print the commands and leave
  -h, --help       this text

What is already scored in --out is not scored again. Each group is one run of verl with trainer.val_only=true.
Everything after -- goes to verl, e.g. -- trainer.n_gpus_per_node=1
PYTHON names the interpreter (default: python3). Made for verl 0.9.1.
TEXT
}

fail() {
  echo "evaluate.sh: $1" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
data=$HOME/data/relex_math
family='' model='' manifest='' label='' out='' math=math_test groups=math,ood dry_run=false overrides=()

while (($#)); do
  case $1 in
    --model | --manifest | --label | --groups | --data | --out)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --model) model=$2 ;;
        --manifest) manifest=$2 ;;
        --label) label=$2 ;;
        --groups) groups=$2 ;;
        --data) data=$(realpath -m -- "$2") ;;
        --out) out=$(realpath -m -- "$2") ;;
      esac
      shift 2
      ;;
    --math500) math=math_500 && shift ;;
    --dry-run) dry_run=true && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && overrides=("$@") && break ;;
    -*) fail "unknown option $1 (--help lists them; verl's own go after --)" ;;
    *)
      [[ -z $family ]] || fail "one family at a time: $family or $1"
      family=$1 && shift
      ;;
  esac
done

# Prompt and response share the 4,096 tokens that Qwen2.5-Math has.
greedy=()
case $family in
  qwen2_5_math)
    budget=(data.max_response_length=4096 actor_rollout_ref.rollout.max_model_len=4096)
    greedy=(actor_rollout_ref.rollout.val_kwargs.do_sample=false actor_rollout_ref.rollout.val_kwargs.temperature=0
      actor_rollout_ref.rollout.val_kwargs.top_p=1.0)
    ;;
  qwen3) budget=(data.max_response_length=16384 actor_rollout_ref.rollout.max_model_len=18432) ;;
  '') usage >&2 && exit 2 ;;
  *) fail "unknown family $family: qwen2_5_math or qwen3" ;;
esac
[[ $groups =~ ^(math|ood|math,ood|ood,math)$ ]] || fail "--groups $groups: math,ood or one of them"
out=${out:-$root/outputs/relex_math_eval/$family}

if [[ -n $model && -z $manifest ]]; then
  what=(--model "$model")
  [[ -z $label ]] || what+=(--label "$label")
elif [[ -n $manifest && -z $model ]]; then
  [[ -z $label ]] || fail "--label goes with --model"
  what=(--manifest "$manifest")
else
  fail "give --model or --manifest"
fi
checkpoints=$("$python" "$here/checkpoints.py" "${what[@]}")

# The command that scores checkpoint $2, called $1, on group $3, and where its scores go.
build_command() {
  local files sampling=()
  scores=$3
  if [[ $3 == math ]]; then
    [[ $math == math_test ]] || scores=$math
    files="['$data/$math.parquet']"
    sampling=(actor_rollout_ref.rollout.val_kwargs.n=1 "${greedy[@]}")
  else
    files="['$data/aime_2025.parquet','$data/aime_2026.parquet','$data/hmmt_2025.parquet'"
    files+=",'$data/olympiadbench.parquet','$data/amc_2023.parquet']"
  fi
  command=(env "VERL_FILE_LOGGER_PATH=$out/$1/$scores.jsonl"
    "$python" -m verl.trainer.main_ppo --config-dir "$root/configs" --config-name math_eval
    "actor_rollout_ref.model.path='$2'"
    "data.val_files=$files"
    "reward.custom_reward_function.path='$here/reward.py'"
    "trainer.experiment_name='$1-$scores'"
    "trainer.validation_data_dir='$out/$1/${scores}_answers'"
    "${budget[@]}" "${sampling[@]}" "${overrides[@]}")
}

failed=()
while IFS=$'\t' read -r name path facts; do
  if [[ -f $out/$name/checkpoint.json && $(<"$out/$name/checkpoint.json") != "$facts" ]]; then
    fail "$out/$name holds the scores of another checkpoint: give this one another --label, or take another --out"
  fi
  for group in ${groups//,/ }; do
    build_command "$name" "$path" "$group"
    if $dry_run; then
      printf '%q ' "${command[@]}"
      echo
    elif grep -qs '"val-core/' "$out/$name/$scores.jsonl"; then
      echo "evaluate.sh: $name is already scored on $group: $out/$name/$scores.jsonl"
    else
      mkdir -p "$out/$name"
      printf '%s\n' "$facts" >"$out/$name/checkpoint.json"
      # Not from the loop's own input; and one broken checkpoint does not stop a sweep.
      "${command[@]}" </dev/null || failed+=("$name ($group)")
    fi
  done
done <<<"$checkpoints"

table=("$python" "$here/collect.py" "$out" --csv "$out/table.csv")
if $dry_run; then
  printf '%q ' "${table[@]}"
  echo
  exit 0
fi
"${table[@]}"
if ((${#failed[@]})); then
  printf 'evaluate.sh: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
