"""The command ``python -m stac_optimizer MODEL``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from stac_optimizer.__main__ import find_model, fitting_recipe, main
from tests.support import small_model


def made() -> nn.Module:
    """What the command finds here."""
    return small_model()


def test_command_shows_the_split_of_a_function_and_the_line_to_write() -> None:
    command = [sys.executable, "-m", "stac_optimizer", "tests.test_main:made"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "type", "role"]
    assert lines[2].split()[:4] == ["0", "Linear", "trunk", "30"]
    assert lines[-1] == "STAC(model, **recipes.mlp(lr=0.001))"
    assert done.stderr == ""


def test_no_recipe_is_the_last_layer_as_cap(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tests.test_main:made", "--recipe", "none"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:5]] == ["trunk", "trunk", "cap"]
    assert lines[-1] == "STAC(model, lr=0.001)"


def test_weights_are_not_made(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = find_model(f"transformers:{tmp_path}")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert type(find_model("transformers:t5")).__name__ == "T5Model"


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "mlp"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), "vision"),
        (lambda: nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 4)), "transformer"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "transformer"),
        (lambda: nn.ModuleList([nn.Embedding(1000, 4), nn.LSTM(4, 4)]), "rnn"),
    ],
)
def test_recipe_fits_the_kind_of_model(make: Callable[[], nn.Module], recipe: str) -> None:
    assert fitting_recipe(make()) == recipe


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("made", "MODEL must be module:name"),
        ("no_such_package:made", "'no_such_package' of 'no_such_package:made' cannot be imported"),
        ("tests.test_main:none", "'tests.test_main' has no 'none'"),
        ("torch.nn:Linear", "'torch.nn:Linear' makes no model without arguments"),
        ("collections:OrderedDict", "made a OrderedDict, and no torch.nn.Module"),
        (".tests:made", "MODEL must be module:name"),
        ("torch.nn:Identity", "torch.nn:Identity: model has no trainable parameters"),
        ("transformers:gpt99", "neither a model type of transformers nor a folder"),
    ],
)
def test_what_is_no_model_is_refused(path: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([path])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def failing() -> nn.Module:
    raise ValueError("of the user's own")


def test_error_of_the_users_own_code_passes() -> None:
    with pytest.raises(ValueError, match="of the user's own"):
        main(["tests.test_main:failing"])
