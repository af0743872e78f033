"""lm_eval (EleutherAI's evaluation harness) runs our models: `mmdlm eval harness run --model mmdlm --tasks ...`.

    mmdlm eval harness run --model mmdlm --model_args pretrained=MODEL,steps=8 --tasks mine --include_path TASKS

lm_eval looks for no plug-ins of others: it knows the model mmdlm where this module was imported before, which is what
the command does; in a program, `import mmdlm.cli.lm_harness` and call `lm_eval.simple_evaluate(model="mmdlm")`.
Model arguments: pretrained (a model directory, the shipped one if not given), steps, samples (masks of a likelihood),
seed, check_greedy. Log-likelihoods are minus the bound: at most as likely as they say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdlm.cli.loading import load_pipeline
from mmdlm.errors import InputError
from mmdlm.evaluation import harness_requests
from mmdlm.evaluation.harness_requests import Request, picture_of

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as missing:
    raise InputError("lm_eval is not installed, expected it for this harness: pip install 'mmdlm[harnesses]'.") from (
        missing
    )

PLACEHOLDER = "<image>"  # where lm_eval's tasks with pictures say that theirs stands


@register_model("mmdlm")
class MMDLM(LM):
    """A model directory of ours as lm_eval's model: text, and pictures where a task has `doc_to_image`."""

    MULTIMODAL = True

    def __init__(
        self, pretrained: str = "", device: str | None = None, batch_size: int | str | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self.settings = harness_requests.settings_from_arguments(batch_size, **settings)
        self.pipe = load_pipeline("ImageToText", Path(pretrained) if pretrained else None, device, quiet=True)
        self._device = self.pipe.model.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests' args: (context, generation settings, {"visual": [...]} where there is a picture)."""
        asked, longest, until = [], [], []
        for request in requests:
            context, generation = request.args[:2]
            asked.append(_asked(context, request.args[2:]))
            longest.append(int(generation.get("max_gen_toks", generation.get("max_new_tokens", 256))))
            stops = generation.get("until") or []
            until.append([stops] if isinstance(stops, str) else list(stops))
        with tqdm(total=len(asked), disable=disable_tqdm, desc="writing") as bar:
            texts = harness_requests.write(
                self.pipe, asked, self.settings, longest=longest, until=until, done=bar.update
            )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Requests' args: (context, continuation, and {"visual": [...]} where there is a picture)."""
        asked = [_asked(request.args[0], request.args[2:]) for request in requests]
        with tqdm(total=len(asked), disable=disable_tqdm, desc="judging") as bar:
            found = harness_requests.score(
                self.pipe, asked, [request.args[1] for request in requests], self.settings, done=bar.update
            )
        results = [(-nats, same) for nats, same in found]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Requests' args: (text,)."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="judging"):
            (nats,) = harness_requests.score_whole(self.pipe, [request.args[0]], self.settings)
            found.append(-nats)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -nats)
        return found


def main(arguments: Sequence[str]) -> None:
    """lm_eval's own command line, which then knows the model mmdlm."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["mmdlm eval harness", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise InputError(f"lm_eval: {error}: mmdlm eval harness ls tasks lists what there is.") from error


def _asked(context: str, rest: Sequence[Any]) -> Request:
    visuals = rest[0].get("visual") if rest and isinstance(rest[0], dict) else None
    return Request(context.replace(PLACEHOLDER, "").strip() if visuals else context, picture_of(visuals))
