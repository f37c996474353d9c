"""The tasks, by name. A script may add its own before it calls the benchmark."""

from __future__ import annotations

from quality.task import Task
from quality.tasks.character_gru import CHARACTER_GRU
from quality.tasks.character_transformer import CHAR_LM, CHAR_LM_WIDE
from quality.tasks.cnn import CNN
from quality.tasks.photo import PHOTO
from quality.tasks.tabular import TABULAR
from quality.tasks.vit import VIT
from quality.tasks.wave_pinn import WAVE_PINN, WAVE_PINN_5000

__all__ = ["DEFAULT_TASKS", "TASKS"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (CHAR_LM, CHAR_LM_WIDE, WAVE_PINN, VIT, CNN, CHARACTER_GRU, TABULAR, PHOTO, WAVE_PINN_5000)
}
# The long PINN is there for the comparison with a published table, not for the tournament.
DEFAULT_TASKS = [name for name in TASKS if name != WAVE_PINN_5000.name]
