"""TiTok-L-32 with its released weights gives the ids that its authors published for two pictures."""

from __future__ import annotations

import hashlib
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from comit_bench.tokenizers.load import load_tokenizer

COMMIT = "942a96f"
ASSETS = f"https://raw.githubusercontent.com/bytedance/1d-tokenizer/{COMMIT}/assets"
PUBLISHED = {
    "ILSVRC2012_val_00010240.png": (
        "75105b81fc706e977227c41ef2960b1aef84fe557d2c69e27ac8b3839539fbfa",
        "887 3979 349 720 2809 2743 2101 603 2205 1508 1891 4015 1317 2956 3774 2296 484 2612 3472 2330 "
        "3140 3113 1056 3779 654 2360 1901 2908 2169 953 1326 2598",
    ),
    "ILSVRC2012_val_00008636.png": (
        "dc9e100041f48fdd76e6a8f5813f501af68346616dfaec10c4dfaefb25485bce",
        "1255 2603 982 2222 643 1426 866 4094 296 1422 398 764 3670 1265 3986 759 1039 3962 2373 2337 "
        "1372 4050 4012 3644 2624 3735 1539 1289 2817 2985 2550 2972",
    ),
}


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("picture", list(PUBLISHED))
def test_published_ids(picture: str) -> None:
    digest, ids = PUBLISHED[picture]
    with urlopen(f"{ASSETS}/{picture}", timeout=60) as answer:
        content = answer.read()
    assert hashlib.sha256(content).hexdigest() == digest
    pixels = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    assert pixels.shape == (256, 256, 3)
    tokenizer = load_tokenizer("titok-l-32", device="cpu", allow_pickle="true")
    tokens = tokenizer.encode(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
    assert tokens.ids is not None
    assert tokens.ids[0].tolist() == [int(i) for i in ids.split()]
    assert tokenizer.decode(tokens, seeds=[0]).shape == (1, 3, 256, 256)
