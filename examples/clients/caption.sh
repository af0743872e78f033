#!/bin/sh
# Captions of a picture, with curl alone:  caption.sh apple.png [http://127.0.0.1:8000] [num_captions]
# With keys: MMDLM_API_KEY=... caption.sh ...
set -eu
picture=$1 server=${2:-http://127.0.0.1:8000} count=${3:-1}
exec curl --silent --show-error --fail-with-body --max-time 120 \
    --header "Authorization: Bearer ${MMDLM_API_KEY:-none}" \
    --form "image=@$picture" --form "num_captions=$count" "$server/v1/caption"
