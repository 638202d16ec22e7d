"""PSNR and SSIM of uint8 images: by hand, and against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch

from comit_bench.metrics.similarity import PSNR_CAP, psnr, squared_error, ssim


def noise(seed: int, count: int = 3, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_psnr_by_hand() -> None:
    one = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    two = one.clone()
    two[0] += 10  # every value is 10 off
    two[1, 0, 0, 0] = 255  # one of 48 values is 255 off
    values = psnr(one, two)
    assert values.dtype == torch.float64
    assert values[0].item() == pytest.approx(20 * math.log10(25.5), rel=1e-12)
    assert values[1].item() == pytest.approx(10 * math.log10(48), rel=1e-12)


def test_psnr_of_equal_images_is_the_cap_and_nothing_lies_above() -> None:
    one = noise(0, side=256)
    assert psnr(one, one).tolist() == [PSNR_CAP] * 3
    two = one.clone()
    two[0, 0, 0, 0] ^= 1  # the smallest difference there is, at a size where it would pass the cap
    assert squared_error(one, two)[0] > 0 and psnr(one, two)[0] == PSNR_CAP


def test_uint8_does_not_wrap_around() -> None:
    one, two = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert psnr(one, two).item() == psnr(two, one).item() == 0.0


def test_only_equal_uint8_batches_are_compared() -> None:
    with pytest.raises(ValueError, match="uint8"):
        psnr(noise(0), noise(0).float())
    with pytest.raises(ValueError, match="shape"):
        psnr(noise(0), noise(0, side=16))


@pytest.mark.parametrize("side", [11, 24, 33])
def test_ssim_is_that_of_torchmetrics(side: int) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    one = noise(1, 9, side)
    two = (one.double() * 0.7 + noise(2, 9, side).double() * 0.3).to(torch.uint8)
    ours = ssim(one, two)
    theirs = structural_similarity_index_measure(
        one.double(), two.double(), data_range=255.0, reduction="none"
    )
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
    assert (ours < 1).all() and (ours > 0).all()
    torch.testing.assert_close(ssim(one, one), torch.ones(9, dtype=torch.float64))


def test_ssim_of_an_image_does_not_depend_on_its_neighbours() -> None:
    one, two = noise(3, 20), noise(4, 20)
    whole = ssim(one, two)
    assert torch.equal(whole[16:], ssim(one[16:], two[16:]))
    with pytest.raises(ValueError, match="11 px"):
        ssim(noise(0, side=8), noise(0, side=8))
