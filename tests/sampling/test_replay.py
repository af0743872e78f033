"""Recordings: played back, every State is the recorded one and the model is not asked."""

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import categorical
from mmdlm.sampling.policies import remdm
from mmdlm.sampling.replay import Recording

MASK = 4


def live(x, predict=lambda ids, where: torch.randn(*where.shape, 5)):
    return denoise(predict, x, remdm(eta=0.3), editable=x == MASK, mask_id=MASK, steps=5, draw=categorical(),
                   revise=True)


def unasked(ids, where):
    raise AssertionError("the model was asked")


def test_what_is_played_is_what_was_recorded(tmp_path):
    path = tmp_path / "steps.safetensors"
    starts = [torch.tensor([[0, MASK, MASK, MASK], [MASK, MASK, 1, 1]]), torch.tensor([[2, 2, MASK]])]
    recording = Recording(path)
    recording.check({"prompt": "a", "seed": 3})
    assert not recording.playing
    recorded = [list(recording.states(x, live(x))) for x in starts]
    path.write_bytes(recording.content())
    again = Recording(path)
    again.check({"prompt": "a", "seed": 3})
    for x, states in zip(starts, recorded, strict=True):
        played = list(again.states(x, live(x, unasked)))
        assert len(played) == len(states)
        for one, other in zip(played, states, strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
    with pytest.raises(InputError, match="another start"):
        list(again.states(starts[0], live(starts[0])))  # a third call was never recorded


def test_another_command_or_start_is_refused(tmp_path):
    path, x = tmp_path / "steps.safetensors", torch.tensor([[0, MASK]])
    recording = Recording(path)
    recording.check({"seed": 3})
    list(recording.states(x, live(x)))
    path.write_bytes(recording.content())
    with pytest.raises(InputError, match="recorded with seed '3', now it is '4'"):
        Recording(path).check({"seed": 4})
    with pytest.raises(InputError, match="another start"):
        list(Recording(path).states(torch.tensor([[1, MASK]]), live(x)))
    (tmp_path / "text").write_text("no recording")
    for wrong in (tmp_path / "text", tmp_path):
        with pytest.raises(InputError, match="is no recording"):
            Recording(wrong)
