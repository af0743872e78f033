"""The options that several commands share, and the pipeline they ask for."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdlm import __version__
from mmdlm.errors import InputError

ModelOption = Annotated[Path | None, typer.Option("--model", help="Model directory; the shipped model if not given.")]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", help="An adapter of that model, as `mmdlm finetune` writes it: its run.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...; the fastest at hand if not given.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps; the model's preset if not given.")]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="8bit or 4bit: hold the model's matrices so (needs bitsandbytes).")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def load_pipeline(
    name: str,
    model: Path | None,
    device: str | None,
    quiet: bool,
    quantize: str | None = None,
    *,
    own: str | None = None,
    adapter: Path | None = None,
) -> Any:
    """The pipeline `name` of a model directory, on its device. The model is looked at before anything slow happens.

    `adapter`: a run of finetune, or its adapter's directory. `own` names what the caller does in mmdlm's own layouts:
    InputError for a published model that has others.
    """
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import check_model_directory

    directory = model if model is not None else shipped_model()
    check_model_directory(directory)
    # Collecting garbage while hundreds of modules are imported finds none and costs a fifth of the start.
    gc.disable()
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from mmdlm import pipelines

    gc.enable()
    chosen = usable_device(device)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    extra: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    if quantize is None:
        pipe = getattr(pipelines, name).from_pretrained(directory, **extra).to(torch.device(chosen))
    else:
        # In bfloat16 where it can: what is not quantised (embedding, head, norms) would else outweigh the rest.
        dtype = torch.float32 if chosen == "cpu" else torch.bfloat16
        extra |= {"dtype": dtype, "quantize": quantize, "device_map": chosen}
        pipe = getattr(pipelines, name).from_pretrained(directory, **extra)
        pipe.visual_tokenizer.to(torch.device(chosen))
    if own is not None:
        pipelines.layouts.check_own(pipe.family, pipe.processor.vocabulary, own)
    # None: tqdm is silent when stderr is no terminal.
    pipe.set_progress_bar_config(disable=True if quiet else None, leave=False)
    return pipe


def model_facts(pipe: Any) -> dict[str, str]:
    """What every picture on disk says of the model it came from: its hash, its adapter's, and our version."""
    from mmdlm.model_directory import model_hash
    from mmdlm.models.adapters import adapter_facts

    hashes = {"model_hash": model_hash(Path(pipe.name_or_path)), **adapter_facts(pipe.model)}
    return hashes | {"mmdlm_version": __version__}


def usable_device(device: str | None) -> str:
    """The device asked for, or the fastest at hand; InputError where it cannot be used."""
    import torch

    if device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"  # one of several processes: accelerate launch gives each its own
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise InputError("Nothing can be computed on the device meta: use cpu, cuda or mps.")
        torch.zeros(1, device=device)
    except InputError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        raise InputError(f"The device {device!r} cannot be used ({reason}): try --device cpu.") from error
    return device
