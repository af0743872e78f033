"""lm_eval and lmms_eval run the shipped model on tasks of four local pictures, each through its own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmdlm.data.colours import BACKGROUNDS
from mmdlm.errors import InputError
from mmdlm.evaluation.harness_requests import Request, Settings, picture_of, score, settings_from_arguments, write
from mmdlm.pipelines import ImageToText

COLOURS = ("red", "blue", "green", "yellow")
PARTS = """
from PIL import Image


def picture(doc):
    return [Image.open(doc["picture"])]


def exact(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Questions about plain pictures in the world's own colours; the folders of both harnesses' tasks."""
    rows = []
    for number, colour in enumerate(COLOURS):
        picture = tmp_path / f"{colour}.png"
        Image.new("RGB", (64, 64), BACKGROUNDS[colour]).save(picture)
        rows.append({"picture": str(picture), "question": "what color is the background?", "answer": colour,
                     "choices": list(COLOURS), "gold": number, "text": f"a cat on a {colour} background"})
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {docs}}}}}\ntest_split: test\n"
    image = {"lm": "doc_to_image: !function parts.picture\n", "lmms": "doc_to_visual: !function parts.picture\n"}
    for harness, mark in (("lm", "<image>"), ("lmms", "")):
        folder = tmp_path / harness
        folder.mkdir()
        (folder / "parts.py").write_text(PARTS)
        head_here = head + image[harness] + f'doc_to_text: "{mark}{{{{question}}}}"\nmetadata: {{version: 1.0}}\n'
        (folder / "ask.yaml").write_text(
            head_here + "task: mine_ask\noutput_type: generate_until\ndoc_to_target: answer\n"
            'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, max_new_tokens: 8}\n'
            "process_results: !function parts.exact\n"
            "metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]\n"
        )
        (folder / "choose.yaml").write_text(
            head_here + 'task: mine_choose\noutput_type: multiple_choice\ndoc_to_target: "{{gold}}"\n'
            'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
        )
    (tmp_path / "lm" / "words.yaml").write_text(
        head + 'task: mine_words\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
        "metadata: {version: 1.0}\n"
    )
    return tmp_path


def harness(tasks: Path, *command: str) -> dict[str, dict[str, float]]:
    """What a harness writes down of its tasks: {task: {metric: number}}."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hub"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"
    }  # fmt: skip
    arguments = ["--model_args", "samples=2,steps=2,check_greedy=False", "--device", "cpu", "--batch_size", "4"]
    out = tasks / "out"
    done = subprocess.run(
        [sys.executable, *command, *arguments, "--output_path", str(out)], capture_output=True, text=True,
        env=environment, cwd=tasks,
    )  # fmt: skip
    found = list(out.rglob("*results*.json"))
    assert done.returncode == 0 and found, done.stdout[-2000:] + done.stderr[-3000:]
    results: dict[str, dict[str, float]] = json.loads(found[0].read_text())["results"]
    return results


def number(results: dict[str, dict[str, float]], task: str, metric: str) -> float:
    (found,) = (value for name, value in results[task].items() if name.split(",")[0] == metric)
    return float(found)


def test_lm_eval(tasks: Path):
    command = "from mmdlm.cli import main; main()"
    names = "mine_ask,mine_choose,mine_words"
    results = harness(tasks, "-c", command, "eval", "harness", "run", "--model", "mmdlm", "--tasks", names,
                      "--include_path", str(tasks / "lm"))  # fmt: skip
    assert number(results, "mine_choose", "acc") >= 0.75  # backgrounds are what the shipped model is sure of
    assert 0 <= number(results, "mine_ask", "exact") <= 1
    assert 1 < number(results, "mine_words", "word_perplexity") < float("inf")


def test_lmms_eval(tasks: Path):
    results = harness(tasks, "-m", "lmms_eval", "--model", "mmdlm", "--tasks", "mine_ask,mine_choose", "--include_path",
                      str(tasks / "lmms"))  # fmt: skip
    # It takes the smallest number for the likeliest: with the sign wrong this would be near 0.
    assert number(results, "mine_choose", "acc") >= 0.75
    assert 0 <= number(results, "mine_ask", "exact") <= 1


def test_requests(tiny_model: Path, tmp_path: Path):
    pipe = ImageToText.from_pretrained(tiny_model)
    settings = settings_from_arguments("auto", samples="4", steps=4, seed=3)
    pipe.set_progress_bar_config(disable=True)
    assert settings == Settings(batch_size=8, steps=4, samples=4, seed=3, check_greedy=True)
    picture = Image.new("RGB", (16, 16), "red")
    asked = [Request("what colour is it?", picture), Request("a red"), Request("", picture), Request("two yellow")]
    texts = write(pipe, asked, settings, longest=[8] * 4, until=[[]] * 4)
    # a request's answer depends neither on the others nor on the batch, and is cut where it should be
    assert write(pipe, asked, settings._replace(batch_size=1), longest=[8] * 4, until=[[]] * 4) == texts
    assert any(len(text) > 1 for text in texts)
    place = max(range(4), key=lambda place: len(texts[place]))
    stop, seed = texts[place][-1], settings._replace(seed=settings.seed + place)
    cut = write(pipe, [asked[place]], seed, longest=[8], until=[["never", stop]])[0]
    assert cut == texts[place][: texts[place].index(stop)]
    found = score(pipe, asked[:2], [" red", " apple"], settings)
    assert all(nats > 0 for nats, _ in found)
    alone = score(pipe, asked[:2], [" red", " apple"], settings._replace(batch_size=1))
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in found])
    assert [same for _, same in alone] == [same for _, same in found]
    # of all one-token answers to plain text exactly one is what the model writes by itself, the likeliest
    vocabulary = pipe.processor.vocabulary
    words = {pipe.processor.tokenizer.decode([token]): token for token in range(vocabulary.text_size)}
    words = {word: token for word, token in words.items()
             if word.strip() and pipe.processor.text_ids("a red" + word) == [*pipe.processor.text_ids("a red"), token]}
    judged = score(pipe, [Request("a red")] * len(words), list(words), settings)
    assert sum(same for _, same in judged) <= 1
    assert not any(same for nats, same in judged if nats > min(judged)[0])
    with pytest.raises(InputError, match="continuation to be judged is empty"):
        score(pipe, asked[:1], [" "], settings)
    with pytest.raises(InputError, match="too long by"):
        write(pipe, [Request("a red apple " * 40)], settings, longest=[8], until=[[]])


def test_arguments_and_pictures_that_do_not_fit():
    with pytest.raises(InputError, match="no argument 'stepz'"):
        settings_from_arguments(stepz=4)
    with pytest.raises(InputError, match="steps is 'many'"):
        settings_from_arguments(steps="many")
    picture = Image.new("RGB", (4, 4))
    assert picture_of(None) is None and picture_of([[picture]]) is picture
    with pytest.raises(InputError, match="2 pictures"):
        picture_of([picture, [picture]])
