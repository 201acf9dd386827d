"""What PyTorch's tensors do, without PyTorch."""

from typing import Any

import numpy as np


class TensorOfBfloat16:
    """As PyTorch's, of which it has no NumPy array."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")
