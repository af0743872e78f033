"""Draw, ask with the answer streamed, and describe, with the official `openai` client (pip install openai).

python client_openai.py "a red apple" apple.png [http://127.0.0.1:8000]
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

prompt, file, server = (*sys.argv[1:3], *sys.argv[3:], "http://127.0.0.1:8000")[:3]
ai = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("MMDLM_API_KEY", "none"))
model = ai.models.list().data[0].id  # the model itself; its adapters follow

drawn = ai.images.generate(model=model, prompt=prompt, extra_body={"seed": 7}).data[0].b64_json
Path(file).write_bytes(base64.b64decode(drawn))

picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{drawn}"}}
question = {"type": "text", "text": "what color is it?"}
for chunk in ai.chat.completions.create(
    model=model, messages=[{"role": "user", "content": [question, picture]}], stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
described = ai.chat.completions.create(model=model, messages=[{"role": "user", "content": [picture]}])
print(described.choices[0].message.content)
