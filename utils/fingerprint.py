"""What tells weights from others, in a checkpoint, a folder of labels or the name of a file."""
import hashlib
from collections.abc import Mapping

import torch


def fingerprint_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and numbers of weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
