#!/usr/bin/env bash
# Submits the run night-2026-01-31 to Kubernetes with kubectl, and copies the manifest with the aws command line tool.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

cluster() {
  kubectl --namespace renders "$@"
}

cluster create --dry-run=server -f job.yaml >/dev/null
aws s3 cp manifest.jsonl s3://your-bucket/out/runs/night-2026-01-31/manifest.jsonl
if ! accepted=$(cluster create -f job.yaml -o name); then
  if [[ -n $accepted ]]; then
    echo "one of the two jobs was not accepted: deleting the other one" >&2
    mapfile -t names <<<"$accepted"
    cluster delete "${names[@]}"
  fi
  exit 1
fi
echo "$accepted"
