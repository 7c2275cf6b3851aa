"""Several checkpoints side by side, and the average of their weights."""
import copy
import logging
from collections.abc import Sequence

from models.factory import TrainedModel, open_trained_model
from models.weights.averaging import MeanOfWeights, difference_of
from options.parser import Options
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Stands for its checkpoint.
SOUP = 'soup (average of the weights)'


def open_trained_models(args: Options) -> list[TrainedModel]:
    """Return the model of --checkpoint, or of each of several, as `open_trained_model` does.

    Raises:
        UserError: as `open_trained_model`, a checkpoint is named twice, or each held out other images.
    """
    models = [open_trained_model(args.replacing(eval_checkpoint=address))
              for address in (args.eval_checkpoint, *args.further_checkpoints)]
    sources = [model.args.eval_checkpoint for model in models]
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise UserError(f'--checkpoint names {twice} twice; name each once')
    held_out = [{name: model.args.trained_on.get(name) for name in ('val_fraction', 'k_fold', 'fold')}
                for model in models]
    if any(other != held_out[0] for other in held_out) and not (args.val_fraction or args.val_split or args.k_fold):
        raise UserError('the checkpoints were trained with different --val-fraction or --fold; say which images to '
                        'evaluate, by --val-fraction SHARE, --k-fold K --fold N or --val-split NAME')
    return models


def average_weights(models: Sequence[TrainedModel], inputs: Sequence[object]) -> TrainedModel | None:
    """Return a model with the mean of the weights of `models`: a model soup (Wortsman et al. 2022, section 2).

    Returns None, and logs why, if they are models, or take `inputs`, that differ.
    """
    first = models[0]
    average = MeanOfWeights()
    for other, own_input in zip(models, inputs, strict=True):
        reason = None
        if other.args.model != first.args.model:
            reason = f'their models are {first.args.model} and {other.args.model}'
        elif difference := difference_of(other.model.state_dict(), first.model.state_dict()):
            reason = f'their weights differ in {difference}'
        elif None not in (other.classes, first.classes) and other.classes != first.classes:
            reason = 'their outputs are other classes, or in another order'
        elif own_input != inputs[0] or other.args.model_kwargs != first.args.model_kwargs:
            reason = 'they were trained for other input, or with other arguments of the model'
        if reason:
            _logger.info('no average of the weights of %s and %s: %s', first.args.eval_checkpoint,
                         other.args.eval_checkpoint, reason)
            return None
        average.add(other.model.state_dict())
    model = copy.deepcopy(first.model)
    model.load_state_dict(average.mean())
    return TrainedModel(model, first.args.replacing(eval_checkpoint=SOUP), first.classes)
