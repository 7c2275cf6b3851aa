"""train_batch-STEP.png: images of a batch as the model saw them."""
from engine.log.sink import SAVED_BATCH, Sink
from utils.faults import fault_point


class SavedBatches(Sink):
    name, option, kinds = 'images', 'save_images', (SAVED_BATCH,)

    def image(self, name: str, pixels, point: int) -> None:
        from torchvision.utils import save_image
        fault_point('log.images')
        save_image(pixels, self.run.folder / f'{name}-{point:08d}.png')
