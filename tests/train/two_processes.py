"""What test_distributed.py has two processes do, in one start of torchrun.

Called with a folder that holds `recipe.json`; the first process leaves `done.json` there.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from smelt import processes
from smelt.bench import scale
from smelt.cli import main
from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.settings import check_recipe
from smelt.train import distributed, trainer
from smelt.train.optimiser import decayed
from smelt.train.trainer import TrainRecipe, train

FOLDER = Path(sys.argv[1])
VALUES = json.loads((FOLDER / "recipe.json").read_text())
STOP = 6
LAYERS = (4, 8)


def run(name: str, stop: int | None = None, **changes: Any) -> list[float]:
    """The losses of a run, until a stop or to the end."""
    told: list[float] = []

    def on_step(step: int, steps: int, nats: float) -> None:
        told.append(nats)
        if step == stop:
            raise KeyboardInterrupt

    recipe = check_recipe({**VALUES, **changes, "output": str(FOLDER / name)}, TrainRecipe)
    try:
        train(recipe, on_step=on_step)
    except KeyboardInterrupt:
        assert stop is not None
    return told


def samoe(num_hidden_layers: int, sharing: str = "pool") -> SaMoEForCausalLM:
    """A model whose experts, 5 of them, cannot be shared out equally."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_experts": 5, "vocab_size": 31}
    return SaMoEForCausalLM(
        SaMoEConfig.from_preset(
            "paper", **sizes, num_hidden_layers=num_hidden_layers, sharing=sharing
        )
    )


def bytes_of_a_step(sharing: str) -> list[int]:
    """Bytes that a process sends in a step in bfloat16: heard, and by the formula."""
    model = distributed.build(lambda: samoe(4, sharing), is_low=True)
    with Listening() as between, distributed.precision(model):
        model(torch.arange(24).view(2, 12)).logits.float().square().mean().backward()
    return [between.num_bytes // 2, scale.sent_per_step(model.config, 2)]


class Listening(TorchDispatchMode):
    """Within: how many values each message between the processes is about."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, list[int]] = {"gathered": [], "reduced": []}
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # both begin with the output and the input, flat
        for message, whole in (("allgather", 0), ("reduce_scatter", 1)):
            if message in func.name():
                name = "gathered" if whole == 0 else "reduced"
                self.heard[name].append(args[whole].numel())
                self.num_bytes += args[whole].nbytes
        return func(*args, **(kwargs or {}))


def one_step(num_hidden_layers: int) -> dict[str, Any]:
    """What a step of training sends, and how much of everything this process holds after it."""
    model = distributed.build(lambda: samoe(num_hidden_layers), is_low=False)
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Listening() as between:
        model(torch.arange(24).view(2, 12) % 31).logits.square().mean().backward()
    optimizer.step()
    pool = dict(model.base_model.pools.named_parameters())
    held = {
        "weights": [parameter.to_local() for parameter in pool.values()],
        "gradients": [parameter.grad.to_local() for parameter in pool.values()],
        "adam": [optimizer.state[parameter]["exp_avg"].to_local() for parameter in pool.values()],
    }
    assert len(decayed(model)) == len(decayed(samoe(num_hidden_layers)))
    return {
        **between.heard,
        "pool": sum(parameter.numel() for parameter in pool.values()),
        "predicted": scale.values_sent(model.config),
        "held": {name: sum(part.numel() for part in parts) for name, parts in held.items()},
    }


def copied() -> bool:
    """Whether dividing a model and putting it together again gives it back, bit for bit."""
    model = distributed.build(lambda: samoe(2), is_low=False)
    model(torch.arange(12)[None])  # leaves gathered parameters behind
    again = distributed.plain(model, torch.float32)
    if again is None:
        return True
    ours, theirs = samoe(2).state_dict(), again.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def fail_in_one(*_: Any, **__: Any) -> None:
    """A run whose second process has a problem of its own; the first one waits for it."""
    if not processes.is_first():
        raise RecipeError("the second process has had enough")
    dist.barrier()


def all_of_it() -> None:
    """Everything, in order."""
    warnings.simplefilter("ignore")
    processes.meet()
    done = {
        "whole run": run("whole"),
        "before the stop": run("resumed", stop=STOP),
        "after the stop": run("resumed"),
        "left to one": run("left", stop=STOP),
        "low": run("low", **json.loads((FOLDER / "low.json").read_text())),
        "steps": [one_step(layers) for layers in LAYERS],
        "low steps": [bytes_of_a_step(sharing) for sharing in ("pool", "none")],
        "copied": copied(),
    }
    every: list[Any] = [None, None]
    dist.all_gather_object(every, done)
    if processes.is_first():
        (FOLDER / "done.json").write_text(json.dumps(every))
    trainer.train = fail_in_one
    sys.exit(main(["train", str(FOLDER / "recipe.json")]))


if __name__ == "__main__":
    all_of_it()
