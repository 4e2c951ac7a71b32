"""The data that `pins-ext train` trains on: an embedded task that needs no download, GLUE and other published sets, and
files of one's own. A family of tasks (sequences, tokens, questions, language, data_to_text) is a subclass of `Task`.

Importing this is quick: datasets, transformers, scikit-learn and scipy are imported by the functions that use them.
"""

from pins_ext.tasks.arguments import TaskArguments, TaskError
from pins_ext.tasks.load import load_task, task_name, task_names
from pins_ext.tasks.recipes import RECIPES, Recipe
from pins_ext.tasks.sources.minilm import minilm_folder
from pins_ext.tasks.task import Task

__all__ = [
    "RECIPES",
    "Recipe",
    "Task",
    "TaskArguments",
    "TaskError",
    "load_task",
    "minilm_folder",
    "task_name",
    "task_names",
]
