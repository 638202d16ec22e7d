"""A reader of your own: images with one label each, listed in SPLIT.csv as ``file,class``."""

import csv

import numpy as np

from comit_bench.data.manifests import Manifest, rows_from
from comit_bench.data.readers.common import find_file
from comit_bench.data.readers.open import Reader


class Listed(Reader):
    kind = "classes"

    def build(self, spec, folder):
        listed = {}
        for name, files in spec.splits.items():
            path = find_file(spec, folder, f"list of {name!r}", files)
            listed[name] = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        classes = sorted({label for rows in listed.values() for _, label in rows})
        splits = {
            name: rows_from([(f, f"/{f}", np.array([classes.index(c)], dtype=np.int32)) for f, c in rows], 1)
            for name, rows in listed.items()
        }
        return Manifest("classes", tuple(classes), (), splits)


READER = Listed()
