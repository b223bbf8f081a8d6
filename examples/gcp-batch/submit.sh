#!/usr/bin/env bash
# Submits the run night-2026-01-31 to GCP Batch with gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

batch() {
  gcloud batch jobs "$@" --location us-central1 --quiet
}

take_back() {
  echo "the job that writes the report was not submitted: deleting night-gs-30116de0" >&2
  batch delete night-gs-30116de0
}

gcloud storage cp manifest.jsonl gs://your-bucket/out/runs/night-2026-01-31/manifest.jsonl
batch submit night-gs-30116de0 --config run.json
trap take_back EXIT
batch submit night-gs-30116de0-report --config report.json
trap - EXIT

echo "run: night-gs-30116de0"
echo "report: night-gs-30116de0-report"
