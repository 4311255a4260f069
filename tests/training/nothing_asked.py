"""What a step may not do that a CUDA graph is made of."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class NothingAsked(TorchDispatchMode):
    """Raises where the host would have to wait for the device."""

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.ASKING, f"the step calls {name}"
        assert name != "copy_" or args[0].device == args[1].device
        return func(*args, **(kwargs or {}))


class OnTheDevice(TorchDispatchMode):
    """Raises where a tensor is on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_iter((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type != "cpu" for tensor in tensors), f"{func} has a tensor on the host"
        return out
