"""Loading from disk: shard by shard, onto a device and into a dtype, and every way in which files can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.convert import load_predictor, recognise, to_mmdlm
from mmdlm.convert.families import empty_model
from mmdlm.convert.placement import device_for, spread
from mmdlm.convert.weights import weight_files
from mmdlm.errors import InputError

TOP = "model.transformer."


class Explodes:
    """What a malicious pickle holds: loading it would run a function."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def halves(state):
    names = sorted(state)
    middle = len(names) // 2
    return {name: state[name] for name in names[:middle]}, {name: state[name] for name in names[middle:]}


def expect(directory, *words):
    with pytest.raises(InputError) as error:
        load_predictor(directory)
    for word in words:
        assert word in str(error.value)


def test_one_file_or_several_give_the_same_model(llada, write):
    config, state = llada
    ours, _ = to_mmdlm(state, config)
    for number, shards in enumerate([(state,), halves(state)]):
        model = load_predictor(write(config, *shards, name=f"model{number}"))
        assert not model.training and model.dtype == torch.float32
        assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    found = load_predictor(write(config, state, name="wanted"), dtype=torch.bfloat16, device_map="cpu")
    assert {value.dtype for value in found.state_dict().values()} == {torch.bfloat16}
    # computed tables stay in full precision and lie with the weights
    assert found.trunk.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(8)[None]
    assert found(ids).logits.isfinite().all()


def test_a_tied_head_may_lie_in_the_file_once_more(make_llada, write):
    config, state = make_llada(weight_tying=True)
    copied = state | {f"{TOP}ff_out.weight": state[f"{TOP}wte.weight"].clone()}
    model = load_predictor(write(config, copied))
    assert model.head.weight is model.trunk.embed_tokens.weight


def test_old_pickles_of_tensors_are_read_and_code_is_not(llada, write, capsys):
    config, state = llada
    directory = write(config, state)
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    plain = load_predictor(directory)
    assert torch.equal(plain.head.weight, state[f"{TOP}ff_out.weight"])
    torch.save({"state_dict": state, "epoch": 3}, directory / "pytorch_model.bin")  # Lightning's form
    assert torch.equal(load_predictor(directory).head.weight, plain.head.weight)
    torch.save(state | {"trap": Explodes()}, directory / "pytorch_model.bin")
    expect(directory, "pytorch_model.bin", "could run code")
    assert "never be printed" not in capsys.readouterr().out
    (directory / "pytorch_model.bin").write_bytes(b"no pickle at all")
    expect(directory, "pytorch_model.bin")


def test_wrong_directories_are_one_sentence(llada, write, tmp_path):
    config, state = llada
    expect(tmp_path / "nowhere", "There is no directory")
    expect(tmp_path, "no config.json")
    expect(write(config | {"model_type": "gpt2", "architectures": None}, state, name="gpt"), "unknown format", "'gpt2'")
    empty = write(config, state, name="empty")
    (empty / "model.safetensors").unlink()
    expect(empty, "has no weights")
    (empty / "config.json").write_text("{")
    expect(empty, "cannot be read as JSON")


def test_missing_and_broken_shards_are_one_sentence(llada, write):
    config, state = llada
    directory = write(config, *halves(state))
    first, second = weight_files(directory)
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    expect(directory, second.name, "broken or cut short")
    second.unlink()
    expect(directory, "lacks the shard", second.name, "1 of 2")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(first), first.name)}))
    expect(directory, "lacks 11 of 21 tensors")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    expect(directory, "outside its directory")


def test_a_configuration_that_disagrees_with_the_weights_is_named_with_both_shapes(llada, write):
    config, state = llada
    wider = config | {"mlp_hidden_size": 64}
    expect(write(wider, state, name="wider"), "ff_out.weight has the shape [32, 48]", "says [32, 64]")
    more = config | {"n_layers": 3}
    expect(write(more, state, name="more"), "lacks 9 of 30 tensors", "blocks.2.")
    fewer = config | {"n_layers": 1}
    expect(write(fewer, state, name="fewer"), "has 9 tensors that its config.json knows nothing of")


def test_a_tokenizer_that_is_too_long_is_refused(llada, write, text_tokenizer):
    config, state = llada
    directory = write(config, state)
    text_tokenizer.save_pretrained(directory)
    expect(directory, "265 entries", "72 rows")
    (directory / "tokenizer.json").write_text("{}")
    expect(directory, "no tokenizer that can be read")


def test_devices_and_quantisations_that_are_not_there(llada, write):
    directory = write(*llada)
    with pytest.raises(InputError, match="device 'nonsense'"):
        load_predictor(directory, device_map="nonsense")
    with pytest.raises(InputError, match="no place for"):
        load_predictor(directory, device_map={"trunk": "cpu"})
    with pytest.raises(InputError, match="quantize is '2bit', expected one of 8bit, 4bit"):
        load_predictor(directory, quantize="2bit")
    by_hand = load_predictor(directory, device_map={"trunk": "cpu", "head": "cpu"})
    assert by_hand.device == torch.device("cpu")


def test_layers_are_spread_over_devices_in_order(llada):
    model = empty_model(to_mmdlm(llada[1], llada[0])[1])
    layer = sum(parameter.numel() for parameter in model.trunk.layers[0].parameters())
    tables = 2 * 72 * 32 + 32
    devices = [torch.device("cuda", number) for number in range(2)]
    placed = spread(model, {devices[0]: 4 * (tables + layer), devices[1]: 4 * layer}, 4)
    assert device_for("trunk.layers.0.mlp.up_proj.weight", placed) == devices[0]
    assert device_for("trunk.layers.1.mlp.up_proj.weight", placed) == devices[1]
    assert device_for("head.weight", placed) == device_for("trunk.norm.weight", placed) == devices[0]
    assert spread(model, {devices[0]: 10**9, devices[1]: 10**9}, 4) == {"": devices[0]}
    with pytest.raises(InputError, match="quantize='8bit'"):
        spread(model, dict.fromkeys(devices, 4 * tables), 4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_no_more_than_a_shard_is_held_beside_the_model(make_llada, write):
    # 4 shards of 25 MB in float32, a model of 50 MB in bfloat16: all of it at once would be 150 MB
    config, state = make_llada(d_model=512, mlp_hidden_size=1024, n_layers=8, n_kv_heads=4)
    names = sorted(state)
    shards = [{name: state[name] for name in names[first::4]} for first in range(4)]
    sizes = [sum(value.nbytes for value in shard.values()) for shard in shards]
    directory = write(config, *shards)
    del state, shards

    def peak(counter: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(counter)) * 1024

    load_predictor(directory, dtype=torch.bfloat16)  # what is imported or allocated once is not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("VmRSS")
    model = load_predictor(directory, dtype=torch.bfloat16)
    used = peak("VmHWM") - before
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert used < weights + max(sizes) + 12 * 2**20, f"{used / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"


def test_our_own_folder_is_read_too(llada, write, tmp_path):
    model = load_predictor(write(*llada))
    model.save_pretrained(tmp_path / "own" / "model")
    assert recognise(tmp_path / "own" / "model") == "mmdlm"
    again = load_predictor(tmp_path / "own")
    assert again.vocabulary == model.vocabulary and again.config.published == model.config.published
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_name_of_the_hub_is_its_snapshot(llada, write, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    write(*llada).rename(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_predictor("owner/name").vocabulary.mask_id == 61
    expect("owner/other", "owner/other is no directory here and could not be fetched from the Hub")


def test_one_dtype_is_that_of_the_embedding(llada, write):
    config, state = llada
    mixed = {name: value if "norm" in name or "ln_f" in name else value.half() for name, value in state.items()}
    model = load_predictor(write(config, mixed))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16} == {model.dtype}


def test_bitsandbytes_missing_is_said(llada, write):
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes is installed here")
    try:
        load_predictor(write(*llada), quantize="4bit")
    except InputError as error:
        assert "pip install bitsandbytes" in str(error)


def test_llada_vs_eye_is_passed_over(llada, write):
    config, state = llada
    names = {
        "wte": "embed_tokens",
        "ln_f": "norm",
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    renamed = {}
    for name, value in state.items():
        stem, leaf, _ = name.removeprefix(TOP).rsplit(".", 2) if "blocks" in name else ("", *name.split(".")[-2:])
        renamed[f"model.{stem.replace('blocks', 'layers')}.{names[leaf]}.weight".replace("..", ".")] = value
    renamed["lm_head.weight"] = renamed.pop("model.mlp.down_proj.weight")
    eye = {"model.vision_tower.vision_tower.a.weight": torch.ones(3), "model.mm_projector.0.weight": torch.ones(2, 2)}
    theirs = {
        "model_type": "llava_llada",
        "architectures": ["LlavaLLaDAModelLM"],
        "vocab_size": 72,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "mask_token_id": 61,
    }
    found = load_predictor(write(theirs, renamed | eye))
    ours, _ = to_mmdlm(state, config)
    assert all(torch.equal(value, ours[name]) for name, value in found.state_dict().items())
    ids = torch.arange(8)[None]
    assert torch.equal(found(ids).logits, load_predictor(write(config, state, name="llada"))(ids).logits)
