#!/usr/bin/env bash
# The protocol by hand. olmoe serve --model olmoe-tiny, then: examples/clients/curl.sh
set -euo pipefail
BASE=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
post() {
    curl --silent --show-error --fail-with-body --no-buffer "$1" \
        --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" --header "Content-Type: application/json" --data "$2"
    echo
}

curl --silent --show-error --fail "${BASE%/v1}/health"; echo
post "$BASE/chat/completions" '{"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 30}'
post "$BASE/completions" '{"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, "stream": true}'
post "${BASE%/v1}/tokenize" '{"prompt": "Once upon a time"}'
