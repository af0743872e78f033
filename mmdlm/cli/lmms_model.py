"""A model directory of ours as lmms_eval's model; announced by `mmdlm.evaluation.lmms_harness`.

Model arguments: pretrained (a model directory, the shipped one if not given), steps, samples (masks of a likelihood),
seed, check_greedy. lmms_eval takes the smallest number for the likeliest choice, so its "likelihoods" are losses: here
the bound in nats. (lm_eval takes the largest; `mmdlm.cli.lm_harness` gives it the bound with a minus.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdlm.cli.loading import load_pipeline
from mmdlm.errors import InputError
from mmdlm.evaluation import harness_requests
from mmdlm.evaluation.harness_requests import Request, picture_of

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as missing:
    raise InputError("lmms_eval is not installed, expected it for this harness: pip install 'mmdlm[harnesses]'.") from (
        missing
    )


class MMDLM(lmms):
    """Questions about one picture, captions of it, choices about it; plain text where a task has no picture."""

    is_simple = True

    def __init__(
        self, pretrained: str = "", device: str | None = None, batch_size: int | str | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self.settings = harness_requests.settings_from_arguments(batch_size, **settings)
        self.pipe = load_pipeline("ImageToText", Path(pretrained) if pretrained else None, device, quiet=True)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Requests' args: (context, generation settings, doc_to_visual, doc_id, task, split)."""
        asked, longest, until = [], [], []
        for request in requests:
            context, generation, doc_to_visual, *where = request.args
            asked.append(self._asked(context, doc_to_visual, where))
            longest.append(int(generation.get("max_new_tokens", 256)))
            stops = generation.get("until") or []
            until.append([stops] if isinstance(stops, str) else list(stops))
        with tqdm(total=len(asked), desc="writing") as bar:
            return harness_requests.write(
                self.pipe, asked, self.settings, longest=longest, until=until, done=bar.update
            )

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(nats, greedy): losses. Requests' args: (context, continuation, doc_to_visual, doc_id, task, split).

        Each in a GenerationResult: lmms_eval 0.7.3 turns a pair as it stands into its text, and then fails on it.
        """
        asked, continuations = [], []
        for request in requests:
            # A choice by itself, for acc_mutual_info, has neither picture nor document.
            context, continuation, doc_to_visual, *where = (*request.args, None)[: max(len(request.args), 3)]
            asked.append(self._asked(context, doc_to_visual, where))
            continuations.append(continuation if isinstance(continuation, str) else continuation(self._doc(*where)))
        with tqdm(total=len(asked), desc="judging") as bar:
            found = harness_requests.score(self.pipe, asked, continuations, self.settings, done=bar.update)
        return [GenerationResult(pair) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: nothing here was trained to go on with a conversation."""
        raise InputError("The model mmdlm answers one question at a time: choose a task of one round.")

    def _asked(self, context: str, doc_to_visual: Any, where: Sequence[Any]) -> Request:
        visuals = doc_to_visual(self._doc(*where)) if callable(doc_to_visual) else None
        picture = picture_of(visuals)
        return Request(context if picture is None else context.replace("<image>", "").strip(), picture)

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]
