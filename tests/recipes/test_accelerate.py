"""accelerate reads the launcher settings that we ship, and they name what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.llama import modeling_llama

ROOT = Path(__file__).parent.parent.parent
KINDS = {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "cpu_two_processes": "MULTI_GPU"}


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "train" / "accelerate").glob("*.yaml"))])
def test_accelerate_reads_it(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "train" / "accelerate" / f"{name}.yaml"))
    assert str(found.distributed_type).endswith(KINDS[name]) and found.num_processes > 1
    if name == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2
        assert hasattr(modeling_llama, found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])
