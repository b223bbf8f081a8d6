"""Ray places: the places for workers on the nodes of a cluster, and the resources of each place.

In:   the running nodes, the existing places. Out: places to add. Never: workers, Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

from runner.launch.ray_cluster import RayNode, RayPlace

__all__ = ["next_places"]


def next_places(nodes: Sequence[RayNode], taken: Sequence[RayPlace], workers: int | None) -> list[RayPlace]:
    """Return the places on these nodes that are not in `taken` yet.

    workers: None: one place per GPU. A number: at most so many CPU places, spread as evenly as the nodes' CPUs allow,
    each with at least one CPU. A place keeps its size when nodes are added later.
    """
    if workers is None:
        known = {(place.node.id, place.slot) for place in taken}
        return [
            RayPlace(node, slot, cpus=1, gpus=1, sharing=node.gpus)
            for node in nodes
            for slot in range(node.gpus)
            if (node.id, slot) not in known
        ]
    found: list[RayPlace] = []
    able = [node for node in nodes if node.cpus > 0]
    while able and len(taken) + len(found) < workers:
        on = {node.id: [place for place in (*taken, *found) if place.node.id == node.id] for node in able}
        evenly = -(-workers // len(able))  # workers per node if all nodes had enough CPUs
        roomy = [node for node in able if _fits(node, on[node.id], evenly)]
        if not roomy:
            break
        node = min(roomy, key=lambda one: len(on[one.id]))
        slots = {place.slot for place in on[node.id]}
        slot = next(number for number in range(len(slots) + 1) if number not in slots)
        sharing = min(evenly, node.cpus)
        found.append(RayPlace(node, slot, cpus=node.cpus // sharing, gpus=0, sharing=sharing))
    return found


def _fits(node: RayNode, there: Sequence[RayPlace], evenly: int) -> bool:
    """Whether the node has CPUs for one more place, if `evenly` workers share the node."""
    return sum(place.cpus for place in there) + node.cpus // min(evenly, node.cpus) <= node.cpus
