"""What ends a run early and is no bug."""


class UserError(ValueError):
    """One sentence that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with code 2; everything else that is
    raised is a bug and keeps its traceback.
    """


class Interrupted(Exception):  # noqa: N818
    """The user or the system asked to stop. Nothing is wrong, and nothing is lost.

    `str` says where, once whoever saves the state has; `exit_code` is 128 and the signal's number.
    """

    def __init__(self, sentence: str = "", exit_code: int = 130) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
