"""Arrays that are packed into one run of bytes come out as they were."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from engine.staging import Fetch, Packing, to_device

arrays = st_np.arrays(
    st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.uint8]),
    st_np.array_shapes(max_dims=2, min_side=0, max_side=7),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(arrays, max_size=6))
def test_views_have_the_arrays_content_dtype_and_shape(some: list[np.ndarray]) -> None:
    packing = Packing(some)
    packed = packing.pack(some, pinned=False)
    for view, array in zip(packing.views(packed.clone()), some, strict=True):
        assert view.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(view.numpy(), array, equal_nan=array.dtype.kind == "f")


def test_on_the_host_nothing_is_copied() -> None:
    array = np.arange(3)
    (tensor,) = to_device([array], torch.device("cpu"))
    array[1] = 7
    assert tensor.tolist() == [0, 7, 2]
    assert Fetch([tensor]).wait()[0] is tensor
