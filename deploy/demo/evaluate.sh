#!/usr/bin/env bash
# Serves the demo on a free port, asks it every held-out prompt under every model name, prints the table of accuracies
# and writes deploy/demo/report/accuracy.json. From the repository's root: deploy/demo/evaluate.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/bin
log=$(mktemp)
"$bin/polylogit" serve deploy/demo/polylogit.yaml --port 0 >"$log" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
until url=$(grep -om1 'http://[0-9.:]*' "$log"); do
    kill -0 "$server" || exit 1
    sleep 0.5
done
name=polylogit-demo
"$bin/python" -m gate.evaluate --url "$url/v1" --prompts deploy/demo/prompts/test.jsonl \
    --output deploy/demo/report/accuracy.json --oracle $name:math $name:text $name:chat \
    --models $name:math $name:text $name:chat $name:uniform $name:uniform-prob $name:product $name:confidence \
    $name:entropy $name:perplexity $name:gate "$@"
