"""Work that a thread does while its caller goes on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


class Behind:
    """One piece of work at a time; what it raises comes with `wait`. A process that ends does not wait for it."""

    def __init__(self, name: str):
        self._name = name
        self._future: Future | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, once what was begun before is done."""
        self.wait()
        future = self._future = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again by wait
                future.set_exception(error)

        threading.Thread(target=run, name=self._name, daemon=True).start()

    def wait(self) -> None:
        """Return when what was begun is done, or raise what it raised; once."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    @property
    def failed(self) -> bool:
        """Whether what was begun has raised something that nobody has been told of."""
        return self._future is not None and self._future.done() and self._future.exception() is not None
