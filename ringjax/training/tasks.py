"""From a run's config to its tasks, and the checks that come before anything runs."""

from collections.abc import Callable, Sequence

from ringjax.data.errors import DataError
from ringjax.training.config import RunConfig
from ringjax.training.image_tokenizer.config import TokenizerRun
from ringjax.training.image_tokenizer.task import ImageTokenizerTask
from ringjax.training.task import Task
from ringjax.training.transformer_task import TransformerTask
from ringjax.training.yaml_tree import ConfigError


class DataRefused(ConfigError):
    """The data that a config names is not there, or cannot be used."""


def make_tasks(config: RunConfig | TokenizerRun) -> tuple[Task, ...]:
    """One task for each stage of the run."""
    if isinstance(config, TokenizerRun):
        return tuple(ImageTokenizerTask(stage) for stage in config.stage_list)
    return tuple(TransformerTask(stage, config.lora) for stage in config.stage_list)


def check_tasks(tasks: Sequence[Task], check: Callable[[Task], None]) -> None:
    """Call `check` for every stage; raises ConfigError with one line for each stage that it refuses.

    Where all of them are about files that are not there or garbled, it is a DataRefused.
    """
    problems, only_data = [], True
    for task in tasks:
        try:
            check(task)
        except (ValueError, OSError, ImportError) as error:
            problems.append(f"stage {task.stage.name!r}: {error}" if len(tasks) > 1 else str(error))
            only_data = only_data and isinstance(error, (DataError, OSError))
    if problems:
        raise DataRefused(problems) if only_data else ConfigError(problems)
