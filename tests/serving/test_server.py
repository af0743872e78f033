"""The interfaces of a real server, through the official openai client where it has them, through httpx elsewhere."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from PIL import Image

from mmdlm.pipelines import Fill, ImageToText, TextToImage

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def ai(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="not needed here", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(content: bytes, *words: str) -> list[dict[str, object]]:
    """Messages with a picture and perhaps a question."""
    texts = [{"type": "text", "text": text} for text in words]
    return [{"role": "user", "content": [*texts, {"type": "image_url", "image_url": {"url": data_url(content)}}]}]


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def refused(answer: httpx.Response, status: int = 400) -> dict:
    """The error of a refusal, which is OpenAI's body with one sentence and nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in answer.text
    assert "mmdlm/" not in answer.text and "site-packages" not in answer.text
    return error


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_through_the_openai_client_are_the_pipelines(ai, tiny_model):
    answer = ai.images.generate(prompt=PROMPT, n=2, model="tiny", extra_body={"seed": 7, "num_inference_steps": 3})
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = pipe(PROMPT, num_images_per_prompt=2, num_inference_steps=3, generator=seeds).images
    for drawn, picture in zip(answer.data, expected, strict=True):
        assert opened(drawn.b64_json).tobytes() == picture.tobytes()
    assert opened(answer.data[1].b64_json).text["seed"] == "8"
    assert answer.usage.output_tokens == 32


def test_a_picture_as_a_url_and_without_a_seed(http):
    answers = [
        http.post("/v1/images/generations", json={"prompt": PROMPT, "response_format": "url", "size": "16x16"}).json()
        for _ in range(2)
    ]
    seeds = {answer["data"][0]["seed"] for answer in answers}
    assert len(seeds) == 2 and all(answer["data"][0]["url"].startswith("data:image/png;base64,") for answer in answers)


def test_a_picture_streams_in_openais_events(ai):
    stream = ai.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "num_inference_steps": 8}
    )
    seen = list(stream)
    kinds = [one.type.rpartition(".")[2] for one in seen]
    # one fewer where the model was faster than this client
    assert kinds in (["partial_image", "partial_image", "completed"], ["partial_image", "completed"])
    assert [one.partial_image_index for one in seen[:-1]] == list(range(len(seen) - 1))
    whole = ai.images.generate(prompt=PROMPT, extra_body={"seed": 7, "num_inference_steps": 8})
    assert opened(seen[-1].b64_json).tobytes() == opened(whole.data[0].b64_json).tobytes()
    assert seen[-1].usage.output_tokens == 16


def test_drafts_of_a_picture_firm_up(http):
    body = {"prompt": PROMPT, "n": 2, "stream": True, "drafts": True, "num_inference_steps": 6, "seed": 1}
    seen = events(http.post("/v1/images/generations", json=body).text)
    assert sum(one["type"].endswith("completed") for one in seen) == 2
    for row in (0, 1):
        drafts = [one["draft"] for one in seen if one["index"] == row and "draft" in one]
        shares = [draft["undecided"] for draft in drafts]
        assert len(drafts) > 1 and shares == sorted(shares, reverse=True) and shares[-1] == 0
        assert len(drafts[-1]["confidence"]) == 4 and all(0 <= sure <= 100 for sure in drafts[-1]["confidence"][0])


def test_an_edit_through_the_openai_client_is_fills_and_keeps_what_is_not_masked(ai, http, picture, tiny_model):
    given = Image.open(io.BytesIO(picture(4)))
    alpha = Image.new("L", (16, 16), 255)
    alpha.paste(0, (0, 0, 8, 16))
    mask, holed = Image.new("RGBA", (16, 16), "white"), given.convert("RGBA")
    mask.putalpha(alpha)
    holed.putalpha(alpha)
    sampling = {"seed": 7, "num_inference_steps": 3}
    files = {"image": ("a.png", picture(4)), "mask": ("m.png", encoded(mask)), "prompt": PROMPT}
    (edited,) = ai.images.edit(model="tiny", **files, extra_body=sampling).data
    pipe = Fill.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    white = Image.new("L", (16, 16), 0)
    white.paste(255, (0, 0, 8, 16))
    seeded = [torch.Generator().manual_seed(7)]
    (expected,) = pipe(PROMPT, given, white, num_inference_steps=3, keep_pixels=True, generator=seeded).images
    drawn = opened(edited.b64_json)
    assert drawn.tobytes() == expected.tobytes() != given.tobytes()
    assert drawn.crop((8, 0, 16, 16)).tobytes() == given.crop((8, 0, 16, 16)).tobytes()
    for others in ({"image": encoded(holed)}, {"image": picture(4), "mask": encoded(white)}):
        answer = http.post("/v1/images/edits", files=others, data={"prompt": PROMPT, **sampling}).json()
        kept = opened(answer["data"][0]["b64_json"]).crop((8, 0, 16, 16))
        assert kept.tobytes() == given.crop((8, 0, 16, 16)).tobytes()
    fields = {"prompt": PROMPT, "stream": "true", "drafts": "true"}
    first, *_, last = events(http.post("/v1/images/edits", files=others, data=fields).text)
    assert first["draft"]["undecided"] < 1 and last["usage"]["output_tokens"] == 8


@pytest.mark.parametrize(
    ("names", "fields", "words"),
    [
        (["image"], {"prompt": PROMPT}, "nowhere transparent and there is no mask"),
        (["image", "large"], {"prompt": PROMPT}, "The mask has 20 x 20 pixels"),
        (["image", "image", "mask"], {"prompt": PROMPT}, ""),
        (["image", "other"], {"prompt": PROMPT}, "Unknown file 'other'"),
        (["mask"], {"prompt": PROMPT}, "Got 0 pictures and 1 masks"),
        (["image", "mask"], {}, "prompt: Field required"),
        (["image", "mask"], {"prompt": PROMPT, "n": "many"}, "n: Input should be a valid integer"),
        (["image", "mask"], {"prompt": PROMPT, "input_fidelity": "high"}, "Unknown field 'input_fidelity'"),
    ],
)
def test_a_bad_edit_is_refused(http, picture, names, fields, words):
    files = [("mask" if name == "large" else name, picture(0, side=20 if name == "large" else 16)) for name in names]
    assert words in refused(http.post("/v1/images/edits", files=files, data=fields))["message"]


# ------------------------------------------------------------------------------------------------ captions and chat


def test_a_caption_with_one_file(http, picture, tiny_model):
    answer = http.post("/v1/caption", files={"image": picture(0)}).json()
    pipe = ImageToText.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(picture(0))
    (caption,) = answer["data"][0]["captions"]
    assert caption["text"] == expected.texts[0]
    assert caption["confidence"] == pytest.approx(expected.confidences[0], rel=1e-4)


def test_captions_of_many_pictures_many_each(http, picture):
    files = [("image", (f"{i}.png", picture(i, side=16 + i))) for i in range(3)]
    answer = http.post("/v1/caption", files=files, data={"num_captions": "3", "seed": "5", "max_tokens": "9"}).json()
    assert len(answer["data"]) == 3 and answer["seed"] == 5
    for one in answer["data"]:
        sure = [caption["confidence"] for caption in one["captions"]]
        assert len(sure) == 3 and sure == sorted(sure, reverse=True) and all(0 < value <= 1 for value in sure)
    urls = [data_url(picture(i, side=16 + i)) for i in range(3)]
    body = {"image_url": urls, "num_captions": 3, "seed": 5, "max_tokens": 9, "score": False}
    again = http.post("/v1/caption", json=body).json()["data"]
    assert [[c["text"] for c in one["captions"]] for one in again] == [
        [c["text"] for c in one["captions"]] for one in answer["data"]
    ]
    assert again[0]["captions"][0].keys() == {"text"}


def test_chat_through_the_openai_client(ai, picture, tiny_model):
    pipe = ImageToText.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    for words in ([], ["how many?"]):
        answer = ai.chat.completions.create(model="tiny", messages=about(picture(0), *words))
        expected = pipe(picture(0), words[0] if words else None).texts[0]
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage.total_tokens > 16
    several = ai.chat.completions.create(
        model="tiny", messages=about(picture(0)), n=3, temperature=1.0, seed=3, max_tokens=5
    )
    assert len({choice.index for choice in several.choices}) == 3


def test_chat_streams_what_it_answers_whole(ai, picture):
    asked = {"model": "tiny", "messages": about(picture(1), "what colour is it?"), "temperature": 0}
    whole = ai.chat.completions.create(**asked)
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    (finish,) = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} - {None}
    assert finish == whole.choices[0].finish_reason
    drafted = list(ai.chat.completions.create(**asked, stream=True, extra_body={"drafts": True}))
    drafts = [chunk.choices[0].draft for chunk in drafted if hasattr(chunk.choices[0], "draft")]
    shares = [draft["undecided"] for draft in drafts]
    assert len(drafts) > 1 and shares == sorted(shares, reverse=True) and shares[-1] == 0
    assert "\u2592" in drafts[0]["text"] and "\u2592" not in drafts[-1]["text"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in drafted) == text


def test_the_model_is_listed_and_found_by_its_name(ai):
    (model,) = ai.models.list().data
    assert model.id == "tiny" and ai.models.retrieve("tiny").id == "tiny"
    for name in ("gpt-4o", "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc"):
        with pytest.raises(openai.NotFoundError) as raised:
            ai.images.generate(prompt="x", model=name)
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve(name)


def test_many_at_once_get_what_they_get_alone(http, server, picture):
    """Mixed tasks, lengths, steps and draws: the same bytes alone and together, and they did share forwards."""

    def ask(i: int) -> object:
        with server.client() as client:
            if i % 3 == 0:
                body = {"prompt": "two yellow stars"[: 3 + i], "seed": i, "num_inference_steps": 2 + i, "n": 1 + i % 2}
                return client.post("/v1/images/generations", json=body).json()["data"]
            body = {"messages": about(picture(i), *(["how many?"] if i % 3 == 1 else [])), "temperature": 0, "seed": i}
            answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            return answer["message"], round(answer["confidence"], 4)

    alone = [ask(i) for i in range(12)]
    forwards, steps = server.metric("mmdlm_forwards_total"), server.metric("mmdlm_steps_total")
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    shared = (server.metric("mmdlm_steps_total") - steps) / (server.metric("mmdlm_forwards_total") - forwards)
    assert shared > 1.5, f"{shared:.2f} jobs a forward"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/images/generations", {"prompt": "x", "style": "vivid"}, "style", "Unknown field 'style'"),
        ("/v1/images/generations", {}, "prompt", "Field required"),
        ("/v1/images/generations", {"prompt": 3}, "prompt", "valid string"),
        ("/v1/images/generations", {"prompt": " "}, None, "prompt is empty"),
        ("/v1/images/generations", {"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ("/v1/images/generations", {"prompt": "x", "n": 99}, "n", "expected at most 16"),
        ("/v1/images/generations", {"prompt": "x", "size": "1024x1024"}, "size", "expected '16x16'"),
        ("/v1/images/generations", {"prompt": "x", "seed": -1}, "seed", "greater"),
        ("/v1/images/generations", {"prompt": "x", "num_inference_steps": 10**9}, None, "num_inference_steps is"),
        ("/v1/images/generations", {"prompt": "x" * 300}, None, "too long by"),
        ("/v1/images/generations", {"prompt": "\ud800"}, None, ""),
        ("/v1/images/generations", {"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ("/v1/chat/completions", {"messages": [], "tools": []}, "tools", "Unknown field 'tools'"),
        ("/v1/chat/completions", {"messages": []}, "messages", "at least 1"),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}, "messages.0.role", "'user'"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "messages.0.content", "0 pictures"),
        ("/v1/caption", {"image_url": "x", "frames": 3}, "frames", "Unknown field 'frames'"),
        ("/v1/caption", {}, "image_url", "one of two ways"),
        ("/v1/caption", {"image_url": "data:image/png;base64,@@@"}, None, "base64 is broken"),
        ("/v1/caption", {"image_url": "file:///etc/passwd"}, None, "begins with 'file'"),
        ("/v1/caption", {"image_url": "http://127.0.0.1:1/a.png"}, None, "fetches no pictures from '127.0.0.1'"),
    ],
)
def test_a_bad_request_is_one_sentence_with_the_fields_name(http, path, body, param, words):
    content = json.dumps(body).encode()
    error = refused(http.post(path, content=content, headers={"content-type": "application/json"}))
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None


def test_the_openai_client_raises_its_own_errors(ai, picture):
    with pytest.raises(openai.BadRequestError, match="Unknown field 'logprobs'") as raised:
        ai.chat.completions.create(model="tiny", messages=about(picture(0)), logprobs=True)
    assert raised.value.param == "logprobs" and raised.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError, match="expected one: this model answers one question"):
        ai.chat.completions.create(model="tiny", messages=about(picture(0)) * 2)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "x", "seed": 1e400}', "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 400),
    ],
)
def test_a_body_that_is_no_json_is_refused(http, content, kind, status):
    refused(http.post("/v1/images/generations", content=content, headers={"content-type": kind}), status)
    answer = http.post("/v1/caption", content=content, headers={"content-type": kind})
    refused(answer, 415 if "form" in kind else status)


PART = b'--x\r\nContent-Disposition: form-data; name="image"'


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"--x", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (PART + b"\r\n\r\nno file\r\n--x--", "multipart/form-data; boundary=x"),
        (PART + b'; filename="a"\r\n\r\n', "multipart/form-data; boundary=x"),
    ],
)
def test_a_broken_form_is_refused(http, content, kind):
    refused(http.post("/v1/caption", content=content, headers={"content-type": kind}))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BAD = {
    "empty": (lambda make: b"", "is empty"),
    "text": (lambda make: b"hello", "no picture that can be read"),
    "svg": (lambda make: b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', "no picture that can be read"),
    "html": (lambda make: b"<!doctype html><script>alert(1)</script>", "no picture that can be read"),
    "pdf": (lambda make: b"%PDF-1.4\n%%EOF", "no picture that can be read"),
    "eps": (lambda make: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
    "zip": (lambda make: b"PK\x03\x04" + bytes(50), "no picture that can be read"),
    "truncated png": (lambda make: make(0, side=64)[:500], "broken or cut short"),
    "truncated jpeg": (lambda make: make(0, side=64, kind="JPEG")[:-500], "broken or cut short"),
    "only a head": (lambda make: make(0)[:20], "no picture that can be read"),
    "bomb": (lambda make: bomb(), "megapixels"),
    "animated": (lambda make: animated(), "is animated"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_picture_is_refused_and_touches_no_other_request(http, server, picture, how):
    make, words = BAD[how]
    body = {"messages": about(picture(2)), "temperature": 0}
    with ThreadPoolExecutor(2) as pool, server.client() as other:
        good = pool.submit(other.post, "/v1/chat/completions", json=body)
        bad = http.post("/v1/caption", files={"image": ("picture.png", make(picture), "image/png")})
        assert words in refused(bad)["message"]
        assert good.result().status_code == 200
    assert words in refused(http.post("/v1/caption", json={"image_url": data_url(make(picture))}))["message"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_a_picture_is_is_seen_in_its_content(http, picture, kind):
    answer = http.post("/v1/caption", files={"image": ("a.txt", picture(0, kind=kind), "text/plain")})
    assert answer.status_code == 200, answer.text


def test_paths_and_methods_that_are_not_there(http):
    assert refused(http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert refused(http.get("/v1/images/generations"), 405)["code"] == "method_not_allowed"
    assert http.get("/docs").status_code == 404


# ------------------------------------------------------------------------------------------------ around them


def test_every_answer_has_an_id_that_is_in_the_log(http, server):
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"x-request-id": "my-own.id_1"})
    assert answer.headers["x-request-id"] == "my-own.id_1"
    assert http.get("/health", headers={"x-request-id": "no\tid" + "x" * 99}).headers["x-request-id"].isalnum()
    (line,) = [line for line in server.log() if line.get("request_id") == "my-own.id_1"]
    assert line["path"] == "/v1/images/generations" and line["status"] == 200 and line["rows"] == 1
    assert line["client"] == "127.0.0.1" and line["level"] == "info" and line["seconds"] > 0


def test_the_page_and_the_answers_have_security_headers(http):
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for answer in (page, http.get("/health"), http.get("/v1/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer" and "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_other_sites_pages_and_other_names_get_nothing(http):
    evil = {"origin": "https://evil.example"}
    assert refused(http.post("/v1/caption", headers=evil), 403)["code"] == "wrong_origin"
    assert refused(http.get("/v1/models", headers={"host": "evil.example"}), 403)["code"] == "wrong_host"
    own = {"origin": f"http://{http.base_url.netloc.decode()}"}
    assert http.get("/v1/models", headers=own).status_code == 200


def test_the_metrics_and_the_description_of_the_interface(http):
    http.post("/v1/images/generations", json={"prompt": PROMPT})
    text = http.get("/metrics").text
    for name in ("queue_rows", "batch_rows_bucket", "steps_total", "tokens_per_forward_sum", "request_seconds_bucket"):
        assert f"mmdlm_{name}" in text
    assert 'mmdlm_requests_total{route="/v1/images/generations",status="200"}' in text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/caption", "/v1/chat/completions", "/v1/images/generations", "/v1/models"} <= paths.keys()


def test_two_hundred_connections_at_once(server):
    """Open at the same time, all of them answered."""
    answered: list[int] = []
    barrier = threading.Barrier(200)

    def one(i: int) -> None:
        with server.client() as client:
            barrier.wait()
            answered.append(client.get("/health").status_code)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answered == [200] * 200


def test_nothing_is_left_running(server):
    until = time.monotonic() + 20
    while server.metric("mmdlm_active_rows") and time.monotonic() < until:
        time.sleep(0.1)
    assert server.metric("mmdlm_active_rows") == server.metric("mmdlm_queue_rows") == 0
    assert not [line for line in server.log() if line["level"] == "error"]
