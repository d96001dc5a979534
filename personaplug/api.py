"""Plug: train, answer, evaluate, explain, save and share, in one object."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin

from personaplug import inference
from personaplug.analysis.results_file import Results
from personaplug.config import Config
from personaplug.config_parsing import with_values
from personaplug.data import load_task, open_dataset
from personaplug.data.logs.answers import labels_of
from personaplug.data.logs.log import Log, read_log, read_rows
from personaplug.data.logs.options import LogOptions
from personaplug.data.logs.row_form import RowForm
from personaplug.data.logs.writing import describe_columns, describe_rows, describe_task, write_user_split
from personaplug.data.records import Chat, Prompt
from personaplug.data.task import Reader
from personaplug.data.user_histories import Histories, History
from personaplug.data.values import Flaw, as_text
from personaplug.errors import ConfigError, DamagedFile, MissingData, RunConflict
from personaplug.evaluation.evaluator import evaluate
from personaplug.inference import Answer, ItemInfluence
from personaplug.infra.atomic_io import storage_errors, write_checked_json, write_text
from personaplug.infra.checksums import read_json
from personaplug.infra.distributed import connect, on_main
from personaplug.llm.loading import choose_device
from personaplug.methods import default_rows, needed_parts, parse_methods
from personaplug.methods.base import Method
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import CARD, find_plug, model_card, read_description
from personaplug.run import COPY_HEAD, Models, Run, open_models
from personaplug.training.parts import INSTRUCTION, PLUG, train, trained_counting

logger = logging.getLogger(__name__)

QUESTIONS_PER_USER = 8

_DATA, _RUN, _COLUMNS = "data", "run", "columns.json"
_SAVED = ("*.json", "*.yaml", "plug/*", "instruction-only/*", f"{COPY_HEAD}/*")
_EXAMPLE = """from personaplug import Plug

plug = Plug.from_pretrained("this folder or repository")
print(plug.answer("a question", history=[{history}]))"""
_REMEDY = "Save it again with Plug.save_pretrained, or train again in a new folder."


class Plug(ModelHubMixin):
    """A frozen language model with a trained plug, which answers each user by the user's own history.

        from personaplug import Plug

        plug = Plug.train("reviews.csv", user="customer", question="product", answer="stars", date="when")
        print(plug.answer("A slow documentary", user="c17"))
        print(plug.evaluate())
        plug.save_pretrained("my-plug")

        plug = Plug.from_pretrained("my-plug")
        history = [{"product": "A quiet drama", "stars": 2}, {"product": "A loud comedy", "stars": 5}]
        print(plug.answer("A slow documentary", history=history))

    Attributes:
        run: the trained run, for all other functions of this package.
    """

    def __init__(
        self, run: Run, *, form: RowForm | None = None, data: Path | None = None, models: Models | None = None
    ) -> None:
        """Use a run; prefer `train`, `open` and `from_pretrained`.

        Args:
            form: of the rows that the run was trained on; None = a folder in LaMP's layout.
            data: the folder with the users' histories and the held-out users; None = a saved plug without them.
            models: the run's models; None = load them when they are needed.
        """
        self._hub_mixin_config = None  # config.yaml and columns.json hold all settings, so no config.json is written
        self.run, self._form, self._data, self._given_models = run, form, data, models

    @classmethod
    def train(
        cls,
        rows: object,
        *,
        user: str | int = "user",
        question: str | int = "question",
        answer: str | int = "answer",
        date: str | int | None = None,
        image: str | int | None = None,
        vector: str | int | None = None,
        date_format: str | None = None,
        kind: str | None = None,
        labels: Sequence[object] = (),
        task: str | None = None,
        out: str | Path | None = None,
        llm: str | None = None,
        dev_share: float = 0.2,
        questions_per_user: int = QUESTIONS_PER_USER,
        skip_bad: int = 0,
        **settings: Any,
    ) -> Self:
        """Train a plug and its control without history. Repeat the call to resume a stopped training.

        Whole users are held out: a share for `evaluate`, and of the others `validation_share` to choose the checkpoint.

        Args:
            rows: a file (CSV, TSV, JSON lines, JSON, Parquet, also .gz), a DataFrame, a Hugging Face data set, any
                iterable of mappings, or a folder in LaMP's layout, which has its own users, task and dev split.
            user: the column of the user's name or id. A column without a name is named by its number.
            question: the column of the question.
            answer: the column of the user's answer.
            date: the column of the time; None = the rows of a user are in time order.
            image: the column of pictures: bytes, data URLs, paths, or images of Pillow; None = there are none. The
                encoder needs a part for them: encoder="…+pictures:NAME".
            vector: the column of lists of numbers, embeddings of the items that you have computed; None = there are
                none. The encoder needs a part for them: encoder="…+vectors:NAME:WIDTH".
            date_format: of the dates, as for `datetime.strptime`; None = the forms that `personaplug import` reads.
            kind: label, rating, text or chat; None = decide by the answers.
            labels: the closed set of answers; none = decide by the answers.
            task: of a folder that does not name it, such as LaMP_3.
            out: folder for the data and the run; None = `runs/` and the name of the file.
            llm: the language model: hub name, local folder or package:NAME; None = the default of `personaplug train`.
            dev_share: share of the users for `evaluate`, at least two users.
            questions_per_user: how many last rows of each user are asked, each with the rows before it as history.
            skip_bad: leave out at most this many rows that cannot be used.
            settings: as for `personaplug train`: encoder="…", epochs=3, learning_rate=1e-3.
        """
        is_folder = _is_folder(rows)
        if (is_folder and (kind or labels or image or vector)) or (task and not is_folder):
            raise ConfigError(
                "Only a folder in LaMP's layout takes `task`; only other rows take `kind`, `labels`, `image` and "
                "`vector`. Remove the arguments that do not apply."
            )
        config = with_values(Config(), settings if llm is None else {"llm": llm, **settings})
        folder = Path(out) if out else Path("runs", _name_of(rows))
        connect(choose_device(config.model.device))
        log = None
        if not is_folder:
            options = LogOptions(
                user=str(user),
                questions=(str(question),),
                answer=str(answer),
                date=_column(date),
                image=_column(image),
                vector=_column(vector),
                detects_parts=False,
                date_formats=(date_format,) if date_format else (),
                no_date=date is None,
                kind=kind,
                labels=tuple(labels),
                name=None if isinstance(rows, str | Path) else folder.name,
                in_python=True,
            )
            log = read_log([rows], options, max_dropped=skip_bad)
        run = Run.plan(folder / _RUN, config=config, task=log.task if log else load_task(str(rows), task=task))
        form = log.form if log else None
        reader = log.reader() if log else open_dataset(str(rows), "train", task=run.task)
        models = open_models(run.config, readers=[reader])
        plug = cls(run, form=form, data=folder / _DATA, models=models)
        if log is None:
            on_main(lambda: _link(Path(str(rows)), folder / _DATA))
        else:
            limits = {"dev_queries": questions_per_user, "max_history": run.config.plug.max_history}
            on_main(lambda: _write_data(log, folder / _DATA, dev_share=dev_share, **limits))
        run.start()
        on_main(lambda: plug._write_columns(run.folder))
        train(run, plug._split("train", skip_bad=skip_bad), models=plug.models)
        return plug

    @classmethod
    def open(cls, out: str | Path) -> Self:
        """Open the folder `out` of a finished `train`, with the users' histories."""
        if Path(out, "run.json").is_file():
            raise ConfigError(f"{out} holds a saved Plug, without histories. Load it with Plug.from_pretrained.")
        run = Run.open(Path(out, _RUN))
        return cls(run, form=_read_form(run), data=Path(out, _DATA))

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub_options: Any) -> Self:  # type: ignore[override]  # fewer options
        """Load a plug from `save_pretrained` or `push_to_hub`. It holds no histories, so give `history=`.

        Args:
            hub_options: as for `huggingface_hub.snapshot_download` (revision, token, cache_dir, …).
        """
        folder = find_plug(name, files=_SAVED, **hub_options)
        if not (folder / "run.json").is_file():
            raise MissingData(
                f"{name} holds no saved Plug: run.json is missing. Plug.save_pretrained writes one; Plug.open takes "
                f"the folder of a training."
            )
        if folder == Path(name):
            run = Run.open(folder)
            return cls(run, form=_read_form(run))
        copy = Path(tempfile.mkdtemp(prefix="personaplug-"))  # the hub's cache consists of links, which runs refuse
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        run = Run.open(copy)
        plug = cls(run, form=_read_form(run))
        weakref.finalize(plug, shutil.rmtree, copy, ignore_errors=True)
        return plug

    # ---- use

    def answer(
        self, question: Prompt, *, user: object = None, history: History | None = None, copy_head: bool = False
    ) -> Answer:
        """Answer a question, or the last message of a `Chat`, for one user.

        Args:
            user: a user of the training rows; these rows are the history.
            history: the items, in place of `user`: mappings with the columns of the training rows, or HistoryItems;
                [] = a new user. A picture is bytes, a data URL, a path or an image of Pillow.
            copy_head: also copy tokens of the question and of past answers, with the run's trained copy head.
        Raises:
            MissingData: if the run has no trained copy head.
        """
        items, seed = self._histories.find(user=user, history=history), self.run.config.training.seeds[0]
        head = self.run.load_copy_head(self.models.llm, seed=seed) if copy_head else None
        return inference.generate(
            self.run, self._prompt(question), history=items, models=self.models, plug=self._plug, copy_head=head
        )

    def probabilities(
        self, question: Prompt, *, user: object = None, history: History | None = None
    ) -> dict[str, float]:
        """Return the probability of each label as the user's answer; see `answer`."""
        distribution = self.answer(question, user=user, history=history).distribution if self.run.task.labels else None
        if distribution is None:
            raise ConfigError("Probabilities need a closed set of labels; the answers of this task are texts.")
        return dict(distribution.probabilities)

    def explain(
        self,
        question: Prompt,
        *,
        user: object = None,
        history: History | None = None,
        answer: object = None,
    ) -> list[ItemInfluence]:
        """Return the items of the history with their weights in the persona, the heaviest first; see `answer`.

        Args:
            answer: also return how much likelier each item makes this answer, and sort by this effect.
        """
        items, label = self._histories.find(user=user, history=history), self._label(answer)
        return inference.explain(
            self.run, self._prompt(question), history=items, answer=label, models=self.models, plug=self._plug
        )

    def evaluate(self, rows: object = None, *, methods: str | Sequence[str] | None = None, **settings: Any) -> Results:
        """Compare the plug with its controls and with rivals that cost nothing; `print` shows verdict and table.

        Args:
            rows: other rows with the columns of the training rows; None = the users that `train` held out.
            methods: rows of the table, as a list or as for `personaplug evaluate`; None = the default.
            settings: as for `personaplug evaluate`: limit=200, num_beams=1.
        """
        config = with_values(self.run.config, settings)
        self.run.check_unchanged(config)
        names = methods if isinstance(methods, str) else ",".join(methods or ())
        split, reader = ("dev" if rows is None else "rows"), self._reader(rows)
        with self._writable() as run:
            return evaluate(
                run,
                reader,
                split=split,
                methods=parse_methods(names) if names else self._default_methods(),
                config=config.evaluation,
                models=self.models,
                train=None if self._data is None else self._split("train"),
            )

    # ---- save

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write settings, task, plug and control for `from_pretrained`, without any user's texts or history.

        The folder is also a run, for `personaplug serve --run` and `personaplug generate --run`.
        """
        folder = Path(save_directory)
        allowed = {CARD, "run.json", "config.yaml", "data.json", _COLUMNS, PLUG.name, INSTRUCTION.name, COPY_HEAD}
        names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
        if folder.resolve() == self.run.folder.resolve() or names - allowed:
            raise RunConflict(f"{folder} holds more than a saved Plug. Choose a new folder.")
        with storage_errors(folder / CARD):
            return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write_columns(save_directory)
        seed = self.run.config.training.seeds[0]
        config, spec, training = read_description(self.run.check_trained(PLUG.name, seed=seed))
        facts = self.run.training_facts(PLUG.name, seed=seed) or {}
        form = self._form
        columns = (*form.questions, form.mapping.answer) if form else self.run.task.field_names
        item = "{" + ", ".join(f'"{column}": "…"' for column in columns) + "}"
        card = model_card(
            config,
            spec=spec,
            training=training,
            parameters=int(facts.get("parameters", 0)),
            example=_EXAMPLE.replace("{history}", item),
        )
        write_text(save_directory / CARD, str(card))
        self.run.export(save_directory, self._trained_parts())

    # ---- parts

    @cached_property
    def models(self) -> Models:
        """The two frozen models, loaded when they are first needed."""
        return self._given_models or open_models(self.run.config)

    @cached_property
    def _plug(self) -> PersonaPlug:
        return inference.load_plug(self.run, self.models)

    @cached_property
    def _histories(self) -> Histories:
        return Histories(self._data, self._form, self.run.task, self.run.config.plug.max_history)

    def _prompt(self, question: Prompt) -> Prompt:
        if self._form is None or isinstance(question, Chat):
            return question
        if not isinstance(question, str) or not question.strip():
            raise ConfigError("A question is a text that is not blank; found another value.")
        return self._form.prompt_of(question)

    def _label(self, answer: object) -> str | None:
        """Return the label or the text of an answer, as in the rows: 5 and "5.0" are the label "5"."""
        if answer is None:
            return None
        try:
            text = as_text(answer, "`answer`")
        except Flaw as flaw:
            raise ConfigError(f"{flaw}.") from None
        return labels_of(self.run.task).read(text) or text

    def _reader(self, rows: object) -> Reader:
        if rows is None:
            if self._data is None:
                raise ConfigError("A saved plug holds no rows to evaluate on. Give some: evaluate(rows).")
            return self._split("dev")
        max_history = self.run.config.plug.max_history
        if _is_folder(rows):
            return open_dataset(str(rows), "dev", task=self.run.task, max_history=max_history)
        if self._form is None:
            raise ConfigError("This plug was trained on a folder in LaMP's layout. Give such a folder to evaluate on.")
        return read_rows(rows, self._form, split="dev", dev_queries=QUESTIONS_PER_USER, max_history=max_history)

    def _split(self, name: str, *, skip_bad: int = 0) -> Reader:
        assert self._data is not None
        max_history = self.run.config.plug.max_history
        return open_dataset(self._data, name, task=self.run.task, skip_bad=skip_bad, max_history=max_history)

    def _write_columns(self, folder: Path) -> None:
        if self._form is not None:
            write_checked_json(folder / _COLUMNS, self._form.to_dict())

    def _trained_parts(self) -> list[str]:
        return self.run.trained_parts(PLUG.name, INSTRUCTION.name, COPY_HEAD)

    def _default_methods(self) -> list[Method]:
        trained = [*self._trained_parts(), *trained_counting(self.run)]
        rows = default_rows(self.run.task, has_train_split=self._data is not None, trained=trained)
        return [row for row in rows if all(part.name in trained for part in needed_parts([row]))]

    @contextmanager
    def _writable(self) -> Iterator[Run]:
        """Yield a run for predictions: the own run, or a copy of a saved run, which must not change."""
        if self._data is not None:
            yield self.run
            return
        with tempfile.TemporaryDirectory(prefix="personaplug-") as copy:
            self.run.export(Path(copy), self._trained_parts())
            yield Run.open(copy)


def _name_of(rows: object) -> str:
    return Path(rows).name.partition(".")[0] or "plug" if isinstance(rows, str | Path) else "plug"


def _write_data(log: Log, folder: Path, *, dev_share: float, **limits: int) -> None:
    logger.info("%s", "\n".join((*describe_columns(log), describe_task(log))))
    reader = log.reader("dev", **limits)
    parts = write_user_split(log, reader, folder, dev_share=dev_share)
    logger.info("%s", "\n".join(describe_rows(log, reader.report)))
    counts = (parts.train, parts.train_users, parts.dev, parts.dev_users)
    logger.info("train: %d questions of %d users; held out for evaluation: %d questions of %d users", *counts)


def _column(name: str | int | None) -> str | None:
    return None if name is None else str(name)


def _is_folder(rows: object) -> bool:
    return isinstance(rows, str | Path) and Path(rows).is_dir()


def _link(data: Path, link: Path) -> None:
    """Link to a data set instead of copying it, or check an earlier call's link."""
    if link.exists() and link.resolve() != data.resolve():
        raise RunConflict(f"{link} leads to other data than {data}. Give the same folder, or choose another `out`.")
    if not link.exists():
        with storage_errors(link):
            link.symlink_to(data.resolve(), target_is_directory=True)


def _read_form(run: Run) -> RowForm | None:
    path = run.folder / _COLUMNS
    if not path.is_file():
        return None
    values = read_json(path, remedy=_REMEDY)
    try:
        return RowForm.from_dict(values, task=run.task)
    except (KeyError, TypeError):
        raise DamagedFile(path, reason="it has other entries than expected", remedy=_REMEDY) from None
