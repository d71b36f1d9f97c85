"""The one error a user's input can cause."""


class InputError(Exception):
    """Bad input: one clear sentence that names the file, line or key and the mend.

    The command line prints it on stderr and exits with status 2.
    """
