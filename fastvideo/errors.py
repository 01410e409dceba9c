"""What a user is told: what he can mend, and warnings; by one process where all have them."""

import os
import sys


class UserError(Exception):
    """Something the user can mend. Its message is the whole story: it names the file or flag, and both values that disagree.

    No ValueError: tyro would catch one that Args raises, and print it in a frame of its own.
    """

    def __init__(self, message: str):
        """One line that can be printed and sent, whatever a library's error, a path or a prompt has brought into it."""
        super().__init__(" ".join(line.strip() for line in message.encode(errors="backslashreplace").decode().splitlines()))

    exit_code = 2
    on_all_ranks = False  # whether all processes are known to have it, so that one may speak for all


def launch_rank() -> int:
    """The rank that torchrun gave this process (0 under plain python); usable before `init`."""
    return int(os.environ.get("RANK", "0"))


def first_line(error: Exception) -> str:
    """What an error of a library says, without the pages that may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warn(message: str) -> None:
    """One line on stderr, from rank 0 only."""
    if launch_rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
