"""Exceptions that end a run early and are not bugs."""


class UserError(ValueError):
    """An error that the user can fix. Its message says what is wrong and what to do about it.

    The command line prints the message without a traceback and exits with code 2. Every other
    exception is a bug and keeps its traceback.
    """


class Interrupted(Exception):  # noqa: N818
    """A request to stop, by the user or the system. Nothing is wrong, and nothing is lost.

    Args:
        sentence: Message that says where the state was saved. Empty as long as it was not.
        exit_code: Exit code of the process: 128 plus the number of the signal.
    """

    def __init__(self, sentence: str = "", exit_code: int = 130) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
