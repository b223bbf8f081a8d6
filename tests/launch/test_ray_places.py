"""Ray places: where workers have room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.launch.ray_cluster import RayNode
from runner.launch.ray_places import next_places


def node(name: str, cpus: int, gpus: int = 0) -> RayNode:
    return RayNode(name, name, cpus, gpus)


def test_one_place_for_each_gpu():
    nodes = [node("a", 8, 2), node("b", 8), node("c", 4, 1)]
    first = next_places(nodes, [], None)
    assert [place.name for place in first] == ["a/0", "a/1", "c/0"]
    assert [place.sharing for place in first] == [2, 2, 1]
    assert {(place.cpus, place.gpus) for place in first} == {(1, 1)}
    assert next_places(nodes, first, None) == []
    assert next_places([*nodes, node("d", 4, 1)], first, None)[0].name == "d/0"


def test_workers_on_cpus_share_them_evenly():
    first = next_places([node("a", 4), node("b", 4)], [], 3)
    assert sorted((place.name, place.cpus, place.sharing) for place in first) == [
        ("a/0", 2, 2),
        ("a/1", 2, 2),
        ("b/0", 2, 2),
    ]
    assert [place.cpus for place in next_places([node("a", 16)], [], 1)] == [16]


def test_a_lost_node_is_replaced_by_one_that_comes():
    a, b, c = node("a", 1), node("b", 1), node("c", 1)
    first = next_places([a, b], [], 2)
    left = [place for place in first if place.node is a]
    assert next_places([a], left, 2) == []  # a has no CPU more
    assert [place.name for place in next_places([a, c], left, 2)] == ["c/0"]


@given(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=2), st.integers(1, 12))
def test_no_node_gives_more_than_it_has(cpus, more, workers):
    """Also when nodes come later; and no more than are asked for."""
    nodes = [node(f"n{index}", count) for index, count in enumerate(cpus)]
    taken = next_places(nodes, [], workers)
    nodes += [node(f"m{index}", count) for index, count in enumerate(more)]
    taken += next_places(nodes, taken, workers)
    assert len(taken) <= workers
    assert bool(taken) == any(cpus + more)
    assert len({(place.node.id, place.slot) for place in taken}) == len(taken)
    for one in nodes:
        there = [place.cpus for place in taken if place.node.id == one.id]
        assert sum(there) <= one.cpus and all(count >= 1 for count in there)
