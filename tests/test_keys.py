"""The key: unit length, and a dot product that mixes both similarities as promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinyalign.runtime import ModelError
from tinyalign.runtime.keys import (
    KeyArrays,
    load_key_arrays,
    make_key,
    make_keys,
    mean_embedding,
    rounded,
    save_key_arrays,
)


@pytest.fixture
def arrays() -> KeyArrays:
    rng = np.random.default_rng(0)
    shapes = ((20,), (20, 6), (9,), (9, 4))
    return KeyArrays(*(rng.normal(size=s).astype(np.float32) for s in shapes), alpha=0.3)


def test_dot_product_mixes_the_cosines(arrays: KeyArrays) -> None:
    rng = np.random.default_rng(1)
    pooled, text = rng.normal(size=(2, 20)).astype("f4"), rng.normal(size=(2, 9)).astype("f4")
    a, b = make_keys(pooled, text, arrays)
    i, j = (pooled - arrays.image_mean) @ arrays.image_projection
    s, t = (text - arrays.text_mean) @ arrays.text_projection
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in ((i, j), (s, t))]
    assert a @ b == pytest.approx(0.7 * cosines[0] + 0.3 * cosines[1], abs=1e-6)
    assert np.linalg.norm([a, b], axis=1) == pytest.approx([1, 1])
    assert a.dtype == np.float32
    assert a.shape == (arrays.width,) == (10,)


def test_without_text_the_image_has_all_the_weight(arrays: KeyArrays) -> None:
    pooled = np.arange(20, dtype=np.float32)
    key = make_key(pooled, None, arrays)
    assert np.linalg.norm(key) == pytest.approx(1)
    assert not key[6:].any()
    assert (make_key(pooled, np.zeros(9, np.float32), arrays) == key).all()


def test_mean_embedding() -> None:
    table = np.arange(8, dtype=np.float16).reshape(4, 2)
    assert mean_embedding([0, 2], table).tolist() == [2, 3]
    assert mean_embedding([], table) is None


def test_save_and_load(arrays: KeyArrays, tmp_path: Path) -> None:
    path = tmp_path / "key.npz"
    save_key_arrays(path, arrays)
    loaded = load_key_arrays(path)
    assert loaded.alpha == pytest.approx(0.3)
    assert (loaded.text_projection == rounded(arrays).text_projection).all()
    assert loaded.alpha == rounded(arrays).alpha
    data = path.read_bytes()
    for broken in (b"", b"no", data[: len(data) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"key.npz"):
            load_key_arrays(path)
    np.savez(path, image_mean=np.array([{}], object))
    with pytest.raises(ModelError):
        load_key_arrays(path)
    save_key_arrays(path, KeyArrays(arrays.text_mean, *list(vars(arrays).values())[1:]))
    with pytest.raises(ModelError, match="do not fit"):
        load_key_arrays(path)
