"""From the host to the device without waiting."""

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a tensor on the device; on a CPU it shares the array's memory where it can.

    From pinned memory the copy is queued behind the kernels; from other memory the host would wait for them.
    """
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
