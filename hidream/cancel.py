"""A token that ends a running call from another thread, or from a signal handler."""

from __future__ import annotations

from hidream.errors import Cancelled


class CancelToken:
    """`pipe(..., cancel=token)` ends with `Cancelled` soon after `token.cancel()`.

    Setting and reading it takes no lock, so that any thread and any signal handler may. A token
    stays cancelled; it may be given to several calls, and then ends them all.
    """

    def __init__(self) -> None:
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        self._cancelled = True

    def check(self) -> None:
        """Raises Cancelled after `cancel()`."""
        if self._cancelled:
            raise Cancelled("the call was cancelled.")
