"""A kind of task of your own: is a message nearest to the mean message of its class? Nothing is fitted."""

import torch

from comit_bench.recipes.specs import TaskKind
from comit_bench.results.outcomes import Outcomes
from comit_bench.tasks.base import Task
from comit_bench.tasks.result import Result


class NearestMean(Task):
    def run(self, inputs):
        if not inputs.ranks.first:
            return None
        role, classes = inputs.roles["report"], len(inputs.data.classes)
        codes = role.source().take(role.row_tensor()).flatten(1)  # [n, K * d]
        labels = torch.from_numpy(role.split.labels[role.images])  # [n]
        means = torch.stack([codes[labels == c].mean(dim=0) for c in range(classes)])
        right = torch.cdist(codes, means).argmin(dim=1) == labels  # [n], the same for every seed
        outcomes = Outcomes.same_for_all(role.ids, inputs.seeds, {"top1": right.numpy()})
        return Result(metrics={"top1": outcomes.metric("top1", chance=100 / classes)}, outcomes=outcomes)


KIND = TaskKind("nearest_mean:NearestMean", ("classes",), "top1", probed=False)
