"""What is not the same on all processes is said, with who has what."""

from lora_dist.processes.agreement import differences

HOSTS = ["node1", "node1", "node2", "node2"]


def test_what_is_the_same_everywhere_is_no_difference() -> None:
    assert differences(HOSTS, [{"seed": 42, "data": "ab12"}] * 4) == []


def test_each_difference_is_a_line_that_names_ranks_and_hosts() -> None:
    facts = [{"seed": 42, "data": data, "step": step} for data, step in (("ab", 3), ("ab", 3), ("cd", 3), ("cd", 0))]
    assert differences(HOSTS, facts) == [
        "data: ab on rank 0, 1 (node1); cd on rank 2, 3 (node2)",
        "step: 3 on rank 0, 1 (node1), 2 (node2); 0 on rank 3 (node2)",
    ]
