"""The errors that end a run with a message instead of a traceback."""


class RunError(Exception):
    """Ends the run. The message says what was wrong, what was expected and what to do."""


class ConfigError(RunError, ValueError):
    """A setting that cannot be used; the message names the key, its value and what was expected."""


class DataError(RunError, ValueError):
    """A data set that cannot be used; the message names the file, the line and what was expected."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or of an unknown format; the message names the file."""


class StorageError(RunError):
    """A file could not be written, for example because the disk is full. Older files are unchanged."""


class TrainingError(RunError):
    """Training cannot go on, for example because a loss is not finite. The last checkpoint is unchanged."""


class Interrupted(KeyboardInterrupt):
    """A stop was requested. It is raised only where the run can continue later."""
