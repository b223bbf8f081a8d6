"""Ray actor: the class that Ray runs as the worker's process on a node.

In:   calls of the driver. Out: the answers of a RayWorker, which the actor imports. Never: Ray; any other work.
"""

from __future__ import annotations

from typing import Any

__all__ = ["make_actor_class"]


def make_actor_class() -> type:
    """Return the class of the actor.

    Ray sends its source to the node, so that it can also report a node without this package or with another version.
    """

    class VideoLabWorker:
        """Forwards calls to a RayWorker, which is imported on the actor's node."""

        def describe(self) -> dict[str, Any]:
            try:
                from runner.launch.ray_worker import describe_process
            except ImportError as error:
                return {"missing": str(error)}
            return describe_process()

        def begin(self, order: Any) -> None:
            from runner.launch.ray_worker import RayWorker

            self._worker = RayWorker(order)

        def send(self, job: Any) -> bool:
            return self._worker.send(job)

        def end(self) -> None:
            self._worker.end()

        def stop(self, signum: int) -> None:
            self._worker.stop(signum)

        def fetch(self, seen: int, wait_s: float) -> Any:
            return self._worker.fetch(seen, wait_s)

    return VideoLabWorker
