"""Low-rank adapters (LoRA, arXiv 2106.09685) of the mask predictor, by peft: made, saved, merged, mixed in a batch.

    W x  ->  W x + alpha / rank * B A x        A [rank, in] random, B [out, rank] zero at first; only they are trained

`add_lora(model, rank=16)` puts them into the trunk's matrices, and into the two that fold image places where there are
any. Peft injects them in place, so the model's own forward, its bits and its folding stay as they are. An adapter is a
directory in peft's format, `adapter_config.json` and `adapter_model.safetensors`; its `revision` is the hash of the
model directory that it was trained on, and another model refuses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.model_directory import COMPONENTS, model_hash
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.models.new_words import add_new_words, new_rows, new_words, settle_new_words

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fold", "unfold")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_BASE = "__base__"  # peft's name for no adapter


def add_lora(
    model: MaskPredictor,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    name: str = "default",
) -> None:
    """Adds a fresh adapter to `model`, which computes as before until it is trained; only it and new words will be.

    alpha: the product B A is scaled by alpha / rank; default rank, that is 1. targets: last names of linear modules,
    default those of TARGETS that the model has. A is drawn from torch's global generator.

    Raises InputError for a rank below 1, targets that the model has not, and a name that is taken or cannot be one.
    """
    from peft import LoraConfig

    found = _linear_names(model)
    wanted = list(targets) if targets is not None else [target for target in TARGETS if target in found]
    unknown = sorted(set(wanted) - found)
    if unknown or not wanted:
        raise InputError(
            f"LoRA targets are {wanted}, expected some of this model's linear modules: {', '.join(sorted(found))}."
        )
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"LoRA got rank {rank} and dropout {dropout}, expected a rank from 1 on and 0 <= dropout < 1.")
    _check_new_name(model, name)
    scale = float(rank if alpha is None else alpha)
    config = LoraConfig(r=rank, lora_alpha=cast(int, scale), lora_dropout=dropout, target_modules=wanted, bias="none")
    _inject(model, config, name)
    for rows in new_rows(model).values():
        rows.requires_grad_(True)


def save_adapter(model: MaskPredictor, directory: Path, *, base: str, name: str = "default") -> None:
    """Writes the adapter beside its place and renames it there; one that stands there is replaced.

    base: hash of the model directory it belongs to (`base_hash` before the adapter was added, or `model_hash`).
    """
    from peft import get_peft_model_state_dict

    _check_known(model, [name])
    config = model.peft_config[name].to_dict()
    # A path of the machine that trained says nothing elsewhere: what the base is, its hash says.
    config |= {"base_model_name_or_path": None, "revision": base, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    if new_words(model):
        config["new_words"] = new_words(model)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) | new_rows(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, place / WEIGHTS)
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
        if directory.exists():
            doomed = Path(tempfile.mkdtemp(prefix=".deleting-", dir=directory.parent))
            os.replace(directory, doomed / directory.name)
            os.replace(place, directory)
            shutil.rmtree(doomed)
        else:
            os.replace(place, directory)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def load_adapter(model: MaskPredictor, directory: Path, *, name: str = "default", base: str | None = None) -> None:
    """Puts a saved adapter into `model` under `name`, in use from then on (the others are not), and not trainable.

    directory: of the adapter, or of the run that holds `adapter/`. base: hash of the model's directory; found by
    `base_hash` if not given. Raises InputError where there is no adapter, or a broken one, or one of another base.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    place = adapter_directory(directory)
    settings = read_adapter(place)
    own = base_hash(model) if base is None else base
    if settings["revision"] != own:
        raise InputError(
            f"The adapter in {place} belongs to the model {settings['revision']}, this one is {own}: "
            "load it with the model it was trained on (--model), or train it again on this one."
        )
    _check_new_name(model, name)
    try:
        tensors = load_file(place / WEIGHTS)
        config = LoraConfig(**{key: settings[key] for key in ("r", "lora_alpha", "target_modules")}, bias="none")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The adapter in {place} is broken ({_first_line(error)}): copy or train it again.") from error
    rows = {key: tensors.pop(key) for key in list(tensors) if key.startswith("new_rows.")}
    words = settings.get("new_words", [])
    if words and (adapter_names(model) or sorted(rows) != ["new_rows.embedding", "new_rows.head"]):
        raise InputError(f"The adapter in {place} has words of its own: load it into a model without other adapters.")
    if words:
        add_new_words(model, words)
        for key, value in new_rows(model).items():
            value.data.copy_(rows[key])
    _inject(model, config, name)
    expected = {key for key in model.state_dict() if f".{name}.weight" in key and ".lora_" in key}
    try:
        set_peft_model_state_dict(model, tensors, adapter_name=name)
        if len(expected) != len(tensors):
            raise ValueError(f"it has {len(tensors)} tensors, expected {len(expected)}")
    except (RuntimeError, ValueError) as error:
        model.delete_adapter(name)
        raise InputError(
            f"The adapter in {place} does not fit this model ({_first_line(error)}): train it again on this one."
        ) from error
    model.requires_grad_(False)
    model.eval()


def merge_adapter(model: MaskPredictor, name: str = "default") -> None:
    """Adds the adapter's B A to the weights and takes all adapters out: `model` is a plain one again.

    Its logits are the adapted model's but for rounding. The sum is rounded to the weights' own precision.
    """
    _check_known(model, [name])
    for path, layer in [(path, module) for path, module in model.named_modules() if _is_layer(module)]:
        layer.merge(adapter_names=[name])
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    settle_new_words(model)
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)


@contextmanager
def use_adapters(model: MaskPredictor, names: Sequence[str | None]) -> Iterator[None]:
    """Within it, row i of every forward is computed with adapter names[i], None being the base model.

    A forward of k times as many rows repeats the names in their order, as guidance in one forward stacks its canvases
    (`guided_together`). For models in eval mode. Raises InputError for a name that the model has not, and ValueError
    in training mode and for a forward of another number of rows.
    """
    if model.training:
        raise ValueError("use_adapters is for inference: call model.eval() before")
    if not names:
        raise ValueError("use_adapters got no names, expected one for each row")
    _check_known(model, [name for name in names if name is not None])
    listed = [_BASE if name is None else name for name in names]

    def choose(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = len(inputs[0])
        if rows % len(listed):
            raise ValueError(f"a forward has {rows} rows for {len(listed)} adapter names, expected one name for each")
        return inputs, kwargs | {"adapter_names": listed * (rows // len(listed))}

    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_adapters(model: MaskPredictor) -> Iterator[None]:
    """Within it every forward is the base model's; new words keep their rows. In training, too, but for no backward."""
    layers = cast(list[Any], _layers(model))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that are in `model`."""
    return list(getattr(model, "peft_config", {}))


def adapter_directory(path: Path) -> Path:
    """`path` where it is an adapter's directory, or its folder `adapter`. Raises InputError where neither is one."""
    for place in (path, path / "adapter"):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    raise InputError(f"There is no adapter at {path}, it has no {CONFIG} and {WEIGHTS}: give what finetune wrote.")


def read_adapter(directory: Path) -> dict[str, Any]:
    """The settings of a saved adapter, `revision` (the hash of its base) among them. Raises InputError."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / CONFIG} cannot be read ({_first_line(error)}): copy it again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or "revision" not in settings:
        raise InputError(f"{directory} holds no LoRA adapter of this project's: give what `mmdlm finetune` wrote.")
    return settings


def base_hash(model: MaskPredictor) -> str:
    """What the model is without adapters: `model_hash` of the directory it was loaded from.

    A model that came from no model directory is known by its own weights, in the precision that they have.
    """
    directory = Path(str(getattr(model, "name_or_path", "") or "")).parent
    if all((directory / component).is_dir() for component in COMPONENTS):
        return model_hash(directory)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if ".lora_" not in key and not key.endswith(".rows"):
            plain = key.replace(".base_layer.", ".").replace(".parametrizations.weight.original", ".weight")
            digest.update(plain.encode() + b"\0")
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_facts(model: nn.Module) -> dict[str, str]:
    """{"adapter_hash": the first 16 hex digits of the SHA-256 over the adapters' weights}; {} where there are none."""
    digest, names = hashlib.sha256(), adapter_names(model)
    for key, value in sorted(model.state_dict().items()) if names else ():
        if ".lora_" in key:
            digest.update(key.encode() + b"\0" + value.detach().float().cpu().contiguous().numpy().tobytes())
    return {"adapter_hash": digest.hexdigest()[:16]} if names else {}


def adapter_parameters(model: MaskPredictor, name: str = "default") -> dict[str, Tensor]:
    """The adapter's own parameters by name: what an optimizer and a checkpoint need to hold."""
    marked = f".{name}.weight"
    return {key: value for key, value in model.named_parameters() if ".lora_" in key and key.endswith(marked)}


def lora_parameters(model: nn.Module, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """How many parameters an adapter of that rank will have: rank * (in + out) for every matrix of `targets`."""
    sizes = [
        module.in_features + module.out_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets
    ]
    return rank * sum(sizes)


def _inject(model: MaskPredictor, config: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets' names that peft thinks unusual
        model.add_adapter(config, adapter_name=name)


def _linear_names(model: nn.Module) -> set[str]:
    """Last names of the linear modules that may be adapted: of the head only `.weight` is read, never its forward."""
    from peft.tuners.lora import LoraLayer

    kinds = (nn.Linear, LoraLayer)
    named = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, kinds)}
    return named - {"head", "base_layer"}


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_layer(module)]


def _is_layer(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _check_new_name(model: nn.Module, name: str) -> None:
    taken = adapter_names(model)
    if name in taken or name == _BASE or not name or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(
            f"An adapter cannot be called {name!r}, expected letters, digits, - and _, and none of "
            f"{', '.join([*taken, _BASE])}: choose another name."
        )


def _check_known(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"There is no adapter {missing[0]!r} in this model, it has: {', '.join(known) or 'none'}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".:")
