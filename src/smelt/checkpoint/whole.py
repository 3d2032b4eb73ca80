"""A whole checkpoint in memory, for what cannot be done a block at a time."""

from transformers import PreTrainedModel

from smelt.checkpoint.device import check_device
from smelt.checkpoint.place import put
from smelt.checkpoint.source import Checkpoint


def load_model(checkpoint: Checkpoint, device: str = "cpu") -> PreTrainedModel:
    """The model with all its weights, in the type that the checkpoint computes in.

    Weights are read as the walk reads them, so quantised ones are dequantised. The whole model is
    in memory; nearly everything else here streams.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    place = check_device(device)
    checkpoint.check()
    model = checkpoint.skeleton()
    for name in checkpoint.state:
        if checkpoint.stored_name(name) is not None:  # a buffer that is not stored is there already
            put(model, name, checkpoint.read(name), place)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(place)
    return model
