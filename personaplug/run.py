"""A run: a folder with a resolved config, the task, the item vectors, the trained plugs and the evaluations.

RUN/config.yaml               all settings, resolved, and their checksum
RUN/run.json                  task, versions
RUN/data.json                 fingerprint of the training data
RUN/vectors/                  item vectors (unless --vectors names another folder)
RUN/plug/seed-0/              a trained plug, its log.jsonl and, until training ends, checkpoints to resume from
RUN/instruction-only/seed-0/  its control; trained parts of other rows have folders of the same form
RUN/profiles.jsonl            profiles that the model generated, if a row needs them
RUN/users/                    LoRA matrices of single users, if a row needs them
RUN/evaluations/dev/          predictions in LaMP's format, scores per sample
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personaplug.config import FIXED, SPEED_ONLY, Config, PlugConfig
from personaplug.config_parsing import with_values
from personaplug.config_resolution import resolved
from personaplug.data.records import Sample
from personaplug.data.splits import drawn
from personaplug.data.task import Reader, Task
from personaplug.data.task_registry import parse_task
from personaplug.data.wording import Wording, learn_wordings
from personaplug.encoders import Encoder, open_encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, encoded, samples_fingerprint
from personaplug.encoders.item_parts import check_item_parts
from personaplug.errors import ConfigError, DamagedFile, MissingData, RunConflict
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import check_json, read_json
from personaplug.infra.config_file import read_config, write_config
from personaplug.infra.distributed import connect, is_main, main_first
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.links import check_links
from personaplug.infra.trackers import check_trackers
from personaplug.infra.training_facts import read_facts
from personaplug.llm.base import LanguageModel
from personaplug.llm.copied_answers import check_model
from personaplug.llm.copy_head import CopyHead
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.prompt_tokenizer import today
from personaplug.plug.model import PersonaPlug

TASKS_FILE, SHARED_TRAINING = "tasks.json", "shared"
"""Names in the folder of a shared run, next to the runs of its tasks; see `shared_run`."""

_REPORTS = ("log.jsonl", "tensorboard")
"""Files of a training that nothing depends on."""

COPY_HEAD = "plug+copy-head"  # the trained part in `training/copy_head_part.py`
_REMEDY = "Restore it, or train again in a new folder."
_MOVABLE = ("model.llm", "model.encoder", *SPEED_ONLY)  # users may edit these settings after they move a run


@dataclass(frozen=True)
class Models:
    """The two loaded frozen models of a config."""

    encoder: Encoder
    llm: LanguageModel


def open_models(config: Config, *, readers: Sequence[Reader] = ()) -> Models:
    """Load encoder and language model.

    Raises:
        ConfigError: if the encoder has no part for the pictures or the vectors of `readers`.
        MissingModel: if a model is not found.
        MissingExtra: if the encoder's engine is not installed.
    """
    device, engine = choose_device(config.model.device), config.model.encoder_engine
    encoder = open_encoder(config.model.encoder, device=device, engine=engine)
    check_item_parts(encoder.identity, *readers)  # before the language model is loaded, which may take minutes
    return Models(encoder, open_llm(config.model))


@dataclass(frozen=True)
class Run:
    """A run's folder, config and task.

    Attributes:
        config: the resolved config.
        vectors: folder of the item vectors.
        creates_vectors: whether to create that folder if it does not exist. An opened run creates no folder outside
            its own folder.
        shared_labels: the labels of all tasks that share a plug; None if the run has a single task.
    """

    folder: Path
    config: Config
    task: Task
    vectors: Path
    creates_vectors: bool = True
    shared_labels: tuple[str, ...] | None = None

    @classmethod
    def create(cls, folder: str | Path, *, config: Config, task: Task, vectors: str | Path | None = None) -> Run:
        """Start a run, or resume an existing one; see `plan`."""
        run = cls.plan(folder, config=config, task=task, vectors=vectors)
        run.start()
        return run

    @classmethod
    def plan(
        cls,
        folder: str | Path,
        *,
        config: Config,
        task: Task,
        vectors: str | Path | None = None,
        shared_labels: tuple[str, ...] | None = None,
    ) -> Run:
        """Return a run for `start`, without writing files. The seeds may differ from those of an existing run.

        Raises:
            RunConflict: if the folder contains other files, or a run that has trained or evaluated parts and another
                task or other settings of models, plug or training.
            ConfigError: if the device does not support several processes.
            MissingExtra: if a tracker of `report_to` is not installed.
        """
        check_trackers(config.training.report_to)
        connect(choose_device(config.model.device))
        vectors_folder = Path(vectors).absolute() if vectors else Path(folder, "vectors")
        return main_first(
            lambda: cls(
                Path(folder), resolved(dated(config, folder), task), task, vectors_folder, shared_labels=shared_labels
            )._planned(has_vectors_folder=bool(vectors))
        )

    def _planned(self, *, has_vectors_folder: bool) -> Run:
        run, folder = self, self.folder
        if folder.exists() and not folder.is_dir():
            raise RunConflict(f"{folder} is a file; a run needs a folder. Choose another --out.")
        if (folder / "run.json").exists():
            existing = Run.open(folder)
            if run.shared_labels is None:
                run = replace(run, shared_labels=existing.shared_labels)
            if not has_vectors_folder:
                run = replace(run, vectors=existing.vectors, creates_vectors=existing.creates_vectors)
            if existing._is_begun:
                run._check_same(existing)
        elif folder.exists() and {path.name for path in folder.iterdir()} - {"vectors", "config.yaml"}:
            raise RunConflict(f"{folder} is neither empty nor a run of personaplug. Choose another --out.")
        return run

    def start(self) -> None:
        """Write the run's config and description.

        Raises:
            RunConflict: if a process cannot see the folder.
        """
        main_first(self._start)

    def _start(self) -> None:
        if is_main():
            self._write()
        elif not (self.folder / "run.json").exists():
            raise RunConflict(
                f"A process cannot see {self.folder}. If the processes run on several machines, --out must be a shared "
                f"folder."
            )

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run.

        Raises:
            MissingData: if the folder contains no run (DamagedFile: if the run was changed).
            ConfigError: if its config contains a setting that no longer exists.
            RunConflict: if a link leads out of the folder.
        """
        folder = Path(folder)
        path = folder / "run.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if (folder / TASKS_FILE).is_file():
                tasks = ", ".join(sorted(str(each.parent) for each in folder.glob("*/run.json")))
                reason = f"{folder} contains the runs of several tasks, in folders with the names of the tasks."
                raise MissingData(f"{reason} Give one of these folders: {tasks}.") from error
            raise MissingData(
                f"{folder} is not a run: run.json is missing or broken. `personaplug train --out {folder}` creates one."
            ) from error
        if not isinstance(about, dict) or not isinstance(about.get("task"), dict):
            raise ConfigError(f"{path} must contain an object with the run's `task`; found something else.")
        task = parse_task(about["task"], source=str(path))
        vectors_folder, labels = about.get("vectors"), about.get("shared_labels")
        if not isinstance(vectors_folder, str | None):
            raise ConfigError(f"{path}: `vectors` must be a folder or null; found something else.")
        if not isinstance(labels, list | None):
            raise ConfigError(f"{path}: `shared_labels` must be a list or null; found something else.")
        check_json(about, path, remedy=_REMEDY)
        check_links(folder)
        vectors = Path(vectors_folder) if vectors_folder else folder / "vectors"
        is_inside = vectors.resolve().is_relative_to(folder.resolve())
        config = read_config(folder / "config.yaml", unchecked=_MOVABLE, run=str(about.get("id", "")))
        return cls(folder, config, task, vectors, is_inside, None if labels is None else tuple(labels))

    @property
    def item_labels(self) -> tuple[str, ...]:
        """Possible labels of item answers: the labels of the task, or of all tasks that share a plug."""
        return self.task.labels if self.shared_labels is None else self.shared_labels

    @property
    def id(self) -> str:
        """Random name that all files of the run contain, to detect files of another run; empty before the start."""
        path = self.folder / "run.json"
        return str(read_json(path, remedy=_REMEDY).get("id", "")) if path.exists() else ""

    def asked(self, task: Task) -> Run:
        """Return the run with another task, for evaluation on its data. Both tasks must be conversations.

        Raises:
            ConfigError: if the tasks have different kinds of answers.
        """
        if task == self.task:
            return self
        if (self.task.kind, task.kind) != ("chat", "chat") or task.field_names != self.task.field_names:
            raise ConfigError(
                f"The run was trained on {self.task.name}, but {task.name} has answers of another kind. Give data of "
                f"{self.task.name}, or train a run on {task.name}."
            )
        return replace(self, task=task)

    def plug_folder(self, name: str, *, seed: int) -> Path:
        """Return the folder of a trained part (a plug, its control, LoRA, a retriever) for one seed."""
        return self.folder / name.replace(":", "-") / f"seed-{seed}"

    def trained(self, name: str, *, seed: int) -> bool:
        """Return whether the training of a part has finished."""
        return self.training_facts(name, seed=seed) is not None

    def trained_parts(self, *names: str) -> list[str]:
        """Return the parts whose training has finished with each seed of the run."""
        return [name for name in names if all(self.trained(name, seed=seed) for seed in self.config.training.seeds)]

    def training_facts(self, name: str, *, seed: int) -> dict[str, Any] | None:
        """Return the recorded facts of a part's training; None if it has not finished.

        Raises:
            DamagedFile: if their file is damaged, or it or the weights belong to another training.
        """
        return read_facts(self.plug_folder(name, seed=seed), owner=self.owner(name, seed=seed))

    def owner(self, name: str, *, seed: int) -> str:
        """Return a unique name of one training of this run, for its files."""
        return f"{self.id} {self.plug_folder(name, seed=seed).parent.name} {seed}"

    def check_trained(self, name: str, *, seed: int) -> Path:
        """Return the folder of a finished training.

        Raises:
            MissingData: if the training has not finished.
        """
        folder = self.plug_folder(name, seed=seed)
        if not self.trained(name, seed=seed):
            raise MissingData(
                f"{folder} contains no finished training. Leave {name} out, or repeat this run's "
                f"`personaplug train` command with the same settings and --methods {name}."
            )
        return folder

    def load_plug(self, name: str, *, seed: int, models: Models) -> PersonaPlug:
        """Load a trained plug.

        Raises:
            MissingData: if its training has not finished.
        """
        folder = self.check_trained(name, seed=seed)
        plug = PersonaPlug.from_pretrained(folder, encoder=models.encoder, llm=models.llm.identity)
        return plug.compute_items_in(models.llm.dtype).to(models.llm.device)

    def load_copy_head(self, llm: LanguageModel, *, seed: int) -> CopyHead:
        """Load a trained copy head; MissingData if its training has not finished."""
        return check_model(llm).load_copy_head(self.check_trained(COPY_HEAD, seed=seed))

    def open_vectors(self, encoder: Encoder) -> EmbeddingStore:
        """Open the run's table of item vectors.

        Raises:
            MissingData: if the table of an opened run is outside its folder and does not exist.
        """
        if not self.creates_vectors and not (self.vectors / "table.json").is_file():
            raise MissingData(
                f"{self.vectors} contains no item vectors, but {self.folder / 'run.json'} names this folder for them. "
                f"Restore the folder, or repeat `personaplug train` with another --vectors."
            )
        return EmbeddingStore.open(self.vectors, encoder)

    def read_samples(
        self,
        reader: Reader,
        table: EmbeddingStore,
        *,
        limit: int = 0,
        seed: int = 0,
        plug: PlugConfig | None = None,
        rewrite: Callable[[Sample], Sample] = lambda sample: sample,
    ) -> list[EncodedSample]:
        """Read a split into samples whose items are rows of the table. The texts of histories are not kept in memory.

        Args:
            limit: maximum samples, drawn by `seed`; 0 = all.
            plug: config of the plug that reads the items; None = the run's own.
            rewrite: replaces the prompt of a sample before the texts of its history are dropped.
        """
        samples = (rewrite(sample) for sample in drawn(reader, limit=limit, seed=seed))
        return encoded(samples, table, plug=plug or self.config.plug, labels=self.item_labels)

    def check_unchanged(self, config: Config) -> None:
        """Check that a config has the run's own values for all settings that its plugs depend on.

        Raises:
            RunConflict: lists the settings that differ.
        """
        names = _differing(resolved(dated(config, self.folder), self.task), self.config)
        if names:
            raise RunConflict(
                f"{', '.join(names)} cannot be changed after training; {self.folder} was trained with other "
                f"values. Remove these settings, or train another run."
            )

    def check_models(self, models: Models) -> None:
        """Raise RunConflict if the chat template of the models writes another date than the run's."""
        day, of_run = models.llm.identity.chat_date, self.config.model.chat_date
        if day not in (None, of_run):
            raise RunConflict(
                f"The prompts of {self.folder} contain the date {of_run}, but the given models write {day}. Open the "
                f"models with open_models(run.config)."
            )

    def check_data(self, samples: Sequence[EncodedSample], table: EmbeddingStore) -> None:
        """Record a fingerprint of the training data, or compare it with the recorded fingerprint.

        Raises:
            RunConflict: if the run was started on other data.
        """
        users = sorted({_anonymous(sample.user_id) for sample in samples if sample.user_id is not None})
        about = {"samples": len(samples), "fingerprint": samples_fingerprint(samples, table), "users": users}
        about["wordings"] = list(map(asdict, () if self.task.kind == "chat" else learn_wordings(samples)))
        recorded = self._data() or about
        if recorded["fingerprint"] != about["fingerprint"]:
            raise RunConflict(
                f"{self.folder} was started on other training data. Give the same data to resume it, or choose another "
                f"--out."
            )
        if is_main():
            write_checked_json(self.folder / "data.json", {**about, "run": self.id})

    def export(self, folder: Path, names: Sequence[str]) -> None:
        """Write a run without any user's data: settings, task, wordings, and the trained parts in `names`."""
        for part in [self.check_trained(name, seed=seed) for seed in self.config.training.seeds for name in names]:
            unneeded = shutil.ignore_patterns(*_REPORTS, ".*")
            shutil.copytree(part, folder / part.relative_to(self.folder), ignore=unneeded, dirs_exist_ok=True)
        shutil.copyfile(self.folder / "config.yaml", folder / "config.yaml")
        write_checked_json(folder / "data.json", {**self._data(), "users": [], "run": self.id})
        about = read_json(self.folder / "run.json", remedy=_REMEDY)
        write_checked_json(folder / "run.json", {**about, "vectors": None})  # last, because this file marks a run

    def _data(self) -> dict[str, Any]:
        """Return the recorded facts about the training data; empty before the first training."""
        path = self.folder / "data.json"
        if not path.exists():
            return {}
        about = read_json(path, remedy=_REMEDY)
        if about.get("run", "") != self.id:
            raise DamagedFile(path, reason="it belongs to another run", remedy=_REMEDY)
        return about

    @property
    def wordings(self) -> tuple[Wording, ...]:
        """The wordings of the training prompts; empty before the first training."""
        return tuple(Wording(**wording) for wording in self._data().get("wordings", ()))

    @property
    def knows_its_data(self) -> bool:
        """Whether the run has recorded its training data."""
        return (self.folder / "data.json").exists()

    def users_trained_on(self, users: Iterable[str | None]) -> int:
        """Return how many of `users` have samples in the run's training data."""
        trained = set(self._data().get("users", ()))
        return sum(_anonymous(user) in trained for user in set(users) if user is not None)

    @property
    def _is_begun(self) -> bool:
        """Whether the folder contains files that depend on the settings, of a training or an evaluation."""
        if any((self.folder / name).exists() for name in ("evaluations", "users", "profiles.jsonl")):
            return True
        files = list(self.folder.glob("*/seed-*/[!.]*"))
        if self.shared_labels is not None:  # the checkpoints of the shared training are in the parent folder
            files += self.folder.parent.glob(f"{SHARED_TRAINING}/seed-*/[!.]*")
        return any(path.name not in _REPORTS for path in files)

    def _check_same(self, existing: Run) -> None:
        names = [name for name in _differing(self.config, existing.config) if name != "training.seeds"]
        if self.task != existing.task:
            names.insert(0, "task")
        if self.shared_labels != existing.shared_labels:
            names.append("set of tasks that share its plug")
        if names:
            raise RunConflict(
                f"{self.folder} contains a run with another {', '.join(names)}. To resume that run, give the settings "
                f"in its config.yaml; otherwise choose another --out."
            )

    def _write(self) -> None:
        about = {
            "id": self.id or secrets.token_hex(8),
            "task": asdict(self.task),
            **({} if self.shared_labels is None else {"shared_labels": list(self.shared_labels)}),
            # None for the default folder inside the run, so that users can move the run.
            "vectors": None if self.vectors == self.folder / "vectors" else str(self.vectors),
            "versions": package_versions(),
            "machine": machine_info(),
        }
        if not self._is_begun:
            (self.folder / "data.json").unlink(missing_ok=True)  # from an earlier start that failed before training
        write_config(self.folder / "config.yaml", self.config, unchecked=_MOVABLE, run=str(about["id"]))
        write_checked_json(self.folder / "run.json", about)


def dated(config: Config, folder: str | Path) -> Config:
    """Resolve `chat_date=auto` to the date of the run in the folder, or to today if there is no run yet."""
    if config.model.chat_date != "auto":
        return config
    is_run = (Path(folder) / "run.json").exists()
    day = Run.open(folder).config.model.chat_date if is_run else today()
    return with_values(config, {"model.chat_date": day})


def _anonymous(user: str) -> str:
    return hashlib.blake2b(user.encode(), digest_size=8).hexdigest()


def _differing(one: Config, other: Config) -> list[str]:
    left, right = asdict(one), asdict(other)
    differing = [f"{s}.{key}" for s in FIXED for key in left[s] if left[s][key] != right[s][key]]
    return [name for name in differing if name not in SPEED_ONLY]
