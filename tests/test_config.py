"""Settings: defaults, then YAML, then key=value; every mistake in one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mmdlm.config import load_config, save_config
from mmdlm.errors import InputError


@dataclass
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 0


@dataclass
class Settings:
    output_dir: Path = Path("out")
    steps: int = 100
    share: float = 0.5
    resume: bool = False
    name: str = "run"
    note: str | None = None
    styles: list[str] = field(default_factory=lambda: ["noto"])
    sizes: tuple[int, ...] = ()
    policy: dict[str, Any] = field(default_factory=dict)
    precision: Literal["no", "bf16"] = "no"
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=3e-4))
    ema: Optimizer | None = None


@dataclass
class Needs:
    data: str
    steps: int = 1


def test_the_last_word_is_the_command_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 200\nshare: 1\noptimizer:\n  warmup: 10\n", encoding="utf-8")
    config = load_config(Settings, path, ["steps=300", "optimizer.learning_rate=1e-2", "resume=true"])
    assert (config.steps, config.share, config.resume, config.name) == (300, 1.0, True, "run")
    assert isinstance(config.share, float)
    assert config.optimizer == Optimizer(learning_rate=1e-2, warmup=10)
    assert load_config(Settings) == Settings()


def test_a_nested_default_keeps_what_is_not_changed():
    assert load_config(Settings, overrides=["optimizer.warmup=5"]).optimizer == Optimizer(3e-4, warmup=5)
    assert load_config(Settings, overrides=["ema.warmup=5"]).ema == Optimizer(warmup=5)
    assert load_config(Settings, overrides=["ema.warmup=5", "ema=null"]).ema is None


def test_values_of_every_type():
    config = load_config(
        Settings,
        overrides=[
            "output_dir=a/b=c", "note=null", "note=hello there", "styles=[noto, fluent]", "sizes=[1, 2, 3]",
            "policy={name: threshold, tau: 0.9}", "precision=bf16", "optimizer.betas=[0.9, 1]", "share=1e-3",
        ],
    )  # fmt: skip
    assert config.output_dir == Path("a/b=c") and config.note == "hello there" and config.share == 1e-3
    assert config.styles == ["noto", "fluent"] and config.sizes == (1, 2, 3)
    assert config.policy == {"name": "threshold", "tau": 0.9}
    assert config.precision == "bf16" and config.optimizer.betas == (0.9, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=3", "There is no setting stepps .*did you mean steps?"),
        ("optimizer.learning_rat=3", "no setting optimizer.learning_rat .*did you mean optimizer.learning_rate?"),
        ("steps=3.5", "The setting steps is 3.5, expected a whole number"),
        ("steps=true", "The setting steps is True, expected a whole number"),
        ("share=much", "The setting share is 'much', expected a number"),
        ("share=true", "expected a number"),
        ("resume=1", "The setting resume is 1, expected true or false"),
        ("name=3", "The setting name is 3, expected text"),
        ("note=3", "The setting note is 3, expected text or null"),
        ("styles=noto", "The setting styles is 'noto', expected"),
        ("styles=[1]", r"The setting styles\[0\] is 1, expected text"),
        ("optimizer.betas=[0.9]", "The setting optimizer.betas is"),
        ("precision=fp8", "expected one of no, bf16"),
        ("optimizer=3", "The setting optimizer is 3, expected Optimizer"),
        ("ema.warmup=x", "The setting ema.warmup is 'x', expected a whole number"),
        ("steps.deep=3", "The setting steps is {'deep': 3}, expected a whole number"),
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("styles=[1", "is not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(override, message):
    with pytest.raises(InputError, match=message) as raised:
        load_config(Settings, overrides=[override])
    assert "\n" not in str(raised.value)


def test_mistakes_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    for content, message in (
        ("stepps: 3", r"no setting stepps \(.*run.yaml\): did you mean steps?"),
        ("- 1", "holds a list, expected settings"),
        ("a: [", "is not valid YAML"),
        ("3: 4", "no setting 3"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message) as raised:
            load_config(Settings, path)
        assert "\n" not in str(raised.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(Settings, path)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(Settings, tmp_path / "none.yaml")
    path.write_text("", encoding="utf-8")
    assert load_config(Settings, path) == Settings()


def test_a_setting_without_default_has_to_be_given():
    assert load_config(Needs, overrides=["data=here"]) == Needs("here")
    with pytest.raises(InputError, match="The setting data has no default"):
        load_config(Needs)


def test_saved_settings_read_back_equal(tmp_path):
    given = ["ema.warmup=5", "sizes=[4]", "policy={name: a}", "note='3'", "share=1e-5"]
    config = load_config(Settings, overrides=given)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Settings, tmp_path / "saved.yaml") == config
