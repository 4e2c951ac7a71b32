"""How a command ends when it does not succeed: one clear line and an exit code."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """Ends the command with its message on stderr and its exit code."""

    exit_code = EXIT_FAILED


class UsageError(CommandError):
    """The request itself is wrong: a flag, a file, a model, a configuration that contradicts itself."""

    exit_code = EXIT_USAGE


class StoppedError(KeyboardInterrupt):
    """The user, or the machine's scheduler, asked to stop. No `except Exception` on the way takes it for a failure.

    Args:
        message: where things stand and how to go on.
        signal: the signal's number; 2 for Ctrl-C.
    """

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of what it says."""
    text = " ".join(str(error).split("\n  ")).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
