#!/usr/bin/env bash
# GRPO on MATH with RELEX, on 8 GPUs: one recipe of configs/, with the paper's cut and target.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash recipes/math/run.sh RECIPE [options] [-- HYDRA OVERRIDES]

RECIPE (a file of configs/)       cut -> target of the paper
  qwen2_5_math_1_5b               75 -> 500
  qwen3_4b_base                   75 -> 500
  qwen3_8b_base                   100 -> 750
  qwen3_8b_base_megatron          100 -> 750   Megatron-Core instead of FSDP
  qwen3_8b_base_separate_async    100 -> 750   4 GPUs train, 4 GPUs generate

Options
  --data DIR       folder that prepare.py wrote (default: ~/data/relex_math)
  --out DIR        checkpoints and RELEX's output (default: outputs/relex_math/RECIPE)
  --t-cut K        another cut, a step or a share of all steps
  --targets A,B    other targets, steps or shares
  --no-relex       the same run without RELEX
  --dry-run        print the command and leave
  -h, --help       this text

Everything after -- goes to verl, e.g. -- data.train_batch_size=256 relex.trajectory=bf16
PYTHON names the interpreter (default: python3). Made for verl 0.9.1.
TEXT
}

fail() {
  echo "run.sh: $1" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
data=$HOME/data/relex_math
recipe='' out='' t_cut='' targets='' relex=true dry_run=false overrides=()

while (($#)); do
  case $1 in
    --data | --out | --t-cut | --targets)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --data) data=$(realpath -m -- "$2") ;;
        --out) out=$(realpath -m -- "$2") ;;
        --t-cut) t_cut=$2 ;;
        --targets) targets=$2 ;;
      esac
      shift 2
      ;;
    --no-relex) relex=false && shift ;;
    --dry-run) dry_run=true && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && overrides=("$@") && break ;;
    -*) fail "unknown option $1 (--help lists them; verl's own go after --)" ;;
    *)
      [[ -z $recipe ]] || fail "one recipe at a time: $recipe or $1"
      recipe=$1 && shift
      ;;
  esac
done

mode=default
case $recipe in
  qwen2_5_math_1_5b | qwen3_4b_base) paper_cut=75 paper_target=500 ;;
  qwen3_8b_base | qwen3_8b_base_megatron) paper_cut=100 paper_target=750 ;;
  qwen3_8b_base_separate_async) paper_cut=100 paper_target=750 mode=separate_async ;;
  '') usage >&2 && exit 2 ;;
  *) fail "unknown recipe $recipe (--help lists them)" ;;
esac

command=("${PYTHON:-python3}" -m verl.trainer.main_ppo --config-dir "$root/configs" --config-name "$recipe"
  "data.train_files='$data/math_train.parquet'"
  "data.val_files='$data/math_500.parquet'"
  "reward.custom_reward_function.path='$here/reward.py'")
[[ -z $out ]] || command+=("trainer.default_local_dir='$out'")
if $relex; then
  command+=("+relex=$mode" "relex.t_cut=${t_cut:-$paper_cut}" "relex.targets=[${targets:-$paper_target}]")
fi
command+=("${overrides[@]}")

if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
[[ -f $data/math_train.parquet ]] || fail "no $data/math_train.parquet: python recipes/math/prepare.py --out '$data'"
exec "${command[@]}"
