"""The moving average of the weights: its decay, and updates that a flag on the device can skip."""
import torch
from timm.utils import ModelEmaV3
from torch import nn

# Decay of the published recipe, which takes 775,620 steps.
PUBLISHED_DECAY = 0.99996
# Share of the average that may still be the initial weights at the end of a run.
FORGOTTEN = 0.01


def initial_share(decay: float, steps: int) -> float:
    """Return the share of the initial weights in an average of constant `decay` after so many steps."""
    return decay ** steps


def needs_warmup(asked: float | None, steps: int) -> bool:
    """Tell whether the decay warms up in a run of so many steps.

    A decay that the user or a recipe asks for is constant. So is the published one in a run that is long enough to
    forget the initial weights.
    """
    return asked is None and initial_share(PUBLISHED_DECAY, steps) > FORGOTTEN


class ModelEma(ModelEmaV3):
    """timm's average of all parameters and buffers of a model, computed by a step of torch's fused SGD.

    average ← average − (1 − decay) (average − weight) is SGD's step. Only fused optimizers can skip a step without
    involving the host, and then change no byte. `update` never waits for the device, unless the average is kept on
    another one (`device='cpu'`): then it waits once, for a copy of all weights.

    Args:
        model: is copied to `module`; its tensors must stay where they are afterwards.
        decay: of the average, per step; with `use_warmup`, the highest one.
        use_warmup: raise the decay from 0 as 1 - (1 + steps taken) ** -0.75, so that the average covers a share of the
            run from its beginning. It passes 0.999 after 10,000 steps.
        device: the average's device, if not the model's.
    """

    def __init__(self, model: nn.Module, *, decay: float, use_warmup: bool = False, device: str | None = None):
        # The power that timm advises for less than a million steps.
        super().__init__(model, decay=decay, use_warmup=use_warmup, warmup_power=0.75,
                         device=None if device is None else torch.device(device))
        self._averages, self._counts = _tensors(self.module)
        self._sgd = torch.optim.SGD(self._averages, lr=1 - decay, fused=True)
        self._of_model: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self._copies: list[torch.Tensor] | None = None

    @torch.no_grad()
    def update(  # type: ignore[override]  # timm's second argument is a step number
            self, model: nn.Module, skip: torch.Tensor | None = None, steps: int = 0) -> None:
        """Move the average towards the weights of `model`, which must be the same model in every call.

        Args:
            skip: bool [] on the model's device; if it is True, nothing changes.
            steps: optimizer steps of the run before this one, for the warm-up.
        """
        if self.use_warmup:
            self._sgd.param_groups[0]['lr'] = 1 - self.get_decay(steps + 1)
        self._of_model = self._of_model or _tensors(model)
        weights, counts = self._of_model
        if self.device is not None:
            flag = torch.zeros((), dtype=torch.bool, device=weights[0].device) if skip is None else skip
            *copies, skip = self._fetch([*weights, *counts, flag])
            weights, counts = copies[:len(weights)], copies[len(weights):]
        for average, difference in zip(self._averages, torch._foreach_sub(self._averages, weights), strict=True):
            average.grad = difference
        found_inf = None if skip is None else skip.float()
        self._sgd.found_inf = found_inf  # type: ignore[attr-defined]  # as torch's GradScaler sets it
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=True)
        if counts:
            changes = torch._foreach_sub(counts, self._counts)
            if skip is not None:
                torch._foreach_mul_(changes, (~skip).to(torch.uint8))
            torch._foreach_add_(self._counts, changes)

    def _fetch(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy to the average's device, always into the same memory, with a single wait.

        The model's device holds no extra copy, since `device='cpu'` is there to save its memory.
        """
        device = tensors[0].device
        on_gpu = device.type == 'cuda'
        if self._copies is None:  # a GPU copies asynchronously only into pinned memory
            self._copies = [torch.empty_like(t, device=self.device, pin_memory=on_gpu) for t in tensors]
        torch._foreach_copy_(self._copies, tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return self._copies


def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return each tensor of a model's state dict once: those that are averaged, and integers, which are copied."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    return ([t for t in tensors if t.is_floating_point()],
            [t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors if not t.is_floating_point()])
