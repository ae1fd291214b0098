"""The files that a run's keys name."""

from noria.config import Config
from noria.rows.columns import Columns
from noria.rows.prompt_files import PromptFiles, files_of


def prompts_of(config: Config) -> PromptFiles:
    """Where a run's prompts come from. Raises InputError for a pattern that no file matches."""
    columns = Columns(config.prompt_column, config.id_column, config.messages_column)
    return PromptFiles(files_of(config.prompts), columns, config.limit, config.job.strict_keys)


def files_of_run(config: Config) -> list[str | None]:
    """All but those that it writes beside its output, and that have keys of their own: exports and a trace."""
    read = config.model, config.sampling.json_schema, config.job.machine, config.job.random_weights
    return [*read, *prompts_of(config).paths, config.output]
