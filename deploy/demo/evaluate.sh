#!/usr/bin/env bash
# Asks the demo every held-out prompt under every model name it offers, prints the table of accuracies and writes every
# answer to deploy/demo/report/accuracy.json. From the repository's root: deploy/demo/evaluate.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prompts=deploy/demo/prompts/test.jsonl
name=polylogit-demo
"$bin/polylogit" evaluate deploy/demo/polylogit.yaml --prompts $prompts --max-tokens 24 --output "$work/accuracy.json" \
    --models $name:{math,text,chat,uniform,uniform-prob,product,confidence,entropy,perplexity,gate}
"$bin/python" -m gate.baselines.routing --models $name:{math,text,chat} --results "$work/accuracy.json" --prompts $prompts \
    --output "$work/oracle.json"
"$bin/polylogit" report "$work"/{accuracy,oracle}.json --compare $name:gate
mv "$work/accuracy.json" deploy/demo/report/accuracy.json
