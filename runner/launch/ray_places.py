"""Ray places: on which nodes of a cluster workers have room, and how much of its node each may take.

In:   the living nodes, the places that there are. Out: places to add. Never: what works there; Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

from runner.launch.ray_cluster import RayNode, RayPlace

__all__ = ["next_places"]


def next_places(nodes: Sequence[RayNode], taken: Sequence[RayPlace], workers: int | None) -> list[RayPlace]:
    """The places that these nodes have beyond those that are `taken`.

    workers: None: one for each GPU. Else places on CPUs: so many at most, as evenly as the nodes' CPUs allow, none with
    less than one CPU; a place keeps its size when nodes come later.
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
        evenly = -(-workers // len(able))  # on each node, if all had CPUs enough
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
    """Whether one more worker, of a node that `evenly` workers share, has room beside those that are there."""
    return sum(place.cpus for place in there) + node.cpus // min(evenly, node.cpus) <= node.cpus
