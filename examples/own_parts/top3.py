"""A metric of your own: how often the true class is among the three most likely ones."""

from comit_bench.recipes.specs import TaskKind
from comit_bench.tasks.classification import Classification


class Top3(Classification):
    def score(self, inputs, outputs, labels):
        right = (outputs.topk(3).indices == labels[:, None]).any(dim=1)
        return {**super().score(inputs, outputs, labels), "top3": right}


KIND = TaskKind("top3:Top3", ("classes",), "top3")
