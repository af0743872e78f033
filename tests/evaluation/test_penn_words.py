"""Words as the Java program of COCO's evaluation makes them: pairs recorded from it, and itself where a Java is."""

from __future__ import annotations

import shutil

import pytest

from mmdlm.evaluation.penn_words import penn_words, tokenised

# Recorded from pycocoevalcap 1.2's PTBTokenizer (Stanford CoreNLP 3.4.1).
RECORDED = {
    "A man's dog isn't here, can't you see?": "a man 's dog is n't here ca n't you see",
    "Two dogs -- one black; one white.": "two dogs one black one white",
    "It's 3.5 feet, 1,000 people!": "it 's 3.5 feet 1,000 people",
    'A "quoted" sign (stop) on [the] road.': "a quoted sign -lrb- stop -rrb- on -lsb- the -rsb- road",
    "can not cannot gonna wanna": "can not can not gon na wan na",
    "U.S. flag at 5:30 p.m.": "u.s. flag at 5:30 p.m.",
    "black-and-white photo of a t-shirt": "black-and-white photo of a t-shirt",
    "rock & roll, 50% off $5.00": "rock & roll 50 % off $ 5.00",
    "the boys' bikes ... and o'clock": "the boys bikes and o'clock",
    "don't won't I'm they're we've you'll he'd": "do n't wo n't i 'm they 're we 've you 'll he 'd",
    "A man ,with a hat .And more": "a man with a hat and more",
    "café naïve “quote” ’s … — dash": "café naïve quote 's dash",
    "A stop sign that says 'STOP' at the corner.": "a stop sign that says stop at the corner",
    "A cat laying on a bed!!": "a cat laying on a bed !!",
    "a 1/2 eaten sandwich.": "a 1/2 eaten sandwich",
    "A bathroom with toilet,sink and tub.": "a bathroom with toilet sink and tub",
    "": "",
}
CAPTIONS = [
    "A young boy standing in front of a computer keyboard.",
    "A man, wearing a hat (and glasses), is riding a horse.",
    "Two people's bicycles are parked; one is red.",
    "There's a 12-year-old kid at 10:45 a.m. on 5th Ave. in N.Y.",
    "A motorcycle parked on St. Mark's Place.",
    "Black and white photo of a 1950s-style kitchen",
]


@pytest.mark.parametrize(("caption", "words"), RECORDED.items())
def test_recorded(caption, words):
    assert " ".join(penn_words(caption)) == words


@pytest.mark.skipif(shutil.which("java") is None, reason="compares with a Java program")
def test_the_java_program_says_the_same():
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    theirs = ptb.PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(CAPTIONS)})
    assert [theirs[i][0] for i in range(len(CAPTIONS))] == tokenised(CAPTIONS)
