"""Small stand-ins for the networks that judge images: random weights in files of the right form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def write_random_inception(path: Path) -> Path:
    """Weights of torch-fidelity's Inception drawn at random, in the file format it downloads."""
    from torch_fidelity import feature_extractor_inceptionv3 as source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            fan = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
        elif not name.endswith(("running_mean", "running_var", "weight", "tracked")):
            value.zero_()
    torch.save(state, path)
    return path


def write_random_squeezenet(home: Path) -> Path:
    """A random LPIPS backbone where torchvision looks for its own, below a ``TORCH_HOME``."""
    from torchvision.models import squeezenet1_1

    path = home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path
