"""Text files that people hand over, read whole: up to a size beyond which one can only be a slip."""

from pathlib import Path

from comms.errors import ConfigError

MOST_NBYTES = 10_000_000  # a hundred times the largest file that is shipped


def read_text(path: Path, hint: str, most: int = MOST_NBYTES) -> str:
    """The UTF-8 text of a file of at most so many bytes; `hint` says what file is meant. Raises ConfigError.

    A mark at its beginning, as spreadsheets put it there, is left out. Never reads more, whatever the file is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigError(f"cannot read the file: {reason}", str(path), "check the path") from error
    if len(data) > most:
        problem = f"the file is larger than {most / 1e6:g} MB, which none of its kind needs"
        raise ConfigError(problem, str(path), hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", str(path), hint) from error
