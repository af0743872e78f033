"""`mmdlm doctor`: whether a model fits, before anything of it is fetched or read but its configuration."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdlm.errors import InputError


def doctor(
    model: Annotated[str, typer.Option("--model", metavar="NAME_OR_DIR", help="A model: directory or Hub name.")],
    vram: Annotated[
        float | None, typer.Option("--vram", help="GiB of accelerator memory; default: that of this machine.")
    ] = None,
) -> None:
    """Say how large a model is, whether it fits, and how it would be loaded. Reads its config.json only."""
    if vram is not None and not vram > 0:
        raise InputError(f"--vram is {vram}, expected a number of GiB above 0.")
    import torch

    from mmdlm.convert import sizing

    config = sizing.find_configuration(model)
    size = sizing.size_of(config)
    trunk, family = config.trunk, (config.published or {}).get("family", "mmdlm")
    shown = {form: sizing.weight_bytes(size, form) for form in sizing.MATRIX_BYTES}
    lines = {
        "model": f"{model} ({family}: {trunk['model_type']} trunk, {trunk['num_hidden_layers']} layers, width "
        f"{trunk['hidden_size']}, rows of up to {config.max_positions} tokens)",
        "parameters": f"{_count(size.parameters)}, of which {_count(size.tables)} in the embedding and the head",
        "weights": " | ".join(f"{form} {_memory(weights)}" for form, weights in shown.items()),
        "a full row": f"about {_memory(sizing.working_bytes(config, 'bfloat16'))} more in bfloat16",
    }
    if vram is None and torch.cuda.is_available():
        vram = torch.cuda.get_device_properties(0).total_memory / sizing.GIB
    if vram is None:
        lines["fits"] = "unknown: there is no accelerator here, give --vram"
        lines["load with"] = "dtype=float32 on the CPU"
    else:
        chosen = sizing.plan(config, size, vram)
        room = {
            form: weights + sizing.working_bytes(config, form) <= vram * sizing.GIB for form, weights in shown.items()
        }
        lines[f"in {vram:g} GiB"] = " | ".join(f"{form} {'fits' if fits else 'no'}" for form, fits in room.items())
        if chosen is None:
            lines["load with"] = "nothing fits: take a larger accelerator or several (device_map='auto')"
        else:
            how = "dtype=bfloat16" if chosen.form == "bfloat16" else f"dtype=bfloat16, quantize={chosen.form}"
            lines["load with"] = f"{how}, device_map=cuda, at most {chosen.rows} full rows at once"
    for name, text in lines.items():
        typer.echo(f"{name:12} {text}")


def _memory(size: int) -> str:
    """16031162368 -> 14.9 GiB; small models in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _count(number: int) -> str:
    """8015581184 -> 8.02 B."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)
