#!/usr/bin/env bash
# Submits run night-2026-01-31: the array of run.sbatch, and report.sbatch, which starts when all tasks have ended.
# The tasks inherit this shell's environment: set the credentials for the storage before you run this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

mkdir -p /shared/out/runs/night-2026-01-31
cp manifest.jsonl /shared/out/runs/night-2026-01-31/manifest.jsonl
run=$(sbatch --parsable run.sbatch)
run=${run%%;*} # sbatch prints ID;CLUSTER if there are several clusters
if ! report=$(sbatch --parsable "--dependency=afterany:$run" report.sbatch); then
  echo "the report job was refused; cancelling job $run" >&2
  scancel "$run"
  exit 1
fi
echo "run $run, report ${report%%;*}"
