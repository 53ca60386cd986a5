#!/usr/bin/env bash
# lm-evaluation-harness over HTTP: log-likelihoods equal those computed in process.
# olmoe serve --model olmoe-tiny, then: examples/clients/lm_eval.sh --tasks lambada_openai --limit 100
set -euo pipefail
BASE=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
MODEL=${MODEL:-olmoe-tiny}
export OPENAI_API_KEY=${OPENAI_API_KEY:-none}
# tokenizer_backend=remote uses the server's /tokenizer_info and /tokenize; with a folder or hub id as `tokenizer` the
# harness tokenizes itself.
exec lm_eval --model local-completions \
    --model_args "model=$MODEL,base_url=$BASE/completions,tokenizer_backend=${TOKENIZER_BACKEND:-remote},num_concurrent=8,auth_token=$OPENAI_API_KEY" "$@"
