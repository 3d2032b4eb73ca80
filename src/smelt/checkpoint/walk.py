"""The model's own forward, suspended at every block, so that all batches go through it in step.

So one block's weights are in memory at a time, whatever the model's size, and no family needs code:
each batch runs in a greenlet that stops in a hook before the block and goes on when its weights are
there. Large embeddings and output matrices outside the blocks are stages of their own.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from smelt.checkpoint.place import move_buffers, put, take_out
from smelt.checkpoint.source import Checkpoint

Visit = Callable[["Stage"], contextlib.AbstractContextManager[None]]
"""Entered when a stage's weights are loaded and all batches wait before it; left when all ran."""

_STAGED = (nn.Embedding, nn.Linear)
_STAGED_PARAMS = 1 << 20
_CPU = torch.device("cpu")


class Stage:
    """A module whose weights are in memory now, and the inputs of every batch that waits for it."""

    def __init__(self, name: str, module: nn.Module, walk: "Walk") -> None:
        self.name = name
        self.module = module
        self.walk = walk

    def outputs(self, indices: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Run the module on waiting batches, all of them or these, and yield what it returns."""
        for index in range(len(self.walk.batches)) if indices is None else indices:
            self.walk.current = index
            args, kwargs = self.walk.waiting[index]
            device = self.walk.device
            with torch.no_grad():
                yield index, self.own(*_to(args, device), **_to(kwargs, device))

    def replay(self, indices: Iterable[int] | None = None) -> None:
        """The same for hooks alone, that see the batches: the outputs are dropped."""
        for _ in self.outputs(indices):
            pass

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @contextlib.contextmanager
    def runs_as(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within: another forward runs in the place of the module's own."""
        self.walk.replacement = forward
        try:
            yield
        finally:
            self.walk.replacement = None


class Walk:
    """One pass of a checkpoint over batches of inputs, one stage's weights in memory at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        device: str = "cpu",
        hidden_on_cpu: bool = False,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        """
        Args:
            batches: keyword arguments of the model's forward, one mapping per batch.
            device: where blocks run ("cpu", "cuda", "cuda:1").
            hidden_on_cpu: keep the batches' hidden states on the CPU between blocks.
            read: where weights come from; the checkpoint by default.
        """
        self.checkpoint = checkpoint
        self.batches = batches
        self.device = torch.device(device)
        self.hidden_on_cpu = hidden_on_cpu and self.device.type != "cpu"
        self.read = read or checkpoint.read
        self.model = checkpoint.skeleton()
        self.current = 0
        self.replacement: Callable[..., Any] | None = None
        self.waiting: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(batches)
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._stages = self._find_stages()
        self._names = {name: self._names_of(name) for name in self._stages}
        staged = {n for names in self._names.values() for n in names}
        self._resident = [n for n in checkpoint.state if n not in staged]

    def _find_stages(self) -> dict[str, nn.Module]:
        blocks = [name for name in self.checkpoint.blocks if name]
        stages = {name: self.model.get_submodule(name) for name in blocks}
        for name, module in self.model.named_modules():
            inside = any(name == b or name.startswith(b + ".") for b in blocks)
            if not inside and isinstance(module, _STAGED) and _size(module) >= _STAGED_PARAMS:
                stages[name] = module
        return stages

    def _names_of(self, stage: str) -> list[str]:
        return [n for n in self.checkpoint.state if n.startswith(stage + ".")]

    def load(self, names: Sequence[str]) -> None:
        """Put these parameters and buffers in place, in the types the model computes in."""
        for name in names:
            put(self.model, name, self.read(name), self.device)

    def unload(self, names: Sequence[str]) -> None:
        """Give the memory of these parameters back."""
        take_out(self.model, {name: self._meta[name] for name in names if name in self._meta})

    def run(
        self, visit: Visit | None = None, *, until: str | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (batch index, model output) as batches finish; nothing is kept for the caller.

        Args:
            visit: entered around every block.
            until: stop after this block; then nothing is yielded.
        """
        move_buffers(self.model, self.device)
        self.load(self._resident)
        main = getcurrent()
        hooks = self._hook()
        self._suspend(main, until)
        runs = [greenlet(self._forward, main) for _ in self.batches]
        try:
            at = [self._resume(run, i) for i, run in enumerate(runs)]
            while not all(run.dead for run in runs):
                stage = Stage(at[0], self._stages[at[0]], self)
                assert all(name == at[0] for name in at), "batches took different paths"
                self.load(self._names[stage.name])
                is_block = stage.name in self.checkpoint.blocks
                context = visit(stage) if visit and is_block else contextlib.nullcontext()
                with context:
                    for index, run in enumerate(runs):
                        result = self._resume(run, index)
                        if run.dead:
                            yield index, result
                            result = None
                        else:
                            at[index] = result
                self.unload(self._names[stage.name])
                if stage.name == until:
                    return
        finally:
            for run in runs:
                if run and not run.dead:
                    run.throw(GreenletExit)
            for hook in hooks:
                hook.remove()
            for module in self._stages.values():
                del module.forward
            self.unload(list(self._meta))

    def _forward(self, index: int) -> Any:
        inputs = {k: v.to(self.device) for k, v in self.batches[index].items()}
        return self.model(**inputs, use_cache=False)

    def _resume(self, run: greenlet, index: int) -> Any:
        self.current = index
        with torch.no_grad():
            return run.switch() if run else run.switch(index)

    def _suspend(self, main: greenlet, until: str | None) -> None:
        """Make every stage wait for its turn.

        Its forward is replaced, not hooked: a module's call looks its forward up before it runs
        hooks, and what runs may be another's by then (`Stage.runs_as`).
        """

        def waits(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                index = self.current
                if self.hidden_on_cpu:
                    args = _to(args, _CPU)
                self.waiting[index] = (args, kwargs)
                main.switch(name)
                self.waiting[index] = ((), {})
                run = self.replacement or own
                output = run(*_to(args, self.device), **_to(kwargs, self.device))
                if name == until:
                    main.switch(name)  # nobody resumes it
                return _to(output, _CPU) if self.hidden_on_cpu else output

            return forward

        for name, module in self._stages.items():
            module.forward = waits(name, module.forward)

    def _hook(self) -> list[Any]:
        """Where hidden states rest on the CPU, bring them to what runs between the blocks."""
        if not self.hidden_on_cpu:
            return []
        owners = {self.model.get_submodule(n.rpartition(".")[0]) for n in self._resident}
        return [module.register_forward_pre_hook(self._bring) for module in owners]

    def _bring(self, _module: nn.Module, args: Any) -> Any:
        return _to(args, self.device)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _to(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and mappings with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_to(v, device) for v in value)
    if type(value) is list:
        return [_to(v, device) for v in value]
    if type(value) is dict:
        return {k: _to(v, device) for k, v in value.items()}
    return value
