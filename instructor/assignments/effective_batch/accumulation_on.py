# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: world size."""

from instructor.cases import Idea, exercise

# %% [markdown]
# You move to a cluster: `nodes` machines with `gpus_per_node` GPUs each, one process per GPU. The
# world size changes, the effective batch must not.


# %% tags=["exercise"]
def accumulation_on(effective_batch_size, micro_batch_size, nodes, gpus_per_node):
    """[world_size, gradient_accumulation_steps] on the cluster, for the same effective batch.

    It divides evenly.
    """
    ### BEGIN SOLUTION
    world_size = nodes * gpus_per_node
    return [world_size, effective_batch_size // (micro_batch_size * world_size)]
    ### END SOLUTION


# %% tags=["hidden"]
def with_world_size(world_size_of):
    def mistaken(target, micro, nodes, gpus):
        world_size = world_size_of(nodes, gpus)
        return [world_size, target // (micro * world_size)]
    return mistaken


def cluster(draw):
    micro, accumulation = draw.integer(1, 8), draw.integer(2, 30)
    nodes, gpus = draw.integer(2, 9), draw.choice((2, 4, 8))
    return micro * accumulation * nodes * gpus, micro, nodes, gpus


EXERCISE = exercise(
    accumulation_on, title="World size", minutes=4, reread='lesson 03, "Two processes, one update"',
    ideas=[
        Idea("one node of two", (32, 2, 1, 2), 0.5),
        Idea("your cluster", cluster, 0.5, tells=("counts nodes", "counts one node's GPUs",
                                                  "leaves the accumulation")),
        Idea("another cluster", cluster, 1, hidden=True, tells=("counts nodes",)),
        Idea("a large cluster", cluster, 1, hidden=True, tells=("counts one node's GPUs",)),
    ],
    mistakes={
        "counts nodes": ("a process runs on each GPU: the world size is nodes times GPUs per node.",
                         with_world_size(lambda nodes, gpus: nodes)),
        "counts one node's GPUs": ("that is the world size of a single node; all nodes train.",
                                   with_world_size(lambda nodes, gpus: gpus)),
        "leaves the accumulation": (
            "with more ranks, each has fewer micro batches: divide the accumulation by the world "
            "size, or the effective batch grows with it.",
            lambda target, micro, nodes, gpus: [nodes * gpus, target // micro]),
    })
