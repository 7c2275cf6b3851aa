"""The moving average of the weights, which a flag on the device can keep from moving."""
import torch
from timm.utils import ModelEmaV3
from torch import nn


class ModelEma(ModelEmaV3):
    """timm's average of all parameters and buffers of one model, as a step of torch's fused SGD.

    average ← average − (1 − decay) (average − weight) is SGD's step, and of all optimizers' steps the fused ones alone
    can be told on the device to change nothing, to the byte. Nothing in `update` waits for the device, unless the
    average is kept on another one (`device='cpu'`), to which the weights are copied every time.

    Args:
        model: is copied to `module`; its tensors stay where they are from here on.
        decay: of the average.
        device: of the average, in place of the model's.
    """

    def __init__(self, model: nn.Module, *, decay: float, device: str | None = None):
        super().__init__(model, decay=decay, device=None if device is None else torch.device(device))
        self._averages, self._counts = _tensors(self.module)
        self._sgd = torch.optim.SGD(self._averages, lr=1 - decay, fused=True)
        self._of_model: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    @torch.no_grad()
    def update(  # type: ignore[override]  # what follows the model is a number of steps in timm's
            self, model: nn.Module, skip: torch.Tensor | None = None) -> None:
        """Moves the average towards the model's weights, which must always be the same model's.

        Args:
            skip: bool [] on the model's device; nothing changes where it is True.
        """
        self._of_model = self._of_model or _tensors(model)
        weights, counts = self._of_model
        if self.device is not None:
            weights = [tensor.to(self.device) for tensor in weights]
            counts = [tensor.to(self.device) for tensor in counts]
            skip = None if skip is None else skip.to(self.device)
        for average, difference in zip(self._averages, torch._foreach_sub(self._averages, weights), strict=True):
            average.grad = difference
        found_inf = None if skip is None else skip.float()
        self._sgd.found_inf = found_inf  # type: ignore[attr-defined]  # as torch's GradScaler tells it
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=True)
        for ours, theirs in zip(self._counts, counts, strict=True):
            ours.copy_(theirs if skip is None else torch.where(skip, ours, theirs))


def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the model saves: the tensors that are averaged, and the integers, which are copied; each once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
