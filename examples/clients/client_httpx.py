"""Three captions of a picture, then the drafts of one drawing as they firm up, with httpx (pip install httpx).

python client_httpx.py apple.png "a red apple" [http://127.0.0.1:8000]
"""

import json
import os
import sys
import time
from pathlib import Path

import httpx

picture, prompt, server = (*sys.argv[1:3], *sys.argv[3:], "http://127.0.0.1:8000")[:3]
headers = {"Authorization": f"Bearer {os.environ.get('MMDLM_API_KEY', 'none')}"}
with httpx.Client(base_url=server, headers=headers, timeout=120) as client:
    while True:
        answer = client.post("/v1/caption", files={"image": Path(picture).read_bytes()}, data={"num_captions": "3"})
        if answer.status_code not in (429, 503):
            break
        time.sleep(int(answer.headers.get("retry-after", "1")))  # the server is full, and says when to come again
    if answer.is_error:
        sys.exit(answer.json()["error"]["message"])
    for caption in answer.json()["data"][0]["captions"]:
        print(f"{caption['confidence']:.2f} {caption['text']}")

    body = {"prompt": prompt, "seed": 7, "stream": True, "drafts": True}
    with client.stream("POST", "/v1/images/generations", json=body) as events:
        for line in events.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "draft" in event:  # b64_json is the preview's PNG
                    print(f"step {event['draft']['step']}: {event['draft']['undecided']:.0%} undecided")
                elif "error" in event:  # after the first byte an error can only be an event
                    sys.exit(event["error"]["message"])
                else:
                    print(f"drawn with seed {event['seed']}")
