#!/usr/bin/env bash
# Submits the run night-2026-01-31 to AWS Batch with the aws command line tool.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export AWS_PAGER=

batch() {
  aws batch "$@" --region eu-central-1
}

# definition NAME FILE: prints the ARN of the job definition and registers the definition if it is not registered yet.
# NAME contains a digest of the file's content.
definition() {
  local arn
  arn=$(batch describe-job-definitions --job-definition-name "$1" --status ACTIVE --no-paginate \
    --query 'jobDefinitions[0].jobDefinitionArn' --output text) || return
  if [[ -z $arn || $arn == None ]]; then
    arn=$(batch register-job-definition --cli-input-json "file://$2" --query jobDefinitionArn --output text) || return
  fi
  echo "$arn"
}

# submit FILE DEFINITION: submits the job and prints its id. Sent only once: a repeated request could submit two jobs.
submit() {
  AWS_MAX_ATTEMPTS=1 batch submit-job --cli-input-json "file://$1" --job-definition "$2" --query jobId --output text
}

take_back() {
  echo "the job that writes the report was not submitted: terminating $run" >&2
  batch terminate-job --job-id "$run" --reason 'the job that writes the report was not submitted'
}

aws s3 cp manifest.jsonl s3://your-bucket/out/runs/night-2026-01-31/manifest.jsonl
run_definition=$(definition video-lab-run-d273d77c3f2365e9 job-definition.json)
report_definition=$(definition video-lab-report-64f5d7ba96de899c report-definition.json)

run=$(submit run.json "$run_definition")
trap take_back EXIT
report=$(submit report.json "$report_definition")
trap - EXIT

echo "run: $run"
echo "report: $report"
