"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """One sentence that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with code 2; everything else that is
    raised is a bug and keeps its traceback.
    """
