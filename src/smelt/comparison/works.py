"""The work that every cell and trial of a comparison stands for: its recipes and its folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smelt.comparison.cells import Cell, cells
from smelt.comparison.settings import FULL, ComparisonRecipe, Ground, Resolved, merged
from smelt.comparison.work_settings import Ask, Work
from smelt.compress.check import needs_gradients
from smelt.compress.methods import resolve
from smelt.recipe import CalibrationRecipe, CompressRecipe
from smelt.settings import check_recipe, expand_environment, find_recipe, read_values
from smelt.study.store import Store
from smelt.train.heal_settings import HealRecipe
from smelt.train.settings import TrainRecipe

START = "start"
"""The name of the run that makes what everything starts from, where a recipe asks for one."""


class Works:
    """The work of every cell and trial of a comparison, in a store."""

    def __init__(self, study: ComparisonRecipe, store: Store) -> None:
        self.study, self.store = study, store

    # --- where things lie ------------------------------------------------------------------------

    @property
    def start(self) -> str:
        """The folder that fine-tuning starts from."""
        named = self.study.start
        if isinstance(named, str) and not named.endswith(".yaml"):
            return expand_environment(named)
        return str(self.store.run(START))

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's model; a full model that is not fine-tuned is the start."""
        if cell.variant == FULL and self._tuning(cell) is None:
            return Path(self._origin(cell.task)).expanduser()
        return self.store.run(cell.id)

    def result(self, name: str) -> Path:
        """What was measured on a cell or trial."""
        return self.store.beside(name, "json")

    # --- the start -------------------------------------------------------------------------------

    def beginning(self) -> Work | None:
        """The run that makes the start; None: it is a folder."""
        named = self.study.start
        if isinstance(named, str) and not named.endswith(".yaml"):
            return None
        return self._begun(START, named, {"output": self.start})

    def before(self, task: str) -> tuple[str, Work] | None:
        """Name and work of the run between the start and a ground's fine-tuning, if there is one.

        All seeds of the ground start from what it makes, and so do all grounds that name its file.
        """
        named = self.study.tasks[task].before
        if named is None:
            return None
        name = f"before/{Path(named).stem}" if isinstance(named, str) else f"{task}/before"
        own = {"start": self.start, "output": str(self.store.run(name))}
        return name, self._begun(name, named, own)

    def _begun(self, name: str, named: str | Mapping[str, Any], own: dict[str, Any]) -> Work:
        if isinstance(named, str):
            named = read_values(find_recipe(named, "train"), TrainRecipe)
        recipe = check_recipe({**named, **own}, TrainRecipe, origin=name)
        folder = recipe.output
        return Work(kind="start", result=str(self.result(name)), model=folder, train=recipe)

    def _origin(self, task: str) -> str:
        """The folder that fine-tuning on a ground starts from."""
        found = self.before(task)
        return self.start if found is None else found[1].model

    # --- full models -----------------------------------------------------------------------------

    def full(self, cell: Cell) -> Work:
        """Fine-tune, measure, take statistics."""
        folder, ground = str(self.folder(cell)), self.study.tasks[cell.task]
        tuning = self._tuning(cell)
        train = None
        if tuning is not None:
            values = {
                "start": self._origin(cell.task),
                **tuning,
                "output": folder,
                "seed": cell.seed,
            }
            if ground.text is None:
                values["task"] = self._task(cell.task)
            train = check_recipe(values, TrainRecipe, origin=f"cell {cell.id}")
        return Work(
            kind="full",
            result=str(self.result(cell.id)),
            model=folder,
            source=self._origin(cell.task),
            train=train,
            calibration=self._calibration(cell),
            stats=self.stats(cell),
            ask=self.ask(cell.task, "report"),
        )

    def stats(self, cell: Cell) -> str:
        """The folder of the full model's statistics."""
        return str(self.store.beside(cell.full.id, "stats"))

    def _tuning(self, cell: Cell) -> dict[str, Any] | None:
        ground = self.study.tasks[cell.task]
        if self.study.fine_tune is None or ground.fine_tune is None:
            return None
        if ground.text is not None and "fine_tune" not in ground.model_fields_set:
            return None
        return merged(self.study.fine_tune, ground.fine_tune)

    def _task(self, task: str) -> dict[str, Any]:
        ground = self.study.tasks[task]
        return {
            "name": ground.benchmark or task,
            "limit": ground.limit,
            "max_input": ground.max_input,
            "balanced": ground.balanced,
        }

    def _calibration(self, cell: Cell) -> CalibrationRecipe:
        ground = self.study.tasks[cell.task]
        values = merged(self.study.calibration, ground.calibration)
        values |= {"seed": cell.seed, "gradients": self._wants_gradients(cell.task)}
        if ground.text is None:
            own = {"name": ground.benchmark or cell.task, "max_input": ground.max_input}
            values["task"] = merged(own, values.get("task") or {})
        else:
            length = ground.text.sequence_length
            values = {"sequence_length": length, "text": ground.text.train, **values}
        return check_recipe(values, CalibrationRecipe, origin=f"calibration of {cell.id}")

    def _wants_gradients(self, task: str) -> bool:
        """Whether any variant on the ground reads gradients."""
        names = {v for p in self.study.parts.values() if task in p.tasks for v in p.variants}
        every = [self.study.resolve(name) for name in sorted(names)]
        every += [self.study.resolve(one.after) for one in every if one.after]
        recipes = [self._compress(one, "full", "out", 0) for one in every]
        return any(needs_gradients(resolve(recipe)) for recipe in recipes if recipe)

    # --- variants --------------------------------------------------------------------------------

    def variant(self, cell: Cell, rate: float | None = None) -> Work:
        """Compress, heal, measure what is reported."""
        one, folder = self.study.resolve(cell.variant, cell.task), self.store.run(cell.id)
        return self._made(cell, one, folder, self.ask(cell.task, "report"), rate=rate)

    def trial(self, task: str, variant: str, rate: float) -> tuple[str, Work]:
        """Name and work of a trial of one rate: measured on the part that is for choosing."""
        search = self.study.heal_search
        assert search is not None
        name = f"{task}/search/{variant}/rate-{rate:g}"
        one = self.study.resolve(variant, task)
        heal = merged(one.heal or {}, search.heal)
        one = Resolved(one.name, one.compress, heal, one.after, one.rate)
        cell = Cell(task, search.seed, variant)
        ask = self.ask(task, "choose")
        work = self._made(cell, one, self.store.run(name), ask, name=name, rate=rate)
        return name, work.model_copy(update={"kind": "trial"})

    def _made(
        self,
        cell: Cell,
        one: Resolved,
        folder: Path,
        ask: Ask,
        *,
        name: str = "",
        rate: float | None = None,
    ) -> Work:
        source = full = str(self.folder(cell.full))
        if one.after is not None:
            source = str(self.folder(Cell(cell.task, cell.seed, one.after)))
        aside = str(folder)
        if one.heal is not None:
            aside = str(folder.with_name(folder.name + ".merged"))
        compress = self._compress(one, full, aside, cell.seed)
        heal = None
        if one.heal is not None:
            student = source if compress is None else aside
            heal = self._heal(cell, one, student, full, str(folder), rate)
        return Work(
            kind="variant",
            result=str(self.result(name or cell.id)),
            model=str(folder),
            full=full,
            source=source,
            stats=self.stats(cell),
            compress=compress,
            heal=heal,
            ask=ask,
        )

    def _compress(
        self, one: Resolved, source: str, output: str, seed: int
    ) -> CompressRecipe | None:
        if one.compress is None:
            return None
        values = {"form": "mapped", "seed": seed, "workers": 1, **one.compress}
        values |= {"source": source, "output": output}
        return check_recipe(values, CompressRecipe, origin=f"variant {one.name}")

    def _heal(
        self, cell: Cell, one: Resolved, student: str, teacher: str, output: str, rate: float | None
    ) -> HealRecipe:
        ground = self.study.tasks[cell.task]
        values = merged(one.heal or {})
        values |= {"student": student, "teacher": teacher, "output": output, "seed": cell.seed}
        if rate is not None:
            values["learning_rate"] = rate
        if ground.text is None:
            values["task"] = self._task(cell.task)
        else:
            own = {
                "train": ground.text.train,
                "held_out": ground.text.choose,
                "tokens": ground.text.tokens,
                "sequence_length": ground.text.sequence_length,
            }
            values["text"] = merged(own, values.get("text") or {})
        if values.get("decompose"):
            excluded = self._excluded(one)
            values["decompose"] = {"excluded": excluded, **values["decompose"]}
        return check_recipe(values, HealRecipe, origin=f"healing of {cell.id}")

    def _excluded(self, one: Resolved) -> Any:
        """The layers that compression leaves as they are: so does decomposition."""
        other = self.study.resolve(one.after) if one.after else one
        return (other.compress or {}).get("excluded", ())

    def ask(self, task: str, part: Any) -> Ask:
        """What models on a ground are measured on."""
        ground = self.study.tasks[task]
        if ground.text is None:
            return Ask(
                part=part,
                benchmark=ground.benchmark or task,
                max_input=ground.max_input,
                limit=ground.report_limit if part == "report" else ground.choose_limit,
                batch_size=ground.batch_size,
            )
        return _ask_text(ground, part)

    def every(self) -> Iterator[tuple[str, Work]]:
        """The work of all cells, for a check of the recipe; rates as the recipe has them."""
        begin = self.beginning()
        if begin is not None:
            yield START, begin
        stages = (self.before(task) for task in self.study.tasks)
        yield from dict(stage for stage in stages if stage is not None).items()
        for cell in cells(self.study):
            yield cell.id, self.full(cell) if cell.variant == FULL else self.variant(cell)


def _ask_text(ground: Ground, part: Any) -> Ask:
    text = ground.text
    assert text is not None
    return Ask(
        part=part,
        batch_size=ground.batch_size,
        text=text.report if part == "report" else text.choose,
        num_tokens=text.report_tokens,
        sequence_length=text.sequence_length,
        tasks=text.tasks if part == "report" else (),
        limit=ground.report_limit if part == "report" else ground.choose_limit,
    )
